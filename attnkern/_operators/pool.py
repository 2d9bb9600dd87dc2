"""The operators of compatibility_pool."""

import torch

from attnkern import reference
from attnkern._numerics import wide
from attnkern._operators.record import Operator, features_grad, pull

# --- fake kernels ----------------------------------------------------------------------------------------------------


def _fake_pool_fwd(local, query, mask):
    n, c, *positions = local.shape
    queries = query.shape[1:2] if query.ndim == 3 else ()
    dtype = wide(local.dtype)
    attention = local.new_empty((n, *queries, *positions), dtype=dtype)
    pooled = local.new_empty((n, *queries, c))
    pooled_wide = local.new_empty((0,) if local.dtype == dtype else pooled.shape, dtype=dtype)
    return pooled, attention, torch.empty_like(attention), pooled_wide


def _fake_pool_bwd(
    grad_pooled, grad_attention, grad_scores, local, query, mask, attention, pooled_wide, need_grad_local
):  # fmt: skip
    return features_grad(local, need_grad_local), torch.empty_like(query)


# --- decompositions --------------------------------------------------------------------------------------------------


def _pool_fwd(local, query, mask):
    dtype = wide(local.dtype)
    pooled, attention, scores = reference.compatibility_pool(local.to(dtype), query.to(dtype), mask)
    kept = pooled if local.dtype != dtype else local.new_empty((0,), dtype=dtype)
    return pooled.to(local.dtype), attention, scores, kept


def _pool_bwd(grad_pooled, grad_attention, grad_scores, local, query, mask, attention, pooled_wide, need_grad_local):
    def forward(local, query):
        return reference.compatibility_pool(local, query, mask)

    grads = grad_pooled, grad_attention, grad_scores
    grad_local, grad_query = pull(forward, (local, query), grads)
    return grad_local if need_grad_local else local.new_empty((0,)), grad_query


# --- records ---------------------------------------------------------------------------------------------------------


def _placements(local, query, mask):
    """Placements of the query and the mask: "R" if the batch shares it. Channels are not sharded: scores need all."""
    return (
        "R" if query.ndim == 1 or (query.ndim == 3 and query.shape[0] == 1 < local.shape[0]) else "0",
        "R" if mask is not None and mask.shape[0] == 1 < local.shape[0] else "0",
    )


def _shards_fwd(local, query, mask):
    of_query, of_mask = _placements(local, query, mask)
    return (f"0 {of_query} {of_mask} -> 0 0 0 0",)


def _shards_bwd(grad_pooled, grad_attention, grad_scores, local, query, mask, *_):
    of_query, of_mask = _placements(local, query, mask)
    return (f"0 0 0 0 {of_query} {of_mask} 0 0 -> 0 {'P' if of_query == 'R' else '0'}",)


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
