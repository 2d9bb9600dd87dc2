"""Interpretability score: how often maps stay the same when the image changes and the prediction does not."""

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
    """Result of :func:`interpretability_score`; shares and means over no image are NaN."""

    images: int
    consistent: int  #: images whose prediction does not change
    share: float  #: consistent / images
    counts: dict[float, int]  #: by threshold: consistent images whose maps have at least this cosine
    scores: dict[float, float]  #: counts / consistent
    cosine: float  #: mean over the consistent
    centred_counts: dict[float, int]  #: as counts, with each map's mean subtracted: nearly constant maps do not score 1
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

    Each image takes the same number of random numbers: the squares depend neither on the batch size nor on ``fill``
    nor, with a generator on the CPU, on the images' device.

    Args:
        images: (N, C, H, W) in [0, 1].
        size: side p in pixels; the paper uses 4, 8, 12 and 16 for images of 32x32.
        generator: draws the places, and the colours or images that fill them.
        fill: "colour", one random colour per image; or images (M, C, h, w), a random one of which is resized to the
            square.

    Raises:
        ValueError, TypeError: images or fill of another shape or dtype, a square that does not fit, a size that is not
            an integer of at least 1, or no generator.

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
    # Position of every row and column relative to the square; within it, 0 to size - 1.
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
    """Images with only their low or high frequencies, each channel rescaled to [0, 1] and rounded to steps of 1/255.

    A frequency is low if its distance from zero, in cycles per image, is less than ``radius``. Each channel of each
    image is rescaled from its own minimum and maximum; a constant channel becomes 0.

    Args:
        images: (N, C, H, W).
        radius: r; the paper uses 12 with "low" and 4 with "high".
        keep: "low", or "high" for all other frequencies.

    Raises:
        ValueError, TypeError: images of another shape or dtype, an unknown ``keep``, or a radius that is not positive.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.4, after Wang et al.,
    High-frequency Component Helps Explain the Generalization of Convolutional Neural Networks, Section 3.
    """
    _check_images("frequency", images)
    check_choice("frequency", "keep", keep, ("low", "high"))
    check_number("frequency", radius=radius)
    if not radius > 0:
        raise ValueError(f"frequency: radius must be positive, got {radius!r}")
    # Zero frequency is at index length // 2 after the shift, which is the published length / 2 for even lengths.
    numbers = double(images)
    rows, columns = (torch.arange(length, device=numbers.device) - length // 2 for length in images.shape[2:])
    kept = rows[:, None].square() + columns.square() < radius**2
    if keep == "high":
        kept = ~kept
    spectrum = torch.fft.fftshift(torch.fft.fft2(numbers), dim=(2, 3))
    filtered = torch.fft.ifft2(torch.fft.ifftshift(spectrum * kept, dim=(2, 3))).real
    low, high = filtered.amin((2, 3), keepdim=True), filtered.amax((2, 3), keepdim=True)
    # The transform of a constant channel leaves rounding errors, which must not be rescaled to [0, 1].
    extent = torch.where(high - low > 1e-6, high - low, torch.inf)
    return ((filtered - low) / extent * 255).round().to(images) / 255


def map_cosines(maps: torch.Tensor, others: torch.Tensor, centred: bool) -> torch.Tensor:
    """Cosines (N,) of pairs of maps (N, h, w), with their means subtracted if ``centred``.

    The cosine is 0 if a map is zero, or constant and ``centred``.
    """
    vectors = []
    for each in (maps, others):
        vector = double(each.flatten(1))
        if centred:
            extent, largest = vector.amax(1) - vector.amin(1), vector.abs().amax(1)
            # A constant map of float32 minus its mean is rounding error.
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
    """Share of images with consistent attention among those whose prediction a modification does not change.

    Consistent: the cosine of the flattened maps before and after is at least the threshold, which the paper does not
    state. Labels are not used.

    Args:
        predict: from normalised images to logits and a map, without noise.
        images: raw, in [0, 1]: (N, C, H, W), or an iterable of batches (of tuples that begin with the images).
        modify: raw images to raw images, such as ``functools.partial(occlude, size=8, generator=generator)``.
        normalise: applied to both before ``predict``.
        thresholds: of the cosine.
        batch_size: images per batch if ``images`` is a tensor.
        device: device for the batches, or None to leave them where they are.

    Raises:
        ValueError, TypeError: no image, images or maps of another shape or dtype.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.4.
    """
    where = "interpretability_score"
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
