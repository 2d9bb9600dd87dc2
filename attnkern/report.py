"""One HTML page about a run: numbers, figures and examples. The page is self-contained and opens from disk."""

import base64
import html
import io
import json
import os
import string
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import attnkern
from attnkern import _backend, viz
from attnkern.evaluation.protocols import PROTOCOLS, NotApplicableError, Subject, choices, evaluate, plain
from attnkern.nn import AnchorQuantizer


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


def _table(entries: dict[str, Any]) -> str:
    """Nested entries as the rows of a table, with joined names; lists of more than five entries are left out."""
    rows = []

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, entry in value.items():
                walk([*prefix, str(key)], entry)
        elif not isinstance(value, list) or len(value) <= 5:
            values = value if isinstance(value, list) else [value]
            text = " ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
            rows.append(f"<tr><td>{html.escape(' · '.join(prefix))}</td><td>{html.escape(text)}</td></tr>")

    walk([], entries)
    return f"<table>{''.join(rows)}</table>"


def latency(network: torch.nn.Module, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median milliseconds of a forward pass and of its attention modules alone, by backend."""
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
                timer = Timer("call()", globals={"call": call})
                found.setdefault(what, {})[backend] = timer.blocked_autorange(min_run_time=0.3).median * 1e3
    return found


def _picture(*given, **options) -> str:
    """An overlay without a margin."""
    return _png(viz.overlay(*given, **options), bbox_inches="tight", pad_inches=0)


def _examples(subject, count):
    """Pictures and captions of ``count`` test images."""
    raw, labels = subject.raw[:count], subject.labels[:count]
    inputs = subject.normalise(raw.to(subject.device))
    with torch.no_grad():
        logits, maps = subject.predict(inputs)
        try:
            rectangles = subject.rectangles_of(inputs).cpu()[:, None]
            shape = subject.network.attention.shape
        except NotApplicableError:
            rectangles, shape = [None] * len(raw), "rectangle"
    nearest = any(isinstance(module, AnchorQuantizer) for module in subject.network.modules())
    names, examples = subject.class_names, []
    for index, (image, map) in enumerate(zip(raw, maps.cpu(), strict=True)):
        best = logits[index].argmax().item()
        probability = logits[index].softmax(0)[best].item()
        truth = subject.images.class_names[labels[index]]
        verdict = "correct" if names[best] == truth else f"wrong, it is {truth}"
        examples.append(
            {
                "image": _picture(image),
                "overlay": _picture(image, map, nearest=nearest, rectangle=rectangles[index], shape=shape),
                "caption": f"{index + 1} of {len(raw)}: {names[best]} ({probability:.0%}), {verdict}",
            }
        )
    return examples


def report(subject: Subject, run: str | os.PathLike, results: dict[str, Any] | None = None, examples: int = 24) -> str:
    """The HTML text of the page about a run.

    Args:
        subject: the trained network and its test images.
        run: folder of the run; its ``csv/`` and ``result.json`` are shown if they exist.
        results: results of :func:`attnkern.evaluation.protocols.evaluate`; None: all protocols are run now.
        examples: number of test images on the page.
    """
    run = Path(run)
    results = plain(evaluate(subject, PROTOCOLS) if results is None else results)
    trained = json.loads((run / "result.json").read_text(encoding="utf-8")) if (run / "result.json").is_file() else {}
    speed = latency(subject.network, subject.normalise(subject.raw[:32].to(subject.device)))

    numbers = {"top-1 accuracy": results.get("top1", {}).get("accuracy")}
    where = results.get("localisation", {})
    numbers |= {"pointing game": where.get("pointing"), "IoU with the box": where.get("iou_tight")}
    shown = [(f"{value:.3f}", name) for name, value in numbers.items() if value is not None]
    shown.append((f"{sum(p.numel() for p in subject.network.parameters()):,}", "parameters"))
    shown += [
        (f"{ms:.2f} ms", f"{what} of {len(subject.raw[:32])} images, {backend}")
        for what, times in speed.items()
        for backend, ms in times.items()
    ]

    figures = []
    curves = sorted(run.glob("csv/version_*/metrics.csv"))
    if curves:
        note = "Accuracy and loss by epoch. The last epoch counts: nothing was selected by the test curve."
        figures.append(_figure("Training", note, lambda theme: viz.training_curves(curves, theme=theme)))
    for name, entry in results.get("anchors", {}).items():
        if isinstance(entry, dict):
            values = torch.tensor(entry["values"])
            counts = (torch.tensor(entry["frequencies"]) * len(subject.raw) * subject.maps[0].numel()).round().long()
            note = f"{entry['used']} of {len(values)} anchors are used; the perplexity is {entry['perplexity']:.1f}."
            figures.append(
                _figure(
                    f"Anchors: {name}",
                    note,
                    lambda theme, values=values, counts=counts: viz.anchor_histogram(values, counts, theme=theme),
                )
            )
    try:
        with torch.no_grad():
            rectangles = subject.rectangles_of(subject.normalise(subject.raw.to(subject.device))).cpu()
        figures.append(
            _figure(
                "Rectangles",
                "Centres and half extents as fractions of the map's sides.",
                lambda theme: viz.rectangle_histograms(rectangles, theme=theme),
            )
        )
    except NotApplicableError:
        pass

    about = choices(subject)
    template = string.Template(resources.files("attnkern").joinpath("report.html").read_text(encoding="utf-8"))
    title = trained.get("recipe", run.name)
    subtitle = f"{about['data']['name']}, {about['images']} test images"
    if trained:
        subtitle += f"; {trained['epochs']} epochs, {trained['seconds']:.0f} s, seed {trained['seed']}"
    return template.substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        numbers="".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(n)}</span></div>" for v, n in shown),
        map=html.escape(
            f"Map: {about['map']}. The colours of each map run from its smallest to its largest value, unless it is "
            "nearly constant."
        ),
        figures="".join(figures),
        protocols="".join(
            f"<details><summary>{html.escape(name)}</summary>{_table(entry)}</details>"
            for name, entry in results.items()
        ),
        settings=_table(plain(about | ({"options": trained["options"]} if trained else {}))),
        # Inside a script element, "</script" would end the element and "<!--" would start a comment.
        examples=json.dumps(_examples(subject, examples)).replace("<", "\\u003c"),
    )
