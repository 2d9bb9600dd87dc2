"""Classification accuracy, and its comparison between two networks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from attnkern._checks import check_labels, check_shape, check_tensor
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


class McNemar(NamedTuple):
    """Result of :func:`mcnemar`: numbers of images, and the p-value."""

    both: int  #: both networks are right
    only_first: int
    only_second: int
    neither: int
    p_value: float  #: exact, of the hypothesis that both networks are right equally often


def mcnemar(first: torch.Tensor, second: torch.Tensor) -> McNemar:
    """McNemar's exact test of two networks on the same images.

    p = min(1, 2·Σ_{k ≤ min(b, c)} (n over k) / 2ⁿ) with n = b + c, where b and c images are classified correctly by the
    first network only and by the second only. The images differ at random; the networks are given, so that the test
    says nothing about other seeds of the training.

    Args:
        first, second: (N,) bool, whether each network is right on each image.

    Raises:
        ValueError, TypeError: no image, or tensors of another shape or kind.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions or percentages, 1947;
    the exact form is the two-sided binomial test with probability ½.
    """
    for name, right in (("first", first), ("second", second)):
        check_tensor("mcnemar", name, right, (torch.bool,))
    check_shape("mcnemar", "first", first, "(N,) with N of at least 1", first.dim() == 1 and len(first) > 0)
    check_shape("mcnemar", "second", second, "({},) (N as first)", second.shape == first.shape, len(first))
    second = second.to(first.device)
    both, neither = (first & second).sum().item(), (~(first | second)).sum().item()
    only_first, only_second = (first & ~second).sum().item(), (second & ~first).sum().item()
    count = only_first + only_second
    # Integers are exact, and their quotient is rounded once.
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(both, only_first, only_second, neither, min(1.0, 2 * tail / 2**count))
