"""Softmax compatibility pooling."""

from typing import NamedTuple

import torch

from attnkern import _backend, reference
from attnkern._autograd import create_graph, differentiable_backward, save, saved, transformed
from attnkern._checks import (
    check_device,
    check_positions,
    check_shape,
    check_tensor,
    companion,
    is_shape,
)
from attnkern._ops import BACKENDS
from attnkern._tracing import leaf


class CompatibilityPooled(NamedTuple):
    """Result of :func:`compatibility_pool`. The axis M is there if the query has it."""

    pooled: torch.Tensor  #: (N, C) or (N, M, C), the features' dtype
    attention: torch.Tensor  #: (N, [M,] H, W) or (N, [M,] L), softmax over positions, float32 (float64 for float64)
    scores: torch.Tensor  #: the same shape and dtype, before the softmax and without the mask


class _CompatibilityPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, query, mask, backend):
        pooled, attention, scores, pooled_wide = BACKENDS[backend].pool_fwd(local, query, mask)
        given = (local, query) if mask is None else (local, query, mask)
        save(ctx, given, attention, pooled_wide if pooled_wide.shape == pooled.shape else pooled)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return pooled, attention, scores

    @staticmethod
    def backward(ctx, *grads):
        local, query, *mask, attention, pooled_wide = saved(ctx)
        mask = mask[0] if mask else None
        if create_graph(*grads):

            def forward(local, query):
                return reference.compatibility_pool(local, query, mask)

            return (*differentiable_backward(forward, (local, query), grads), None, None)
        grad_local, grad_query = BACKENDS[ctx.backend].pool_bwd(
            *grads, local, query, mask, attention, pooled_wide, ctx.needs_input_grad[0]
        )
        return grad_local if ctx.needs_input_grad[0] else None, grad_query, None, None


def check_mask(where: str, mask, local: torch.Tensor, of: str = "local") -> None:
    """Raise unless ``mask`` is bool, on the device of ``local``, and has a value for each position."""
    check_tensor(where, "mask", mask, (torch.bool,))
    n, _, *positions = local.shape
    shape = "{1}, {2}" if len(positions) == 2 else "{1}"
    check_shape(
        where, "mask", mask, f"({{0}}, {shape}) or (1, {shape}) (N and positions as {of})",
        is_shape(mask, n, *positions) or is_shape(mask, 1, *positions), n, *positions,
    )  # fmt: skip
    check_device(where, "mask", mask, of, local)


@leaf
def compatibility_pool(
    local: torch.Tensor, query: torch.Tensor, *, mask: torch.Tensor | None = None, backend: str | None = None
) -> CompatibilityPooled:
    """Locals averaged by their compatibility with queries: pooled_m = Σ_i a_mi ℓ_i, a_m = softmax_i ⟨ℓ_i, q_m⟩.

    The scores are plain dot products, without 1/√C. The paper's parametrised compatibility ⟨u, ℓ_i + g⟩ is
    ⟨u, ℓ_i⟩ plus a number that does not depend on i, which softmax cancels: it is this function with query = u,
    exactly, and the gradient of g (and of a bias) is exactly zero. A linear projection W of the locals folds: pass
    query = Wᵀg and multiply the pooled vector by W; the projected tensor never exists. With one query per head, that is
    a multi-head attention pool: the locals are read once for all heads.

    Args:
        local: (N, C, H, W), contiguous or channels_last, or (N, C, L), contiguous or a transposed view of
            tokens (N, L, C), all at full speed; float32, bfloat16, float16 or float64.
        query: (N, C), or (C,) shared by the batch; M queries per image: (N, M, C), or (1, M, C) shared by the batch.
            In the features' dtype or float32.
        mask: (N, H, W), or (N, L), bool, or (1, ...) shared by the batch: the positions that take part in the softmax.
            An image without any has pooled vectors and attention of 0. What is stored at the other positions, NaN
            included, reaches neither ``pooled`` nor ``attention``, and their gradients there are exactly zero.
        backend: "triton", "native", "reference", or None for :func:`attnkern.use_backend`'s choice.

    Returns:
        pooled (N, C) in the dtype of local; attention and scores (N, H, W), or (N, L), in float32 (float64 for
        float64). With an axis M in the query: (N, M, C), and (N, M, H, W) or (N, M, L). Scores are those of all
        positions, whatever the mask.

    Raises:
        ValueError: wrong shape or device, an unknown backend, or one that cannot run here.
        TypeError: not a floating tensor, a mask that is not bool, or dtypes that cannot be combined.

    Source: Learn to Pay Attention, Eqs. 1-3.
    """
    where = "compatibility_pool"
    check_tensor(where, "local", local)
    check_shape(where, "local", local, "(N, C, H, W) or (N, C, L)", local.dim() in (3, 4))
    check_positions(where, "local", local.shape[2:])
    check_tensor(where, "query", query)
    n, c = local.shape[:2]
    if query.dim() == 3:
        m = query.shape[1]
        fits = is_shape(query, n, m, c) or is_shape(query, 1, m, c)
    else:
        fits = is_shape(query, n, c) or is_shape(query, c)
    expected = "({0}, {1}) or ({1},), or ({0}, M, {1}) or (1, M, {1}) (N and C as local)"
    check_shape(where, "query", query, expected, fits, n, c)
    query = companion(where, "query", query, "local", local)
    if mask is not None:
        check_mask(where, mask, local)
    chosen = _backend.choose(backend, local, many=query.dim() == 3 or mask is not None)
    if chosen == "reference" or transformed(local, query):
        return CompatibilityPooled(*reference.compatibility_pool(local, query, mask))
    return CompatibilityPooled(*_CompatibilityPool.apply(local, query, mask, chosen))
