"""The layouts that operators work in: features dense, positions or channels innermost, and all else contiguous.

An operator takes any strides and copies what lies otherwise: eager code, a compiled graph and an exported program may
hand over what they like. ``csrc/tensors.h`` says the same in C++.
"""

import functools
import inspect

import torch


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


def in_layout(names: tuple[str, ...], kernel):
    """``kernel``, given its tensors in the layouts that it works in; ``names`` are its features, the first decides."""
    parameters = list(inspect.signature(kernel).parameters)
    features = [parameters.index(name) for name in names]

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
