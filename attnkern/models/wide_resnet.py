"""WRN-28-10 of Information Bottleneck Approach to Spatial Attention Learning: plain, bottleneck attention, ABN.

Layers, initialisation and losses are those of the authors' code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import check_count
from attnkern._numerics import wide
from attnkern.models.information_bottleneck import BottleneckNetwork
from attnkern.models.layers import MapNorm, Network, check_dropout, he_normal, scaled, zero_biases
from attnkern.models.registry import register_model
from attnkern.nn import BottleneckAttention
from attnkern.nn._precision import floating_parameter
from attnkern.reference import modulate

#: Published rate of dropout.
_DROPOUT = 0.3


class _WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions with dropout between them."""

    def __init__(self, inputs, outputs, stride, dropout):
        super().__init__()
        self.norm = MapNorm(inputs)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), MapNorm(outputs), nn.ReLU(inplace=True),
            nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        activated = F.relu(self.norm(x))
        return (x if self.shortcut is None else self.shortcut(activated)) + self.body(activated)


def _wide_stage(inputs, outputs, stride, blocks, dropout):
    rest = [_WideBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
    return nn.Sequential(_WideBlock(inputs, outputs, stride, dropout), *rest)


def _wide_features(in_chans, width, blocks, dropout):
    """WRN up to its second stage, after which attention follows, and the channels of the second and third stage."""
    c16, c160, c320, c640 = (scaled(channels, width) for channels in (16, 160, 320, 640))
    stem = nn.Conv2d(in_chans, c16, 3, padding=1, bias=False)
    stages = _wide_stage(c16, c160, 1, blocks, dropout), _wide_stage(c160, c320, 2, blocks, dropout)
    return nn.Sequential(stem, *stages), c320, c640


def _map_head(stage, channels, num_classes):
    """Layers from features to a raw map (N, 1, H, W): a stage at stride 1, one map per class, one map from these."""
    return nn.Sequential(
        stage, MapNorm(channels), nn.Conv2d(channels, num_classes, 1, bias=False), MapNorm(num_classes), nn.ReLU(),
        nn.Conv2d(num_classes, 1, 3, padding=1, bias=False), MapNorm(1),
    )  # fmt: skip


def _like(new, old, network):
    """``new``, initialised, on the device and in the dtype and mode of the layer that it replaces."""
    he_normal(new)
    like = floating_parameter(old, network)
    return (new if like is None else new.to(like.device, like.dtype)).train(old.training)


def _renew_map_head(head, num_classes):
    """Replace the layers of a :func:`_map_head` whose shapes depend on the number of classes."""
    new = _map_head(nn.Identity(), head[1].num_features, num_classes)
    for index in (2, 3, 5):
        head[index] = _like(new[index], head[index], head)


@register_model("wrn28_10_aib")
@register_model("wrn28_10_aib_qt", num_anchors=50)
class WideResNetBottleneck(BottleneckNetwork):
    """WRN-28-10 with bottleneck attention after its second stage: WRN-aib, and with anchors WRN-aib-qt.

    Args:
        num_classes: number of logits.
        num_anchors: Q, or None for a continuous map. Published: 50 for CIFAR-10, 20 for CIFAR-100.
        blocks: blocks per stage.
        width: multiplier of all channels and of z.
        in_chans: channels of the images.
        dropout: multiplier of the published rate, 0.3.
        variant, samples, beta, anchor_weight, commitment_weight: as :class:`BottleneckNetwork`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images with other channels.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.
    """

    feature_modules = ("features.1", "features.2", "encoder.0")
    class_layers = ("classifier.", "attention.mean.")

    def __init__(
        self,
        num_classes: int,
        *,
        num_anchors: int | None = None,
        blocks: int = 4,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        variant: str = "correct",
        samples: tuple[int, int] | None = None,
        beta: float = 0.01,
        anchor_weight: float = 0.4,
        commitment_weight: float = 0.1,
    ):
        super().__init__(num_classes, in_chans, width)
        check_count("WideResNetBottleneck", blocks=blocks)
        check_dropout("WideResNetBottleneck", dropout, _DROPOUT)
        self._configure(variant, samples, beta=beta, anchor_weight=anchor_weight, commitment_weight=commitment_weight)
        rate, k = _DROPOUT * dropout, scaled(512, width)
        self.features, c320, c640 = _wide_features(in_chans, width, blocks, rate)
        mean = _map_head(_wide_stage(c320, c640, 1, blocks, rate), c640, num_classes)
        self.attention = BottleneckAttention(c320, num_anchors, mean=mean)
        self.encoder = nn.Sequential(
            _wide_stage(c320, c640, 2, blocks, rate), MapNorm(c640), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c640, 2 * k),
        )  # fmt: skip
        self.decoder = nn.ReLU()
        self.classifier = nn.Linear(k, num_classes)
        he_normal(self)
        zero_biases(self, nn.Linear)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier and, in ``attention.mean``, the layers that have one map per class."""
        super().reset_classifier(num_classes)
        _renew_map_head(self.attention.mean, num_classes)


class AttentionBranched(NamedTuple):
    """What :class:`WideResNet` with an attention branch returns in training."""

    logits: torch.Tensor  #: (N, num_classes), of the perception branch
    branch_logits: torch.Tensor  #: (N, num_classes), of the attention branch


class _AttentionBranch(nn.Module):
    """Attention branch of ABN: f = Λ(raw map), from one map per class, whose averages are the branch's logits."""

    def __init__(self, stage, channels, num_classes):
        super().__init__()
        self.head = _map_head(stage, channels, num_classes)
        self.score = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        self.map = nn.Identity()

    def renew(self, num_classes):
        """Replace the layers whose shapes depend on the number of classes."""
        _renew_map_head(self.head, num_classes)
        self.score = _like(nn.Conv2d(num_classes, num_classes, 1, bias=False), self.score, self)

    def forward(self, x):
        *to_classes, conv, norm = self.head
        for layer in to_classes:
            x = layer(x)
        raw = norm(conv(x))
        return self.map(raw.to(wide(raw.dtype)).sigmoid().squeeze(1)), self.score(x).mean((2, 3))


@register_model("wrn28_10")
@register_model("wrn28_10_abn", branch=True)
class WideResNet(Network):
    """WRN-28-10, plain or with ABN's attention branch after its second stage: x + f·x, and the branch's own loss.

    Attention map of the branch: ``attention.map``.

    Args:
        num_classes: number of logits.
        branch: add the attention branch.
        blocks, width, in_chans, dropout: as :class:`WideResNetBottleneck`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images with other channels.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Table 1 (WRN; WRN-ABN, after Fukui et al.).
    """

    feature_modules = ("features.1", "features.2", "stage")
    class_layers = ("classifier.", "attention.head.", "attention.score.")

    def __init__(
        self,
        num_classes: int,
        *,
        branch: bool = False,
        blocks: int = 4,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
    ):
        super().__init__(num_classes, in_chans, width)
        check_count("WideResNet", blocks=blocks)
        check_dropout("WideResNet", dropout, _DROPOUT)
        rate = _DROPOUT * dropout
        self.features, c320, c640 = _wide_features(in_chans, width, blocks, rate)
        own_stage = _wide_stage(c320, c640, 1, blocks, rate) if branch else None
        self.attention = _AttentionBranch(own_stage, c640, num_classes) if branch else None
        self.stage = _wide_stage(c320, c640, 2, blocks, rate)
        self.norm = MapNorm(c640)
        self.classifier = nn.Linear(c640, num_classes)
        he_normal(self)
        zero_biases(self, nn.Linear)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier and, in the attention branch, the layers that have one map per class."""
        super().reset_classifier(num_classes)
        if self.attention is not None:
            self.attention.renew(num_classes)

    def forward(self, x: torch.Tensor) -> AttentionBranched | torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W); with the branch, in training, of both branches."""
        self._check_images(x)
        x, branch_logits = self.features(x), None
        if self.attention is not None:
            map, branch_logits = self.attention(x)
            x = modulate(x, map[:, None], residual=True)
        logits = self.classifier(F.relu(self.norm(self.stage(x))).mean((2, 3)))
        return AttentionBranched(logits, branch_logits) if self.training and branch_logits is not None else logits

    def loss(self, output: AttentionBranched | torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy; with the branch, in training, the sum over both branches."""
        outputs = output if isinstance(output, AttentionBranched) else (output,)
        return sum(super(WideResNet, self).loss(logits, labels) for logits in outputs)
