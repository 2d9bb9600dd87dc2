"""Classes with the constructors, parameters and results of public implementations, on attnkern's kernels.

They are written from the public interfaces. :func:`attnkern.accelerate` substitutes them in an existing model.
"""

import torch
from torch import nn

from attnkern._checks import check_count, check_flag, check_number, check_shape, check_tensor
from attnkern._numerics import wide
from attnkern._tracing import Module
from attnkern.nn._hooks import untouched
from attnkern.pool import compatibility_pool
from attnkern.quantize import anchor_quantize

__all__ = ["LinearAttentionBlock", "ProjectorBlock", "StraightThroughQuantizer", "VectorQuantizer"]


def _channels(module, default):
    """Input channels of ``op``, or ``default`` if it was replaced by a module without that attribute."""
    return getattr(module.op, "in_channels", default)


def quantize_promoted(a, anchors):
    """:func:`attnkern.anchor_quantize` in the dtype to which PyTorch promotes both arguments."""
    check_tensor("anchor_quantize", "a", a)
    dtype = torch.promote_types(a.dtype, anchors.dtype)
    return anchor_quantize(a.to(dtype), anchors.to(dtype))


class LinearAttentionBlock(Module):
    """Attention of "Learn to Pay Attention" as its best-known PyTorch port has it: (l, g) to (c, pooled).

    c = ⟨u, ℓ_i + g⟩ with u = ``op.weight`` (1, C, 1, 1) and no bias; pooled = Σ softmax(c)_i ℓ_i, which is
    fused. pooled does not depend on g, so the gradient of g from pooled is zero (not None). Three cases use plain
    PyTorch: ``normalize_attn=False``, which averages over positions with weights Λ(c), a g with several positions, and
    an ``op`` with hooks.

    Args:
        in_features: C.
        normalize_attn: softmax, otherwise sigmoid.
    """

    def __init__(self, in_features: int, normalize_attn: bool = True):
        super().__init__()
        check_count("LinearAttentionBlock", in_features=in_features)
        check_flag("LinearAttentionBlock", normalize_attn=normalize_attn)
        self.normalize_attn = normalize_attn
        self.op = nn.Conv2d(in_features, 1, kernel_size=1, padding=0, bias=False)

    def forward(self, l: torch.Tensor, g: torch.Tensor):  # noqa: E741
        """l (N, C, H, W), g (N, C, 1, 1) to c (N, 1, H, W), before the softmax, and pooled (N, C)."""
        where = "LinearAttentionBlock"
        check_tensor(where, "l", l)
        check_tensor(where, "g", g)
        c = _channels(self, l.shape[1] if l.dim() == 4 else 0)
        check_shape(where, "l", l, "(N, {}, H, W)", l.dim() == 4 and l.shape[1] == c, c)
        fits = g.dim() == 4 and g.shape[1] == c and all(n in (1, of) for n, of in zip(g.shape, l.shape, strict=True))
        check_shape(where, "g", g, "(N, {}, 1, 1) or of the size of l, {}", fits, c, tuple(l.shape))
        if not self.normalize_attn:
            c = self.op(l + g)
            return c, (c.sigmoid() * l).mean((2, 3))
        if g.shape[2:] != (1, 1) or not untouched(self.op, nn.Conv2d):
            c = self.op(l + g)
            return c, (c.flatten(2).softmax(2).view_as(c) * l).sum((2, 3))
        u = self.op.weight.flatten().to(wide(l.dtype))
        g = g.flatten(1)
        pooled, _, scores = compatibility_pool(l, u)
        c = scores + (g.to(u.dtype) * u).sum(1)[:, None, None]
        if pooled.requires_grad or (g.requires_grad and torch.is_grad_enabled()):
            # The sign keeps Inf and NaN out. The sum is also a new tensor: the kernel's result is saved for backward
            # and must not be changed in place.
            pooled = pooled.add(g.sign().to(pooled.dtype), alpha=0)
        return c[:, None].to(l.dtype), pooled


class ProjectorBlock(Module):
    """A 1x1 convolution without bias, ``op``, that projects locals to the channels of the global vector."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        check_count("ProjectorBlock", in_features=in_features, out_features=out_features)
        self.op = nn.Conv2d(in_features, out_features, kernel_size=1, padding=0, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        check_tensor("ProjectorBlock", "inputs", inputs)
        c = _channels(self, inputs.shape[-3] if inputs.dim() >= 3 else 0)
        fits = inputs.dim() in (3, 4) and inputs.shape[-3] == c
        check_shape("ProjectorBlock", "inputs", inputs, "(N, {0}, H, W) or ({0}, H, W)", fits, c)
        return self.op(inputs)


class StraightThroughQuantizer(Module):
    """Nearest of the learned scalars ``anchors`` (Q,) for each element, straight-through: a to values.

    As networks write it: ``q = anchors[(a[..., None] - anchors).abs().argmin(-1)]; return a + (q - a).detach()``.

    Args:
        num_anchors: Q, from linspace(0, 1, Q).
    """

    def __init__(self, num_anchors: int):
        super().__init__()
        check_count("StraightThroughQuantizer", num_anchors=num_anchors)
        self.anchors = nn.Parameter(torch.linspace(0, 1, num_anchors))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        # Detached: in compiled code, the anchors would otherwise get zeros instead of None as gradient.
        return quantize_promoted(a, self.anchors.detach()).values


class VectorQuantizer(Module):
    """Quantizer of the authors' code of "Information Bottleneck Approach to Spatial Attention Learning".

    Nearest of the learned scalars ``weight`` (1, Q) for each element, straight-through, and the mean squared distances
    that move the anchors and the map: as in :func:`attnkern.anchor_quantize`.

    Args:
        embedding_dim: 1, scalars.
        num_embeddings: Q.
        commitment_cost: not used, as in the authors' code.
        rd_init: anchors from U(0, 1), otherwise linspace(0, 1, Q).
    """

    def __init__(self, embedding_dim: int, num_embeddings: int, commitment_cost: float = 0.25, rd_init: bool = True):
        super().__init__()
        check_count("VectorQuantizer", embedding_dim=embedding_dim, num_embeddings=num_embeddings)
        if embedding_dim != 1:
            raise ValueError(f"VectorQuantizer: embedding_dim must be 1, got {embedding_dim}")
        check_number("VectorQuantizer", commitment_cost=commitment_cost)
        check_flag("VectorQuantizer", rd_init=rd_init)
        self.embedding_dim = embedding_dim
        self.num_embeddings = num_embeddings
        self.commitment_cost = commitment_cost
        weight = torch.rand(num_embeddings) if rd_init else torch.linspace(0, 1, num_embeddings)
        self.weight = nn.Parameter(weight[None])

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input (N, L) or (N, 1, ...) to values of its shape, anchor loss and commitment loss."""
        check_tensor("VectorQuantizer", "input", input)
        fits = input.dim() == 2 or (input.dim() > 2 and input.shape[1] == 1)
        check_shape("VectorQuantizer", "input", input, "(N, L) or (N, 1, ...)", fits)
        quantized = quantize_promoted(input, self.weight.flatten())
        return quantized.values, quantized.anchor_loss, quantized.commitment_loss
