"""Small networks with a 12x12 map: one trunk for every kind of attention and for none, to compare them on two cores.

None of the papers has them. Attention is placed between the last of five convolutions and the average over positions,
so that no later convolution can compensate for it.
"""

import torch
from torch import nn

from attnkern._checks import check_choice, check_count
from attnkern.models.information_bottleneck import BottleneckNetwork
from attnkern.models.layers import MapNorm, Network, conv_bn_relu, halved, scaled
from attnkern.models.learn_to_pay_attention import COMPATIBILITIES
from attnkern.models.rectangular import RectangularBase
from attnkern.models.registry import register_model
from attnkern.nn import BottleneckAttention, CompatibilityPool

#: Channels of the five convolutions: three at half of the resolution, the first with stride 2, and two at a quarter.
_CHANNELS = (16, 24, 24, 48, 48)
#: Values of the hidden layer between the averaged map and the classifier.
_HIDDEN = 64
#: Channels in the heads of window and position-wise attention, fewer than published: the features have fewer, too.
_WINDOW_HEAD, _POSITIONWISE_HEAD = (32, 64, 128), 32
#: Of batch normalisation and bottleneck attention.
_NORMS = ("before", "after")


def _trunk(in_chans, width):
    """The five convolutions in two blocks, one for each resolution, and the channels of both."""
    c1, c2, c3, c4, c5 = (scaled(channels, width) for channels in _CHANNELS)
    blocks = nn.Sequential(
        nn.Sequential(
            nn.Conv2d(in_chans, c1, 3, stride=2, padding=1), MapNorm(c1), nn.ReLU(inplace=True),
            *conv_bn_relu(c1, c2), *conv_bn_relu(c2, c3),
        ),
        nn.Sequential(halved(), *conv_bn_relu(c3, c4), *conv_bn_relu(c4, c5)),
    )  # fmt: skip
    return blocks, (c3, c5)


def _averaged():
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _hidden(channels, hidden):
    return [nn.Linear(channels, hidden), nn.ReLU(inplace=True)]


@register_model("small_none", attention="none")
@register_model("small_positionwise", attention="positionwise")
@register_model("small_window", attention="window")
class SmallNetwork(RectangularBase):
    """Five 3x3 convolutions, attention on the last map, global average, a hidden layer of 64 and the classifier.

    Attention map: ``attention.map``, at a quarter of the image's resolution.

    Args:
        num_classes: number of logits.
        attention: "window" (:class:`attnkern.nn.WindowAttention`), "positionwise"
            (:class:`attnkern.nn.PositionwiseAttention`) or "none".
        num_windows, shape: of :class:`attnkern.nn.WindowAttention`, only with "window" attention.
        norm: of :class:`attnkern.nn.PositionwiseAttention`, only with "positionwise" attention.
        width: multiplier of all channels.
        in_chans: channels of the images.

    Raises:
        ValueError, TypeError: an argument out of its range, or images with other channels.
    """

    feature_modules = ("features.0", "features.1")

    def __init__(
        self,
        num_classes: int,
        *,
        attention: str = "window",
        num_windows: int = 1,
        shape: str = "rectangle",
        norm: bool = False,
        width: float = 1.0,
        in_chans: int = 3,
    ):
        super().__init__(num_classes, in_chans, width)
        self.features, (_, channels) = _trunk(in_chans, width)
        self.split = len(self.features)
        head = tuple(scaled(outputs, width) for outputs in _WINDOW_HEAD)
        self._set_attention(channels, attention, num_windows, shape, norm, head, scaled(_POSITIONWISE_HEAD, width))
        hidden = scaled(_HIDDEN, width)
        self.head = nn.Sequential(*_averaged(), *_hidden(channels, hidden))
        self.classifier = nn.Linear(hidden, num_classes)


@register_model("small_compatibility_dp", compatibility="dp")
@register_model("small_compatibility_pc", compatibility="pc")
@register_model("small_compatibility2_dp", compatibility="dp", levels=2)
@register_model("small_compatibility2_pc", compatibility="pc", levels=2)
class SmallCompatibility(Network):
    """The trunk and head of :class:`SmallNetwork`; the last map is averaged by compatibility instead of evenly.

    With two levels the last map at half of the image's resolution is averaged, too, and the vectors are joined. The
    query is a linear layer of the even average of the last map; the parametrised compatibility needs none, since it
    would cancel. Attention maps: ``attention_fine.map`` at half of the image's resolution (two levels only), and
    ``attention.map`` at a quarter.

    Args:
        num_classes: number of logits.
        compatibility: "pc" (parametrised) or "dp" (dot product).
        levels: 1 or 2.
        width: multiplier of all channels.
        in_chans: channels of the images.

    Raises:
        ValueError, TypeError: an argument out of its range, or images with other channels.

    Source: Learn to Pay Attention, Section 3.
    """

    feature_modules = SmallNetwork.feature_modules

    def __init__(
        self, num_classes: int, *, compatibility: str = "pc", levels: int = 1, width: float = 1.0, in_chans: int = 3
    ):
        super().__init__(num_classes, in_chans, width)
        where = type(self).__name__
        check_choice(where, "compatibility", compatibility, COMPATIBILITIES)
        check_count(where, levels=levels)
        if levels > 2:
            raise ValueError(f"{where}: levels must be 1 or 2, got {levels}")
        self.features, (fine, channels) = _trunk(in_chans, width)
        kind = COMPATIBILITIES[compatibility]
        self.query = None if compatibility == "pc" else nn.Sequential(*_averaged(), nn.Linear(channels, channels))
        if levels == 2:
            project = None if compatibility == "pc" or fine == channels else "query"
            query_channels = channels if project else fine
            self.attention_fine = CompatibilityPool(fine, query_channels, kind, project=project)
        else:
            self.attention_fine = None
        self.attention = CompatibilityPool(channels, channels, kind)
        hidden = scaled(_HIDDEN, width)
        self.head = nn.Sequential(*_hidden(channels + (fine if levels == 2 else 0), hidden))
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        fine = self.features[0](x)
        last = self.features[1](fine)
        query = None if self.query is None else self.query(last)
        vectors = [] if self.attention_fine is None else [self.attention_fine(fine, query)]
        return self.classifier(self.head(torch.cat([*vectors, self.attention(last, query)], 1)))


@register_model("small_dvib", attention=False)
@register_model("small_bottleneck")
@register_model("small_bottleneck_qt", num_anchors=20)
class SmallBottleneck(BottleneckNetwork):
    """The trunk of :class:`SmallNetwork` with bottleneck attention, and the bottleneck z as its hidden layer.

    Args:
        num_classes: number of logits.
        attention: False for the bottleneck z alone.
        num_anchors: Q, or None for a continuous map.
        residual: of :class:`attnkern.nn.BottleneckAttention`.
        norm: place of the batch normalisation: "before" the attention, in the last convolution, as in the trunk of the
            others, or "after" it.
        width: multiplier of all channels and of z.
        in_chans: channels of the images.
        variant, samples, beta, anchor_weight, commitment_weight: as
            :class:`attnkern.models.BottleneckNetwork`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images with other channels.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 3.
    """

    feature_modules = SmallNetwork.feature_modules

    def __init__(
        self,
        num_classes: int,
        *,
        attention: bool = True,
        num_anchors: int | None = None,
        residual: bool = True,
        norm: str = "before",
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
        check_choice(type(self).__name__, "norm", norm, _NORMS)
        self.features, (_, channels) = _trunk(in_chans, width)
        if norm == "after":
            self.features[-1][-2] = nn.Identity()
        self.attention = BottleneckAttention(channels, num_anchors, residual=residual) if attention else None
        hidden = scaled(_HIDDEN, width)
        after = [MapNorm(channels)] if norm == "after" else []
        self.encoder = nn.Sequential(*after, *_averaged(), nn.Linear(channels, 2 * hidden))
        self.decoder = nn.Sequential(*_hidden(hidden, hidden))
        self.classifier = nn.Linear(hidden, num_classes)
