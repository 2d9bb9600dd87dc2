"""Triton kernels of unions of windows and of ellipses. Formulas: attnkern/window.py; statistics: attnkern/_schemas.py.

K windows are expensive to evaluate at a position. This is not repeated for each group of channels, as the kernels of
one rectangle do. Forward, a launch evaluates the union and the statistics of chunks of the map, and another one
multiplies the features. Backward, the first launch evaluates the union again, the second one computes the gradients of
the features and of the map, and the third one the sums for the windows' parameters.

The derivatives of log f are centred, as those of one rectangle, but by their values where f is largest: any centre is
correct, and this one needs no sums. The statistics have the position in place of the first mean, and no others.
"""

import torch
import triton
import triton.language as tl

from attnkern._numerics import aspect_factors
from attnkern._triton.common import Features, Tile, ceil_power, launch, modulate, modulate_backward, place
from attnkern._triton.window_math import columns, frame_of, window_of_union

_KS = tl.constexpr(32)  # windows that are evaluated side by side at one position
_AT_A_TIME = tl.constexpr(4)  # windows whose gradients a program computes

# --- mathematics -----------------------------------------------------------------------------------------------------


@triton.jit
def _union(position, rectangle, n, K, H, W, scale, row, column, ELLIPSE: tl.constexpr):
    """log f of f = 1 - Π (1 - f_k) = Σ_k f_k Π_{j<k} (1 - f_j), in which nothing cancels, and Π (1 - f_k)."""
    largest = tl.full(position.shape, -float("inf"), tl.float32)
    total = tl.zeros(position.shape, tl.float32)  # f relative to e^largest
    outside = tl.full(position.shape, 1.0, tl.float32)
    for k in range(K):
        frame = frame_of(rectangle, n * K + k)
        exponent, fraction, own, _, _, _, _, _ = window_of_union(position, frame, H, W, scale, row, column, ELLIPSE)
        ratio = tl.exp(-tl.abs(exponent - largest))
        own_f = outside * fraction
        total = tl.where(exponent > largest, total * ratio + own_f, total + own_f * ratio)
        largest = tl.maximum(largest, exponent)
        outside *= own
    z = largest + tl.log(total)
    return tl.where(z > 0, 0.0, z), outside  # rounding must not make f larger than 1


@triton.jit
def _slopes(position, z, outside, rectangle, row_k, H, W, scale, row, column, ELLIPSE: tl.constexpr):
    """The derivatives of log f with respect to the parameters of window ``row_k``: its share of the union,
    f_k/f · Π_{j≠k} (1 - f_j), times those of log f_k."""
    frame = frame_of(rectangle, row_k)
    exponent, fraction, own, by_mu1, by_mu2, by_sigma1, by_sigma2, by_alpha = window_of_union(
        position, frame, H, W, scale, row, column, ELLIPSE
    )
    share = tl.exp(exponent - z) * (fraction * outside / own)
    return share * by_mu1, share * by_mu2, share * by_sigma1, share * by_sigma2, share * by_alpha


@triton.jit
def _store_slopes(place, z, rectangle, n, centres, K, H, W, scale, row, column, ELLIPSE: tl.constexpr):
    """The derivatives of log f at one position, where it is z, for all windows of image n; _KS at a time."""
    log_outside = 0.0
    for first in range(0, K, _KS):
        k = first + tl.arange(0, _KS)
        frame = frame_of(rectangle, n * K + tl.minimum(k, K - 1))
        _, _, own, _, _, _, _, _ = window_of_union(place + 0 * k, frame, H, W, scale, row, column, ELLIPSE)
        log_outside += tl.sum(tl.where(k < K, tl.log(own), 0.0))
    for first in range(0, K, _KS):
        k = first + tl.arange(0, _KS)
        frame = frame_of(rectangle, n * K + tl.minimum(k, K - 1))
        exponent, fraction, own, by_mu1, by_mu2, by_sigma1, by_sigma2, by_alpha = window_of_union(
            place + 0 * k, frame, H, W, scale, row, column, ELLIPSE
        )
        share = fraction * tl.exp(exponent - z + log_outside - tl.log(own))
        at = centres + (n * K + k) * 5
        tl.store(at, share * by_mu1, k < K)
        tl.store(at + 1, share * by_mu2, k < K)
        tl.store(at + 2, share * by_sigma1, k < K)
        tl.store(at + 3, share * by_sigma2, k < K)
        tl.store(at + 4, share * by_alpha, k < K)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["K", "H", "W"])
def _windows_log_kernel(
    rectangle, logs, chunks, outsides, stats, centres, K, H, W, scale, row, column,
    ELLIPSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """log f of a chunk of a map. Forward, unless ``chunks`` is None, also max log f, Σ f relative to the largest f, and
    its position. Backward Π (1 - f_k), and unless ``centres`` is None the derivatives where f is largest."""
    HW = H * W
    per_image = tl.cdiv(HW, CHUNK)
    n = (tl.program_id(0) // per_image).to(tl.int64)
    chunk = tl.program_id(0) % per_image
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    z, outside = _union(position, rectangle, n, K, H, W, scale, row, column, ELLIPSE)
    tl.store(logs + n * HW + position, z, position < HW)
    if chunks is not None:
        exists = tl.where(position < HW, z, -float("inf"))
        largest, place = tl.max(exists, 0, return_indices=True)
        chunks += tl.program_id(0) * 4
        tl.store(chunks, largest)
        tl.store(chunks + 1, tl.sum(tl.exp(exists - largest)))
        tl.store(chunks + 2, (chunk * CHUNK + place).to(tl.float32))
    if outsides is not None:
        tl.store(outsides + n * HW + position, outside, position < HW)
    if centres is not None:  # noqa: SIM102 - decided when the kernel is compiled
        if chunk == 0:
            stats += n * (2 + 5 * K)
            place = tl.minimum(tl.load(stats + 2), HW - 1).to(tl.int32)
            _store_slopes(place, tl.load(stats), rectangle, n, centres, K, H, W, scale, row, column, ELLIPSE)


@triton.jit(do_not_specialize=["K", "H", "W"])
def _windows_fwd_kernel(
    x, logs, chunks, output, map, stats, K, C, P, H, W, RESIDUAL: tl.constexpr, FOLD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    C, P, HW = C * VEC_C, P * VEC_P, H * W
    n, group, tile = place(C, P, GROUP, BLOCK_P)
    first_p = tile * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    f = tl.load(logs + n * HW + (p % HW if FOLD > 1 else p), p < P, other=-float("inf"))
    if chunks is None:
        f = tl.exp(f)
    else:
        s = tl.arange(0, BLOCK_S)
        per_image = tl.cdiv(HW, CHUNK)
        chunks += n * per_image * 4
        largest_s = tl.load(chunks + s * 4, s < per_image, other=-float("inf"))
        largest = tl.max(largest_s)
        total = tl.sum(tl.exp(largest_s - largest) * tl.load(chunks + s * 4 + 1, s < per_image, other=0.0))
        f = tl.exp(f - largest) * (HW / total)
        if (group == 0) & (tile == 0):
            stats += n * (2 + 5 * K)
            tl.store(stats, largest)
            tl.store(stats + 1, total)
            place_s = tl.load(chunks + s * 4 + 2, (s < per_image) & (largest_s == largest), other=float("inf"))
            tl.store(stats + 2, tl.min(place_s))
    if group == 0:
        tl.store(map + n * HW + p, f, p < HW)
    if x is not None:
        modulate(x, f, output, n, group, first_p, C, P, RESIDUAL, CHANNELS_LAST, BLOCK_C, BLOCK_P, GROUP)


@triton.jit
def _f(logs, stats, n, p, exists, K, HW, RESCALE: tl.constexpr):
    """The map at positions p, from log f."""
    f = tl.load(logs + n * HW + p, exists, other=-float("inf"))
    if RESCALE:
        stats += n * (2 + 5 * K)
        return tl.exp(f - tl.load(stats)) * (HW / tl.load(stats + 1))
    else:
        return tl.exp(f)


@triton.jit(do_not_specialize=["K", "H", "W"])
def _windows_bwd_kernel(
    grad_output, x, logs, stats, grad_x, partials, K, C, P, H, W,
    RESCALE: tl.constexpr, RESIDUAL: tl.constexpr, FOLD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of the features, and that of the map as sums over groups of channels, (N, groups, P)."""
    C, P, HW = C * VEC_C, P * VEC_P, H * W
    n, group, tile = place(C, P, GROUP, BLOCK_P)
    first_p = tile * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    f = _f(logs, stats, n, p % HW if FOLD > 1 else p, p < P, K, HW, RESCALE)
    grad_f = modulate_backward(
        grad_output, x, f, grad_x, n, group, first_p, C, P, RESIDUAL, CHANNELS_LAST, BLOCK_C, BLOCK_P, GROUP
    )
    groups = tl.maximum(tl.cdiv(C, GROUP), 1)
    tl.store(partials + (n * groups + group) * P + p, grad_f, p < P)


@triton.jit(do_not_specialize=["K", "H", "W"])
def _windows_slopes_kernel(
    grad_map, partials, rectangle, logs, outsides, stats, centres, sums, K, parts, H, W, scale, row, column,
    RESCALE: tl.constexpr, ELLIPSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk for each of a few windows, as those of one rectangle, with centre c: Σ G f (∂log f - c), Σ G f,
    Σ f (∂log f - c)."""
    HW = H * W
    per_image = tl.cdiv(HW, CHUNK)
    first = tl.program_id(0) % tl.cdiv(K, _AT_A_TIME) * _AT_A_TIME
    block = tl.program_id(0) // tl.cdiv(K, _AT_A_TIME)
    n = (block // per_image).to(tl.int64)
    chunk = block % per_image
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = position < HW
    grad_f = tl.zeros((CHUNK,), tl.float32)
    if grad_map is not None:
        grad_f += tl.load(grad_map + n * HW + position, exists, other=0.0)
    if partials is not None:
        for part in range(parts):
            grad_f += tl.load(partials + (n * parts + part) * HW + position, exists, other=0.0)
    f = _f(logs, stats, n, position, exists, K, HW, RESCALE)
    # At positions that do not exist f is zero, and the others must be finite.
    z = tl.load(logs + n * HW + position, exists, other=0.0)
    outside = tl.load(outsides + n * HW + position, exists, other=1.0)
    weight = grad_f * f
    zero = tl.zeros_like(f)
    for k in range(first, tl.minimum(first + _AT_A_TIME, K)):
        a, b, c, d, e = _slopes(position, z, outside, rectangle, n * K + k, H, W, scale, row, column, ELLIPSE)
        at = sums + ((n * K + k) * per_image + chunk) * 16 + tl.arange(0, 8)
        if RESCALE:
            centre = centres + (n * K + k) * 5
            a -= tl.load(centre)
            b -= tl.load(centre + 1)
            c -= tl.load(centre + 2)
            d -= tl.load(centre + 3)
            e -= tl.load(centre + 4)
            tl.store(at + 8, tl.sum(columns(f * a, f * b, f * c, f * d, f * e, zero, zero), 0))
        else:
            tl.store(at + 8, tl.zeros((8,), tl.float32))
        tl.store(at, tl.sum(columns(weight * a, weight * b, weight * c, weight * d, weight * e, weight, zero), 0))


# --- launchers -------------------------------------------------------------------------------------------------------


def _chunk(positions):
    """Positions per program: few, so that many programs share the work, unless that leaves too many chunks to add."""
    return 128 if positions <= 1024 else 256 if positions <= 4096 else 1024


def _slopes_chunk(positions):
    """More positions where there are enough programs, because each adds up eleven sums for each window."""
    return 256 if positions <= 256 else 512 if positions <= 4096 else 1024


def _count(rectangle) -> int:
    return rectangle.shape[1] if rectangle.dim() == 3 else 1


def _logs(rectangle, size, scale, aspect, ellipse, chunks=None, outsides=None, stats=None, centres=None):
    """log f (N, H, W); also fills each of the optional tensors that is not None."""
    n, positions = rectangle.shape[0], size[0] * size[1]
    chunk = _chunk(positions)
    logs = rectangle.new_empty((n, *size), dtype=torch.float32)
    launch(
        _windows_log_kernel, n * triton.cdiv(positions, chunk), rectangle, logs, chunks, outsides, stats, centres,
        _count(rectangle), *size, scale, *aspect_factors(*size, aspect), ELLIPSE=ellipse, CHUNK=chunk,
    )  # fmt: skip
    return logs


def forward(x, rectangle, size, scale, rescale, residual, aspect, ellipse, layout: Features, tile: Tile):
    n, count, positions = rectangle.shape[0], _count(rectangle), size[0] * size[1]
    chunk = _chunk(positions)
    output = None if x is None else torch.empty_like(x)
    map = rectangle.new_empty((n, *size), dtype=torch.float32)
    stats = rectangle.new_empty((n, 2 + 5 * count if rescale else 0), dtype=torch.float32)
    per_image = triton.cdiv(positions, chunk)
    chunks = map.new_empty((n, per_image, 4)) if rescale else None
    logs = _logs(rectangle, size, scale, aspect, ellipse, chunks)
    launch(
        _windows_fwd_kernel, n * tile.programs(layout),
        x, logs, chunks, output, map, stats, count, *layout.sizes, *size,
        RESIDUAL=residual, FOLD=layout.fold, BLOCK_S=ceil_power(per_image), CHUNK=chunk,
        **layout.constants, **tile.constants,
    )  # fmt: skip
    return output, map, stats


def backward(
    grad_output, grad_map, x, rectangle, stats, size, scale, rescale, residual, aspect, ellipse, grad_x,
    layout: Features, tile: Tile, warps: int,
):  # fmt: skip
    """The sums of chunks, (N, K, chunks, 16), as those of the programs of one rectangle. Writes to ``grad_x``."""
    n, count, positions = rectangle.shape[0], _count(rectangle), size[0] * size[1]
    outsides = rectangle.new_empty((n, *size), dtype=torch.float32)
    centres = outsides.new_empty((n, count, 5)) if rescale else None
    logs = _logs(rectangle, size, scale, aspect, ellipse, None, outsides, stats, centres)
    partials, parts = None, 0
    if x is not None:
        groups = max(1, triton.cdiv(layout.channels, tile.group))
        partials, parts = logs.new_empty((n, groups, layout.positions)), groups * layout.fold
        launch(
            _windows_bwd_kernel, n * tile.programs(layout),
            grad_output, x, logs, stats, grad_x, partials, count, *layout.sizes, *size,
            RESCALE=rescale, RESIDUAL=residual, FOLD=layout.fold, **layout.constants, **tile.constants,
            num_warps=warps,
        )  # fmt: skip
    chunk = _slopes_chunk(positions)
    chunks = triton.cdiv(positions, chunk)
    sums = logs.new_empty((n, count, chunks, 16))
    launch(
        _windows_slopes_kernel, n * chunks * triton.cdiv(count, _AT_A_TIME.value),
        grad_map, partials, rectangle, logs, outsides, stats, centres, sums, count, parts, *size, scale,
        *aspect_factors(*size, aspect), RESCALE=rescale, ELLIPSE=ellipse, CHUNK=chunk,
    )  # fmt: skip
    return sums
