"""Triton kernels of softmax compatibility pooling with one query per image. Formulas: attnkern/pool.py.

A program processes all channels of some positions of an image, called its split, and reads them once: it computes
scores and weighted sums from a tile in registers. A second launch adds the splits in order, unless the image is a
single split.

If there are more than 2048 channels, or the rows of a small map are not whole vectors (7x7), programs process a part
of the channels at all positions instead. The first launch computes scores over groups of channels; the second one reads
the features again, mostly from a cache.

More queries per image, or a mask: pool_many.py.
"""

import functools
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from attnkern._triton import pool_many
from attnkern._triton.common import (
    Features,
    addressable,
    ceil_power,
    features,
    launch,
    load_tile,
    place,
    store,
    store_tile,
    sum_rows,
)
from attnkern._triton.pool_common import advance, channels, combine, delta_of, shift, store_pooled

# --- mathematics -----------------------------------------------------------------------------------------------------


@triton.jit
def _online_softmax(largest, score):
    """Update the largest score so far by more scores. Returns it, the factor for sums so far, and the weights."""
    new_largest = tl.maximum(largest, tl.max(score))
    by = shift(new_largest)
    return new_largest, tl.exp(largest - by), tl.exp(score - by)


@triton.jit
def _score_grad(s, grad_attention, grad_scores, attention, delta, n, p, P):
    """Attention a, and the gradient of the scores, a(s + da - Δ) + dscores with s = ⟨ℓ, dg⟩."""
    a = tl.load(attention + n * P + p, p < P, other=0.0)
    if grad_attention is not None:
        s += tl.load(grad_attention + n * P + p, p < P, other=0.0)
    dc = a * (s - delta)
    if grad_scores is not None:
        dc += tl.load(grad_scores + n * P + p, p < P, other=0.0)
    return a, dc


# --- kernels with all channels ---------------------------------------------------------------------------------------


@triton.jit
def _pool_fwd_kernel(
    local, query, scores, attention, pooled, pooled_wide, peaks, sums, C, P, stride_qn, SPLIT,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C, P, SPLIT = C * VEC_C, P * VEC_P, SPLIT * VEC_P
    n, _, split = place(C, P, BLOCK_C, SPLIT)
    begin = split * SPLIT
    scores += n * P
    q = channels(query + n * stride_qn, 0, C, BLOCK_C)
    largest = -float("inf")
    total = 0.0
    weighted = tl.zeros((BLOCK_C,), tl.float32)
    for first_p in range(begin, tl.minimum(begin + SPLIT, P), BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        tile = load_tile(local, n, 0, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        score = tl.sum(tile * q[:, None], 0)
        tl.store(scores + p, score, p < P)
        score = tl.where(p < P, score, -float("inf"))
        # The sums are relative to the largest score so far.
        largest, decay, weight = _online_softmax(largest, score)
        total = total * decay + tl.sum(weight)
        weighted = weighted * decay + tl.sum(tile * weight[None, :], 1)
    c = tl.arange(0, BLOCK_C)
    if peaks is None:  # the image is a single split
        store_pooled(pooled, pooled_wide, weighted / total, n * C + c, c < C)
        tl.debug_barrier()  # other threads stored the scores
        for first_p in range(0, P, 128):
            p = first_p + tl.arange(0, 128)
            weight = tl.exp(tl.load(scores + p, p < P, other=0.0) - shift(largest))
            tl.store(attention + n * P + p, weight / total, p < P)
    else:
        row = tl.program_id(0).to(tl.int64)
        tl.store(peaks + row * 2, largest)
        tl.store(peaks + row * 2 + 1, total)
        tl.store(sums + row * C + c, weighted, c < C)


@triton.jit
def _pool_bwd_kernel(
    grad_pooled, grad_attention, grad_scores, local, query, attention, pooled, grad_local, grad_query,
    C, P, stride_qn, SPLIT, CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C, P, SPLIT = C * VEC_C, P * VEC_P, SPLIT * VEC_P
    n, _, split = place(C, P, BLOCK_C, SPLIT)
    begin = split * SPLIT
    delta = delta_of(grad_pooled, grad_attention, None, attention, pooled, n, C, P, BLOCK_C)
    q = channels(query + n * stride_qn, 0, C, BLOCK_C)
    dg = channels(advance(grad_pooled, n, C), 0, C, BLOCK_C)
    dq = tl.zeros((BLOCK_C,), tl.float32)
    for first_p in range(begin, tl.minimum(begin + SPLIT, P), BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        tile = load_tile(local, n, 0, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        s = tl.sum(tile * dg[:, None], 0)
        a, dc = _score_grad(s, grad_attention, grad_scores, attention, delta, n, p, P)
        if grad_local is not None:
            dl = a[None, :] * dg[:, None] + dc[None, :] * q[:, None]
            store_tile(grad_local, dl, n, 0, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        dq += tl.sum(tile * dc[None, :], 1)
    c = tl.arange(0, BLOCK_C)
    store(grad_query + tl.program_id(0).to(tl.int64) * C + c, dq, c < C)


# --- kernels with a part of the channels -----------------------------------------------------------------------------


@triton.jit
def _pool_score_kernel(
    local, vector, partials, C, stride_vn, P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    C = C * VEC_C
    n, group, tile = place(C, P, GROUP, BLOCK_P)
    first_p = tile * BLOCK_P
    products = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for c in range(group * GROUP, tl.minimum(group * GROUP + GROUP, C), BLOCK_C):
        features = load_tile(local, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        products += features * channels(vector + n * stride_vn, c, C, BLOCK_C)[:, None]
    p = first_p + tl.arange(0, BLOCK_P)
    tl.store(partials + (n * tl.cdiv(C, GROUP) + group) * P + p, tl.sum(products, 0), p < P)


@triton.jit
def _sum_groups(partials, n, p, C, P, GROUP: tl.constexpr, BLOCK_P: tl.constexpr):
    """⟨ℓ_i, vector⟩ at positions p, as the sum over groups of channels."""
    groups = tl.cdiv(C, GROUP)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for group in range(groups):
        total += tl.load(partials + (n * groups + group) * P + p, p < P, other=0.0)
    return total


@triton.jit
def _pool_average_kernel(
    local, partials, scores, attention, pooled, pooled_wide, C, P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    C = C * VEC_C
    n, block, _ = place(C, P, BLOCK_C, P)
    largest = -float("inf")
    total = 0.0
    for first_p in range(0, P, BLOCK_S):
        p = first_p + tl.arange(0, BLOCK_S)
        score = _sum_groups(partials, n, p, C, P, GROUP, BLOCK_S)
        tl.store(scores + n * P + p, score, (p < P) & (block == 0))
        score = tl.where(p < P, score, -float("inf"))
        largest, decay, weight = _online_softmax(largest, score)
        total = total * decay + tl.sum(weight)
    weighted = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for first_p in range(0, P, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        score = tl.where(p < P, _sum_groups(partials, n, p, C, P, GROUP, BLOCK_P), -float("inf"))
        weight = tl.exp(score - shift(largest)) / total
        tl.store(attention + n * P + p, weight, (p < P) & (block == 0))
        tile = load_tile(local, n, block * BLOCK_C, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        weighted += tile * weight[None, :]
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    average = tl.sum(weighted, 1)
    store_pooled(pooled, pooled_wide, average, n * C + c, c < C)


@triton.jit
def _pool_grad_kernel(
    grad_pooled, grad_attention, grad_scores, local, query, partials, attention, pooled, grad_local, grad_query,
    C, stride_qn, P: tl.constexpr, CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    C = C * VEC_C
    n, block, _ = place(C, P, BLOCK_C, P)
    first_c = block * BLOCK_C
    delta = delta_of(grad_pooled, grad_attention, None, attention, pooled, n, C, P, BLOCK_S)
    q = channels(query + n * stride_qn, first_c, C, BLOCK_C)
    dg = channels(advance(grad_pooled, n, C), first_c, C, BLOCK_C)
    dq = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for first_p in range(0, P, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        s = tl.zeros((BLOCK_P,), tl.float32)
        if partials is not None:
            s = _sum_groups(partials, n, p, C, P, GROUP, BLOCK_P)
        a, dc = _score_grad(s, grad_attention, grad_scores, attention, delta, n, p, P)
        dq += load_tile(local, n, first_c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P) * dc[None, :]
        if grad_local is not None:
            dl = a[None, :] * dg[:, None] + dc[None, :] * q[:, None]
            store_tile(grad_local, dl, n, first_c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    c = first_c + tl.arange(0, BLOCK_C)
    store(grad_query + n * C + c, tl.sum(dq, 1), c < C)


# --- launchers -------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How programs share an image if each has all channels of its positions, in tiles of ``block_p`` positions.

    A tile has at least 8 positions, or 16 if half-precision rows fill a sector of memory only then, and 32 elements per
    thread, up to 64 with 1024 channels or more. A small image is a single split, because this takes about as long as a
    second launch. Otherwise a split has few positions, so that there are many programs, but not too many sums to add.
    """

    split: int  #: positions per program
    block_p: int
    warps: int

    @classmethod
    @functools.lru_cache
    def of(cls, x: Features, backward: bool) -> Self | None:
        """None if a program would have too many channels, or would load single elements of a small map."""
        channels, positions = ceil_power(x.channels), ceil_power(x.positions)
        numbers, most = (32, 2048) if x.vector >= 4 else (16, 512)  # the addresses of single elements take registers
        if not x.channels_last:
            most = addressable(x, most)
        if channels > most or (x.scalar and x.positions <= 256):
            return None
        if x.itemsize == 2 and not backward and channels <= 512 and (x.channels_last or positions > 128):
            numbers = 64  # saves instructions for sums at the cost of registers
        sector = 8 if x.itemsize == 4 or x.channels_last else 16  # positions per sector of memory
        warps = 4 if channels * sector <= 128 * numbers else 8
        block_p = min(128, max(8, 32 * numbers * warps // channels), positions)
        if x.channels * x.positions <= 32768:
            return cls(x.positions, block_p, warps)
        split = 64 if x.positions <= 4096 else 256
        if x.positions <= 256:
            split = 16 if backward or x.channels <= 1024 else 8
        return cls(max(block_p, split), block_p, warps)

    def arguments(self, x: Features, query) -> tuple:
        return *x.sizes, _stride_n(query), triton.cdiv(self.split, x.constants["VEC_P"])

    def constants(self, x: Features) -> dict:
        return {**x.constants, "BLOCK_C": ceil_power(x.channels), "BLOCK_P": self.block_p, "num_warps": self.warps}


def _stride_n(query: torch.Tensor) -> int:
    """The query's stride over images: 0 if the batch shares it."""
    return query.stride(0) if query.dim() == 2 else 0


#: Channels per group of the first launch, if programs have a part of the channels.
_GROUP = 512


def _part_constants(x: Features) -> dict:
    """Constants if programs have a part of the channels. The number of positions is one of them, so that the rows of a
    tile share their address computation even if they are not whole vectors."""
    block_c, block_p = min(128, ceil_power(x.channels)), min(16, ceil_power(x.positions))
    if x.channels_last:
        block_p = addressable(x, block_p)
    else:
        block_c = addressable(x, block_c)
    return {
        "P": x.positions, "CHANNELS_LAST": x.channels_last, "VEC_C": x.constants["VEC_C"],
        "BLOCK_C": block_c, "BLOCK_P": block_p, "GROUP": _GROUP,
    }  # fmt: skip


def _part_warps(channels: int) -> int:
    """Warps of the second launch. Unless channels are a multiple of 16, each row of a tile has a mask in registers."""
    return 4 if channels % 16 == 0 else 8


def _partials(local, vector, x: Features):
    """⟨ℓ_i, vector⟩ over each group of channels, (N, groups, positions), for a vector (N, C) or (C,)."""
    n, constants = local.shape[0], _part_constants(x)
    groups = triton.cdiv(x.channels, _GROUP)
    partials = local.new_empty((n, groups, x.positions), dtype=torch.float32)
    programs = n * groups * triton.cdiv(x.positions, constants["BLOCK_P"])
    launch(_pool_score_kernel, programs, local, vector, partials, x.sizes[0], _stride_n(vector), **constants)
    return partials


def _fwd(local, query):
    n, c, *sizes = local.shape
    x = features(local)
    plan = _Plan.of(x, backward=False)
    pooled = local.new_empty((n, c))
    half = local.dtype != torch.float32
    pooled_wide = local.new_empty((n, c) if half else (0,), dtype=torch.float32)
    attention = local.new_empty((n, *sizes), dtype=torch.float32)
    scores = torch.empty_like(attention)
    results = attention, pooled, pooled_wide if half else None
    if plan is None:
        partials, constants = _partials(local, query, x), _part_constants(x)
        programs = n * triton.cdiv(c, constants["BLOCK_C"])
        launch(
            _pool_average_kernel, programs, local, partials, scores, *results, x.sizes[0],
            BLOCK_S=min(1024, ceil_power(x.positions)), num_warps=_part_warps(c), **constants,
        )  # fmt: skip
        return pooled, attention, scores, pooled_wide
    splits = triton.cdiv(x.positions, plan.split)
    peaks = None if splits == 1 else attention.new_empty((n, splits, 2))
    sums = None if splits == 1 else attention.new_empty((n, splits, c))
    launch(
        _pool_fwd_kernel, n * splits, local, query, scores, *results, peaks, sums,
        *plan.arguments(x, query), **plan.constants(x),
    )  # fmt: skip
    if splits > 1:
        combine(scores, None, peaks, sums, *results, 1, c, x.positions)
    return pooled, attention, scores, pooled_wide


def _bwd(grad_pooled, grad_attention, grad_scores, local, query, attention, pooled_wide, need_grad_local):
    n, c = local.shape[:2]
    x = features(local)
    plan = _Plan.of(x, backward=True)
    splits = 1 if plan is None else triton.cdiv(x.positions, plan.split)
    grad_local = torch.empty_like(local) if need_grad_local else None
    grad_query = torch.empty_like(query)
    # A program that has the only term of a query's gradient writes it directly, rounded once.
    one = splits == 1 and query.dim() == 2
    sums = grad_query if one else attention.new_empty((n, splits, c))
    grads = grad_pooled, grad_attention, grad_scores
    if plan is None:
        partials, constants = None, _part_constants(x)
        if grad_pooled is not None:
            partials = _partials(local, grad_pooled, x)
        launch(
            _pool_grad_kernel, n * triton.cdiv(c, constants["BLOCK_C"]),
            *grads, local, query, partials, attention, pooled_wide, grad_local, sums, x.sizes[0], _stride_n(query),
            BLOCK_S=min(1024, ceil_power(c)), num_warps=_part_warps(c), **constants,
        )  # fmt: skip
    else:
        launch(
            _pool_bwd_kernel, n * splits, *grads, local, query, attention, pooled_wide, grad_local, sums,
            *plan.arguments(x, query), **plan.constants(x),
        )  # fmt: skip
    if not one:
        sum_rows(sums, grad_query)
    return (grad_local if need_grad_local else local.new_empty((0,))), grad_query


def _one(query, mask) -> bool:
    return mask is None and (query.dim() < 3 or query.shape[1] == 1)


def _without_axis(local, query):
    """A query (N, 1, C) as (N, C), or (1, 1, C) as (C,) if the batch shares it."""
    if query.dim() < 3:
        return query
    return query[:, 0] if query.shape[0] == local.shape[0] else query[0, 0]


def pool_fwd(local, query, mask):
    if not _one(query, mask):
        return pool_many.fwd(local, query, mask)
    pooled, attention, scores, pooled_wide = _fwd(local, _without_axis(local, query))
    if query.dim() == 3:
        pooled, attention, scores = pooled[:, None], attention[:, None], scores[:, None]
        pooled_wide = pooled_wide[:, None] if pooled_wide.dim() == 2 else pooled_wide
    return pooled, attention, scores, pooled_wide


def pool_bwd(grad_pooled, grad_attention, grad_scores, local, query, mask, attention, pooled_wide, need_grad_local):
    grads = grad_pooled, grad_attention, grad_scores
    if not _one(query, mask):
        return pool_many.bwd(*grads, local, query, mask, attention, pooled_wide, need_grad_local)
    # Kernels use addresses, which do not change with an axis of one query.
    grad_local, grad_query = _bwd(*grads, local, _without_axis(local, query), attention, pooled_wide, need_grad_local)
    return grad_local, grad_query.view(query.shape)
