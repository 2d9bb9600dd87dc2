"""The papers' networks by name: :func:`create_model`, :func:`list_models`."""

from attnkern.models.attn_vgg import AttnVgg
from attnkern.models.imagenet_bottleneck import ImageNetBottleneck
from attnkern.models.information_bottleneck import Bottlenecked, BottleneckNetwork, VggBottleneck, bottleneck_loss
from attnkern.models.rectangular import RectangularNetwork
from attnkern.models.registry import (
    FeatureMaps,
    attention_maps,
    create_model,
    list_models,
    map_names,
    register_model,
)
from attnkern.models.resnet_attention import ResNetAttention
from attnkern.models.small import SmallBottleneck, SmallCompatibility, SmallNetwork
from attnkern.models.vgg import Vgg, VggAttention, VggGap
from attnkern.models.wide_resnet import AttentionBranched, WideResNet, WideResNetBottleneck

__all__ = [
    "AttentionBranched",
    "AttnVgg",
    "BottleneckNetwork",
    "Bottlenecked",
    "FeatureMaps",
    "ImageNetBottleneck",
    "RectangularNetwork",
    "ResNetAttention",
    "SmallBottleneck",
    "SmallCompatibility",
    "SmallNetwork",
    "Vgg",
    "VggAttention",
    "VggBottleneck",
    "VggGap",
    "WideResNet",
    "WideResNetBottleneck",
    "attention_maps",
    "bottleneck_loss",
    "create_model",
    "list_models",
    "map_names",
    "register_model",
]
