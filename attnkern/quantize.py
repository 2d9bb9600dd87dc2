"""Nearest-anchor quantization with straight-through gradient, alone and applied to features."""

from typing import NamedTuple

import torch

from attnkern import _backend, reference
from attnkern._autograd import create_graph, differentiable_backward, save, saved, transformed
from attnkern._checks import check_choice, check_flag, check_positions, check_shape, check_tensor, companion, is_shape
from attnkern._numerics import loss_divisor
from attnkern._ops import BACKENDS
from attnkern._tracing import leaf


class AnchorQuantized(NamedTuple):
    """Result of :func:`anchor_quantize`."""

    values: torch.Tensor  #: shape and dtype of a: the nearest anchor
    indices: torch.Tensor  #: shape of a, int64: its index
    anchor_loss: torch.Tensor  #: scalar, moves the anchors
    commitment_loss: torch.Tensor  #: scalar, moves a
    counts: torch.Tensor  #: (Q,) int64: how many elements chose each anchor


class AnchorAttended(NamedTuple):
    """Result of :func:`anchor_attention`."""

    output: torch.Tensor  #: (N, C, H, W), the features' dtype and memory format
    values: torch.Tensor  #: shape and dtype of a: the nearest anchor
    indices: torch.Tensor  #: shape of a, int64: its index
    anchor_loss: torch.Tensor  #: scalar, moves the anchors
    commitment_loss: torch.Tensor  #: scalar, moves a
    counts: torch.Tensor  #: (Q,) int64: how many elements chose each anchor


def _save(ctx, inputs, results, residuals, options):
    *output, values, indices, anchor_loss, commitment_loss, counts = results
    save(ctx, (*inputs, indices), residuals)
    ctx.options = options
    ctx.set_materialize_grads(False)
    *need_x, need_a, need_anchors = ctx.needs_input_grad[: len(inputs)]
    constant = [indices, counts]
    constant += [] if any(need_x) or need_a else output
    constant += [] if need_a else [values, commitment_loss]
    constant += [] if need_anchors else [anchor_loss]
    ctx.mark_non_differentiable(*constant)


def _if_reached(grad_a, grad_anchors, grad_anchor_loss, *through):
    """The gradients, with None for an input that no output's gradient reached, as in PyTorch.

    An optimizer skips a parameter whose gradient is None, also its weight decay.
    """
    if all(grad is None for grad in through):
        grad_a = None
    return grad_a, None if grad_anchor_loss is None else grad_anchors


class _AnchorQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, anchors, reduction, backend):
        *results, residuals = BACKENDS[backend].quantize_fwd(a, anchors, loss_divisor(a, reduction))
        _save(ctx, (a, anchors), results, residuals, (reduction, backend))
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_values, _indices, grad_anchor_loss, grad_commitment_loss, _counts):
        a, anchors, indices, residuals = saved(ctx)
        reduction, backend = ctx.options
        if create_graph(grad_values, grad_anchor_loss, grad_commitment_loss):

            def forward(a, anchors):
                return reference.anchor_quantize(a, anchors, reduction=reduction)

            grads = (grad_values, None, grad_anchor_loss, grad_commitment_loss, None)
            grad_a, grad_anchors = differentiable_backward(forward, (a, anchors), grads)
        else:
            grad_a, grad_anchors = BACKENDS[backend].quantize_bwd(
                grad_values, grad_anchor_loss, grad_commitment_loss,
                a, anchors, indices, residuals, loss_divisor(a, reduction),
            )  # fmt: skip
            grad_a, grad_anchors = _if_reached(
                grad_a, grad_anchors, grad_anchor_loss, grad_values, grad_commitment_loss
            )
        return grad_a, grad_anchors, None, None


class _AnchorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, anchors, residual, reduction, backend):
        divisor = loss_divisor(a, reduction)
        *results, residuals = BACKENDS[backend].anchor_fwd(x, a, anchors, residual, divisor)
        _save(ctx, (x, a, anchors), results, residuals, (residual, reduction, backend))
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_output, grad_values, _indices, grad_anchor_loss, grad_commitment_loss, _counts):
        x, a, anchors, indices, residuals = saved(ctx)
        residual, reduction, backend = ctx.options
        if create_graph(grad_output, grad_values, grad_anchor_loss, grad_commitment_loss):

            def forward(x, a, anchors):
                return reference.anchor_attention(x, a, anchors, residual=residual, reduction=reduction)

            grads = (grad_output, grad_values, None, grad_anchor_loss, grad_commitment_loss, None)
            return (*differentiable_backward(forward, (x, a, anchors), grads), None, None, None)
        losses = grad_anchor_loss, grad_commitment_loss
        quantized = a, anchors, indices, residuals
        divisor = loss_divisor(a, reduction)
        if grad_output is None:
            grad_x = None
            grad_a, grad_anchors = BACKENDS[backend].quantize_bwd(grad_values, *losses, *quantized, divisor)
        else:
            grad_x, grad_a, grad_anchors = BACKENDS[backend].anchor_bwd(
                grad_output, grad_values, *losses, x, *quantized, residual, divisor, ctx.needs_input_grad[0]
            )
            if not ctx.needs_input_grad[0]:
                grad_x = None
        through = grad_output, grad_values, grad_commitment_loss
        return grad_x, *_if_reached(grad_a, grad_anchors, grad_anchor_loss, *through), None, None, None


def check_reduction(where: str, reduction) -> None:
    """Raise ValueError for an unknown reduction of the losses."""
    check_choice(where, "reduction", reduction, ("mean", "batchmean", "sum"))


def _check_anchors(where, anchors, reduction, of, features):
    check_tensor(where, "anchors", anchors)
    check_shape(where, "anchors", anchors, "(Q,) with Q of at least 1", anchors.dim() == 1 and anchors.shape[0] >= 1)
    check_reduction(where, reduction)
    return companion(where, "anchors", anchors, of, features)


@leaf
def anchor_quantize(
    a: torch.Tensor, anchors: torch.Tensor, *, reduction: str = "mean", backend: str | None = None
) -> AnchorQuantized:
    """Nearest anchor of each element: values = anchors[argmin_k |a - anchors_k|], straight-through.

    The nearest anchor is exact in exact arithmetic on the stored values; ties go to the lowest index. d values/d a = 1,
    and the values give the anchors no gradient. anchor_loss = ‖sg[a] - v‖²/d moves the anchors,
    commitment_loss = ‖a - sg[v]‖²/d moves a; sg stops the gradient, and d is the number of elements ("mean"), N
    ("batchmean") or 1 ("sum"). A NaN element has value NaN, index 0 and no count; a NaN anchor makes every
    value NaN; ±Inf takes the extreme anchor.

    Args:
        a: any shape with N first, float32, bfloat16, float16 or float64.
        anchors: (Q,), in the dtype of a or float32, in any order, duplicates allowed.
        reduction: of the losses: "mean" over all elements (as in the authors' code), "batchmean" sum over an image and
            mean over N (Eq. 10 as printed), or "sum".
        backend: "triton", "native", "reference", or None for :func:`attnkern.use_backend`'s choice.

    Returns:
        values (as a), indices (int64), anchor_loss and commitment_loss (scalars in float32, float64 for float64),
        counts (Q,) int64.

    Raises:
        ValueError: wrong shape, device or reduction, no anchor, an unknown backend, or one that cannot run here.
        TypeError: not a floating tensor, or dtypes that cannot be combined.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 9-10.
    """
    where = "anchor_quantize"
    check_tensor(where, "a", a)
    check_shape(where, "a", a, "(N, ...)", a.dim() >= 1)
    check_positions(where, "a", a.shape[2 if a.dim() == 4 else 1 :])
    anchors = _check_anchors(where, anchors, reduction, "a", a)
    chosen = _backend.choose(backend, a)
    if chosen == "reference" or transformed(a, anchors):
        return AnchorQuantized(*reference.anchor_quantize(a, anchors, reduction=reduction))
    return AnchorQuantized(*_AnchorQuantize.apply(a, anchors, reduction, chosen))


@leaf
def anchor_attention(
    x: torch.Tensor,
    a: torch.Tensor,
    anchors: torch.Tensor,
    *,
    residual: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> AnchorAttended:
    """Features under a quantized map: output = x + v·x with v = anchors[nearest], broadcast over channels.

    Args:
        x: (N, C, H, W) features, float32, bfloat16, float16 or float64, contiguous or channels_last at full speed.
        a: (N, 1, H, W) or (N, H, W) map, in the features' dtype or float32.
        anchors: (Q,), in the features' dtype or float32.
        residual: add x; otherwise output = v·x.
        reduction: as in :func:`anchor_quantize`.
        backend: "triton", "native", "reference", or None for :func:`attnkern.use_backend`'s choice.

    Returns:
        output (N, C, H, W) in the dtype and memory format of x, then the five results of :func:`anchor_quantize`.

    Raises:
        ValueError: wrong shape, device or reduction, no anchor, an unknown backend, or one that cannot run here.
        TypeError: not a floating tensor, or dtypes that cannot be combined.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 9-10.
    """
    where = "anchor_attention"
    check_tensor(where, "x", x)
    check_shape(where, "x", x, "(N, C, H, W)", x.dim() == 4)
    check_positions(where, "x", x.shape[2:])
    check_tensor(where, "a", a)
    n, _, height, width = x.shape
    check_shape(
        where, "a", a, "({0}, 1, {1}, {2}) or ({0}, {1}, {2}) (as x)",
        is_shape(a, n, 1, height, width) or is_shape(a, n, height, width), n, height, width,
    )  # fmt: skip
    a = companion(where, "a", a, "x", x)
    anchors = _check_anchors(where, anchors, reduction, "x", x)
    check_flag(where, residual=residual)
    chosen = _backend.choose(backend, x)
    if chosen == "reference" or transformed(x, a, anchors):
        attended = reference.anchor_attention(x, a, anchors, residual=residual, reduction=reduction)
    else:
        attended = _AnchorAttention.apply(x, a, anchors, residual, reduction, chosen)
    return AnchorAttended(*attended)
