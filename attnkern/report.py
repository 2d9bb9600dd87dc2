"""One HTML page about a run, or about two runs side by side: numbers, figures and examples.

The page is self-contained and opens from disk.
"""

import base64
import html
import io
import json
import os
import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

import attnkern
from attnkern import _backend, viz
from attnkern._checks import check_count, check_kind
from attnkern._json import read_json
from attnkern.evaluation.classification import mcnemar
from attnkern.evaluation.protocols import PROTOCOLS, NotApplicableError, Subject, choices, evaluate, plain
from attnkern.nn import AnchorQuantizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The number of images in a row of a figure.
_ROW = 8


class Reported(NamedTuple):
    """A run that :func:`report` compares with another one."""

    subject: Subject  #: the trained network and its test images
    run: str | os.PathLike  #: folder of the run; its ``csv/`` and ``result.json`` are shown if they exist
    results: dict[str, Any] | None = None  #: of all protocols; None: they are run now


def _png(figure, **options) -> str:
    """A figure as a PNG picture in a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(title, note, draw) -> str:
    """A figure drawn for light and for dark pages, with a title and a caption."""
    light, dark = (_png(draw(theme)) for theme in ("light", "dark"))
    return (
        f"<h2>{html.escape(title)}</h2><figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" alt="{html.escape(title)}">'
        f"</picture><figcaption>{html.escape(note)}</figcaption></figure>"
    )


def _entries(results: dict[str, Any]) -> dict[str, str]:
    """Nested results as texts by joined names; lists of more than five entries are left out."""
    found = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, entry in value.items():
                walk([*prefix, str(key)], entry)
        elif not isinstance(value, list) or len(value) <= 5:
            values = value if isinstance(value, list) else [value]
            text = " ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
            found[" · ".join(prefix)] = text

    walk([], results)
    return found


def _table(columns: Mapping[str, dict[str, str]]) -> str:
    """A table with a column for each run, and a row for each entry that a run has. Two runs get a header."""
    rows = dict.fromkeys(name for entries in columns.values() for name in entries)
    cells = [("td", [row, *(entries.get(row, "–") for entries in columns.values())]) for row in rows]
    if len(columns) > 1:
        cells.insert(0, ("th", ["", *columns]))
    lines = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) for tag, texts in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def latency(network: torch.nn.Module, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median milliseconds of a forward pass and of its attention modules alone, for reference and native."""
    called, handles = [], []
    for name, module in network.named_modules():
        # Submodules of an attention module are part of it.
        inside = any(name.startswith(f"{outer}.") for outer, _ in called)
        if type(module).__module__.startswith("attnkern.nn.") and not inside:
            called.append((name, module))
    inputs = {}
    for name, module in called:

        def keep(module, args, kwargs, name=name):
            inputs[name] = (module, args, kwargs)

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()

    def attend():
        for module, args, kwargs in inputs.values():
            module(*args, **kwargs)

    found = {}
    for backend in ("reference", "native"):
        if _backend.reason(backend, images.device, images.dtype) is not None:
            continue
        with attnkern.use_backend(backend), torch.no_grad():
            network(images)
            times = {"inference": lambda: network(images)} | ({"attention": attend} if inputs else {})
            for what, call in times.items():
                found.setdefault(what, {})[backend] = _seconds(call) * 1e3
    return found


def _seconds(call) -> float:
    """Median seconds of a call, over at least 0.3 s in blocks of about 10 ms or one call, each after two more calls."""
    timer = Timer("call()", globals={"call": call})  # waits for a GPU
    number = max(1, round(0.01 / min(timer.timeit(1).median for _ in range(3))))
    blocks = []
    while sum(blocks) * number < 0.3:
        blocks.append(timer.timeit(number).median)
    return statistics.median(blocks)


class _Example(NamedTuple):
    """What a network says about a test image."""

    overlay: dict[str, Any]  #: arguments of :func:`viz.overlay`
    truth: str
    predicted: str
    probability: float

    def __str__(self):
        verdict = "" if self.predicted == self.truth else "wrong: "
        return f"{verdict}{self.predicted} ({self.probability:.0%})"


def _examples(subject: Subject, indices: Sequence[int]) -> list[_Example]:
    """What the network of a run says about the test images at ``indices``."""
    raw, labels = subject.raw[list(indices)], subject.labels[list(indices)]
    inputs = subject.normalise(raw.to(subject.device))
    with torch.no_grad():
        logits, maps = (found.detach().cpu() for found in subject.predict(inputs))
    options, rectangles = {}, None
    if not subject.map_name.startswith("Grad-CAM"):
        options["nearest"] = any(isinstance(module, AnchorQuantizer) for module in subject.network.modules())
        try:
            with torch.no_grad():
                rectangles = subject.rectangles_of(inputs).cpu()[:, None]
            options["shape"] = subject.network.attention.shape
        except NotApplicableError:
            pass
    examples = []
    for index, (image, map, label) in enumerate(zip(raw, maps, labels.tolist(), strict=True)):
        best = logits[index].argmax().item()
        overlay = {"image": image, "map": map, **options}
        if rectangles is not None:
            overlay["rectangle"] = rectangles[index]
        probability = logits[index].softmax(0)[best].item()
        examples.append(_Example(overlay, subject.images.class_names[label], subject.class_names[best], probability))
    return examples


@torch.no_grad()
def correct(subject: Subject) -> torch.Tensor:
    """(N,) bool: whether the network of a run predicts the class of each test image."""
    pieces = subject.raw.split(subject.batch_size)
    best = [subject.network(subject.normalise(piece.to(subject.device))).argmax(1).tolist() for piece in pieces]
    predicted = [subject.class_names[index] for piece in best for index in piece]
    return torch.tensor(
        [name == subject.images.class_names[label] for name, label in zip(predicted, subject.labels, strict=True)]
    )


def side_by_side(subjects: Mapping[str, Subject], indices: Sequence[int], **options: Any) -> "Figure":
    """Test images in columns: the image with its class, and below it the map of each network with its prediction.

    Args:
        subjects: {name: network and test images}; all have the same test images.
        indices: of the test images.
        options: of :func:`attnkern.viz.grid`.
    """
    rows = {name: _examples(subject, indices) for name, subject in subjects.items()}
    first = next(iter(rows.values()))
    images = [{"image": example.overlay["image"], "title": example.truth} for example in first]
    overlays = [[example.overlay | {"title": str(example)} for example in row] for row in rows.values()]
    return viz.grid([images, *overlays], **{"row_titles": ["image", *rows], "inches": 1.2} | options)


def _written(path, command):
    """The content of a JSON file that a command has written, or {} if there is no such file."""
    return read_json("report", path, f"delete it or write it again with {command}") if path.is_file() else {}


def saved_results(subject: Subject, run: str | os.PathLike) -> dict[str, Any]:
    """The results in the ``evaluation.json`` of a run, or {} if there are none for this map and these test images.

    Raises:
        ValueError: the file is damaged.
    """
    saved = _written(Path(run) / "evaluation.json", "attnkern evaluate")
    settings = plain(choices(subject))
    same = all(saved.get(key) == settings[key] for key in ("data", "images", "map", "seed"))
    return saved["protocols"] if same else {}


def check_against(first: Reported, second: Reported) -> None:
    """Raise ValueError unless ``second`` is another run than ``first`` and has the same test images."""
    if Path(first.run).resolve() == Path(second.run).resolve():
        raise ValueError(f"report: against must be another run, got {os.fspath(second.run)!r} twice")
    data, other = first.subject.images.settings(), second.subject.images.settings()
    if data["name"] != other["name"]:
        raise ValueError(f"report: against must be a run on {data['name']}, got one on {other['name']}")
    images, others = ((each.subject.raw, each.subject.labels) for each in (first, second))
    if not all(map(torch.equal, images, others)):
        changed = ", ".join(f"{key} {other[key]!r} instead of {data[key]!r}" for key in data if data[key] != other[key])
        raise ValueError(f"report: against must be a run with the same test images, got one with {changed}")
    second.subject.raw = first.subject.raw  # one copy in memory


class _Side(NamedTuple):
    """A run on the page."""

    subject: Subject
    run: Path
    results: dict[str, Any]
    trained: dict[str, Any]  #: the content of ``result.json``
    curves: list[Path]


def _side(subject, run, results):
    run = Path(run)
    trained = _written(run / "result.json", "attnkern train")
    results = plain(evaluate(subject, PROTOCOLS) if results is None else results)
    return _Side(subject, run, results, trained, sorted(run.glob("csv/version_*/metrics.csv")))


def _named(sides: Sequence[_Side]) -> dict[str, _Side]:
    """The sides by recipe, or by folder if they have the same recipe, or by path."""
    for name_of in (
        lambda side: side.trained.get("recipe", side.run.resolve().name),
        lambda side: side.run.resolve().name,
        lambda side: str(side.run),
    ):
        named = {name_of(side): side for side in sides}
        if len(named) == len(sides):
            break
    return named


def _numbers(side: _Side) -> dict[str, str]:
    """The most important numbers as texts."""
    where = side.results.get("localisation", {})
    numbers = {
        "top-1 accuracy": side.results.get("top1", {}).get("accuracy"),
        "pointing game": where.get("pointing"),
        "IoU with the box": where.get("iou_tight"),
    }
    shown = {name: f"{value:.3f}" for name, value in numbers.items() if value is not None}
    shown["parameters"] = f"{sum(p.numel() for p in side.subject.network.parameters()):,}"
    images = side.subject.raw[:32]
    speed = latency(side.subject.network, side.subject.normalise(images.to(side.subject.device)))
    for what, times in speed.items():
        shown |= {f"{what} of {len(images)} images, {backend}": f"{ms:.2f} ms" for backend, ms in times.items()}
    return shown


def _figures_of(side: _Side, of: str) -> Iterable[str]:
    """Figures of one run. ``of`` ends their titles."""
    subject = side.subject
    for name, entry in side.results.get("anchors", {}).items():
        if isinstance(entry, dict):
            values = torch.tensor(entry["values"])
            counts = (torch.tensor(entry["frequencies"]) * len(subject.raw) * subject.maps[0].numel()).round().long()
            yield _figure(
                f"Anchors: {name}{of}",
                f"{entry['used']} of {len(values)} anchors are used; the perplexity is {entry['perplexity']:.1f}.",
                lambda theme, values=values, counts=counts: viz.anchor_histogram(values, counts, theme=theme),
            )
    try:
        with torch.no_grad():
            rectangles = subject.rectangles_of(subject.normalise(subject.raw.to(subject.device))).cpu()
    except NotApplicableError:
        return
    yield _figure(
        f"Rectangles{of}",
        "Centres and half extents as fractions of the map's sides.",
        lambda theme: viz.rectangle_histograms(rectangles, theme=theme),
    )


def _agreement(sides: Mapping[str, _Side]) -> Iterable[str]:
    """On which test images exactly one of two networks is right: their number, and the first ones."""
    subjects = {name: side.subject for name, side in sides.items()}
    right = {name: correct(subject) for name, subject in subjects.items()}
    first, second = sides
    found = mcnemar(*right.values())
    text = (
        f"Both networks are right on {found.both} of {len(right[first])} test images, only {first} on "
        f"{found.only_first}, only {second} on {found.only_second}, and neither on {found.neither}. McNemar's exact "
        f"test of the hypothesis that both are right equally often gives p = {found.p_value:.3g}. This is about these "
        "two networks; it does not include the variation between random seeds."
    )
    yield f"<h2>Agreement</h2><p>{html.escape(text)}</p>"
    for one, other in ((first, second), (second, first)):
        indices = (right[one] & ~right[other]).nonzero()[:_ROW, 0].tolist()
        if indices:
            yield _figure(
                f"Only {one} is right",
                f"The first {len(indices)} of these images." if len(indices) > 1 else "The first of these images.",
                lambda theme, indices=indices: side_by_side(subjects, indices, theme=theme),
            )


def _slides(sides: Mapping[str, _Side], count: int) -> list[dict[str, Any]]:
    """Pictures and texts of the first ``count`` test images."""
    shown = {name: _examples(side.subject, range(count)) for name, side in sides.items()}
    slides = []
    for index, examples in enumerate(zip(*shown.values(), strict=True)):
        overlays = [{"image": examples[0].overlay["image"]}, *(example.overlay for example in examples)]
        names = [f"{name}: " if len(sides) > 1 else "" for name in sides]
        slides.append(
            {
                "pictures": [_png(viz.overlay(**each), bbox_inches="tight", pad_inches=0) for each in overlays],
                "texts": [
                    f"class: {examples[0].truth}",
                    *(f"{name}{each}" for name, each in zip(names, examples, strict=True)),
                ],
                "caption": f"{index + 1} of {count}",
            }
        )
    return slides


def report(
    subject: Subject,
    run: str | os.PathLike,
    results: dict[str, Any] | None = None,
    examples: int = 24,
    against: Reported | None = None,
) -> str:
    """The HTML text of the page about a run, or about two runs side by side.

    Args:
        subject: the trained network and its test images.
        run: folder of the run; its ``csv/`` and ``result.json`` are shown if they exist.
        results: results of :func:`attnkern.evaluation.protocols.evaluate`; None: all protocols are run now.
        examples: number of test images on the page, the first ones.
        against: another run to compare with. The page then also has McNemar's test and the first images that only one
            of the two networks gets right.

    Raises:
        ValueError: ``against`` is the same run, or has another data set or other test images; or a ``result.json`` is
            damaged.
    """
    check_kind("report", Subject, subject=subject)
    check_kind("report", str | os.PathLike, run=run)
    check_kind("report", dict | None, results=results)
    check_count("report", examples=examples)
    check_kind("report", Reported | None, against=against)
    reported = [Reported(subject, run, results)]
    if against is not None:
        check_against(reported[0], against)
        reported.append(against)
    sides = _named([_side(*each) for each in reported])
    several = len(sides) > 1

    numbers = {name: _numbers(side) for name, side in sides.items()}
    if several:
        shown = _table(numbers) + "<p>Times are medians, measured in one process, one network after the other.</p>"
    else:
        cards = next(iter(numbers.values())).items()
        shown = "".join(
            f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in cards
        )
        shown = f'<div class="numbers">{shown}</div>'

    figures = list(_agreement(sides)) if several else []
    curves = {name if several else "": side.curves for name, side in sides.items() if side.curves}
    if curves:
        note = "Accuracy and loss by epoch. The last epoch counts: nothing was selected by the test curve."
        figures.append(_figure("Training", note, lambda theme: viz.training_curves(curves, theme=theme)))
    for name, side in sides.items():
        figures += _figures_of(side, f", {name}" if several else "")

    about = {name: choices(side.subject) for name, side in sides.items()}
    subtitle = [f"{subject.images.name}, {len(subject.raw)} test images"]
    for name, side in sides.items():
        if side.trained:
            trained = "{epochs} epochs, {seconds:.0f} s, seed {seed}".format(**side.trained)
            subtitle.append(f"{name}: {trained}" if several else trained)
    maps = [f"{entry['map']} ({name})" if several else entry["map"] for name, entry in about.items()]
    settings = {
        name: _entries(plain(about[name] | ({"options": side.trained["options"]} if side.trained else {})))
        for name, side in sides.items()
    }
    protocols = dict.fromkeys(protocol for side in sides.values() for protocol in side.results)
    template = string.Template(resources.files("attnkern").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(" against ".join(sides)),
        subtitle=html.escape("; ".join(subtitle)),
        numbers=shown,
        map=html.escape(
            f"Map: {', '.join(maps)}. The colours of each map run from its smallest to its largest value, unless it is "
            "nearly constant."
        ),
        pictures='<figure><img alt=""><figcaption></figcaption></figure>' * (1 + len(sides)),
        figures="".join(figures),
        protocols="".join(
            f"<details><summary>{html.escape(protocol)}</summary>"
            f"{_table({name: _entries(side.results.get(protocol, {})) for name, side in sides.items()})}</details>"
            for protocol in protocols
        ),
        settings=_table(settings),
        # Inside a script element, "</script" would end the element and "<!--" would start a comment.
        examples=json.dumps(_slides(sides, min(examples, len(subject.raw)))).replace("<", "\\u003c"),
    )
