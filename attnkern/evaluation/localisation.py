"""Maps against boxes and masks of objects: pointing game, bounding boxes, Otsu's threshold, Jaccard index."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from attnkern._checks import check_count, check_number, check_shape, check_size, check_tensor
from attnkern._numerics import double, wide
from attnkern.evaluation.inputs import check_maps, check_masks


class Localisation(NamedTuple):
    """Result of :func:`localisation`. Means over the images, NaN over none."""

    pointing: float  #: share of images whose map has its maximum inside the box
    iou_tight: float  #: Jaccard index of :func:`tight_boxes` of the map and the box, both filled
    iou_box: float  #: Jaccard index of the binarised map and the filled box
    iou_mask: float | None  #: Jaccard index of the binarised map and the mask; None without masks
    iou_present: float | None  #: the same over images whose mask is not empty
    images: int
    present: int | None  #: images whose mask is not empty


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Upsample maps (N, h, w) bilinearly to the size of the images.

    Positions count as feature cells: the centre of cell i of h lies at (i + 0.5)/h of the image's height
    (``align_corners=False``), also of maps of :func:`attnkern.window_map`, whose coordinates run from corner to corner.

    Args:
        maps: (N, h, w).
        size: (H, W).

    Returns:
        (N, H, W), float32 (float64 for float64 maps).

    Raises:
        ValueError, TypeError: maps of another shape or dtype, or a size that is not (H, W).
    """
    check_maps("upsample", "maps", maps)
    size = check_size("upsample", size)
    maps = maps.to(wide(maps.dtype))
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def _check_boxes(where, boxes, maps=None):
    check_tensor(where, "boxes", boxes)
    check_shape(where, "boxes", boxes, "(N, 4) or (N, B, 4)", boxes.dim() in (2, 3) and boxes.shape[-1] == 4)
    if maps is not None:
        check_shape(where, "boxes", boxes, "({0}, 4) or ({0}, B, 4) (N as maps)", len(boxes) == len(maps), len(maps))


def box_masks(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Filled boxes, (N, H, W) bool: pixels whose centres lie in the box, or in one of several boxes, or on its edge.

    Args:
        boxes: (N, 4), or (N, B, 4) for several objects in an image: first row, first column, last row, last column in
            pixels, inclusive, where (0, 0) is the centre of the first pixel.
        size: (H, W).

    Raises:
        ValueError, TypeError: boxes of another shape or dtype, or a size that is not (H, W).
    """
    _check_boxes("box_masks", boxes)
    size = check_size("box_masks", size)
    inside = []
    for length, first, last in zip(size, boxes.unbind(-1)[:2], boxes.unbind(-1)[2:], strict=True):
        positions = torch.arange(length, device=boxes.device)
        inside.append((positions >= first[..., None]) & (positions <= last[..., None]))
    rows, columns = inside
    filled = rows[..., :, None] & columns[..., None, :]
    return filled.any(1) if boxes.dim() == 3 else filled


def _varies(maps):
    return maps.amax((1, 2)) > maps.amin((1, 2))


def _hits(maps, boxes, size):
    """(N,) bool: whether the maximum of each map lies in its box."""
    flat = upsample(maps, size).flatten(1)
    inside = box_masks(boxes.to(maps.device), size).flatten(1)
    return inside.gather(1, flat.argmax(1, keepdim=True))[:, 0] & _varies(maps)


def pointing_game(maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> float:
    """Share of maps whose maximum, after upsampling to the images' size, lies inside the box.

    Of several equal maxima the first in row order counts; a constant map counts as a miss.

    Args:
        maps: (N, h, w).
        boxes: (N, 4) or (N, B, 4) as in :func:`box_masks`.
        size: (H, W) of the images.

    Raises:
        ValueError, TypeError: maps or boxes of another shape or dtype.

    Source: Zhang et al., Top-down Neural Attention by Excitation Backprop, Section 4.1.
    """
    check_maps("pointing_game", "maps", maps)
    _check_boxes("pointing_game", boxes, maps)
    size = check_size("pointing_game", size)
    return _hits(maps, boxes, size).cpu().double().mean().item()


def binarise(maps: torch.Tensor) -> torch.Tensor:
    """Masks (N, H, W), bool, of the positions where maps (N, H, W) exceed Otsu's threshold.

    Each map is rescaled to [0, 1] first; the threshold is computed from a histogram with 256 bins. A constant map gives
    an empty mask.

    Raises:
        ValueError, TypeError: maps of another shape or dtype.
        ImportError: scikit-image is not installed.

    Source: Learn to Pay Attention, Appendix A.4.
    """
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ImportError("binarise needs scikit-image: pip install scikit-image") from error
    check_maps("binarise", "maps", maps)
    rescaled = rescale(maps.detach())
    thresholds = [threshold_otsu(image) if image.any() else 1.0 for image in rescaled.cpu().numpy()]
    return rescaled > torch.tensor(thresholds, dtype=rescaled.dtype, device=rescaled.device)[:, None, None]


def rescale(maps: torch.Tensor) -> torch.Tensor:
    """Rescale each map (N, H, W) to minimum 0 and maximum 1; a constant map becomes 0."""
    check_maps("rescale", "maps", maps)
    maps = maps.to(wide(maps.dtype))
    maps = maps - maps.amin((1, 2), keepdim=True)
    high = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(high > 0, high, 1)


def tight_boxes(maps: torch.Tensor, share: float = 0.2) -> torch.Tensor:
    """Boxes (N, 4), as in :func:`box_masks`, around the largest connected region of each map above a threshold.

    The threshold is minimum + ``share``·(maximum - minimum) of the map; regions are connected over edges and corners,
    and of equally large regions the first counts. A constant map gives an empty box, (0, 0, -1, -1).

    Args:
        maps: (N, H, W).
        share: at least 0 and below 1; the source uses 0.2.

    Raises:
        ValueError, TypeError: maps of another shape or dtype, or a share out of its range.
        ImportError: scikit-image is not installed.

    Source: Zhou et al., Learning Deep Features for Discriminative Localization, Section 3.2.
    """
    try:
        from skimage.measure import label
    except ImportError as error:
        raise ImportError("tight_boxes needs scikit-image: pip install scikit-image") from error
    check_maps("tight_boxes", "maps", maps)
    check_number("tight_boxes", share=share)
    if not 0 <= share < 1:
        raise ValueError(f"tight_boxes: share must be at least 0 and below 1, got {share!r}")
    boxes = []
    for mask in (rescale(maps.detach()) > share).cpu().numpy():
        regions = torch.from_numpy(label(mask, connectivity=2))
        sizes = regions.flatten().bincount()[1:]
        if not len(sizes):
            boxes.append([0, 0, -1, -1])
            continue
        rows, columns = torch.where(regions == sizes.argmax() + 1)
        boxes.append([rows.min(), columns.min(), rows.max(), columns.max()])
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)


def jaccard(predicted: torch.Tensor, target: torch.Tensor, empty: float = 1.0) -> torch.Tensor:
    """Intersection over union of each pair of masks, (N,) float64, on the CPU if the device has no float64.

    Args:
        predicted, target: (N, H, W) bool.
        empty: the value for two empty masks; NaN lets ``nanmean`` ignore such images.

    Raises:
        ValueError, TypeError: masks of another shape or dtype.
    """
    check_masks("jaccard", "predicted", predicted)
    check_masks("jaccard", "target", target, "predicted", predicted)
    intersection = double((predicted & target).sum((1, 2)))
    union = double((predicted | target).sum((1, 2)))
    return torch.where(union > 0, intersection / union, empty)


def localisation(
    maps: torch.Tensor,
    boxes: torch.Tensor,
    size: tuple[int, int],
    masks: torch.Tensor | None = None,
    batch_size: int = 256,
) -> Localisation:
    """Pointing game, and Jaccard index of the upsampled maps, boxed or binarised, with boxes and masks.

    Args:
        maps: (N, h, w).
        boxes: (N, 4) or (N, B, 4) as in :func:`box_masks`.
        size: (H, W) of the images.
        masks: (N, H, W) bool. If a mask is empty, an empty prediction counts 1, any other 0.
        batch_size: maps that are upsampled at a time.

    Raises:
        ValueError, TypeError: maps, boxes or masks of another shape or dtype, or a batch size below 1.
        ImportError: scikit-image is not installed.
    """
    where = "localisation"
    check_maps(where, "maps", maps)
    _check_boxes(where, boxes, maps)
    size = check_size(where, size)
    check_count(where, batch_size=batch_size)
    if masks is not None:
        check_masks(where, "masks", masks)
        expected = (len(maps), *size)
        check_shape(where, "masks", masks, f"{expected} (N as maps, size)", tuple(masks.shape) == expected)
    hits, tight, with_boxes, with_masks = [], [], [], []
    for start in range(0, max(1, len(maps)), batch_size):  # without maps, one empty batch
        chosen = slice(start, start + batch_size)
        hits.append(_hits(maps[chosen], boxes[chosen], size).cpu())
        large, truth = upsample(maps[chosen], size), box_masks(boxes[chosen], size).cpu()
        found = binarise(large).cpu()
        tight.append(jaccard(box_masks(tight_boxes(large), size), truth))
        with_boxes.append(jaccard(found, truth))
        if masks is not None:
            with_masks.append(jaccard(found, masks[chosen].cpu()))
    with_box = [torch.cat(parts).double().mean().item() for parts in (hits, tight, with_boxes)]
    if masks is None:
        return Localisation(*with_box, None, None, len(maps), None)
    ious, present = torch.cat(with_masks), masks.any(2).any(1).cpu()
    return Localisation(*with_box, ious.mean().item(), ious[present].mean().item(), len(maps), present.sum().item())
