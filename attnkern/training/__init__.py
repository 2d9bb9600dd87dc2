"""Training of the papers' networks: data, recipes and the command ``attnkern train``."""

from attnkern.training.digits import Digits, digits_clutter, digits_pairs

__all__ = ["Digits", "digits_clutter", "digits_pairs"]
