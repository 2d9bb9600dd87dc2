"""Attention modules. Their constructor arguments and state_dict do not depend on the backend.

Every module has an ``nn.Identity`` called ``map``, through which the attention map passes. The fused operators return
the map as a side output without a path to the features, so a hook on ``map`` could neither change the output nor
receive a gradient. If ``map`` has hooks or has been replaced, the module therefore computes map and product separately.

In formulas, Λ is the logistic sigmoid.
"""

from attnkern.nn.attention import AttentionPool
from attnkern.nn.pool import CompatibilityPool, ProgressiveAttention
from attnkern.nn.quantize import AnchorQuantizer, BottleneckAttended, BottleneckAttention
from attnkern.nn.window import PositionwiseAttention, WindowAttention

__all__ = [
    "AnchorQuantizer",
    "AttentionPool",
    "BottleneckAttended",
    "BottleneckAttention",
    "CompatibilityPool",
    "PositionwiseAttention",
    "ProgressiveAttention",
    "WindowAttention",
]
