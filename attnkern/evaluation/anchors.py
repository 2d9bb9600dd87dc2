"""Usage of a quantizer's anchors."""

from typing import NamedTuple

import torch

from attnkern._checks import check_kind, check_shape
from attnkern._numerics import double


class AnchorUsage(NamedTuple):
    """Result of :func:`usage`."""

    anchors: int  #: Q
    used: int  #: anchors chosen at least once
    used_share: float  #: used / Q
    perplexity: float  #: exp of the entropy of the frequencies, 1 to Q; NaN if all counts are 0
    frequencies: list[float]  #: counts / sum of the counts


def perplexity(counts: torch.Tensor) -> float:
    """exp(-Σ p log p) of the frequencies p = counts / Σ counts: the effective number of anchors. NaN if all are 0.

    Args:
        counts: (Q,), such as :func:`attnkern.anchor_quantize` returns.

    Raises:
        ValueError, TypeError: counts of another shape or kind, or negative counts.
    """
    check_counts("perplexity", counts)
    return _perplexity(double(counts))


def _perplexity(counts):
    return torch.special.entr(counts / counts.sum()).sum().exp().item()


def usage(counts: torch.Tensor) -> AnchorUsage:
    """How many anchors are used, and how evenly.

    Args:
        counts: (Q,) how often each anchor was chosen: the sum of the ``counts`` that
            :func:`attnkern.anchor_quantize` returns, or those of :class:`attnkern.nn.AnchorQuantizer`.

    Raises:
        ValueError, TypeError: counts of another shape or kind, or negative counts.
    """
    check_counts("usage", counts)
    used = (counts > 0).sum().item()
    frequencies = (double(counts) / counts.sum().item()).tolist()
    return AnchorUsage(len(counts), used, used / len(counts), _perplexity(double(counts)), frequencies)


def check_counts(where: str, counts: torch.Tensor) -> None:
    """Raise unless ``counts`` is a tensor (Q,) without negative entries."""
    check_kind(where, torch.Tensor, counts=counts)
    check_shape(where, "counts", counts, "(Q,) with Q of at least 1", counts.dim() == 1 and len(counts) > 0)
    if (counts < 0).any():
        raise ValueError(f"{where}: counts must not be negative, got {counts.min().item()}")
