"""VGG16 and WRN-50-2 of Information Bottleneck Approach to Spatial Attention Learning, for CUB.

Layers, initialisation and losses are those of the authors' code.
"""

import copy

from torch import nn

from attnkern.models.information_bottleneck import BottleneckNetwork
from attnkern.models.layers import (
    MapNorm,
    backbone_weights,
    check_backbone,
    he_normal,
    replace_stem,
    scaled,
    xavier_uniform,
)
from attnkern.models.registry import register_model
from attnkern.nn import BottleneckAttention


def _vgg16(where, width, weights, quantized):
    """VGG16 up to its last convolution, the encoder's layers before its linear one, and the layers of μ.

    Returns:
        features, encoder layers, layers of μ, C of the features, inputs of the encoder's linear layer.
    """
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
    """WRN-50-2 up to its third stage, its last stage, and the layers of μ with a copy of that stage at stride 1.

    Returns: as :func:`_vgg16`.
    """
    from torchvision.models import Wide_ResNet50_2_Weights, resnet

    network = resnet.ResNet(
        resnet.Bottleneck, [3, 4, 6, 3], width_per_group=max(1, round(128 * width)), norm_layer=MapNorm
    )
    # Pretrained weights are for the backbone alone: the stage of μ is copied before they are loaded.
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
    """Networks for CUB: torchvision's VGG16 or WRN-50-2 with bottleneck attention at 1/16 of the image's resolution.

    As in the authors' code, K = 256 and the decoder is Linear K to K, ReLU, Linear.

    - VGG16: attention follows all thirteen convolutions. The encoder averages to 3x3, then Linear to 2K. The raw map
      of μ comes from one 3x3 convolution; with anchors, three 3x3 convolutions with ReLU precede it.
    - WRN-50-2: attention precedes the last stage. The encoder is that stage, global average, Linear to 2K. The raw map
      of μ comes from a copy of that stage at stride 1, with its own weights, and a 3x3 convolution.

    Args:
        num_classes: number of logits.
        backbone: "vgg16" or "wrn50_2".
        num_anchors: Q, or None for a continuous map. Published: 20.
        width: multiplier of z and of the backbone's channels (of WRN-50-2: of those between its 1x1 convolutions).
        in_chans: channels of the images.
        weights: of the backbone. None: random. A member of torchvision's weights enum for the backbone, or its name:
            torchvision downloads the file unless it is cached. A path: a file with such a state_dict. Weights need
            ``width=1`` and ``in_chans=3``.
        variant, samples, beta, anchor_weight, commitment_weight: as :class:`BottleneckNetwork`; published samples:
            (12, 12).

    Raises:
        ImportError: torchvision is not installed.
        OSError: the weights cannot be downloaded.
        ValueError, TypeError: an argument out of its range, or images with other channels.

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
        self._configure(variant, samples, beta=beta, anchor_weight=anchor_weight, commitment_weight=commitment_weight)
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
