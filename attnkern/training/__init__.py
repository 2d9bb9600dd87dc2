"""Training of the papers' networks: data, recipes and the command ``attnkern train``."""

from attnkern.training.digits import Digits, digits_clutter, digits_pairs
from attnkern.training.photographs import Photographs, photo_clutter

__all__ = ["Digits", "Photographs", "digits_clutter", "digits_pairs", "photo_clutter"]
