"""The operators of window_map and window_attention."""

import torch

from attnkern import reference
from attnkern._numerics import wide
from attnkern._operators.record import Operator, features_grad, pull, rules

# --- fake kernels ----------------------------------------------------------------------------------------------------


def _stats_shape(rectangle, rescale):
    count = rectangle.shape[1] if rectangle.ndim == 3 else 1
    return rectangle.shape[0], 2 + 5 * count if rescale else 0


def _stats(rectangle, dtype, rescale):
    return rectangle.new_empty(_stats_shape(rectangle, rescale), dtype=dtype)


def _fake_window_map_fwd(rectangle, height, width, scale, rescale, aspect, ellipse):
    dtype = wide(rectangle.dtype)
    return rectangle.new_empty((rectangle.shape[0], height, width), dtype=dtype), _stats(rectangle, dtype, rescale)


def _fake_window_map_bwd(grad_map, rectangle, stats, scale, rescale, aspect, ellipse):
    return torch.empty_like(rectangle)


def _fake_window_fwd(x, rectangle, scale, rescale, residual, aspect, ellipse):
    n, _, height, width = x.shape
    dtype = wide(x.dtype)
    return torch.empty_like(x), x.new_empty((n, height, width), dtype=dtype), _stats(rectangle, dtype, rescale)


def _fake_window_bwd(
    grad_output, grad_map, x, rectangle, stats, scale, rescale, residual, aspect, ellipse, need_grad_x
):  # fmt: skip
    return features_grad(x, need_grad_x), torch.empty_like(rectangle)


# --- decompositions --------------------------------------------------------------------------------------------------


def _unknown_stats(rectangle, map, rescale):
    """Only the backward kernels read the statistics; the decomposition of backward does not need them."""
    return rectangle.new_full(_stats_shape(rectangle, rescale), torch.nan, dtype=map.dtype)


def _window_map_fwd(rectangle, height, width, scale, rescale, aspect, ellipse):
    map = reference.window_map(rectangle, (height, width), scale=scale, rescale=rescale, aspect=aspect, ellipse=ellipse)
    return map, _unknown_stats(rectangle, map, rescale)


def _window_map_bwd(grad_map, rectangle, stats, scale, rescale, aspect, ellipse):
    def forward(rectangle):
        size = grad_map.shape[1:]
        return (reference.window_map(rectangle, size, scale=scale, rescale=rescale, aspect=aspect, ellipse=ellipse),)

    return pull(forward, (rectangle,), (grad_map,))[0]


def _window_fwd(x, rectangle, scale, rescale, residual, aspect, ellipse):
    options = {"scale": scale, "rescale": rescale, "residual": residual, "aspect": aspect, "ellipse": ellipse}
    output, map = reference.window_attention(x, rectangle, **options)
    return output, map, _unknown_stats(rectangle, map, rescale)


def _window_bwd(grad_output, grad_map, x, rectangle, stats, scale, rescale, residual, aspect, ellipse, need_grad_x):
    def forward(x, rectangle):
        options = {"scale": scale, "rescale": rescale, "residual": residual, "aspect": aspect, "ellipse": ellipse}
        return reference.window_attention(x, rectangle, **options)

    grad_x, grad_rectangle = pull(forward, (x, rectangle), (grad_output, grad_map))
    return grad_x if need_grad_x else x.new_empty((0,)), grad_rectangle


# --- records ---------------------------------------------------------------------------------------------------------

OPERATORS = {
    "window_map_fwd": Operator(
        fake=_fake_window_map_fwd, decomposition=_window_map_fwd, triton="window",
        shards=rules("0 -> 0 0"),
    ),
    "window_map_bwd": Operator(
        fake=_fake_window_map_bwd, decomposition=_window_map_bwd, triton="window",
        shards=rules("0 0 0 -> 0"),
    ),
    "window_fwd": Operator(
        fake=_fake_window_fwd, decomposition=_window_fwd, triton="window",
        shards=rules("0 0 -> 0 0 0", "1 R -> 1 R R"),
        features=("x",),
    ),
    "window_bwd": Operator(
        fake=_fake_window_bwd, decomposition=_window_bwd, triton="window",
        shards=rules("0 0 0 0 0 -> 0 0", "1 P 1 R R -> 1 P"),
        features=("x", "grad_output"),
    ),
}  # fmt: skip
