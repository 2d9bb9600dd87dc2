"""The oracles: the functions in plain PyTorch, any float dtype, any device, differentiable to any order.

Half-precision inputs are computed in float32 and rounded once at the end. These functions take validated arguments;
formulas, shapes and sources are in the docstrings of the public functions of the same names.
"""

import math

import torch
import torch.nn.functional as F

from attnkern._numerics import SIGMA_FLOOR, aspect_factors, loss_divisor, wide
from attnkern._tracing import recording


def coordinates(length: int, like: torch.Tensor) -> torch.Tensor:
    """Pixel centres of an axis, from 0 to 1 with corners aligned; 0.5 for an axis of length 1."""
    if length == 1:
        return torch.full((1,), 0.5, dtype=like.dtype, device=like.device)
    return torch.arange(length, dtype=like.dtype, device=like.device) / (length - 1)


def log_window(rectangle, height, width, scale, aspect, ellipse):
    """log f, (N, H, W), of windows (N, 5, 1, 1) or unions (N, K, 5, 1, 1), or of a window for each position (H, W)."""
    mu1, mu2, sigma1, sigma2, alpha = rectangle.unbind(-3)
    row, column = aspect_factors(height, width, aspect)
    d1 = (coordinates(height, rectangle)[:, None] - mu1) * row
    d2 = (coordinates(width, rectangle) - mu2) * column
    u = torch.cos(alpha) * d1 + torch.sin(alpha) * d2
    v = torch.cos(alpha) * d2 - torch.sin(alpha) * d1
    u, v = (
        (offset / torch.where(sigma.abs() < SIGMA_FLOOR, SIGMA_FLOOR, sigma)).square()
        for offset, sigma in ((u, sigma1), (v, sigma2))
    )
    p, q = (scale * (1 - u - v), None) if ellipse else (scale * (1 - u), scale * (1 - v))
    z = F.logsigmoid(p)
    if not ellipse:
        z = z + F.logsigmoid(q)
    if rectangle.dim() < 5:
        return z
    if rectangle.shape[1] == 1:
        return z[:, 0]
    outside = F.logsigmoid(-p)
    if not ellipse:  # second derivatives of logaddexp may be NaN
        outside = torch.stack((outside, F.logsigmoid(p) + F.logsigmoid(-q))).logsumexp(0)
    return _log_union(z, outside)


def _log_union(z, outside):
    """log f of f = 1 - Π (1 - f_k) from log f_k and log(1 - f_k), which is accurate where f_k is above one half.

    Small f_k are added instead if 1 - f_k rounds to 1: the next term is below half a unit in the last place.
    """
    small = z < math.log(0.5)
    outside = torch.where(small, torch.log1p(-torch.where(small, z, -1.0).exp()), outside)
    tiny = z.detach().amax(1) < math.log(torch.finfo(z.dtype).eps / z.shape[1])
    total = outside.sum(1)
    shallow = ~tiny & (total > -1)
    log = torch.log(-torch.expm1(torch.where(shallow, total, -1.0)))
    log1p = torch.log1p(-torch.where(tiny | shallow, -1.0, total).exp())  # expm1's gradient would round to zero
    return torch.where(tiny, z.logsumexp(1), torch.where(shallow, log, log1p))


def window_map(rectangle, size, *, scale=6.0, rescale=True, aspect=False, ellipse=False):
    height, width = size
    rectangle = rectangle.to(wide(rectangle.dtype))[..., None, None]
    z = log_window(rectangle, height, width, scale, aspect, ellipse)
    if not rescale:
        return z.exp()
    # Not softmax(): its sum of a large map in float32 loses digits that sum() keeps.
    f = (z - z.detach().amax((1, 2), keepdim=True)).exp()
    return f * (height * width / f.sum((1, 2), keepdim=True))


def window_attention(x, rectangle, *, scale=6.0, rescale=True, residual=True, aspect=False, ellipse=False):
    rectangle = rectangle.to(wide(x.dtype))
    map = window_map(rectangle, x.shape[2:], scale=scale, rescale=rescale, aspect=aspect, ellipse=ellipse)
    return modulate(x, map[:, None], residual), map


def modulate(x, map, residual):
    """x + map·x, or map·x, computed in the wide dtype of the features."""
    wide_x, wide_map = (tensor.to(wide(x.dtype)) for tensor in (x, map))
    output = wide_x * wide_map
    return (output + wide_x if residual else output).to(x.dtype)


def nearest_anchor(a: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Index of the anchor nearest to each element in exact arithmetic; the lowest index on ties; 0 for NaN.

    The anchors are sorted, and between neighbours lo < hi there is a threshold: the smallest number that prefers hi. It
    is the midpoint where that is a tie that hi wins or lies above the exact midpoint, else its successor. Numbers are
    those of the smallest type from float32 on that holds both, so that float64 is not needed where no input has it.
    """
    dtype = wide(torch.promote_types(a.dtype, anchors.dtype))
    a, anchors = a.to(dtype), anchors.to(dtype)
    values, order = torch.sort(anchors, stable=True)
    lo, hi = values[:-1], values[1:]
    # Equal anchors are neighbours, lowest original index first: each of a run counts as the first of it.
    position = torch.arange(len(anchors), device=anchors.device)
    begins = torch.cat([torch.ones_like(order[:1], dtype=torch.bool), lo != hi])
    first = torch.cummax(torch.where(begins, position, 0), 0).values
    index = order[first]
    # If lo + hi overflows, both are so large that halving them is exact. Otherwise the sum is halved, because half of a
    # denormal may round.
    overflows = lo.isfinite() & hi.isfinite() & (lo + hi).isinf()
    lo, hi = (torch.where(overflows, 0.5 * end, end) for end in (lo, hi))
    total = lo + hi
    tail = total - lo
    error = (lo - (total - tail)) + (hi - tail)  # total + error is exact (Knuth)
    midpoint = torch.where(overflows, total, 0.5 * total)
    # If half the sum is not representable, the rounded midpoint is above or below the exact one, and not a tie.
    doubled = torch.where(overflows, total, midpoint + midpoint)
    hi_first = index[1:] < index[:-1]
    tie_or_above = (error < 0) | ((error == 0) & hi_first)
    at_midpoint = torch.where(doubled == total, tie_or_above, doubled > total)
    infinity = torch.full_like(midpoint, torch.inf)
    threshold = torch.where(at_midpoint, midpoint, torch.nextafter(midpoint, infinity))
    # Opposite infinities have no midpoint: every finite number is as far from one as from the other.
    finite = torch.nextafter(-infinity, infinity)
    threshold = torch.where(midpoint.isnan(), torch.where(hi_first, finite, infinity), threshold)
    chosen = index[torch.searchsorted(threshold, a.contiguous(), right=True)]
    return torch.where(a.isnan() | anchors.isnan().any(), 0, chosen)


def nearest_by_distance(a: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """:func:`nearest_anchor` by all distances, for programs that are exported: few runtimes search a sorted table.

    Anchors of the least rounded distance are told apart by what the rounding took away, which is computed exactly.
    """
    dtype = wide(torch.promote_types(a.dtype, anchors.dtype))
    a, anchors = a.to(dtype), anchors.to(dtype)
    undefined = a.isnan() | anchors.isnan().any()
    a = a.clamp(anchors.amin(0), anchors.amax(0))[..., None]
    # A difference that overflows counts where all do. Both numbers are then so large that halving them is exact.
    overflows = (a - anchors).isinf()
    lost = overflows & ~overflows.all(-1, keepdim=True)
    a, anchors = (torch.where(overflows, 0.5 * number, number) for number in (a, anchors))
    difference = a - anchors
    back = a - difference
    error = (a - (back + difference)) + (back - anchors)  # difference + error is exact (Knuth)
    error = torch.where(difference < 0, -error, error)
    distance = torch.where(a == anchors, torch.zeros_like(difference), difference.abs())  # infinities are equal, too
    distance = torch.where(lost, torch.full_like(distance, torch.inf), distance)
    least = distance == distance.amin(-1, keepdim=True)
    # Of two infinite distances neither is less: those from infinite anchors on both sides of a number.
    error = torch.where(distance.isinf(), torch.zeros_like(error), error)
    nearest = torch.where(least, error, torch.full_like(error, torch.inf)).argmin(-1)
    return torch.where(undefined, torch.zeros_like(nearest), nearest)


def _straight_through(a, values):
    """``values`` with the gradient of ``a``. (a + (values - a) would round, and is NaN at Inf.)"""
    if recording():  # ONNX has no changes in place
        finite = torch.where(a.isfinite(), a, torch.zeros_like(a))
        return values + (finite - finite.detach())
    through = a + torch.zeros_like(values)
    through.detach().copy_(values)
    return through


def _counts(index, counted, anchors):
    """(Q,) int64: how many of the elements that are counted chose each anchor."""
    if recording():  # ONNX may add once where an index is repeated
        chosen = index[:, None] == torch.arange(anchors.shape[0], device=index.device)
        return (chosen & counted[:, None]).sum(0)
    return torch.zeros_like(anchors, dtype=torch.int64).index_add(0, index, counted.long())


def _quantize(a, anchors, dtype, reduction):
    index = (nearest_by_distance if recording() else nearest_anchor)(a.detach(), anchors.detach())
    wide_a, wide_anchors = a.to(dtype), anchors.to(dtype)
    poisoned = anchors.detach().isnan().any()
    chosen = wide_anchors[index] + torch.where(poisoned, torch.nan, 0.0)  # a sum, so that the gradient is NaN as well
    values = torch.where(a.detach().isnan(), torch.nan, chosen.detach())
    through = _straight_through(wide_a, values)
    divisor = loss_divisor(a, reduction)
    anchor_loss = (wide_a.detach() - chosen).square().sum() / divisor
    commitment_loss = (wide_a - chosen.detach()).square().sum() / divisor
    counted = ~(a.detach().isnan() | poisoned)
    counts = _counts(index.flatten(), counted.flatten(), anchors)
    return through, index, anchor_loss, commitment_loss, counts


def anchor_quantize(a, anchors, *, reduction="mean"):
    values, *rest = _quantize(a, anchors, wide(a.dtype), reduction)
    return (values.to(a.dtype), *rest)


def anchor_attention(x, a, anchors, *, residual=True, reduction="mean"):
    values, *rest = _quantize(a, anchors, wide(x.dtype), reduction)
    map = values if values.dim() == 4 else values[:, None]
    return (modulate(x, map, residual), values.to(a.dtype), *rest)


def compatibility_pool(local, query, mask=None):
    dtype = wide(local.dtype)
    positions = local.shape[2:]
    features, queries = local.to(dtype).flatten(2), query.to(dtype)
    if query.dim() < 3:
        queries = queries[None] if query.dim() == 1 else queries
        queries = queries[:, None]
    scores = _scores(features, queries)
    if mask is None:
        attention = scores.softmax(2)
    else:
        mask = mask.flatten(1)[:, None]
        # NaN at a masked position reaches neither results nor gradients, but the scores that are returned.
        features = torch.where(mask, features, 0)
        some = mask.any(2, keepdim=True)
        logits = torch.where(mask, _scores(features, queries), -torch.inf)
        attention = torch.where(some & mask, torch.where(some, logits, 0).softmax(2), 0)
    pooled = _pooled(features, attention)
    if query.dim() < 3:
        pooled, attention, scores = pooled[:, 0], attention[:, 0], scores[:, 0]
    shape = (*scores.shape[:-1], *positions)
    return pooled.to(local.dtype), attention.view(shape), scores.view(shape)


# Matrix products only where a program is recorded: autocast and TensorFloat-32 would lower their precision here.


def _scores(features, queries):
    return queries @ features if recording() else (queries[..., None] * features[:, None]).sum(2)


def _pooled(features, attention):
    return attention @ features.transpose(1, 2) if recording() else (features[:, None] * attention[:, :, None]).sum(3)
