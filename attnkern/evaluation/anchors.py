"""How many of a quantizer's anchors are in use."""

from typing import NamedTuple

import torch

from attnkern._checks import check_kind, check_shape
from attnkern._numerics import double


class AnchorUsage(NamedTuple):
    """Result of :func:`usage`."""

    anchors: int  #: Q
    used: int  #: anchors chosen at least once
    used_share: float  #: used / Q
    perplexity: float  #: exp of the entropy of the frequencies, 1 to Q; NaN of no choice
    frequencies: list[float]  #: share of each anchor in all choices


def perplexity(counts: torch.Tensor) -> float:
    """exp(-Σ p log p) of the frequencies p: how many anchors, used alike, would be as varied. NaN of no choice.

    Args:
        counts: (Q,), such as :func:`attnkern.anchor_quantize` returns.

    Raises:
        ValueError, TypeError: counts of another shape or kind, or negative ones.
    """
    check_counts("perplexity", counts)
    counts = double(counts)
    return torch.special.entr(counts / counts.sum()).sum().exp().item()


def usage(counts: torch.Tensor) -> AnchorUsage:
    """Which anchors are chosen, and how evenly.

    Args:
        counts: (Q,) how often each was: the sum of what :func:`attnkern.anchor_quantize` returns, or
            :class:`attnkern.nn.AnchorQuantizer`'s ``counts``.

    Raises:
        ValueError, TypeError: counts of another shape or kind, or negative ones.
    """
    check_counts("usage", counts)
    used = (counts > 0).sum().item()
    frequencies = (double(counts) / counts.sum().item()).tolist()
    return AnchorUsage(len(counts), used, used / len(counts), perplexity(counts), frequencies)


def check_counts(where, counts):
    check_kind(where, torch.Tensor, counts=counts)
    if counts.layout != torch.strided or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"{where}: counts must be a dense tensor of numbers, got {counts.dtype}, {counts.layout}")
    check_shape(where, "counts", counts, "(Q,) with Q of at least 1", counts.dim() == 1 and len(counts) > 0)
    if (counts < 0).any():
        raise ValueError(f"{where}: counts must not be negative, got {counts.min().item()}")
