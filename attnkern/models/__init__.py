"""The papers' networks by name: :func:`create_model`, :func:`list_models`."""

from attnkern.models.efficientnet_window import EfficientNetB0Window
from attnkern.models.registry import create_model, list_models, register_model
from attnkern.models.vgg_aib import Bottlenecked, VggAibQt, bottleneck_loss
from attnkern.models.vgg_att import VggAtt2ConcatPc

__all__ = [
    "Bottlenecked",
    "EfficientNetB0Window",
    "VggAibQt",
    "VggAtt2ConcatPc",
    "bottleneck_loss",
    "create_model",
    "list_models",
    "register_model",
]
