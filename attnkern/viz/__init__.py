"""Figures of attention maps, rectangles and anchors, drawn with matplotlib, as the papers show them.

Every function returns a matplotlib figure; :func:`save` writes it to a file. No function uses pyplot or changes
matplotlib's settings or backend. ``theme`` is "light" or "dark" and should match the page that a figure is for. Titles,
captions and names are drawn literally: ``$`` does not begin mathematics, TeX is off, and a character that matplotlib's
font lacks is drawn in another installed font if one has it.

Arguments are checked where a mistake would otherwise give a wrong picture; other mistakes end in matplotlib's errors.
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
