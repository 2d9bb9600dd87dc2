"""Triton kernels of pooling with many queries per image, or with a mask. Formulas: attnkern/pool.py.

A program has a group of queries and a tile of up to 64 positions with all channels, in steps of a block of channels. It
goes over the tile twice: for the scores, which need all channels, and for the weighted sums. The second time the tile
comes from a cache, so the features are read from memory once whatever the number of queries and channels is, and
nothing in a program grows with them. Groups of queries that share a tile run side by side.

All products are matrix products on tensor cores with the accuracy of float32; :func:`_dot` says how.
"""

import functools
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from attnkern._triton.common import (
    _INTERPRETED,
    Features,
    _tile,
    addressable,
    ceil_power,
    features,
    launch,
    place,
    store,
    store_tile,
    sum_rows,
)
from attnkern._triton.pool_common import advance, combine, delta_of, mask_stride, shift, store_pooled, takes_part

# --- products --------------------------------------------------------------------------------------------------------


@triton.jit
def _truncated(x, BITS: tl.constexpr):
    """Float32 numbers whose lower bits are 0: exact in a narrower type, and never larger, so that none overflows."""
    return (x.to(tl.uint32, bitcast=True) >> BITS << BITS).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(x, y, total, PRECISION: tl.constexpr):
    if _INTERPRETED:  # the interpreter multiplies the bits of bfloat16, and float32 where a GPU drops bits
        x, y = x.to(tl.float32), y.to(tl.float32)
        if PRECISION == "tf32":
            x, y = _truncated(x, 13), _truncated(y, 13)
        return tl.dot(x, y, total)
    else:
        return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def _three(x, FINITE: tl.constexpr):
    """Three bfloat16 tensors whose sum is x exactly, because they have 8 bits each. If x is Inf the others are NaN, or
    0 with FINITE."""
    high = _truncated(x, 16)
    rest = tl.where(x - x == 0, x - high, 0.0) if FINITE else x - high
    middle = _truncated(rest, 16)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)


@triton.jit
def _two(x, FINITE: tl.constexpr):
    """As above, two TF32 tensors whose sum is x to 23 bits. They have 11 bits; the second one is rounded to them."""
    high = _truncated(x, 13)
    low = ((x - high).to(tl.uint32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return high, tl.where(x - x == 0, low, 0.0) if FINITE else low


@triton.jit
def _plus(total, small, FINITE: tl.constexpr):
    """Add the products of lower pieces. NaN among them is from Inf, and the product of the first pieces tells what the
    result is."""
    return total + (small if FINITE else tl.where(small == small, small, 0.0))


@triton.jit
def _dot(x, y, total, PRECISION: tl.constexpr):
    """total + x·y with the accuracy of float32, for factors in half precision or float32.

    Tensor cores multiply half precision exactly and add in float32. A float32 factor becomes the sum of three bfloat16
    numbers if the other one is bfloat16, and otherwise of two TF32 numbers, which take twice the time. float16 is exact
    in TF32. Bits of denormal numbers below 2^-136 are lost. AMD multiplies float32 itself.
    """
    zeros = tl.zeros(total.shape, tl.float32)
    # Lower pieces that are NaN are replaced among the factors or the sums, whichever are fewer.
    sums: tl.constexpr = total.shape[0] * total.shape[1]
    x_few: tl.constexpr = x.shape[0] * x.shape[1] <= sums
    y_few: tl.constexpr = y.shape[0] * y.shape[1] <= sums
    if x.dtype == y.dtype and x.dtype != tl.float32:
        return _multiply(x, y, total, PRECISION)
    elif y.dtype == tl.bfloat16:
        high, middle, low = _three(x, x_few)
        small = _multiply(middle, y, _multiply(low, y, zeros, PRECISION), PRECISION)
        return _multiply(high, y, _plus(total, small, x_few), PRECISION)
    elif x.dtype == tl.bfloat16:
        high, middle, low = _three(y, y_few)
        small = _multiply(x, middle, _multiply(x, low, zeros, PRECISION), PRECISION)
        return _multiply(x, high, _plus(total, small, y_few), PRECISION)
    elif PRECISION == "ieee":
        return _multiply(x.to(tl.float32), y.to(tl.float32), total, PRECISION)
    elif y.dtype == tl.float16:
        high, low = _two(x, x_few)
        y = y.to(tl.float32)
        return _multiply(high, y, _plus(total, _multiply(low, y, zeros, PRECISION), x_few), PRECISION)
    elif x.dtype == tl.float16:
        high, low = _two(y, y_few)
        x = x.to(tl.float32)
        return _multiply(x, high, _plus(total, _multiply(x, low, zeros, PRECISION), y_few), PRECISION)
    else:
        few: tl.constexpr = x_few and y_few
        high, low = _two(x, few)
        y_high, y_low = _two(y, few)
        small = _multiply(high, y_low, _multiply(low, y_high, zeros, PRECISION), PRECISION)
        return _multiply(high, y_high, _plus(total, small, few), PRECISION)


# --- loads -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load(x, n, c, p, kept, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """A tile of features (BLOCK_C, BLOCK_P) in their dtype; zero where positions are not kept."""
    begin, offsets, mask = _tile(n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    return tl.load(x + begin + offsets, mask & kept[None, :], other=0.0)


@triton.jit
def _vectors(x, m, c, M, C, BLOCK_C: tl.constexpr):
    """Channels c to c + BLOCK_C of vectors m of an image, (BLOCK_M, BLOCK_C) in their dtype."""
    c += tl.arange(0, BLOCK_C)
    return tl.load(x + m[:, None] * C + c[None, :], (m < M)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _maps(x, m, p, kept, M, P):
    """Maps m of an image at positions p, (BLOCK_M, BLOCK_P); zero where positions are not kept."""
    return tl.load(x + m[:, None] * P + p[None, :], (m < M)[:, None] & kept[None, :], other=0.0)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _pool_many_fwd_kernel(
    local, query, mask, scores, attention, pooled, pooled_wide, peaks, sums, M, C, P, stride_qn, stride_kn,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C, P = C * VEC_C, P * VEC_P
    n, split, group = place(P, M, BLOCK_P, BLOCK_M)
    first_p = split * BLOCK_P
    m = group * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    p = first_p + tl.arange(0, BLOCK_P)
    kept = takes_part(advance(mask, n, stride_kn), p, P)
    query += n * stride_qn
    score = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for first_c in range(0, C, BLOCK_C):
        tile = _load(local, n, first_c, first_p, p < P, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        score = _dot(_vectors(query, m, first_c, M, C, BLOCK_C), tile, score, PRECISION)
    rows = n * M + m
    maps = rows[:, None] * P + p[None, :]
    exist = (m < M)[:, None] & (p < P)[None, :]
    tl.store(scores + maps, score, exist)
    score = tl.where(kept[None, :], score, -float("inf"))
    largest = tl.max(score, 1)
    weight = tl.where(kept[None, :], tl.exp(score - shift(largest)[:, None]), 0.0)
    total = tl.sum(weight, 1)
    if peaks is None:  # the image is a single split
        if mask is not None:
            # Without any position the weights and their total are 0: the results are 0, not NaN.
            total = tl.where(tl.max(kept.to(tl.int32), 0) == 0, 1.0, total)
        tl.store(attention + maps, tl.where(kept[None, :], weight / total[:, None], 0.0), exist)
    else:
        rows = rows * tl.cdiv(P, BLOCK_P) + split
        tl.store(peaks + rows * 2, largest, m < M)
        tl.store(peaks + rows * 2 + 1, total, m < M)
    for first_c in range(0, C, BLOCK_C):
        tile = _load(local, n, first_c, first_p, kept, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        weighted = _dot(weight, tl.trans(tile), tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
        c = first_c + tl.arange(0, BLOCK_C)
        vectors = rows[:, None] * C + c[None, :]
        inside = (m < M)[:, None] & (c < C)[None, :]
        if peaks is None:
            store_pooled(pooled, pooled_wide, weighted / total[:, None], vectors, inside)
        else:
            tl.store(sums + vectors, weighted, inside)


@triton.jit
def _pool_delta_kernel(
    grad_pooled, grad_attention, mask, attention, pooled, delta, M, C, P, stride_kn, BLOCK_C: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    kept = advance(mask, n // M, stride_kn)
    tl.store(delta + n, delta_of(grad_pooled, grad_attention, kept, attention, pooled, n, C, P, BLOCK_C))


@triton.jit
def _score_grads(
    grad_pooled, grad_attention, grad_scores, local, attention, delta, kept, n, first_m, first_p, M, C, P,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention a of a group of queries, and the gradient of the scores, a(s + da - Δ) + dscores with s = ⟨ℓ, dg⟩."""
    m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
    p = first_p + tl.arange(0, BLOCK_P)
    dc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if grad_pooled is not None:
        for first_c in range(0, C, BLOCK_C):
            tile = _load(local, n, first_c, first_p, kept, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            dc = _dot(_vectors(grad_pooled + n * M * C, m, first_c, M, C, BLOCK_C), tile, dc, PRECISION)
    if grad_attention is not None:
        dc += _maps(grad_attention + n * M * P, m, p, kept, M, P)
    a = _maps(attention + n * M * P, m, p, kept, M, P)
    dc = a * (dc - tl.load(delta + n * M + m, m < M, other=0.0)[:, None])
    dc = tl.where(kept[None, :], dc, 0.0)  # also where Δ is NaN
    if grad_scores is not None:
        dc += _maps(grad_scores + n * M * P, m, p, p < P, M, P)
    return a, dc


@triton.jit
def _add_grad_local(
    grad_pooled, query, dl, a, dc, kept, n, first_m, first_c, M, C,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """dl + Σ_m a_m dg_m + dc_m q_m over a group of queries, (BLOCK_C, BLOCK_P). Where a mask leaves positions out, only
    the gradients of SCORES reach them, also if a factor of 0 is NaN."""
    m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
    q = tl.trans(_vectors(query, m, first_c, M, C, BLOCK_C))
    if grad_pooled is None:
        dl = _dot(q, dc, dl, PRECISION)
    else:
        dg = tl.trans(_vectors(grad_pooled + n * M * C, m, first_c, M, C, BLOCK_C))
        if SCORES:
            dl += tl.where(kept[None, :], _dot(dg, a, tl.zeros(dl.shape, tl.float32), PRECISION), 0.0)
            dl = _dot(q, dc, dl, PRECISION)
        else:
            dl = _dot(q, dc, _dot(dg, a, dl, PRECISION), PRECISION)
    return dl if SCORES else tl.where(kept[None, :], dl, 0.0)


@triton.jit
def _store_grad_query(
    grad_query, tile, dc, row, first_m, first_c, M, C, stride_dm,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store Σ_i dc_mi ℓ_i for a group of queries, over the positions of the tile."""
    m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
    c = first_c + tl.arange(0, BLOCK_C)
    dq = _dot(dc, tl.trans(tile), tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
    rows = row + m * stride_dm
    store(grad_query + rows[:, None] * C + c[None, :], dq, (m < M)[:, None] & (c < C)[None, :])


@triton.jit
def _pool_many_bwd_kernel(
    grad_pooled, grad_attention, grad_scores, local, query, mask, attention, delta, slopes, grad_local, grad_query,
    M, C, P, stride_qn, stride_kn, stride_dn, stride_dm,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    C, P = C * VEC_C, P * VEC_P
    n, _, split = place(C, P, C, BLOCK_P)
    first_p = split * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    kept = takes_part(advance(mask, n, stride_kn), p, P)
    # The gradient of the scores reaches all positions, because scores are returned without the mask.
    used = p < P if grad_scores is not None else kept
    query += n * stride_qn
    row = n * stride_dn + split
    maps = tl.arange(0, BLOCK_M).to(tl.int64)[:, None] * P + p[None, :]
    if slopes is None:  # a single group of queries, whose maps stay in registers
        a, dc = _score_grads(
            grad_pooled, grad_attention, grad_scores, local, attention, delta, kept, n, 0, first_p, M, C, P,
            CHANNELS_LAST, BLOCK_M, BLOCK_C, BLOCK_P, PRECISION,
        )  # fmt: skip
        for first_c in range(0, C, BLOCK_C):
            tile = _load(local, n, first_c, first_p, used, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            _store_grad_query(grad_query, tile, dc, row, 0, first_c, M, C, stride_dm, BLOCK_M, BLOCK_C, PRECISION)
            if grad_local is not None:
                dl = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
                dl = _add_grad_local(
                    grad_pooled, query, dl, a, dc, kept, n, 0, first_c, M, C, BLOCK_M, BLOCK_C, PRECISION,
                    grad_scores is not None,
                )  # fmt: skip
                store_tile(grad_local, dl, n, first_c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    else:
        for first_m in range(0, M, BLOCK_M):
            a, dc = _score_grads(
                grad_pooled, grad_attention, grad_scores, local, attention, delta, kept, n, first_m, first_p, M, C, P,
                CHANNELS_LAST, BLOCK_M, BLOCK_C, BLOCK_P, PRECISION,
            )  # fmt: skip
            m = first_m + tl.arange(0, BLOCK_M)
            tl.store(slopes + (n * M + first_m) * P + maps, dc, (m < M)[:, None] & (p < P)[None, :])
        tl.debug_barrier()  # other threads stored gradients of the scores
        for first_c in range(0, C, BLOCK_C):
            tile = _load(local, n, first_c, first_p, used, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
            dl = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            for first_m in range(0, M, BLOCK_M):
                m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
                dc = _maps(slopes + n * M * P, m, p, p < P, M, P)
                _store_grad_query(
                    grad_query, tile, dc, row, first_m, first_c, M, C, stride_dm, BLOCK_M, BLOCK_C, PRECISION
                )  # fmt: skip
                if grad_local is not None:
                    a = _maps(attention + n * M * P, m, p, kept, M, P)
                    dl = _add_grad_local(
                        grad_pooled, query, dl, a, dc, kept, n, first_m, first_c, M, C, BLOCK_M, BLOCK_C, PRECISION,
                        grad_scores is not None,
                    )  # fmt: skip
            if grad_local is not None:
                store_tile(grad_local, dl, n, first_c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)


# --- launchers -------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The blocks of a program: queries, channels of a step, positions."""

    block_m: int
    block_c: int
    block_p: int

    @classmethod
    @functools.lru_cache
    def of(cls, x: Features, queries: int, wider: bool, backward: bool, amd: bool) -> Self:
        """Matrix products have at least 16 rows and columns. More channels in a step mean fewer waits for loads, as
        far as registers allow. ``wider``: the queries are float32 and the features are not."""
        block_m = min(32, max(16, ceil_power(queries)))
        single = not x.channels_last and x.vector * x.itemsize < 8  # rows are read by single elements
        block_p, step = 64, 256 if block_m > 16 or wider or single else 512
        if amd:
            block_p, step = 32, 32 if wider else 128
        elif backward and (wider or x.itemsize == 4):
            block_p, step = 32, 64 * x.itemsize
        if backward and queries > block_m:
            step = 128
        block_c = min(step // x.itemsize, max(16, ceil_power(x.channels)))
        block_p = min(block_p, max(16, ceil_power(x.positions)))
        if x.channels_last:
            return cls(block_m, block_c, addressable(x, block_p))
        return cls(block_m, addressable(x, block_c), block_p)

    def splits(self, x: Features) -> int:
        return triton.cdiv(x.positions, self.block_p)

    def constants(self, x: Features) -> dict:
        return {
            **x.constants, "BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "BLOCK_P": self.block_p,
            "PRECISION": "tf32" if torch.version.hip is None else "ieee",
            "num_warps": max(1, min(8, self.block_p // 8)),
        }  # fmt: skip


def _plan(x: Features, m: int, query: torch.Tensor, backward: bool) -> _Plan:
    return _Plan.of(x, m, query.itemsize > x.itemsize, backward, torch.version.hip is not None)


def _queries(local, query) -> tuple[int, bool]:
    """The number of queries of each image, and whether the batch shares them."""
    m = query.shape[1] if query.dim() == 3 else 1
    return m, query.numel() != local.shape[0] * m * local.shape[1]


def fwd(local, query, mask):
    n, c, *sizes = local.shape
    m, shared = _queries(local, query)
    x = features(local)
    plan = _plan(x, m, query, backward=False)
    axis = query.shape[1:2] if query.dim() == 3 else ()
    half = local.dtype != torch.float32
    pooled = local.new_empty((n, *axis, c))
    pooled_wide = local.new_empty(pooled.shape if half else (0,), dtype=torch.float32)
    attention = local.new_empty((n, *axis, *sizes), dtype=torch.float32)
    scores = torch.empty_like(attention)
    results = attention, pooled, pooled_wide if half else None
    splits = plan.splits(x)
    peaks = None if splits == 1 else attention.new_empty((n * m, splits, 2))
    sums = None if splits == 1 else attention.new_empty((n * m, splits, c))
    launch(
        _pool_many_fwd_kernel, n * splits * triton.cdiv(m, plan.block_m), local, query, mask, scores, *results,
        peaks, sums, m, *x.sizes, 0 if shared else m * c, mask_stride(mask), **plan.constants(x),
    )  # fmt: skip
    if splits > 1:
        combine(scores, mask, peaks, sums, *results, m, c, x.positions)
    return pooled, attention, scores, pooled_wide


def bwd(grad_pooled, grad_attention, grad_scores, local, query, mask, attention, pooled_wide, need_grad_local):
    n, c = local.shape[:2]
    m, shared = _queries(local, query)
    x = features(local)
    plan = _plan(x, m, query, backward=True)
    splits = plan.splits(x)
    grad_local = torch.empty_like(local) if need_grad_local else None
    grad_query = torch.empty_like(query)
    delta = attention.new_empty((n * m,))
    slopes = torch.empty_like(attention) if m > plan.block_m or m == 0 else None
    launch(
        _pool_delta_kernel, n * m, grad_pooled, grad_attention, mask, attention, pooled_wide, delta,
        m, c, x.positions, mask_stride(mask), BLOCK_C=min(1024, ceil_power(c)),
    )  # fmt: skip
    # A program that has the only term of a query's gradient writes it directly, rounded once. Otherwise the terms of a
    # query lie side by side: those of an image's splits, or of all images if they share the query.
    one = splits == 1 and not shared
    sums = grad_query if one else attention.new_empty((m, n, splits, c) if shared else (n, m, splits, c))
    strides = (splits, n * splits) if shared else (m * splits, splits)
    launch(
        _pool_many_bwd_kernel, n * splits, grad_pooled, grad_attention, grad_scores, local, query, mask, attention,
        delta, slopes, grad_local, sums, m, *x.sizes, 0 if shared else m * c, mask_stride(mask), *strides,
        **plan.constants(x),
    )  # fmt: skip
    if not one:
        sum_rows(sums, grad_query)
    return (grad_local if need_grad_local else local.new_empty((0,))), grad_query
