"""What the kernels share: launching, features as matrices, rounding, and sums over partial results.

Features of an image are a matrix of channels by positions, either of which lies innermost in memory. Tiles are
(BLOCK_C, BLOCK_P) in both layouts; only their offsets differ. All results are bitwise the same from run to run, and
those of an image do not depend on the batch: tiles follow from C, H, W, dtype and layout only, sums have a fixed
order, and no kernel sees a misaligned pointer, since that would change how a tile lies in registers.
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
    """Run ``kernel`` in ``programs`` programs on its tensors' device; no launch where there are none.

    ``num_warps`` counts 32 threads each.
    """
    if programs == 0:
        return
    # A kernel takes multiples of 16 bytes for granted. Outputs come from the allocator, which aligns.
    arguments = [
        argument.clone() if isinstance(argument, torch.Tensor) and argument.data_ptr() % 16 else argument
        for argument in arguments
    ]
    device = next(argument for argument in arguments if isinstance(argument, torch.Tensor)).device
    if torch.version.hip is not None:
        num_warps = max(1, 32 * num_warps // warp_size(device))
    # Pipelining over shared memory (num_stages) only adds instructions to loops without matrix products.
    constants.update(num_warps=num_warps, num_stages=1, enable_fp_fusion=True)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants)


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of an AMD GPU's warp: 32, or 64 on those for data centres (CDNA)."""
    return torch.cuda.get_device_properties(device).warp_size


def ceil_power(n: int) -> int:
    """The smallest power of two that is at least ``n``, and 1."""
    return 1 << max(0, n - 1).bit_length()


class Features(NamedTuple):
    """An image of features as a matrix of channels (rows) by positions (columns)."""

    channels_last: bool
    itemsize: int
    channels: int
    positions: int
    fold: int  #: channels in a row: a row of several lets odd maps such as 7x7 have rows of whole vectors
    vector: int  #: numbers in a vector of at most 16 bytes that every row starts and ends with

    @property
    def scalar(self) -> bool:
        """Are rows of positions loaded by less than 8 bytes at a time, in an image so large that this costs more than
        a second launch?"""
        short = not self.channels_last and self.vector * self.itemsize < 8
        return short and self.channels * self.positions > 8192

    @property
    def sizes(self) -> tuple[int, int]:
        """C // VEC_C, P // VEC_P: Triton learns from the product in the kernel that the innermost size is divisible."""
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
    """How the kernels see dense features; ``foldable`` where they need no sum over channels at each position."""
    channels, positions, widest = x.shape[1], math.prod(x.shape[2:]), 16 // x.itemsize
    if channels_innermost(x):
        return Features(True, x.itemsize, channels, positions, 1, math.gcd(widest, channels))
    vector = math.gcd(widest, positions)
    fold = widest // vector
    if foldable and channels % fold == 0:
        return Features(False, x.itemsize, channels // fold, positions * fold, fold, widest)
    return Features(False, x.itemsize, channels, positions, 1, vector)


class Tile(NamedTuple):
    """A program's part of an image: all of ``group`` channels at ``block_p`` positions, ``block_c`` at a time."""

    block_c: int
    block_p: int
    group: int

    def programs(self, x: Features) -> int:
        """Programs per image; at least one, because maps are written where there are no channels, too."""
        return max(1, triton.cdiv(x.channels, self.group)) * triton.cdiv(x.positions, self.block_p)

    @property
    def constants(self) -> dict:
        return {"BLOCK_C": self.block_c, "BLOCK_P": self.block_p, "GROUP": self.group}


def addressable(x: Features, block: int) -> int:
    """At most ``block`` rows of a tile, channels or positions: so few that offsets between them have 32 bits."""
    length = x.channels if x.channels_last else x.positions
    while block > 1 and block * length > 2**31:
        block //= 2
    return block


def share(x: Features, block_c: int, block_p: int, numbers: int) -> Tile:
    """The tile of a program that takes about ``numbers`` features, in steps over channels that share their positions'
    values of the map."""
    if x.channels_last:
        block_p = addressable(x, block_p)
    else:
        block_c = addressable(x, block_c)
    return Tile(block_c, block_p, max(block_c, min(ceil_power(x.channels), numbers // block_p)))


def tile_last(x: Features, step: int, numbers: int) -> Tile:
    """With channels innermost, ``step`` numbers in a step: whole sectors of memory, but of few channels, because each
    thread that has channels of a position forms its value of the map."""
    block_c = min(32, ceil_power(x.channels))
    return share(x, block_c, min(step // block_c, 256, ceil_power(x.positions)), numbers)


@functools.lru_cache
def fwd_tile(x: Features) -> Tile:
    """Of a pass that multiplies features by a map: 16 numbers a thread, or 32 in half precision."""
    # Between 256 and 1024 positions the statistics of the map take each program longest: fewer programs.
    middle = 256 < x.positions // x.fold <= 1024
    numbers = 32768 if middle else 16384
    if x.channels_last:
        return tile_last(x, 8192 // x.itemsize, numbers)
    block_p = min(1024 if middle and x.fold == 1 else 256, ceil_power(x.positions))
    return share(x, min(2048 // block_p, ceil_power(x.channels)), block_p, numbers)


# --- device functions ------------------------------------------------------------------------------------------------


@triton.jit
def place(C, P, GROUP, BLOCK_P):
    """Image (int64), channel group and position tile of this program."""
    tiles = tl.cdiv(P, BLOCK_P)
    groups = tl.maximum(tl.cdiv(C, GROUP), 1)
    program = tl.program_id(0)
    return (program // (tiles * groups)).to(tl.int64), program // tiles % groups, program % tiles


@triton.jit
def store(pointers, values, mask):
    """Store float32 values rounded to nearest even in the pointers' type."""
    if _INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:  # the interpreter truncates instead
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)
        tl.store(pointers, bits.to(tl.bfloat16, bitcast=True), mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask)


@triton.jit
def _tile(n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Where the tile of image n (int64) with its corner at channel c and position p begins, its elements' offsets from
    there and which of them exist, (BLOCK_C, BLOCK_P)."""
    i = tl.arange(0, BLOCK_C)[:, None]
    j = tl.arange(0, BLOCK_P)[None, :]
    mask = (c + i < C) & (p + j < P)
    if CHANNELS_LAST:
        return (n * P + p) * C + c, j * C + i, mask
    else:
        return (n * C + c) * P + p, i * P + j, mask


@triton.jit
def load_tile(x, n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Features in float32, zero outside, (BLOCK_C, BLOCK_P)."""
    begin, offsets, mask = _tile(n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    return tl.load(x + begin + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, values, n, c, p, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store float32 values (BLOCK_C, BLOCK_P) rounded where features are."""
    begin, offsets, mask = _tile(n, c, p, C, P, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    store(x + begin + offsets, values, mask)


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
    # 16 rows at a time hide the latency of memory.
    block_k = min(64 if k <= 1024 else 128, ceil_power(k))
    launch(_sum_rows_kernel, n * triton.cdiv(k, block_k), partials, output, rows, k, BLOCK_R=16, BLOCK_K=block_k)
