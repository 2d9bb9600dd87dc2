"""VGG-att3 of Learn to Pay Attention as SaoYan's PyTorch port defines it."""

import math

import torch
from torch import nn

from attnkern.models.layers import Network, conv_bn_relu, halved, scaled, xavier_uniform
from attnkern.models.registry import register_model
from attnkern.nn import CompatibilityPool


@register_model("attn_vgg_before", before=True)
@register_model("attn_vgg_after", before=False)
class AttnVgg(Network):
    """VGG-att3 as in SaoYan's PyTorch port, for weights that were trained with it.

    Unlike in ``vgg_att3_concat_pc``, layer 7 is projected to the channels of the others; there is no dropout, and
    neither BatchNorm nor ReLU between pooling and classifier; BatchNorm's eps is 1e-5; initial weights are Xavier
    uniform. The port's attention is normalised (``normalize_attn=True``, ``--normalize_attn``), so its global vector
    cancels: the layers that only compute this vector are left out, and the logits are the same. Attention maps:
    ``attention7.map``, ``attention10.map``, ``attention13.map``.

    Args:
        num_classes: number of logits.
        before: attend to layers 7, 10 and 13 before the maximum pooling that follows each (AttnVGG_before), otherwise
            after it (AttnVGG_after). Weights of the two have the same names and shapes.
        width: multiplier of all channels.
        in_chans: channels of the images.

    Raises:
        ValueError: images with other channels.

    Source: Learn to Pay Attention, Section 4 (VGG-att3-concat-pc), after the port SaoYan/LearnToPayAttention.
    """

    feature_modules = ("local7", "local10", "local13")

    def __init__(self, num_classes: int, *, before: bool = True, width: float = 1.0, in_chans: int = 3):
        super().__init__(num_classes, in_chans, width)
        self.before = before
        c64, c128, c256, c512 = (scaled(channels, width) for channels in (64, 128, 256, 512))
        self.local7 = nn.Sequential(
            *conv_bn_relu(in_chans, c64), *conv_bn_relu(c64, c64),
            *conv_bn_relu(c64, c128), *conv_bn_relu(c128, c128),
            *conv_bn_relu(c128, c256), *conv_bn_relu(c256, c256), *conv_bn_relu(c256, c256),
        )  # fmt: skip
        self.local10 = nn.Sequential(*conv_bn_relu(c256, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512))
        self.local13 = nn.Sequential(*conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512))
        self.pool = halved()
        self.attention7 = CompatibilityPool(c256, c512, project="local")
        self.attention10 = CompatibilityPool(c512, c512)
        self.attention13 = CompatibilityPool(c512, c512)
        self.classifier = nn.Linear(3 * c512, num_classes)
        xavier_uniform(self)
        for module in self.modules():
            if isinstance(module, CompatibilityPool):
                nn.init.xavier_uniform_(module.weight.unsqueeze(0), gain=math.sqrt(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        vectors = []
        for level in (7, 10, 13):
            features = self.get_submodule(f"local{level}")(x)
            x = self.pool(features)
            vectors.append(self.get_submodule(f"attention{level}")(features if self.before else x))
        return self.classifier(torch.cat(vectors, 1))
