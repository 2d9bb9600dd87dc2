"""Overlays in rows and columns: of levels, networks, modified images, transformations, queries."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

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
from attnkern._extras import needs_extra
from attnkern.evaluation.inputs import Normalise, Predict, check_maps, identity
from attnkern.evaluation.interpretability import map_cosines
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
from attnkern.viz._checks import check_finite, check_image, check_images, check_one_per_image
from attnkern.viz._style import LABEL_SIZE, TITLE_SIZE, apply_theme, find_theme, new_figure, wrap, write
from attnkern.viz.overlays import draw_overlay
from attnkern.window import window_map

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.figure import Figure

#: A cell of :func:`grid`.
Cell = torch.Tensor | tuple | Mapping[str, Any] | None


def _cell(where, cell):
    """Positional and named arguments of :func:`draw_overlay`, or None for an empty cell."""
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
    theme = find_theme(where, theme)
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
                check_image(f"{where}: rows[{i}][{j}]", "image", image)
                ratios.append(image.shape[1] / image.shape[2])
        captions = [str(cell[1].get("caption") or "") for cell in row if cell]
        lines = max((wrap(text, inches, LABEL_SIZE).count("\n") + 1 for text in captions if text), default=0)
        heights.append(inches * max(ratios) + 0.16 * lines + 0.1)
    left = 0.0 if row_titles is None else 1.1
    top = (0.4 if column_titles is not None else 0.1) + (0.4 if title is not None else 0)
    figure = new_figure(columns * (inches + 0.08) + left, sum(heights) + top, "compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    defaults = {"alpha": alpha, "nearest": nearest, "aspect": aspect, "cmap": cmap}
    for i, row in enumerate(rows):
        for j, (ax, cell) in enumerate(zip_longest(axes[i], row)):
            if cell:
                draw_overlay(f"{where}: rows[{i}][{j}]", ax, *cell[0], **defaults | cell[1], inches=inches)
            else:
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
            if i == 0 and column_titles is not None and not ax.get_title():
                write(ax.set_title, wrap(column_titles[j], inches, TITLE_SIZE), TITLE_SIZE)
            if j == 0 and row_titles is not None:
                text = wrap(row_titles[i], 1.0, TITLE_SIZE)
                write(ax.set_ylabel, text, TITLE_SIZE, rotation=0, ha="right", va="center")
    if title is not None:
        write(figure.suptitle, wrap(title, figure.get_figwidth(), TITLE_SIZE + 1), TITLE_SIZE + 1)
    return apply_theme(figure, theme)


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
    check_images(where, "images", images)
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
    check_images(where, "images", images)
    check_kind(where, Mapping, modified=modified)
    check_kind(where, Callable, predict=predict, normalise=normalise)
    for title, changed in modified.items():
        expected = f"{tuple(images.shape)} (as images)"
        check_one_per_image(where, f"modified[{title!r}]", changed, images, expected, images.shape[1:])
    logits, maps = predict(normalise(images))
    check_maps(where, "predict's map", maps)
    rows = [[(image, map)] for image, map in zip(images, maps, strict=True)]
    for changed in modified.values():
        changed_logits, changed_maps = predict(normalise(changed))
        check_maps(where, "predict's map", changed_maps)
        cosines = map_cosines(maps, changed_maps, False).tolist()
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
    check_image(where, "image", image)
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
    check_one_per_image(where, "rectangles_of's result", found, images, expected, (5,))
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
    check_images(where, "targets", targets)
    check_tensor(where, "query", query)
    ok = query.dim() == 3 or (query.dim() == 4 and len(query) == 1)
    check_shape(where, "query", query, "(C, H, W) or (1, C, H, W)", ok)
    check_kind(where, QueryDriven, result=result)
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
    check_images(where, "images", images)
    check_maps(where, "maps", maps)
    check_one_per_image(where, "maps", maps, images, "({}, h, w) (N as images)")
    check_one_per_image(where, "rectangles", rectangles, images, "({}, 5) (N as images)", (5,))
    check_choice(where, "by", by, ORDERS)
    check_count(where, count=count)
    order = descriptive_order(rectangles, by).tolist()
    rows = [
        [{"image": images[i], "map": maps[i], "rectangle": rectangles[i], "caption": f"image {i}"} for i in ends]
        for ends in (order[:count], order[-count:])
    ]
    return grid(rows, **{"row_titles": [f"least {by}", f"most {by}"]} | options)
