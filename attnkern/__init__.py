"""Fused kernels for three spatial-attention mechanisms of CNNs.

========================  ======================================================  ==============================
function                  mechanism                                               paper
========================  ======================================================  ==============================
window_map                rotated sigmoid-window map with rescaling               rectangular attention
window_attention          the same, applied to features                           rectangular attention
anchor_quantize           nearest-anchor quantization, straight-through gradient  information-bottleneck attention
anchor_attention          the same, applied to features                           information-bottleneck attention
compatibility_pool        softmax compatibility pooling                           learn to pay attention
========================  ======================================================  ==============================
"""

import importlib
from typing import TYPE_CHECKING

from attnkern._backend import use_backend
from attnkern._decompositions import decompositions
from attnkern._version import __version__
from attnkern.pool import CompatibilityPooled, compatibility_pool
from attnkern.quantize import AnchorAttended, AnchorQuantized, anchor_attention, anchor_quantize
from attnkern.window import WindowAttended, ellipse_outline, rectangle_corners, window_attention, window_map

if TYPE_CHECKING:  # the names that __getattr__ resolves
    from attnkern import compat as compat
    from attnkern import evaluation as evaluation
    from attnkern import models as models
    from attnkern import nn as nn
    from attnkern import reference as reference
    from attnkern import testing as testing
    from attnkern import training as training
    from attnkern import viz as viz
    from attnkern._accelerate import accelerate as accelerate
    from attnkern._insert import insert as insert
    from attnkern._sharding import register_sharding as register_sharding

__all__ = [
    "AnchorAttended",
    "AnchorQuantized",
    "CompatibilityPooled",
    "WindowAttended",
    "__version__",
    "anchor_attention",
    "anchor_quantize",
    "compatibility_pool",
    "decompositions",
    "ellipse_outline",
    "rectangle_corners",
    "use_backend",
    "window_attention",
    "window_map",
]

_SUBMODULES = ("compat", "evaluation", "models", "nn", "reference", "testing", "training", "viz")
#: Functions that import submodules, with the modules that define them.
_LATE = {"accelerate": "_accelerate", "insert": "_insert", "register_sharding": "_sharding"}


def __getattr__(name: str):
    """Submodules and functions that import torchvision, scikit-learn or the modules, on first use."""
    if name in _SUBMODULES:
        return importlib.import_module(f"attnkern.{name}")
    if name in _LATE:
        return getattr(importlib.import_module(f"attnkern.{_LATE[name]}"), name)
    raise AttributeError(f"module 'attnkern' has no attribute {name!r}")


def __dir__():
    return [*__all__, *_SUBMODULES, *_LATE]
