"""The networks of Learn to Pay Attention: VGG and ResNet-164 with compatibility pooling, and what they are compared to.

Layers, dropout, initialisation and heads follow the authors' code (Torch7), except where a class says otherwise. Under
the parametrised compatibility the global vector g cancels (see :class:`attnkern.nn.CompatibilityPool`), so the layers
between the last local map and g receive no gradient. They are in the state_dict, but frozen and not run unless
``global_branch`` is True; the logits are the same either way. The bias of that compatibility cancels too and is left
out: each of its levels has one parameter fewer than in the authors' code.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._common import check_choice, check_count, check_flag, check_items, check_number
from attnkern.models.layers import (
    MapNorm,
    Network,
    VectorNorm,
    check_logits,
    conv_bn_relu,
    halved,
    he_normal,
    scaled,
    xavier_uniform,
    zero_biases,
)
from attnkern.models.registry import register_model
from attnkern.nn import CompatibilityPool, ProgressiveAttention, _untouched

#: BatchNorm's behind the convolutions of VGG and of the branches to g; elsewhere it is PyTorch's default, 1e-5.
_EPS = 1e-3
_COMPATIBILITIES = {"pc": "parametrised", "dp": "dot"}
#: "torch7", the authors': scales of BatchNorm uniform in [0, 1], u normal with variance 2, as a 1x1 convolution to one
#: map has it. "pytorch": scales of one, u uniform in ±1/√C, so that attention begins almost uniform.
_INITS = ("torch7", "pytorch")


def _initialise(network, init):
    """He et al.'s convolutions and zero biases, and what :data:`_INITS` says of the rest."""
    he_normal(network)
    zero_biases(network, nn.Conv2d)
    for module in network.modules():
        if init == "torch7" and isinstance(module, (VectorNorm, MapNorm)):
            nn.init.uniform_(module.weight)
        elif init == "torch7" and isinstance(module, CompatibilityPool) and module.weight is not None:
            nn.init.normal_(module.weight, std=math.sqrt(2))
        elif init == "pytorch" and isinstance(module, ProgressiveAttention):
            module.score.reset_parameters()


def _block(inputs, outputs, convs, rate, first_rate=None):
    """3x3 convolutions with dropout after each but the last."""
    layers = conv_bn_relu(inputs, outputs, _EPS)
    for index in range(convs - 1):
        layers += [nn.Dropout(first_rate if index == 0 and first_rate is not None else rate)]
        layers += conv_bn_relu(outputs, outputs, _EPS)
    return layers


def _pool(size):
    return nn.MaxPool2d(size, ceil_mode=True)


def _add_vgg_maps(network, in_chans, width, dropout, first_pool):
    """``local7``, ``local10`` and ``local13``: VGG's five blocks with the first two poolings left out."""
    c64, c128, c256, c512 = (scaled(channels, width) for channels in (64, 128, 256, 512))
    drop3, drop4 = 0.3 * dropout, 0.4 * dropout
    network.local7 = nn.Sequential(
        *_block(in_chans, c64, 2, drop4, first_rate=drop3),
        *_block(c64, c128, 2, drop4),
        *_block(c128, c256, 3, drop4),
    )
    network.local10 = nn.Sequential(_pool(first_pool), *_block(c256, c512, 3, drop4))
    network.local13 = nn.Sequential(_pool(2), *_block(c512, c512, 3, drop4))
    return {7: c256, 10: c512, 13: c512}


@register_model("vgg")
@register_model("vgg_cub", cub=True)
class Vgg(Network):
    """VGG without attention: thirteen 3x3 convolutions, a maximum after each of the five blocks, two linear layers.

    The form for CUB's images of 80x80 has a further 2x2 maximum before the last convolution, and a 3x3 one behind it.

    Args:
        num_classes: number of logits.
        width: multiplier of all channels.
        in_chans: channels of the images.
        dropout: multiplier of the published rates, 0.3 to 0.5.
        first_pool: size of the first pooling.
        cub: the form for CUB.
        init: of BatchNorm's scales and of u, "torch7" (the authors') or "pytorch". "torch7": uniform in [0, 1], and
            normal with variance 2. "pytorch": one, and uniform in ±1/√C, with which short training goes better.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels.

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
        check_count("Vgg", first_pool=first_pool)
        check_number("Vgg", dropout=dropout)
        check_flag("Vgg", cub=cub)
        check_choice("Vgg", "init", init, _INITS)
        plan = [in_chans, *(scaled(channels, width) for channels in (64, 128, 256, 512, 512))]
        for index, convs in enumerate((2, 2, 3, 3, 3)):
            first_rate = 0.3 * dropout if index == 0 else None
            block = nn.Sequential(*_block(plan[index], plan[index + 1], convs, 0.4 * dropout, first_rate))
            if index:
                block.insert(0, _pool(first_pool if index == 1 else 2))
            self.add_module(f"block{index + 1}", block)
        if cub:
            # Together with the dropout before the last convolution: the layers' names stay those of the other form.
            self.block5[-4] = nn.Sequential(self.block5[-4], _pool(2))
        c = plan[-1]
        self.head = nn.Sequential(
            _pool(3 if cub else 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5 * dropout), nn.Linear(c, c),
            VectorNorm(c), nn.ReLU(inplace=True), nn.Dropout(0.5 * dropout),
        )  # fmt: skip
        self.classifier = nn.Linear(c, num_classes)
        _initialise(self, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        for name in self.feature_modules:
            x = self.get_submodule(name)(x)
        return self.classifier(self.head(x))


@register_model("vgg_gap")
@register_model("vgg_gap_cub", first_pool=5)
class VggGap(Network):
    """VGG with global average pooling and one linear layer, whose class activation map stands for attention.

    The maps keep the resolution of the attention networks (8x8 of 32x32), which the paper leaves open. ``map`` shows
    Σ_k w_k f_k, w of the class with the largest logit; it is computed only where something looks at it.

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
        check_count("VggGap", first_pool=first_pool)
        check_number("VggGap", dropout=dropout)
        check_choice("VggGap", "init", init, _INITS)
        channels = _add_vgg_maps(self, in_chans, width, dropout, first_pool)
        self.map = nn.Identity()
        self.classifier = nn.Linear(channels[13], num_classes)
        _initialise(self, init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        features = self.local13(self.local10(self.local7(x)))
        logits = self.classifier(features.mean((2, 3)))
        if not _untouched(self.map):
            self.map(self._class_activation(features, logits.argmax(1)))
        return logits

    def _class_activation(self, features, classes):
        if _untouched(self.classifier, nn.Linear):
            return torch.einsum("nk,nkhw->nhw", self.classifier.weight[classes], features)
        # What the layer adds to the logits at each position is its output there without that of zeros, the bias.
        bias = self.classifier(features.new_zeros(1, features.shape[1]))[:, :, None, None]
        maps = self.classifier(features.movedim(1, -1)).movedim(-1, 1) - bias
        return maps.take_along_dim(classes[:, None, None, None], 1).squeeze(1)


class _Levels(Network):
    """Compatibility pooling at several levels, and the two ways to classify what it gives.

    Args:
        compatibility: "pc" (parametrised) or "dp" (dot product).
        head: "concat" joins the levels' vectors for one classifier; "indep" has one classifier a level.
        combine: of "indep": "mean" of the probabilities (the paper), or "sum_logprob", the sum of their logarithms
            (the authors' code): a product of experts, whose loss is the sum of the levels' losses.
        global_branch: under "pc", run the layers up to g, with gradients that are exactly zero.
    """

    def _check_options(self, levels, dropout, compatibility, head, combine, init, **flags):
        """Raise unless these are right; the levels, sorted."""
        where = type(self).__name__
        check_items(where, int, levels=levels)
        check_number(where, dropout=dropout)
        check_choice(where, "compatibility", compatibility, _COMPATIBILITIES)
        check_choice(where, "head", head, ("concat", "indep"))
        check_choice(where, "combine", combine, ("mean", "sum_logprob"))
        check_choice(where, "init", init, _INITS)
        check_flag(where, **flags)
        return tuple(sorted(levels))

    def _add_levels(self, channels, query_channels, rate, compatibility, head, combine, global_branch):
        """Pooling, context and head; ``rate`` is the context's dropout and, in turn, the one of g's projection."""
        rate, query_rate = rate
        self.combine = combine
        self.global_branch = global_branch or compatibility == "dp"
        for level, c in channels.items():
            self.add_module(f"attention{level}", CompatibilityPool(c, c, _COMPATIBILITIES[compatibility]))
            context = nn.Sequential(VectorNorm(c), nn.ReLU(inplace=True), nn.Dropout(rate))
            self.add_module(f"context{level}", context)
        # One projection of g for each other number of channels, shared by the levels that have it.
        self.projections = nn.ModuleDict(
            {
                str(c): nn.Sequential(
                    VectorNorm(query_channels), nn.ReLU(), nn.Dropout(query_rate), nn.Linear(query_channels, c)
                )
                for c in sorted(set(channels.values()) - {query_channels})
            }
        )
        widths = list(channels.values())
        self.classifier = (
            nn.Linear(sum(widths), self.num_classes)
            if head == "concat"
            else nn.ModuleList(nn.Linear(c, self.num_classes) for c in widths)
        )

    def _freeze_global(self):
        for module in (self.trunk, self.projections):
            module.requires_grad_(self.global_branch)

    def _classify(self, levels, last):
        """Logits of locals {level: (N, C, H, W)}; ``last`` is where the trunk to g begins."""
        g = self.trunk(last) if self.global_branch else None
        vectors = []
        for level, local in levels.items():
            query, c = g, str(local.shape[1])
            if g is not None and c in self.projections:
                query = self.projections[c](g)
            pooled = self.get_submodule(f"attention{level}")(local, query)
            vectors.append(self.get_submodule(f"context{level}")(pooled))
        if not isinstance(self.classifier, nn.ModuleList):
            return self.classifier(torch.cat(vectors, 1))
        heads = zip(self.classifier, vectors, strict=True)
        experts = torch.stack([F.log_softmax(head(vector), 1) for head, vector in heads])
        return (
            experts.sum(0) if self.combine == "sum_logprob" else experts.logsumexp(0) - torch.tensor(len(experts)).log()
        )

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy; of summed logarithms of probabilities, each level's own."""
        check_logits(type(self).__name__, output, labels)
        if isinstance(self.classifier, nn.ModuleList) and self.combine == "sum_logprob":
            return F.nll_loss(output, labels)
        return F.cross_entropy(output, labels)


class VggAttention(_Levels):
    """VGG with compatibility pooling at layers 7, 10 or 13 (VGG-att, -att2, -att3), or progressive attention (VGG-PAN).

    Fifteen convolutions; g comes from a linear layer behind the last. Attention maps: ``attention13.map`` and the like.
    Progressive: the map of independent sigmoid scores at layer 10 weighs what the next block sees, and layer 13 alone
    is pooled and classified. Layer 10 has a branch of its own to a global vector, which its scores add to the locals:
    a sigmoid does not cancel it, and the branch is trained.

    The authors' CUB form with three levels cannot be run: it pools layer 7 by 2.5, doubles the map again, and expects
    32x32 of 80x80 images. Here that network pools 5x5 behind layer 7, as their CUB form with two levels does.

    Args:
        num_classes: number of logits.
        levels: layers whose maps are pooled, of 7, 10 and 13.
        compatibility: "pc" (parametrised) or "dp" (dot product).
        head: "concat" joins the levels' vectors for one classifier; "indep" has one classifier a level.
        combine: of "indep": "mean" of the probabilities (the paper), or "sum_logprob" (the authors' code).
        progressive: filter layer 10's maps by :class:`attnkern.nn.ProgressiveAttention`.
        width: multiplier of all channels.
        in_chans: channels of the images.
        dropout: multiplier of the published rates, 0.3 to 0.5; narrow networks learn faster with less.
        first_pool: size of the first pooling; 5 for the 80x80 images of CUB.
        global_branch: under "pc", run the layers up to g, with gradients that are exactly zero.
        init: as :class:`Vgg`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels.

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
        check_count("VggAttention", first_pool=first_pool)
        flags = {"progressive": progressive, "global_branch": global_branch}
        levels = self._check_options(levels, dropout, compatibility, head, combine, init, **flags)
        if not levels or len(set(levels)) != len(levels) or not set(levels) <= {7, 10, 13}:
            raise ValueError(f"VggAttention: levels must be different ones of 7, 10 and 13, got {levels!r}")
        self.levels = levels
        channels = _add_vgg_maps(self, in_chans, width, dropout, first_pool)
        c, drop4, drop5 = channels[13], 0.4 * dropout, 0.5 * dropout

        def trunk(first):
            return nn.Sequential(
                _pool(first), *conv_bn_relu(c, c, _EPS), nn.Dropout(drop4),
                halved(), *conv_bn_relu(c, c, _EPS), nn.Dropout(drop4),
                halved(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop5), nn.Linear(c, c),
            )  # fmt: skip

        self.trunk = trunk(2)
        if progressive:
            if 10 in levels:
                raise ValueError(
                    f"VggAttention: levels must omit 10, which progressive attention filters, got {levels!r}"
                )
            self.trunk10 = trunk(4)
            self.attention10 = ProgressiveAttention(channels[10])
        chosen = {level: channels[level] for level in levels}
        self._add_levels(chosen, c, (drop5, drop5), compatibility, head, combine, global_branch)
        self.progressive = progressive
        _initialise(self, init)
        self._freeze_global()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        local7 = self.local7(x)
        local10 = self.local10(local7)
        filtered = self.attention10(local10, query=self.trunk10(local10)) if self.progressive else local10
        local13 = self.local13(filtered)
        found = {7: local7, 10: local10, 13: local13}
        return self._classify({level: found[level] for level in self.levels}, local13)


for _suffix, _first_pool in (("", 2), ("_cub", 5)):
    register_model(f"vgg_pan{_suffix}", progressive=True, levels=(13,), first_pool=_first_pool)(VggAttention)
    for _c in _COMPATIBILITIES:
        _common = {"compatibility": _c, "first_pool": _first_pool}
        register_model(f"vgg_att_{_c}{_suffix}", levels=(13,), **_common)(VggAttention)
        for _head in ("concat", "indep"):
            register_model(f"vgg_att2_{_head}_{_c}{_suffix}", levels=(10, 13), head=_head, **_common)(VggAttention)
    register_model(f"vgg_att3_concat_pc{_suffix}", levels=(7, 10, 13), first_pool=_first_pool)(VggAttention)


@register_model("attn_vgg_before", before=True)
@register_model("attn_vgg_after", before=False)
class AttnVgg(Network):
    """VGG-att3 as SaoYan's PyTorch port has it, for the weights that were trained with it.

    It differs from ``vgg_att3_concat_pc``: layer 7 is projected to the channels of the others; there is no dropout, and
    neither BatchNorm nor ReLU between pooling and classifier; BatchNorm's eps is 1e-5; weights begin Xavier uniform.
    The port's attention is normalised (``normalize_attn=True``, ``--normalize_attn``), so that its global vector
    cancels: the layers that only make this vector are left out, and the logits are the same. Attention maps:
    ``attention7.map``, ``attention10.map``, ``attention13.map``.

    Args:
        num_classes: number of logits.
        before: attend to layers 7, 10 and 13 before the poolings behind them (AttnVGG_before), otherwise after
            (AttnVGG_after). Weights do not tell which of the two they belong to.
        width: multiplier of all channels.
        in_chans: channels of the images.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels.

    Source: Learn to Pay Attention, Section 4 (VGG-att3-concat-pc), after the port SaoYan/LearnToPayAttention.
    """

    feature_modules = ("local7", "local10", "local13")

    def __init__(self, num_classes: int, *, before: bool = True, width: float = 1.0, in_chans: int = 3):
        super().__init__(num_classes, in_chans, width)
        check_flag("AttnVgg", before=before)
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


class _Bottleneck(nn.Module):
    """Pre-activation bottleneck: 1x1 with stride, 3x3, 1x1, each behind BatchNorm and ReLU."""

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
class ResNetAttention(_Levels):
    """ResNet-164, pre-activation, with compatibility pooling at its last or its last two levels (RN-att, RN-att2).

    Levels 2, 3 and 4 hold 18 bottlenecks each, of 64, 128 and 256 channels. Attention maps: ``attention3.map``,
    ``attention4.map``. The locals are the blocks' sums as they are, before BatchNorm.

    The authors' code for one level of attention cannot be run: it ends in two 3x3 convolutions without normalisation,
    the second with stride 2, and expects the 8x8 maps before them. Here one level has the layers of two, the form that
    their code does define.

    Args:
        num_classes: number of logits.
        levels: whose maps are pooled, of 2, 3 and 4; none: average pooling, the plain ResNet.
        blocks: bottlenecks a level.
        compatibility, head, combine, width, in_chans, dropout, global_branch, init: as :class:`VggAttention`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels.

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
        levels = self._check_options(levels, dropout, compatibility, head, combine, init, global_branch=global_branch)
        if len(set(levels)) != len(levels) or not set(levels) <= {2, 3, 4}:
            raise ValueError(f"ResNetAttention: levels must be different ones of 2, 3 and 4, got {levels!r}")
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
                MapNorm(c), nn.ReLU(), halved(), *conv_bn_relu(c, c, _EPS), nn.Dropout(0.4 * dropout), _pool(4),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5 * dropout), nn.Linear(c, c),
            )  # fmt: skip
            chosen = {level: channels[level] for level in levels}
            self._add_levels(chosen, c, (0.3 * dropout, 0.5 * dropout), compatibility, head, combine, global_branch)
        else:
            self.norm = MapNorm(c)
            self.classifier = nn.Linear(c, num_classes)
            zero_biases(self, nn.Linear)
        _initialise(self, init)
        if levels:
            self._freeze_global()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        self._check_images(x)
        level2 = self.level2(self.stem(x))
        level3 = self.level3(level2)
        level4 = self.level4(level3)
        if not self.levels:
            return self.classifier(F.relu(self.norm(level4)).mean((2, 3)))
        found = {2: level2, 3: level3, 4: level4}
        return self._classify({level: found[level] for level in self.levels}, level4)
