"""Networks on data sets that they were not trained on: a linear SVM on features, or the predictions themselves."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import (
    check_integer,
    check_items,
    check_labels,
    check_number,
    check_shape,
    check_tensor,
)
from attnkern._numerics import double
from attnkern.evaluation.inputs import Data, Normalise, batches, check_evaluating, identity, listed


class Whitening(NamedTuple):
    """Result of :func:`zca`, a function of samples (N, ...) with D values each."""

    mean: torch.Tensor  #: (D,) float32
    matrix: torch.Tensor  #: (D, D) float32, symmetric

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        check_tensor("Whitening", "samples", samples)
        ok = samples.dim() > 1 and samples[:1].numel() == len(self.mean)
        check_shape("Whitening", "samples", samples, "(N, ...) of {} values each", ok, len(self.mean))
        flat = (samples.flatten(1) - self.mean.to(samples)) @ self.matrix.to(samples)
        return flat.view(samples.shape)


class LinearSvm(NamedTuple):
    """Result of :func:`linear_svm`."""

    accuracy: float  #: mean over the folds
    deviation: float  #: standard deviation over the folds
    folds: list[float]  #: accuracy on each fold


class DirectTransfer(NamedTuple):
    """Result of :func:`direct_transfer`."""

    accuracy: float  #: images of classes that the network lacks count as wrong
    accuracy_shared: float  #: without those images; NaN if none is left
    images: int
    shared: int  #: images of classes that the network has


@torch.no_grad()
def features_at(
    model: nn.Module,
    module_name: str,
    images: Data,
    *,
    normalise: Normalise = identity,
    batch_size: int = 128,
    device=None,
) -> torch.Tensor:
    """Inputs of a module of the network, flattened to (N, D), on the CPU: features, if the module is the classifier.

    Args:
        model: in evaluation mode.
        module_name: name of a submodule, such as "classifier"; if it has several inputs, the first one counts.
        images: raw, (N, C, H, W), or an iterable of batches (of tuples that begin with the images).
        normalise: applied to the images first.
        batch_size: images per batch if ``images`` is a tensor.
        device: device for the batches, or None to leave them where they are.

    Raises:
        ValueError: no such module, a module that is not called exactly once per batch, a model in training mode, or no
            image.

    Source: Learn to Pay Attention, Section 5.3 and Appendix A.4.
    """
    where = "features_at"
    check_evaluating(where, model)
    modules = dict(model.named_modules())
    if module_name not in modules:
        raise ValueError(f"{where}: module_name must name a submodule of the model, got {module_name!r}")
    features, inputs_of_batch = [], []
    handle = modules[module_name].register_forward_pre_hook(lambda _module, inputs: inputs_of_batch.append(inputs[0]))
    try:
        for raw, *_ in batches(where, "images", images, batch_size, device):
            inputs_of_batch.clear()
            model(normalise(raw))
            if len(inputs_of_batch) != 1:
                calls = len(inputs_of_batch)
                raise ValueError(f"{where}: {module_name!r} must be called once per forward pass, got {calls} calls")
            features.append(inputs_of_batch[0].flatten(1).cpu())
    finally:
        handle.remove()
    return torch.cat(features)


def zca(samples: torch.Tensor, floor: float = 1e-3) -> Whitening:
    """The whitening closest to the samples: C^(-1/2)·(x - mean), C their covariance.

    ``floor`` times the mean eigenvalue of C is added to every eigenvalue, so that directions that are mostly noise are
    not amplified.

    Args:
        samples: (N, ...) features or images, N at least 2.
        floor: must be positive if there are fewer samples than values per sample.

    Raises:
        ValueError, TypeError: samples of another shape or dtype, or a negative floor.

    Source: Bell and Sejnowski, The "independent components" of natural scenes are edge filters, 1997.
    """
    check_tensor("zca", "samples", samples)
    check_shape("zca", "samples", samples, "(N, ...) with N of at least 2", samples.dim() > 1 and len(samples) > 1)
    check_number("zca", floor=floor)
    if not floor >= 0:
        raise ValueError(f"zca: floor must be at least 0, got {floor!r}")
    flat = double(samples.detach().flatten(1))
    mean = flat.mean(0)
    found = whitening_from(mean, (flat - mean).T @ (flat - mean) / len(flat), floor)
    return Whitening(*(each.to(samples.device) for each in found))


def whitening_from(mean: torch.Tensor, covariance: torch.Tensor, floor: float = 1e-3) -> Whitening:
    """The whitening of :func:`zca` for samples of a known mean (D,) and covariance (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * (values.clamp(min=0) + floor * values.mean()).rsqrt()) @ vectors.T
    return Whitening(mean.float(), root.float())


def linear_svm(features: torch.Tensor, labels: torch.Tensor, folds: int = 5, seed: int = 0) -> LinearSvm:
    """Accuracy of a linear support vector machine, C = 1, in stratified cross validation.

    Args:
        features: (N, D).
        labels: (N,).
        folds: number of folds, from 2 to the number of images of the smallest class.
        seed: random seed of the folds and of the solver.

    Raises:
        ValueError, TypeError: features or labels of another shape or dtype; fewer than two folds, or too few images for
            them.
        ImportError: scikit-learn is not installed.

    Source: Learn to Pay Attention, Section 5.3 and Appendix A.4.
    """
    try:
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError("linear_svm needs scikit-learn: pip install scikit-learn") from error
    check_tensor("linear_svm", "features", features)
    check_shape("linear_svm", "features", features, "(N, D)", features.dim() == 2)
    check_labels("linear_svm", labels, "features", features)
    check_integer("linear_svm", folds=folds)
    labels = labels.cpu()
    smallest = min(labels.unique(return_counts=True)[1].tolist(), default=0)
    if smallest < 2:
        raise ValueError(f"linear_svm: labels must hold at least 2 images of each class, got {smallest}")
    if not 2 <= folds <= smallest:
        limits = f"at least 2 and at most {smallest} (images of the smallest class)"
        raise ValueError(f"linear_svm: folds must be {limits}, got {folds}")
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    machine = LinearSVC(C=1.0, random_state=seed)
    found = cross_val_score(
        machine, features.detach().cpu().double().numpy(), labels.numpy(), cv=splits, error_score="raise"
    )
    return LinearSvm(float(found.mean()), float(found.std()), found.tolist())


@torch.no_grad()
def direct_transfer(
    model: Callable[[torch.Tensor], torch.Tensor],
    data: Data,
    classes: Sequence[str],
    target_classes: Sequence[str],
    *,
    synonyms: Mapping[str, str] | None = None,
    size: tuple[int, int] | None = (32, 32),
    normalise: Normalise = identity,
    batch_size: int = 128,
    device=None,
) -> DirectTransfer:
    """Accuracy on another data set that shares classes, without training on it: a network for CIFAR-10 on STL-10.

    The network chooses among all its classes; a class that the other data set lacks (frog) is wrong.

    Args:
        model: from normalised images to logits (N, K); a module in evaluation mode.
        data: (images, labels), raw images (N, C, H, W) and (N,) indices into ``target_classes``; or an iterable of such
            batches.
        classes: names of the network's K classes.
        target_classes: names of the data set's classes.
        synonyms: from target names to the network's names; by default ``{"car": "automobile"}``.
        size: (H, W) that images are resized to first, or None.
        normalise: applied to the resized images.
        batch_size: images per batch if ``data`` is a tuple.
        device: device for the batches, or None to leave them where they are.

    Raises:
        ValueError, TypeError: no shared class, labels or logits of another number of classes, data without labels or
            images.

    Source: Learn to Pay Attention, Section 5.3 and Table 3 (STL).
    """
    where = "direct_transfer"
    check_evaluating(where, model)
    check_items(where, str, classes=classes, target_classes=target_classes)
    synonyms = {"car": "automobile"} if synonyms is None else synonyms
    index = {name: number for number, name in enumerate(classes)}
    known = [index.get(name, index.get(synonyms.get(name), -1)) for name in target_classes]
    if max(known, default=-1) < 0:
        raise ValueError(f"{where}: target_classes must share a class with classes, got [{listed(target_classes)}]")
    known = torch.tensor(known)
    total, shared, correct = 0, 0, 0
    for batch in batches(where, "data", data, batch_size, device):
        if len(batch) < 2:
            raise ValueError(f"{where}: data must hold images and labels, got images only")
        raw, labels = batch[:2]
        check_labels(where, labels, "images", raw)
        labels = labels.cpu()
        if labels.min() < 0 or labels.max() >= len(known):
            raise ValueError(
                f"{where}: labels must lie in 0 to {len(known) - 1} (target_classes), got {labels.min()} to "
                f"{labels.max()}"
            )
        if size is not None and tuple(raw.shape[2:]) != tuple(size):
            raw = F.interpolate(raw, tuple(size), mode="bilinear", antialias=True)
        logits = model(normalise(raw))
        ok = logits.dim() == 2 and logits.shape[1] == len(classes)
        check_shape(where, "logits", logits, "(N, {}) (classes)", ok, len(classes))
        wanted = known[labels]
        total += len(wanted)
        shared += (wanted >= 0).sum().item()
        correct += (logits.argmax(1).cpu() == wanted).sum().item()
    return DirectTransfer(correct / total, correct / shared if shared else float("nan"), total, shared)
