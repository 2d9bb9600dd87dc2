"""Histograms of anchors and rectangles, and training curves."""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from attnkern._checks import check_count, check_flag, check_kind, check_shape, check_tensor
from attnkern._extras import needs_extra
from attnkern.evaluation.anchors import check_counts, usage
from attnkern.viz._checks import check_finite
from attnkern.viz._style import LABEL_SIZE, TITLE_SIZE, apply_theme, find_theme, new_figure, write

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: A CSV file of a run, several of one resumed run in order, or rows as ``csv.DictReader`` gives them.
Run = str | os.PathLike | Sequence[str | os.PathLike] | Sequence[Mapping[str, Any]]


def anchor_histogram(
    anchors: torch.Tensor,
    counts: torch.Tensor,
    *,
    title: str | None = None,
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """Anchors at their values, as high as their share of all choices; crosses are those that nothing chose.

    Args:
        anchors: (Q,).
        counts: (Q,) how often each was chosen, such as :class:`attnkern.nn.AnchorQuantizer`'s, or shares.
        title: text above.
        theme: "light" or "dark"; an ``ax`` of the caller's keeps its colours.
        ax: where to draw, instead of a new figure.

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
    check_shape(where, "counts", counts, "({},) (Q as anchors)", counts.shape == anchors.shape, len(anchors))
    check_kind(where, str | None, title=title)
    check_kind(where, Axes | None, ax=ax)
    found = usage(counts.detach().cpu())

    given, used = ax, [share > 0 for share in found.frequencies]
    values = anchors.detach().cpu().double().tolist()
    alive = [(value, share) for value, share in zip(values, found.frequencies, strict=True) if share > 0]
    dead = [value for value, lives in zip(values, used, strict=True) if not lives]
    if given is None:
        figure = new_figure(5.5, 3 + 0.3 * (title is not None))
        ax = figure.add_subplot()
    if alive:
        places, shares = zip(*alive, strict=True)
        ax.vlines(places, 0, shares, color=theme.colours[0], linewidth=1.5)
        label = f"{len(alive)} of {len(values)} in use, perplexity {found.perplexity:.1f}"
        ax.plot(places, shares, "o", color=theme.colours[0], markersize=4, label=label)
    if dead:
        label = f"{len(dead)} never chosen"
        dead_style = {"markersize": 7, "markeredgewidth": 2, "clip_on": False, "zorder": 3}
        ax.plot(dead, [0] * len(dead), "x", color=theme.colours[1], label=label, **dead_style)
    ax.set_ylim(bottom=0, top=None if alive else 1)
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    ax.set_xlabel("value of the anchor", fontsize=TITLE_SIZE)
    ax.set_ylabel("share of choices", fontsize=TITLE_SIZE)
    ax.spines[["top", "right"]].set_visible(False)
    # Above the axes, where no data is.
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=LABEL_SIZE, borderaxespad=0.2)
    if title is not None:
        write(ax.set_title, title, TITLE_SIZE + 1, pad=24)
    return ax.figure if given is not None else apply_theme(figure, theme)


def rectangle_histograms(
    rectangles: torch.Tensor,
    *,
    aspect: bool = False,
    bins: int = 20,
    title: str | None = None,
    theme: str = "light",
) -> Figure:
    """Five histograms: centre row and column, half height and width, and angle, as the half turn that it stands for.

    Args:
        rectangles: (N, 5) as in :func:`attnkern.window_map`.
        aspect: as the maps were made; it names the unit of the half sizes.
        bins: of each.
        title: text above.
        theme: "light" or "dark".

    Raises:
        ValueError, TypeError: rectangles of another shape or kind or not finite, or none.
    """
    where = "rectangle_histograms"
    theme = find_theme(where, theme)
    check_tensor(where, "rectangles", rectangles)
    ok = rectangles.dim() == 2 and rectangles.shape[1] == 5 and len(rectangles) > 0
    check_shape(where, "rectangles", rectangles, "(N, 5) with N of at least 1", ok)
    check_finite(where, "rectangles", rectangles)
    check_flag(where, aspect=aspect)
    check_count(where, bins=bins)
    check_kind(where, str | None, title=title)
    row, column, height, width, angle = rectangles.detach().cpu().double().unbind(1)
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
    axes[0].set_ylabel("images", fontsize=LABEL_SIZE)
    if title is not None:
        write(figure.suptitle, title, TITLE_SIZE + 1)
    return apply_theme(figure, theme)


_SPLITS = {"train": ":", "val": "-"}


def _rows(run) -> Iterable[Iterable[Mapping]]:
    """A run's rows, file by file."""
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
    """{metric: {epoch: mean of its rows}}; a later file's epoch takes the place of an earlier one's."""
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
    """Accuracy and loss by epoch, of the training set dotted, of the validation set solid.

    Args:
        runs: {name: run}, or one run: a CSV file that ``attnkern train`` wrote (``csv/version_0/metrics.csv``), several
            of one resumed run in order, or their rows, with ``epoch`` and ``train_`` and ``val_`` ``accuracy`` and
            ``loss``.
        title: text above.
        theme: "light" or "dark".

    Raises:
        ValueError, TypeError: a run without any of these, or one of another kind.
        FileNotFoundError: no such file.
    """
    where = "training_curves"
    theme = find_theme(where, theme)
    check_kind(where, str | None, title=title)
    if not isinstance(runs, Mapping):
        runs = {"": runs}
    for run in runs.values():
        check_kind(where, str | os.PathLike | Sequence, runs=run)
        for part in run if isinstance(run, Sequence) and not isinstance(run, str) else ():
            check_kind(where, str | os.PathLike | Mapping, runs=part)
    figure = new_figure(9, 3.4 + 0.3 * (title is not None))
    axes = figure.subplots(1, 2)
    for k, (name, run) in enumerate(runs.items()):
        curves = _by_epoch(run)
        if not curves:
            raise ValueError(f"{where}: runs must hold accuracies or losses by epoch, got none in {name or run!r}")
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
    # Names are given, since matplotlib leaves those that begin with "_" out of a legend that it makes itself.
    labels = [line.get_label() for line in shown.lines]
    legend = figure.legend(shown.lines, labels, loc="outside right upper", frameon=False, fontsize=LABEL_SIZE)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        write(lambda label, text=text, **options: text.set(text=label, **options), label, LABEL_SIZE, color=theme.text)
    if title is not None:
        write(figure.suptitle, title, TITLE_SIZE + 1)
    return apply_theme(figure, theme)
