"""Memory layouts of the operators' tensors: features are dense with positions or channels innermost, others contiguous.

The operators accept any strides and copy tensors in other layouts, because eager code, compiled graphs and exported
programs may pass any. ``csrc/tensors.h`` does the same in C++.
"""

import functools
import inspect

import torch


def channels_innermost(x: torch.Tensor) -> bool:
    """Whether a tensor (N, C, ...) of three or four axes is dense with channels innermost, and not contiguous.

    It is then channels_last, or a transposed view of tokens (N, L, C).
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
    """Features in one of the two layouts: ``x`` itself if it has one, else a copy."""
    if x.is_contiguous() or channels_innermost(x):
        return x
    return _with_channels_innermost(x) if x.dim() in (3, 4) and x.stride(1) == 1 else x.contiguous()


def _dense_like(x, tensor):
    return _with_channels_innermost(tensor) if channels_innermost(x) else tensor.contiguous()


def in_layout(names: tuple[str, ...], kernel):
    """Wrap ``kernel`` so that its arguments are in the layouts it requires.

    ``names`` are its arguments that are features. All of them get the layout of the first; others become contiguous.
    """
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
