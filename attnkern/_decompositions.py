"""The operators in plain ATen, for programs that must run where attnkern is not."""

import torch

from attnkern import reference
from attnkern._ops import BACKENDS, SCHEMAS, wide


def _unknown(like, *shape, dtype):
    """What only our own backward kernels read; backward is decomposed as well and does without."""
    return like.new_full(shape, torch.nan, dtype=dtype)


def _window_map_fwd(rectangle, height, width, scale, rescale, aspect):
    map = reference.window_map(rectangle, (height, width), scale=scale, rescale=rescale, aspect=aspect)
    return map, _unknown(map, rectangle.shape[0], 7 if rescale else 0, dtype=map.dtype)


def _window_fwd(x, rectangle, scale, rescale, residual, aspect):
    options = {"scale": scale, "rescale": rescale, "residual": residual, "aspect": aspect}
    output, map = reference.window_attention(x, rectangle, **options)
    return output, map, _unknown(map, x.shape[0], 7 if rescale else 0, dtype=map.dtype)


def _quantized(a, anchors, dtype):
    wide_a, wide_anchors = a.to(dtype), anchors.to(dtype)
    index = reference.nearest_by_distance(a, anchors)
    lost = a.isnan() | anchors.isnan().any()
    values = torch.where(lost, torch.full_like(wide_a, torch.nan), wide_anchors[index])
    difference = (values - wide_a).flatten()
    chosen = index.flatten()[:, None] == torch.arange(anchors.shape[0], device=a.device)
    counts = (chosen & ~lost.flatten()[:, None]).sum(0)
    residuals = torch.where(chosen, difference[:, None], torch.zeros_like(difference)[:, None]).sum(0)
    return values, index, difference.square().sum(), counts, residuals


def _quantize_fwd(a, anchors):
    values, *rest = _quantized(a, anchors, wide(a.dtype))
    return values.to(a.dtype), *rest


def _anchor_fwd(x, a, anchors, residual):
    values, *rest = _quantized(a, anchors, wide(x.dtype))
    output = reference.modulate(x, values if values.dim() == 4 else values[:, None], residual)
    return output, values.to(a.dtype), *rest


def _pool_fwd(local, query):
    dtype = wide(local.dtype)
    pooled, attention, scores = reference.compatibility_pool(local.to(dtype), query.to(dtype))
    kept = pooled if local.dtype != dtype else local.new_empty((0,), dtype=dtype)
    return pooled.to(local.dtype), attention, scores, kept


def _pull(forward, inputs, grads):
    """Gradients of ``forward(*inputs)``; a gradient that is None is zero."""
    outputs, pullback = torch.func.vjp(forward, *inputs)
    given = [torch.zeros_like(out) if grad is None else grad for out, grad in zip(outputs, grads, strict=True)]
    return pullback(tuple(given))


def _window_map_bwd(grad_map, rectangle, stats, scale, rescale, aspect):
    def forward(rectangle):
        size = grad_map.shape[1:]
        return (reference.window_map(rectangle, size, scale=scale, rescale=rescale, aspect=aspect),)

    return _pull(forward, (rectangle,), (grad_map,))[0]


def _window_bwd(grad_output, grad_map, x, rectangle, stats, scale, rescale, residual, aspect, need_grad_x):
    options = {"scale": scale, "rescale": rescale, "residual": residual, "aspect": aspect}
    grad_x, grad_rectangle = _pull(
        lambda x, rectangle: reference.window_attention(x, rectangle, **options),
        (x, rectangle),
        (grad_output, grad_map),
    )
    return grad_x if need_grad_x else x.new_empty((0,)), grad_rectangle


def _grad_a(grad_values, grad_commitment_loss, through, a, values, divisor):
    grad = torch.zeros_like(values) if through is None else through.to(values.dtype)
    if grad_values is not None:
        grad = grad + grad_values
    if grad_commitment_loss is not None:
        grad = grad + 2 * grad_commitment_loss / divisor * (a.to(values.dtype) - values)
    return grad.to(a.dtype)


def _grad_anchors(grad_anchor_loss, anchors, residuals, divisor):
    if grad_anchor_loss is None:
        return torch.zeros_like(anchors)
    return (2 * grad_anchor_loss / divisor * residuals).to(anchors.dtype)


def _quantize_bwd(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices, residuals, divisor):
    values, *_ = _quantized(a, anchors, residuals.dtype)
    grad_a = _grad_a(grad_values, grad_commitment_loss, None, a, values, divisor)
    return grad_a, _grad_anchors(grad_anchor_loss, anchors, residuals, divisor)


def _anchor_bwd(
    grad_output, grad_values, grad_anchor_loss, grad_commitment_loss, x, a, anchors, indices, residuals,
    residual, divisor, need_grad_x,
):  # fmt: skip
    values, *_ = _quantized(a, anchors, residuals.dtype)
    map = values if values.dim() == 4 else values[:, None]
    through = (grad_output.to(values.dtype) * x.to(values.dtype)).sum(1).view(a.shape)
    grad_x = reference.modulate(grad_output, map, residual) if need_grad_x else x.new_empty((0,))
    grad_a = _grad_a(grad_values, grad_commitment_loss, through, a, values, divisor)
    return grad_x, grad_a, _grad_anchors(grad_anchor_loss, anchors, residuals, divisor)


def _pool_bwd(grad_pooled, grad_attention, grad_scores, local, query, attention, pooled_wide, need_grad_local):
    grads = grad_pooled, grad_attention, grad_scores
    grad_local, grad_query = _pull(reference.compatibility_pool, (local, query), grads)
    return grad_local if need_grad_local else local.new_empty((0,)), grad_query


def decompositions() -> dict:
    """A table that turns every attnkern operator into plain ATen, with PyTorch's own table of core ATen around it.

    ``torch.export.export(model, ...).run_decompositions(attnkern.decompositions())`` gives a program that runs without
    attnkern: for ONNX (``torch.onnx.export(program, dynamo=True)``) and other runtimes.
    """
    table = torch.export.default_decompositions()
    for operators in BACKENDS.values():
        table.update({getattr(operators, name): globals()[f"_{name}"] for name in SCHEMAS})
    return table
