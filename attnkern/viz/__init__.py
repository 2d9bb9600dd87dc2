"""Pictures of maps, rectangles and anchors with matplotlib: the papers' figures, to look at or to :func:`save`.

Nothing here goes through pyplot or changes matplotlib's settings or backend. ``theme`` is "light" or "dark", the page
that a figure is for. Titles, captions and names appear as they are written: ``$`` begins no mathematics, TeX is off,
and characters that matplotlib's font lacks come from another installed font, where one has them.
"""

from attnkern.viz.files import save
from attnkern.viz.grids import equivariance_sequence, grid, levels, occlusion_rows, query_pairs, sorted_corners
from attnkern.viz.overlays import overlay
from attnkern.viz.plots import anchor_histogram, rectangle_histograms, training_curves

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
