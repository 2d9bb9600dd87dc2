"""Classes of public implementations, with the same constructors, parameters and results, over attnkern's kernels.

Written from their interfaces as users know them. :func:`attnkern.accelerate` puts them into an existing model.
"""

import torch
from torch import nn

from attnkern import compatibility_pool
from attnkern._ops import wide


class LinearAttentionBlock(nn.Module):
    """Attention of "Learn to Pay Attention" as its best-known PyTorch port has it: (l, g) to (c, pooled).

    c = ⟨u, ℓ_i + g⟩ with u = ``op.weight`` (1, C, 1, 1) and no bias; pooled = Σ softmax(c)_i ℓ_i, the part that is
    fused. With ``normalize_attn=False`` the weights are sigmoids of c and the result is their average over positions,
    in plain PyTorch.

    Args:
        in_features: C.
        normalize_attn: softmax, otherwise sigmoid.
    """

    def __init__(self, in_features: int, normalize_attn: bool = True):
        super().__init__()
        self.normalize_attn = normalize_attn
        self.op = nn.Conv2d(in_features, 1, kernel_size=1, padding=0, bias=False)

    def forward(self, l: torch.Tensor, g: torch.Tensor):  # noqa: E741
        """l (N, C, H, W), g (N, C, 1, 1) to c (N, 1, H, W), before the softmax, and pooled (N, C)."""
        if not self.normalize_attn or g.shape[2:].numel() != 1 or not plain(self.op):
            return self._literal(l, g)
        u = self.op.weight.flatten()
        pooled, _, scores = compatibility_pool(l, u.to(wide(l.dtype)))
        c = scores + (g.flatten(1).to(scores.dtype) * u.to(scores.dtype)).sum(1)[:, None, None]
        return c[:, None].to(l.dtype), pooled

    def _literal(self, l, g):  # noqa: E741
        c = self.op(l + g)
        if self.normalize_attn:
            a = c.flatten(2).softmax(2).view_as(c)
            return c, (a * l).flatten(2).sum(2)
        return c, (c.sigmoid() * l).mean((2, 3))


class ProjectorBlock(nn.Module):
    """A 1x1 convolution without bias, ``op``: what brings locals to the channels of the global vector."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.op = nn.Conv2d(in_features, out_features, kernel_size=1, padding=0, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.op(inputs)


def plain(module: nn.Module) -> bool:
    """True where using the weight of ``module`` instead of calling it goes unnoticed."""
    from attnkern.nn import _untouched

    return _untouched(module, nn.Conv2d) and not torch.nn.utils.parametrize.is_parametrized(module)
