"""EfficientNet-b0 with rectangular attention."""

import os

import torch
import torch.nn.functional as F
from torch import nn

from attnkern.models._layers import MapNorm, check_images, check_network
from attnkern.models.registry import register_model
from attnkern.nn import WindowAttention

#: Of EfficientNet-b0: expansion, kernel, stride, input channels, output channels, blocks.
_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
#: Rate of dropout before the classifier and of stochastic depth at the last block.
_DROPOUT = 0.2


def _backbone(width, dropout):
    """torchvision's network of 16 blocks in seven stages, between a stem and a 1x1 convolution."""
    try:
        from torchvision.models import efficientnet
    except ImportError as error:
        raise ImportError("efficientnet_b0_window needs torchvision: pip install torchvision") from error
    stages = [efficientnet.MBConvConfig(*stage, width_mult=width, depth_mult=1.0) for stage in _STAGES]
    network = efficientnet.EfficientNet(stages, dropout=0.0, stochastic_depth_prob=dropout, norm_layer=MapNorm)
    return network.features


def _feature_weights(weights):
    """The backbone's part of torchvision's weights: an enum member or its name, or a file of a state_dict."""
    from torchvision.models import EfficientNet_B0_Weights

    if isinstance(weights, str) and weights in EfficientNet_B0_Weights.__members__:
        weights = EfficientNet_B0_Weights[weights]
    if isinstance(weights, EfficientNet_B0_Weights):
        state = weights.get_state_dict(progress=False, check_hash=True)
    elif isinstance(weights, (str, os.PathLike)) and os.path.exists(weights):
        state = torch.load(weights, map_location="cpu", weights_only=True)
    else:
        names = ", ".join(map(repr, EfficientNet_B0_Weights.__members__))
        raise ValueError(f"EfficientNetB0Window: weights must be None, {names} or a file, got {weights!r}")
    prefix = "features."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@register_model("efficientnet_b0_window")
class EfficientNetB0Window(nn.Module):
    """torchvision's EfficientNet-b0 with :class:`attnkern.nn.WindowAttention` after block 15, the last of 16.

    Behind the last 1x1 convolution and the global average stands a hidden layer of 512 with ReLU before the classifier.
    ``features`` has torchvision's keys. Attention map: ``attention.map``, at 1/32 of the image's resolution.

    Args:
        num_classes: number of logits.
        width: multiplier of the backbone's channels.
        in_chans: channels of the images.
        dropout: multiplier of torchvision's rates of dropout and stochastic depth, 0.2 each.
        weights: of the backbone: None for random ones, a member of torchvision's ``EfficientNet_B0_Weights`` or its
            name (torchvision downloads it where it is not cached), or a file that holds a state_dict of torchvision's
            efficientnet_b0. They need ``width=1`` and ``in_chans=3``.

    Raises:
        ImportError: torchvision is not installed.
        ValueError, TypeError: weights that are none of these, or another argument out of its range.

    Source: Convolutional Rectangular Attention Module, Appendix G.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        weights=None,
    ):
        super().__init__()
        where = type(self).__name__
        check_network(where, num_classes, width, in_chans)
        if weights is not None and (width, in_chans) != (1, 3):
            raise ValueError(f"{where}: weights need width=1 and in_chans=3, got width={width} and in_chans={in_chans}")
        self.in_chans = in_chans
        self.features = _backbone(width, _DROPOUT * dropout)
        if in_chans != 3:
            stem = self.features[0][0]
            self.features[0][0] = nn.Conv2d(in_chans, stem.out_channels, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(self.features[0][0].weight, mode="fan_out")
        if weights is not None:
            self.features.load_state_dict(_feature_weights(weights))
        last = self.features[-1][0]
        self.attention = WindowAttention(last.in_channels)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(_DROPOUT * dropout),
            nn.Linear(last.out_channels, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W), H and W at least 32."""
        check_images("EfficientNetB0Window", x, self.in_chans)
        *stages, last = self.features
        for stage in stages:
            x = stage(x)
        return self.classifier(last(self.attention(x)))

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(output, labels)
