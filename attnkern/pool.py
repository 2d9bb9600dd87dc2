"""Softmax compatibility pooling."""

from typing import NamedTuple

import torch

from attnkern import _backend, reference
from attnkern._autograd import create_graph, differentiable_backward, save, saved, transformed
from attnkern._checks import check_positions, check_shape, check_tensor, companion, is_shape
from attnkern._ops import BACKENDS
from attnkern._tracing import leaf


class CompatibilityPooled(NamedTuple):
    """Result of :func:`compatibility_pool`."""

    pooled: torch.Tensor  #: (N, C), the features' dtype
    attention: torch.Tensor  #: (N, H, W) or (N, L), softmax over positions, float32 (float64 for float64)
    scores: torch.Tensor  #: the same shape and dtype, before the softmax


class _CompatibilityPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, query, backend):
        pooled, attention, scores, pooled_wide = BACKENDS[backend].pool_fwd(local, query)
        save(ctx, (local, query, attention, pooled_wide if pooled_wide.shape == pooled.shape else pooled))
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return pooled, attention, scores

    @staticmethod
    def backward(ctx, *grads):
        local, query, attention, pooled_wide = saved(ctx)
        if create_graph(*grads):
            return (*differentiable_backward(reference.compatibility_pool, (local, query), grads), None)
        grad_local, grad_query = BACKENDS[ctx.backend].pool_bwd(
            *grads, local, query, attention, pooled_wide, ctx.needs_input_grad[0]
        )
        return grad_local if ctx.needs_input_grad[0] else None, grad_query, None


@leaf
def compatibility_pool(local: torch.Tensor, query: torch.Tensor, *, backend: str | None = None) -> CompatibilityPooled:
    """Locals averaged by their compatibility with a query: pooled = Σ a_i ℓ_i, a = softmax_i ⟨ℓ_i, q⟩.

    The scores are plain dot products, without 1/√C. The paper's parametrised compatibility ⟨u, ℓ_i + g⟩ is
    ⟨u, ℓ_i⟩ plus a number that does not depend on i, which softmax cancels: it is this function with query = u,
    exactly, and the gradient of g (and of a bias) is exactly zero. A linear projection W of the locals folds: pass
    query = Wᵀg and multiply the pooled vector by W; the projected tensor never exists.

    Args:
        local: (N, C, H, W), contiguous or channels_last, or (N, C, L), contiguous or a transposed view of
            tokens (N, L, C), all at full speed; float32, bfloat16, float16 or float64.
        query: (N, C), or (C,) shared by the batch, in the features' dtype or float32.
        backend: "triton", "native", "reference", or None for :func:`attnkern.use_backend`'s choice.

    Returns:
        pooled (N, C) in the dtype of local; attention and scores (N, H, W), or (N, L), in float32 (float64 for
        float64).

    Raises:
        ValueError: wrong shape or device, an unknown backend, or one that cannot run here.
        TypeError: not a floating tensor, or dtypes that cannot be combined.

    Source: Learn to Pay Attention, Eqs. 1-3.
    """
    where = "compatibility_pool"
    check_tensor(where, "local", local)
    check_shape(where, "local", local, "(N, C, H, W) or (N, C, L)", local.dim() in (3, 4))
    check_positions(where, "local", local.shape[2:])
    check_tensor(where, "query", query)
    n, c = local.shape[:2]
    check_shape(
        where, "query", query, "({0}, {1}) or ({1},) (N and C as local)",
        is_shape(query, n, c) or is_shape(query, c), n, c,
    )  # fmt: skip
    query = companion(where, "query", query, "local", local)
    chosen = _backend.choose(backend, local)
    if chosen == "reference" or transformed(local, query):
        return CompatibilityPooled(*reference.compatibility_pool(local, query))
    return CompatibilityPooled(*_CompatibilityPool.apply(local, query, chosen))
