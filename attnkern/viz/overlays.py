"""One image with a map and rectangles over it."""

import math

import torch

from attnkern._checks import check_flag, check_kind, check_number, check_shape, check_tensor
from attnkern._extras import needs_extra
from attnkern.evaluation.localisation import rescale, upsample
from attnkern.viz._checks import check_finite, check_image
from attnkern.viz._style import LABEL_SIZE, TITLE_SIZE, apply_theme, find_theme, new_figure, wrap, write
from attnkern.window import rectangle_corners

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Polygon
    from matplotlib.patheffects import withStroke


def _corners(rectangle, cells, size, aspect):
    """Corners of rectangles on a map of ``cells`` (h, w), in the pixels of an image of ``size`` (H, W): (K, 4, 2).

    A coordinate t runs over the cells' centres: the cell t(h-1), whose centre lies at (t(h-1) + ½)/h of the height.
    """
    corners = rectangle_corners(rectangle, cells, aspect=aspect)
    cells, size = corners.new_tensor(cells), corners.new_tensor(size)
    return (corners + 0.5) / cells * size - 0.5


def draw_overlay(
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
    check_image(where, "image", image)
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
        check_finite(where, "map", map)
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
        check_finite(where, "rectangle", rectangle)
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
    for text, size, put in ((title, TITLE_SIZE, ax.set_title), (caption, LABEL_SIZE, ax.set_xlabel)):
        if text is not None:
            write(put, wrap(text, inches, size) if inches else text, size)


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
    theme = find_theme(where, theme)
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
        draw_overlay(where, ax, image, map, rectangle, **options)
        return ax.figure
    check_image(where, "image", image)
    height, width = _fitted(image, 4.0)
    figure = new_figure(width, height + 0.3 * (title is not None) + 0.3 * (caption is not None))
    draw_overlay(where, figure.add_subplot(), image, map, rectangle, **options, inches=width)
    return apply_theme(figure, theme)


def _fitted(image, inches):
    """Height and width of a picture whose longer side has so many inches; the shorter has at least a quarter."""
    longest = max(image.shape[1:])
    return tuple(inches * max(length / longest, 0.25) for length in image.shape[1:])
