"""What the kernels of pooling with one query and with many share: pieces of the formulas, and the sum over splits."""

import torch
import triton
import triton.language as tl

from attnkern._triton.common import ceil_power, launch, store


@triton.jit
def shift(largest):
    """The number to subtract from scores: their maximum, or 0 if all are -Inf so far, because -Inf - -Inf is NaN."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def channels(vector, c, C, BLOCK_C: tl.constexpr):
    """BLOCK_C entries of a vector from channel c on, in float32; zeros beyond C, or if the vector is None."""
    if vector is None:
        return tl.zeros((BLOCK_C,), tl.float32)
    else:
        c += tl.arange(0, BLOCK_C)
        return tl.load(vector + c, c < C, other=0.0).to(tl.float32)


@triton.jit
def advance(tensor, n, length):
    """A pointer to row n of a tensor; None for None."""
    if tensor is not None:
        tensor += n * length
    return tensor


@triton.jit
def takes_part(mask, p, P):
    """Whether positions p exist and take part in the softmax. ``mask`` points to the image's mask, or is None."""
    kept = p < P
    if mask is not None:
        kept = tl.load(mask + p, kept, other=0) != 0
    return kept


@triton.jit
def delta_of(grad_pooled, grad_attention, mask, attention, pooled, n, C, P, BLOCK_C: tl.constexpr):
    """Δ = ⟨dg, pooled⟩ + Σ a·da of row n, where the sum is over the positions that take part."""
    delta = 0.0
    if grad_pooled is not None:
        for c in range(0, C, BLOCK_C):
            dg = channels(grad_pooled + n * C, c, C, BLOCK_C)
            delta += tl.sum(dg * channels(pooled + n * C, c, C, BLOCK_C))
    if grad_attention is not None:
        for first_p in range(0, P, 1024):
            p = first_p + tl.arange(0, 1024)
            kept = takes_part(mask, p, P)
            da = tl.load(grad_attention + n * P + p, kept, other=0.0)
            delta += tl.sum(tl.load(attention + n * P + p, kept, other=0.0) * da)
    return delta


@triton.jit
def store_pooled(pooled, pooled_wide, average, offsets, mask):
    """Store pooled features, rounded and, for half precision, also in float32."""
    store(pooled + offsets, average, mask)
    if pooled_wide is not None:
        tl.store(pooled_wide + offsets, average, mask)


@triton.jit
def _pool_combine_kernel(
    scores, mask, peaks, sums, attention, pooled, pooled_wide, M, C, P, SPLITS, stride_kn,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    channel_blocks = tl.cdiv(C, BLOCK_C)
    blocks = channel_blocks + tl.cdiv(P, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    peaks += n * SPLITS * 2
    s = tl.arange(0, BLOCK_S)
    largest = tl.load(peaks + s * 2, s < SPLITS, other=-float("inf"))
    shift_by = shift(tl.max(largest))
    total = tl.sum(tl.exp(largest - shift_by) * tl.load(peaks + s * 2 + 1, s < SPLITS, other=0.0))
    mask = advance(mask, n // M, stride_kn)
    if mask is not None:
        kept = tl.zeros((BLOCK_P,), tl.int1)
        for first_p in range(0, P, BLOCK_P):
            kept |= takes_part(mask, first_p + tl.arange(0, BLOCK_P), P)
        # Without any position the sums are 0 and the total is 0: the results are 0, not NaN.
        total = tl.where(tl.max(kept.to(tl.int32)) == 0, 1.0, total)
    if block < channel_blocks:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        weighted = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, SPLITS, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            decay = tl.exp(tl.load(peaks + r * 2, r < SPLITS, other=-float("inf")) - shift_by)
            exists = (r < SPLITS)[:, None] & (c < C)[None, :]
            weighted += decay[:, None] * tl.load(sums + (n * SPLITS + r)[:, None] * C + c[None, :], exists, other=0.0)
        average = tl.sum(weighted, 0) / total
        store_pooled(pooled, pooled_wide, average, n * C + c, c < C)
    else:
        p = (block - channel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
        score = tl.load(scores + n * P + p, p < P, other=0.0)
        weight = tl.exp(score - shift_by) / total
        if mask is not None:
            weight = tl.where(takes_part(mask, p, P), weight, 0.0)
        tl.store(attention + n * P + p, weight, p < P)


def combine(scores, mask, peaks, sums, attention, pooled, pooled_wide, M: int, C: int, P: int) -> None:
    """The pooled features and the attention of images of M queries, from sums over each of their splits in order."""
    rows, splits = peaks.shape[0], peaks.shape[1]
    block_r, block_c, block_p = 16, 64 if C <= 1024 else 128, 512
    if mask is not None or M > 1:  # there are many rows, so that each program has more of one
        block_r = min(16, ceil_power(splits))
        block_c, block_p = min(4096 // block_r, ceil_power(C)), min(1024, ceil_power(P))
    blocks = triton.cdiv(C, block_c) + triton.cdiv(P, block_p)
    launch(
        _pool_combine_kernel, rows * blocks, scores, mask, peaks, sums, attention, pooled, pooled_wide,
        M, C, P, splits, mask_stride(mask),
        BLOCK_S=ceil_power(splits), BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_P=block_p,
    )  # fmt: skip


def mask_stride(mask: torch.Tensor | None) -> int:
    """The mask's stride over images: 0 if the batch shares it."""
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
