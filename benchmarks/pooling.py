"""Pooling with many queries: the attention-pooling layers of timm, and the competitors, for cases.py.

A layer is measured as timm has it, and *folded*: its queries are multiplied by the weight of the keys, the tokens
themselves are pooled, and the pooled vectors are multiplied by the weight of the values. Folded layers differ in the
function that pools, and share the parameters of timm's layer.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import attnkern
from attnkern import CompatibilityPooled
from attnkern.testing import features

#: The layers of timm that are measured.
LAYERS = ("AttentionPoolLatent", "AttentionPool2d")


def sdpa(local: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Pooling as attention whose keys and values are the locals.

    PyTorch's fused kernel takes four axes, and tokens whose channels are contiguous: copying NCHW maps to tokens first
    is faster than its fallback.
    """
    tokens = local.flatten(2).mT.contiguous()[:, None]
    query = query.expand(local.shape[0], -1, -1)[:, None]
    return F.scaled_dot_product_attention(query, tokens, tokens, scale=1.0)[:, 0]


def einsum(local: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Pooling as two products of matrices."""
    local = local.flatten(2)
    if query.shape[0] == 1:
        scores = torch.einsum("ncl,mc->nml", local, query[0])
    else:
        scores = torch.einsum("ncl,nmc->nml", local, query)
    return torch.einsum("nml,ncl->nmc", scores.softmax(2), local)


class FoldedLatent(nn.Module):
    """timm's AttentionPoolLatent, folded: ``pool`` takes tokens (N, C, L) and queries (1, M, C)."""

    def __init__(self, layer: nn.Module, pool):
        super().__init__()
        self.layer, self.pool = layer, pool

    def forward(self, x):
        layer = self.layer
        heads = layer.num_heads
        key, value = layer.kv.weight.unflatten(0, (2, heads, -1))
        query = layer.q(layer.latent).unflatten(2, (heads, -1)) * layer.scale
        query = torch.einsum("nthd,hdc->nthc", query, key)
        pooled = self.pool(x.mT, query.flatten(1, 2)).unflatten(1, (-1, heads))
        x = torch.einsum("nthc,hdc->nthd", pooled, value).flatten(2) + layer.kv.bias.chunk(2)[1]
        x = layer.proj_drop(layer.proj(x))
        return (x + layer.mlp(layer.norm(x)))[:, 0]


class Folded2d(nn.Module):
    """timm's AttentionPool2d, folded: ``pool`` takes tokens (N, C, L) and queries (N, M, C)."""

    def __init__(self, layer: nn.Module, pool):
        super().__init__()
        self.layer, self.pool = layer, pool

    def forward(self, x):
        layer = self.layer
        tokens = x.flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + layer.pos_embed
        weight, key, value = layer.qkv.weight.chunk(3)
        bias, _, value_bias = layer.qkv.bias.chunk(3)
        heads = (layer.num_heads, -1)
        query = F.linear(tokens[:, 0], weight, bias).unflatten(1, heads) * layer.scale
        query = torch.einsum("nhd,hdc->nhc", query, key.unflatten(0, heads))
        pooled = self.pool(tokens.mT, query)
        x = torch.einsum("nhc,hdc->nhd", pooled, value.unflatten(0, heads)).flatten(1) + value_bias
        return layer.proj(layer.drop(x))


class Pooled(NamedTuple):
    """The result of a layer."""

    output: torch.Tensor


class OfLayer:
    """A layer as a function of its input; gradients of its parameters are part of a backward pass."""

    def __init__(self, module: nn.Module, backend: str | None = None):
        self.module, self.backend = module, backend
        self.parameters = list(module.parameters())

    def __call__(self, x) -> Pooled:
        if self.backend is None:
            return Pooled(self.module(x))
        with attnkern.use_backend(self.backend):
            return Pooled(self.module(x))


def layer(case) -> nn.Module:
    """timm's layer with random weights."""
    import timm.layers

    torch.manual_seed(0)
    if case.op == "AttentionPool2d":
        made = timm.layers.AttentionPool2d(case.shape[1], case.shape[2:], num_heads=case.queries)
    else:
        made = timm.layers.AttentionPoolLatent(case.shape[1], num_heads=case.queries)
    for parameter in made.parameters():
        if parameter.dim() == 1:  # biases, which timm sets to zero
            nn.init.normal_(parameter, std=0.1)
    return made


def inputs(case) -> dict[str, torch.Tensor]:
    """The input of a layer, or locals and queries whose scores have a variance of 1."""
    generator = torch.Generator().manual_seed(0)
    local = features(case.shape, case.dtype, case.layout, generator)
    if case.op == "AttentionPoolLatent":
        return {"x": local.mT}  # (N, L, C), contiguous
    if case.op == "AttentionPool2d":
        return {"x": local}
    n, c = case.shape[:2]
    query = torch.randn(n, case.queries, c, generator=generator, dtype=torch.float64) / c**0.5
    return {"local": local, "query": query.to(case.dtype)}


#: Images that are compared with the reference, which takes long for many queries.
CHECKED = 2


def exact(case, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The result of the first images in float64."""
    wide = {name: value[:CHECKED].double() for name, value in given.items()}
    if case.op in LAYERS:
        with torch.no_grad():
            return layer(case).to(wide["x"])(**wide)
    return attnkern.reference.compatibility_pool(**wide)[0]


def competitors(case, device: torch.device, compiled: dict | None, backends: list[str]) -> dict:
    """Functions of the inputs by name: timm's layer, folded with SDPA and einsum, and attnkern's backends."""
    wrapped = {"": lambda function: function}
    if compiled is not None:
        wrapped[" compile"] = lambda function: torch.compile(function, **compiled)
    found = {}
    if case.op in LAYERS:
        theirs = layer(case).to(device, case.dtype)
        folded = FoldedLatent if case.op == "AttentionPoolLatent" else Folded2d
        for suffix, wrap in wrapped.items():
            found["timm" + suffix] = OfLayer(wrap(theirs))
        found["sdpa"] = OfLayer(folded(theirs, sdpa))
        for suffix, wrap in wrapped.items():
            found["einsum" + suffix] = OfLayer(wrap(folded(theirs, einsum)))
        for backend in backends:
            model = nn.Sequential(copy.deepcopy(theirs))
            if not attnkern.accelerate(model).replaced:
                raise AssertionError(f"accelerate does not replace the layer of {case}")
            for suffix, wrap in wrapped.items():
                found[backend + suffix] = OfLayer(wrap(model), backend)
        return found
    found["sdpa"] = sdpa
    for suffix, wrap in wrapped.items():
        found["einsum" + suffix] = wrap(einsum)
    found = {name: _alone(function) for name, function in found.items()}
    for backend in backends:
        found[backend] = lambda local, query, backend=backend: attnkern.compatibility_pool(
            local, query, backend=backend
        )
    return found


def _alone(function):
    return lambda local, query: CompatibilityPooled(function(local, query), None, None)
