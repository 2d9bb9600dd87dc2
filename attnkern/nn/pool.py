"""Learn to Pay Attention: compatibility pooling, and the attention of its progressive baseline."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attnkern._checks import (
    check_channels,
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_shape,
    check_tensor,
    is_shape,
)
from attnkern._tracing import Module
from attnkern.nn._hooks import foldable, untouched
from attnkern.nn._precision import widened
from attnkern.pool import compatibility_pool
from attnkern.reference import modulate


class CompatibilityPool(Module):
    """Locals averaged by their compatibility with a global query: pooled = Σ a_i ℓ_i, a = softmax_i c(ℓ_i, g).

    "parametrised": c = ⟨u, ℓ_i + g⟩ with a learned u. ⟨u, g⟩ is the same for every position, so softmax cancels it: the
    pooled vector does not depend on g, whose gradient is exactly zero. g may be omitted. If it is given, it gets
    a gradient of zeros (not None) from pooled and from the map, so that optimizers and DDP treat the layers that
    computed it as used.

    "dot": c = ⟨ℓ_i, g⟩, without 1/√C.

    A learned linear map W (no bias) can project one of the two to the channels of the other: ``project="query"``
    replaces g by W g; ``project="local"`` replaces ℓ_i by W ℓ_i, folded: c = ⟨ℓ_i, Wᵀg⟩ and pooled = W·Σ a_i ℓ_i, so
    that the projected locals are never computed. If ``projection`` is no longer an untouched ``nn.Linear`` (it has
    hooks, an adapter or a quantized weight), it is called on the locals as (N, positions, C).

    Args:
        local_channels, query_channels: C of the locals and of the query.
        compatibility: "parametrised" or "dot".
        project: "query", "local" or None (then the channels must be equal).

    Raises:
        ValueError, TypeError: an unknown option, numbers of channels that do not match, or a tensor with another
        number.

    Source: Learn to Pay Attention, Eqs. 1-3 and Section 3.2.
    """

    def __init__(
        self,
        local_channels: int,
        query_channels: int,
        compatibility: str = "parametrised",
        project: str | None = None,
    ):
        super().__init__()
        check_choice("CompatibilityPool", "compatibility", compatibility, ("parametrised", "dot"))
        check_choice("CompatibilityPool", "project", project, ("query", "local", None))
        check_count("CompatibilityPool", local_channels=local_channels, query_channels=query_channels)
        if project is None and local_channels != query_channels:
            raise ValueError(
                "CompatibilityPool: query_channels must equal local_channels unless project is 'query' or 'local', "
                f"got {query_channels} and {local_channels}"
            )
        self.local_channels = local_channels
        self.query_channels = query_channels
        self.project = project
        projections = {"query": (query_channels, local_channels), "local": (local_channels, query_channels)}
        self.projection = nn.Linear(*projections[project], bias=False) if project else None
        if compatibility == "parametrised":
            common = query_channels if project == "local" else local_channels
            self.weight = nn.Parameter(torch.empty(common).uniform_(-1, 1) / math.sqrt(common))
        else:
            self.register_parameter("weight", None)
        self.map = nn.Identity()

    def forward(
        self, local: torch.Tensor, query: torch.Tensor | None = None, return_map: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Pool ``local`` (N, C, H, W) or (N, C, L) by ``query`` (N, C'), or (C',) shared by the batch.

        Returns:
            pooled (N, C), or (N, C') with ``project="local"``; with ``return_map`` also the attention (N, H, W)
            or (N, L).
        """
        where = "CompatibilityPool"
        check_channels(where, local, self.local_channels, "local", sequences=True)
        check_flag(where, return_map=return_map)
        if query is None:
            if self.weight is None:
                raise ValueError(f"{where}: query must be given where compatibility is 'dot', got None")
        else:
            check_tensor(where, "query", query)
            n, c = local.shape[0], self.query_channels
            expected = "({0}, {1}) or ({1},) (N as local)"
            check_shape(where, "query", query, expected, is_shape(query, n, c) or is_shape(query, c), n, c)
            check_device(where, "query", query, "local", local)
            if self.project == "query":
                query = self.projection(query)

        key = query if self.weight is None else self.weight
        folds = self.project == "local" and foldable(self.projection)
        if folds:
            key = F.linear(key, self.projection.weight.t())
        elif self.project == "local":
            # A Linear, or its replacement, expects (N, positions, C).
            local = self.projection(local.flatten(2).mT).mT.unflatten(2, local.shape[2:])
        key = widened(key)
        if untouched(self.map):
            pooled, attention, _ = compatibility_pool(local, key)
        else:
            attention = self.map(compatibility_pool(local, key).attention)
            weighted = local.flatten(2).to(attention.dtype) * attention.flatten(1)[:, None]
            pooled = weighted.sum(2).to(local.dtype)
        if folds:
            pooled = self.projection(pooled)
        # A trace must not depend on whether its example requires a gradient.
        connected = query is not None and (query.requires_grad or torch.jit.is_tracing())
        if self.weight is not None and connected:
            # Zeros even if the query is not finite, because the result does not depend on it.
            zero = (query.nan_to_num(0, 0, 0) * 0).sum(-1, keepdim=True)
            pooled = pooled + zero.to(pooled.dtype)
            if return_map:
                attention = attention + zero.view(-1, *[1] * (attention.dim() - 1)).to(attention.dtype)
        return (pooled, attention) if return_map else pooled

    def extra_repr(self):
        compatibility = "dot" if self.weight is None else "parametrised"
        return f"{self.local_channels}, {self.query_channels}, {compatibility!r}, project={self.project!r}"


class ProgressiveAttention(Module):
    """Attention with a map of independent sigmoid scores: output = f·x, f = Λ(⟨u, x_i + g⟩ + b).

    The query g is optional. Unlike in :class:`CompatibilityPool`, it changes the result: a sigmoid does not cancel it.

    Args:
        channels: C of the features.

    Raises:
        ValueError, TypeError: a number below 1, or features with another number of channels.

    Source: Learn to Pay Attention, Appendix A.2 (the lower level of its PAN baseline, after Seo et al.), and the
    authors' code for the query.
    """

    def __init__(self, channels: int):
        super().__init__()
        check_count("ProgressiveAttention", channels=channels)
        self.channels = channels
        self.score = nn.Conv2d(channels, 1, 1)
        self.map = nn.Identity()

    def forward(
        self, x: torch.Tensor, return_map: bool = False, query: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, C, H, W) to the same shape; with ``return_map`` also the map (N, H, W).

        Args:
            query: g (N, C), added to the features of every position before they are scored.
        """
        where = "ProgressiveAttention"
        check_channels(where, x, self.channels)
        check_flag(where, return_map=return_map)
        scored = x
        if query is not None:
            check_tensor(where, "query", query)
            n, c = x.shape[0], self.channels
            check_shape(where, "query", query, "({}, {}) (N and C as x)", is_shape(query, n, c), n, c)
            check_device(where, "query", query, "x", x)
            scored = x + query[:, :, None, None]
        map = self.map(widened(self.score(scored)).squeeze(1).sigmoid())
        output = modulate(x, map[:, None], residual=False)
        return (output, map) if return_map else output
