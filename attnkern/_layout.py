"""The layouts that operators work in: features dense, positions or channels innermost, and all else contiguous.

An operator takes any strides and copies what lies otherwise: eager code, a compiled graph and an exported program may
hand over what they like. ``csrc/tensors.h`` says the same in C++.
"""

import functools
import inspect

import torch

#: The features among the arguments of each operator, and what lies in memory as the first of them does.
_FEATURES = {
    "window_fwd": ("x",),
    "window_bwd": ("x", "grad_output"),
    "quantize_fwd": ("a",),
    "quantize_bwd": ("a", "grad_values", "indices"),
    "anchor_fwd": ("x",),
    "anchor_bwd": ("x", "grad_output"),
    "pool_fwd": ("local",),
    "pool_bwd": ("local",),
}


def channels_innermost(x: torch.Tensor) -> bool:
    """True for dense (N, C, ...) of three or four dimensions with channels innermost, and not also contiguous.

    That is channels_last, or a transposed view of tokens (N, L, C).
    """
    if x.is_contiguous() or x.dim() not in (3, 4):
        return False
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.transpose(1, 2).is_contiguous()


def _with_channels_innermost(x):
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dense(x: torch.Tensor) -> torch.Tensor:
    """Features in one of the two layouts: ``x`` itself where possible, else a copy."""
    if x.is_contiguous() or channels_innermost(x):
        return x
    return _with_channels_innermost(x) if x.dim() in (3, 4) and x.stride(1) == 1 else x.contiguous()


def _dense_like(x, tensor):
    return _with_channels_innermost(tensor) if channels_innermost(x) else tensor.contiguous()


def in_layout(name: str, kernel):
    """``kernel`` of operator ``name``, given its tensors in the layouts that it works in."""
    parameters = list(inspect.signature(kernel).parameters)
    features = [parameters.index(argument) for argument in _FEATURES.get(name, ())]

    @functools.wraps(kernel)
    def call(*args):
        laid = [
            arg.contiguous() if isinstance(arg, torch.Tensor) and i not in features else arg
            for i, arg in enumerate(args)
        ]
        for i in features:
            if i == features[0]:
                laid[i] = dense(args[i])
            elif args[i] is not None:
                laid[i] = _dense_like(laid[features[0]], args[i])
        return kernel(*laid)

    return call
