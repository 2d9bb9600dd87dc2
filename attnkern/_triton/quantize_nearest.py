"""Device functions that find the nearest anchor of each element, exactly. Formulas: attnkern/quantize.py.

Each anchor is nearest to the numbers of an interval. The ends of the intervals, the thresholds between neighbouring
anchors, are computed exactly, so that an element is compared with numbers of its own dtype and no distance is rounded.
"""

import triton
import triton.language as tl

_NONE = tl.constexpr(2**31 - 1)  # an index that no anchor has


@triton.jit
def _next_above(x):
    """The next float32 above x; Inf is unchanged."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0, 1, tl.where(x > 0, bits + 1, bits - 1))
    return tl.where(x == float("inf"), x, bits.to(tl.float32, bitcast=True))


@triton.jit
def _threshold(lo, hi, hi_first):
    """The smallest float32 whose nearest anchor is hi rather than lo < hi; on a tie hi wins if ``hi_first``."""
    half_lo = lo.to(tl.float64) * 0.5
    half_hi = hi.to(tl.float64) * 0.5
    midpoint = half_lo + half_hi
    tail = midpoint - half_lo
    error = (half_lo - (midpoint - tail)) + (half_hi - tail)  # midpoint + error is exact (Knuth)
    nearest = midpoint.to(tl.float32)
    above = nearest.to(tl.float64) - midpoint
    prefers_hi = (above > 0) | ((nearest.to(tl.float64) == midpoint) & ((error < 0) | ((error == 0) & hi_first)))
    threshold = tl.where(prefers_hi, nearest, _next_above(nearest))
    # Opposite infinities have no midpoint: every finite number is equally far from both.
    halfway = tl.where(hi_first, _next_above(-float("inf") + tl.zeros_like(lo)), float("inf"))
    return tl.where(midpoint == midpoint, threshold, halfway)


@triton.jit
def _closer(best, best_index, values, candidates, j):
    """The largest number below each value, with its lowest index, among the best so far and the candidates at j."""
    below = tl.where(candidates[None, :] < values[:, None], candidates[None, :], -float("inf"))
    largest = tl.max(below, 1)
    matches = (candidates[None, :] == largest[:, None]) & (candidates[None, :] < values[:, None])
    index = tl.min(tl.where(matches, j[None, :], _NONE), 1)
    better = (index != _NONE) & ((best_index == _NONE) | (largest > best))
    return tl.where(better, largest, best), tl.where(better, index, best_index)


@triton.jit
def _intervals(anchors, k, Q, BLOCK_J: tl.constexpr):
    """The interval lower <= a < upper of the numbers nearest to each of anchors k, and whether any anchor is NaN.

    Comparisons with NaN are false. NaN is therefore the lower end for an anchor that is never chosen (because an equal
    one comes before it, or because some anchor is NaN), and the upper end for the largest anchor.
    """
    value = tl.load(anchors + k, k < Q, other=0.0).to(tl.float32)
    below = tl.zeros_like(value)
    above = tl.zeros_like(value)
    below_index = tl.zeros_like(k) + _NONE
    above_index = tl.zeros_like(k) + _NONE
    chosen = k < Q
    poisoned = 0
    for start in range(0, Q, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(anchors + j, j < Q, other=0.0).to(tl.float32)
        poisoned = tl.maximum(poisoned, tl.max((other != other).to(tl.int32)))
        other = tl.where(j < Q, other, float("nan"))
        earlier = (other[None, :] == value[:, None]) & (j[None, :] < k[:, None])
        chosen &= tl.max(earlier.to(tl.int32), 1) == 0
        below, below_index = _closer(below, below_index, value, other, j)
        above, above_index = _closer(above, above_index, -value, -other, j)
    above = -above
    lower = tl.where(below_index == _NONE, -float("inf"), _threshold(below, value, k < below_index))
    upper = tl.where(above_index == _NONE, float("nan"), _threshold(value, above, above_index < k))
    return tl.where(chosen & (poisoned == 0), lower, float("nan")), upper, poisoned


@triton.jit
def nearest_anchor(a, anchors, Q, BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr):
    """Index + 1 and value of the anchor nearest to each a, (BLOCK_P,), and whether any anchor is NaN.

    They are 0 and NaN if a or any anchor is NaN.
    """
    rank = tl.zeros(a.shape, tl.int32)
    poisoned = 0
    for start in range(0, Q, BLOCK_Q):
        k = start + tl.arange(0, BLOCK_Q)
        lower, upper, poisoned = _intervals(anchors, k, Q, BLOCK_J)
        chosen = (a[None, :] >= lower[:, None]) & ~(a[None, :] >= upper[:, None])  # (BLOCK_Q, BLOCK_P)
        rank += tl.sum(tl.where(chosen, k[:, None] + 1, 0), 0)
    value = tl.load(anchors + tl.maximum(rank - 1, 0)).to(tl.float32)
    return rank, tl.where(rank > 0, value, float("nan")), poisoned


@triton.jit
def any_nan(anchors, Q, BLOCK_J: tl.constexpr):
    """1 if any anchor is NaN, else 0."""
    found = tl.zeros((BLOCK_J,), tl.int32)
    for start in range(0, Q, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        anchor = tl.load(anchors + j, j < Q, other=0.0).to(tl.float32)
        found |= (anchor != anchor).to(tl.int32)
    return tl.max(found)


@triton.jit
def anchor_values(anchors, indices, element, poisoned, p, mask, Q):
    """The values of elements p in full precision: their anchors, or NaN if the element or any anchor is NaN.

    Users can overwrite the saved indices without PyTorch noticing (.data, NumPy); no read outside the anchors results.
    """
    index = tl.load(indices + p, mask, other=0)
    value = tl.load(anchors + tl.where((index >= 0) & (index < Q), index, 0)).to(tl.float32)
    return tl.where((element != element) | (poisoned != 0), float("nan"), value)
