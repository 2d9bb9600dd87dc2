"""The papers' networks by name: :func:`create_model`, :func:`list_models`."""

from attnkern.models.information_bottleneck import (
    AttentionBranched,
    Bottlenecked,
    BottleneckNetwork,
    ImageNetBottleneck,
    VggBottleneck,
    WideResNet,
    WideResNetBottleneck,
    bottleneck_loss,
)
from attnkern.models.learn_to_pay_attention import AttnVgg, ResNetAttention, Vgg, VggAttention, VggGap
from attnkern.models.rectangular import RectangularNetwork
from attnkern.models.registry import (
    FeatureMaps,
    attention_maps,
    create_model,
    list_models,
    map_names,
    register_model,
)

__all__ = [
    "AttentionBranched",
    "AttnVgg",
    "BottleneckNetwork",
    "Bottlenecked",
    "FeatureMaps",
    "ImageNetBottleneck",
    "RectangularNetwork",
    "ResNetAttention",
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
