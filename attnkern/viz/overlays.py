"""One image with an attention map and rectangles over it."""

import torch

from attnkern._checks import check_choice, check_flag, check_shape, check_tensor
from attnkern._extras import needs_extra
from attnkern.evaluation.localisation import upsample
from attnkern.viz._checks import check_finite, check_image, check_positive
from attnkern.viz._style import LABEL_SIZE, TITLE_SIZE, apply_theme, find_theme, new_figure, wrap, write
from attnkern.window import SHAPES, ellipse_outline, rectangle_corners

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Polygon
    from matplotlib.patheffects import withStroke

#: Length of the longer side of an overlay's image, in inches.
SIDE = 4.0
#: A map is nearly constant if its values differ by less than this share of the largest absolute value.
_CONSTANT = 0.1


def overlay(
    image: torch.Tensor,
    map: torch.Tensor | None = None,
    *,
    alpha: float = 0.5,
    nearest: bool = False,
    limit: float | None = None,
    rectangle: torch.Tensor | None = None,
    aspect: bool = False,
    shape: str = "rectangle",
    cmap: str | None = None,
    title: str | None = None,
    caption: str | None = None,
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """An image with a map over it, and with the rectangles that the map was drawn from.

    The h x w cells of the map tile the image, as in :func:`attnkern.evaluation.upsample`. A rectangle's coordinates
    refer to the centres of the cells: t lies at the pixel ((t(h-1) + ½)/h)·H - ½.

    Args:
        image: (3, H, W) or (1, H, W) in [0, 1].
        map: (h, w), or None for the image alone. The colours run from its minimum to its maximum. For a nearly constant
            map, whose values differ by less than a tenth of the largest absolute value, they span that tenth around the
            middle, so that small differences stay small in the picture.
        alpha: opacity of the map, 0 to 1.
        nearest: show the cells as squares, for quantized maps; otherwise the map is interpolated bilinearly.
        limit: a positive number, not a tensor; the colours then run from -limit to limit, diverging from 0; for
            differences of maps.
        rectangle: (5,) as in :func:`attnkern.window_map`, or several to compare, (M, 5). The first is drawn solid, the
            others dashed. (M, K, 5) are sets of K windows; those of a single map are (1, K, 5). Without a map the
            pixels of the image are the cells.
        aspect: the value that the map was drawn with. False draws the parallelogram that the rectangle is on a grid
            with h ≠ w; True draws a rectangle.
        shape: "rectangle" or "ellipse", as in :func:`attnkern.window_map`.
        cmap: name of a matplotlib colour map, by default "viridis", with ``limit`` "RdBu_r".
        title, caption: text above and below the image.
        theme: "light" or "dark". Axes that are passed as ``ax`` keep their colours.
        ax: axes to draw on, instead of a new figure.

    Returns:
        the new figure, or the figure of ``ax``.

    Raises:
        ValueError, TypeError: a tensor of another shape or kind or not finite, an image beyond [0, 1], an unknown theme
            or shape, a limit that is not positive and finite, or a flag that is not a bool.
    """
    where = "overlay"
    theme = find_theme(where, theme)
    options = {
        "alpha": alpha,
        "nearest": nearest,
        "limit": limit,
        "aspect": aspect,
        "shape": shape,
        "cmap": cmap,
        "title": title,
        "caption": caption,
    }
    if ax is not None:
        draw_overlay(where, ax, image, map, rectangle, **options)
        return ax.figure
    check_image(where, "image", image)
    height, width = _fit(image.shape[1:])
    lines = [
        wrap(text, width, size).count("\n") + 1 for text, size in ((title, TITLE_SIZE), (caption, LABEL_SIZE)) if text
    ]
    figure = new_figure(width, height + sum(0.16 + 0.17 * count for count in lines))
    draw_overlay(where, figure.add_subplot(), image, map, rectangle, **options, inches=width)
    return apply_theme(figure, theme)


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
    shape="rectangle",
    cmap=None,
    title=None,
    caption=None,
    inches=None,
):
    """Draw an overlay on axes; ``inches`` is the width of its title and caption."""
    check_image(where, "image", image)
    check_flag(where, nearest=nearest, aspect=aspect)
    if limit is not None:
        check_positive(where, limit=limit)
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
        shown = map.detach().cpu().float() if nearest else upsample(map.detach().cpu()[None], (height, width))[0]
        low, high = _colour_range(shown) if limit is None else (-limit, limit)
        ax.imshow(
            shown.numpy(),
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
        ok = rectangle.dim() in (1, 2, 3) and rectangle.shape[-1] == 5
        check_shape(where, "rectangle", rectangle, "(5,), (M, 5) or (M, K, 5)", ok)
        check_finite(where, "rectangle", rectangle)
        check_choice(where, "shape", shape, SHAPES)
        windows = rectangle.shape[1] if rectangle.dim() == 3 else 1
        found = _outlines(rectangle.detach().cpu().reshape(-1, 5), tuple(cells), (height, width), aspect, shape)
        for k, outline in enumerate(found.flip(2).tolist()):
            first = k < windows
            # A bright line with a black edge is visible on any image.
            ax.add_patch(
                Polygon(
                    outline,
                    fill=False,
                    edgecolor="#ffffff" if first else "#ffb000",
                    linestyle="-" if first else (0, (3, 2)),
                    linewidth=1.5,
                    path_effects=[withStroke(linewidth=3, foreground="black")],
                )
            )
    ax.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
    ax.spines[:].set_visible(False)
    for text, size, put in ((title, TITLE_SIZE, ax.set_title), (caption, LABEL_SIZE, ax.set_xlabel)):
        if text is not None:
            write(put, wrap(text, inches, size) if inches else text, size)


def nearly_constant(map: torch.Tensor) -> bool:
    """Whether the values of a map differ by less than a tenth of the largest absolute value."""
    return (map.max() - map.min()).item() < _CONSTANT * map.abs().max().item()


def _colour_range(map):
    """The values at the two ends of the colours."""
    low, high, largest = map.min().item(), map.max().item(), map.abs().max().item()
    if nearly_constant(map):
        middle = (low + high) / 2
        low, high = middle - _CONSTANT / 2 * largest, middle + _CONSTANT / 2 * largest
    return low, high


def _outlines(rectangle, cells, size, aspect, shape):
    """Outlines of windows on a map of ``cells`` (h, w), in the pixels of an image of ``size`` (H, W): (K, points, 2).

    A coordinate t lies at the cell t(h-1), whose centre is at (t(h-1) + ½)/h of the image's height.
    """
    outline = ellipse_outline if shape == "ellipse" else rectangle_corners
    points = outline(rectangle, cells, aspect=aspect)
    cells, size = points.new_tensor(cells), points.new_tensor(size)
    return (points + 0.5) / cells * size - 0.5


def _fit(size):
    """Height and width in inches of a picture whose longer side is SIDE; the shorter is at least a quarter of that."""
    return tuple(SIDE * max(length / max(size), 0.25) for length in size)
