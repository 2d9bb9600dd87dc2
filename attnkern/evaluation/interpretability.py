"""Interpretability score: do maps stay where they are when the image changes and the prediction does not?"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attnkern._checks import (
    check_choice,
    check_count,
    check_kind,
    check_number,
    check_shape,
    check_tensor,
    describe,
    numbers_of,
)
from attnkern._numerics import double
from attnkern.evaluation.inputs import Data, Normalise, Predict, batches, check_maps, identity


class Interpretability(NamedTuple):
    """Result of :func:`interpretability_score`; what is a share or a mean of no image is NaN."""

    images: int
    consistent: int  #: images whose prediction stays
    share: float  #: consistent / images
    counts: dict[float, int]  #: by threshold: of the consistent, images whose maps' cosine reaches it
    scores: dict[float, float]  #: counts / consistent
    cosine: float  #: mean over the consistent
    centred_counts: dict[float, int]  #: as counts, each map less its mean: a nearly constant map scores no 1 here
    centred_scores: dict[float, float]
    centred_cosine: float


def _check_images(where, images):
    check_tensor(where, "images", images)
    ok = images.dim() == 4 and 0 not in images.shape[2:]
    check_shape(where, "images", images, "(N, C, H, W) with H and W of at least 1", ok)


def occlude(
    images: torch.Tensor, size: int, generator: torch.Generator, fill: str | torch.Tensor = "colour"
) -> torch.Tensor:
    """Images with a square of side ``size`` covered at a random place.

    The generator gives each image the same number of draws: the squares depend neither on how images are batched nor
    on the filling nor, from a generator of the CPU, on their device.

    Args:
        images: (N, C, H, W) in [0, 1].
        size: side p in pixels; the paper takes 4, 8, 12 and 16 of 32.
        generator: of places, and of colours or the choice of fillings.
        fill: "colour", one random colour an image, or images of another set (M, C, h, w), of which a random one is
            resized to the square.

    Raises:
        ValueError, TypeError: images or fill of another shape or kind, or a square that does not fit.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.4.
    """
    _check_images("occlude", images)
    check_count("occlude", size=size)
    check_kind("occlude", torch.Generator, generator=generator)
    n, c, height, width = images.shape
    if size > min(height, width):
        raise ValueError(f"occlude: size must be at most {min(height, width)} (the images' shorter side), got {size}")
    if isinstance(fill, torch.Tensor):
        check_tensor("occlude", "fill", fill)
        ok = fill.dim() == 4 and fill.shape[1] == c and 0 not in fill.shape
        check_shape("occlude", "fill", fill, "(M, {}, h, w) (C as images), none of them 0", ok, c)
    elif not (isinstance(fill, str) and fill == "colour"):
        raise ValueError(f"occlude: fill must be 'colour' or a Tensor of images, got {describe(fill)}")
    try:
        draws = torch.rand(n, 2 + c, generator=generator, dtype=torch.float64, device=generator.device)
    except (TypeError, RuntimeError):  # a device without float64
        draws = torch.rand(n, 2 + c, generator=generator, device=generator.device)
    # The place within the square of every row and column, out of [0, size) beside it.
    top, left = ((draws[:, i, None] * (length - size + 1)).long() for i, length in enumerate((height, width)))
    rows = torch.arange(height, device=images.device) - top.to(images.device)
    columns = torch.arange(width, device=images.device) - left.to(images.device)
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    if isinstance(fill, torch.Tensor):
        chosen = fill[(draws[:, 2] * len(fill)).long().to(fill.device)].to(images)
        patches = F.interpolate(chosen, (size, size), mode="bilinear", antialias=True)
        image = torch.arange(n, device=images.device)[:, None, None]
        rows, columns = rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]
        cover = patches[image, :, rows, columns].movedim(3, 1)
    else:
        cover = draws[:, 2:, None, None].to(images)
    return torch.where(inside[:, None], cover, images)


def frequency(images: torch.Tensor, radius: float, keep: str) -> torch.Tensor:
    """Images of their low or high frequencies alone, each channel rescaled to [0, 1] in steps of 1/255.

    A frequency is low where its distance from zero, in cycles per image, is less than ``radius``. The rescaling is from
    the least to the largest value of each image's channel, rounded; what is constant becomes 0.

    Args:
        images: (N, C, H, W).
        radius: r; the paper takes 12 with "low" and 4 with "high".
        keep: "low", or "high" for all that is not low.

    Raises:
        ValueError, TypeError: images of another shape or kind, an unknown ``keep``, or a radius that is not positive.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.4, after Wang et al.,
    High-frequency Component Helps Explain the Generalization of Convolutional Neural Networks, Section 3.
    """
    _check_images("frequency", images)
    check_choice("frequency", "keep", keep, ("low", "high"))
    check_number("frequency", radius=radius)
    if not radius > 0:
        raise ValueError(f"frequency: radius must be positive, got {radius!r}")
    # Zero frequency stands at length // 2 after the shift, which is the published length / 2 for even lengths.
    numbers = double(images)
    rows, columns = (torch.arange(length, device=numbers.device) - length // 2 for length in images.shape[2:])
    kept = rows[:, None].square() + columns.square() < radius**2
    if keep == "high":
        kept = ~kept
    spectrum = torch.fft.fftshift(torch.fft.fft2(numbers), dim=(2, 3))
    filtered = torch.fft.ifft2(torch.fft.ifftshift(spectrum * kept, dim=(2, 3))).real
    low, high = filtered.amin((2, 3), keepdim=True), filtered.amax((2, 3), keepdim=True)
    # Of a constant channel the transform leaves rounding, which must not be blown up to a picture.
    extent = torch.where(high - low > 1e-6, high - low, torch.inf)
    return ((filtered - low) / extent * 255).round().to(images) / 255


def map_cosines(maps, others, centred):
    """(N,) cosines of flattened maps; 0 where one is zero, or constant and ``centred``."""
    vectors = []
    for each in (maps, others):
        vector = double(each.flatten(1))
        if centred:
            extent, largest = vector.amax(1) - vector.amin(1), vector.abs().amax(1)
            # Less its mean, a constant map of float32 is rounding.
            varies = extent > 1e-6 * largest
            vector = (vector - vector.mean(1, keepdim=True)) * varies[:, None]
        vectors.append(F.normalize(vector, dim=1, eps=1e-30))
    return (vectors[0] * vectors[1]).sum(1)


@torch.no_grad()
def interpretability_score(
    predict: Predict,
    images: Data,
    modify: Callable[[torch.Tensor], torch.Tensor],
    *,
    normalise: Normalise = identity,
    thresholds: Sequence[float] = (0.85, 0.9, 0.95),
    batch_size: int = 128,
    device=None,
) -> Interpretability:
    """Share of attention-consistent images among those whose prediction a modification leaves as it is.

    Consistent: the cosine of the flattened maps before and after is at least the threshold, which the paper does not
    state. The label plays no part.

    Args:
        predict: from normalised images to logits and a map, without noise.
        images: raw, in [0, 1]: (N, C, H, W), or an iterable of batches (of tuples, the first of each).
        modify: raw images to raw images, such as ``functools.partial(occlude, size=8, generator=generator)``.
        normalise: applied to both before ``predict``.
        thresholds: of the cosine.
        batch_size: images at a time, where ``images`` is a tensor.
        device: where batches are moved, or None.

    Raises:
        ValueError, TypeError: no image, images or maps of another shape or kind.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.4.
    """
    where = "interpretability_score"
    check_kind(where, Callable, predict=predict, modify=modify, normalise=normalise)
    thresholds = numbers_of(where, "thresholds", thresholds)
    total, plain, centred = 0, [], []
    for raw, *_ in batches(where, "images", images, batch_size, device):
        logits, maps = predict(normalise(raw))
        changed_logits, changed_maps = predict(normalise(modify(raw)))
        check_maps(where, "predict's map", maps)
        same = (logits.argmax(1) == changed_logits.argmax(1)).cpu()
        total += len(raw)
        plain.append(map_cosines(maps, changed_maps, False).cpu()[same])
        centred.append(map_cosines(maps, changed_maps, True).cpu()[same])
    columns = []
    for cosines in (torch.cat(plain), torch.cat(centred)):
        counts = {threshold: (cosines >= threshold).sum().item() for threshold in thresholds}
        scores = {t: count / len(cosines) if len(cosines) else float("nan") for t, count in counts.items()}
        columns.append((counts, scores, cosines.mean().item()))
    consistent = len(cosines)
    return Interpretability(total, consistent, consistent / total, *columns[0], *columns[1])
