"""Information-bottleneck attention: quantization of maps to learned anchors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._autograd import transformed
from attnkern._checks import check_channels, check_count, check_flag, check_kind, check_shape, check_tensor, is_shape
from attnkern._tracing import Module
from attnkern.nn._hooks import untouched
from attnkern.nn._precision import full_precision, input_for, widened
from attnkern.quantize import AnchorAttended, AnchorQuantized, anchor_attention, anchor_quantize, check_reduction
from attnkern.reference import modulate


class AnchorQuantizer(Module):
    """The nearest of Q learned anchors for each element, with straight-through gradient; counts the use of each anchor.

    The anchors are initialised with linspace(0, 1, Q) and learn from ``anchor_loss`` only. ``counts`` (Q,) int64 is the
    number of times that each was chosen in training mode; it is not part of the state_dict.

    Args:
        num_anchors: Q.
        reduction: of the two losses, as in :func:`attnkern.anchor_quantize`.
        sync_counts: sum the counts over all processes of the default group at each training step, by a collective of Q
            integers. (DDP broadcasts buffers from rank 0, so they cannot be summed afterwards.)

    Raises:
        ValueError, TypeError: no anchor, an unknown reduction, or an argument that is invalid for
            :func:`attnkern.anchor_quantize` or :func:`attnkern.anchor_attention`.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 9-10.
    """

    def __init__(self, num_anchors: int, reduction: str = "mean", sync_counts: bool = False):
        super().__init__()
        check_count("AnchorQuantizer", num_anchors=num_anchors)
        check_reduction("AnchorQuantizer", reduction)
        check_flag("AnchorQuantizer", sync_counts=sync_counts)
        self.reduction = reduction
        self.sync_counts = sync_counts
        self.anchors = nn.Parameter(torch.linspace(0, 1, num_anchors))
        self.register_buffer("counts", torch.zeros(num_anchors, dtype=torch.int64), persistent=False)
        self.map = nn.Identity()

    def forward(self, a: torch.Tensor) -> AnchorQuantized:
        """Quantize ``a`` (N, ...); see :func:`attnkern.anchor_quantize`."""
        quantized = anchor_quantize(a, widened(self.anchors), reduction=self.reduction)
        self._count(quantized.counts)
        return AnchorQuantized(self.map(quantized.values), *quantized[1:])

    def attend(self, x: torch.Tensor, a: torch.Tensor, residual: bool = True) -> AnchorAttended:
        """Attention to ``x`` with the quantized map ``a``, in one pass; see :func:`attnkern.anchor_attention`."""
        attended = anchor_attention(x, a, widened(self.anchors), residual=residual, reduction=self.reduction)
        self._count(attended.counts)
        if not untouched(self.map):
            map = self.map(attended.values)
            output = modulate(x, map if map.dim() == 4 else map[:, None], residual)
            attended = AnchorAttended(output, map, *attended[2:])
        return attended

    def _count(self, counts):
        # Function transforms (per-sample gradients, for instance) are not training steps and may not write to buffers.
        if self.training and not transformed(counts):
            if self.sync_counts:
                if not torch.distributed.is_initialized():
                    raise RuntimeError(
                        "AnchorQuantizer: sync_counts needs a process group: call torch.distributed.init_process_group "
                        "first, or leave sync_counts out"
                    )
                counts = counts.clone()
                torch.distributed.all_reduce(counts)
            self.counts += counts

    def reset_counts(self) -> None:
        self.counts.zero_()

    def perplexity(self) -> torch.Tensor:
        """exp of the entropy of the counts: 1 if one anchor has all, Q if all have equally many; NaN without counts."""
        return torch.special.entr(self.counts / self.counts.sum()).sum().exp()

    def extra_repr(self):
        return f"{self.anchors.numel()}, reduction={self.reduction!r}"


class BottleneckAttended(NamedTuple):
    """Result of :class:`BottleneckAttention`."""

    output: torch.Tensor  #: (N, C, H, W), the features' dtype and memory format
    map: torch.Tensor  #: (N, H, W) the factor of the features: a, or its nearest anchors
    mean: torch.Tensor  #: (N, H, W) μ
    std: torch.Tensor  #: (N, H, W) σ
    anchor_loss: torch.Tensor  #: scalar, moves the anchors; 0 without anchors
    commitment_loss: torch.Tensor  #: scalar, moves a; 0 without anchors


class BottleneckAttention(Module):
    """Attention with a map drawn from p(a|x) = N(μ, σ²) and quantized to anchors: output = x + v·x, or v·x.

    μ = Λ(conv3x3(x)), σ = softplus(conv3x3(μ) - 5), a = μ + σε, and v the nearest anchor of a, or a itself without
    anchors. a is not limited to [0, 1]. Map, μ and σ are float32 under autocast.

    Args:
        channels: C of the features.
        num_anchors: Q, or None for no quantization.
        mean: a module from features to raw maps (N, 1, H, W), instead of the 3x3 convolution before Λ.
        residual: add x to v·x, as published.

    Raises:
        ValueError, TypeError: a number below 1, features with another number of channels, or an argument of another
            type.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 6-10; the heads as in the authors' code.
    """

    def __init__(
        self, channels: int, num_anchors: int | None = None, mean: nn.Module | None = None, residual: bool = True
    ):
        super().__init__()
        check_count("BottleneckAttention", channels=channels)
        check_kind("BottleneckAttention", nn.Module | None, mean=mean)
        check_flag("BottleneckAttention", residual=residual)
        self.channels = channels
        self.residual = residual
        self.mean = nn.Conv2d(channels, 1, 3, padding=1) if mean is None else mean
        self.std = nn.Conv2d(1, 1, 3, padding=1)
        self.quantizer = None if num_anchors is None else AnchorQuantizer(num_anchors)
        self.map = nn.Identity()

    def forward(self, x: torch.Tensor, sample: bool | None = None) -> BottleneckAttended:
        """Attend to ``x`` (N, C, H, W).

        Args:
            sample: draw a from p(a|x); otherwise a = μ. None: in training only. (The authors' evaluation also draws.)
        """
        check_channels("BottleneckAttention", x, self.channels)
        check_kind("BottleneckAttention", bool | None, sample=sample)
        raw_mean = self.mean(x)
        n, _, height, width = x.shape
        check_tensor("BottleneckAttention", "the output of mean", raw_mean)
        check_shape(
            "BottleneckAttention", "the output of mean", raw_mean, "({}, 1, {}, {}) (as x)",
            is_shape(raw_mean, n, 1, height, width), n, height, width,
        )  # fmt: skip
        mean = widened(raw_mean).sigmoid()
        given = input_for(self.std, mean, raw_mean)
        with full_precision(x):
            std = F.softplus(widened(self.std(given)) - 5).squeeze(1)
            mean = mean.squeeze(1)
            a = mean
            if self.training if sample is None else sample:
                a = mean + std * torch.randn_like(std)
        if self.quantizer is None:
            map = self.map(a)
            output, losses = modulate(x, map[:, None], self.residual), (a.new_zeros(()), a.new_zeros(()))
        elif untouched(self.map) and untouched(self.quantizer, AnchorQuantizer):
            output, map, _, *losses, _ = self.quantizer.attend(x, a, self.residual)
        else:
            values, _, *losses, _ = self.quantizer(a)
            map = self.map(values)
            output = modulate(x, map[:, None], self.residual)
        return BottleneckAttended(output, map, mean, std, *losses)
