"""Dtypes inside modules: those of the parameters, and full precision for maps."""

import contextlib
import itertools

import torch
from torch import nn

from attnkern._numerics import DTYPES, autocasts, wide


def floating_parameter(*modules: nn.Module) -> torch.Tensor | None:
    """The first parameter of the modules whose dtype is a supported one, or None if there is none."""
    parameters = itertools.chain.from_iterable(module.parameters() for module in modules)
    return next((parameter for parameter in parameters if parameter.dtype in DTYPES), None)


def input_for(layer: nn.Module, tensor: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """``tensor`` in the dtype of the parameters of ``layer``.

    A quantized layer or a replica of DataParallel has no parameters. The dtype is then that of ``before``, the output
    of another layer of the model, or of ``tensor`` if that is None; float32 instead of half precision under autocast.
    """
    like = floating_parameter(layer)
    if like is None:
        before = tensor if before is None else before
        return tensor.to(wide(before.dtype) if autocasts(before) else before.dtype)
    return tensor.to(like.dtype)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the dtype that it is accumulated in: float64 for float64, else float32."""
    return tensor.to(wide(tensor.dtype))


def full_precision(x: torch.Tensor):
    """A context without autocast on the device of ``x``, for the few numbers that determine a whole map."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()
