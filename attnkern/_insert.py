"""Attention behind a named layer of any network."""

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attnkern.nn as ann
from attnkern._common import check_count, check_kind, check_shape, check_tensor
from attnkern._tracing import Module

_TAKES_AND_GIVES_FEATURES = (ann.WindowAttention, ann.PositionwiseAttention, ann.ProgressiveAttention)


class OnTokens(Module):
    """A module of maps (N, C, H, W) on the tokens (N, L, C) of a square grid; those before the grid pass unchanged."""

    def __init__(self, module: nn.Module):
        super().__init__()
        check_kind("OnTokens", nn.Module, module=module)
        self.module = module

    @staticmethod
    def grid(tokens: int) -> tuple[int, int]:
        """(tokens before the grid, side of the grid): the largest square, behind at most as many tokens as ViTs have.

        Raises:
            ValueError: no square grid is left behind up to eight class and register tokens.
        """
        check_count("insert", tokens=tokens)
        side = math.isqrt(tokens)
        before = tokens - side * side
        if side == 0 or before > 8:
            raise ValueError(f"insert: tokens must be a square grid behind at most 8 others, got {tokens} of them")
        return before, side

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        check_tensor("OnTokens", "tokens", tokens)
        check_shape("OnTokens", "tokens", tokens, "(N, L, C)", tokens.dim() == 3)
        before, side = self.grid(tokens.shape[1])
        grid = tokens[:, before:].transpose(1, 2).unflatten(2, (side, side))
        attended = self.module(grid).flatten(2).transpose(1, 2)
        return torch.cat((tokens[:, :before], attended), 1) if before else attended


class _Found(Exception):
    """Ends a run as soon as the layer has returned."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers for ``functional_call(..., tie_weights=False)``: one name for each place that holds one.

    A place under two names, in a module that a model holds twice, would not get its own tensor back.
    """
    return {
        f"{prefix}.{key}" if prefix else key: tensor
        for prefix, module in model.named_modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def _output_of(model: nn.Module, layer: nn.Module, example: torch.Tensor | None) -> torch.Size:
    """Shape of what ``layer`` returns, found without computing anything."""
    if example is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise ValueError("insert: example must be given for a model without a Conv2d, got None")
        example = torch.empty(1, first.in_channels, 224, 224, device=first.weight.device, dtype=first.weight.dtype)

    def note(_module, _inputs, output):
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"insert: the layer must return a Tensor, got {type(output).__name__}")
        raise _Found(output.shape)

    training = [module for module in model.modules() if module.training]
    handle = layer.register_forward_hook(note)
    try:
        model.eval()
        with FakeTensorMode() as fake, torch.no_grad():
            fakes = {name: fake.from_tensor(tensor) for name, tensor in tensors_of(model).items()}
            torch.func.functional_call(model, fakes, (fake.from_tensor(example),), tie_weights=False)
    except _Found as found:
        return found.shape
    finally:
        handle.remove()
        for module in training:
            module.training = True
    raise ValueError("insert: the layer must run when the model does, and it did not")


def replace(model: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``layer``, under every name that it has in ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is layer:
                setattr(parent, name, new)


def insert(
    model: nn.Module,
    name: str,
    module: nn.Module | Callable[..., nn.Module],
    *,
    example: torch.Tensor | None = None,
    **options: object,
) -> nn.Module:
    """Put attention behind the layer ``name`` of ``model``, in place: layer(x) becomes module(layer(x)).

    Behind an ``nn.Sequential`` it is appended as ``name.attention`` and every other key of the state_dict stays; any
    other layer becomes ``name.layer`` beside it. So load a checkpoint of the plain model before. A layer with
    parameters under several names attends under each.

    Args:
        model: any network. A layer that returns maps (N, C, H, W) takes the module as it is; behind one that returns
            tokens (N, L, C) it works on their square grid (see :class:`OnTokens`).
        name: of a layer, as in ``model.named_modules()``.
        module: a module, or a class that is called with the layer's channels and ``options``.
        example: an input of the model, to find the channels with; default: an image of 224x224. Nothing is computed.

    Returns:
        The inserted module.

    Raises:
        ValueError: no such layer, one that the model does not run, tokens that are no square grid, or an output of
            other dimensions.
        TypeError: a module that does not give back what it takes, a layer that returns no Tensor, or an argument of
            another kind.
    """
    check_kind("insert", nn.Module, model=model)
    check_kind("insert", str, name=name)
    check_kind("insert", nn.Module | Callable, module=module)
    check_kind("insert", torch.Tensor | None, example=example)
    layers = dict(model.named_modules(remove_duplicate=False))
    if name not in layers or name == "":
        raise ValueError(f"insert: name must be a layer of the model, got {name!r}; its parts: "
                         + ", ".join(key for key, _ in model.named_children()))  # fmt: skip
    layer = layers[name]
    parent, _, key = name.rpartition(".")
    shared = sum(each is layer for each in layers.values()) > 1
    stateless = next(itertools.chain(layer.parameters(), layer.buffers()), None) is None
    # An activation under several names is shared for no reason: here it becomes a layer of its own.
    own = copy.deepcopy(layer) if shared and stateless else layer
    setattr(layers[parent], key, own)
    try:
        shape = _output_of(model, own, example)
    finally:
        setattr(layers[parent], key, layer)
    if len(shape) == 4:
        channels = shape[1]
    elif len(shape) == 3:
        OnTokens.grid(shape[1])
        channels = shape[2]
    else:
        raise ValueError(f"insert: {name} must return (N, C, H, W) or tokens (N, L, C), got shape {tuple(shape)}")
    inserted = module if isinstance(module, nn.Module) else module(channels, **options)
    if isinstance(inserted, (ann.BottleneckAttention, ann.CompatibilityPool, ann.AnchorQuantizer)):
        fitting = ", ".join(kind.__name__ for kind in _TAKES_AND_GIVES_FEATURES)
        raise TypeError(f"insert: module must give back the features it takes ({fitting}), got "
                        f"{type(inserted).__name__}: call it in the model's forward")  # fmt: skip
    like = next(layer.parameters(), None)
    if like is None:
        like = next(model.parameters(), torch.empty(0))
    inserted.to(like.device, like.dtype).train(layer.training)
    behind = OnTokens(inserted) if len(shape) == 3 else inserted
    layer = own
    setattr(layers[parent], key, layer)
    if type(layer) is nn.Sequential and "attention" not in dict(layer.named_children()):
        layer.add_module("attention", behind)
    else:
        wrapped = nn.Sequential(OrderedDict(layer=layer, attention=behind)).train(layer.training)
        replace(model, layer, wrapped)
    return inserted
