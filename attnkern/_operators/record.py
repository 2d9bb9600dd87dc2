"""The record of an operator: all that it consists of, except its schema (attnkern/_schemas.py) and its kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Operator(NamedTuple):
    """One operator in Python.

    A sharding rule lists the placements of the tensor arguments, then those of the results: 0 is sharded by image, 1 by
    channel, R replicated, P a partial sum. Rules shard channels only if the operator does not mix them. A gradient that
    is added once to a sum over channels is a partial sum (P), so that it is not added once per shard.
    """

    fake: Callable  #: arguments of the operator -> empty results with the right shapes, dtypes and strides
    decomposition: Callable  #: the operator in plain ATen
    triton: str  #: the module of attnkern._triton with its launcher
    shards: Callable  #: arguments of the operator -> its sharding rules, without "everything replicated"
    features: tuple[str, ...] = ()  #: arguments that have the layout of the features, which is that of the first one


def rules(*found: str) -> Callable:
    """Sharding rules that do not depend on the arguments."""
    return lambda *_: found


def features_grad(x: torch.Tensor, needed: bool) -> torch.Tensor:
    """The gradient of features in a fake kernel: of shape (0,) if it is not needed."""
    return torch.empty_like(x) if needed else x.new_empty((0,))


def pull(forward: Callable, inputs: tuple, grads: tuple) -> tuple:
    """Gradients of ``forward(*inputs)`` in plain ATen, from those of its outputs; None counts as zero."""
    outputs, pullback = torch.func.vjp(forward, *inputs)
    given = [torch.zeros_like(out) if grad is None else grad for out, grad in zip(outputs, grads, strict=True)]
    return pullback(tuple(given))
