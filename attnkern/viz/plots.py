"""Histograms of anchors and rectangles, and training curves."""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from attnkern._checks import check_count, check_flag, check_shape, check_tensor
from attnkern._extras import needs_extra
from attnkern.evaluation.anchors import check_counts, usage
from attnkern.viz._checks import check_finite
from attnkern.viz._style import LABEL_SIZE, TITLE_SIZE, add_title, apply_theme, find_theme, new_figure, wrap, write

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: A CSV file of a run, the files of a resumed run in order, or rows as ``csv.DictReader`` returns them.
Run = str | os.PathLike | Sequence[str | os.PathLike] | Sequence[Mapping[str, Any]]


def anchor_histogram(
    anchors: torch.Tensor,
    counts: torch.Tensor,
    *,
    title: str | None = None,
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """The share of values that each anchor replaces, over the anchors' values. Unused anchors are marked by crosses.

    Args:
        anchors: (Q,).
        counts: (Q,) how often each anchor was chosen, such as those of :class:`attnkern.nn.AnchorQuantizer`, or shares.
        title: text above.
        theme: "light" or "dark". Axes that are passed as ``ax`` keep their colours.
        ax: axes to draw on, instead of a new figure.

    Raises:
        ValueError, TypeError: anchors or counts of another shape or kind, or negative counts.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 9-10.
    """
    where = "anchor_histogram"
    theme = find_theme(where, theme)
    check_tensor(where, "anchors", anchors)
    check_shape(where, "anchors", anchors, "(Q,) with Q of at least 1", anchors.dim() == 1 and len(anchors) > 0)
    check_finite(where, "anchors", anchors)
    check_counts(where, counts)
    found = usage(counts)
    check_shape(where, "counts", counts, "({},) (Q as anchors)", counts.shape == anchors.shape, len(anchors))

    entries = list(zip(anchors.detach().cpu().double().tolist(), found.frequencies, strict=True))
    used = [(value, share) for value, share in entries if share > 0]
    unused = [value for value, share in entries if not share > 0]
    given, width = ax, 5.5
    if given is None:
        figure = new_figure(width, 3 + 0.3 * (title is not None))
        ax = figure.add_subplot()
    if used:
        values, shares = zip(*used, strict=True)
        ax.vlines(values, 0, shares, color=theme.colours[0], linewidth=1.5)
        label = f"{len(used)} of {len(entries)} in use, perplexity {found.perplexity:.1f}"
        ax.plot(values, shares, "o", color=theme.colours[0], markersize=4, label=label)
    if unused:
        label = f"{len(unused)} never chosen"
        style = {"markersize": 7, "markeredgewidth": 2, "clip_on": False, "zorder": 3}
        ax.plot(unused, [0] * len(unused), "x", color=theme.colours[1], label=label, **style)
    ax.set_ylim(bottom=0, top=None if used else 1)
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    ax.set_xlabel("value of the anchor", fontsize=TITLE_SIZE)
    ax.set_ylabel("share of the values", fontsize=TITLE_SIZE)
    ax.spines[["top", "right"]].set_visible(False)
    # Above the axes, where it covers no data.
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=LABEL_SIZE, borderaxespad=0.2)
    if title is not None:
        text = wrap(title, width, TITLE_SIZE + 1) if given is None else title
        write(ax.set_title, text, TITLE_SIZE + 1, pad=24)
    return ax.figure if given is not None else apply_theme(figure, theme)


def rectangle_histograms(
    rectangles: torch.Tensor,
    *,
    aspect: bool = False,
    bins: int = 20,
    title: str | None = None,
    theme: str = "light",
) -> Figure:
    """Histograms of the five parameters: centre row and column, half height and width, and angle from -90° to 90°.

    Args:
        rectangles: (N, 5) as in :func:`attnkern.window_map`, or (N, K, 5), whose windows are counted one by one.
        aspect: the value that the maps were drawn with, on which the unit of the half sizes depends.
        bins: of each histogram.
        title: text above.
        theme: "light" or "dark".

    Raises:
        ValueError, TypeError: rectangles of another shape or kind or not finite, or none; bins below 1; a flag that is
            not a bool.
    """
    where = "rectangle_histograms"
    theme = find_theme(where, theme)
    check_tensor(where, "rectangles", rectangles)
    ok = rectangles.dim() in (2, 3) and rectangles.shape[-1] == 5 and rectangles.numel() > 0
    check_shape(where, "rectangles", rectangles, "(N, 5) or (N, K, 5) with N and K of at least 1", ok)
    check_finite(where, "rectangles", rectangles)
    check_flag(where, aspect=aspect)
    check_count(where, bins=bins)
    row, column, height, width, angle = rectangles.detach().cpu().double().reshape(-1, 5).unbind(1)
    angle = torch.rad2deg((angle + math.pi / 2).remainder(math.pi) - math.pi / 2)
    sides = ("longer side", "longer side") if aspect else ("height", "width")
    panels = [
        ("centre row μ₁", "fraction of the height", row),
        ("centre column μ₂", "fraction of the width", column),
        ("half height σ₁", f"fraction of the {sides[0]}", height.abs()),
        ("half width σ₂", f"fraction of the {sides[1]}", width.abs()),
        ("angle α", "degrees", angle),
    ]
    figure = new_figure(11, 2.3 + 0.3 * (title is not None))
    axes = figure.subplots(1, 5, sharey=True)
    for ax, (name, unit, values) in zip(axes, panels, strict=True):
        low, high = (-90, 90) if unit == "degrees" else (min(0, values.min().item()), max(1, values.max().item()))
        ax.hist(values.numpy(), bins, range=(low, high), color=theme.colours[0])
        ax.set(xlim=(low, high))
        if unit == "degrees":
            ax.set_xticks([-90, -45, 0, 45, 90])
        ax.set_title(name, fontsize=TITLE_SIZE)
        ax.set_xlabel(unit, fontsize=LABEL_SIZE)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("images" if rectangles.dim() == 2 else "windows", fontsize=LABEL_SIZE)
    if title is not None:
        add_title(figure, title)
    return apply_theme(figure, theme)


_SPLITS = {"train": ":", "val": "-"}


def _rows(run) -> Iterable[Iterable[Mapping]]:
    """The rows of a run, one list per file."""
    if isinstance(run, (str, os.PathLike)):
        run = [run]
    if all(isinstance(part, Mapping) for part in run):
        return [run]
    parts = []
    for path in run:
        with open(path, newline="", encoding="utf-8") as file:
            parts.append(list(csv.DictReader(file)))
    return parts


def _by_epoch(run):
    """{metric: {epoch: mean of its rows}}. If two files have the same epoch, the later one counts."""
    found = {}
    for rows in _rows(run):
        gathered = {}
        for row in rows:
            for key in (f"{split}_{measure}" for split in _SPLITS for measure in ("accuracy", "loss")):
                if row.get(key) not in (None, "") and row.get("epoch") not in (None, ""):
                    gathered.setdefault(key, {}).setdefault(int(float(row["epoch"])), []).append(float(row[key]))
        for key, epochs in gathered.items():
            found.setdefault(key, {}).update({e: math.fsum(values) / len(values) for e, values in epochs.items()})
    return found


def training_curves(runs: Mapping[str, Run] | Run, *, title: str | None = None, theme: str = "light") -> Figure:
    """Accuracy and loss by epoch: dotted lines for the training set, solid lines for the validation set.

    Args:
        runs: {name: run}, or one run. A run is a CSV file of ``attnkern train`` (``csv/version_0/metrics.csv``), a list
            of such files of a resumed run in order, or a list of rows with ``epoch`` and ``train_accuracy``,
            ``train_loss``, ``val_accuracy`` or ``val_loss``.
        title: text above.
        theme: "light" or "dark".

    Raises:
        ValueError: a run without accuracies and losses.
        FileNotFoundError: no such file.
    """
    where = "training_curves"
    theme = find_theme(where, theme)
    if not isinstance(runs, Mapping):
        runs = {"": runs}
    figure = new_figure(9, 3.4 + 0.3 * (title is not None))
    axes = figure.subplots(1, 2)
    for k, (name, run) in enumerate(runs.items()):
        curves = _by_epoch(run)
        if not curves:
            raise ValueError(f"{where}: runs must have accuracies or losses by epoch, got none in {name or run!r}")
        style = {"color": theme.colours[k % len(theme.colours)], "marker": "os^D"[k // len(theme.colours) % 4]}
        for key, epochs in curves.items():
            split, _, measure = key.partition("_")
            epochs = dict(sorted(epochs.items()))
            label = f"{name} {split}" if name else split
            ax = axes[int(measure == "loss")]
            ax.plot(list(epochs), list(epochs.values()), _SPLITS[split], **style, markersize=3, label=label)
    for ax, measure in zip(axes, ("accuracy", "loss"), strict=True):
        ax.set_xlabel("epoch", fontsize=TITLE_SIZE)
        ax.set_title(measure, fontsize=TITLE_SIZE)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
    shown = max(axes, key=lambda ax: len(ax.lines))
    # The labels are passed, because a legend that matplotlib makes by itself omits names that begin with "_".
    labels = [line.get_label() for line in shown.lines]
    legend = figure.legend(shown.lines, labels, loc="outside right upper", frameon=False, fontsize=LABEL_SIZE)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        write(lambda label, text=text, **options: text.set(text=label, **options), label, LABEL_SIZE, color=theme.text)
    if title is not None:
        add_title(figure, title)
    return apply_theme(figure, theme)
