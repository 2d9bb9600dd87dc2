"""Pictures of maps, rectangles and anchors with matplotlib: the papers' figures, to look at or to :func:`save`.

Nothing here goes through pyplot or changes matplotlib's settings or backend. ``theme`` is "light" or "dark", the page
that a figure is for. Titles, captions and names appear as they are written: ``$`` begins no mathematics, TeX is off,
and characters that matplotlib's font lacks come from another installed font, where one has them.
"""

import csv
import functools
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    from matplotlib import font_manager, rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Polygon
    from matplotlib.patheffects import withStroke
except ImportError as error:
    raise ImportError("attnkern.viz needs matplotlib: pip install attnkern[viz]") from error

from attnkern._checks import (
    check_choice,
    check_count,
    check_flag,
    check_items,
    check_kind,
    check_number,
    check_shape,
    check_size,
    check_tensor,
)
from attnkern.evaluation._inputs import Normalise, Predict, check_maps, identity
from attnkern.evaluation.anchors import check_counts, usage
from attnkern.evaluation.interpretability import _cosine
from attnkern.evaluation.localisation import rescale, upsample
from attnkern.evaluation.query import QueryDriven
from attnkern.evaluation.rectangles import (
    ORDERS,
    PADDINGS,
    descriptive_order,
    equivariance_distance,
    settings_of,
    transform_images,
    transform_rectangle,
)
from attnkern.window import rectangle_corners, window_map

__all__ = [
    "anchor_histogram",
    "equivariance_sequence",
    "grid",
    "levels",
    "occlusion_rows",
    "overlay",
    "query_pairs",
    "rectangle_histograms",
    "save",
    "sorted_corners",
    "training_curves",
]

#: A cell of :func:`grid`.
Cell = torch.Tensor | tuple | Mapping[str, Any] | None
#: A CSV file of a run, several of one resumed run in order, or rows as ``csv.DictReader`` gives them.
Run = str | os.PathLike | Sequence[str | os.PathLike] | Sequence[Mapping[str, Any]]


class _Theme(NamedTuple):
    background: str
    text: str
    colours: tuple[str, ...]  #: of lines and bars, after Okabe and Ito


_THEMES = {
    "light": _Theme("#ffffff", "#202020", ("#0072b2", "#d55e00", "#009e73", "#b35c8f", "#000000")),
    "dark": _Theme("#17181c", "#e6e6e6", ("#56b4e9", "#e69f00", "#00b383", "#e08fbf", "#f0e442")),
}
_DPI = 150
_TITLE, _LABEL = 9, 8


def _theme(where, name):
    check_choice(where, "theme", name, _THEMES)
    return _THEMES[name]


def _figure(width, height, layout="constrained"):
    return Figure(figsize=(width, height), dpi=_DPI, layout=layout)


def _paint(figure, theme):
    """All that is no data in the theme's colours."""
    figure.set_facecolor(theme.background)
    for text in figure.texts:
        text.set_color(theme.text)
    for ax in figure.axes:
        ax.set_facecolor(theme.background)
        ax.tick_params(which="both", colors=theme.text, labelsize=_LABEL)
        for item in (ax.title, ax.xaxis.label, ax.yaxis.label):
            item.set_color(theme.text)
        for spine in ax.spines.values():
            spine.set_color(theme.text)
        if legend := ax.get_legend():
            for text in legend.get_texts():
                text.set_color(theme.text)
    return figure


def _wrap(text, inches, size):
    """``text`` in lines that fit, where a character is some 0.6 of the font's size wide."""
    letters = max(4, int(inches * 72 / (0.6 * size)))
    return "\n".join(textwrap.fill(line, letters) for line in str(text).split("\n"))


def _write(put, text, size, **options):
    """Give ``text`` to one of matplotlib's methods so that it appears as it is: no mathematics between $, no TeX."""
    # A file name that is not in the system's encoding holds halves of characters, which no font has.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    fonts = _fonts_for(frozenset(text), tuple(rcParams["font.family"]))
    return put(text, fontsize=size, parse_math=False, usetex=False, fontfamily=fonts, **options)


@functools.lru_cache(256)
def _fonts_for(characters, families):
    """``families``, and installed ones for the characters that these lack, such as Chinese ones."""

    def has(path, character):
        try:
            return font_manager.get_font(path).get_char_index(ord(character)) != 0
        except (OSError, RuntimeError):  # a file that matplotlib cannot read
            return False

    found = list(families)
    usual = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    for character in sorted(characters):
        if character.isspace() or any(has(path, character) for path in usual):
            continue
        for font in font_manager.fontManager.ttflist:
            regular = font.style == "normal" and font.weight in (400, "normal", "regular")
            # The last resort is a font of boxes.
            if regular and not font.name.startswith("Last Resort") and has(font.fname, character):
                found.append(font.name)
                usual.append(font.fname)
                break
    return found


def _check_finite(where, name, tensor):
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")


def _check_image(where, name, image):
    check_tensor(where, name, image)
    ok = image.dim() == 3 and image.shape[0] in (1, 3) and 0 not in image.shape
    check_shape(where, name, image, "(3, H, W) or (1, H, W) with H and W of at least 1", ok)
    low, high = image.min().item(), image.max().item()
    # Interpolation and half precision may round a little beyond.
    if not (low >= -0.01 and high <= 1.01):
        raise ValueError(f"{where}: {name} must lie in [0, 1], not normalised, got {low:.3g} to {high:.3g}")


def _check_images(where, name, images):
    check_tensor(where, name, images)
    ok = images.dim() == 4 and len(images) > 0
    check_shape(where, name, images, "(N, C, H, W) with N of at least 1", ok)


def _check_as_images(where, name, tensor, images, expected, rest=None):
    """Raise unless ``tensor`` holds one entry, of shape ``rest`` where that is given, for each of the images."""
    check_tensor(where, name, tensor)
    ok = tensor.dim() > 0 and len(tensor) == len(images) and (rest is None or tensor.shape[1:] == rest)
    check_shape(where, name, tensor, expected, ok, len(images))


# --- a map on an image -----------------------------------------------------------------------------------------------


def _corners(rectangle, cells, size, aspect):
    """Corners of rectangles on a map of ``cells`` (h, w), in the pixels of an image of ``size`` (H, W): (K, 4, 2).

    A coordinate t runs over the cells' centres: the cell t(h-1), whose centre lies at (t(h-1) + ½)/h of the height.
    """
    corners = rectangle_corners(rectangle, cells, aspect=aspect)
    cells, size = corners.new_tensor(cells), corners.new_tensor(size)
    return (corners + 0.5) / cells * size - 0.5


def _draw(
    where,
    ax,
    image,
    map=None,
    rectangle=None,
    *,
    alpha=0.5,
    nearest=False,
    limit=None,
    aspect=False,
    cmap=None,
    title=None,
    caption=None,
    inches=None,
):
    _check_image(where, "image", image)
    check_flag(where, nearest=nearest, aspect=aspect)
    check_kind(where, str | None, cmap=cmap, title=title, caption=caption)
    check_number(where, alpha=alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{where}: alpha must be a number from 0 to 1, got {alpha!r}")
    if limit is not None:
        check_number(where, limit=limit)
        if not 0 < limit < math.inf:
            raise ValueError(f"{where}: limit must be None or positive and finite, got {limit!r}")
    height, width = cells = image.shape[1:]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    picture = image.detach().cpu().float().clamp(0, 1).expand(3, -1, -1)
    ax.imshow(picture.permute(1, 2, 0).numpy(), extent=extent, aspect="equal")
    if map is not None:
        check_tensor(where, "map", map)
        ok = map.dim() == 2 and 0 not in map.shape
        check_shape(where, "map", map, "(h, w) with h and w of at least 1", ok)
        _check_finite(where, "map", map)
        cells = map.shape
        shown = map.detach().cpu()[None]
        shown = shown.float() if nearest else upsample(shown, (height, width))
        low, high = (0, 1) if limit is None else (-limit, limit)
        ax.imshow(
            (rescale(shown) if limit is None else shown)[0].numpy(),
            extent=extent,
            aspect="equal",
            cmap=cmap or ("viridis" if limit is None else "RdBu_r"),
            vmin=low,
            vmax=high,
            alpha=alpha,
            interpolation="nearest" if nearest else "auto",
        )
    if rectangle is not None:
        check_tensor(where, "rectangle", rectangle)
        ok = rectangle.dim() in (1, 2) and rectangle.shape[-1] == 5
        check_shape(where, "rectangle", rectangle, "(5,) or (K, 5)", ok)
        _check_finite(where, "rectangle", rectangle)
        found = _corners(rectangle.detach().cpu().view(-1, 5), tuple(cells), (height, width), aspect)
        for k, corners in enumerate(found.flip(2).tolist()):
            # Bright lines edged with black stand out from any picture.
            ax.add_patch(
                Polygon(
                    corners,
                    fill=False,
                    edgecolor="#ffffff" if k == 0 else "#ffb000",
                    linestyle="-" if k == 0 else (0, (3, 2)),
                    linewidth=1.5,
                    path_effects=[withStroke(linewidth=3, foreground="black")],
                )
            )
    ax.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
    ax.spines[:].set_visible(False)
    for text, size, put in ((title, _TITLE, ax.set_title), (caption, _LABEL, ax.set_xlabel)):
        if text is not None:
            _write(put, _wrap(text, inches, size) if inches else text, size)


def overlay(
    image: torch.Tensor,
    map: torch.Tensor | None = None,
    *,
    alpha: float = 0.5,
    nearest: bool = False,
    limit: float | None = None,
    rectangle: torch.Tensor | None = None,
    aspect: bool = False,
    cmap: str | None = None,
    title: str | None = None,
    caption: str | None = None,
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """An image with a map over it, and rectangles where the map has them.

    The map is spread over the image as in :func:`attnkern.evaluation.upsample`: its h x w cells tile the image. A
    rectangle's coordinates run over the cells' centres, so that t lies at the pixel ((t(h-1) + ½)/h)·H - ½.

    Args:
        image: (3, H, W) or (1, H, W) in [0, 1].
        map: (h, w), or None for the image alone; its minimum and maximum take the ends of the colours.
        alpha: opacity of the map.
        nearest: show the cells as they are, for quantized maps; otherwise bilinear.
        limit: the colours run from -limit to limit instead, diverging from 0: for differences.
        rectangle: (5,) as in :func:`attnkern.window_map`, or (K, 5): the first is solid, the others are dashed.
            Without a map the image's own pixels are the cells.
        aspect: as the map was made: False draws the parallelogram that it has on a grid with h ≠ w, True the rectangle
            that is rigid on the grid.
        cmap: name of a colour map of matplotlib's, by default "viridis", with ``limit`` "RdBu_r".
        title, caption: text above and below.
        theme: "light" or "dark"; an ``ax`` of the caller's keeps its colours.
        ax: where to draw, instead of a new figure.

    Returns:
        the figure, new or that of ``ax``.

    Raises:
        ValueError, TypeError: tensors of another shape or kind or not finite, an image beyond [0, 1], or an unknown
            option.
    """
    where = "overlay"
    theme = _theme(where, theme)
    check_kind(where, Axes | None, ax=ax)
    options = {
        "alpha": alpha,
        "nearest": nearest,
        "limit": limit,
        "aspect": aspect,
        "cmap": cmap,
        "title": title,
        "caption": caption,
    }
    if ax is not None:
        _draw(where, ax, image, map, rectangle, **options)
        return ax.figure
    _check_image(where, "image", image)
    height, width = _fitted(image, 4.0)
    figure = _figure(width, height + 0.3 * (title is not None) + 0.3 * (caption is not None))
    _draw(where, figure.add_subplot(), image, map, rectangle, **options, inches=width)
    return _paint(figure, theme)


def _fitted(image, inches):
    """Height and width of a picture whose longer side has so many inches; the shorter has at least a quarter."""
    longest = max(image.shape[1:])
    return tuple(inches * max(length / longest, 0.25) for length in image.shape[1:])


# --- grids -----------------------------------------------------------------------------------------------------------


def _cell(where, cell):
    """Positional and named arguments of :func:`_draw`, or None for an empty cell."""
    if cell is None:
        return None
    if isinstance(cell, torch.Tensor):
        return (cell,), {}
    if isinstance(cell, tuple) and 1 <= len(cell) <= 3:
        return cell, {}
    if isinstance(cell, Mapping) and "image" in cell:
        unknown = set(cell) - set(_CELL)
        if unknown:
            raise ValueError(f"{where} must have keys of {', '.join(_CELL)}, got {', '.join(sorted(unknown))}")
        return (), dict(cell)
    came = f"a tuple of {len(cell)}" if isinstance(cell, tuple) else type(cell).__name__
    raise TypeError(f"{where} must be an image, (image, map), (image, map, rectangle), a dict or None, got {came}")


#: What a cell's dict may hold.
_CELL = ("image", "map", "rectangle", "alpha", "nearest", "limit", "aspect", "cmap", "title", "caption")


def grid(
    rows: Sequence[Sequence[Cell]],
    *,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str | None = None,
    alpha: float = 0.5,
    nearest: bool = False,
    aspect: bool = False,
    cmap: str | None = None,
    inches: float = 1.6,
    theme: str = "light",
) -> Figure:
    """Overlays in rows and columns: over layers, models, transformations.

    Args:
        rows: of cells: an image, (image, map), (image, map, rectangle), a dict of :func:`overlay`'s arguments without
            ``theme`` and ``ax``, or None for an empty one. A row may be shorter than others.
        row_titles: one for each row, at the left.
        column_titles: one for each column, at the top; a cell's own title wins.
        title: above all.
        alpha, nearest, aspect, cmap: as in :func:`overlay`, where a dict does not say otherwise.
        inches: width of a cell.
        theme: "light" or "dark".

    Raises:
        ValueError, TypeError: no cell, titles of another number, or a cell that :func:`overlay` refuses.
    """
    where = "grid"
    theme = _theme(where, theme)
    check_kind(where, str | None, title=title)
    check_number(where, inches=inches)
    check_kind(where, Sequence, rows=rows)
    for row in rows:
        check_kind(where, Sequence, rows=row)
    if not inches > 0:
        raise ValueError(f"{where}: inches must be positive, got {inches!r}")
    rows = [[_cell(f"{where}: rows[{i}][{j}]", cell) for j, cell in enumerate(row)] for i, row in enumerate(rows)]
    columns = max(map(len, rows), default=0)
    if not any(cell for row in rows for cell in row):
        raise ValueError(f"{where}: rows must hold at least one cell, got none")
    for name, titles, count in (("row_titles", row_titles, len(rows)), ("column_titles", column_titles, columns)):
        if titles is not None:
            check_items(where, str, **{name: titles})
            if len(titles) != count:
                raise ValueError(f"{where}: {name} must be {count} titles, got {len(titles)}")

    heights = []
    for i, row in enumerate(rows):
        ratios = [1e-3]
        for j, cell in enumerate(row):
            if cell:
                image = cell[0][0] if cell[0] else cell[1]["image"]
                _check_image(f"{where}: rows[{i}][{j}]", "image", image)
                ratios.append(image.shape[1] / image.shape[2])
        captions = [str(cell[1].get("caption") or "") for cell in row if cell]
        lines = max((_wrap(text, inches, _LABEL).count("\n") + 1 for text in captions if text), default=0)
        heights.append(inches * max(ratios) + 0.16 * lines + 0.1)
    left = 0.0 if row_titles is None else 1.1
    top = (0.4 if column_titles is not None else 0.1) + (0.4 if title is not None else 0)
    figure = _figure(columns * (inches + 0.08) + left, sum(heights) + top, "compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    defaults = {"alpha": alpha, "nearest": nearest, "aspect": aspect, "cmap": cmap}
    for i, row in enumerate(rows):
        for j, (ax, cell) in enumerate(zip_longest(axes[i], row)):
            if cell:
                _draw(f"{where}: rows[{i}][{j}]", ax, *cell[0], **defaults | cell[1], inches=inches)
            else:
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            if i == 0 and column_titles is not None and not ax.get_title():
                _write(ax.set_title, _wrap(column_titles[j], inches, _TITLE), _TITLE)
            if j == 0 and row_titles is not None:
                text = _wrap(row_titles[i], 1.0, _TITLE)
                _write(ax.set_ylabel, text, _TITLE, rotation=0, ha="right", va="center")
    if title is not None:
        _write(figure.suptitle, _wrap(title, figure.get_figwidth(), _TITLE + 1), _TITLE + 1)
    return _paint(figure, theme)


def levels(images: torch.Tensor, maps: Mapping[str, torch.Tensor], **options: Any) -> Figure:
    """A row an image: the image, then each of its maps over it, such as those of a network's levels or of networks.

    Args:
        images: (N, C, H, W) in [0, 1].
        maps: {name: (N, h, w)}, such as :func:`attnkern.models.attention_maps` returns.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: images or maps of another shape or kind, or what :func:`grid` refuses.
    """
    where = "levels"
    _check_images(where, "images", images)
    check_kind(where, Mapping, maps=maps)
    for name, of_name in maps.items():
        check_maps(where, f"maps[{name!r}]", of_name)
        _check_as_images(where, f"maps[{name!r}]", of_name, images, "({}, h, w) (N as images)")
    rows = [[image, *((image, of_name[i]) for of_name in maps.values())] for i, image in enumerate(images)]
    return grid(rows, **{"column_titles": ["image", *maps]} | options)


@torch.no_grad()
def occlusion_rows(
    images: torch.Tensor,
    modified: Mapping[str, torch.Tensor],
    predict: Predict,
    *,
    normalise: Normalise = identity,
    **options: Any,
) -> Figure:
    """A row an image: its map, then that of each modification; below, their cosine and whether the prediction stays.

    Args:
        images: (N, C, H, W) raw, in [0, 1].
        modified: {title: (N, C, H, W)}, such as :func:`attnkern.evaluation.occlude` and
            :func:`attnkern.evaluation.frequency` return.
        predict: from normalised images to logits and a map; see :func:`attnkern.evaluation.attention_of`.
        normalise: applied to all images before ``predict``.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: images or maps of another shape or kind, or what :func:`grid` refuses.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.4.
    """
    where = "occlusion_rows"
    _check_images(where, "images", images)
    check_kind(where, Mapping, modified=modified)
    check_kind(where, Callable, predict=predict, normalise=normalise)
    for title, changed in modified.items():
        expected = f"{tuple(images.shape)} (as images)"
        _check_as_images(where, f"modified[{title!r}]", changed, images, expected, images.shape[1:])
    logits, maps = predict(normalise(images))
    check_maps(where, "predict's map", maps)
    rows = [[(image, map)] for image, map in zip(images, maps, strict=True)]
    for changed in modified.values():
        changed_logits, changed_maps = predict(normalise(changed))
        check_maps(where, "predict's map", changed_maps)
        cosines = _cosine(maps, changed_maps, False).tolist()
        stays = (logits.argmax(1) == changed_logits.argmax(1)).tolist()
        for row, image, map, cosine, same in zip(rows, changed, changed_maps, cosines, stays, strict=True):
            caption = f"cosine {cosine:.2f}\n{'same' if same else 'other'} prediction"
            row.append({"image": image, "map": map, "caption": caption})
    return grid(rows, **{"column_titles": ["image", *modified]} | options)


@torch.no_grad()
def equivariance_sequence(
    image: torch.Tensor,
    rectangles_of: Callable[[torch.Tensor], torch.Tensor],
    size: tuple[int, int],
    *,
    angles: Sequence[float] = (-math.pi / 6, -math.pi / 12, math.pi / 12, math.pi / 6),
    scales: Sequence[float] = (0.8, 0.9, 1.1, 1.2),
    shifts: Sequence[tuple[float, float]] = ((-0.1, 0.0), (0.1, 0.0), (0.0, -0.1), (0.0, 0.1)),
    aspect: bool = False,
    padding: str = "zeros",
    normalise: Normalise = identity,
    **options: Any,
) -> Figure:
    """An image turned, scaled and shifted, a row each, with its rectangle, and dashed where equivariance wants it.

    Below each the :func:`attnkern.evaluation.equivariance_distance` of the two. The settings are those of
    :func:`attnkern.evaluation.equivariance_errors`.

    Args:
        image: (C, H, W) raw, in [0, 1].
        rectangles_of: from normalised images to rectangles (N, 5).
        size: (h, w) of the features whose map the rectangles draw.
        angles, scales, shifts: as in :func:`attnkern.evaluation.transform_rectangle`.
        aspect: of the maps; True also turns rigidly in the image's pixels.
        padding: as in :func:`attnkern.evaluation.transform_images`.
        normalise: applied to all images before ``rectangles_of``.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: an image or rectangles of another shape or kind, or what :func:`grid` refuses.

    Source: Convolutional Rectangular Attention Module, Sections 4.4 and 6.4.
    """
    where = "equivariance_sequence"
    _check_image(where, "image", image)
    check_kind(where, Callable, rectangles_of=rectangles_of, normalise=normalise)
    size = check_size(where, size)
    angles, scales, shifts = settings_of(where, angles, scales, shifts)
    check_flag(where, aspect=aspect)
    check_choice(where, "padding", padding, PADDINGS)
    plan = {
        "rotation": [({"angle": angle}, f"{math.degrees(angle):+.0f}°") for angle in angles],
        "scale": [({"scale": scale}, f"× {scale:g}") for scale in scales],
        "shift": [({"shift": shift}, f"{shift[0]:+g} down, {shift[1]:+g} right") for shift in shifts],
    }
    plan = {kind: settings for kind, settings in plan.items() if settings}
    settings = [setting for of_kind in plan.values() for setting, _ in of_kind]
    moved = [transform_images(image[None], **setting, aspect=aspect, padding=padding) for setting in settings]
    images = torch.cat([image[None], *moved])
    found = rectangles_of(normalise(images)).detach().cpu()
    expected = "({}, 5) (N as images)"
    _check_as_images(where, "rectangles_of's result", found, images, expected, (5,))
    found = found.float()
    maps = window_map(found, tuple(size), aspect=aspect)

    original, rows, entry = (image, maps[0], found[0]), [], 1
    for of_kind in plan.values():
        row = [original]
        for setting, text in of_kind:
            wanted = transform_rectangle(found[:1], **setting, size=image.shape[1:] if aspect else None)
            distance = equivariance_distance(found[entry : entry + 1], wanted).item()
            cell = {"image": images[entry], "map": maps[entry], "caption": f"{text}\ndistance {distance:.2g}"}
            row.append(cell | {"rectangle": torch.stack((found[entry], wanted[0]))})
            entry += 1
        rows.append(row)
    title = "solid: the rectangle found; dashed: the original's, transformed"
    defaults = {"row_titles": list(plan) or None, "title": title, "aspect": aspect}
    return grid(rows or [[original]], **defaults | options)


def query_pairs(targets: torch.Tensor, query: torch.Tensor, result: QueryDriven, **options: Any) -> Figure:
    """A row a target: its attention under its own global vector and under the query image's, and the relative change.

    Red is more, blue less; the colours of the change end at the largest one, at most 100 %, which stands below.

    Args:
        targets: (N, C, H, W) in [0, 1].
        query: (C, H, W) or (1, C, H, W) in [0, 1].
        result: of :func:`attnkern.evaluation.query_driven`.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: images or maps of another shape or kind, or what :func:`grid` refuses.

    Source: Learn to Pay Attention, Appendix A.5 and Figure 10.
    """
    where = "query_pairs"
    _check_images(where, "targets", targets)
    check_tensor(where, "query", query)
    ok = query.dim() == 3 or (query.dim() == 4 and len(query) == 1)
    check_shape(where, "query", query, "(C, H, W) or (1, C, H, W)", ok)
    check_kind(where, QueryDriven, result=result)
    for name, maps in zip(result._fields, result, strict=True):
        check_maps(where, f"result.{name}", maps)
        _check_as_images(where, f"result.{name}", maps, targets, "({}, h, w) (N as targets)")
    for name in ("own", "queried"):
        _check_finite(where, f"result.{name}", getattr(result, name))
    rows = []
    for i, (target, own, queried, change) in enumerate(zip(targets, *result, strict=True)):
        limit = min(change.abs().max().item(), 1.0)
        caption = f"up to ±{limit:.0%}" if limit else "no change"
        limit = limit or 1.0
        # Infinite where the target's own attention is 0.
        changed = {"image": target, "map": change.clamp(-limit, limit), "limit": limit, "caption": caption}
        first = query.view(query.shape[-3:]) if i == 0 else None
        rows.append([first, target, (target, own), (target, queried), changed])
    titles = ["query", "target", "own attention", "under the query", "change"]
    return grid(rows, **{"column_titles": titles} | options)


def sorted_corners(
    images: torch.Tensor, maps: torch.Tensor, rectangles: torch.Tensor, by: str, *, count: int = 4, **options: Any
) -> Figure:
    """The first and the last images by a parameter of their rectangles, with its place in the batch below each.

    Args:
        images: (N, C, H, W) in [0, 1].
        maps: (N, h, w).
        rectangles: (N, 5) as in :func:`attnkern.window_map`.
        by: as in :func:`attnkern.evaluation.descriptive_order`.
        count: images at each end.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: tensors of another shape or kind, an unknown ``by``, or what :func:`grid` refuses.

    Source: Convolutional Rectangular Attention Module, Section 6.5.
    """
    where = "sorted_corners"
    _check_images(where, "images", images)
    check_maps(where, "maps", maps)
    _check_as_images(where, "maps", maps, images, "({}, h, w) (N as images)")
    _check_as_images(where, "rectangles", rectangles, images, "({}, 5) (N as images)", (5,))
    check_choice(where, "by", by, ORDERS)
    check_count(where, count=count)
    order = descriptive_order(rectangles, by).tolist()
    rows = [
        [{"image": images[i], "map": maps[i], "rectangle": rectangles[i], "caption": f"image {i}"} for i in ends]
        for ends in (order[:count], order[-count:])
    ]
    return grid(rows, **{"row_titles": [f"least {by}", f"most {by}"]} | options)


# --- plots -----------------------------------------------------------------------------------------------------------


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
    theme = _theme(where, theme)
    check_tensor(where, "anchors", anchors)
    check_shape(where, "anchors", anchors, "(Q,) with Q of at least 1", anchors.dim() == 1 and len(anchors) > 0)
    _check_finite(where, "anchors", anchors)
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
        figure = _figure(5.5, 3 + 0.3 * (title is not None))
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
    ax.set_xlabel("value of the anchor", fontsize=_TITLE)
    ax.set_ylabel("share of choices", fontsize=_TITLE)
    ax.spines[["top", "right"]].set_visible(False)
    # Above the axes, where no data is.
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=_LABEL, borderaxespad=0.2)
    if title is not None:
        _write(ax.set_title, title, _TITLE + 1, pad=24)
    return ax.figure if given is not None else _paint(figure, theme)


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
    theme = _theme(where, theme)
    check_tensor(where, "rectangles", rectangles)
    ok = rectangles.dim() == 2 and rectangles.shape[1] == 5 and len(rectangles) > 0
    check_shape(where, "rectangles", rectangles, "(N, 5) with N of at least 1", ok)
    _check_finite(where, "rectangles", rectangles)
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
    figure = _figure(11, 2.3 + 0.3 * (title is not None))
    axes = figure.subplots(1, 5, sharey=True)
    for ax, (name, unit, values) in zip(axes, panels, strict=True):
        low, high = (-90, 90) if unit == "degrees" else (min(0, values.min().item()), max(1, values.max().item()))
        ax.hist(values.numpy(), bins, range=(low, high), color=theme.colours[0])
        ax.set(xlim=(low, high))
        if unit == "degrees":
            ax.set_xticks([-90, -45, 0, 45, 90])
        ax.set_title(name, fontsize=_TITLE)
        ax.set_xlabel(unit, fontsize=_LABEL)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("images", fontsize=_LABEL)
    if title is not None:
        _write(figure.suptitle, title, _TITLE + 1)
    return _paint(figure, theme)


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
    theme = _theme(where, theme)
    check_kind(where, str | None, title=title)
    if not isinstance(runs, Mapping):
        runs = {"": runs}
    for run in runs.values():
        check_kind(where, str | os.PathLike | Sequence, runs=run)
        for part in run if isinstance(run, Sequence) and not isinstance(run, str) else ():
            check_kind(where, str | os.PathLike | Mapping, runs=part)
    figure = _figure(9, 3.4 + 0.3 * (title is not None))
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
        ax.set_xlabel("epoch", fontsize=_TITLE)
        ax.set_title(measure, fontsize=_TITLE)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
    shown = max(axes, key=lambda ax: len(ax.lines))
    # Names are given, since matplotlib leaves those that begin with "_" out of a legend that it makes itself.
    labels = [line.get_label() for line in shown.lines]
    legend = figure.legend(shown.lines, labels, loc="outside right upper", frameon=False, fontsize=_LABEL)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        _write(lambda label, text=text, **options: text.set(text=label, **options), label, _LABEL, color=theme.text)
    if title is not None:
        _write(figure.suptitle, title, _TITLE + 1)
    return _paint(figure, theme)


# --- files -----------------------------------------------------------------------------------------------------------


def save(figure: Figure, path: str | os.PathLike, *, dpi: float | None = None) -> None:
    """Write a figure as PNG or SVG, by the path's suffix. An error leaves what was there before.

    Args:
        figure: of any function here.
        path: ends in .png or .svg; its folder exists.
        dpi: pixels per inch, by default the figure's.

    Raises:
        ValueError, TypeError: another suffix, or an argument of another kind.
        OSError: the file cannot be written.
    """
    check_kind("save", Figure, figure=figure)
    check_kind("save", str | os.PathLike, path=path)
    if dpi is not None:
        check_number("save", dpi=dpi)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise ValueError(f"save: path must end in .png or .svg, got '{path}'")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # The figure's background, whatever matplotlib's settings say.
        options = {"facecolor": figure.get_facecolor(), "transparent": False, "bbox_inches": None}
        figure.savefig(part, format=suffix[1:], dpi=dpi or figure.dpi, **options)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
