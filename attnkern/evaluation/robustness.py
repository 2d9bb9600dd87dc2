"""Adversarial images by one gradient step, and how many predictions they change."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attnkern._checks import check_number, check_shape, check_tensor, numbers_of
from attnkern.evaluation.inputs import Data, Normalise, batches, check_evaluating, identity


class Fooling(NamedTuple):
    """Result of :func:`fooling_rate`."""

    eps: list[float]
    rates: list[float]  #: share of predictions that change, for each ε
    images: int


def _check_eps(where, eps):
    check_number(where, eps=eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{where}: eps must be a finite number of at least 0, got {eps!r}")


def _direction(where, model, images, normalise):
    """Sign of the loss's gradient at the images, and the prediction for them (N,)."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        logits = model(normalise(leaf))
        ok = logits.dim() == 2 and logits.shape[1] > 1
        check_shape(where, "logits", logits, "(N, K) with K of at least 2", ok)
        predicted = logits.detach().argmax(1)
        # The cross entropy is log(1 + exp m) with m = log Σ exp(others) - own. Its gradient has the sign of that of m,
        # but is rounded to 0 when the softmax of a confident network is rounded to 1.
        own = F.one_hot(predicted, logits.shape[1]).bool()
        margins = logits.masked_fill(own, -torch.inf).logsumexp(1) - logits[own]
        (gradient,) = torch.autograd.grad(margins.sum(), leaf)
    return gradient.sign(), predicted


def fgsm(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, eps: float, normalise: Normalise = identity
) -> torch.Tensor:
    """Images after one step that increases the loss of the model's own prediction: clip(x + ε·sign ∇L, 0, 1).

    Args:
        model: from normalised images to logits (N, K), K at least 2, differentiable; a module in evaluation mode.
        images: (N, C, H, W) in [0, 1].
        eps: ε, in the images' units: the paper's 1 to 16 are 1/255 to 16/255.
        normalise: applied to the images before the model; the gradient goes through it.

    Raises:
        ValueError, TypeError: images of another shape or dtype, a negative ε, a model in training mode.

    Source: Learn to Pay Attention, Section 5.2 and Appendix A.4, after Goodfellow et al., Explaining and Harnessing
    Adversarial Examples, Section 4.
    """
    check_evaluating("fgsm", model)
    check_tensor("fgsm", "images", images)
    check_shape("fgsm", "images", images, "(N, C, H, W)", images.dim() == 4)
    _check_eps("fgsm", eps)
    direction, _ = _direction("fgsm", model, images, normalise)
    return (images.detach() + eps * direction).clamp(0, 1)


def fooling_rate(
    model: Callable[[torch.Tensor], torch.Tensor],
    images: Data,
    eps: Sequence[float] = tuple(step / 255 for step in (1, 2, 4, 8, 16)),
    *,
    normalise: Normalise = identity,
    batch_size: int = 128,
    device=None,
) -> Fooling:
    """Share of predictions that :func:`fgsm` changes, for each ε, whether they are correct or not.

    Args:
        model, normalise: as in :func:`fgsm`.
        images: raw, in [0, 1]: (N, C, H, W), or an iterable of batches (of tuples that begin with the images).
        eps: in the images' units.
        batch_size: images per batch if ``images`` is a tensor.
        device: device for the batches, or None to leave them where they are.

    Raises:
        ValueError, TypeError: as :func:`fgsm`, or no image.

    Source: Learn to Pay Attention, Section 5.2 and Figure 6.
    """
    check_evaluating("fooling_rate", model)
    eps = numbers_of("fooling_rate", "eps", eps)
    for each in eps:
        _check_eps("fooling_rate", each)
    total, changed = 0, [0] * len(eps)
    for raw, *_ in batches("fooling_rate", "images", images, batch_size, device):
        direction, predicted = _direction("fooling_rate", model, raw, normalise)
        total += len(raw)
        with torch.no_grad():
            for index, each in enumerate(eps):
                adversarial = (raw + each * direction).clamp(0, 1)
                changed[index] += (model(normalise(adversarial)).argmax(1) != predicted).sum().item()
    return Fooling(eps, [count / total for count in changed], total)
