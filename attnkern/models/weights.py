"""Weights from files: what can go wrong with one, how they are wrapped, and whose names they bear."""

import argparse
import os
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from attnkern._common import came
from attnkern.models.published import Renamed, rename

#: Where a checkpoint holds the weights beside an optimizer's state and the like.
_HOLDERS = ("state_dict", "model_state_dict", "model", "net")
#: What torch.compile, FSDP and activation checkpointing insert into names, at any depth.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def read_file(what: str, path: str | os.PathLike):
    """What is in a file of PyTorch's format or of safetensors; no code in it is run.

    Of classes, ``argparse.Namespace`` alone is let through: published checkpoints hold their options in one.

    Args:
        what: the argument that named the file, for errors.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{what}: there is no file {path!r}")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{what}: {path!r} is a Git LFS pointer instead of weights: run 'git lfs pull'")
    try:
        # safetensors: eight bytes of length, then JSON.
        if path.endswith(".safetensors") or head[8:9] == b"{":
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise ImportError("reading .safetensors needs safetensors: pip install safetensors") from error
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in the reader wherever its bytes lead
        raise ValueError(f"{what}: {path!r} {_fault(error)}") from error


def _fault(error: Exception) -> str:
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found:  # torch.load names the class of an object that it does not allow
        return (
            f"holds an object of {found[1]}, not weights alone, and reading it could run code: where the file comes "
            "from, save the state_dict instead"
        )
    if "TorchScript" in text:
        return "is a TorchScript archive: save the module's state_dict instead"
    # What PyTorch says itself would be to load the file with weights_only=False.
    return "is damaged, cut short, or no file of weights that PyTorch or safetensors wrote"


def read_state(what: str, path: str | os.PathLike, average: bool = False) -> dict[str, torch.Tensor]:
    """The state_dict in a file, out of what holds it, without the prefixes of DDP, torch.compile and Lightning.

    Args:
        average: take the average over time (``net_ema``) where the file has both.
    """
    held = read_file(what, path)
    states = held.get("model_states") if isinstance(held, dict) else None
    if average and not (isinstance(states, dict) and "net_ema" in states):
        raise ValueError(f"{what}: {os.fspath(path)!r} holds no average over time")
    if isinstance(states, dict):
        held = states["net_ema"] if average else states.get("net")
    elif isinstance(held, dict):
        held = next((held[key] for key in _HOLDERS if isinstance(held.get(key), dict)), held)
    if not (
        isinstance(held, dict)
        and held
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in held.items())
    ):
        raise ValueError(f"{what}: {os.fspath(path)!r} holds no state_dict")
    state = {".".join(part for part in key.split(".") if part not in _WRAPPERS): value for key, value in held.items()}
    # Lightning's checkpoints of attnkern train hold metrics beside the network, AveragedModel a counter.
    if any(key.startswith("network.") for key in state):
        state = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    if "n_averaged" in state and all(key.startswith("module.") for key in state.keys() - {"n_averaged"}):
        del state["n_averaged"]
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def read_weights(what: str, path: str | os.PathLike, average: bool = False) -> Renamed:
    """The state_dict in a file under attnkern's names, and what was renamed; arguments as :func:`read_state`."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"{what} must be None or a file of weights, got {came(path)}")
    return rename(read_state(what, path, average))


def load_weights(network: nn.Module, path: str | os.PathLike) -> None:
    """Load a file into ``network``; layers for another number of classes stay as they are.

    A file under the names of a published implementation is renamed, and a warning says so.
    """
    what = "create_model: pretrained"
    read = read_weights(what, path)
    kept = load_state(what, network, path, read)
    if read.layout:
        summary = read.summary() + (
            f"; as initialised, for another number of classes: {', '.join(kept)}" if kept else ""
        )
        warnings.warn(f"{what}: {os.fspath(path)!r} was read as {read.layout}: {summary}", stacklevel=3)


def load_state(what: str, network: nn.Module, path: str | os.PathLike, read: Renamed) -> list[str]:
    """Load what was read of ``path``, or say what does not fit; names of what stays, for another number of classes."""
    state, own = dict(read.state), network.state_dict()
    kept = [
        key
        for key in own
        if key.startswith(network.class_layers) and key in state and state[key].shape != own[key].shape
    ]
    state |= {key: own[key] for key in kept}
    wrong = sorted(own.keys() ^ state.keys())
    shapes = ""
    resized = [key for key in own if key in state and state[key].shape != own[key].shape]
    if resized and not wrong:
        shapes = f" with shape {tuple(state[resized[0]].shape)} instead of {tuple(own[resized[0]].shape)}"
    wrong += resized
    if wrong:
        origin = f"; it was read as {read.layout}, for {read.calls()}" if read.layout else ""
        raise ValueError(
            f"{what}: {os.fspath(path)!r} holds weights of another network than {type(network).__name__}: "
            f"{len(wrong)} entries differ, {wrong[0]!r}{shapes} among them{origin}"
        )
    network.load_state_dict(state)
    return kept


def save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state_dict, in safetensors' format where the name ends so; the file appears once it is whole."""
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in state.items()}, partial)
    else:
        torch.save(state, partial)
    partial.replace(path)
