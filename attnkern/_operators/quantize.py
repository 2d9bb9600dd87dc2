"""The operators of anchor_quantize and anchor_attention."""

import torch

from attnkern import reference
from attnkern._numerics import wide
from attnkern._operators.record import Operator, features_grad, rules

# --- fake kernels ----------------------------------------------------------------------------------------------------


def _fake_quantized(a, anchors, dtype):
    return (
        torch.empty_like(a),
        torch.empty_like(a, dtype=torch.int64),
        a.new_empty((), dtype=dtype),
        a.new_empty((), dtype=dtype),
        torch.empty_like(anchors, dtype=torch.int64),
        torch.empty_like(anchors, dtype=dtype),
    )


def _fake_quantize_fwd(a, anchors, divisor):
    return _fake_quantized(a, anchors, wide(a.dtype))


def _fake_quantize_bwd(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices, residuals, divisor):
    return torch.empty_like(a), torch.empty_like(anchors)


def _fake_anchor_fwd(x, a, anchors, residual, divisor):
    return (torch.empty_like(x), *_fake_quantized(a, anchors, wide(x.dtype)))


def _fake_anchor_bwd(
    grad_output, grad_values, grad_anchor_loss, grad_commitment_loss, x, a, anchors, indices, residuals,
    residual, divisor, need_grad_x,
):  # fmt: skip
    return features_grad(x, need_grad_x), torch.empty_like(a), torch.empty_like(anchors)


# --- decompositions --------------------------------------------------------------------------------------------------


def _quantized(a, anchors, dtype, divisor=1):
    wide_a, wide_anchors = a.to(dtype), anchors.to(dtype)
    index = reference.nearest_by_distance(a, anchors)
    lost = a.isnan() | anchors.isnan().any()
    values = torch.where(lost, torch.full_like(wide_a, torch.nan), wide_anchors[index])
    difference = (values - wide_a).flatten()
    chosen = index.flatten()[:, None] == torch.arange(anchors.shape[0], device=a.device)
    counts = (chosen & ~lost.flatten()[:, None]).sum(0)
    residuals = torch.where(chosen, difference[:, None], torch.zeros_like(difference)[:, None]).sum(0)
    loss = difference.square().sum() / divisor
    return values, index, loss, loss.clone(), counts, residuals


def _quantize_fwd(a, anchors, divisor):
    values, *rest = _quantized(a, anchors, wide(a.dtype), divisor)
    return values.to(a.dtype), *rest


def _anchor_fwd(x, a, anchors, residual, divisor):
    values, *rest = _quantized(a, anchors, wide(x.dtype), divisor)
    output = reference.modulate(x, values if values.dim() == 4 else values[:, None], residual)
    return output, values.to(a.dtype), *rest


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


# --- records ---------------------------------------------------------------------------------------------------------

OPERATORS = {
    "quantize_fwd": Operator(
        fake=_fake_quantize_fwd, decomposition=_quantize_fwd, triton="quantize",
        shards=rules("0 R -> 0 0 P P P P"),
        features=("a",),
    ),
    "quantize_bwd": Operator(
        fake=_fake_quantize_bwd, decomposition=_quantize_bwd, triton="quantize",
        shards=rules("0 R R 0 R 0 P -> 0 P"),
        features=("a", "grad_values", "indices"),
    ),
    "anchor_fwd": Operator(
        fake=_fake_anchor_fwd, decomposition=_anchor_fwd, triton="quantize",
        shards=rules("0 0 R -> 0 0 0 P P P P", "1 R R -> 1 R R R R R R"),
        features=("x",),
    ),
    "anchor_bwd": Operator(
        fake=_fake_anchor_bwd, decomposition=_anchor_bwd, triton="quantize",
        shards=rules("0 0 R R 0 0 R 0 P -> 0 0 P", "1 P R P 1 R R R R -> 1 P R"),
        features=("x", "grad_output"),
    ),
}  # fmt: skip
