"""Attention modules over the public functions. Constructor arguments and state_dict do not depend on the backend.

Every module holds an ``nn.Identity`` called ``map``. In a fused operator the map is a side output, so a hook there
would see no gradient: when ``map`` carries hooks or has been replaced, the module goes the long way round, through
``self.map`` and then a separate product, so that what happens there happens to the features as well.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from attnkern import (
    AnchorAttended,
    AnchorQuantized,
    anchor_attention,
    anchor_quantize,
    compatibility_pool,
    window_attention,
    window_map,
)
from attnkern._common import (
    DTYPES,
    autocasts,
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_kind,
    check_number,
    check_positions,
    check_shape,
    check_tensor,
    is_shape,
    transformed,
)
from attnkern._numerics import wide
from attnkern._tracing import Module
from attnkern.quantize import check_reduction
from attnkern.reference import modulate
from attnkern.window import check_features

__all__ = [
    "AnchorQuantizer",
    "BottleneckAttended",
    "BottleneckAttention",
    "CompatibilityPool",
    "PositionwiseAttention",
    "ProgressiveAttention",
    "WindowAttention",
]


#: The types of parameters whose numbers are all there is to them; PyTorch traces with the last two. Quantized, sharded
#: and other tensors with behaviour of their own are subclasses.
_PLAIN = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)


def _observed(module: nn.Module) -> bool:
    """True where a hook, or a ``forward`` set on the instance, would notice a call."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _untouched(module: nn.Module, kind: type = nn.Identity) -> bool:
    """True where ``module`` may be computed from its parameters, without a call, and nobody would notice.

    It is still of its own kind, nothing observes the call, and its parameters are plain tensors.
    """
    return (
        type(module) is kind
        and not _observed(module)
        and all(type(parameter) in _PLAIN for parameter in module._parameters.values() if parameter is not None)
    )


def _folds(layer: nn.Module) -> bool:
    """True for an untouched ``nn.Linear`` without bias, whose product may be taken in another order."""
    return _untouched(layer, nn.Linear) and layer._parameters.get("weight") is not None and layer.bias is None


def _like(*modules: nn.Module) -> torch.Tensor | None:
    """The first parameter of the modules, in their order, whose dtype is one to compute in; None: they have none."""
    parameters = itertools.chain.from_iterable(module.parameters() for module in modules)
    return next((parameter for parameter in parameters if parameter.dtype in DTYPES), None)


def _input_for(layer: nn.Module, tensor: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """``tensor`` in the dtype of the parameters of ``layer``.

    Where it has none (a quantized layer, a replica of DataParallel), in the dtype of ``before``, which another layer of
    the model made, or of ``tensor`` itself; widened where autocast made that.
    """
    like = _like(layer)
    if like is None:
        before = tensor if before is None else before
        return tensor.to(wide(before.dtype) if autocasts(before) else before.dtype)
    return tensor.to(like.dtype)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(wide(tensor.dtype))


def _full_precision(x: torch.Tensor):
    """Autocast off on the device of ``x``: a handful of numbers decides about a whole map."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()


def _check_features(where, x, channels, name="x", maps_only=True):
    check_tensor(where, name, x)
    shape = f"(N, {channels}, H, W)" if maps_only else f"(N, {channels}, H, W) or (N, {channels}, L)"
    ok = x.dim() == 4 or (x.dim() == 3 and not maps_only)
    check_shape(where, name, x, shape, ok and x.shape[1] == channels)
    check_positions(where, name, x.shape[2:])


class WindowAttention(Module):
    """Features under one rotated rectangle that a small head finds: output = x + f̃·x.

    Head: 3x3 convolutions with ReLU, 2x2 max pooling between them, global average, Linear to five numbers b. Then
    μ = Λ(b), σ = lo + (0.75 - lo)·Λ(b) with lo half a grid step of the axis, α = (π/2)·tanh b. The last layer starts at
    zero weights and biases (0, 0, log 2, log 2, 0): a centred rectangle with σ of about one half. The five numbers are
    float32 under autocast. Maps down to 1x1 work.

    Args:
        channels: C of the features.
        hidden: output channels of the convolutions.
        scale, rescale, residual: as in :func:`attnkern.window_attention`.

    Raises:
        ValueError, TypeError: an option out of its range, or features of other channels.

    Source: Convolutional Rectangular Attention Module, Eqs. 1-7 and Appendix G (which leaves open the ranges of
    μ, σ and α).
    """

    def __init__(
        self,
        channels: int,
        hidden: tuple[int, ...] = (64, 128, 256),
        scale: float = 6.0,
        rescale: bool = True,
        residual: bool = True,
    ):
        super().__init__()
        check_count("WindowAttention", channels=channels)
        check_kind("WindowAttention", Sequence, hidden=hidden)
        if not hidden:
            raise ValueError("WindowAttention: hidden must name at least one convolution's channels, got none")
        for outputs in hidden:
            check_count("WindowAttention", hidden=outputs)
        check_number("WindowAttention", scale=scale)
        check_flag("WindowAttention", rescale=rescale, residual=residual)
        self.channels = channels
        self.scale = scale
        self.rescale = rescale
        self.residual = residual
        layers = []
        for inputs, outputs in itertools.pairwise((channels, *hidden)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(*layers, nn.Flatten())
        self.regressor = nn.Linear(hidden[-1], 5)
        self.map = nn.Identity()
        nn.init.zeros_(self.regressor.weight)
        with torch.no_grad():
            self.regressor.bias.copy_(torch.tensor([0.0, 0.0, math.log(2), math.log(2), 0.0]))

    def rectangle(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 5) rectangles of features (N, C, H, W): μ₁, μ₂, σ₁, σ₂, α in the units of :func:`attnkern.window_map`."""
        _check_features("WindowAttention", x, self.channels)
        summary = _input_for(self.regressor, self.head(x))
        with _full_precision(x):
            row, column, half_height, half_width, angle = _widened(self.regressor(summary)).unbind(1)
            sigmas = []
            for length, raw in zip(x.shape[2:], (half_height, half_width), strict=True):
                low = 0.5 / max(length - 1, 1)
                sigmas.append(low + (0.75 - low) * raw.sigmoid())
            return torch.stack((row.sigmoid(), column.sigmoid(), *sigmas, math.pi / 2 * angle.tanh()), 1)

    def forward(
        self, x: torch.Tensor, return_map: bool = False, rectangle: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, C, H, W) to the same shape; with ``return_map`` also the map (N, H, W).

        Args:
            rectangle: (N, 5) to attend to, where :meth:`rectangle` has been called or another one is wanted.
        """
        check_flag("WindowAttention", return_map=return_map)
        if rectangle is None:
            rectangle = self.rectangle(x)
        if _untouched(self.map):
            output, map = window_attention(x, rectangle, scale=self.scale, rescale=self.rescale, residual=self.residual)
        else:
            rectangle = check_features("window_attention", x, rectangle).to(wide(x.dtype))
            map = self.map(window_map(rectangle, x.shape[2:], scale=self.scale, rescale=self.rescale))
            output = modulate(x, map[:, None], self.residual)
        return (output, map) if return_map else output


class PositionwiseAttention(Module):
    """Features under a map predicted position by position: output = x + f·x, f = Λ(convolutions of x).

    A 1x1 convolution to ``hidden`` channels, then three 3x3 ones with dilation, the last to one channel: the baseline
    that rectangular attention is compared with.

    Args:
        channels: C of the features.
        hidden: channels of the first three convolutions.
        dilation: of the 3x3 convolutions, and their padding.

    Raises:
        ValueError, TypeError: a number below 1, or features of other channels.

    Source: Convolutional Rectangular Attention Module, Appendix G.
    """

    def __init__(self, channels: int, hidden: int = 80, dilation: int = 4):
        super().__init__()
        check_count("PositionwiseAttention", channels=channels, hidden=hidden, dilation=dilation)
        self.channels = channels
        dilated = {"kernel_size": 3, "padding": dilation, "dilation": dilation}
        self.head = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, **dilated),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, **dilated),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, **dilated),
        )
        self.map = nn.Identity()

    def forward(self, x: torch.Tensor, return_map: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, C, H, W) to the same shape; with ``return_map`` also the map (N, H, W)."""
        _check_features("PositionwiseAttention", x, self.channels)
        check_flag("PositionwiseAttention", return_map=return_map)
        map = self.map(_widened(self.head(x)).squeeze(1).sigmoid())
        output = modulate(x, map[:, None], residual=True)
        return (output, map) if return_map else output


class AnchorQuantizer(Module):
    """Nearest of Q learned anchors for each element, straight-through; counts which anchors are in use.

    The anchors start at linspace(0, 1, Q) and move by ``anchor_loss`` alone. ``counts`` (Q,) int64 adds up, in training
    only, how often each was chosen; it is not part of the state_dict.

    Args:
        num_anchors: Q.
        reduction: of the two losses, as in :func:`attnkern.anchor_quantize`.
        sync_counts: add up the counts over all processes of the default group, at each training step: a collective of
            Q integers. (DDP broadcasts buffers from rank 0, so they cannot be added up afterwards.)

    Raises:
        ValueError, TypeError: no anchor, an unknown reduction, or an argument that :func:`attnkern.anchor_quantize`
            and :func:`attnkern.anchor_attention` refuse.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 9-10.
    """

    def __init__(self, num_anchors: int, reduction: str = "mean", sync_counts: bool = False):
        super().__init__()
        check_count("AnchorQuantizer", num_anchors=num_anchors)
        check_reduction("AnchorQuantizer", reduction)
        check_flag("AnchorQuantizer", sync_counts=sync_counts)
        self.reduction = reduction
        self.sync_counts = sync_counts
        self.anchors = nn.Parameter(torch.linspace(0, 1, num_anchors))
        self.register_buffer("counts", torch.zeros(num_anchors, dtype=torch.int64), persistent=False)
        self.map = nn.Identity()

    def forward(self, a: torch.Tensor) -> AnchorQuantized:
        """Quantize ``a`` (N, ...); see :func:`attnkern.anchor_quantize`."""
        quantized = anchor_quantize(a, _widened(self.anchors), reduction=self.reduction)
        self._count(quantized.counts)
        return AnchorQuantized(self.map(quantized.values), *quantized[1:])

    def attend(self, x: torch.Tensor, a: torch.Tensor, residual: bool = True) -> AnchorAttended:
        """Features ``x`` under the quantized map, in one pass; see :func:`attnkern.anchor_attention`."""
        attended = anchor_attention(x, a, _widened(self.anchors), residual=residual, reduction=self.reduction)
        self._count(attended.counts)
        if not _untouched(self.map):
            map = self.map(attended.values)
            output = modulate(x, map if map.dim() == 4 else map[:, None], residual)
            attended = AnchorAttended(output, map, *attended[2:])
        return attended

    def _count(self, counts):
        # Per-sample gradients and the like are no training step, and may not write to what they captured.
        if self.training and not transformed(counts):
            if self.sync_counts:
                if not torch.distributed.is_initialized():
                    raise RuntimeError(
                        "AnchorQuantizer: sync_counts needs a process group: call torch.distributed.init_process_group "
                        "first, or leave sync_counts out"
                    )
                counts = counts.clone()
                torch.distributed.all_reduce(counts)
            self.counts += counts

    def reset_counts(self) -> None:
        self.counts.zero_()

    def perplexity(self) -> torch.Tensor:
        """exp of the entropy of the usage, from 1 (one anchor takes all) to Q (all alike); NaN before any count."""
        return torch.special.entr(self.counts / self.counts.sum()).sum().exp()

    def extra_repr(self):
        return f"{self.anchors.numel()}, reduction={self.reduction!r}"


class BottleneckAttended(NamedTuple):
    """Result of :class:`BottleneckAttention`."""

    output: torch.Tensor  #: (N, C, H, W), the features' dtype and memory format
    map: torch.Tensor  #: (N, H, W) what the features were weighted by: a, or its nearest anchors
    mean: torch.Tensor  #: (N, H, W) μ
    std: torch.Tensor  #: (N, H, W) σ
    anchor_loss: torch.Tensor  #: scalar, moves the anchors; 0 without anchors
    commitment_loss: torch.Tensor  #: scalar, moves a; 0 without anchors


class BottleneckAttention(Module):
    """Features under a map drawn from p(a|x) = N(μ, σ²) and quantized to anchors: output = x + v·x.

    μ = Λ(conv3x3(x)), σ = softplus(conv3x3(μ) - 5), a = μ + σε, and v the nearest anchor of a, or a itself without
    anchors. Nothing squashes a: it can leave [0, 1]. Map, μ and σ are float32 under autocast.

    Args:
        channels: C of the features.
        num_anchors: Q, or None for no quantization.
        mean: a module from features to raw maps (N, 1, H, W), instead of the 3x3 convolution before Λ.

    Raises:
        ValueError, TypeError: a number below 1, or features of other channels.

    Source: Information Bottleneck Approach to Spatial Attention Learning, Eqs. 6-10; the heads as in the authors' code.
    """

    def __init__(self, channels: int, num_anchors: int | None = None, mean: nn.Module | None = None):
        super().__init__()
        check_count("BottleneckAttention", channels=channels)
        check_kind("BottleneckAttention", nn.Module | None, mean=mean)
        self.channels = channels
        self.mean = nn.Conv2d(channels, 1, 3, padding=1) if mean is None else mean
        self.std = nn.Conv2d(1, 1, 3, padding=1)
        self.quantizer = None if num_anchors is None else AnchorQuantizer(num_anchors)
        self.map = nn.Identity()

    def forward(self, x: torch.Tensor, sample: bool | None = None) -> BottleneckAttended:
        """Attend to ``x`` (N, C, H, W).

        Args:
            sample: draw a from p(a|x); otherwise a = μ. None: in training only. The published evaluation draws too.
        """
        _check_features("BottleneckAttention", x, self.channels)
        check_kind("BottleneckAttention", bool | None, sample=sample)
        raw_mean = self.mean(x)
        n, _, height, width = x.shape
        check_tensor("BottleneckAttention", "what the module mean returns", raw_mean)
        check_shape(
            "BottleneckAttention", "what the module mean returns", raw_mean, "({}, 1, {}, {}) (as x)",
            is_shape(raw_mean, n, 1, height, width), n, height, width,
        )  # fmt: skip
        mean = _widened(raw_mean).sigmoid()
        given = _input_for(self.std, mean, raw_mean)
        with _full_precision(x):
            std = F.softplus(_widened(self.std(given)) - 5).squeeze(1)
            mean = mean.squeeze(1)
            a = mean
            if self.training if sample is None else sample:
                a = mean + std * torch.randn_like(std)
        if self.quantizer is None:
            map = self.map(a)
            output, losses = modulate(x, map[:, None], residual=True), (a.new_zeros(()), a.new_zeros(()))
        elif _untouched(self.map) and _untouched(self.quantizer, AnchorQuantizer):
            output, map, _, *losses, _ = self.quantizer.attend(x, a)
        else:
            values, _, *losses, _ = self.quantizer(a)
            map = self.map(values)
            output = modulate(x, map[:, None], residual=True)
        return BottleneckAttended(output, map, mean, std, *losses)


class CompatibilityPool(Module):
    """Locals averaged by their compatibility with a global query: pooled = Σ a_i ℓ_i, a = softmax_i c(ℓ_i, g).

    "parametrised": c = ⟨u, ℓ_i + g⟩ with a learned u. ⟨u, g⟩ is the same for every position, so softmax cancels it: the
    pooled vector does not depend on g, whose gradient is exactly zero. g may be left out; when given it gets those
    zeros (not None) from pooled and from the map, so that an optimizer and DDP treat what made it as part of the graph.

    "dot": c = ⟨ℓ_i, g⟩, without 1/√C.

    A learned linear map W (no bias) brings the two to equal channels: with ``project="query"`` W g takes the place of
    g; with ``project="local"`` W ℓ_i takes that of ℓ_i, folded: c = ⟨ℓ_i, Wᵀg⟩ and pooled = W·Σ a_i ℓ_i, so that the
    projected locals never exist. Where ``projection`` is no longer an untouched ``nn.Linear`` (hooks, an adapter, a
    quantized weight), it is called on the locals as (N, positions, C).

    Args:
        local_channels, query_channels: C of the locals and of the query.
        compatibility: "parametrised" or "dot".
        project: "query", "local" or None (then the channels must be equal).

    Raises:
        ValueError, TypeError: an unknown option, channels that do not go together, or tensors of other channels.

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
            pooled (N, C), or (N, C') with ``project="local"``; with ``return_map`` also the attention (N, H, W).
        """
        where = "CompatibilityPool"
        _check_features(where, local, self.local_channels, "local", maps_only=False)
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
        folds = self.project == "local" and _folds(self.projection)
        if folds:
            key = F.linear(key, self.projection.weight.t())
        elif self.project == "local":
            # Projected as (N, positions, C): what a Linear, or whatever took its place, expects.
            local = self.projection(local.flatten(2).mT).mT.unflatten(2, local.shape[2:])
        key = _widened(key)
        if _untouched(self.map):
            pooled, attention, _ = compatibility_pool(local, key)
        else:
            attention = self.map(compatibility_pool(local, key).attention)
            weighted = local.flatten(2).to(attention.dtype) * attention.flatten(1)[:, None]
            pooled = weighted.sum(2).to(local.dtype)
        if folds:
            pooled = self.projection(pooled)
        # A trace must not depend on whether its example has a gradient.
        followed = query is not None and (query.requires_grad or torch.jit.is_tracing())
        if self.weight is not None and followed:
            # Zeros even where the query is not finite: nothing here depends on it.
            zero = (query.nan_to_num(0, 0, 0) * 0).sum(-1, keepdim=True)
            pooled = pooled + zero.to(pooled.dtype)
            if return_map:
                attention = attention + zero.view(-1, *[1] * (attention.dim() - 1)).to(attention.dtype)
        return (pooled, attention) if return_map else pooled

    def extra_repr(self):
        compatibility = "dot" if self.weight is None else "parametrised"
        return f"{self.local_channels}, {self.query_channels}, {compatibility!r}, project={self.project!r}"


class ProgressiveAttention(Module):
    """Features filtered by a map of independent sigmoid scores: output = f·x, f = Λ(⟨u, x_i + g⟩ + b).

    The query g is optional. Unlike in :class:`CompatibilityPool`, it matters: a sigmoid does not cancel it.

    Args:
        channels: C of the features.

    Raises:
        ValueError, TypeError: a number below 1, or features of other channels.

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
        _check_features(where, x, self.channels)
        check_flag(where, return_map=return_map)
        scored = x
        if query is not None:
            check_tensor(where, "query", query)
            n, c = x.shape[0], self.channels
            check_shape(where, "query", query, "({}, {}) (N and C as x)", is_shape(query, n, c), n, c)
            check_device(where, "query", query, "x", x)
            scored = x + query[:, :, None, None]
        map = self.map(_widened(self.score(scored)).squeeze(1).sigmoid())
        output = modulate(x, map[:, None], residual=False)
        return (output, map) if return_map else output
