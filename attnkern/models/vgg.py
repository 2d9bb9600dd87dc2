"""VGG of Learn to Pay Attention: plain, with a class activation map, with compatibility pooling.

See :mod:`attnkern.models.learn_to_pay_attention` for what follows the authors' code.
"""

import torch
from torch import nn

from attnkern._checks import check_choice, check_items
from attnkern.models.layers import Network, VectorNorm, check_dropout, conv_bn_relu, halved, scaled
from attnkern.models.learn_to_pay_attention import (
    COMPATIBILITIES,
    EPS,
    INITS,
    PooledNetwork,
    conv_block,
    initialise,
    max_pool,
)
from attnkern.models.registry import register_model
from attnkern.nn import ProgressiveAttention
from attnkern.nn._hooks import untouched


def _add_vgg_maps(network, in_chans, width, dropout, first_pool):
    """Add ``local7``, ``local10`` and ``local13``, VGG's five blocks without the first two poolings; {level: C}."""
    c64, c128, c256, c512 = (scaled(channels, width) for channels in (64, 128, 256, 512))
    drop3, drop4 = 0.3 * dropout, 0.4 * dropout
    network.local7 = nn.Sequential(
        *conv_block(in_chans, c64, 2, drop4, first_rate=drop3),
        *conv_block(c64, c128, 2, drop4),
        *conv_block(c128, c256, 3, drop4),
    )
    network.local10 = nn.Sequential(max_pool(first_pool), *conv_block(c256, c512, 3, drop4))
    network.local13 = nn.Sequential(max_pool(2), *conv_block(c512, c512, 3, drop4))
    return {7: c256, 10: c512, 13: c512}


@register_model("vgg")
@register_model("vgg_cub", cub=True)
class Vgg(Network):
    """VGG without attention: thirteen 3x3 convolutions, a maximum after each of the five blocks, two linear layers.

    The form for CUB's images of 80x80 has a further 2x2 maximum before the last convolution, and a 3x3 one after it.

    Args:
        num_classes: number of logits.
        width: multiplier of all channels.
        in_chans: channels of the images.
        dropout: multiplier of the published rates, 0.3 to 0.5.
        first_pool: size of the first pooling.
        cub: the form for CUB.
        init: initialisation of BatchNorm scales and of u. "torch7" (the authors'): uniform in [0, 1], and normal with
            variance 2. "pytorch": one, and uniform in ±1/√C, which is better for short training.

    Raises:
        ValueError: an unknown ``init``, or images with other channels.

    Source: Learn to Pay Attention, Section 4 and Table 1 (VGG).
    """

    feature_modules = ("block1", "block2", "block3", "block4", "block5")

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        first_pool: int = 2,
        cub: bool = False,
        init: str = "torch7",
    ):
        super().__init__(num_classes, in_chans, width)
        check_choice("Vgg", "init", init, INITS)
        check_dropout("Vgg", dropout, 0.5)
        plan = [in_chans, *(scaled(channels, width) for channels in (64, 128, 256, 512, 512))]
        for index, convs in enumerate((2, 2, 3, 3, 3)):
            first_rate = 0.3 * dropout if index == 0 else None
            block = nn.Sequential(*conv_block(plan[index], plan[index + 1], convs, 0.4 * dropout, first_rate))
            if index:
                block.insert(0, max_pool(first_pool if index == 1 else 2))
            self.add_module(f"block{index + 1}", block)
        if cub:
            # In one Sequential with the dropout layer, so that the names of the other layers do not change.
            self.block5[-4] = nn.Sequential(self.block5[-4], max_pool(2))
        c = plan[-1]
        self.head = nn.Sequential(
            max_pool(3 if cub else 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5 * dropout),
            nn.Linear(c, c), VectorNorm(c), nn.ReLU(inplace=True), nn.Dropout(0.5 * dropout),
        )  # fmt: skip
        self.classifier = nn.Linear(c, num_classes)
        initialise(self, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        for name in self.feature_modules:
            x = self.get_submodule(name)(x)
        return self.classifier(self.head(x))


@register_model("vgg_gap")
@register_model("vgg_gap_cub", first_pool=5)
class VggGap(Network):
    """VGG with global average pooling and one linear layer; its class activation map takes the place of attention.

    The maps have the resolution of the attention networks (8x8 of 32x32), which the paper leaves open. ``map`` receives
    Σ_k w_k f_k, with the weights w of the class with the largest logit. It is computed only when ``map`` has hooks or
    has been replaced.

    Args and Raises: as :class:`Vgg`.

    Source: Learn to Pay Attention, Table 1 (VGG-GAP, after Zhou et al.).
    """

    feature_modules = ("local7", "local10", "local13")

    def __init__(
        self,
        num_classes: int,
        *,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        first_pool: int = 2,
        init: str = "torch7",
    ):
        super().__init__(num_classes, in_chans, width)
        check_choice("VggGap", "init", init, INITS)
        check_dropout("VggGap", dropout, 0.4)
        channels = _add_vgg_maps(self, in_chans, width, dropout, first_pool)
        self.map = nn.Identity()
        self.classifier = nn.Linear(channels[13], num_classes)
        initialise(self, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        features = self.local13(self.local10(self.local7(x)))
        logits = self.classifier(features.mean((2, 3)))
        if not untouched(self.map):
            self.map(self._class_activation(features, logits.argmax(1)))
        return logits

    def _class_activation(self, features, classes):
        if untouched(self.classifier, nn.Linear):
            return torch.einsum("nk,nkhw->nhw", self.classifier.weight[classes], features)
        # The layer was wrapped or replaced: its contribution at each position is its output there minus its bias, the
        # output for zeros.
        bias = self.classifier(features.new_zeros(1, features.shape[1]))[:, :, None, None]
        maps = self.classifier(features.movedim(1, -1)).movedim(-1, 1) - bias
        return maps.take_along_dim(classes[:, None, None, None], 1).squeeze(1)


class VggAttention(PooledNetwork):
    """VGG with compatibility pooling at layers 7, 10 or 13 (VGG-att, -att2, -att3), or progressive attention (VGG-PAN).

    Fifteen convolutions; g comes from a linear layer after the last. Attention maps: ``attention7.map``,
    ``attention10.map``, ``attention13.map``. Progressive: the map of independent sigmoid scores at layer 10 weighs the
    input of the next block, and layer 13 alone is pooled and classified. Layer 10 has its own branch to a global
    vector, which is added to the locals before they are scored: a sigmoid does not cancel it, so the branch is trained.

    The authors' CUB form with three levels cannot be run: it pools layer 7 by 2.5, doubles the map again, and expects
    32x32 maps of 80x80 images. Here that network pools 5x5 after layer 7, as their CUB form with two levels does.

    Args:
        num_classes: number of logits.
        levels: layers whose maps are pooled, among 7, 10 and 13.
        compatibility: "pc" (parametrised) or "dp" (dot product).
        head: "concat" joins the levels' vectors for one classifier; "indep" has one classifier per level.
        combine: of "indep": "mean" of the probabilities (the paper), or "sum_logprob" (the authors' code).
        progressive: filter the output of layer 10 by :class:`attnkern.nn.ProgressiveAttention`.
        width: multiplier of all channels.
        in_chans: channels of the images.
        dropout: multiplier of the published rates, 0.3 to 0.5; narrow networks learn faster with less.
        first_pool: size of the first pooling; 5 for the 80x80 images of CUB.
        global_branch: under "pc", run the layers up to g, whose gradients are exactly zero.
        init: as :class:`Vgg`.

    Raises:
        ValueError: an unknown option, levels that do not exist, or images with other channels.

    Source: Learn to Pay Attention, Section 4 and Appendix A.2.
    """

    feature_modules = ("local7", "local10", "local13")

    def __init__(
        self,
        num_classes: int,
        *,
        levels: tuple[int, ...] = (10, 13),
        compatibility: str = "pc",
        head: str = "concat",
        combine: str = "mean",
        progressive: bool = False,
        width: float = 1.0,
        in_chans: int = 3,
        dropout: float = 1.0,
        first_pool: int = 2,
        global_branch: bool = False,
        init: str = "torch7",
    ):
        super().__init__(num_classes, in_chans, width)
        self._check_options(compatibility, head, combine, init)
        check_dropout("VggAttention", dropout, 0.5)
        check_items("VggAttention", int, levels=levels)
        levels = tuple(sorted(levels))
        if not levels or len(set(levels)) != len(levels) or not set(levels) <= {7, 10, 13}:
            raise ValueError(f"VggAttention: levels must be one or more of 7, 10 and 13, each once, got {levels!r}")
        self.levels = levels
        channels = _add_vgg_maps(self, in_chans, width, dropout, first_pool)
        c, drop4, drop5 = channels[13], 0.4 * dropout, 0.5 * dropout

        def trunk(first):
            return nn.Sequential(
                max_pool(first), *conv_bn_relu(c, c, EPS), nn.Dropout(drop4),
                halved(), *conv_bn_relu(c, c, EPS), nn.Dropout(drop4),
                halved(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop5), nn.Linear(c, c),
            )  # fmt: skip

        self.trunk = trunk(2)
        if progressive:
            if 10 in levels:
                raise ValueError(f"VggAttention: levels must omit 10 when progressive is True, got {levels!r}")
            self.trunk10 = trunk(4)
            self.attention10 = ProgressiveAttention(channels[10])
        chosen = {level: channels[level] for level in levels}
        self._add_pools(chosen, c, drop5, drop5, compatibility, head, combine, global_branch)
        self.progressive = progressive
        initialise(self, init)
        self._freeze_unused()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        local7 = self.local7(x)
        local10 = self.local10(local7)
        filtered = self.attention10(local10, query=self.trunk10(local10)) if self.progressive else local10
        local13 = self.local13(filtered)
        maps = {7: local7, 10: local10, 13: local13}
        return self._classify({level: maps[level] for level in self.levels}, local13)


for _suffix, _first_pool in (("", 2), ("_cub", 5)):
    register_model(f"vgg_pan{_suffix}", progressive=True, levels=(13,), first_pool=_first_pool)(VggAttention)
    for _c in COMPATIBILITIES:
        _common = {"compatibility": _c, "first_pool": _first_pool}
        register_model(f"vgg_att_{_c}{_suffix}", levels=(13,), **_common)(VggAttention)
        for _head in ("concat", "indep"):
            register_model(f"vgg_att2_{_head}_{_c}{_suffix}", levels=(10, 13), head=_head, **_common)(VggAttention)
    register_model(f"vgg_att3_concat_pc{_suffix}", levels=(7, 10, 13), first_pool=_first_pool)(VggAttention)
