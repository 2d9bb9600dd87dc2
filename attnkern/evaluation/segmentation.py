"""Segmentation by the attention maps of networks that were trained on class labels only."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attnkern._checks import check_count, check_flag, check_items, check_labels, check_shape
from attnkern.evaluation.inputs import check_maps, check_masks
from attnkern.evaluation.localisation import binarise, jaccard, rescale, upsample


class ClassJaccard(NamedTuple):
    """One class's entry in the result of :func:`weak_segmentation`."""

    jaccard: float  #: mean over the class's images
    jaccard_present: float  #: mean over those whose mask is not empty, NaN over none
    images: int
    present: int  #: images whose mask is not empty


def combine(maps: Sequence[torch.Tensor], root: bool = True) -> torch.Tensor:
    """Combine the maps of the last two levels: upsample the coarse one, multiply, square root, rescale to [0, 1].

    Args:
        maps: (N, h, w) of each level, fine to coarse; a single map is only rescaled.
        root: take the square root; the paper does not if the finer map filters the input of the coarser (VGG-PAN).

    Returns:
        (N, H, W) at the finer of the two sizes.

    Raises:
        ValueError, TypeError: no map, maps of another shape or dtype, negative products under the root, or a flag that
            is not a bool.

    Source: Learn to Pay Attention, Section 5.4 and Appendix A.4.
    """
    check_flag("combine", root=root)
    maps = list(maps)
    if not maps:
        raise ValueError("combine: maps must hold at least one level, got none")
    for each in maps:
        check_maps("combine", "maps", each)
    if len(maps) == 1:
        return rescale(maps[0])
    first, second = maps[-2:]
    check_shape("combine", "maps", second, "({}, h, w) (N as the level before)", len(second) == len(first), len(first))
    size = tuple(map(max, first.shape[1:], second.shape[1:]))
    product = upsample(first, size) * upsample(second, size)
    if root:
        if (product < 0).any():
            raise ValueError(f"combine: maps must not be negative with root=True, got a product of {product.min():.3g}")
        product = product.sqrt()
    return rescale(product)


def weak_segmentation(
    maps: torch.Tensor,
    masks: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str] | None = None,
    batch_size: int = 256,
) -> dict[int | str, ClassJaccard]:
    """Jaccard index of upsampled, binarised maps with ground truth, by class.

    If a mask is empty (an image without the object), an empty prediction counts 1, any other 0.

    Args:
        maps: (N, h, w), such as :func:`combine` gives.
        masks: (N, H, W) bool.
        labels: (N,) int64.
        classes: names of the labels, which become the keys of the result.
        batch_size: maps that are upsampled at a time.

    Returns:
        {class: result} of the classes that occur.

    Raises:
        ValueError, TypeError: maps, masks or labels of another shape or dtype, a label without a name, names that are
            not strings, or a batch size below 1.
        ImportError: scikit-image is not installed.

    Source: Learn to Pay Attention, Section 5.4 and Figure 9.
    """
    where = "weak_segmentation"
    check_maps(where, "maps", maps)
    check_masks(where, "masks", masks)
    check_shape(where, "masks", masks, "({}, H, W) (N as maps)", len(masks) == len(maps), len(maps))
    check_labels(where, labels, "maps", maps)
    check_count(where, batch_size=batch_size)
    if classes is not None:
        check_items(where, str, classes=classes)
    if classes is not None and len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
        raise ValueError(
            f"{where}: labels must lie in 0 to {len(classes) - 1} (classes), got {labels.min()} to {labels.max()}"
        )
    size = masks.shape[1:]
    pieces = zip(maps.split(batch_size), masks.split(batch_size), strict=True)
    found = torch.cat([jaccard(binarise(upsample(piece, size)).cpu(), mask.cpu()) for piece, mask in pieces])
    present, labels = masks.any(2).any(1).cpu(), labels.cpu()
    result = {}
    for label in labels.unique().tolist():
        own = labels == label
        result[label if classes is None else classes[label]] = ClassJaccard(
            found[own].mean().item(),
            found[own & present].mean().item(),
            own.sum().item(),
            (own & present).sum().item(),
        )
    return result
