"""ResNet-164 of Learn to Pay Attention, plain and with compatibility pooling.

See :mod:`attnkern.models.learn_to_pay_attention` for what follows the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import check_count, check_items
from attnkern.models.layers import MapNorm, check_dropout, conv_bn_relu, halved, scaled, zero_biases
from attnkern.models.learn_to_pay_attention import EPS, PooledNetwork, initialise, max_pool
from attnkern.models.registry import register_model


class _Bottleneck(nn.Module):
    """Pre-activation bottleneck: 1x1 convolution with stride, 3x3, 1x1, each after BatchNorm and ReLU."""

    def __init__(self, inputs, middle, outputs, stride):
        super().__init__()
        self.norm = MapNorm(inputs)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, middle, 1, stride, bias=False), MapNorm(middle), nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False), MapNorm(middle), nn.ReLU(inplace=True),
            nn.Conv2d(middle, outputs, 1, bias=False),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        activated = F.relu(self.norm(x))
        return (x if self.shortcut is None else self.shortcut(activated)) + self.body(activated)


@register_model("rn164")
@register_model("rn164_att", levels=(4,))
@register_model("rn164_att2", levels=(3, 4))
class ResNetAttention(PooledNetwork):
    """ResNet-164, pre-activation, with compatibility pooling at its last or its last two levels (RN-att, RN-att2).

    Levels 2, 3 and 4 hold 18 bottlenecks each, of 64, 128 and 256 channels. Attention maps: ``attention3.map``,
    ``attention4.map``. The locals are the outputs of the blocks, before BatchNorm.

    The authors' code for one level of attention cannot be run: it ends in two 3x3 convolutions without normalisation,
    the second with stride 2, and expects the 8x8 maps before them. Here one level has the layers of two, the form that
    their code does define.

    Args:
        num_classes: number of logits.
        levels: levels whose maps are pooled, among 2, 3 and 4. Without any: average pooling, the plain ResNet.
        blocks: bottlenecks per level.
        compatibility, head, combine, width, in_chans, dropout, global_branch, init: as :class:`VggAttention`.

    Raises:
        ValueError: an unknown option, levels that do not exist, or images with other channels.

    Source: Learn to Pay Attention, Section 4 and Appendix A.2.
    """

    feature_modules = ("level2", "level3", "level4")

    def __init__(
        self,
        num_classes: int,
        *,
        levels: tuple[int, ...] = (),
        blocks: int = 18,
        compatibility: str = "pc",
        head: str = "concat",
        combine: str = "mean",
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        global_branch: bool = False,
        init: str = "torch7",
    ):
        super().__init__(num_classes, in_chans, width)
        check_count("ResNetAttention", blocks=blocks)
        self._check_options(compatibility, head, combine, init)
        check_dropout("ResNetAttention", dropout, 0.5)
        check_items("ResNetAttention", int, levels=levels)
        levels = tuple(sorted(levels))
        if len(set(levels)) != len(levels) or not set(levels) <= {2, 3, 4}:
            raise ValueError(f"ResNetAttention: levels must be among 2, 3 and 4, each once, got {levels!r}")
        self.levels = levels
        inputs = scaled(16, width)
        self.stem = nn.Conv2d(in_chans, inputs, 3, padding=1, bias=False)
        channels = {}
        for level, outputs, stride in ((2, 64, 1), (3, 128, 2), (4, 256, 2)):
            middle, channels[level] = scaled(outputs // 4, width), scaled(outputs, width)
            stack = []
            for index in range(blocks):
                stack.append(_Bottleneck(inputs, middle, channels[level], 1 if index else stride))
                inputs = channels[level]
            self.add_module(f"level{level}", nn.Sequential(*stack))
        c = inputs
        if levels:
            self.trunk = nn.Sequential(
                MapNorm(c), nn.ReLU(), halved(), *conv_bn_relu(c, c, EPS), nn.Dropout(0.4 * dropout), max_pool(4),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5 * dropout), nn.Linear(c, c),
            )  # fmt: skip
            chosen = {level: channels[level] for level in levels}
            rates = 0.3 * dropout, 0.5 * dropout
            self._add_pools(chosen, c, *rates, compatibility, head, combine, global_branch)
        else:
            self.norm = MapNorm(c)
            self.classifier = nn.Linear(c, num_classes)
            zero_biases(self, nn.Linear)
        initialise(self, init)
        if levels:
            self._freeze_unused()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        level2 = self.level2(self.stem(x))
        level3 = self.level3(level2)
        level4 = self.level4(level3)
        if not self.levels:
            return self.classifier(F.relu(self.norm(level4)).mean((2, 3)))
        maps = {2: level2, 3: level3, 4: level4}
        return self._classify({level: maps[level] for level in self.levels}, level4)
