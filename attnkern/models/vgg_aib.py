"""VGG with quantized information-bottleneck attention (VGG-aib-qt) and its loss."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._common import check_count
from attnkern._ops import wide
from attnkern.models._layers import check_images, check_network, conv_bn_relu, scaled
from attnkern.models.registry import register_model
from attnkern.nn import BottleneckAttention


class Bottlenecked(NamedTuple):
    """What :class:`VggAibQt` returns in training."""

    logits: torch.Tensor  #: (N, num_classes)
    mean: torch.Tensor  #: (N, K) of p(z|x, a)
    std: torch.Tensor  #: (N, K) of p(z|x, a)
    anchor_loss: torch.Tensor  #: scalar
    commitment_loss: torch.Tensor  #: scalar


def _check_variant(where, variant):
    if variant not in ("correct", "reference"):
        raise ValueError(f"{where}: variant must be 'correct' or 'reference', got {variant!r}")


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
    deviation that z was drawn with. "reference": s is exp of it, as in the authors' code, which takes the deviation for
    its logarithm and so drives the noise to zero. The defaults are theirs for VGG (β = 0.01 and a further ½).

    Raises:
        ValueError: an unknown variant.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 8 and 10, which print a minus before the
    KL and anchor terms.
    """
    _check_variant("bottleneck_loss", variant)
    log_std = output.std.log() if variant == "correct" else output.std
    divergence = 0.5 * (output.mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1).mean()
    bits = (F.cross_entropy(output.logits, labels) + beta * divergence) / math.log(2)
    return bits + anchor_weight * output.anchor_loss + commitment_weight * output.commitment_loss


@register_model("vgg_aib_qt")
class VggAibQt(nn.Module):
    """VGG-aib-qt: features, quantized stochastic attention at half resolution, encoder to p(z|x, a), decoder.

    In training it returns :class:`Bottlenecked` from one sample of a and one of z. In evaluation it returns logits:
    without noise (a and z at their means), or averaged over ``samples`` with the noise on, as published. Attention map:
    ``attention.map``.

    Args:
        num_classes: number of logits.
        width: multiplier of all channels and of z.
        in_chans: channels of the images.
        num_anchors: Q; published: 20 for CIFAR-10, 50 for CIFAR-100.
        variant: of the KL term, "correct" or "reference"; see :func:`bottleneck_loss`.
        samples: None, or in evaluation (samples of a, samples of z for each); published: (4, 4).

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels or below 32x32.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4; layers as in the authors' code.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        in_chans: int = 3,
        num_anchors: int = 20,
        variant: str = "correct",
        samples: tuple[int, int] | None = None,
    ):
        super().__init__()
        _check_variant("VggAibQt", variant)
        check_network("VggAibQt", num_classes, width, in_chans)
        if samples is not None:
            for count in samples:
                check_count("VggAibQt", samples=count)
        self.in_chans = in_chans
        self.variant = variant
        self.samples = samples
        c64, c128, c256, c512 = (scaled(channels, width) for channels in (64, 128, 256, 512))
        self.features = nn.Sequential(
            *conv_bn_relu(in_chans, c64), *conv_bn_relu(c64, c64),
            *conv_bn_relu(c64, c128), *conv_bn_relu(c128, c128),
            *conv_bn_relu(c128, c256), *conv_bn_relu(c256, c256), *conv_bn_relu(c256, c256), nn.MaxPool2d(2),
        )  # fmt: skip
        self.attention = BottleneckAttention(c256, num_anchors)
        self.encoder = nn.Sequential(
            *conv_bn_relu(c256, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), nn.MaxPool2d(2),
            *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), nn.MaxPool2d(2),
            *conv_bn_relu(c512, c512), nn.MaxPool2d(2), *conv_bn_relu(c512, c512), nn.MaxPool2d(2),
            nn.Conv2d(c512, c512, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(c512, 2 * c256),
        )  # fmt: skip
        self.decoder = nn.Sequential(nn.Linear(c256, c256), nn.ReLU(inplace=True), nn.Linear(c256, num_classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)

    def _encode(self, features):
        """Mean and standard deviation of p(z|x, a)."""
        statistics = self.encoder(features)
        mean, raw_std = statistics.to(wide(statistics.dtype)).chunk(2, 1)
        return mean, F.softplus(raw_std - 5)

    def _decode(self, z):
        return self.decoder(z.to(self.decoder[0].weight.dtype))

    def forward(self, x: torch.Tensor) -> Bottlenecked | torch.Tensor:
        """:class:`Bottlenecked` in training, else logits, of images (N, in_chans, H, W), H and W at least 32."""
        check_images("VggAibQt", x, self.in_chans)
        features = self.features(x)
        if self.training:
            attended = self.attention(features, sample=True)
            mean, std = self._encode(attended.output)
            logits = self._decode(mean + std * torch.randn_like(std))
            return Bottlenecked(logits, mean, std, attended.anchor_loss, attended.commitment_loss)
        if self.samples is None:
            mean, _ = self._encode(self.attention(features, sample=False).output)
            return self._decode(mean)
        logits = []
        for _ in range(self.samples[0]):
            mean, std = self._encode(self.attention(features, sample=True).output)
            logits += [self._decode(mean + std * torch.randn_like(std)) for _ in range(self.samples[1])]
        return torch.stack(logits).mean(0)

    def loss(self, output: Bottlenecked | torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """:func:`bottleneck_loss` with the published weights; of an evaluation's logits the cross entropy alone."""
        if isinstance(output, torch.Tensor):
            return F.cross_entropy(output, labels)
        return bottleneck_loss(output, labels, variant=self.variant)
