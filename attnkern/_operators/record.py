"""What an operator consists of beside its schema (attnkern/_schemas.py) and its kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Operator(NamedTuple):
    """One operator in Python.

    A sharding rule lists the placements of the tensor arguments, then those of the results: 0 is sharded by image, 1 by
    channel, R replicated, P a partial sum. Channels are sharded where nothing mixes them. A gradient that is added once
    to a sum over channels is taken as a partial sum, so that the shards share it.
    """

    fake: Callable  #: the operator's arguments -> results of the right shapes, dtypes and strides, without data
    decomposition: Callable  #: the operator in plain ATen
    triton: str  #: the module of attnkern._triton that has its launcher
    shards: Callable  #: the operator's arguments -> sharding rules besides "everything replicated"
    features: tuple[str, ...] = ()  #: arguments in the layout of the features, which the first of them decides


def rules(*found: str) -> Callable:
    """The same sharding rules whatever the arguments."""
    return lambda *_: found


def features_grad(x: torch.Tensor, needed: bool) -> torch.Tensor:
    """The gradient of features in a fake kernel: shape (0,) where it is not needed."""
    return torch.empty_like(x) if needed else x.new_empty((0,))


def pull(forward: Callable, inputs: tuple, grads: tuple) -> tuple:
    """Gradients of ``forward(*inputs)`` in plain ATen; a gradient that is None is zero."""
    outputs, pullback = torch.func.vjp(forward, *inputs)
    given = [torch.zeros_like(out) if grad is None else grad for out, grad in zip(outputs, grads, strict=True)]
    return pullback(tuple(given))
