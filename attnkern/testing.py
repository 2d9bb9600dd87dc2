"""Accuracy checks of the operators: the papers' literal formulas, seeded inputs and error budgets.

Over a fixed seeded set, the largest error of each output and gradient against float64 is at most twice that of the
literal formula in eager PyTorch at the same dtype, plus 4 ε times the largest Σ|terms|. The true values are those of
the reference in float64 on the stored (rounded) inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from attnkern import _backend, reference, window
from attnkern._checks import check_choice, check_items, check_kind, device_of
from attnkern._numerics import DTYPES, aspect_factors, loss_divisor
from attnkern.pool import CompatibilityPooled, compatibility_pool
from attnkern.quantize import AnchorAttended, AnchorQuantized, anchor_attention, anchor_quantize
from attnkern.window import WindowAttended, window_attention

__all__ = ["Budget", "accuracy", "available_backends", "check_accuracy"]

#: Seeds of the fixed set; each draws one batch.
SEEDS = range(32)


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Backends that can run tensors of ``dtype`` on ``device`` here."""
    device = device_of("available_backends", device)
    check_kind("available_backends", torch.dtype, dtype=dtype)
    return [name for name in _backend.NAMES if _backend.reason(name, device, dtype) is None]


# --- the papers' formulas, as printed: no upcasts, no softmax form --------------------------------------------------


def literal_window_map(rectangle, size, *, scale=6.0, rescale=True, aspect=False):
    """Eqs. 4, 5 and 7 of Convolutional Rectangular Attention Module: f·HW/Σf."""
    height, width = size
    mu1, mu2, sigma1, sigma2, alpha = rectangle[:, :, None, None].unbind(1)
    row, column = aspect_factors(height, width, aspect)
    d1 = (reference.coordinates(height, rectangle)[:, None] - mu1) * row
    d2 = (reference.coordinates(width, rectangle) - mu2) * column
    u = alpha.cos() * d1 + alpha.sin() * d2
    v = -alpha.sin() * d1 + alpha.cos() * d2
    f = torch.sigmoid(scale * (1 - (u / sigma1) ** 2)) * torch.sigmoid(scale * (1 - (v / sigma2) ** 2))
    return f * (height * width) / f.sum((1, 2), keepdim=True) if rescale else f


class WindowMapped(NamedTuple):
    """The result of window_map as a field, like the results of the other ops."""

    map: torch.Tensor


def window_map(rectangle, size, **options):
    return WindowMapped(window.window_map(rectangle, size, **options))


def literal_window_mapped(rectangle, size, **options):
    return WindowMapped(literal_window_map(rectangle, size, **options))


def literal_window_attention(x, rectangle, *, scale=6.0, rescale=True, residual=True, aspect=False):
    """Eqs. 5-7: x + f̃·x."""
    map = literal_window_map(rectangle, x.shape[2:], scale=scale, rescale=rescale, aspect=aspect)
    output = map[:, None] * x
    return WindowAttended(x + output if residual else output, map)


def literal_anchor_quantize(a, anchors, *, reduction="mean"):
    """Eqs. 9 and 10 of Information Bottleneck Approach to Spatial Attention Learning."""
    indices = (a.detach()[..., None] - anchors.detach()).abs().argmin(-1)
    nearest = anchors[indices]
    divisor = loss_divisor(a, reduction)
    anchor_loss = (a.detach() - nearest).square().sum() / divisor
    commitment_loss = (a - nearest.detach()).square().sum() / divisor
    # bincount would wait for the device to get the length of its result.
    counts = torch.zeros_like(anchors, dtype=torch.int64).scatter_add_(
        0, indices.flatten(), indices.new_ones(()).expand(indices.numel())
    )
    return AnchorQuantized(a + (nearest - a).detach(), indices, anchor_loss, commitment_loss, counts)


def literal_anchor_attention(x, a, anchors, *, residual=True, reduction="mean"):
    """x + v·x with the quantized map v."""
    quantized = literal_anchor_quantize(a, anchors, reduction=reduction)
    map = quantized.values if a.dim() == 4 else quantized.values[:, None]
    output = map * x
    return AnchorAttended(x + output if residual else output, *quantized)


def literal_compatibility_pool(local, query, mask=None):
    """Eqs. 1-3 of Learn to Pay Attention, with the dot product as compatibility. Many queries are matrix products."""
    features = local.flatten(2)
    if query.dim() == 3:
        scores = query @ features
        attention = _literal_softmax(scores, None if mask is None else mask.flatten(1)[:, None])
        pooled = attention @ features.mT
    else:
        query = query if query.dim() == 2 else query[None]
        scores = (features * query[:, :, None]).sum(1)
        attention = _literal_softmax(scores, None if mask is None else mask.flatten(1))
        pooled = (attention[:, None] * features).sum(2)
    shape = (*scores.shape[:-1], *local.shape[2:])
    return CompatibilityPooled(pooled, attention.view(shape), scores.view(shape))


def _literal_softmax(scores, mask):
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


# --- seeded inputs --------------------------------------------------------------------------------------------------


def features(shape, dtype, layout, generator):
    """Normal features in a layout: "contiguous", "channels_last", or "tokens", (N, L, C) seen as (N, C, L)."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "tokens":
        return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    return x


def window_inputs(shape, dtype, companion, layout, generator):
    """Features, and rectangles that overlap the image."""
    low = torch.tensor([0.1, 0.1, 0.15, 0.15, -1.5], dtype=torch.float64)
    high = torch.tensor([0.9, 0.9, 0.7, 0.7, 1.5], dtype=torch.float64)
    rectangle = low + (high - low) * torch.rand(shape[0], 5, generator=generator, dtype=torch.float64)
    return {"x": features(shape, dtype, layout, generator), "rectangle": rectangle.to(companion)}


def map_inputs(shape, dtype, companion, layout, generator):
    return {"rectangle": window_inputs(shape, dtype, dtype, layout, generator)["rectangle"]}


def anchor_inputs(shape, dtype, companion, layout, generator):
    """Features, a map with values outside [0, 1], and seven unsorted anchors."""
    a = torch.rand(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64) * 1.4 - 0.2
    anchors = torch.rand(7, generator=generator, dtype=torch.float64)
    x = features(shape, dtype, layout, generator)
    return {"x": x, "a": a.to(companion), "anchors": anchors.to(companion)}


def quantize_inputs(shape, dtype, companion, layout, generator):
    inputs = anchor_inputs(shape, dtype, companion, layout, generator)
    return {"a": inputs["a"].to(dtype), "anchors": inputs["anchors"]}


def pool_inputs(shape, dtype, companion, layout, generator):
    """Locals, and queries whose scores have unit variance."""
    query = torch.randn(shape[:2], generator=generator, dtype=torch.float64) / max(1, shape[1]) ** 0.5
    return {"local": features(shape, dtype, layout, generator), "query": query.to(companion)}


def shared_pool_inputs(*arguments):
    inputs = pool_inputs(*arguments)
    return {**inputs, "query": inputs["query"].sum(0)}


def many_pool_inputs(shape, dtype, companion, layout, generator, queries=9):
    """As :func:`pool_inputs`, with several queries per image."""
    inputs = pool_inputs(shape, dtype, companion, layout, generator)
    query = torch.randn(shape[0], queries, shape[1], generator=generator, dtype=torch.float64)
    return {**inputs, "query": (query / max(1, shape[1]) ** 0.5).to(companion)}


def masked_pool_inputs(shape, dtype, companion, layout, generator):
    """Three queries per image, and a mask that keeps about two thirds of the positions and at least one of an image."""
    inputs = many_pool_inputs(shape, dtype, companion, layout, generator, queries=3)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) < 0.65
    mask.flatten(1)[:, -1:] = True
    return {**inputs, "mask": mask}


# --- Σ|terms| of each output and gradient, in float64 ---------------------------------------------------------------
# `x`, `g` and the like are dictionaries of float64 tensors: inputs, outputs, and gradients of the outputs by name.


def _rectangle_terms(rectangle, map, map_grad, rescale, scale, aspect):
    """Σ|terms| of the rectangles' gradient; ``map_grad`` is Σ|terms| of the gradient at each position of the map."""
    size = map.shape[1:]
    # One copy of the rectangle per position, so that the gradient of the sum of z is the slope at each position.
    rectangles = rectangle.detach()[..., None, None].repeat(1, 1, *size).requires_grad_()
    with torch.enable_grad():
        z = reference.log_window(rectangles, *size, scale, aspect)
    (slopes,) = torch.autograd.grad(z.sum(), rectangles)
    slopes = slopes.movedim(1, -1)
    if rescale:
        slopes = slopes - (slopes * map[..., None]).mean((1, 2), keepdim=True)
    return (map_grad[..., None] * map[..., None] * slopes.abs()).sum((1, 2))


def _map_terms(x, out, g, size, rescale=True, scale=6.0, aspect=False):
    gradient = _rectangle_terms(x["rectangle"], out["map"], g["map"].abs(), rescale, scale, aspect)
    return {"map": out["map"], "grad_rectangle": gradient}


def _window_terms(x, out, g, rescale=True, residual=True, scale=6.0, aspect=False):
    map = out["map"]
    map_grad = (g["output"] * x["x"]).abs().sum(1) + g["map"].abs()
    factor = map + (1 if residual else 0)
    return {
        "output": x["x"].abs() * factor[:, None],
        "map": map,
        "grad_x": g["output"].abs() * factor[:, None],
        "grad_rectangle": _rectangle_terms(x["rectangle"], map, map_grad, rescale, scale, aspect),
    }


def _quantize_terms(x, out, g, reduction="mean"):
    difference = (out["values"] - x["a"]).abs()
    divisor = loss_divisor(x["a"], reduction)
    loss = difference.square().sum() / divisor
    per_anchor = torch.zeros_like(x["anchors"]).index_add(0, out["indices"].flatten(), difference.flatten())
    magnitude = x["a"].abs() + out["values"].abs()
    return {
        "values": out["values"].abs(),
        "anchor_loss": loss,
        "commitment_loss": loss,
        "grad_a": g["values"].abs() + 2 * magnitude * g["commitment_loss"].abs() / divisor,
        "grad_anchors": 2 * per_anchor * g["anchor_loss"].abs() / divisor,
    }


def _anchor_terms(x, out, g, residual=True, reduction="mean"):
    terms = _quantize_terms(x, out, g, reduction)
    factor = out["values"].abs() + (1 if residual else 0)
    terms["grad_a"] = terms["grad_a"] + (g["output"] * x["x"]).abs().sum(1, keepdim=True)
    return {"output": x["x"].abs() * factor, "grad_x": g["output"].abs() * factor, **terms}


def _pool_terms(x, out, g):
    local, query = x["local"].flatten(2).abs(), x["query"].abs()
    queries = query if query.dim() == 3 else query.expand(1, -1)[:, None] if query.dim() == 1 else query[:, None]
    maps = (len(local), queries.shape[1], local.shape[2])  # (N, M, L)
    attention, grad_attention, grad_scores = (
        tensor.reshape(maps).abs() for tensor in (out["attention"], g["attention"], g["scores"])
    )
    grad, pooled = (tensor.reshape(*maps[:2], local.shape[1]).abs() for tensor in (g["pooled"], out["pooled"]))
    kept = torch.where(x["mask"].flatten(1)[:, None], local, 0) if "mask" in x else local
    delta = (grad * pooled).sum(2) + (attention * grad_attention).sum(2)
    through = attention * (grad @ kept + grad_attention + delta[..., None])
    grad_query = through @ kept.mT
    if grad_scores.any():  # otherwise NaN at a position without weight reaches nothing
        grad_query = grad_query + grad_scores @ local.mT
    shared = query.dim() == 1 or (query.dim() == 3 and len(query) == 1)
    return {
        "pooled": (attention @ kept.mT).view_as(out["pooled"]),
        "attention": out["attention"],
        "scores": (queries @ local).view_as(out["scores"]),
        "grad_local": (grad.mT @ attention + queries.mT @ (through + grad_scores)).view_as(x["local"]),
        "grad_query": (grad_query.sum(0) if shared else grad_query).reshape(query.shape),
    }


class Op(NamedTuple):
    """An operator and what its checks need."""

    function: Callable  #: the public function
    literal: Callable  #: the paper's formula
    inputs: Callable  #: (shape, dtype, companion dtype, layout, generator) -> inputs by name
    terms: Callable  #: (inputs, outputs, output gradients) -> Σ|terms| by result


OPS = {
    "window_map": Op(window_map, literal_window_mapped, map_inputs, _map_terms),
    "window_attention": Op(window_attention, literal_window_attention, window_inputs, _window_terms),
    "anchor_quantize": Op(anchor_quantize, literal_anchor_quantize, quantize_inputs, _quantize_terms),
    "anchor_attention": Op(anchor_attention, literal_anchor_attention, anchor_inputs, _anchor_terms),
    "compatibility_pool": Op(compatibility_pool, literal_compatibility_pool, pool_inputs, _pool_terms),
    "compatibility_pool_shared": Op(compatibility_pool, literal_compatibility_pool, shared_pool_inputs, _pool_terms),
    "compatibility_pool_many": Op(compatibility_pool, literal_compatibility_pool, many_pool_inputs, _pool_terms),
    "compatibility_pool_masked": Op(compatibility_pool, literal_compatibility_pool, masked_pool_inputs, _pool_terms),
}


def make_inputs(name, shape, dtype=torch.float32, companion=None, layout="contiguous", seed=0, device="cpu"):
    """Seeded inputs of an operator by name; ``companion`` is the dtype of rectangle, a, anchors and query if given."""
    generator = torch.Generator().manual_seed(seed)
    inputs = OPS[name].inputs(shape, dtype, companion or dtype, layout, generator)
    return {key: value.to(device) for key, value in inputs.items()}


def output_gradients(outputs, seed=0):
    """Seeded gradients of the floating outputs, rounded to their dtypes."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for key, value in outputs.items()
        if value.is_floating_point()
    }


def doubles(tensors):
    """The same numbers in float64, for the reference."""
    return {key: t.double() if t is not None and t.is_floating_point() else t for key, t in tensors.items()}


def evaluate(function, inputs, gradients=None, **options):
    """Outputs by name, and the gradient of each floating input as ``grad_<name>`` (zeros if there is none)."""
    inputs = {key: value.detach().requires_grad_(value.is_floating_point()) for key, value in inputs.items()}
    leaves = {key: value for key, value in inputs.items() if value.requires_grad}
    outputs = function(**inputs, **options)._asdict()
    gradients = output_gradients(outputs) if gradients is None else gradients
    used = [key for key in gradients if outputs[key].requires_grad]
    grads = torch.autograd.grad(
        [outputs[key] for key in used],
        list(leaves.values()),
        [gradients[key].to(outputs[key].dtype) for key in used],
        allow_unused=True,
        materialize_grads=True,
    )
    results = {key: value.detach() for key, value in outputs.items()}
    return results | {f"grad_{key}": grad for key, grad in zip(leaves, grads, strict=True)}


class Budget(NamedTuple):
    """Largest errors of one result over the seeded set."""

    error: float  #: of the backend
    literal: float  #: of the literal formula
    terms: float  #: largest Σ|terms|
    epsilon: float

    @property
    def allowed(self) -> float:
        return 2 * self.literal + 4 * self.epsilon * self.terms


def accuracy(name, backend, dtype, *, shape=(2, 24, 6, 7), layout="contiguous", device="cpu", **options):
    """Error budget of each output and gradient of an op over the seeded set; indices and counts must be equal.

    Raises:
        AssertionError: an index or a count differs from the exact one.
        ValueError, TypeError: an unknown name, dtype, layout or backend, or an invalid shape.
    """
    where = "accuracy"
    check_choice(where, "name", name, OPS)
    check_kind(where, torch.dtype, dtype=dtype)
    if dtype not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    check_items(where, int, shape=shape)
    check_choice(where, "layout", layout, ("contiguous", "channels_last", "tokens"))
    device = device_of(where, device)
    op, budgets = OPS[name], {}
    if name == "window_map":
        options["size"] = tuple(shape[2:])
    for seed in SEEDS:
        inputs = make_inputs(name, shape, dtype, layout=layout, seed=seed, device=device)
        gradients = output_gradients(op.function(**inputs, backend=backend, **options)._asdict(), seed)
        got = evaluate(op.function, inputs, gradients, backend=backend, **options)
        literal = evaluate(op.literal, inputs, gradients, **options)
        wide, wide_gradients = doubles(inputs), doubles(gradients)
        truth = evaluate(op.function, wide, wide_gradients, backend="reference", **options)
        terms = op.terms(wide, truth, wide_gradients, **options)
        for key, value in truth.items():
            if not value.is_floating_point():
                assert torch.equal(got[key], value), f"{name} on {backend}: {key} differ"
                continue
            new = Budget(
                (got[key].double() - value).abs().max().item(),
                (literal[key].double() - value).abs().max().item(),
                terms[key].max().item(),
                torch.finfo(got[key].dtype).eps,
            )
            old = budgets.get(key, new)
            # max() would ignore an error that is NaN.
            worst = [a if a != a or a > b else b for a, b in zip(new[:3], old[:3], strict=True)]
            budgets[key] = Budget(*worst, new.epsilon)
    return budgets


def check_accuracy(name, backend, dtype, **arguments):
    """Raise AssertionError with a table unless every result is within its budget; see :func:`accuracy`."""
    budgets = accuracy(name, backend, dtype, **arguments)
    if not all(budget.error <= budget.allowed for budget in budgets.values()):
        rows = [f"{'':16} {'error':>10} {'allowed':>10} {'literal':>10} {'Σ|terms|':>10}"]
        rows += [
            f"{key:16} {b.error:10.3e} {b.allowed:10.3e} {b.literal:10.3e} {b.terms:10.3e}"
            f"{'' if b.error <= b.allowed else '  <- over'}"
            for key, b in budgets.items()
        ]
        raise AssertionError("\n".join([f"{name} on {backend}, {dtype}:", *rows]))
