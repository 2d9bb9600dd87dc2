"""Overlays in rows and columns: levels, networks, modified images, transformations, queries."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from attnkern._checks import (
    check_count,
    check_kind,
    check_shape,
    check_size,
    check_tensor,
)
from attnkern._extras import needs_extra
from attnkern.evaluation.inputs import Normalise, Predict, check_maps, identity
from attnkern.evaluation.interpretability import map_cosines
from attnkern.evaluation.query import QueryDriven
from attnkern.evaluation.rectangles import (
    descriptive_order,
    equivariance_distance,
    settings_of,
    transform_images,
    transform_rectangle,
)
from attnkern.viz._checks import check_finite, check_image, check_one_per_image, check_positive
from attnkern.viz._style import LABEL_SIZE, TITLE_SIZE, add_title, apply_theme, find_theme, new_figure, wrap, write
from attnkern.viz.overlays import draw_overlay
from attnkern.window import window_map

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.figure import Figure

#: A cell of :func:`grid`.
Cell = torch.Tensor | tuple | Mapping[str, Any] | None
#: The keys that the dict of a cell may have.
_CELL_KEYS = ("image", "map", "rectangle", "alpha", "nearest", "limit", "aspect", "shape", "cmap", "title", "caption")


def grid(
    rows: Sequence[Sequence[Cell]],
    *,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str | None = None,
    alpha: float = 0.5,
    nearest: bool = False,
    aspect: bool = False,
    shape: str = "rectangle",
    cmap: str | None = None,
    inches: float = 1.6,
    theme: str = "light",
) -> Figure:
    """Overlays in rows and columns.

    Args:
        rows: of cells. A cell is an image, (image, map), (image, map, rectangle), a dict of :func:`overlay`'s arguments
            without ``theme`` and ``ax``, or None for an empty cell. Rows may differ in length.
        row_titles: one for each row, at the left.
        column_titles: one for each column, at the top, unless the first cell of the column has its own title.
        title: above the grid.
        alpha, nearest, aspect, shape, cmap: defaults for the cells, as in :func:`overlay`.
        inches: width of a cell.
        theme: "light" or "dark".

    Raises:
        ValueError, TypeError: no cell, a number of titles that does not match, a width that is not positive and finite,
            or a cell that :func:`overlay` refuses.
    """
    where = "grid"
    theme = find_theme(where, theme)
    check_positive(where, inches=inches)
    rows = [[_cell(f"{where}: rows[{i}][{j}]", cell) for j, cell in enumerate(row)] for i, row in enumerate(rows)]
    columns = max(map(len, rows), default=0)
    if not any(cell for row in rows for cell in row):
        raise ValueError(f"{where}: rows must have at least one cell, got none")
    for name, titles, count in (("row_titles", row_titles, len(rows)), ("column_titles", column_titles, columns)):
        if titles is not None and (isinstance(titles, str) or len(titles) != count):
            got = repr(titles) if isinstance(titles, str) else len(titles)
            raise ValueError(f"{where}: {name} must be {count} titles, got {got}")

    heights = []
    for i, row in enumerate(rows):
        ratios = [1e-3]
        for j, cell in enumerate(row):
            if cell:
                check_image(f"{where}: rows[{i}][{j}]", "image", cell["image"])
                ratios.append(cell["image"].shape[1] / cell["image"].shape[2])
        text = 0.0
        for name, size in (("title", TITLE_SIZE), ("caption", LABEL_SIZE)):
            text += 0.16 * _lines([cell[name] for cell in row if cell and cell.get(name)], inches, size)
        heights.append(inches * max(ratios) + text + 0.1)
    left = 0.0 if row_titles is None else 1.1
    width = columns * (inches + 0.08) + left
    top = 0.1 + 0.16 * _lines(column_titles or [], inches, TITLE_SIZE) + (0.0 if column_titles is None else 0.1)
    top += 0.0 if title is None else 0.15 + 0.18 * _lines([title], width, TITLE_SIZE + 1)
    figure = new_figure(width, sum(heights) + top, "compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    defaults = {"alpha": alpha, "nearest": nearest, "aspect": aspect, "shape": shape, "cmap": cmap}
    for i, row in enumerate(rows):
        for j, (ax, cell) in enumerate(zip_longest(axes[i], row)):
            if cell:
                draw_overlay(f"{where}: rows[{i}][{j}]", ax, **defaults | cell, inches=inches)
            else:
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            if i == 0 and column_titles is not None and not ax.get_title():
                write(ax.set_title, wrap(column_titles[j], inches, TITLE_SIZE), TITLE_SIZE)
            if j == 0 and row_titles is not None:
                text = wrap(row_titles[i], 1.0, TITLE_SIZE)
                write(ax.set_ylabel, text, TITLE_SIZE, rotation=0, ha="right", va="center")
    if title is not None:
        add_title(figure, title)
    return apply_theme(figure, theme)


def _cell(where, cell):
    """The arguments of :func:`draw_overlay` for a cell, or None for an empty cell."""
    if cell is None:
        return None
    if isinstance(cell, torch.Tensor):
        return {"image": cell}
    if isinstance(cell, tuple) and 1 <= len(cell) <= 3:
        return dict(zip(_CELL_KEYS, cell, strict=False))
    if isinstance(cell, Mapping) and "image" in cell:
        unknown = set(cell) - set(_CELL_KEYS)
        if unknown:
            raise ValueError(f"{where} must have keys of {', '.join(_CELL_KEYS)}, got {', '.join(sorted(unknown))}")
        return dict(cell)
    got = f"a tuple of {len(cell)}" if isinstance(cell, tuple) else type(cell).__name__
    raise TypeError(f"{where} must be an image, (image, map), (image, map, rectangle), a dict or None, got {got}")


def _lines(texts, inches, size):
    """The number of lines of the longest text."""
    return max((wrap(text, inches, size).count("\n") + 1 for text in texts), default=0)


def levels(images: torch.Tensor, maps: Mapping[str, torch.Tensor], **options: Any) -> Figure:
    """One row per image: the image, then each of its maps over it. The maps may be of several levels or networks.

    Args:
        images: (N, C, H, W) in [0, 1].
        maps: {name: (N, h, w)}, such as :func:`attnkern.models.attention_maps` returns.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: images or maps of another shape or kind, or what :func:`grid` refuses.
    """
    where = "levels"
    check_kind(where, Mapping, maps=maps)
    for name, of_name in maps.items():
        check_maps(where, f"maps[{name!r}]", of_name)
        check_one_per_image(where, f"maps[{name!r}]", of_name, images, "({}, h, w) (N as images)")
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
    """One row per image: its map, then the map of each modified image.

    Below each is the cosine of the two maps, and whether the network predicts the same class.

    Args:
        images: (N, C, H, W) raw, in [0, 1].
        modified: {title: (N, C, H, W)}, such as :func:`attnkern.evaluation.occlude` and
            :func:`attnkern.evaluation.frequency` return.
        predict: takes normalised images and returns logits and a map; see :func:`attnkern.evaluation.attention_of`.
        normalise: applied to all images before ``predict``.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: images or maps of another shape or kind, or what :func:`grid` refuses.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.4.
    """
    where = "occlusion_rows"
    check_kind(where, Mapping, modified=modified)
    for title, changed in modified.items():
        check_one_per_image(where, f"modified[{title!r}]", changed, images, "({}, C, H, W) (N as images)")
    logits, maps = predict(normalise(images))
    rows = [[(image, map)] for image, map in zip(images, maps, strict=True)]
    for changed in modified.values():
        changed_logits, changed_maps = predict(normalise(changed))
        cosines = map_cosines(maps, changed_maps, False).tolist()
        unchanged = (logits.argmax(1) == changed_logits.argmax(1)).tolist()
        for row, image, map, cosine, same in zip(rows, changed, changed_maps, cosines, unchanged, strict=True):
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
    shape: str = "rectangle",
    padding: str = "zeros",
    normalise: Normalise = identity,
    **options: Any,
) -> Figure:
    """One row each for a rotated, a scaled and a shifted image, with the rectangles that a network finds.

    The rectangle found is solid. The rectangle of the original image, transformed like the image, is dashed: an
    equivariant network finds the same. Below each is the :func:`attnkern.evaluation.equivariance_distance` of the two.
    The default settings are those of :func:`attnkern.evaluation.equivariance_errors`.

    Args:
        image: (C, H, W) raw, in [0, 1].
        rectangles_of: takes normalised images and returns rectangles (N, 5) or (N, K, 5).
        size: (h, w) of the map that a rectangle is drawn to.
        angles, scales, shifts: as in :func:`attnkern.evaluation.transform_rectangle`.
        aspect: the value that the network's maps are drawn with; True also rotates the image in pixels, False in the
            unit square.
        shape: of the windows, "rectangle" or "ellipse".
        padding: as in :func:`attnkern.evaluation.transform_images`.
        normalise: applied to all images before ``rectangles_of``.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: an image or rectangles of another shape or kind, or what :func:`grid` refuses.

    Source: Convolutional Rectangular Attention Module, Sections 4.4 and 6.4.
    """
    where = "equivariance_sequence"
    check_image(where, "image", image)
    size = check_size(where, size)
    angles, scales, shifts = settings_of(where, angles, scales, shifts)
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
    check_one_per_image(where, "rectangles_of's result", found, images, "({0}, 5) or ({0}, K, 5) (N as images)")
    found = found.float()
    maps = window_map(found, tuple(size), aspect=aspect, shape=shape)

    original, rows, entry = (image, maps[0], found[:1]), [], 1
    for of_kind in plan.values():
        row = [original]
        for setting, text in of_kind:
            wanted = transform_rectangle(found[:1], **setting, size=image.shape[1:] if aspect else None)
            distance = equivariance_distance(found[entry : entry + 1], wanted).item()
            cell = {"image": images[entry], "map": maps[entry], "caption": f"{text}\ndistance {distance:.2g}"}
            row.append(cell | {"rectangle": torch.stack((found[entry], wanted[0]))})
            entry += 1
        rows.append(row)
    title = "solid: rectangle found in the image; dashed: rectangle of the original image, transformed"
    defaults = {"row_titles": list(plan) or None, "title": title, "aspect": aspect, "shape": shape}
    return grid(rows or [[original]], **defaults | options)


def query_pairs(targets: torch.Tensor, query: torch.Tensor, result: QueryDriven, **options: Any) -> Figure:
    """One row per target: its attention with its own global vector and with the query's, and the relative change.

    Red is more attention, blue is less. The colours of the change end at the largest change, at most 100 %, which is
    written below it.

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
    check_tensor(where, "query", query)
    ok = query.dim() == 3 or (query.dim() == 4 and len(query) == 1)
    check_shape(where, "query", query, "(C, H, W) or (1, C, H, W)", ok)
    for name, maps in zip(result._fields, result, strict=True):
        check_maps(where, f"result.{name}", maps)
        check_one_per_image(where, f"result.{name}", maps, targets, "({}, h, w) (N as targets)")
    for name in ("own", "queried"):
        check_finite(where, f"result.{name}", getattr(result, name))
    rows = []
    for i, (target, own, queried, change) in enumerate(zip(targets, *result, strict=True)):
        limit = min(change.abs().max().item(), 1.0)
        caption = f"up to ±{limit:.0%}" if limit else "no change"
        limit = limit or 1.0
        # The change is infinite where the target's own attention is 0.
        changed = {"image": target, "map": change.clamp(-limit, limit), "limit": limit, "caption": caption}
        first = query.view(query.shape[-3:]) if i == 0 else None
        rows.append([first, target, (target, own), (target, queried), changed])
    titles = ["query", "target", "own attention", "attention to the query", "change"]
    return grid(rows, **{"column_titles": titles} | options)


def sorted_corners(
    images: torch.Tensor, maps: torch.Tensor, rectangles: torch.Tensor, by: str, *, count: int = 4, **options: Any
) -> Figure:
    """The images whose rectangles have the smallest and the largest values of a parameter.

    Below each is its index in the batch.

    Args:
        images: (N, C, H, W) in [0, 1].
        maps: (N, h, w).
        rectangles: (N, 5) or (N, K, 5) as in :func:`attnkern.window_map`.
        by: the parameter, as in :func:`attnkern.evaluation.descriptive_order`.
        count: images per row, at least 1.
        options: of :func:`grid`.

    Raises:
        ValueError, TypeError: tensors of another shape or kind, an unknown ``by``, a count below 1, or what
            :func:`grid` refuses.

    Source: Convolutional Rectangular Attention Module, Section 6.5.
    """
    where = "sorted_corners"
    check_count(where, count=count)
    check_one_per_image(where, "maps", maps, images, "({}, h, w) (N as images)")
    check_one_per_image(where, "rectangles", rectangles, images, "({0}, 5) or ({0}, K, 5) (N as images)")
    order = descriptive_order(rectangles, by).tolist()
    rows = [
        [{"image": images[i], "map": maps[i], "rectangle": rectangles[i][None], "caption": f"image {i}"} for i in ends]
        for ends in (order[:count], order[-count:])
    ]
    return grid(rows, **{"row_titles": [f"smallest {by}", f"largest {by}"]} | options)
