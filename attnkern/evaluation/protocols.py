"""Every protocol by name on a trained network: ``attnkern evaluate CHECKPOINT --protocol all``."""

import errno
import functools
import json
import math
import os
import platform
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

import attnkern
from attnkern._checks import check_count
from attnkern._spelling import did_you_mean
from attnkern.evaluation.anchors import usage
from attnkern.evaluation.classification import top1
from attnkern.evaluation.crossdomain import direct_transfer, features_at, linear_svm, zca
from attnkern.evaluation.inputs import collect, listed
from attnkern.evaluation.interpretability import frequency, interpretability_score, occlude
from attnkern.evaluation.localisation import box_masks, localisation, upsample
from attnkern.evaluation.maps import map_of
from attnkern.evaluation.orientation import Orientation, orient, signed_scores
from attnkern.evaluation.query import pool_attention, query_driven
from attnkern.evaluation.rectangles import (
    catching_rate,
    descriptive_order,
    equivariance_errors,
    fitting_rate,
    missing_rate,
    rectangle_mask,
)
from attnkern.evaluation.robustness import fooling_rate
from attnkern.evaluation.segmentation import weak_segmentation
from attnkern.nn import AnchorQuantizer, CompatibilityPool, WindowAttention


class NotApplicableError(ValueError):
    """The network or the data set lacks what a protocol needs."""


@dataclass
class Subject:
    """A network, its test images, and the settings that all protocols share.

    Args:
        network: in evaluation mode.
        images: an :class:`attnkern.training.data.ImageData` after ``setup()``.
        normalise: from images in [0, 1] to the input of the network.
        class_names: names of the network's classes; None: those of the images.
        map: name of the attention map, or of a module for Grad-CAM. None: the combined attention maps, or Grad-CAM at
            the second deepest feature map of a network without attention.
        limit: number of test images, drawn from all classes by :func:`stratified`; None: all.
        batch_size, device: of every forward pass.
        seed: random seed of the test images under ``limit`` and of the occlusions.
        other: raw images (M, 3, h, w) to occlude with, by default the test images in another order.
        orientations: by name of the map; chosen on training images, as ``load_run`` finds them in a checkpoint.

    Raises:
        ValueError, TypeError: an unknown map, or a limit or a batch size that is not an integer of at least 1.
    """

    network: torch.nn.Module
    images: Any
    normalise: Callable[[torch.Tensor], torch.Tensor]
    class_names: list[str] | None = None
    map: str | None = None
    limit: int | None = None
    batch_size: int = 128
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    other: torch.Tensor | None = None
    orientations: Mapping[str, Orientation] = field(default_factory=dict)

    def __post_init__(self):
        check_count("Subject", batch_size=self.batch_size, limit=1 if self.limit is None else self.limit)
        self.network.to(self.device)
        self.class_names = self.class_names or self.images.class_names
        self.map_name, self.predict = map_of(self.network, self.map)
        self.common = {"normalise": self.normalise, "batch_size": self.batch_size, "device": self.device}

    def _load(self, data):
        if self.limit is not None:
            part = self.images.test.part
            labels = [part.labels[index] for index in part.indices]
            data = Subset(data, stratified(labels, self.limit, self.seed))
        return [torch.cat(parts) for parts in zip(*DataLoader(data, self.batch_size), strict=True)]

    @functools.cached_property
    def raw(self) -> torch.Tensor:
        """(N, 3, H, W) test images in [0, 1]."""
        return self._load(self.images.raw())[0]

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """(N,) classes of the test images."""
        return self._load(self.images.raw())[1]

    @functools.cached_property
    def maps(self) -> torch.Tensor:
        """(N, h, w) maps of the test images."""
        return collect(self.predict, self.raw, **self.common)[1]

    @functools.cached_property
    def located(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (N, 4), or (N, B, 4) of several objects, and masks (N, H, W), the union of several."""
        data = self.images.located()
        if data is None:
            raise NotApplicableError(f"{self.images.name} has no boxes or masks")
        boxes, masks = self._load(data)[2:]
        return boxes, masks.any(1) if masks.dim() == 4 else masks

    def rectangles_of(self, images: torch.Tensor) -> torch.Tensor:
        """Rectangles (N, 5) of normalised images, or (N, K, 5) if the network has several windows."""
        attention = getattr(self.network, "attention", None)
        if not isinstance(attention, WindowAttention):
            raise NotApplicableError("the network has no rectangles")
        return attention.rectangle(self.network.local_features(images))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _top1(subject):
    if subject.class_names != subject.images.class_names:
        raise NotApplicableError(f"the network's classes are not those of {subject.images.name}")
    return top1(subject.network, (subject.raw, subject.labels), **subject.common)._asdict()


def _transfer(subject):
    """The network's predictions on the images of another data set, without training on it."""
    if subject.class_names == subject.images.class_names:
        raise NotApplicableError("the network was trained on these classes")
    names, data = (subject.class_names, subject.images.class_names), (subject.raw, subject.labels)
    try:
        return direct_transfer(subject.network, data, *names, size=None, **subject.common)._asdict()
    except ValueError as error:
        raise NotApplicableError(str(error)) from error


def _interpretability(subject):
    """Images with squares of one colour or of another image, and of their low (r = 12) or high (r = 4) frequencies."""
    other = subject.other
    if other is None:
        other = subject.raw[torch.randperm(len(subject.raw), generator=subject.generator())]
    scores = {}
    for size in (4, 8, 12, 16):
        for kind, fill in (("colour", "colour"), ("image", other)):
            modify = functools.partial(occlude, size=size, generator=subject.generator(), fill=fill)
            scores[f"{kind} p={size}"] = modify
    scores["low r=12"] = functools.partial(frequency, radius=12, keep="low")
    scores["high r=4"] = functools.partial(frequency, radius=4, keep="high")
    return {
        "occluding images": "the test images in another order" if subject.other is None else "given",
        **{
            name: interpretability_score(subject.predict, subject.raw, modify, **subject.common)._asdict()
            for name, modify in scores.items()
        },
    }


def _fooling(subject):
    return fooling_rate(subject.network, subject.raw, **subject.common)._asdict()


def _crossdomain(subject):
    """A linear SVM on the whitened inputs of the classifier."""
    if isinstance(subject.network.get_classifier(), torch.nn.ModuleList):
        raise NotApplicableError("the network has a classifier for each level")
    features = features_at(subject.network, "classifier", subject.raw, **subject.common)
    few = [subject.images.class_names[i] for i, n in enumerate(subject.labels.bincount().tolist()) if n < 5]
    if few:
        raise NotApplicableError(f"five folds need at least five images of each class, got fewer of {listed(few)}")
    return {"features": features.shape[1], **linear_svm(zca(features)(features), subject.labels)._asdict()}


def _localisation(subject):
    boxes, masks = subject.located
    size = subject.raw.shape[2:]
    found = localisation(subject.maps, boxes, size, masks)._asdict()
    return found | {"signed_score": signed_scores(subject.maps, boxes, size).mean().item()}


def _orientation(subject):
    """Localisation of the map, negated if low values mark the objects on the training images."""
    chosen = subject.orientations.get(subject.map_name)
    if chosen is None:
        raise NotApplicableError(f"the checkpoint has no orientation of {subject.map_name} from training images")
    if not chosen.sign:
        raise NotApplicableError(f"on training images, {chosen}")
    boxes, masks = subject.located
    return {
        "chosen on": "training images",
        "meaning": str(chosen),
        "map": "as it is" if chosen.sign == 1 else "negated",
        **chosen._asdict(),
        "oriented": localisation(orient(subject.maps, chosen.sign), boxes, subject.raw.shape[2:], masks)._asdict(),
    }


def _segmentation(subject):
    _, masks = subject.located
    found = weak_segmentation(subject.maps, masks, subject.labels, subject.images.class_names)
    return {name: entry._asdict() for name, entry in found.items()}


def _query(subject):
    """Relative change of each pool's attention when the first test image provides the query."""
    names = [name for name, module in subject.network.named_modules() if isinstance(module, CompatibilityPool)]
    if not names:
        raise NotApplicableError("the network has no CompatibilityPool")
    result = {}
    for name in names:
        attend = pool_attention(subject.network, name, subject.normalise)
        found = query_driven(
            attend, subject.raw[1:], subject.raw[0], batch_size=subject.batch_size, device=subject.device
        )
        result[name] = {
            "mean change": found.change.abs().mean().item(),
            "largest change": found.change.abs().max().item(),
            "images": len(found.change),
        }
    return result


@torch.no_grad()
def _rectangles(subject):
    found = torch.cat(
        [
            subject.rectangles_of(subject.normalise(piece.to(subject.device))).cpu()
            for piece in subject.raw.split(subject.batch_size)
        ]
    )
    names = ("row", "column", "half height", "half width", "angle")

    def moments(numbers):
        parts = zip(names, numbers.unbind(-1), strict=True)
        return {name: {"mean": values.mean().item(), "std": values.std().item()} for name, values in parts}

    result = moments(found)  # over all images and windows
    if found.dim() == 3:
        result |= {f"window {k}": moments(numbers) for k, numbers in enumerate(found.unbind(1))}
    for by in ("column", "row", "both", "height", "width", "angle"):
        order = descriptive_order(found, by)
        result[f"sorted by {by}"] = {"first": order[:5].tolist(), "last": order[-5:].tolist()}
    return result


@torch.no_grad()
def _rates(subject):
    """Catching, missing and fitting rate of the union of the windows against the filled boxes."""
    boxes, _ = subject.located
    size = subject.raw.shape[2:]
    rates = {"catching": [], "missing": [], "fitting": []}
    pieces = zip(subject.raw.split(subject.batch_size), boxes.split(subject.batch_size), strict=True)
    for images, box in pieces:
        normalised = subject.normalise(images.to(subject.device))
        found = subject.rectangles_of(normalised).cpu()
        cells = subject.network.local_features(normalised).shape[2:]
        mask = rectangle_mask(found, cells, shape=subject.network.attention.shape)
        mask, truth = upsample(mask.float(), size) > 0.5, box_masks(box, size)
        for name, rate in (("catching", catching_rate), ("missing", missing_rate), ("fitting", fitting_rate)):
            rates[name].append(rate(mask, truth))
    return {name: torch.cat(found).mean().item() for name, found in rates.items()}


def _equivariance(subject):
    found = equivariance_errors(subject.rectangles_of, subject.raw, **subject.common)
    return {name: error._asdict() for name, error in found.items()}


@torch.no_grad()
def _anchors(subject):
    """How often each quantizer chooses each of its anchors, whatever map was chosen for the other protocols."""
    quantizers = {n: m for n, m in subject.network.named_modules() if isinstance(m, AnchorQuantizer)}
    if not quantizers:
        raise NotApplicableError("the network has no anchors")
    counts = {}

    def counter(name, anchors):
        def add(_module, _args, values):
            chosen = (values.float().flatten()[:, None] - anchors).abs().argmin(1)
            counts[name] = counts.get(name, 0) + chosen.bincount(minlength=len(anchors)).cpu()

        return add

    # The quantized values of each call pass through the quantizer's module ``map``.
    handles = [m.map.register_forward_hook(counter(n, m.anchors.detach().float())) for n, m in quantizers.items()]
    try:
        for images in subject.raw.split(subject.batch_size):
            subject.network(subject.normalise(images.to(subject.device)))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {"values": quantizers[name].anchors.tolist(), **usage(count)._asdict()} for name, count in counts.items()
    }


def stratified(labels: list[int], limit: int, seed: int = 0) -> list[int]:
    """Indices of ``limit`` images, drawn at random from all classes in proportion to their sizes.

    The first images are one of each class, so that no class is missing unless ``limit`` is less than their number.
    The draw depends on ``labels`` and ``seed`` alone, and a smaller ``limit`` gives the beginning of a larger one.

    Raises:
        ValueError, TypeError: a limit that is not an integer of at least 1.
    """
    check_count("stratified", limit=limit)
    sizes, drawn, quantile = Counter(labels), Counter(), {}
    for index in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist():
        label = labels[index]
        quantile[index] = drawn[label] / sizes[label]
        drawn[label] += 1
    # The sort is stable: images at the same quantile of different classes stay in random order.
    return sorted(quantile, key=quantile.get)[:limit]


#: By name, as ``--protocol`` takes them.
PROTOCOLS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "top1": _top1,
    "transfer": _transfer,
    "interpretability": _interpretability,
    "fooling": _fooling,
    "crossdomain": _crossdomain,
    "localisation": _localisation,
    "orientation": _orientation,
    "segmentation": _segmentation,
    "query": _query,
    "rectangles": _rectangles,
    "rates": _rates,
    "equivariance": _equivariance,
    "anchors": _anchors,
}


def chosen_protocols(names: Iterable[str]) -> list[str]:
    """The names, or those of all :data:`PROTOCOLS` if "all" is among them. Raises ValueError for an unknown name."""
    names = list(names)
    for name in names:
        if name != "all" and name not in PROTOCOLS:
            hint = did_you_mean(name, ["all", *PROTOCOLS])
            raise ValueError(f"evaluate: protocol must be one of all, {', '.join(PROTOCOLS)}, got {name!r}{hint}")
    return list(PROTOCOLS) if "all" in names else names


def evaluate(subject: Subject, protocols: str | Iterable[str] = tuple(PROTOCOLS)) -> dict[str, Any]:
    """The results of protocols by name.

    The result of a protocol that does not apply is ``{"not applicable": reason}``, that of one that fails
    ``{"error": message, "traceback": text}``: a failure does not end the others.

    Args:
        subject: a network, its test images and the settings.
        protocols: a name, or several; "all" stands for all of :data:`PROTOCOLS`.

    Raises:
        ValueError: an unknown protocol.
    """
    results = {}
    for name in chosen_protocols([protocols] if isinstance(protocols, str) else protocols):
        try:
            results[name] = PROTOCOLS[name](subject)
        except NotApplicableError as reason:
            results[name] = {"not applicable": str(reason)}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return results


def choices(subject: Subject) -> dict[str, Any]:
    """The settings that results depend on besides the network: images, map, seed, versions."""
    return {
        "data": subject.images.settings(),
        "images": len(subject.raw),
        "map": subject.map_name,
        "seed": subject.seed,
        "device": str(subject.device),
        "noise": "off",
        "versions": {
            "attnkern": attnkern.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def plain(value):
    """``value`` as JSON can hold it: NaN and infinities become None, tensors lists, keys strings."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def check_writable(where: str, path: str | os.PathLike, option: str = "--out") -> None:
    """Raise OSError unless :func:`write_text` can write ``path``. Call it before a long computation.

    Args:
        where: the command, for the message.
        path: a file.
        option: the option that chooses another path, for the message.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        why = f"{os.fspath(path)!r} cannot be written ({error.strerror})"
        raise OSError(f"{where}: {why}; choose another place with {option}") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8; if that fails, no partial file is left."""
    partial = _partial(Path(path))
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names need not be valid text
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a JSON file; if that fails, no partial file is left."""
    write_text(path, json.dumps(plain(content), indent=1) + "\n")
