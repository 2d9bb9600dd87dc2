"""Measurements on rectangles: order, masks, rates against masks, and equivariance to rotation, scaling and shift.

Coordinates are those of :func:`attnkern.window_map`: pixel i of H lies at i/(H - 1), row before column, and the centre
at (0.5, 0.5). The two transformations and the distance are differentiable, so that they can be used in a loss. An image
may have several windows (K, 5): their mask is the union, they are transformed one by one, and two sets of windows are
compared index by index.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attnkern._checks import (
    check_choice,
    check_flag,
    check_shape,
    check_size,
    check_tensor,
    describe,
    numbers_of,
)
from attnkern._numerics import SIGMA_FLOOR, aspect_factors, double, wide
from attnkern.evaluation.inputs import Data, Normalise, batches, check_masks, identity
from attnkern.evaluation.localisation import jaccard
from attnkern.reference import coordinates
from attnkern.window import SHAPES

PADDINGS = ("zeros", "border", "reflection")
ORDERS = ("column", "row", "both", "height", "width", "angle")


def _check_rectangle(where, rectangle, name="rectangle"):
    check_tensor(where, name, rectangle)
    ok = rectangle.dim() in (2, 3) and rectangle.shape[-1] == 5 and rectangle.shape[1] > 0
    check_shape(where, name, rectangle, "(N, 5), or (N, K, 5) with K of at least 1", ok)


def descriptive_order(rectangles: torch.Tensor, by: str, descending: bool = False) -> torch.Tensor:
    """Indices (N,) that sort images by their rectangles: leftmost, topmost or smallest first; the sort is stable.

    Args:
        rectangles: (N, 5) or (N, K, 5) as in :func:`attnkern.window_map`. Several windows count with the mean of their
            numbers: of angles with that of the directions 2α, since they have the period π.
        by: "column" (μ₂), "row" (μ₁), "both" (μ₁ + μ₂: upper left before lower right), "height" (|σ₁|), "width" (|σ₂|)
            or "angle" (α modulo its period π: from -π/2 to π/2).
        descending: largest first.

    Raises:
        ValueError, TypeError: rectangles of another shape or dtype, an unknown ``by``, or a flag that is not a bool.

    Source: Convolutional Rectangular Attention Module, Section 6.5.
    """
    _check_rectangle("descriptive_order", rectangles, "rectangles")
    check_choice("descriptive_order", "by", by, ORDERS)
    check_flag("descriptive_order", descending=descending)
    row, column, height, width, angle = rectangles.detach().unbind(-1)
    if rectangles.dim() == 3:
        angle = torch.atan2((2 * angle).sin().sum(1), (2 * angle).cos().sum(1)) / 2
        row, column, height, width = (numbers.mean(1) for numbers in (row, column, height.abs(), width.abs()))
    keys = {
        "column": column,
        "row": row,
        "both": row + column,
        "height": height.abs(),
        "width": width.abs(),
        "angle": (angle + math.pi / 2).remainder(math.pi),
    }
    return keys[by].argsort(stable=True, descending=descending)


def rectangle_mask(
    rectangle: torch.Tensor, size: tuple[int, int], aspect: bool = False, shape: str = "rectangle"
) -> torch.Tensor:
    """Pixels inside each rectangle or on its edge, (N, H, W) bool: |u| ≤ σ₁ and |v| ≤ σ₂.

    Of an ellipse they are those with (u/σ₁)² + (v/σ₂)² ≤ 1, of several windows those inside at least one.

    Args:
        rectangle: (N, 5) or (N, K, 5) as in :func:`attnkern.window_map`, whose u and v these are.
        size: (H, W).
        aspect, shape: as in :func:`attnkern.window_map`.

    Raises:
        ValueError, TypeError: a rectangle of another shape or dtype, a size that is not (H, W), an unknown shape, or a
            flag that is not a bool.

    Source: Convolutional Rectangular Attention Module, Eqs. 3-5 and Section 5.
    """
    _check_rectangle("rectangle_mask", rectangle)
    size = check_size("rectangle_mask", size)
    check_choice("rectangle_mask", "shape", shape, SHAPES)
    check_flag("rectangle_mask", aspect=aspect)
    # In float64, for the same mask on every device.
    mu1, mu2, sigma1, sigma2, alpha = double(rectangle.detach())[..., None, None].unbind(-3)
    row, column = aspect_factors(*size, aspect)
    d1 = (coordinates(size[0], mu1)[:, None] - mu1) * row
    d2 = (coordinates(size[1], mu2) - mu2) * column
    u = torch.cos(alpha) * d1 + torch.sin(alpha) * d2
    v = torch.cos(alpha) * d2 - torch.sin(alpha) * d1
    u, v = (offset.abs() / sigma.abs().clamp(min=SIGMA_FLOOR) for offset, sigma in ((u, sigma1), (v, sigma2)))
    inside = u.square() + v.square() <= 1 if shape == "ellipse" else (u <= 1) & (v <= 1)
    return (inside.any(1) if rectangle.dim() == 3 else inside).to(rectangle.device)


def catching_rate(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Ψ = mean of a·ã over the pixels of two masks on ±1, (N,) float64 from -1 to 1.

    The predicted mask of several windows is their union, so the rate does not tell which of them caught the object. The
    result is on the masks' device, or on the CPU if that has no float64.

    Args:
        predicted, target: (N, H, W) bool; True is +1.

    Raises:
        ValueError, TypeError: masks of another shape or dtype.

    Source: Convolutional Rectangular Attention Module, Definition 5.1 and Eq. 11.
    """
    check_masks("catching_rate", "predicted", predicted)
    check_masks("catching_rate", "target", target, "predicted", predicted)
    return 2 * double(predicted == target).mean((1, 2)) - 1


def missing_rate(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Φ = (1 - Ψ)/2, (N,) float64: the share of pixels where two masks differ.

    Args and Raises: as :func:`catching_rate`.

    Source: Convolutional Rectangular Attention Module, Eq. 12.
    """
    return (1 - catching_rate(predicted, target)) / 2


def fitting_rate(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Intersection over union of two masks, (N,) float64; 1 where both are empty.

    The predicted mask of several windows is their union, and the target of several objects that of their boxes.

    Args and Raises: as :func:`catching_rate`.

    Source: Convolutional Rectangular Attention Module, Definition 5.3 and Proposition 1.
    """
    return jaccard(predicted, target)


def _transformation(where, like, angle, scale, shift):
    """``angle``, ``scale`` and ``shift`` as tensors (N,), (N,) and (N, 2)."""
    n, dtype, found = len(like), wide(like.dtype), []
    for name, value, shape in (("angle", angle, (n,)), ("scale", scale, (n,)), ("shift", shift, (n, 2))):
        try:
            value = torch.as_tensor(value, dtype=dtype)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            kinds = "a number, a list of numbers" if shape == (n,) else "two numbers, a list of pairs"
            raise TypeError(f"{where}: {name} must be {kinds} or a Tensor, got {describe(value)}") from error
        ok = value.shape in (shape, shape[1:])
        check_shape(where, name, value, f"{shape[1:]} or {shape}", ok)
        found.append(value.to(like.device).expand(shape))
    if not isinstance(scale, torch.Tensor):
        factors = (scale,) if isinstance(scale, Real) or getattr(scale, "ndim", 1) == 0 else scale
        if not all(0 < factor < math.inf for factor in factors):
            raise ValueError(f"{where}: scale must be positive and finite, got {describe(scale)}")
    return found


def transform_rectangle(
    rectangle: torch.Tensor,
    angle: float | Sequence[float] | torch.Tensor = 0.0,
    scale: float | Sequence[float] | torch.Tensor = 1.0,
    shift: Sequence[float] | Sequence[Sequence[float]] | torch.Tensor = (0.0, 0.0),
    *,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Rectangles rotated about the image's centre c, then scaled about it, then shifted.

    μ̂ = c + δσ·R(μ - c) + δμ, σ̂ = δσ·σ, α̂ = α + δα, with R = (cos δα, -sin δα; sin δα, cos δα) on (row, column): a
    positive angle rotates counter-clockwise on the screen. The paper's formula scales about the image's corner instead
    (δσ·c in place of c), which does not correspond to a transformation of the image about its centre.

    Args:
        rectangle: (N, 5) or (N, K, 5) as in :func:`attnkern.window_map`.
        angle: δα in radians, one or (N,).
        scale: δσ, one or (N,); above 1 enlarges. The values of a tensor are not checked, because a check would wait for
            the GPU.
        shift: δμ, (row, column) as fractions of the distance between the corner pixels, (2,) or (N, 2).
        size: None rotates in the unit square; (H, W) rotates in the pixels of a map of this size, for rectangles that
            are drawn with ``aspect=True``. For H = W both are the same.

    Returns:
        rectangles of the same shape, differentiable; the angle is not wrapped.

    Raises:
        ValueError, TypeError: an argument of another shape or kind, or a scale that is not positive and finite (the
            values of a tensor are not checked).

    Source: Convolutional Rectangular Attention Module, Section 4.4.
    """
    where = "transform_rectangle"
    _check_rectangle(where, rectangle)
    if size is not None:
        size = check_size(where, size)
    angle, scale, shift = _transformation(where, rectangle, angle, scale, shift)
    ratio = _ratios(size)
    if rectangle.dim() == 3:  # one transformation for the windows of an image
        angle, scale, shift = angle[:, None], scale[:, None], shift[:, None]
    mu1, mu2, sigma1, sigma2, alpha = rectangle.to(angle.dtype).unbind(-1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    row, column = mu1 - 0.5, mu2 - 0.5
    return torch.stack(
        (
            0.5 + scale * (cos * row - sin * column * ratio[0]) + shift[..., 0],
            0.5 + scale * (sin * row * ratio[1] + cos * column) + shift[..., 1],
            scale * sigma1,
            scale * sigma2,
            alpha + angle,
        ),
        -1,
    )


def _ratios(size):
    """Factors from a column offset to a row offset, and from a row offset to a column offset."""
    if size is None:
        return 1.0, 1.0
    row, column = aspect_factors(*size, True)
    # There is no movement along an axis of length 1.
    return (column / row if row else 0.0), (row / column if column else 0.0)


def transform_images(
    images: torch.Tensor,
    angle: float | Sequence[float] | torch.Tensor = 0.0,
    scale: float | Sequence[float] | torch.Tensor = 1.0,
    shift: Sequence[float] | Sequence[Sequence[float]] | torch.Tensor = (0.0, 0.0),
    *,
    aspect: bool = False,
    padding: str = "zeros",
) -> torch.Tensor:
    """Images rotated about their centre, then scaled about it, then shifted, to match :func:`transform_rectangle`.

    Args:
        images: (N, C, H, W).
        angle, scale, shift: as in :func:`transform_rectangle`.
        aspect: rotate in pixels, as ``size=images.shape[2:]`` does there; otherwise in the unit square.
        padding: of ``grid_sample``: "zeros", "border" or "reflection" beyond the edge.

    Returns:
        (N, C, H, W), bilinear.

    Raises:
        ValueError, TypeError: an argument of another shape or kind, or a scale that is not positive and finite (the
            values of a tensor are not checked).

    Source: Convolutional Rectangular Attention Module, Section 4.4.
    """
    where = "transform_images"
    check_tensor(where, "images", images)
    ok = images.dim() == 4 and 0 not in images.shape[2:]
    check_shape(where, "images", images, "(N, C, H, W) with H and W of at least 1", ok)
    check_choice(where, "padding", padding, PADDINGS)
    check_flag(where, aspect=aspect)
    angle, scale, shift = _transformation(where, images, angle, scale, shift)
    ratio = _ratios(images.shape[2:] if aspect else None)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # grid_sample needs the inverse, from positions in the result to positions in the image, columns first, -1 to 1.
    to_row = torch.stack((sin * ratio[0], cos), 1) / scale[:, None]
    to_column = torch.stack((cos, -sin * ratio[1]), 1) / scale[:, None]
    matrix = torch.stack((to_column, to_row), 1)
    offset = -2 * matrix @ shift.flip(1)[:, :, None]
    # Like affine_grid, which warns about an axis of length 1.
    rows, columns = (2 * coordinates(length, angle) - 1 for length in images.shape[2:])
    points = torch.stack((columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))), 2)
    grid = points @ matrix.mT[:, None] + offset.mT[:, None]
    return F.grid_sample(images.to(grid.dtype), grid, padding_mode=padding, align_corners=True).to(images.dtype)


def equivariance_distance(first: torch.Tensor, second: torch.Tensor, literal: bool = False) -> torch.Tensor:
    """‖(μ, σ) - (μ', σ')‖² + 1 - cos 2(α - α'), (N,): the angle has the period π.

    (α + π/2, σ₂, σ₁) describes the same rectangle as (α, σ₁, σ₂), but their distance is not zero. Of several windows it
    is the mean of the distances index by index: a window is expected to stay on its part of the image. Exchanging two
    windows does not change their union, but this distance.

    Args:
        first, second: (N, 5) or (N, K, 5) as in :func:`attnkern.window_map`.
        literal: ‖(μ, σ, α) - (μ', σ', α')‖² as in the paper, which ignores the period.

    Raises:
        ValueError, TypeError: rectangles of another shape or dtype, or a flag that is not a bool.

    Source: Convolutional Rectangular Attention Module, Section 4.4.
    """
    _check_rectangle("equivariance_distance", first, "first")
    _check_rectangle("equivariance_distance", second, "second")
    check_flag("equivariance_distance", literal=literal)
    ok, wanted = second.shape == first.shape, tuple(first.shape)
    check_shape("equivariance_distance", "second", second, "{} (as first)", ok, wanted)
    difference = first.to(wide(first.dtype)) - second.to(wide(second.dtype))
    turned = difference[..., 4]
    # 2 sin²(x) = 1 - cos(2x), without cancellation.
    distance = difference[..., :4].square().sum(-1) + (turned.square() if literal else 2 * turned.sin().square())
    return distance.mean(1) if first.dim() == 3 else distance


def settings_of(where: str, angles, scales, shifts) -> tuple[list[float], list[float], list[list[float]]]:
    """The settings of :func:`equivariance_errors` as lists of floats."""
    message = f"{where}: shifts must be a list of pairs (row, column), got {describe(shifts)}"
    try:
        pairs = [numbers_of(where, "shifts", shift) for shift in shifts]
    except TypeError as error:
        raise TypeError(message) from error
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(message)
    return numbers_of(where, "angles", angles), numbers_of(where, "scales", scales), pairs


class EquivarianceError(NamedTuple):
    """One transformation's entry in the result of :func:`equivariance_errors`.

    Means over images, their windows and settings.
    """

    distance: float  #: :func:`equivariance_distance`
    centre: float  #: ‖μ - μ'‖
    extent: float  #: ‖σ - σ'‖
    angle: float  #: |α - α'| in radians, modulo its period π: 0 to π/2


@torch.no_grad()
def equivariance_errors(
    rectangles_of: Callable[[torch.Tensor], torch.Tensor],
    images: Data,
    *,
    angles: Sequence[float] = (-math.pi / 6, -math.pi / 12, math.pi / 12, math.pi / 6),
    scales: Sequence[float] = (0.8, 0.9, 1.1, 1.2),
    shifts: Sequence[tuple[float, float]] = ((-0.1, 0.0), (0.1, 0.0), (0.0, -0.1), (0.0, 0.1)),
    aspect: bool = False,
    padding: str = "zeros",
    normalise: Normalise = identity,
    batch_size: int = 128,
    device=None,
) -> dict[str, EquivarianceError]:
    """How far the rectangle of a transformed image is from the transformed rectangle of the image.

    Each transformation is applied alone, at fixed settings: nothing is random.

    Args:
        rectangles_of: from normalised images to rectangles (N, 5) or (N, K, 5), which are compared index by index.
        images: raw, (N, C, H, W), or an iterable of batches (of tuples that begin with the images).
        angles, scales, shifts: as in :func:`transform_rectangle`, the settings of "rotation", "scale", "translation".
        aspect: rotate in the images' pixels, for rectangles that are drawn with ``aspect=True``.
        padding: as in :func:`transform_images`.
        normalise: applied to the images, transformed or not, before ``rectangles_of``.
        batch_size: images per batch if ``images`` is a tensor.
        device: device for the batches, or None to leave them where they are.

    Returns:
        {transformation: errors} of the transformations that have settings.

    Raises:
        ValueError, TypeError: no image, images or rectangles of another shape or dtype, or settings of another kind.

    Source: Convolutional Rectangular Attention Module, Sections 4.4 and 6.4.
    """
    where = "equivariance_errors"
    angles, scales, shifts = settings_of(where, angles, scales, shifts)
    check_choice(where, "padding", padding, PADDINGS)
    check_flag(where, aspect=aspect)
    plan = {
        "rotation": [{"angle": angle} for angle in angles],
        "scale": [{"scale": scale} for scale in scales],
        "translation": [{"shift": shift} for shift in shifts],
    }
    found = {kind: [] for kind, settings in plan.items() if settings}
    for raw, *_ in batches(where, "images", images, batch_size, device):
        before = rectangles_of(normalise(raw))
        _check_rectangle(where, before, "rectangles_of's result")
        ok = len(before) == len(raw)
        check_shape(where, "rectangles_of's result", before, "({0}, 5) or ({0}, K, 5)", ok, len(raw))
        size = raw.shape[2:] if aspect else None
        for kind in found:
            for setting in plan[kind]:
                after = rectangles_of(normalise(transform_images(raw, **setting, aspect=aspect, padding=padding)))
                wanted = transform_rectangle(before, **setting, size=size)
                difference = (after - wanted).view(len(raw), -1, 5)
                turned = torch.asin(difference[..., 4].sin().abs().clamp(max=1))
                norms = difference[..., :2].norm(dim=2), difference[..., 2:4].norm(dim=2), turned
                parts = equivariance_distance(after, wanted), *(norm.mean(1) for norm in norms)
                found[kind].append(torch.stack(parts).cpu().double())
    return {kind: EquivarianceError(*torch.cat(parts, 1).mean(1).tolist()) for kind, parts in found.items()}
