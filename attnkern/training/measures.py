"""The numbers of one trained run that :mod:`attnkern.training.reproduce` compares."""

import csv
import functools
import math
import statistics
import sys
from pathlib import Path

import torch

from attnkern._json import read_json
from attnkern.evaluation.inputs import collect
from attnkern.evaluation.interpretability import interpretability_score, map_cosines, occlude
from attnkern.evaluation.localisation import binarise, box_masks, localisation, upsample
from attnkern.evaluation.maps import attention_of, gradcam_of
from attnkern.evaluation.orientation import signed_scores
from attnkern.evaluation.protocols import Subject, plain, write_json
from attnkern.evaluation.rectangles import (
    catching_rate,
    equivariance_errors,
    fitting_rate,
    rectangle_mask,
    transform_images,
)
from attnkern.evaluation.robustness import fooling_rate
from attnkern.models import map_names
from attnkern.nn import WindowAttention
from attnkern.training.data import ImageData
from attnkern.training.train import load_run

#: Small transformations of an image: ten degrees, a tenth of the size, a twentieth of the side.
_SMALL = (
    *({"angle": sign * math.pi / 18} for sign in (-1, 1)),
    *({"scale": scale} for scale in (0.9, 1.1)),
    *({"shift": shift} for shift in ((-0.05, 0.0), (0.05, 0.0), (0.0, -0.05), (0.0, 0.05))),
)
#: Sides of the squares that cover a part of the images, as a share of the images' side; ``occluded`` has the second.
_COVERED = (1 / 8, 1 / 4, 3 / 8)
#: Step of the adversarial images.
_EPSILON = 2 / 255


def measure(folder: Path) -> dict[str, float | None]:
    """The numbers of the run in ``folder``, from its file ``measures.json`` if there is one.

    ``accuracy``; ``pointing``, ``iou`` (box of the map above a fifth of its range), ``catching`` (map above Otsu's
    threshold) against the object's box; of several objects also ``pointing_each`` and ``pointing_all``
    (:func:`each_object`); ``contrast`` (:func:`contrast`); ``sign``, the mean signed score; ``stability`` and
    ``unrelated`` (:func:`stability`); ``interpretability`` and ``interpretability_centred`` (mean score at 0.9 of
    squares of three sizes); ``occluded``, the accuracy on images with a square of a quarter of the side; ``fooled``,
    the rate at 2/255. Of windows also ``centre`` (share of windows whose centre lies in a box), ``window_iou``,
    ``window_catching``, ``half_extent``, and the mean errors ``equivariance`` and ``equivariance_centre``.
    ``train_accuracy`` of the last epoch and ``gain`` (:func:`curves`). For photographs,
    ``interpretability``, ``interpretability_centred``, ``occluded``, ``fooled``, ``equivariance`` and
    ``equivariance_centre`` are missing: they would take longer than the training.

    Raises:
        FileNotFoundError: there is no ``last.ckpt`` in the folder.
        ValueError: the file ``measures.json`` is damaged.
        NotApplicableError: the data set has no boxes.
    """
    path = folder / "measures.json"
    if not path.exists():
        write_json(path, _measured(folder))
    return read_json("measure", path, "delete it to measure the run again")


def _measured(folder):
    run = load_run(folder / "last.ckpt")
    images = ImageData(**run.data)
    images.setup()
    # Grad-CAM keeps the activations of a batch: the default would take 18 GB for photographs.
    subject = Subject(run.network, images, run.normalise, batch_size=images.batch_size)
    # Without attention: Grad-CAM at the last feature map. Attention of the small networks is applied to the same map;
    # in EfficientNets it comes one convolution earlier.
    last = run.network.feature_modules[-1]
    subject.predict = attention_of(run.network) if map_names(run.network) else gradcam_of(run.network, last)
    raw, labels, size = subject.raw, subject.labels, subject.raw.shape[2:]
    boxes, _ = subject.located
    logits, maps = collect(subject.predict, raw, **subject.common)
    large, truth = upsample(maps, size), box_masks(boxes, size)
    found = localisation(maps, boxes, size)
    result = {
        "accuracy": _accuracy(logits, labels),
        "pointing": found.pointing,
        "iou": found.iou_tight,
        "catching": catching_rate(binarise(large), truth).mean().item(),
        "contrast": contrast(maps),
        "sign": signed_scores(maps, boxes, size).mean().item(),
    }
    if boxes.dim() == 3:
        result |= each_object(large, boxes)
    has_windows = isinstance(getattr(run.network, "attention", None), WindowAttention)
    if has_windows:
        result |= _windows(subject, raw, boxes, truth, maps.shape[1:])
    # Measures that need many passes would take longer than training on photographs.
    photographs = images.name == "photo-clutter"
    step = 5 if photographs else 2
    result |= stability(subject.predict, raw[::step], maps[::step], **subject.common)
    if not photographs:
        result |= _robustness(subject, raw, labels)
        if has_windows:
            result |= _equivariance(subject, raw[::step])
    return plain(result | curves(folder))


def _accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def contrast(maps: torch.Tensor) -> float:
    """Mean of (max - min)/(max + min) of maps (N, h, w) without negative values: 0 of constant maps, at most 1."""
    low, high = maps.double().amin((1, 2)), maps.double().amax((1, 2))
    return ((high - low) / (high + low).clamp(min=1e-30)).mean().item()


def each_object(maps: torch.Tensor, boxes: torch.Tensor) -> dict[str, float]:
    """The pointing game for each of several objects.

    An object is found if the largest value of the pixels that are closer to its box's centre than to those of the
    others lies inside its box.

    Args:
        maps: (N, H, W), as large as the images.
        boxes: (N, B, 4) as in :func:`attnkern.evaluation.box_masks`.

    Returns:
        ``pointing_each``, the share of objects that are found; ``pointing_all``, the share of images where all are.
    """
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    rows, columns = (torch.arange(length, dtype=boxes.dtype) for length in maps.shape[1:])
    distance = (rows[:, None] - centres[..., 0, None, None]).square()
    distance = distance + (columns - centres[..., 1, None, None]).square()
    nearest = distance.argmin(1)
    hits = []
    for index in range(boxes.shape[1]):
        own = maps.masked_fill(nearest != index, -torch.inf).flatten(1)
        inside = box_masks(boxes[:, index], maps.shape[1:]).flatten(1)
        varies = maps.amax((1, 2)) > maps.amin((1, 2))
        hits.append(inside.gather(1, own.argmax(1, keepdim=True))[:, 0] & varies)
    hits = torch.stack(hits, 1)
    return {"pointing_each": hits.double().mean().item(), "pointing_all": hits.all(1).double().mean().item()}


def stability(predict, raw: torch.Tensor, maps: torch.Tensor, **common) -> dict[str, float]:
    """How well maps follow small transformations T of the images: the correlation of a(T(x)) with T(a(x)).

    Maps are compared at the images' size, where T is the same for both, on the pixels that T does not bring in from
    outside. The correlation leaves out level and contrast of a map, in which kinds of attention differ. A map that
    does not depend on the image would correlate as well, so ``unrelated`` is the mean correlation of the maps of two
    different images.

    Args:
        predict: from normalised images to logits and maps.
        raw: images (N, C, H, W) in [0, 1].
        maps: (N, h, w), those of ``raw``.
        common: arguments of :func:`attnkern.evaluation.collect`.

    Returns:
        ``stability`` and ``unrelated``, means over images and eight transformations.
    """
    size = raw.shape[2:]
    large = upsample(maps, size)[:, None]
    found = []
    for small in _SMALL:
        _, moved = collect(predict, transform_images(raw, **small, padding="border"), **common)
        kept = transform_images(torch.ones(1, 1, *size), **small)[0, 0] > 0.999
        pair = upsample(moved, size), transform_images(large, **small)[:, 0]
        found.append(map_cosines(*(each[:, kept][:, None] for each in pair), centred=True))
    unrelated = map_cosines(maps, maps.roll(1, 0), centred=True)
    return {"stability": torch.cat(found).mean().item(), "unrelated": unrelated.mean().item()}


def _robustness(subject, raw, labels):
    scores, centred, accuracies = [], [], []
    for share in _COVERED:
        side = round(share * raw.shape[2])
        cover = functools.partial(occlude, size=side)
        modify = functools.partial(cover, generator=subject.generator())
        score = interpretability_score(subject.predict, raw, modify, **subject.common)
        scores.append(score.scores[0.9])
        centred.append(score.centred_scores[0.9])
        covered = cover(raw, generator=subject.generator())
        with torch.no_grad():
            accuracies.append(_accuracy(subject.network(subject.normalise(covered)), labels))
    return {
        "interpretability": statistics.fmean(scores),
        "interpretability_centred": statistics.fmean(centred),
        "occluded": accuracies[1],
        "fooled": fooling_rate(subject.network, raw, [_EPSILON], **subject.common).rates[0],
    }


@torch.no_grad()
def _windows(subject, raw, boxes, truth, cells):
    rectangles = subject.rectangles_of(subject.normalise(raw))
    size = raw.shape[2:]
    mask = upsample(rectangle_mask(rectangles, cells, shape=subject.network.attention.shape).float(), size) > 0.5
    found = rectangles if rectangles.dim() == 3 else rectangles[:, None]
    # Pixel coordinates of a centre; cells are the corners of their grid, and their centres those of the pixels' blocks.
    lengths, steps = torch.tensor(size), torch.tensor(size) / torch.tensor(cells)
    centres = found[..., :2] * (lengths - steps) + (steps - 1) / 2
    each = boxes if boxes.dim() == 3 else boxes[:, None]
    low, high = each[:, None, :, :2], each[:, None, :, 2:]
    inside = ((centres[:, :, None] >= low) & (centres[:, :, None] <= high)).all(-1)
    return {
        "centre": inside.any(2).double().mean().item(),
        "window_iou": fitting_rate(mask, truth).mean().item(),
        "window_catching": catching_rate(mask, truth).mean().item(),
        "half_extent": found[..., 2:4].mean().item(),
    }


def _equivariance(subject, raw):
    errors = equivariance_errors(subject.rectangles_of, raw, **subject.common).values()
    return {
        "equivariance": statistics.fmean(error.distance for error in errors),
        "equivariance_centre": statistics.fmean(error.centre for error in errors),
    }


def curves(folder: Path) -> dict[str, float | None]:
    """``train_accuracy`` of the last epoch; ``gain``, the last test accuracy minus the mean of the two before it."""
    columns = {"train_accuracy": [], "val_accuracy": []}
    for path in sorted(folder.glob("csv/version_*/metrics.csv")):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, values in columns.items():
                    if row.get(name):
                        values.append(float(row[name]))
    tests, trained = columns["val_accuracy"], columns["train_accuracy"]
    return {
        "train_accuracy": trained[-1] if trained else None,
        "gain": tests[-1] - statistics.fmean(tests[-3:-1]) if len(tests) > 2 else None,
    }


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
