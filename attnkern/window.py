"""The rotated sigmoid window of rectangular attention, alone and applied to features."""

import math
from typing import NamedTuple

import torch

from attnkern import _backend, reference
from attnkern._autograd import create_graph, differentiable_backward, save, saved, transformed
from attnkern._checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_positions,
    check_shape,
    check_size,
    check_tensor,
    companion,
    float_of,
)
from attnkern._numerics import aspect_factors, wide
from attnkern._ops import BACKENDS
from attnkern._tracing import leaf

#: The shapes of windows.
SHAPES = ("rectangle", "ellipse")


class WindowAttended(NamedTuple):
    """Result of :func:`window_attention`."""

    output: torch.Tensor  #: (N, C, H, W), the features' dtype and memory format
    map: torch.Tensor  #: (N, H, W), float32 (float64 for float64 features)


class _Options(NamedTuple):
    """The options of window_attention, in the order of the operators' arguments."""

    scale: float
    rescale: bool
    residual: bool
    aspect: bool
    ellipse: bool


class _WindowMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rectangle, height, width, scale, rescale, aspect, ellipse, backend):
        map, stats = BACKENDS[backend].window_map_fwd(rectangle, height, width, scale, rescale, aspect, ellipse)
        save(ctx, (rectangle,), stats)
        ctx.options = height, width, scale, rescale, aspect, ellipse, backend
        return map

    @staticmethod
    def backward(ctx, grad_map):
        rectangle, stats = saved(ctx)
        height, width, scale, rescale, aspect, ellipse, backend = ctx.options
        if create_graph(grad_map):

            def forward(rectangle):
                options = {"scale": scale, "rescale": rescale, "aspect": aspect, "ellipse": ellipse}
                return (reference.window_map(rectangle, (height, width), **options),)

            (grad_rectangle,) = differentiable_backward(forward, (rectangle,), (grad_map,))
        else:
            grad_rectangle = BACKENDS[backend].window_map_bwd(
                grad_map, rectangle, stats, scale, rescale, aspect, ellipse
            )
        return grad_rectangle, None, None, None, None, None, None, None


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rectangle, options, backend):
        output, map, stats = BACKENDS[backend].window_fwd(x, rectangle, *options)
        save(ctx, (x, rectangle), stats)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(map)
        return output, map

    @staticmethod
    def backward(ctx, grad_output, grad_map):
        x, rectangle, stats = saved(ctx)
        options, operators = ctx.options, BACKENDS[ctx.backend]
        if create_graph(grad_output, grad_map):

            def forward(x, rectangle):
                return reference.window_attention(x, rectangle, **options._asdict())

            grad_x, grad_rectangle = differentiable_backward(forward, (x, rectangle), (grad_output, grad_map))
        elif grad_output is not None:
            grad_x, grad_rectangle = operators.window_bwd(
                grad_output, grad_map, x, rectangle, stats, *options, ctx.needs_input_grad[0]
            )
            if not ctx.needs_input_grad[0]:
                grad_x = None
        else:
            grad_x = grad_rectangle = None
            if grad_map is not None:
                scale, rescale, _, aspect, ellipse = options
                grad_rectangle = operators.window_map_bwd(grad_map, rectangle, stats, scale, rescale, aspect, ellipse)
        return grad_x, grad_rectangle, None, None


def _several(rectangle):
    """Whether an image has several windows. (N, 1, 5) takes the same kernels as (N, 5), for bitwise equal results."""
    return rectangle.dim() == 3 and rectangle.shape[1] > 1


def _is_ellipse(where: str, shape: str) -> bool:
    check_choice(where, "shape", shape, SHAPES)
    return shape == "ellipse"


def _check_rectangle(where, rectangle):
    check_tensor(where, "rectangle", rectangle)
    right = rectangle.dim() in (2, 3) and rectangle.shape[-1] == 5 and (rectangle.dim() == 2 or rectangle.shape[1] > 0)
    check_shape(where, "rectangle", rectangle, "(N, 5), or (N, K, 5) with K of at least 1", right)


def check_features(where: str, x: torch.Tensor, rectangle: torch.Tensor) -> torch.Tensor:
    """The rectangles of features ``x`` in a supported dtype, or an error."""
    check_tensor(where, "x", x)
    check_shape(where, "x", x, "(N, C, H, W)", x.dim() == 4)
    check_positions(where, "x", x.shape[2:])
    _check_rectangle(where, rectangle)
    n = x.shape[0]
    check_shape(where, "rectangle", rectangle, "({0}, 5) or ({0}, K, 5) (N as x)", rectangle.shape[0] == n, n)
    return companion(where, "rectangle", rectangle, "x", x)


@leaf
def window_map(
    rectangle: torch.Tensor,
    size: tuple[int, int],
    *,
    scale: float = 6.0,
    rescale: bool = True,
    aspect: bool = False,
    shape: str = "rectangle",
    backend: str | None = None,
) -> torch.Tensor:
    """Map of rotated rectangles or ellipses: one window f per image, or the union of K, rescaled to mean 1.

    Rectangle: f = Λ(s(1 - (u/σ₁)²)) · Λ(s(1 - (v/σ₂)²)). Ellipse: f = Λ(s(1 - (u/σ₁)² - (v/σ₂)²)), with the logistic
    sigmoid Λ(t) = 1/(1 + e⁻ᵗ).
    Union: f = 1 - Π_k (1 - f_k), computed as Σ_k f_k Π_{j<k} (1 - f_j), in which nothing cancels.

    (u, v) is the offset from the centre, rotated by the angle: with d = t - μ, u = cos α·d₁ + sin α·d₂ and
    v = -sin α·d₁ + cos α·d₂. The rescaled map HW·f/Σf is computed as HW·softmax(log f), finite even where f underflows.

    Args:
        rectangle: (N, 5), or (N, K, 5) for K windows, of which there may be any number: centre row μ₁, centre column
            μ₂, half height σ₁, half width σ₂, angle α in radians. Coordinates are pixel centres that run from 0 to 1
            over rows and over columns, corners aligned, row before column (unlike ``grid_sample``); an axis of length 1
            sits at 0.5. With (row, column) axes a positive angle turns counter-clockwise on the screen. |σ| is floored
            at 1e-6, with zero gradient below.
        size: (H, W) of the map, at least 1 x 1.
        scale: steepness s of the edges.
        rescale: multiply by HW/Σf; otherwise the map lies in [0, 1].
        aspect: measure offsets and σ in units of the longer side, so that the rectangle stays rigid when it turns on a
            map with H ≠ W. Otherwise it is rigid in the unit square, a parallelogram in pixels.
        shape: "rectangle" or "ellipse" with the half axes σ₁ and σ₂.
        backend: "triton", "native", "reference", or None for :func:`attnkern.use_backend`'s choice.

    Returns:
        (N, H, W), float32 (float64 for a float64 rectangle).

    Raises:
        ValueError: wrong shape or size, an unknown backend, or one that cannot run here.
        TypeError: not a floating tensor, a scale that is not a number, or a flag that is not a bool.

    Source: Convolutional Rectangular Attention Module, Eqs. 1-5 and 7; its Section 7 suggests other shapes and several
    rectangles.
    """
    _check_rectangle("window_map", rectangle)
    height, width = check_size("window_map", size)
    check_number("window_map", scale=scale)
    check_flag("window_map", rescale=rescale, aspect=aspect)
    ellipse = _is_ellipse("window_map", shape)
    chosen = _backend.choose(backend, rectangle, many=_several(rectangle))
    if chosen == "reference" or transformed(rectangle):
        options = {"scale": float_of(scale), "rescale": rescale, "aspect": aspect, "ellipse": ellipse}
        return reference.window_map(rectangle, (height, width), **options)
    return _WindowMap.apply(rectangle, height, width, float(scale), rescale, aspect, ellipse, chosen)


@leaf
def window_attention(
    x: torch.Tensor,
    rectangle: torch.Tensor,
    *,
    scale: float = 6.0,
    rescale: bool = True,
    residual: bool = True,
    aspect: bool = False,
    shape: str = "rectangle",
    backend: str | None = None,
) -> WindowAttended:
    """Features under the map of :func:`window_map`: output = x + map·x, the map broadcast over channels.

    Args:
        x: (N, C, H, W) features, float32, bfloat16, float16 or float64, contiguous or channels_last at full speed.
        rectangle: (N, 5) or (N, K, 5), in the features' dtype or float32; units as in :func:`window_map`: fractions of
            the height and width between the centres of the corner pixels, row before column, radians.
        scale, rescale, aspect, shape: as in :func:`window_map`.
        residual: add x; otherwise output = map·x.
        backend: "triton", "native", "reference", or None for :func:`attnkern.use_backend`'s choice.

    Returns:
        output (N, C, H, W) in the dtype and memory format of x; map (N, H, W) in float32 (float64 for float64).

    Raises:
        ValueError: wrong shape or device, an unknown backend, or one that cannot run here.
        TypeError: not a floating tensor, dtypes that cannot be combined, or an option of the wrong type.

    Source: Convolutional Rectangular Attention Module, Eqs. 5-7.
    """
    where = "window_attention"
    rectangle = check_features(where, x, rectangle)
    check_number(where, scale=scale)
    check_flag(where, rescale=rescale, residual=residual, aspect=aspect)
    ellipse = _is_ellipse(where, shape)
    chosen = _backend.choose(backend, x, many=_several(rectangle))
    if chosen == "reference" or transformed(x, rectangle):
        options = _Options(float_of(scale), rescale, residual, aspect, ellipse)
        attended = reference.window_attention(x, rectangle, **options._asdict())
    else:
        options = _Options(float(scale), rescale, residual, aspect, ellipse)
        attended = _WindowAttention.apply(x, rectangle, options, chosen)
    return WindowAttended(*attended)


@leaf
def rectangle_corners(rectangle: torch.Tensor, size: tuple[int, int], *, aspect: bool = False) -> torch.Tensor:
    """Corners of rectangles in pixels, for drawing: μ + (cos α·u - sin α·v, sin α·u + cos α·v) at (u, v) = (±σ₁, ±σ₂).

    The corners go around the rectangle, starting at (-, -). Pixel centres are integers; the first one is (0, 0).

    Args:
        rectangle: (N, 5) or (N, K, 5) as in :func:`window_map`.
        size: (H, W) of the image or map to draw on.
        aspect: as in :func:`window_map`.

    Returns:
        (N, 4, 2) or (N, K, 4, 2), row before column, float32 (float64 for a float64 rectangle).

    Raises:
        ValueError, TypeError: as :func:`window_map`.

    Source: Convolutional Rectangular Attention Module, Eqs. 3-5.
    """
    return _outline("rectangle_corners", rectangle, size, aspect, [(-1, -1), (-1, 1), (1, 1), (1, -1)])


@leaf
def ellipse_outline(
    rectangle: torch.Tensor, size: tuple[int, int], *, points: int = 64, aspect: bool = False
) -> torch.Tensor:
    """Points on the outlines of ellipses in pixels, for drawing: (u, v) = (σ₁ cos t, σ₂ sin t) for equally spaced t.

    They become pixels as in :func:`rectangle_corners`. On the outline f is one half, unless other windows overlap it.

    Args:
        rectangle: (N, 5) or (N, K, 5) as in :func:`window_map` with shape="ellipse".
        size: (H, W) of the image or map to draw on.
        points: how many, at least 3.
        aspect: as in :func:`window_map`.

    Returns:
        (N, points, 2) or (N, K, points, 2), row before column, float32 (float64 for a float64 rectangle).

    Raises:
        ValueError, TypeError: as :func:`window_map`, or fewer than 3 points.

    Source: Convolutional Rectangular Attention Module, Eqs. 3-5; its Section 7 suggests other shapes.
    """
    check_count("ellipse_outline", points=points)
    if points < 3:
        raise ValueError(f"ellipse_outline: points must be at least 3, got {points}")
    turns = [2 * math.pi * i / points for i in range(points)]
    ends = [(math.cos(turn), math.sin(turn)) for turn in turns]
    return _outline("ellipse_outline", rectangle, size, aspect, ends)


def _outline(where, rectangle, size, aspect, ends):
    """The points of windows at (u, v) = ends·(σ₁, σ₂), (..., points, 2) in pixels."""
    _check_rectangle(where, rectangle)
    height, width = check_size(where, size)
    check_flag(where, aspect=aspect)
    mu1, mu2, sigma1, sigma2, alpha = rectangle.to(wide(rectangle.dtype))[..., None].unbind(-2)
    u = torch.cat([end * sigma1 for end, _ in ends], -1)
    v = torch.cat([end * sigma2 for _, end in ends], -1)
    cos, sin = torch.cos(alpha), torch.sin(alpha)
    row, column = aspect_factors(height, width, aspect)
    # On an axis of length 1 the factor is 0 and all points have the same coordinate.
    d1 = (cos * u - sin * v) / row if row else torch.zeros_like(u)
    d2 = (sin * u + cos * v) / column if column else torch.zeros_like(u)
    return torch.stack(((mu1 + d1) * (height - 1), (mu2 + d2) * (width - 1)), -1)
