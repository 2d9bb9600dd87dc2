"""Data for training the papers' models."""

from attnkern.training.digits import Digits, digits_clutter

__all__ = ["Digits", "digits_clutter"]
