"""What the kernels share: launches, features as matrices, features times a map, and sums of partial results.

The features of an image are a matrix of channels by positions, either of which is innermost in memory. Tiles are
(BLOCK_C, BLOCK_P) in both layouts; only their offsets differ. All results are bitwise repeatable, and those of an image
do not depend on the batch: tiles depend on C, H, W, dtype and layout only, sums have a fixed order, and kernels always
get aligned pointers, because the alignment would change how a tile is distributed over registers.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnkern._layout import channels_innermost
from attnkern._ops import TRITON_INTERPRETS

_INTERPRETED = tl.constexpr(TRITON_INTERPRETS)


# --- launching -------------------------------------------------------------------------------------------------------


def launch(kernel, programs: int, *arguments, num_warps: int = 4, **constants) -> None:
    """Launch ``programs`` programs of ``kernel`` on the device of its tensors, or nothing if there are none.

    ``num_warps`` counts warps of 32 threads.
    """
    if programs == 0:
        return
    # Kernels require addresses that are multiples of 16. Outputs come from the allocator, which aligns them.
    arguments = [
        argument.clone() if isinstance(argument, torch.Tensor) and argument.data_ptr() % 16 else argument
        for argument in arguments
    ]
    device = next(argument for argument in arguments if isinstance(argument, torch.Tensor)).device
    if torch.version.hip is not None:
        num_warps = max(1, 32 * num_warps // warp_size(device))
    # Pipelining through shared memory (num_stages) only adds instructions to loops without matrix products.
    constants.update(num_warps=num_warps, num_stages=1, enable_fp_fusion=True)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants)


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads per warp of an AMD GPU: 32, or 64 on data-centre GPUs (CDNA)."""
    return torch.cuda.get_device_properties(device).warp_size


def ceil_power(n: int) -> int:
    """The smallest power of two that is at least ``n`` and at least 1."""
    return 1 << max(0, n - 1).bit_length()


class Features(NamedTuple):
    """An image of features as a matrix of channels (rows) by positions (columns)."""

    channels_last: bool
    itemsize: int
    channels: int
    positions: int
    fold: int  #: channels per row; joining several gives odd maps such as 7x7 rows of whole vectors
    vector: int  #: elements of the longest vector, at most 16 bytes, that divides every row

    @property
    def scalar(self) -> bool:
        """Whether rows of positions are read by less than 8 bytes at a time, in an image so large that this costs more
        than a second launch."""
        short = not self.channels_last and self.vector * self.itemsize < 8
        return short and self.channels * self.positions > 8192

    @property
    def sizes(self) -> tuple[int, int]:
        """C // VEC_C and P // VEC_P. The kernel multiplies again, which tells Triton that the product is divisible."""
        if self.channels_last:
            return self.channels // self.vector, self.positions
        return self.channels, self.positions // self.vector

    @property
    def constants(self) -> dict:
        last = self.channels_last
        return {
            "CHANNELS_LAST": last,
            "VEC_C": self.vector if last else 1,
            "VEC_P": 1 if last else self.vector,
        }


def features(x: torch.Tensor, foldable: bool = False) -> Features:
    """The matrix form of dense features. ``foldable`` allows several channels per row, for kernels that do not sum over
    the channels of a position."""
    channels, positions, widest = x.shape[1], math.prod(x.shape[2:]), 16 // x.itemsize
    if channels_innermost(x):
        return Features(True, x.itemsize, channels, positions, 1, math.gcd(widest, channels))
    vector = math.gcd(widest, positions)
    fold = widest // vector
    if foldable and channels % fold == 0:
        return Features(False, x.itemsize, channels // fold, positions * fold, fold, widest)
    return Features(False, x.itemsize, channels, positions, 1, vector)


class Tile(NamedTuple):
    """A program's part of an image: ``group`` channels at ``block_p`` positions, in steps of ``block_c`` channels."""

    block_c: int
    block_p: int
    group: int

    def programs(self, x: Features) -> int:
        """Programs per image; at least one, because maps are written even if there are no channels."""
        return max(1, triton.cdiv(x.channels, self.group)) * triton.cdiv(x.positions, self.block_p)

    @property
    def constants(self) -> dict:
        return {"BLOCK_C": self.block_c, "BLOCK_P": self.block_p, "GROUP": self.group}


def addressable(x: Features, block: int) -> int:
    """``block`` rows of a tile (channels or positions), or fewer so that offsets within the tile fit into 32 bits."""
    length = x.channels if x.channels_last else x.positions
    while block > 1 and block * length > 2**31:
        block //= 2
    return block


def share(x: Features, block_c: int, block_p: int, numbers: int) -> Tile:
    """The tile of a program that processes about ``numbers`` elements. Its steps over channels share the values of the
    map."""
    if x.channels_last:
        block_p = addressable(x, block_p)
    else:
        block_c = addressable(x, block_c)
    return Tile(block_c, block_p, max(block_c, min(ceil_power(x.channels), numbers // block_p)))


def tile_last(x: Features, step: int, numbers: int) -> Tile:
    """A tile with channels innermost and ``step`` elements per step. It has whole sectors of memory but few channels,
    because every thread that has a channel of a position computes the position's value of the map."""
    block_c = min(32, ceil_power(x.channels))
    return share(x, block_c, min(step // block_c, 256, ceil_power(x.positions)), numbers)


@functools.lru_cache
def fwd_tile(x: Features) -> Tile:
    """The tile of a forward pass: 16 elements per thread, or 32 in half precision."""
    # Between 256 and 1024 positions the statistics of the map dominate each program: use fewer programs.
    middle = 256 < x.positions // x.fold <= 1024
    numbers = 32768 if middle else 16384
    if x.channels_last:
        return tile_last(x, 8192 // x.itemsize, numbers)
    block_p = min(1024 if middle and x.fold == 1 else 256, ceil_power(x.positions))
    return share(x, min(2048 // block_p, ceil_power(x.channels)), block_p, numbers)


# --- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def place(C, P, GROUP, BLOCK_P):
    """This program's image (int64), channel group and position tile."""
    tiles = tl.cdiv(P, BLOCK_P)
    groups = tl.maximum(tl.cdiv(C, GROUP), 1)
    program = tl.program_id(0)
    return (program // (tiles * groups)).to(tl.int64), program // tiles % groups, program % tiles


@triton.jit
def store(pointers, values, mask):
    """Store float32 values in the type of the pointers, rounded to nearest even."""
    if _INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:  # the interpreter truncates
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)
        tl.store(pointers, bits.to(tl.bfloat16, bitcast=True), mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask)


@triton.jit
def _tile(n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The offset of the tile of image n (int64) whose corner is channel c and position p, the offsets of its elements
    relative to that, and a mask of those that exist, (BLOCK_C, BLOCK_P)."""
    i = tl.arange(0, BLOCK_C)[:, None]
    j = tl.arange(0, BLOCK_P)[None, :]
    mask = (c + i < C) & (p + j < P)
    if CHANNELS_LAST:
        return (n * P + p) * C + c, j * C + i, mask
    else:
        return (n * C + c) * P + p, i * P + j, mask


@triton.jit
def load_tile(x, n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """A tile of features in float32, (BLOCK_C, BLOCK_P); zero where none exist."""
    begin, offsets, mask = _tile(n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    return tl.load(x + begin + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, values, n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store float32 values (BLOCK_C, BLOCK_P) as a tile of features, rounded to their dtype."""
    begin, offsets, mask = _tile(n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    store(x + begin + offsets, values, mask)


# --- features times a map ---------------------------------------------------------------------------------------------


@triton.jit
def modulate(
    x, map, output, n, group, first_p, C, P, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """output = map·x, plus x with RESIDUAL, for the channels of a group; map is (BLOCK_P,)."""
    for c in range(group * GROUP, tl.minimum(group * GROUP + GROUP, C), BLOCK_C):
        value = load_tile(x, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)  # (BLOCK_C, BLOCK_P)
        attended = value * map[None, :]
        attended = attended + value if RESIDUAL else attended
        store_tile(output, attended, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)


@triton.jit
def modulate_backward(
    grad_output, x, map, grad_x, n, group, first_p, C, P, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of x, unless ``grad_x`` is None; returns that of the map, Σ grad_output·x over the group."""
    products = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for c in range(group * GROUP, tl.minimum(group * GROUP + GROUP, C), BLOCK_C):
        dy = load_tile(grad_output, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        products += dy * load_tile(x, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        if grad_x is not None:
            dx = dy * map[None, :]
            store_tile(grad_x, dx + dy if RESIDUAL else dx, n, c, first_p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    return tl.sum(products, 0)


# --- sums of partial results -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _sum_rows_kernel(partials, output, R, K, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    blocks = tl.cdiv(K, BLOCK_K)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & (k < K)[None, :]
        total += tl.load(partials + (n * R + r)[:, None] * K + k[None, :], mask, other=0.0)
    store(output + n * K + k, tl.sum(total, 0), k < K)


def sum_rows(partials: torch.Tensor, output: torch.Tensor) -> None:
    """output (..., K) = sums of the rows of partials, (..., R, K) float32, in a fixed order."""
    k = output.shape[-1]
    n = output.numel() // max(1, k)
    rows = partials.numel() // max(1, n * k)
    # Reading 16 rows at a time hides the latency of memory.
    block_k = min(64 if k <= 1024 else 128, ceil_power(k))
    launch(_sum_rows_kernel, n * triton.cdiv(k, block_k), partials, output, rows, k, BLOCK_R=16, BLOCK_K=block_k)
