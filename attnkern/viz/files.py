"""Figures as files."""

import os
from pathlib import Path

from attnkern._checks import check_kind, check_number
from attnkern._extras import needs_extra

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.figure import Figure


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
    except OSError as error:
        error.filename = error.filename and os.fspath(path)  # not the temporary file, which nobody asked for
        raise
    finally:
        part.unlink(missing_ok=True)
