"""Classification accuracy."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from attnkern._checks import check_labels, check_shape
from attnkern.evaluation.inputs import Data, Normalise, batches, check_evaluating, identity


class Top1(NamedTuple):
    """Result of :func:`top1`."""

    accuracy: float  #: correct / images; the papers' error is 1 - accuracy
    correct: int
    images: int


@torch.no_grad()
def top1(
    model: Callable[[torch.Tensor], torch.Tensor],
    data: Data,
    *,
    normalise: Normalise = identity,
    batch_size: int = 128,
    device=None,
) -> Top1:
    """Share of images whose largest logit is that of the label; of equal logits the first counts.

    Args:
        model: from normalised images to logits (N, K); a module in evaluation mode.
        data: (images, labels), or an iterable of such batches.
        normalise: applied to the images first.
        batch_size: images per batch if ``data`` is a tuple.
        device: device for the batches, or None to leave them where they are.

    Raises:
        ValueError, TypeError: no image, no labels, a model in training mode, or tensors of another shape.
    """
    check_evaluating("top1", model)
    correct, total = 0, 0
    for batch in batches("top1", "data", data, batch_size, device):
        if len(batch) < 2:
            raise ValueError("top1: data must hold images and labels, got images only")
        images, labels = batch[:2]
        check_labels("top1", labels, "images", images)
        logits = model(normalise(images))
        check_shape("top1", "logits", logits, "({}, K)", logits.dim() == 2 and len(logits) == len(images), len(images))
        correct += (logits.argmax(1) == labels.to(logits.device)).sum().item()
        total += len(images)
    return Top1(correct / total, correct, total)
