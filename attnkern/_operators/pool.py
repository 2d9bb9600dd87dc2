"""The operators of compatibility_pool."""

import torch

from attnkern import reference
from attnkern._numerics import wide
from attnkern._operators.record import Operator, features_grad, pull

# --- fake kernels ----------------------------------------------------------------------------------------------------


def _fake_pool_fwd(local, query):
    n, c, *positions = local.shape
    dtype = wide(local.dtype)
    attention = local.new_empty((n, *positions), dtype=dtype)
    pooled_wide = local.new_empty((0,) if local.dtype == dtype else (n, c), dtype=dtype)
    return local.new_empty((n, c)), attention, torch.empty_like(attention), pooled_wide


def _fake_pool_bwd(grad_pooled, grad_attention, grad_scores, local, query, attention, pooled_wide, need_grad_local):
    return features_grad(local, need_grad_local), torch.empty_like(query)


# --- decompositions --------------------------------------------------------------------------------------------------


def _pool_fwd(local, query):
    dtype = wide(local.dtype)
    pooled, attention, scores = reference.compatibility_pool(local.to(dtype), query.to(dtype))
    kept = pooled if local.dtype != dtype else local.new_empty((0,), dtype=dtype)
    return pooled.to(local.dtype), attention, scores, kept


def _pool_bwd(grad_pooled, grad_attention, grad_scores, local, query, attention, pooled_wide, need_grad_local):
    grads = grad_pooled, grad_attention, grad_scores
    grad_local, grad_query = pull(reference.compatibility_pool, (local, query), grads)
    return grad_local if need_grad_local else local.new_empty((0,)), grad_query


# --- records ---------------------------------------------------------------------------------------------------------


def _shards_fwd(local, query):
    """A query (C,) is shared by the batch. Channels are not sharded, because a score is a sum over all channels."""
    return ("0 R -> 0 0 0 0",) if query.ndim == 1 else ("0 0 -> 0 0 0 0",)


def _shards_bwd(grad_pooled, grad_attention, grad_scores, local, query, *_):
    return ("0 0 0 0 R 0 0 -> 0 P",) if query.ndim == 1 else ("0 0 0 0 0 0 0 -> 0 0",)


OPERATORS = {
    "pool_fwd": Operator(
        fake=_fake_pool_fwd, decomposition=_pool_fwd, triton="pool",
        shards=_shards_fwd,
        features=("local",),
    ),
    "pool_bwd": Operator(
        fake=_fake_pool_bwd, decomposition=_pool_bwd, triton="pool",
        shards=_shards_bwd,
        features=("local",),
    ),
}  # fmt: skip
