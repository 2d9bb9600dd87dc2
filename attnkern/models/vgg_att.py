"""VGG with two levels of compatibility pooling (Learn to Pay Attention, VGG-att2-concat-pc)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attnkern.models._layers import VectorNorm, check_images, check_network, conv_bn_relu, scaled
from attnkern.models.registry import register_model
from attnkern.nn import CompatibilityPool

#: BatchNorm's, as in the published network.
_EPS = 1e-3


def _block(inputs, outputs, convs, dropout):
    """3x3 convolutions with dropout after each but the last."""
    layers = conv_bn_relu(inputs, outputs, _EPS)
    for _ in range(convs - 1):
        layers += [nn.Dropout(dropout), *conv_bn_relu(outputs, outputs, _EPS)]
    return layers


def _context(channels, dropout):
    return nn.Sequential(VectorNorm(channels), nn.ReLU(inplace=True), nn.Dropout(dropout))


@register_model("vgg_att2_concat_pc")
class VggAtt2ConcatPc(nn.Module):
    """VGG-att2-concat-pc: the locals of layers 10 and 13, each pooled by its compatibility, joined and classified.

    Under the parametrised compatibility the global vector g cancels (see :class:`attnkern.nn.CompatibilityPool`), so
    the layers between layer 13 and g train on nothing. They are in the state_dict, but frozen and not run unless
    ``global_branch`` is True; the logits are the same either way. Attention maps: ``attention10.map``,
    ``attention13.map``.

    Args:
        num_classes: number of logits.
        width: multiplier of all channels.
        in_chans: channels of the images.
        dropout: multiplier of the published rates, 0.3 to 0.5; narrow networks learn faster with less.
        global_branch: run the layers up to g, with gradients that are exactly zero.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels or below 32x32.

    Source: Learn to Pay Attention, Section 4; dropout, initialisation and head as in the authors' code.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        global_branch: bool = False,
    ):
        super().__init__()
        check_network("VggAtt2ConcatPc", num_classes, width, in_chans)
        self.in_chans = in_chans
        self.global_branch = global_branch
        c64, c128, c256, c512 = (scaled(channels, width) for channels in (64, 128, 256, 512))
        drop3, drop4, drop5 = (rate * dropout for rate in (0.3, 0.4, 0.5))
        self.local10 = nn.Sequential(
            *_block(in_chans, c64, 2, drop3),
            *_block(c64, c128, 2, drop4),
            *_block(c128, c256, 3, drop4),
            nn.MaxPool2d(2),
            *_block(c256, c512, 3, drop4),
        )
        self.local13 = nn.Sequential(nn.MaxPool2d(2), *_block(c512, c512, 3, drop4))
        self.trunk = nn.Sequential(
            nn.MaxPool2d(2),
            *conv_bn_relu(c512, c512, _EPS),
            nn.Dropout(drop4),
            nn.MaxPool2d(2),
            *conv_bn_relu(c512, c512, _EPS),
            nn.Dropout(drop4),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(drop5),
            nn.Linear(c512, c512),
        )
        self.attention10 = CompatibilityPool(c512, c512)
        self.attention13 = CompatibilityPool(c512, c512)
        self.context10 = _context(c512, drop5)
        self.context13 = _context(c512, drop5)
        self.classifier = nn.Linear(2 * c512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
                nn.init.zeros_(module.bias)
        self.trunk.requires_grad_(global_branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W), H and W at least 32."""
        check_images("VggAtt2ConcatPc", x, self.in_chans)
        local10 = self.local10(x)
        local13 = self.local13(local10)
        g = self.trunk(local13) if self.global_branch else None
        contexts = self.context10(self.attention10(local10, g)), self.context13(self.attention13(local13, g))
        return self.classifier(torch.cat(contexts, 1))

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(output, labels)
