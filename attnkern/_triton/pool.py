"""Triton kernels of softmax compatibility pooling. Formulas: attnkern/pool.py.

A program has all channels of some positions of an image, its split, and reads them once: scores and weighted sum come
from one tile in registers. Only beyond 2048 channels is a tile read a second time, from a cache. A second launch adds
the splits in order; a small image is one split and needs none.
"""

import torch
import triton
import triton.language as tl

from attnkern._triton.common import Features, ceil_power, features, launch, load_tile, store, store_tile, sum_rows

# --- mathematics -----------------------------------------------------------------------------------------------------


@triton.jit
def _shift(largest):
    """What to subtract from scores: their maximum, or 0 where all are -Inf so far, for -Inf - -Inf is NaN."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _score_grad(attention, s, delta):
    """∂/∂c_i through the softmax: a(s - Δ) with s = ⟨ℓ, dg⟩ + da and Δ = ⟨dg, pooled⟩ + Σ a·da."""
    return attention * (s - delta)


@triton.jit
def _channels(vector, c, C, BLOCK_C: tl.constexpr):
    """Entries of a vector over channels from c on in float32, zero outside; zeros for None."""
    if vector is None:
        return tl.zeros((BLOCK_C,), tl.float32)
    else:
        c += tl.arange(0, BLOCK_C)
        return tl.load(vector + c, c < C, other=0.0).to(tl.float32)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _pool_fwd_kernel(
    local, query, scores, attention, pooled, pooled_wide, peaks, sums, C, P, stride_qn, SPLIT,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    C, P = C * VEC_C, P * VEC_P
    splits = tl.cdiv(P, SPLIT)
    n = (tl.program_id(0) // splits).to(tl.int64)
    begin = tl.program_id(0) % splits * SPLIT
    end = tl.minimum(begin + SPLIT, P)
    query += n * stride_qn
    scores += n * P
    if sums is not None:
        sums += tl.program_id(0).to(tl.int64) * C
    largest = -float("inf")
    total = 0.0
    weighted = tl.zeros((BLOCK_C,), tl.float32)
    if WHOLE:
        q = _channels(query, 0, C, BLOCK_C)
    for first_p in range(begin, end, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        if WHOLE:
            tile = load_tile(local, n, 0, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            score = tl.sum(tile * q[:, None], 0)
        else:
            score = tl.zeros((BLOCK_P,), tl.float32)
            for c in range(0, C, BLOCK_C):
                tile = load_tile(local, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                score += tl.sum(tile * _channels(query, c, C, BLOCK_C)[:, None], 0)
        tl.store(scores + p, score, p < P)
        score = tl.where(p < P, score, -float("inf"))
        # Online softmax: sums so far are relative to the largest score so far.
        new_largest = tl.maximum(largest, tl.max(score))
        shift = _shift(new_largest)
        decay = tl.exp(largest - shift)
        weight = tl.exp(score - shift)
        total = total * decay + tl.sum(weight)
        if WHOLE:
            weighted = weighted * decay + tl.sum(tile * weight[None, :], 1)
        else:
            for c in range(0, C, BLOCK_C):
                tile = load_tile(local, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                at = c + tl.arange(0, BLOCK_C)
                before = tl.load(sums + at, (at < C) & (first_p > begin), other=0.0)
                tl.store(sums + at, before * decay + tl.sum(tile * weight[None, :], 1), at < C)
            tl.debug_barrier()  # the next tile's threads may read what others stored
        largest = new_largest
    c = tl.arange(0, BLOCK_C)
    if peaks is None:  # the image is one split
        store(pooled + n * C + c, weighted / total, c < C)
        if pooled_wide is not None:
            tl.store(pooled_wide + n * C + c, weighted / total, c < C)
        tl.debug_barrier()  # scores were stored by other threads
        for first_p in range(begin, end, 128):
            p = first_p + tl.arange(0, 128)
            weight = tl.exp(tl.load(scores + p, p < P, other=0.0) - _shift(largest))
            tl.store(attention + n * P + p, weight / total, p < P)
    else:
        peaks += tl.program_id(0).to(tl.int64) * 2
        tl.store(peaks, largest)
        tl.store(peaks + 1, total)
        if WHOLE:
            tl.store(sums + c, weighted, c < C)


@triton.jit
def _pool_combine_kernel(
    scores, peaks, sums, attention, pooled, pooled_wide, C, P, SPLITS,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.maximum(tl.cdiv(C, BLOCK), tl.cdiv(P, BLOCK))
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # channels, and positions
    peaks += n * SPLITS * 2
    sums += n * SPLITS * C
    s = tl.arange(0, BLOCK_S)
    largest = tl.load(peaks + s * 2, s < SPLITS, other=-float("inf"))
    shift = _shift(tl.max(largest))
    total = tl.sum(tl.exp(largest - shift) * tl.load(peaks + s * 2 + 1, s < SPLITS, other=0.0))
    weighted = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    for start in range(0, SPLITS, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        decay = tl.exp(tl.load(peaks + r * 2, r < SPLITS, other=-float("inf")) - shift)
        mask = (r < SPLITS)[:, None] & (k < C)[None, :]
        weighted += decay[:, None] * tl.load(sums + r[:, None] * C + k[None, :], mask, other=0.0)
    average = tl.sum(weighted, 0) / total
    store(pooled + n * C + k, average, k < C)
    if pooled_wide is not None:
        tl.store(pooled_wide + n * C + k, average, k < C)
    score = tl.load(scores + n * P + k, k < P, other=0.0)
    tl.store(attention + n * P + k, tl.exp(score - shift) / total, k < P)


@triton.jit
def _pool_bwd_kernel(
    grad_pooled, grad_attention, grad_scores, local, query, attention, pooled, grad_local, grad_query,
    C, P, stride_qn, SPLIT, CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    C, P = C * VEC_C, P * VEC_P
    splits = tl.cdiv(P, SPLIT)
    n = (tl.program_id(0) // splits).to(tl.int64)
    begin = tl.program_id(0) % splits * SPLIT
    end = tl.minimum(begin + SPLIT, P)
    query += n * stride_qn
    attention += n * P
    grad_query += tl.program_id(0).to(tl.int64) * C
    delta = 0.0
    if grad_pooled is not None:
        grad_pooled += n * C
        for c in range(0, C, BLOCK_C):
            delta += tl.sum(_channels(grad_pooled, c, C, BLOCK_C) * _channels(pooled + n * C, c, C, BLOCK_C))
    if grad_attention is not None:
        grad_attention += n * P
        for first_p in range(0, P, 1024):
            p = first_p + tl.arange(0, 1024)
            da = tl.load(grad_attention + p, p < P, other=0.0)
            delta += tl.sum(tl.load(attention + p, p < P, other=0.0) * da)
    if grad_scores is not None:
        grad_scores += n * P
    if WHOLE:
        q = _channels(query, 0, C, BLOCK_C)
        dg = _channels(grad_pooled, 0, C, BLOCK_C)
    dq = tl.zeros((BLOCK_C,), tl.float32)
    for first_p in range(begin, end, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        if WHOLE:
            tile = load_tile(local, n, 0, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            s = tl.sum(tile * dg[:, None], 0)
        else:
            s = tl.zeros((BLOCK_P,), tl.float32)
            for c in range(0, C, BLOCK_C):
                tile = load_tile(local, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                s += tl.sum(tile * _channels(grad_pooled, c, C, BLOCK_C)[:, None], 0)
        a = tl.load(attention + p, p < P, other=0.0)
        if grad_attention is not None:
            s += tl.load(grad_attention + p, p < P, other=0.0)
        dc = _score_grad(a, s, delta)
        if grad_scores is not None:
            dc += tl.load(grad_scores + p, p < P, other=0.0)
        if WHOLE:
            if grad_local is not None:
                dl = a[None, :] * dg[:, None] + dc[None, :] * q[:, None]
                store_tile(grad_local, dl, n, 0, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            dq += tl.sum(tile * dc[None, :], 1)
        else:
            for c in range(0, C, BLOCK_C):
                if grad_local is not None:
                    dl = a[None, :] * _channels(grad_pooled, c, C, BLOCK_C)[:, None]
                    dl += dc[None, :] * _channels(query, c, C, BLOCK_C)[:, None]
                    store_tile(grad_local, dl, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                tile = load_tile(local, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                at = c + tl.arange(0, BLOCK_C)
                before = tl.load(grad_query + at, (at < C) & (first_p > begin), other=0.0)
                store(grad_query + at, before + tl.sum(tile * dc[None, :], 1), at < C)
            tl.debug_barrier()  # the next tile's threads may read what others stored
    if WHOLE:
        c = tl.arange(0, BLOCK_C)
        store(grad_query + c, dq, c < C)


# --- launchers -------------------------------------------------------------------------------------------------------


def _tiles(x: Features) -> tuple[int, dict, int]:
    """Positions of a split, tile constants, and warps.

    A tile has all channels and at least 8 positions, or 16 where rows of half-precision positions fill a sector of
    memory only then. 32 numbers a thread, 64 at 2048 channels; 16 where rows are not whole vectors, because addresses
    of single numbers take registers as well. More channels than that are read in pieces.
    A split is 64 positions, fewer where there are few of them, more where there would be very many partial sums; all
    of a small image, which takes about as long as a second launch.
    """
    numbers, most = (32, 2048) if x.vector >= 4 else (16, 512)
    channels = ceil_power(x.channels)
    whole = channels <= most
    block_c = channels if whole else most // 2
    rows = 8 if x.itemsize == 4 or x.channels_last else 16
    warps = 4 if block_c * rows <= 128 * numbers else 8
    block_p = min(128, max(8, 32 * numbers * warps // block_c), ceil_power(x.positions))
    if whole and x.channels * x.positions <= 32768:
        split = x.positions
    else:
        split = max(block_p, 32 if x.positions <= 256 else 64 if x.positions <= 4096 else 256)
    return split, {"BLOCK_C": block_c, "BLOCK_P": block_p, "WHOLE": whole}, warps


def _stride_n(query: torch.Tensor) -> int:
    """0 for a query that the batch shares."""
    return query.stride(0) if query.dim() == 2 else 0


def pool_fwd(local, query):
    n, c, *sizes = local.shape
    seen = features(local)
    split, tile, warps = _tiles(seen)
    splits = triton.cdiv(seen.positions, split)
    pooled = local.new_empty((n, c))
    half = local.dtype != torch.float32
    pooled_wide = local.new_empty((n, c) if half else (0,), dtype=torch.float32)
    attention = local.new_empty((n, *sizes), dtype=torch.float32)
    scores = torch.empty_like(attention)
    results = attention, pooled, pooled_wide if half else None
    one = tile["WHOLE"] and splits == 1
    peaks = None if one else attention.new_empty((n, splits, 2))
    sums = None if one else attention.new_empty((n, splits, c))
    launch(
        _pool_fwd_kernel, n * splits, local, query, scores, *results, peaks, sums,
        *seen.sizes, _stride_n(query), split, **seen.constants, **tile, num_warps=warps,
    )  # fmt: skip
    if not one:
        blocks = max(triton.cdiv(c, 128), triton.cdiv(seen.positions, 128))
        launch(
            _pool_combine_kernel, n * blocks, scores, peaks, sums, *results, c, seen.positions, splits,
            BLOCK_S=ceil_power(splits), BLOCK_R=16, BLOCK=128,
        )  # fmt: skip
    return pooled, attention, scores, pooled_wide


def pool_bwd(grad_pooled, grad_attention, grad_scores, local, query, attention, pooled_wide, need_grad_local):
    n, c = local.shape[:2]
    seen = features(local)
    split, tile, warps = _tiles(seen)
    splits = triton.cdiv(seen.positions, split)
    grad_local = torch.empty_like(local) if need_grad_local else None
    grad_query = torch.empty_like(query)
    # One launch where each program has the only term of a query's gradient, and rounds it once.
    one = tile["WHOLE"] and splits == 1 and query.dim() == 2
    sums = grad_query if one else attention.new_empty((n, splits, c))
    launch(
        _pool_bwd_kernel, n * splits,
        grad_pooled, grad_attention, grad_scores, local, query, attention, pooled_wide, grad_local, sums,
        *seen.sizes, _stride_n(query), split, **seen.constants, **tile, num_warps=warps,
    )  # fmt: skip
    if not one:
        sum_rows(sums, grad_query)
    return (grad_local if need_grad_local else local.new_empty((0,))), grad_query
