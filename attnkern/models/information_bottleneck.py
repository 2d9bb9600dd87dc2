"""Information Bottleneck Approach to Spatial Attention Learning: the loss, what its networks share, and VGG for CIFAR.

Layers, initialisation and losses are those of the authors' code. Its other networks are in
:mod:`attnkern.models.wide_resnet` and :mod:`attnkern.models.imagenet_bottleneck`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import check_choice, check_count, check_kind, check_number, describe
from attnkern._numerics import wide
from attnkern.models.layers import Network, conv_bn_relu, halved, scaled, xavier_uniform
from attnkern.models.registry import register_model
from attnkern.nn import BottleneckAttention
from attnkern.nn._precision import input_for

#: Of the KL term in :func:`bottleneck_loss`.
VARIANTS = ("correct", "reference")


class Bottlenecked(NamedTuple):
    """What :class:`BottleneckNetwork` returns in training."""

    logits: torch.Tensor  #: (N, num_classes)
    mean: torch.Tensor  #: (N, K) of p(z|x, a)
    std: torch.Tensor  #: (N, K) of p(z|x, a)
    anchor_loss: torch.Tensor  #: scalar
    commitment_loss: torch.Tensor  #: scalar


def bottleneck_loss(
    output: Bottlenecked,
    labels: torch.Tensor,
    *,
    beta: float = 0.005,
    anchor_weight: float = 0.4,
    commitment_weight: float = 0.1,
    variant: str = "correct",
) -> torch.Tensor:
    """(NLL + β·KL(p(z|x, a) ‖ N(0, 1))) / ln 2 + λ_q·anchor + λ_c·commitment.

    KL = ½ Σ_k (μ² + s² - 2 log s - 1), summed over z and averaged over the batch. "correct": s is the standard
    deviation of z. "reference": s is exp of the standard deviation, as in the authors' code, which mistakes the
    deviation for its logarithm and so drives the noise to zero. The defaults are the authors' for VGG (they write
    β = 0.01 and a further factor ½).

    Args:
        output: of a :class:`BottleneckNetwork` in training; its ``loss`` also takes the logits of evaluation.
        labels: (N,) int64, or probabilities (N, num_classes).
        beta: β.
        anchor_weight: λ_q.
        commitment_weight: λ_c.
        variant: "correct" or "reference".

    Raises:
        ValueError: an unknown variant.
        TypeError: ``output`` is not a :class:`Bottlenecked`, such as logits of evaluation, or a weight is not a number.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 8 and 10, which print a minus before the
    KL and anchor terms.
    """
    where = "bottleneck_loss"
    check_kind(where, Bottlenecked, output=output)
    check_number(where, beta=beta, anchor_weight=anchor_weight, commitment_weight=commitment_weight)
    check_choice(where, "variant", variant, VARIANTS)
    log_std = output.std.log() if variant == "correct" else output.std
    divergence = 0.5 * (output.mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1).mean()
    bits = (F.cross_entropy(output.logits, labels) + beta * divergence) / math.log(2)
    return bits + anchor_weight * output.anchor_loss + commitment_weight * output.commitment_loss


class BottleneckNetwork(Network):
    """Base of the networks with a bottleneck: features, stochastic attention, encoder to p(z|x, a), decoder.

    In training it returns :class:`Bottlenecked` from one sample of a and one of z. In evaluation it returns logits:
    without noise (a and z at their means), or, with ``samples``, averaged over samples of a and z, as published.
    Attention map: ``attention.map``.

    Args:
        num_anchors: Q, or None for a continuous map.
        variant: of the KL term, "correct" or "reference"; see :func:`bottleneck_loss`.
        samples: None, or in evaluation (samples of a, samples of z for each a); published: (4, 4).
        beta, anchor_weight, commitment_weight: of :func:`bottleneck_loss`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images with other channels.
    """

    def _configure(self, variant, samples, **loss_weights):
        where = type(self).__name__
        check_choice(where, "variant", variant, VARIANTS)
        if samples is not None:
            if not isinstance(samples, (tuple, list)) or len(samples) != 2:
                expected = "None or (samples of a, samples of z for each a)"
                raise ValueError(f"{where}: samples must be {expected}, got {describe(samples)}")
            for count in samples:
                check_count(where, samples=count)
        check_number(where, **loss_weights)
        self.samples = samples
        self.loss_options = loss_weights | {"variant": variant}

    def _encode(self, x, sample):
        """Mean and standard deviation of p(z|x, a), and the anchor and commitment losses, of features x."""
        losses = (x.new_zeros(()),) * 2
        if self.attention is not None:
            attended = self.attention(x, sample=sample)
            x, losses = attended.output, attended[-2:]
        statistics = self.encoder(x)
        mean, raw_std = statistics.to(wide(statistics.dtype)).chunk(2, 1)
        return mean, F.softplus(raw_std - 5), losses

    def _decode(self, z):
        return self.classifier(self.decoder(input_for(self.classifier, z)))

    def forward(self, x: torch.Tensor) -> Bottlenecked | torch.Tensor:
        """Images (N, in_chans, H, W) to :class:`Bottlenecked` in training, otherwise to logits (N, num_classes)."""
        self._check_images(x)
        features = self.features(x)
        if self.training:
            mean, std, losses = self._encode(features, sample=True)
            return Bottlenecked(self._decode(mean + std * torch.randn_like(std)), mean, std, *losses)
        if self.samples is None:
            return self._decode(self._encode(features, sample=False)[0])
        logits = []
        for _ in range(self.samples[0]):
            mean, std, _ = self._encode(features, sample=True)
            logits += [self._decode(mean + std * torch.randn_like(std)) for _ in range(self.samples[1])]
        return torch.stack(logits).mean(0)

    def loss(self, output: Bottlenecked | torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """:func:`bottleneck_loss` with the network's options; for logits of an evaluation the cross entropy alone."""
        if isinstance(output, torch.Tensor):
            return super().loss(output, labels)
        return bottleneck_loss(output, labels, **self.loss_options)


@register_model("vgg_dvib", attention=False)
@register_model("vgg_aib")
@register_model("vgg_aib_qt", num_anchors=20)
class VggBottleneck(BottleneckNetwork):
    """VGG with bottleneck attention at half resolution: VGG-aib, -aib-qt with anchors, VGG-DVIB without attention.

    Args:
        num_classes: number of logits.
        attention: False for VGG-DVIB, which only has the bottleneck z.
        num_anchors: Q, or None for a continuous map. Published: 20 for CIFAR-10, 50 for CIFAR-100.
        width: multiplier of all channels and of z.
        in_chans: channels of the images.
        variant, samples, beta, anchor_weight, commitment_weight: as :class:`BottleneckNetwork`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images with other channels.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.
    """

    feature_modules = ("features", "encoder.9", "encoder.19")

    def __init__(
        self,
        num_classes: int,
        *,
        attention: bool = True,
        num_anchors: int | None = None,
        width: float = 1.0,
        in_chans: int = 3,
        variant: str = "correct",
        samples: tuple[int, int] | None = None,
        beta: float = 0.005,
        anchor_weight: float = 0.4,
        commitment_weight: float = 0.1,
    ):
        super().__init__(num_classes, in_chans, width)
        self._configure(variant, samples, beta=beta, anchor_weight=anchor_weight, commitment_weight=commitment_weight)
        c64, c128, c256, c512 = (scaled(channels, width) for channels in (64, 128, 256, 512))
        self.features = nn.Sequential(
            *conv_bn_relu(in_chans, c64), *conv_bn_relu(c64, c64),
            *conv_bn_relu(c64, c128), *conv_bn_relu(c128, c128),
            *conv_bn_relu(c128, c256), *conv_bn_relu(c256, c256), *conv_bn_relu(c256, c256), halved(),
        )  # fmt: skip
        self.attention = BottleneckAttention(c256, num_anchors) if attention else None
        self.encoder = nn.Sequential(
            *conv_bn_relu(c256, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), halved(),
            *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), halved(),
            *conv_bn_relu(c512, c512), halved(), *conv_bn_relu(c512, c512), halved(),
            nn.Conv2d(c512, c512, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(c512, 2 * c256),
        )  # fmt: skip
        self.decoder = nn.Sequential(nn.Linear(c256, c256), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(c256, num_classes)
        xavier_uniform(self)
