"""Triton kernels of the rotated sigmoid window. Formulas: attnkern/window.py; statistics: attnkern/_schemas.py.

Forward takes one launch for small maps, in which every program computes the softmax statistics of its image. For larger
maps, an earlier launch computes the statistics of chunks. Backward takes a second launch, which adds the sums of an
image's programs, unless one program processes the whole image.
"""

import functools

import torch
import triton
import triton.language as tl

from attnkern._numerics import aspect_factors
from attnkern._triton import windows
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
    tile_last,
)
from attnkern._triton.window_math import columns, frame_of, gradient, log_window

#: Up to this many positions, every program computes the statistics of the map: 8 positions per thread.
_SMALL = 1024


# --- statistics ------------------------------------------------------------------------------------------------------


@triton.jit
def _statistics(position, frame, H, W, scale, row, column):
    """max z, Σ exp(z - max z) and Σ exp(z - max z) ∂z/∂β over the positions that lie on the map, (8,)."""
    z, by_mu1, by_mu2, by_sigma1, by_sigma2, by_alpha = log_window(position, frame, H, W, scale, row, column)
    z = tl.where(position < H * W, z, -float("inf"))
    largest = tl.max(z)
    f = tl.exp(z - largest)
    sums = columns(tl.zeros_like(f), f, f * by_mu1, f * by_mu2, f * by_sigma1, f * by_sigma2, f * by_alpha)
    return tl.where(tl.arange(0, 8) == 0, largest, tl.sum(sums, 0))


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "W"])
def _window_chunk_kernel(rectangle, chunks, H, W, scale, row, column, CHUNK: tl.constexpr):
    per_image = tl.cdiv(H * W, CHUNK)
    n = (tl.program_id(0) // per_image).to(tl.int64)
    position = tl.program_id(0) % per_image * CHUNK + tl.arange(0, CHUNK)
    row8 = _statistics(position, frame_of(rectangle, n), H, W, scale, row, column)
    tl.store(chunks + tl.program_id(0).to(tl.int64) * 8 + tl.arange(0, 8), row8)


@triton.jit(do_not_specialize=["H", "W"])
def _window_fwd_kernel(
    x, rectangle, chunks, output, map, stats, C, P, H, W, scale, row, column,
    RESCALE: tl.constexpr, RESIDUAL: tl.constexpr, FOLD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    C, P, HW = C * VEC_C, P * VEC_P, H * W
    n, group, tile = place(C, P, GROUP, BLOCK_P)
    first_p = tile * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    frame = frame_of(rectangle, n)
    position = p % HW if FOLD > 1 else p
    z, _, _, _, _, _ = log_window(position, frame, H, W, scale, row, column)
    if RESCALE:
        if chunks is not None:
            s = tl.arange(0, BLOCK_S)
            per_image = tl.cdiv(HW, CHUNK)
            chunks += n * per_image * 8
            largest_s = tl.load(chunks + s * 8, s < per_image, other=-float("inf"))
            largest = tl.max(largest_s)
            weight = tl.exp(largest_s - largest)
            total = tl.sum(weight * tl.load(chunks + s * 8 + 1, s < per_image, other=0.0))
        else:
            if BLOCK_S == 0:  # the tile covers the whole map
                s = p
                z_s = z
            else:
                s = tl.arange(0, BLOCK_S)
                z_s, _, _, _, _, _ = log_window(s, frame, H, W, scale, row, column)
            z_s = tl.where(s < HW, z_s, -float("inf"))
            largest = tl.max(z_s)
            total = tl.sum(tl.exp(z_s - largest))
        if (group == 0) & (tile == 0):
            k = tl.arange(0, 8)
            if chunks is None:
                sums = _statistics(s, frame, H, W, scale, row, column)
            else:
                mask = (s < per_image)[:, None] & (k > 0)[None, :]
                sums = tl.sum(weight[:, None] * tl.load(chunks + s[:, None] * 8 + k[None, :], mask, other=0.0), 0)
            row8 = tl.where(k == 0, largest, tl.where(k == 1, total, sums / total))
            tl.store(stats + n * 7 + k, row8, k < 7)
    if RESCALE:
        f = tl.exp(z - largest) * (HW / total)
    else:
        f = tl.exp(z)
    if group == 0:
        tl.store(map + n * HW + p, f, p < HW)
    if x is not None:
        modulate(x, f, output, n, group, first_p, C, P, RESIDUAL, CHANNELS_LAST, BLOCK_C, BLOCK_P, GROUP)


@triton.jit(do_not_specialize=["H", "W"])
def _window_bwd_kernel(
    grad_output, grad_map, x, rectangle, stats, grad_x, partials, grad_rectangle, C, P, H, W, scale, row, column,
    RESCALE: tl.constexpr, RESIDUAL: tl.constexpr, FOLD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    C, P, HW = C * VEC_C, P * VEC_P, H * W
    n, group, tile = place(C, P, GROUP, BLOCK_P)
    first_p = tile * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    position = p % HW if FOLD > 1 else p
    frame = frame_of(rectangle, n)
    z, _, _, _, _, _ = log_window(position, frame, H, W, scale, row, column)
    if RESCALE:
        stats += n * 7
        f = tl.exp(z - tl.load(stats)) * (HW / tl.load(stats + 1))
    else:
        f = tl.exp(z)
    grad_f = tl.zeros((BLOCK_P,), tl.float32)  # G
    if grad_map is not None:
        grad_f += tl.load(grad_map + n * HW + p, (p < HW) & (group == 0), other=0.0)
    if x is not None:
        grad_f += modulate_backward(
            grad_output, x, f, grad_x, n, group, first_p, C, P, RESIDUAL, CHANNELS_LAST, BLOCK_C, BLOCK_P, GROUP
        )
    # The slopes are computed after the loop, because they would occupy registers during it.
    _, by_mu1, by_mu2, by_sigma1, by_sigma2, by_alpha = log_window(position, frame, H, W, scale, row, column)
    if RESCALE:
        # The slopes are centred, so that a constant part of G cancels at each position rather than in the sums.
        by_mu1 -= tl.load(stats + 2)
        by_mu2 -= tl.load(stats + 3)
        by_sigma1 -= tl.load(stats + 4)
        by_sigma2 -= tl.load(stats + 5)
        by_alpha -= tl.load(stats + 6)
    weight = tl.where(p < P, grad_f * f, 0.0)
    zero = tl.zeros_like(weight)
    sums = tl.sum(
        columns(
            weight * by_mu1, weight * by_mu2, weight * by_sigma1, weight * by_sigma2, weight * by_alpha, weight, zero
        ),
        0,
    )
    slope_sums = tl.zeros((8,), tl.float32)
    if RESCALE:
        own = tl.where((p < HW) & (group == 0), f, 0.0)
        slope_sums = tl.sum(
            columns(own * by_mu1, own * by_mu2, own * by_sigma1, own * by_sigma2, own * by_alpha, zero, zero), 0
        )
    k = tl.arange(0, 8)
    if partials is None:
        store(grad_rectangle + n * 5 + k, gradient(sums, slope_sums, HW, RESCALE), k < 5)
    else:
        row16 = partials + tl.program_id(0).to(tl.int64) * 16 + k
        tl.store(row16, sums)
        tl.store(row16 + 8, slope_sums)


@triton.jit(do_not_specialize=["R", "HW"])
def _window_rectangle_kernel(partials, grad_rectangle, R, HW, RESCALE: tl.constexpr, BLOCK_R: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, 8)
    sums = tl.zeros((BLOCK_R, 8), tl.float32)
    slope_sums = tl.zeros((BLOCK_R, 8), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        at = partials + (n * R + r)[:, None] * 16 + k[None, :]
        sums += tl.load(at, (r < R)[:, None], other=0.0)
        slope_sums += tl.load(at + 8, (r < R)[:, None], other=0.0)
    store(grad_rectangle + n * 5 + k, gradient(tl.sum(sums, 0), tl.sum(slope_sums, 0), HW, RESCALE), k < 5)


# --- launchers -------------------------------------------------------------------------------------------------------


def _chunk(positions):
    """Positions per chunk: few, so that many programs share the work, unless that leaves too many chunks to add."""
    return 256 if positions <= 4096 else 1024


def _features(x, height, width):
    """The matrix form of x, or of the map alone if there are no features."""
    return Features(False, 4, 0, height * width, 1, 1) if x is None else features(x, foldable=True)


@functools.lru_cache
def _bwd_tile(x: Features) -> tuple[Tile, int]:
    """Tile and warps: 16 elements per thread, because two inputs and a sum are in registers together.

    One program processes a small image alone, which saves the launch that adds sums; up to 32,768 elements this takes
    about as long as that launch.
    """
    block_p = ceil_power(x.positions)
    if x.channels * x.positions <= 32768 and block_p <= (128 if x.channels_last else 1024):
        # Sums over innermost channels take more registers: half as many elements per step.
        block_c = min((2048 if x.channels_last else 4096) // block_p, ceil_power(x.channels))
        return Tile(block_c, block_p, ceil_power(x.channels)), 8
    if x.channels_last:
        return tile_last(x, 2048, 16384), 4
    block_p = min(128, block_p)
    return share(x, min(2048 // block_p, ceil_power(x.channels)), block_p, 8192), 4


def _is_union(rectangle, ellipse) -> bool:
    return ellipse or (rectangle.dim() == 3 and rectangle.shape[1] > 1)


def _forward(x, rectangle, height, width, scale, rescale, residual, aspect, ellipse):
    n = rectangle.shape[0]
    if _is_union(rectangle, ellipse):
        layout = _features(x, height, width)
        return windows.forward(
            x, rectangle, (height, width), scale, rescale, residual, aspect, ellipse, layout, fwd_tile(layout)
        )
    output = None if x is None else torch.empty_like(x)
    map = rectangle.new_empty((n, height, width), dtype=torch.float32)
    stats = rectangle.new_empty((n, 7 if rescale else 0), dtype=torch.float32)
    layout = _features(x, height, width)
    tile = fwd_tile(layout)
    geometry = (height, width, scale, *aspect_factors(height, width, aspect))
    positions, chunk, chunks = height * width, _chunk(height * width), None
    block_s = 0 if layout.positions <= tile.block_p else ceil_power(positions)
    if rescale and positions > _SMALL:
        per_image = triton.cdiv(positions, chunk)
        chunks, block_s = map.new_empty((n, per_image, 8)), ceil_power(per_image)
        launch(_window_chunk_kernel, n * per_image, rectangle, chunks, *geometry, CHUNK=chunk)
    launch(
        _window_fwd_kernel, n * tile.programs(layout),
        x, rectangle, chunks, output, map, stats, *layout.sizes, *geometry,
        RESCALE=rescale, RESIDUAL=residual, FOLD=layout.fold, BLOCK_S=block_s, CHUNK=chunk,
        **layout.constants, **tile.constants,
    )  # fmt: skip
    return output, map, stats


def _backward(grad_output, grad_map, x, rectangle, stats, size, scale, rescale, residual, aspect, ellipse, need_grad_x):
    layout = _features(x, *size)
    tile, warps = _bwd_tile(layout)
    programs = tile.programs(layout)
    grad_x = torch.empty_like(x) if need_grad_x else None
    grad_rectangle = torch.empty_like(rectangle)
    if _is_union(rectangle, ellipse):
        sums = windows.backward(
            grad_output, grad_map, x, rectangle, stats, size, scale, rescale, residual, aspect, ellipse, grad_x,
            layout, tile, warps,
        )  # fmt: skip
        _add_programs(sums, grad_rectangle, size, rescale)
        return grad_x, grad_rectangle
    partials = None
    if programs > 1:
        partials = rectangle.new_empty((rectangle.shape[0], programs, 16), dtype=torch.float32)
    launch(
        _window_bwd_kernel, rectangle.shape[0] * programs,
        grad_output, grad_map, x, rectangle, stats, grad_x, partials, grad_rectangle, *layout.sizes,
        *size, scale, *aspect_factors(*size, aspect),
        RESCALE=rescale, RESIDUAL=residual, FOLD=layout.fold, **layout.constants, **tile.constants, num_warps=warps,
    )  # fmt: skip
    if programs > 1:
        _add_programs(partials, grad_rectangle, size, rescale)
    return grad_x, grad_rectangle


def _add_programs(partials, grad_rectangle, size, rescale):
    """The gradient of the rectangles from the sums of programs, (..., programs, 16)."""
    launch(
        _window_rectangle_kernel, grad_rectangle.numel() // 5, partials, grad_rectangle, partials.shape[-2],
        size[0] * size[1], RESCALE=rescale, BLOCK_R=32,
    )  # fmt: skip


def window_map_fwd(rectangle, height, width, scale, rescale, aspect, ellipse):
    _, map, stats = _forward(None, rectangle, height, width, scale, rescale, False, aspect, ellipse)
    return map, stats


def window_map_bwd(grad_map, rectangle, stats, scale, rescale, aspect, ellipse):
    size = grad_map.shape[1:]
    return _backward(None, grad_map, None, rectangle, stats, size, scale, rescale, False, aspect, ellipse, False)[1]


def window_fwd(x, rectangle, scale, rescale, residual, aspect, ellipse):
    return _forward(x, rectangle, *x.shape[2:], scale, rescale, residual, aspect, ellipse)


def window_bwd(
    grad_output, grad_map, x, rectangle, stats, scale, rescale, residual, aspect, ellipse, need_grad_x
):  # fmt: skip
    grad_x, grad_rectangle = _backward(
        grad_output, grad_map, x, rectangle, stats, x.shape[2:], scale, rescale, residual, aspect, ellipse, need_grad_x
    )
    return (grad_x if need_grad_x else x.new_empty((0,))), grad_rectangle
