"""Which values of a map mark the objects, high or low ones: a signed score, and an orientation from training images."""

import math
from typing import NamedTuple

import torch

from attnkern._checks import check_count, check_size, describe
from attnkern.evaluation.inputs import check_maps
from attnkern.evaluation.interpretability import map_cosines
from attnkern.evaluation.localisation import _check_boxes, box_masks, upsample


class Orientation(NamedTuple):
    """Result of :func:`orientation`."""

    sign: int  #: 1: high values mark the objects; -1: low values; 0: the images do not decide it
    score: float  #: mean of :func:`signed_scores`; NaN over no image
    error: float  #: standard error s/√N of the score, s with N - 1; NaN over fewer than two images
    images: int

    def __str__(self):
        marks = {1: "high values mark", -1: "low values mark", 0: "neither high nor low values mark"}[self.sign]
        return f"{marks} the objects (mean correlation {self.score:+.3f} ± {self.error:.3f}, {self.images} images)"


def signed_scores(
    maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], batch_size: int = 256
) -> torch.Tensor:
    """Correlation of each map, upsampled to the images' size, with the filled boxes: (N,) float64 in [-1, 1].

    Σ_p (a_p - ā)(b_p - b̄) / (‖a - ā‖·‖b - b̄‖) over the pixels p, with b 1 inside the boxes and 0 outside. Positive if
    high values of the map mark the objects, negative if low ones do; 0 for a constant map or a box that fills the
    image.

    Args:
        maps: (N, h, w).
        boxes: (N, 4) or (N, B, 4) as in :func:`box_masks`.
        size: (H, W) of the images.
        batch_size: maps that are upsampled at a time.

    Raises:
        ValueError, TypeError: maps or boxes of another shape or dtype, a size that is not (H, W), or a batch size below
            1.

    Source: none of the papers; Pearson's correlation.
    """
    check_maps("signed_scores", "maps", maps)
    _check_boxes("signed_scores", boxes, maps)
    size = check_size("signed_scores", size)
    check_count("signed_scores", batch_size=batch_size)
    found = [torch.zeros(0, dtype=torch.float64)]
    for some, theirs in zip(maps.split(batch_size), boxes.to(maps.device).split(batch_size), strict=True):
        found.append(map_cosines(upsample(some, size), box_masks(theirs, size), centred=True).cpu())
    return torch.cat(found)


def orientation(maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> Orientation:
    """Whether high or low values of a network's maps mark the objects, by the mean of :func:`signed_scores`.

    The sign is that of the mean if it is more than two standard errors from zero, else 0, also for fewer than two
    images. Pass training images: an orientation that is chosen on the test images biases every measure of the oriented
    map upwards.

    Args:
        maps, boxes, size: as in :func:`signed_scores`.

    Raises:
        ValueError, TypeError: as :func:`signed_scores`.

    Source: none of the papers.
    """
    scores = signed_scores(maps, boxes, size)
    score = scores.mean().item()
    error = scores.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    return Orientation((score > 2 * error) - (score < -2 * error), score, error, len(scores))


def orient(maps: torch.Tensor, sign: int) -> torch.Tensor:
    """The maps, or for a ``sign`` of -1 their negatives, so that high values mark the objects.

    Maps are negated, not subtracted from 1, because not all maps lie in [0, 1]. For measures that do not depend on the
    level of a map, such as all of :func:`localisation`, both are the same.

    Args:
        maps: of any shape.
        sign: 1 or -1, as of :func:`orientation`.

    Raises:
        ValueError: another sign, also the 0 of an orientation that is not decided.
    """
    if sign not in (1, -1):
        raise ValueError(f"orient: sign must be 1 or -1, got {describe(sign)}")
    return maps if sign == 1 else -maps
