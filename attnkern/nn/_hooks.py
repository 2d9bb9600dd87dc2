"""Whether a module can be computed from its parameters without calling it, with no observable difference."""

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

#: Types of parameters without behaviour of their own, including those that PyTorch traces with. Quantized and sharded
#: parameters are other subclasses of Tensor.
_PLAIN = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)


def _observed(module: nn.Module) -> bool:
    """Whether the module has hooks, or a ``forward`` set on the instance, that a call would run."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def plain(parameter: torch.Tensor | None) -> bool:
    """Whether ``parameter`` has no behaviour of its own, as those of quantized and sharded layers have."""
    return parameter is None or type(parameter) in _PLAIN


def untouched(module: nn.Module, kind: type = nn.Identity) -> bool:
    """Whether ``module`` is exactly a ``kind``, has no hooks, and has only plain tensors as parameters.

    It can then be computed from its parameters without a call.
    """
    return (
        type(module) is kind
        and not _observed(module)
        and all(plain(parameter) for parameter in module._parameters.values())
    )


def foldable(layer: nn.Module, bias: bool = False) -> bool:
    """Whether ``layer`` is an untouched ``nn.Linear``, whose product can be reassociated with others.

    Args:
        bias: it may have a bias.
    """
    plain = untouched(layer, nn.Linear) and layer._parameters.get("weight") is not None
    return plain and (bias or layer.bias is None)
