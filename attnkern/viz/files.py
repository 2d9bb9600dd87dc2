"""Figures as files."""

import os
from pathlib import Path

from attnkern._extras import needs_extra

with needs_extra("attnkern.viz", "viz"):
    from matplotlib.figure import Figure


def save(figure: Figure, path: str | os.PathLike, *, dpi: float | None = None) -> None:
    """Write a figure as PNG or SVG, depending on the suffix of the path. After an error an existing file is unchanged.

    Args:
        figure: of any function of :mod:`attnkern.viz`.
        path: ends in .png or .svg, in an existing folder.
        dpi: pixels per inch, by default the figure's.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise ValueError(f"save: path must end in .png or .svg, got '{path}'")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # Set explicitly, since matplotlib's settings may say otherwise.
        options = {"facecolor": figure.get_facecolor(), "transparent": False, "bbox_inches": None}
        figure.savefig(part, format=suffix[1:], dpi=dpi or figure.dpi, **options)
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename and os.fspath(path)  # not the temporary file
        raise
    finally:
        part.unlink(missing_ok=True)
