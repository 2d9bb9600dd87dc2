"""Insertion of attention after a named layer of any network."""

import contextlib
import copy
import itertools
import logging
import math
import sys
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import attnkern.nn as ann
from attnkern._checks import check_choice, check_count, check_kind, check_shape, check_tensor, describe
from attnkern._spelling import did_you_mean
from attnkern._tracing import Module
from attnkern.nn._precision import floating_parameter

_FEATURES_TO_FEATURES = (ann.WindowAttention, ann.PositionwiseAttention, ann.ProgressiveAttention)
_TO_OTHERS = (ann.AnchorQuantizer, ann.AttentionPool, ann.BottleneckAttention, ann.CompatibilityPool)


class OnTokens(Module):
    """Applies a module for maps (N, C, H, W) to tokens (N, L, C) of a square grid. Others, before it, are unchanged."""

    def __init__(self, module: nn.Module):
        super().__init__()
        check_kind("OnTokens", nn.Module, module=module)
        self.module = module

    @staticmethod
    def grid(tokens: int) -> tuple[int, int]:
        """(Tokens before the grid, side of the grid). The grid is the largest square, after at most eight tokens.

        Raises:
            ValueError: the tokens are not a square grid after at most eight class and register tokens.
        """
        check_count("insert", tokens=tokens)
        side = math.isqrt(tokens)
        before = tokens - side * side
        if side == 0 or before > 8:
            raise ValueError(f"insert: tokens must be a square grid after at most 8 others, got {tokens} of them")
        return before, side

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        check_tensor("OnTokens", "tokens", tokens)
        check_shape("OnTokens", "tokens", tokens, "(N, L, C)", tokens.dim() == 3)
        before, side = self.grid(int(tokens.shape[1]))  # while TorchScript traces, this is a tensor
        grid = tokens[:, before:].transpose(1, 2).unflatten(2, (side, side))
        attended = self.module(grid).flatten(2).transpose(1, 2)
        return torch.cat((tokens[:, :before], attended), 1) if before else attended


class OnChannelsLast(Module):
    """Applies a module for maps (N, C, H, W) to maps (N, H, W, C)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        check_kind("OnChannelsLast", nn.Module, module=module)
        self.module = module

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        check_tensor("OnChannelsLast", "maps", maps)
        check_shape("OnChannelsLast", "maps", maps, "(N, H, W, C)", maps.dim() == 4)
        return self.module(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Attended(nn.Module):
    """A layer followed by attention. It takes the layer's arguments and forwards its public attributes.

    Private attributes are not forwarded, because other libraries mark modules with them.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module):
        super().__init__()
        check_kind("Attended", nn.Module, layer=layer, attention=attention)
        self.layer = layer
        self.attention = attention

    def forward(self, *args, **kwargs):
        return self.attention(self.layer(*args, **kwargs))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(super().__getattr__("layer"), name)

    def __setattr__(self, name, value):
        layer = vars(self).get("_modules", {}).get("layer")
        own = name in ("layer", "attention") or name in vars(self) or hasattr(type(self), name)
        if own or name.startswith("_") or not hasattr(layer, name):
            super().__setattr__(name, value)
        else:
            setattr(layer, name, value)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers for ``functional_call(..., tie_weights=False)``, each under one name per module.

    If a module that the model contains twice were listed under both names, its own tensors would not be restored.
    """
    return {
        f"{prefix}.{key}" if prefix else key: tensor
        for prefix, module in model.named_modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


@contextlib.contextmanager
def _undone(model: nn.Module):
    """Run in evaluation mode, then restore the modules' modes, attributes, caches and buffers, and the random state."""
    modules = list(model.modules())
    attributes = [vars(module) for module in modules]
    kept = [value for each in attributes for value in each.values() if type(value) in (dict, OrderedDict, list, set)]
    before = [(container, copy.copy(container)) for container in (*attributes, *kept)]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    training = [module for module in modules if module.training]
    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices)):
            model.eval()
            yield
    finally:
        for container, old in before:
            container.clear()
            container.extend(old) if isinstance(container, list) else container.update(old)
        for buffer, version, old in buffers:
            if buffer._version != version:
                buffer.copy_(old)
        for module in training:  # scripted modules do not keep it in their attributes
            module.training = True


@contextlib.contextmanager
def _quiet():
    """Keep PyTorch from logging tracebacks of operators that fail on fake tensors, which is expected here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


class _Runs:
    """Runs a model on fake tensors, which compute nothing, or on ``example`` itself if the model needs values."""

    def __init__(self, model: nn.Module, example):
        self.model = model
        self.given = example is not None
        self.fake = True
        if not self.given:
            first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
            if first is None:
                raise ValueError("insert: example must be given for a model without a Conv2d, got None")
            like = floating_parameter(first, model)
            example = torch.empty(1, first.in_channels, 224, 224)
            example = example if like is None else example.to(like.device, like.dtype)
        self.inputs = example if isinstance(example, tuple) else (example,)

    def __call__(self, layer: nn.Module, change=lambda tensor: tensor):
        """The first output of ``layer`` (None if it does not run), and the exception that ended the run, if any.

        Args:
            change: applied to each tensor of the example.
        """
        found = []
        inputs = tree_map_only(torch.Tensor, change, self.inputs)
        with _undone(self.model), torch.no_grad():
            layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))
            try:
                if self.fake:
                    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
                        mode.cache_enabled = False  # the cache compares arguments, which packed weights do not support
                        tensors = {name: mode.from_tensor(tensor) for name, tensor in tensors_of(self.model).items()}
                        inputs = tree_map_only(torch.Tensor, mode.from_tensor, inputs)
                        torch.func.functional_call(self.model, tensors, inputs, tie_weights=False)
                else:
                    self.model(*inputs)
                error = None
            except Exception as raised:  # code of other people can raise any exception
                error = raised
        return next(iter(found), None), error

    def checked(self, layer: nn.Module):
        """The same; if the run on fake tensors fails and there is an example, from a run on the example."""
        output, error = self(layer)
        if error is not None and self.fake and self.given:
            self.fake = False
            output, error = self(layer)
        return output, error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def _output_of(name: str, runs: _Runs, layer: nn.Module) -> tuple[torch.Tensor, bool]:
    """The output of ``layer``, and whether the model ran to its end."""
    output, error = runs.checked(layer)
    if output is None and error is not None and runs.given:
        raise ValueError(f"insert: example must be an input that the model runs on: {_first_line(error)}") from error
    if output is None and error is not None:
        raise ValueError(
            "insert: example must be given, an input of the model, which does not run on a fake image of 224x224: "
            + _first_line(error)
        ) from error
    if output is None:
        raise ValueError(f"insert: name must be a layer that the model runs, got {name!r}, which did not run")
    if not isinstance(output, torch.Tensor):
        returned = type(output).__name__
        raise TypeError(f"insert: name must be a layer that returns a Tensor, got {name!r}, which returns {returned}")
    return output, error is None


def _layout_of(name: str, runs: _Runs, layer: nn.Module, shape: torch.Size) -> str:
    """The layout of an output of this shape. Runs with changed inputs show which axes are positions."""

    def changed(change):
        """Axes of the output whose length changes with the inputs."""
        output, _ = runs(layer, change)
        if not isinstance(output, torch.Tensor) or output.dim() != len(shape):
            return set()
        return {axis for axis, length in enumerate(output.shape) if length != shape[axis]}

    returns = f"insert: {name} must return (N, C, H, W), (N, H, W, C) or tokens (N, L, C), got shape {tuple(shape)}"
    if len(shape) not in (3, 4):
        raise ValueError(returns)
    images = [leaf for leaf in tree_leaves(runs.inputs) if isinstance(leaf, torch.Tensor) and leaf.dim() == 4]
    grown = changed(lambda tensor: tensor.repeat(1, 1, 2, 2) if tensor.dim() == 4 else tensor) if images else set()
    square = all(image.shape[2] == image.shape[3] for image in images) and bool(images)
    if len(shape) == 3:
        more = changed(lambda tensor: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor)
        if more and 0 not in more:
            raise ValueError(f"{returns}, where the batch is another axis than the first")
        if 2 in grown:
            raise ValueError(f"{returns}, where the last axis changes with the size of the image")
        if images and not square:
            raise ValueError(
                f"insert: layout must be 'NLC' if the tokens of {name}, of shape {tuple(shape)}, form a square grid, "
                "which those of an image that is not square may not, got None"
            )
        return "NLC"
    layouts = {"NCHW": (1, shape[2:]), "NHWC": (3, shape[1:3])}
    if grown - {0}:
        fitting = [layout for layout, (channels, _) in layouts.items() if channels not in grown]
    else:
        fitting = [layout for layout, (_, size) in layouts.items() if square and size[0] == size[1]]
    if len(fitting) != 1:
        raise ValueError(
            f"insert: layout must be given, 'NCHW' or 'NHWC', where shape {tuple(shape)} of the output of {name} does "
            "not tell, got None"
        )
    return fitting[0]


def replace(model: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    """Replace ``layer`` by ``new`` under every name that it has in ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is layer:
                setattr(parent, name, new)


def insert(
    model: nn.Module,
    name: str,
    module: nn.Module | Callable[..., nn.Module],
    *,
    example: torch.Tensor | tuple[object, ...] | None = None,
    layout: str | None = None,
    **options: object,
) -> nn.Module:
    """Insert attention after the layer ``name`` of ``model``, in place: layer(x) becomes module(layer(x)).

    If the layer is an ``nn.Sequential``, the module is appended as ``name.attention`` and all other keys of the
    state_dict stay. Any other layer is replaced by a module with the children ``layer`` and ``attention``, which
    forwards the layer's arguments and public attributes; load checkpoints of the plain model before. If a layer with
    parameters has several names, attention is inserted under each.

    The model is run in evaluation mode on fake tensors, which compute nothing, or on ``example`` if it needs values
    (branches on data, NumPy): to get the shape of the layer's output, with larger images to get its layout, and again
    with the module inserted. If one of these runs fails, the model is left unchanged.

    Args:
        model: any network.
        name: of a layer, as in ``model.named_modules()``.
        module: a module, or a class or function that is called with the layer's channels and ``options``.
        example: an input of the model, or a tuple of its arguments. Default: a fake image of 224x224.
        layout: of the layer's output. "NCHW": maps (N, C, H, W); "NHWC": maps (N, H, W, C), as in Swin; "NLC": tokens
            (N, L, C) of a square grid, after at most eight other tokens. None: found from the axes that change with the
            size of the image, or from which axes are square.

    Returns:
        The inserted module.

    Raises:
        ValueError: there is no such layer, or the model does not run it; tokens are not a square grid; the output has
            other dimensions or an ambiguous layout; the model needs an example, or does not run on it, or does not run
            with the module; or it is already wrapped in DistributedDataParallel or sharded by FSDP.
        TypeError: the module does not return features like its input; options are given with an instance, or the
            function does not return a Module; the layer does not return a Tensor; or an argument has the wrong type.
    """
    check_kind("insert", nn.Module, model=model)
    check_kind("insert", str, name=name)
    check_kind("insert", nn.Module | Callable, module=module)
    if options and isinstance(module, nn.Module):
        hints = "".join(did_you_mean(option, ("example", "layout")) for option in options)
        raise TypeError(f"insert: module must be a class or function to take options, got an instance of "
                        f"{type(module).__name__} and the options {', '.join(options)}{hints}")  # fmt: skip
    check_kind("insert", torch.Tensor | tuple | None, example=example)
    check_choice("insert", "layout", layout, ("NCHW", "NHWC", "NLC", None))
    layers = dict(model.named_modules(remove_duplicate=False))
    if name not in layers or name == "":
        raise ValueError(f"insert: name must be a layer of the model, got {name!r}; its parts: "
                         + ", ".join(key for key, _ in model.named_children()))  # fmt: skip
    distributed = next((part for part in layers.values() if isinstance(part, _distributed())), None)
    if distributed is not None:
        raise ValueError("insert: model must not be distributed yet, since the gradients of new parameters would not "
                         f"be reduced, got {type(distributed).__name__}: insert first")  # fmt: skip
    if any(torch.nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("insert: model must have run once, got one whose lazy layers have no parameters yet")
    layer = layers[name]
    parent, _, key = name.rpartition(".")
    shared = sum(each is layer for each in layers.values()) > 1
    stateless = next(itertools.chain(layer.parameters(), layer.buffers()), None) is None
    runs = _Runs(model, example)
    children_before = [
        (part._modules, dict(part._modules)) for part in layers.values() if isinstance(part._modules, dict)
    ]
    # An activation without parameters that has several names is copied, so that only this one gets attention.
    target = copy.deepcopy(layer) if shared and stateless else layer
    setattr(layers[parent], key, target)
    try:
        output, to_the_end = _output_of(name, runs, target)
        shape = output.shape
        layout = layout or _layout_of(name, runs, target, shape)
        if len(shape) != len(layout):
            raise ValueError(f"insert: layout must fit the output of {name}, got {layout!r} for shape {tuple(shape)}")
        if layout == "NLC":
            OnTokens.grid(shape[1])
        channels = shape[layout.index("C")]
        inserted = module if isinstance(module, nn.Module) else module(channels, **options)
        if not isinstance(inserted, nn.Module):
            raise TypeError(f"insert: module must be a class or function that returns a Module, got one that returns "
                            f"{describe(inserted)}")  # fmt: skip
        if isinstance(inserted, _TO_OTHERS):
            fitting = ", ".join(kind.__name__ for kind in _FEATURES_TO_FEATURES)
            raise TypeError(f"insert: module must give back the features it takes ({fitting}), got "
                            f"{type(inserted).__name__}: call it in the model's forward")  # fmt: skip
        like = floating_parameter(target, model)
        inserted.to(output.device, None if like is None else like.dtype)
        wrapped = inserted if layout == "NCHW" else {"NHWC": OnChannelsLast, "NLC": OnTokens}[layout](inserted)
        wrapped.train(target.training)
        if _appends(target):
            target.add_module("attention", wrapped)
        else:
            replace(model, target, Attended(target, wrapped).train(target.training))
        error = runs.checked(target)[1] if to_the_end else None
        if error is not None:
            how = "" if runs.given else " on fake tensors (give example= to run it on real ones)"
            message = f"insert: the model must run{how} with module after {name}: {_first_line(error)}"
            raise ValueError(message) from error
    except BaseException:
        for modules, before in children_before:
            modules.clear()
            modules.update(before)
        raise
    return inserted


def _distributed() -> tuple[type, ...]:
    """Classes of modules that manage their parameters for distributed training."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if it is not loaded, no module is an instance of its classes
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return nn.parallel.DistributedDataParallel, *kinds


def _appends(layer: nn.Module) -> bool:
    """Whether ``layer`` runs its children one after the other, so that another one can be appended."""
    plain = isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward
    return plain and "forward" not in vars(layer) and "attention" not in dict(layer.named_children())
