"""Support for programs that are recorded while Python code runs: by torch.fx, by TorchScript and for ONNX."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import nn
from torch.fx import Proxy

_P = ParamSpec("_P")
_R = TypeVar("_R")


def recording() -> bool:
    """Whether a TorchScript or ONNX program is being recorded. It can contain only PyTorch's own operators."""
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


def traced(value: object) -> bool:
    """Whether ``value`` is a number that TorchScript's tracer made a tensor: a size, or for ONNX a default argument."""
    return isinstance(value, torch.Tensor) and value.dim() == 0 and torch.jit.is_tracing()


def leaf(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make torch.fx record calls of ``function`` (a public function or a module's ``forward``) as single operations."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for value in args:  # two loops, because joining the arguments takes longer
            if isinstance(value, Proxy):
                return _record(call, value.tracer, args, kwargs)
        for value in kwargs.values():
            if isinstance(value, Proxy):
                return _record(call, value.tracer, args, kwargs)
        return function(*args, **kwargs)

    return call


def _record(call: Callable[..., Any], tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not (args and isinstance(args[0], nn.Module)):
        return tracer.create_proxy("call_function", call, args, kwargs)
    module, *inputs = args
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"{type(module).__name__}: torch.fx can trace a module that contains it, but not the module alone"
        )
    return tracer.create_proxy("call_module", path, tuple(inputs), kwargs)


class Module(nn.Module):
    """A module that torch.fx records as one call, as it does modules of ``torch.nn``. ``torch.jit.script`` raises."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__:
            cls.forward = leaf(cls.forward)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it: use torch.export.export, which keeps the "
            "kernels, or torch.jit.trace, which records PyTorch's own operators"
        )
