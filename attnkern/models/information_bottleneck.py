"""The networks of Information Bottleneck Approach to Spatial Attention Learning: VGG and WRN-28-10, and CUB's forms.

Layers, initialisation and losses as in the authors' code.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._common import check_choice, check_count, check_flag, check_kind, check_number
from attnkern._numerics import wide
from attnkern.models.layers import (
    MapNorm,
    Network,
    backbone_weights,
    check_backbone,
    check_logits,
    conv_bn_relu,
    halved,
    he_normal,
    replace_stem,
    scaled,
    xavier_uniform,
    zero_biases,
)
from attnkern.models.registry import register_model
from attnkern.nn import BottleneckAttention, _input_for
from attnkern.reference import modulate


class Bottlenecked(NamedTuple):
    """What :class:`BottleneckNetwork` returns in training."""

    logits: torch.Tensor  #: (N, num_classes)
    mean: torch.Tensor  #: (N, K) of p(z|x, a)
    std: torch.Tensor  #: (N, K) of p(z|x, a)
    anchor_loss: torch.Tensor  #: scalar
    commitment_loss: torch.Tensor  #: scalar


def _check_loss(where, variant, **weights):
    check_choice(where, "variant", variant, ("correct", "reference"))
    check_number(where, **weights)


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
        ValueError, TypeError: an unknown variant, an output that is none of a training network, or no numbers.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 8 and 10, which print a minus before the
    KL and anchor terms.
    """
    where = "bottleneck_loss"
    check_kind(where, Bottlenecked, output=output)
    check_logits(where, output.logits, labels)
    weights = {"beta": beta, "anchor_weight": anchor_weight, "commitment_weight": commitment_weight}
    _check_loss(where, variant, **weights)
    log_std = output.std.log() if variant == "correct" else output.std
    divergence = 0.5 * (output.mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(1).mean()
    bits = (F.cross_entropy(output.logits, labels) + beta * divergence) / math.log(2)
    return bits + anchor_weight * output.anchor_loss + commitment_weight * output.commitment_loss


def _check_anchors(where, num_anchors):
    if num_anchors is not None:
        check_count(where, num_anchors=num_anchors)


class BottleneckNetwork(Network):
    """Features, stochastic attention, encoder to p(z|x, a), decoder: what the bottlenecked networks share.

    In training it returns :class:`Bottlenecked` from one sample of a and one of z. In evaluation it returns logits:
    without noise (a and z at their means), or averaged over ``samples`` with the noise on, as published. Attention map:
    ``attention.map``.

    Args:
        num_anchors: Q, or None: the map stays continuous.
        variant: of the KL term, "correct" or "reference"; see :func:`bottleneck_loss`.
        samples: None, or in evaluation (samples of a, samples of z for each); published: (4, 4).
        beta, anchor_weight, commitment_weight: of :func:`bottleneck_loss`.
    """

    def _configure(self, variant, samples, beta, anchor_weight, commitment_weight):
        where = type(self).__name__
        weights = {"beta": beta, "anchor_weight": anchor_weight, "commitment_weight": commitment_weight}
        _check_loss(where, variant, **weights)
        if samples is not None:
            check_kind(where, tuple | list, samples=samples)
            if len(samples) != 2:
                raise ValueError(f"{where}: samples must be (of a, of z for each), got {samples}")
            for count in samples:
                check_count(where, samples=count)
        self.samples = samples
        self.weights_of_loss = weights | {"variant": variant}

    def _encode(self, x, sample):
        """Mean and standard deviation of p(z|x, a), and the losses of the anchors."""
        losses = (x.new_zeros(()),) * 2
        if self.attention is not None:
            attended = self.attention(x, sample=sample)
            x, losses = attended.output, attended[-2:]
        statistics = self.encoder(x)
        mean, raw_std = statistics.to(wide(statistics.dtype)).chunk(2, 1)
        return mean, F.softplus(raw_std - 5), losses

    def _decode(self, z):
        return self.classifier(self.decoder(_input_for(self.classifier, z)))

    def forward(self, x: torch.Tensor) -> Bottlenecked | torch.Tensor:
        """:class:`Bottlenecked` in training, else logits, of images (N, in_chans, H, W)."""
        self._check_images(x)
        features = self.features(x)
        if self.training:
            mean, std, losses = self._encode(features, sample=True)
            return Bottlenecked(self._decode(mean + std * torch.randn_like(std)), mean, std, *losses)
        if self.samples is None:
            return self._decode(self._encode(features, sample=False)[0])
        logits = []
        for _ in range(self.samples[0]):
            mean, std, _ = self._encode(features, sample=True)
            logits += [self._decode(mean + std * torch.randn_like(std)) for _ in range(self.samples[1])]
        return torch.stack(logits).mean(0)

    def loss(self, output: Bottlenecked | torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """:func:`bottleneck_loss` with the network's weights; of an evaluation's logits the cross entropy alone."""
        if isinstance(output, torch.Tensor):
            return super().loss(output, labels)
        return bottleneck_loss(output, labels, **self.weights_of_loss)


@register_model("vgg_dvib", attention=False)
@register_model("vgg_aib")
@register_model("vgg_aib_qt", num_anchors=20)
class VggBottleneck(BottleneckNetwork):
    """VGG with bottlenecked attention at half resolution: VGG-aib, -aib-qt with anchors, VGG-DVIB without attention.

    Args:
        num_classes: number of logits.
        attention: False for VGG-DVIB, which has the bottleneck z alone.
        num_anchors: Q, or None: the map stays continuous. Published: 20 for CIFAR-10, 50 for CIFAR-100.
        width: multiplier of all channels and of z.
        in_chans: channels of the images.
        variant, samples, beta, anchor_weight, commitment_weight: as :class:`BottleneckNetwork`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.
    """

    feature_modules = ("features", "encoder.9", "encoder.19")

    def __init__(
        self,
        num_classes: int,
        *,
        attention: bool = True,
        num_anchors: int | None = None,
        width: float = 1.0,
        in_chans: int = 3,
        variant: str = "correct",
        samples: tuple[int, int] | None = None,
        beta: float = 0.005,
        anchor_weight: float = 0.4,
        commitment_weight: float = 0.1,
    ):
        super().__init__(num_classes, in_chans, width)
        check_flag("VggBottleneck", attention=attention)
        _check_anchors("VggBottleneck", num_anchors)
        self._configure(variant, samples, beta, anchor_weight, commitment_weight)
        c64, c128, c256, c512 = (scaled(channels, width) for channels in (64, 128, 256, 512))
        self.features = nn.Sequential(
            *conv_bn_relu(in_chans, c64), *conv_bn_relu(c64, c64),
            *conv_bn_relu(c64, c128), *conv_bn_relu(c128, c128),
            *conv_bn_relu(c128, c256), *conv_bn_relu(c256, c256), *conv_bn_relu(c256, c256), halved(),
        )  # fmt: skip
        self.attention = BottleneckAttention(c256, num_anchors) if attention else None
        self.encoder = nn.Sequential(
            *conv_bn_relu(c256, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), halved(),
            *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), *conv_bn_relu(c512, c512), halved(),
            *conv_bn_relu(c512, c512), halved(), *conv_bn_relu(c512, c512), halved(),
            nn.Conv2d(c512, c512, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(c512, 2 * c256),
        )  # fmt: skip
        self.decoder = nn.Sequential(nn.Linear(c256, c256), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(c256, num_classes)
        xavier_uniform(self)


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
    """WRN up to its second stage, where attention stands, and the channels of its second and third stage."""
    c16, c160, c320, c640 = (scaled(channels, width) for channels in (16, 160, 320, 640))
    stem = nn.Conv2d(in_chans, c16, 3, padding=1, bias=False)
    stages = _wide_stage(c16, c160, 1, blocks, dropout), _wide_stage(c160, c320, 2, blocks, dropout)
    return nn.Sequential(stem, *stages), c320, c640


def _map_head(stage, channels, num_classes):
    """Raw map (N, 1, H, W) of features: a stage at stride 1, a map for each class, and one map of these."""
    return nn.Sequential(
        stage, MapNorm(channels), nn.Conv2d(channels, num_classes, 1, bias=False), MapNorm(num_classes), nn.ReLU(),
        nn.Conv2d(num_classes, 1, 3, padding=1, bias=False), MapNorm(1),
    )  # fmt: skip


@register_model("wrn28_10_aib")
@register_model("wrn28_10_aib_qt", num_anchors=50)
class WideResNetBottleneck(BottleneckNetwork):
    """WRN-28-10 with bottlenecked attention behind its second stage: WRN-aib, and with anchors WRN-aib-qt.

    Args:
        num_classes: number of logits.
        num_anchors: Q, or None: the map stays continuous. Published: 50 for CIFAR-10, 20 for CIFAR-100.
        blocks: of each stage.
        width: multiplier of all channels and of z.
        in_chans: channels of the images.
        dropout: multiplier of the published rate, 0.3.
        variant, samples, beta, anchor_weight, commitment_weight: as :class:`BottleneckNetwork`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels.

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
        where = type(self).__name__
        check_count(where, blocks=blocks)
        _check_anchors(where, num_anchors)
        check_number(where, dropout=dropout)
        self._configure(variant, samples, beta, anchor_weight, commitment_weight)
        rate, k = 0.3 * dropout, scaled(512, width)
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


class AttentionBranched(NamedTuple):
    """What :class:`WideResNet` with an attention branch returns in training."""

    logits: torch.Tensor  #: (N, num_classes), of the perception branch
    branch_logits: torch.Tensor  #: (N, num_classes), of the attention branch


class _AttentionBranch(nn.Module):
    """Attention branch of ABN: f = Λ(raw map) from maps of the classes, whose averages are logits of their own."""

    def __init__(self, stage, channels, num_classes):
        super().__init__()
        self.head = _map_head(stage, channels, num_classes)
        self.score = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        self.map = nn.Identity()

    def forward(self, x):
        *to_classes, conv, norm = self.head
        for layer in to_classes:
            x = layer(x)
        raw = norm(conv(x))
        return self.map(raw.to(wide(raw.dtype)).sigmoid().squeeze(1)), self.score(x).mean((2, 3))


@register_model("wrn28_10")
@register_model("wrn28_10_abn", branch=True)
class WideResNet(Network):
    """WRN-28-10, plain or with ABN's attention branch behind its second stage: x + f·x, and the branch's own loss.

    Attention map of the branch: ``attention.map``.

    Args:
        num_classes: number of logits.
        branch: with the attention branch.
        blocks, width, in_chans, dropout: as :class:`WideResNetBottleneck`.

    Raises:
        ValueError, TypeError: an argument out of its range, or images of other channels.

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
        check_flag("WideResNet", branch=branch)
        check_count("WideResNet", blocks=blocks)
        check_number("WideResNet", dropout=dropout)
        rate = 0.3 * dropout
        self.features, c320, c640 = _wide_features(in_chans, width, blocks, rate)
        own_stage = _wide_stage(c320, c640, 1, blocks, rate) if branch else None
        self.attention = _AttentionBranch(own_stage, c640, num_classes) if branch else None
        self.stage = _wide_stage(c320, c640, 2, blocks, rate)
        self.norm = MapNorm(c640)
        self.classifier = nn.Linear(c640, num_classes)
        he_normal(self)
        zero_biases(self, nn.Linear)

    def forward(self, x: torch.Tensor) -> AttentionBranched | torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W); with the branch, in training, both kinds."""
        self._check_images(x)
        x, branch_logits = self.features(x), None
        if self.attention is not None:
            map, branch_logits = self.attention(x)
            x = modulate(x, map[:, None], residual=True)
        logits = self.classifier(F.relu(self.norm(self.stage(x))).mean((2, 3)))
        return AttentionBranched(logits, branch_logits) if self.training and branch_logits is not None else logits

    def loss(self, output: AttentionBranched | torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy; with the branch, in training, the sum of both."""
        outputs = output if isinstance(output, AttentionBranched) else (output,)
        return sum(super(WideResNet, self).loss(logits, labels) for logits in outputs)


def _vgg16(where, width, weights, quantized):
    """Features up to VGG16's last convolution, the layers up to the encoder's linear one, and the head of μ."""
    from torchvision.models import VGG16_Weights, vgg

    plan = [c if c == "M" else scaled(c, width) for c in vgg.cfgs["D"]]
    features = vgg.make_layers(plan)[:-1]
    c = scaled(512, width)
    hidden = [layer for _ in range(3) for layer in (nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True))]
    mean = nn.Sequential(*(hidden if quantized else ()), nn.Conv2d(c, 1, 3, padding=1))
    xavier_uniform(features)
    xavier_uniform(mean)
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    if weights is not None:
        features.load_state_dict(backbone_weights(where, VGG16_Weights, weights, "features."))
    return features, [nn.AdaptiveAvgPool2d(3)], mean, c, 9 * c


def _wrn50_2(where, width, weights):
    """Features up to WRN-50-2's third stage, the last stage, and the head of μ with a stage of its own at stride 1."""
    from torchvision.models import Wide_ResNet50_2_Weights, resnet

    network = resnet.ResNet(
        resnet.Bottleneck, [3, 4, 6, 3], width_per_group=max(1, round(128 * width)), norm_layer=MapNorm
    )
    # The stage of μ begins with random weights, whatever the backbone's.
    own_stage = copy.deepcopy(network.layer4)
    mean = nn.Sequential(own_stage, nn.Conv2d(2048, 1, 3, padding=1))
    for module in mean.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    he_normal(mean)
    if weights is not None:
        state = backbone_weights(where, Wide_ResNet50_2_Weights, weights, "")
        network.load_state_dict({**state, **{k: v for k, v in network.state_dict().items() if k.startswith("fc.")}})
    features = nn.Sequential(
        network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2, network.layer3
    )
    return features, [network.layer4, nn.AdaptiveAvgPool2d(1)], mean, 1024, 2048


@register_model("vgg16_aib", backbone="vgg16")
@register_model("vgg16_aib_qt", backbone="vgg16", num_anchors=20)
@register_model("wrn50_2_aib", backbone="wrn50_2")
@register_model("wrn50_2_aib_qt", backbone="wrn50_2", num_anchors=20)
class ImageNetBottleneck(BottleneckNetwork):
    """CUB's forms: torchvision's VGG16 or WRN-50-2 with bottlenecked attention at 1/16 of the image's resolution.

    As in the authors' code, K = 256 and the decoder is Linear K to K, ReLU, Linear.

    - VGG16: attention stands behind all thirteen convolutions. The encoder averages to 3x3, then Linear to 2K. The raw
      map of μ comes from one 3x3 convolution; with anchors, three 3x3 convolutions with ReLU stand before it.
    - WRN-50-2: attention stands before the last stage. The encoder is that stage, global average, Linear to 2K. The raw
      map of μ comes from a copy of that stage at stride 1 with weights of its own, and a 3x3 convolution.

    Args:
        num_classes: number of logits.
        backbone: "vgg16" or "wrn50_2".
        num_anchors: Q, or None: the map stays continuous. Published: 20.
        width: multiplier of z and of the backbone's channels (of WRN-50-2: of those between its 1x1 convolutions).
        in_chans: channels of the images.
        weights: of the backbone: None for random ones, a member of torchvision's weights for it or its name
            (torchvision downloads it where it is not cached), or a file that holds such a state_dict. They need
            ``width=1`` and ``in_chans=3``.
        variant, samples, beta, anchor_weight, commitment_weight: as :class:`BottleneckNetwork`; published samples:
            (12, 12).

    Raises:
        ImportError: torchvision is not installed.
        ValueError, TypeError: an argument out of its range, or images of other channels.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Section 4.2.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "vgg16",
        num_anchors: int | None = None,
        width: float = 1.0,
        in_chans: int = 3,
        weights=None,
        variant: str = "correct",
        samples: tuple[int, int] | None = None,
        beta: float = 0.01,
        anchor_weight: float = 0.4,
        commitment_weight: float = 0.1,
    ):
        super().__init__(num_classes, in_chans, width)
        where = type(self).__name__
        _check_anchors(where, num_anchors)
        self._configure(variant, samples, beta, anchor_weight, commitment_weight)
        check_backbone(where, backbone, ("vgg16", "wrn50_2"), weights, width, in_chans)
        if backbone == "vgg16":
            self.features, stage, mean, c, last = _vgg16(where, width, weights, num_anchors is not None)
            self.feature_modules = tuple(f"features.{index}" for index in (3, 8, 15, 22, 29))
        else:
            self.features, stage, mean, c, last = _wrn50_2(where, width, weights)
            self.feature_modules = ("features.2", "features.4", "features.5", "features.6", "encoder.0")
        replace_stem(self.features, in_chans)
        k = scaled(256, width)
        self.attention = BottleneckAttention(c, num_anchors, mean=mean)
        self.encoder = nn.Sequential(*stage, nn.Flatten(), nn.Linear(last, 2 * k))
        self.decoder = nn.Sequential(nn.Linear(k, k), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(k, num_classes)
        if backbone == "vgg16":
            for part in (self.attention.std, self.encoder, self.decoder, self.classifier):
                xavier_uniform(part)
        else:
            he_normal(self.attention.std)
