"""Reading weights from files: formats, wrappers, published checkpoints, and errors that say what is wrong."""

import argparse
import os
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from attnkern._checks import describe
from attnkern.models.published import Renamed, rename

#: Keys under which checkpoints hold the state_dict, next to optimizer state and the like.
_HOLDERS = ("state_dict", "model_state_dict", "model", "net")
#: Parts that torch.compile, FSDP and activation checkpointing insert into names, at any depth.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def read_file(what: str, path: str | os.PathLike):
    """The content of a file in PyTorch's format or in safetensors; no code in it is run.

    The only class that is allowed is ``argparse.Namespace``: published checkpoints hold their options in one.

    Args:
        what: the argument that named the file, for errors.
        path: the file.
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
    except Exception as error:  # a damaged file can raise any error in the reader
        raise ValueError(f"{what}: {path!r} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file cannot be read, as the end of a sentence that begins with its name."""
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found:  # the message of torch.load names the class that it does not allow
        return (
            f"holds an object of {found[1]}, not weights alone, and reading it could run code: "
            "save the state_dict where the file was made, and use that"
        )
    if "TorchScript" in text:
        return "is a TorchScript archive: save the module's state_dict instead"
    # PyTorch's own message advises weights_only=False, which would run code from the file.
    return "is damaged, cut short, or not a file of weights written by PyTorch or safetensors"


def read_state(what: str, path: str | os.PathLike, average: bool = False) -> dict[str, torch.Tensor]:
    """The state_dict in a file or in the checkpoint there, without the prefixes of DDP, torch.compile and Lightning.

    Args:
        what, path: as :func:`read_file`.
        average: take the exponential moving average of the weights (``net_ema``) of a file that has both.
    """
    held = read_file(what, path)
    states = held.get("model_states") if isinstance(held, dict) else None
    if average and not (isinstance(states, dict) and "net_ema" in states):
        raise ValueError(f"{what}: {os.fspath(path)!r} holds no average of the weights (net_ema)")
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
    # Checkpoints of attnkern train also hold metrics, those of AveragedModel a counter.
    if any(key.startswith("network.") for key in state):
        state = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    if "n_averaged" in state and all(key.startswith("module.") for key in state.keys() - {"n_averaged"}):
        del state["n_averaged"]
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def read_weights(what: str, path: str | os.PathLike, average: bool = False) -> Renamed:
    """The state_dict in a file with attnkern's names, and what was renamed; arguments as :func:`read_state`."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"{what} must be None or a file of weights, got {describe(path)}")
    return rename(read_state(what, path, average))


def load_weights(network: nn.Module, path: str | os.PathLike) -> None:
    """Load a file into ``network``; layers whose number of classes differs keep their initialisation.

    The names of a published implementation are converted, and a warning lists them.
    """
    what = "create_model: pretrained"
    read = read_weights(what, path)
    kept = load_state(what, network, path, read)
    if read.layout:
        summary = read.summary() + (
            f"; not loaded, because the number of classes differs: {', '.join(kept)}" if kept else ""
        )
        warnings.warn(f"{what}: {os.fspath(path)!r} was read as {read.layout}: {summary}", stacklevel=3)


def load_state(what: str, network: nn.Module, path: str | os.PathLike, read: Renamed) -> list[str]:
    """Load ``read``, the content of ``path``, into ``network``.

    Returns:
        names of the entries that were not loaded because the number of classes differs.

    Raises:
        ValueError: the weights of another network; names one entry that differs.
    """
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
    """Write a state_dict, in safetensors' format if the name ends in .safetensors; never leaves a partial file."""
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({key: value.contiguous() for key, value in state.items()}, partial)
        else:
            torch.save(state, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
