"""Simulates a device without float64, such as Apple's GPUs (MPS) and some of Intel's; it computes on the CPU.

Its tensors report the device "meta", the only one that needs no driver to run backward passes in PyTorch.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


class _Tensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a tensor to {inner.dtype}: the device does not support it")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    def __repr__(self):
        return f"without float64: {self.inner}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = _pytree.tree_leaves((args, kwargs))
        given = [leaf for leaf in flat if isinstance(leaf, _Tensor)]
        device = kwargs.get("device")
        if device is None:
            here = bool(given)
        else:
            here = torch.device(device) == DEVICE
            kwargs = kwargs | {"device": "cpu"}
        on_cpu = [leaf for leaf in flat if isinstance(leaf, torch.Tensor) and not isinstance(leaf, _Tensor)]
        copies = function is torch.ops.aten.copy_.default or device is not None
        if given and not copies and any(tensor.dim() for tensor in on_cpu):
            raise RuntimeError(f"{function}: Expected all tensors to be on the same device")
        inner = [tensor.inner for tensor in given]

        def wrap(result):
            if not isinstance(result, torch.Tensor):
                return result
            for tensor, held in zip(given, inner, strict=True):
                if result is held:
                    return tensor
            return _Tensor(result) if here and all(result is not tensor for tensor in on_cpu) else result

        bare = _pytree.tree_map_only(_Tensor, lambda tensor: tensor.inner, (args, kwargs))
        return _pytree.tree_map(wrap, function(*bare[0], **bare[1]))


class _Kernels(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _Tensor.__torch_dispatch__(function, types, args, kwargs)


class _Lists(TorchFunctionMode):
    """Functions that make tensors of Python numbers call no kernel."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


@contextlib.contextmanager
def without_float64():
    """Inside this context ``tensor.to(DEVICE)`` and ``device=DEVICE`` work."""
    with _Lists(), _Kernels():
        yield
