"""Triton kernels of nearest-anchor quantization, alone and applied to features. Formulas: attnkern/quantize.py.
The search for the nearest anchor is in quantize_nearest.py.

Forward takes one launch if one program can quantize all elements of the batch. Otherwise a second launch adds the
partial sums of the first and applies the map to the features. Backward takes one launch, or two if a position has too
many channels for one program.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnkern._triton.common import (
    Features,
    Tile,
    ceil_power,
    features,
    fwd_tile,
    launch,
    modulate,
    modulate_backward,
    place,
    share,
    store,
)
from attnkern._triton.quantize_nearest import anchor_values, any_nan, nearest_anchor

# --- mathematics -----------------------------------------------------------------------------------------------------


@triton.jit
def _store_losses(anchor_loss, commitment_loss, total, divisor):
    if commitment_loss is None:
        tl.store(anchor_loss, total)
    else:
        loss = tl.div_rn(total, divisor)
        tl.store(anchor_loss, loss)
        tl.store(commitment_loss, loss)


@triton.jit
def _quantize(
    a, anchors, values, indices, anchor_loss, commitment_loss, counts, residuals, first, SIZE, Q, divisor,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCK_P elements of a, the first at index `first`, and sum over them.

    counts and residuals (Q,) are the number of elements that chose each anchor, and Σ (value - a) over these. If
    commitment_loss is None, the sums are partial and the loss is not divided.
    """
    p = first + tl.arange(0, BLOCK_P)
    inside = p < SIZE
    element = tl.load(a + p, inside, other=0.0).to(tl.float32)
    rank, value, poisoned = nearest_anchor(element, anchors, Q, BLOCK_Q, BLOCK_J)
    store(values + p, value, inside)
    tl.store(indices + p, tl.maximum(rank - 1, 0).to(tl.int64), inside)
    difference = tl.where(inside, value - element, 0.0)
    _store_losses(anchor_loss, commitment_loss, tl.sum(difference * difference), divisor)
    # A NaN element has index 0, and makes the residual of that anchor NaN.
    stray = tl.max((inside & (rank == 0)).to(tl.int32)) | poisoned
    rank = tl.where(inside, rank, 0)
    for start in range(0, Q, BLOCK_Q):
        k = start + tl.arange(0, BLOCK_Q)
        # (BLOCK_P, BLOCK_Q): neighbouring threads have different anchors, so that sums need no exchange between them.
        chosen = rank[:, None] == k[None, :] + 1
        residual = tl.sum(tl.where(chosen, difference[:, None], 0.0), 0)
        tl.store(residuals + k, tl.where((k == 0) & (stray != 0), float("nan"), residual), k < Q)
        tl.store(counts + k, tl.sum(chosen.to(tl.int32), 0), k < Q)


@triton.jit
def _add_partials(
    block, part_loss, part_counts, part_residuals, anchor_loss, commitment_loss, counts, residuals, T, Q, divisor,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the sums of T programs for the anchors from block·BLOCK_K on; the first block also adds the losses."""
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    count = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
    residual = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None] * Q + k[None, :]
        mask = (t < T)[:, None] & (k < Q)[None, :]
        count += tl.load(part_counts + at, mask, other=0)
        residual += tl.load(part_residuals + at, mask, other=0.0)
        total += tl.load(part_loss + t, t < T, other=0.0)
    tl.store(counts + k, tl.sum(count, 0), k < Q)
    tl.store(residuals + k, tl.sum(residual, 0), k < Q)
    if block == 0:
        _store_losses(anchor_loss, commitment_loss, tl.sum(total), divisor)


@triton.jit
def _grad_element(through, element, value, grad_values, grad_commitment_loss, p, mask, divisor):
    """Gradient of elements: ``through`` the features, that of the values, and that of the commitment loss."""
    grad = through
    if grad_values is not None:
        grad += tl.load(grad_values + p, mask, other=0.0).to(tl.float32)
    if grad_commitment_loss is not None:
        grad += 2.0 * (element - value) * (tl.load(grad_commitment_loss).to(tl.float32) / divisor)
    return grad


@triton.jit
def _grad_anchors(grad_anchor_loss, residuals, grad_anchors, Q, divisor, BLOCK_J: tl.constexpr):
    """Gradient of the anchors, 2 Σ (v - a) times that of their loss. The programs share the anchors evenly."""
    for start in range(tl.program_id(0) * BLOCK_J, Q, tl.num_programs(0) * BLOCK_J):
        k = start + tl.arange(0, BLOCK_J)
        grad = tl.zeros((BLOCK_J,), tl.float32)
        if grad_anchor_loss is not None:
            per_residual = 2.0 * (tl.load(grad_anchor_loss).to(tl.float32) / divisor)
            grad = per_residual * tl.load(residuals + k, k < Q, other=0.0)
        store(grad_anchors + k, grad, k < Q)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["SIZE", "Q"])
def _quantize_fwd_kernel(
    a, anchors, values, indices, anchor_loss, commitment_loss, counts, residuals, SIZE, Q, divisor,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    _quantize(
        a, anchors, values, indices, anchor_loss + t, commitment_loss, counts + t * Q, residuals + t * Q,
        t * BLOCK_P, SIZE, Q, divisor, BLOCK_P, BLOCK_Q, BLOCK_J,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "Q"])
def _add_partials_kernel(
    part_loss, part_counts, part_residuals, anchor_loss, commitment_loss, counts, residuals, T, Q, divisor,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _add_partials(
        tl.program_id(0), part_loss, part_counts, part_residuals, anchor_loss, commitment_loss, counts, residuals,
        T, Q, divisor, BLOCK_T, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "Q", "SIZE"])
def _anchor_fwd_kernel(
    x, a, anchors, part_loss, part_counts, part_residuals,
    output, values, indices, anchor_loss, commitment_loss, counts, residuals, T, Q, SIZE, C, P, HW, divisor,
    WHOLE: tl.constexpr, ROUNDED: tl.constexpr, RESIDUAL: tl.constexpr, FOLD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C, P = C * VEC_C, P * VEC_P
    n, group, tile = place(C, P, GROUP, BLOCK_P)
    first_p = tile * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    at_map = n * HW + (p % HW if FOLD > 1 else p)
    if WHOLE:  # few elements: every program looks up its own, and the first one computes the outputs and sums
        if tl.program_id(0) == 0:
            _quantize(
                a, anchors, values, indices, anchor_loss, commitment_loss, counts, residuals, 0, SIZE, Q, divisor,
                BLOCK_A, BLOCK_Q, BLOCK_J,
            )  # fmt: skip
        element = tl.load(a + at_map, p < P, other=0.0).to(tl.float32)
        _, v, _ = nearest_anchor(element, anchors, Q, BLOCK_Q, BLOCK_J)
    else:
        for block in range(tl.program_id(0), tl.cdiv(Q, BLOCK_K), tl.num_programs(0)):
            _add_partials(
                block, part_loss, part_counts, part_residuals, anchor_loss, commitment_loss, counts, residuals,
                T, Q, divisor, BLOCK_T, BLOCK_K,
            )  # fmt: skip
        v = tl.load(values + at_map, p < P, other=0.0).to(tl.float32)
        if ROUNDED:  # the dtype of the values is narrower than that of the anchors
            v = anchor_values(anchors, indices, v, 0, at_map, p < P, Q)
    modulate(x, v, output, n, group, first_p, C, P, RESIDUAL, CHANNELS_LAST, BLOCK_C, BLOCK_P, GROUP)


@triton.jit(do_not_specialize=["SIZE", "Q"])
def _quantize_bwd_kernel(
    through, grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices, residuals,
    grad_a, grad_anchors, SIZE, Q, HW, divisor,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = p < SIZE
    element = tl.load(a + p, mask, other=0.0).to(tl.float32)
    value = anchor_values(anchors, indices, element, any_nan(anchors, Q, BLOCK_J), p, mask, Q)
    grad = tl.zeros((BLOCK_P,), tl.float32)
    if through is not None:  # (N, GROUPS, HW)
        at = p // HW * (GROUPS * HW) + p % HW
        for start in range(0, GROUPS, BLOCK_G):
            group = start + tl.arange(0, BLOCK_G)
            valid = (group < GROUPS)[:, None] & mask[None, :]
            grad += tl.sum(tl.load(through + at[None, :] + group[:, None] * HW, valid, other=0.0), 0)
    grad = _grad_element(grad, element, value, grad_values, grad_commitment_loss, p, mask, divisor)
    store(grad_a + p, grad, mask)
    _grad_anchors(grad_anchor_loss, residuals, grad_anchors, Q, divisor, BLOCK_J)


@triton.jit(do_not_specialize=["Q"])
def _anchor_bwd_kernel(
    grad_output, grad_values, grad_anchor_loss, grad_commitment_loss, x, a, anchors, indices, residuals,
    grad_x, grad_a, grad_anchors, through, Q, C, P, divisor, RESIDUAL: tl.constexpr, FOLD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    C, P = C * VEC_C, P * VEC_P
    n, group, tile = place(C, P, GROUP, BLOCK_P)
    first_p = tile * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    at_map = n * (P // FOLD) + (p % (P // FOLD) if FOLD > 1 else p)
    element = tl.load(a + at_map, p < P, other=0.0).to(tl.float32)
    v = anchor_values(anchors, indices, element, any_nan(anchors, Q, BLOCK_J), at_map, p < P, Q)
    grad = modulate_backward(
        grad_output, x, v, grad_x, n, group, first_p, C, P, RESIDUAL, CHANNELS_LAST, BLOCK_C, BLOCK_P, GROUP
    )
    if through is None:
        grad = _grad_element(grad, element, v, grad_values, grad_commitment_loss, at_map, p < P, divisor)
        store(grad_a + at_map, grad, p < P)
        _grad_anchors(grad_anchor_loss, residuals, grad_anchors, Q, divisor, BLOCK_J)
    else:
        groups = tl.cdiv(C, GROUP)
        tl.store(through + (n * groups + group) * P + p, grad, p < P)


# --- launchers -------------------------------------------------------------------------------------------------------

#: Up to this many elements of a batch, one program quantizes them alone, which saves the launch that adds sums. (This
#: may depend on the batch: the results of an image contain no sums.)
_WHOLE = 512


class _Parts(NamedTuple):
    """Sums per program: Σ (v - a)², and per anchor how many chose it and Σ (v - a) over them."""

    loss: torch.Tensor
    counts: torch.Tensor
    residuals: torch.Tensor


def _part(size: int) -> tuple[int, int]:
    """Elements per program, if there are several programs, and warps. With many programs, each has more elements, which
    share the work on the anchors."""
    return (256, 8) if size <= 131072 else (1024, 4)


def _blocks(elements: int, q: int, warps: int) -> dict:
    """Block sizes for at most 32 pairs of an element and an anchor per thread."""
    return {
        "BLOCK_Q": min(32, ceil_power(q), max(1, 1024 * warps // elements)),
        "BLOCK_J": _anchor_block(q),
    }


def _anchor_block(q: int) -> int:
    return min(256, ceil_power(q))


def _add_blocks(q: int) -> dict:
    """Block sizes for 8 elements per thread."""
    return {"BLOCK_T": 32, "BLOCK_K": min(32, ceil_power(q))}


def _results(a, anchors):
    """Uninitialised values, indices, and sums (two losses, counts, residuals). The sums of an empty batch are zero."""
    losses = (a.new_empty((), dtype=torch.float32) for _ in range(2))
    sums = *losses, torch.empty_like(anchors, dtype=torch.int64), torch.empty_like(anchors, dtype=torch.float32)
    if a.numel() == 0:
        for tensor in sums:
            tensor.zero_()
    return torch.empty_like(a), torch.empty_like(a, dtype=torch.int64), sums


def _launch_parts(a, anchors, values, indices):
    """Quantize in several programs; returns their sums."""
    size, q = a.numel(), anchors.shape[0]
    part, warps = _part(size)
    programs = triton.cdiv(size, part)
    parts = _Parts(
        a.new_empty((programs,), dtype=torch.float32),
        a.new_empty((programs, q), dtype=torch.int32),
        a.new_empty((programs, q), dtype=torch.float32),
    )
    launch(
        _quantize_fwd_kernel, programs, a, anchors, values, indices, parts.loss, None, parts.counts, parts.residuals,
        size, q, 1.0,
        BLOCK_P=part, **_blocks(part, q, warps), num_warps=warps,
    )  # fmt: skip
    return parts


def quantize_fwd(a, anchors, divisor):
    size, q = a.numel(), anchors.shape[0]
    values, indices, sums = _results(a, anchors)
    if size > _WHOLE:
        parts = _launch_parts(a, anchors, values, indices)
        blocks = _add_blocks(q)
        programs = triton.cdiv(q, blocks["BLOCK_K"])
        launch(_add_partials_kernel, programs, *parts, *sums, parts.loss.shape[0], q, float(divisor), **blocks)
    elif size > 0:
        block = ceil_power(size)
        launch(
            _quantize_fwd_kernel, 1, a, anchors, values, indices, *sums, size, q, float(divisor),
            BLOCK_P=block, **_blocks(block, q, 8), num_warps=8,
        )  # fmt: skip
    return values, indices, *sums


def anchor_fwd(x, a, anchors, residual, divisor):
    size, q = a.numel(), anchors.shape[0]
    values, indices, sums = _results(a, anchors)
    output = torch.empty_like(x)
    layout = features(x, foldable=True)
    tile = fwd_tile(layout)
    whole = size <= _WHOLE
    parts = _Parts(None, None, None) if whole else _launch_parts(a, anchors, values, indices)
    block = ceil_power(size) if whole else 1
    launch(
        _anchor_fwd_kernel, x.shape[0] * tile.programs(layout),
        x, a, anchors, *parts, output, values, indices, *sums,
        0 if whole else parts.loss.shape[0], q, size, *layout.sizes, layout.positions // layout.fold, float(divisor),
        WHOLE=whole, ROUNDED=a.dtype != torch.float32 and a.dtype != anchors.dtype, RESIDUAL=residual, FOLD=layout.fold,
        BLOCK_A=block, **_blocks(max(block, tile.block_p), q, 8), **_add_blocks(q),
        **layout.constants, **tile.constants, num_warps=8 if whole else 4,
    )  # fmt: skip
    return output, values, indices, *sums


def _launch_quantize_bwd(grads, quantized, grad_a, grad_anchors, divisor, through, positions):
    """The gradients of a and the anchors; ``through`` (N, groups, positions) is the gradient of the map."""
    a, anchors, _, _ = quantized
    q = anchors.shape[0]
    groups = 0 if through is None else through.shape[1]
    block_p = 512 if groups == 0 else 128  # 16 elements per thread and read
    # At least one program: it writes the zero gradients of the anchors for an empty batch.
    launch(
        _quantize_bwd_kernel, max(1, triton.cdiv(a.numel(), block_p)), through, *grads, *quantized,
        grad_a, grad_anchors, a.numel(), q, positions, float(divisor),
        GROUPS=groups, BLOCK_G=min(16, ceil_power(groups)), BLOCK_P=block_p, BLOCK_J=_anchor_block(q),
    )  # fmt: skip


def quantize_bwd(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices, residuals, divisor):
    grads = grad_values, grad_anchor_loss, grad_commitment_loss
    grad_a, grad_anchors = torch.empty_like(a), torch.empty_like(anchors)
    _launch_quantize_bwd(grads, (a, anchors, indices, residuals), grad_a, grad_anchors, divisor, None, 1)
    return grad_a, grad_anchors


@functools.lru_cache
def _bwd_tile(x: Features) -> Tile:
    """A tile with 16 elements per thread, and all channels of a few positions unless these exceed 32,768 elements.

    With positions innermost it has at least 32 of them, which are whole sectors of memory.
    """
    channels, positions = ceil_power(x.channels), ceil_power(x.positions)
    if x.fold > 1:  # there is a second launch in any case
        block_p = min(128, positions)
        return share(x, min(2048 // block_p, channels), block_p, 16384)
    if x.channels_last:
        block_c = min(256, channels)
        block_p = min(2048 // block_c, positions)
    else:
        block_p = min(256, max(32, 16384 // channels), positions)
        block_c = min(2048 // block_p, channels)
    return share(x, block_c, block_p, 32768)


def anchor_bwd(
    grad_output, grad_values, grad_anchor_loss, grad_commitment_loss, x, a, anchors, indices, residuals,
    residual, divisor, need_grad_x,
):  # fmt: skip
    grads, quantized = (grad_values, grad_anchor_loss, grad_commitment_loss), (a, anchors, indices, residuals)
    grad_x = torch.empty_like(x) if need_grad_x else None
    grad_a, grad_anchors = torch.empty_like(a), torch.empty_like(anchors)
    layout = features(x)
    if layout.scalar:  # join several channels to a row, which takes a second launch
        layout = features(x, foldable=True)
    tile = _bwd_tile(layout)
    groups, positions = triton.cdiv(layout.channels, tile.group) * layout.fold, layout.positions // layout.fold
    through = x.new_empty((x.shape[0], groups, positions), dtype=torch.float32) if groups > 1 else None
    launch(
        _anchor_bwd_kernel, x.shape[0] * tile.programs(layout),
        grad_output, *grads, x, *quantized, grad_x, grad_a, grad_anchors, through,
        anchors.shape[0], *layout.sizes, float(divisor),
        RESIDUAL=residual, FOLD=layout.fold, BLOCK_J=_anchor_block(anchors.shape[0]),
        **layout.constants, **tile.constants,
    )  # fmt: skip
    if through is not None or a.numel() == 0:
        _launch_quantize_bwd(grads, quantized, grad_a, grad_anchors, divisor, through, positions)
    return (grad_x if need_grad_x else x.new_empty((0,))), grad_a, grad_anchors
