"""The modules that :func:`attnkern.accelerate` recognises, by their parts and not by the names of their classes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from attnkern import _attention_pools, _vector_quantize, compat
from attnkern.nn._folded import pays


class Known(NamedTuple):
    """A module that :func:`accelerate` recognises."""

    fits: Callable[[nn.Module], bool]  #: recognises a module by its parts, not by the name of its class
    ours: type  #: the class whose methods replace those of the module
    inputs: Callable[[nn.Module, dict], tuple]  #: inputs of the comparison; may change the tensors in the dict
    rounds: bool = False  #: whether the module rounds where attnkern is exact
    refuses: Callable[[nn.Module], str | None] = lambda _: None  #: why the module cannot be replaced, if that is known
    folds: bool = False  #: whether attnkern's class computes with the parameters of parts that it does not call
    drops: bool = False  #: whether its dropout draws other random numbers, and is therefore left out of the comparison
    arguments: Callable[[list], tuple] = tuple  #: arguments of forward, of the inputs


def _is_attention(module):
    op = getattr(module, "op", None)
    return (
        isinstance(op, nn.Conv2d) and op.out_channels == 1 and op.kernel_size == (1, 1) and op.bias is None
        and isinstance(getattr(module, "normalize_attn", None), bool)
    )  # fmt: skip


def random(like, *shape):
    """Uniform random numbers with a fixed seed, in the dtype and on the device of ``like``."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


def _attention_inputs(module, state):
    like = state["op.weight"]
    channels = like.shape[1]
    numbers = random(like, 2, channels, 13) * 4 - 2
    return numbers[..., :12].unflatten(2, (3, 4)), numbers[..., 12:, None]


def _weights_by_sigmoids(module):
    return None if module.normalize_attn else "it weights by sigmoids, which attnkern has no kernel for"


def _only_parameter(module):
    """Name and shape of the only parameter of a module without children; an empty name for other modules."""
    parameters = list(module.named_parameters())
    if len(parameters) != 1 or list(module.children()):
        return "", ()
    ((name, parameter),) = parameters
    return name, parameter.shape


def _is_quantizer(module):
    name, shape = _only_parameter(module)
    return name == "anchors" and len(shape) == 1


def _is_bottleneck_quantizer(module):
    name, shape = _only_parameter(module)
    layer = isinstance(module, (nn.Linear, nn.Embedding))  # their weight may have this shape as well
    return not layer and name == "weight" and len(shape) == 2 and shape[0] == 1


def _around(anchors):
    """Inputs of a quantizer, some outside the range of its anchors."""
    low, high = anchors.aminmax()
    return (low - 0.3 + (high - low + 0.6) * random(anchors, 2, 1, 5, 7),)


def _is_latent_quantizer(module):
    values = getattr(module, "values_per_latent", None)
    return isinstance(values, nn.ParameterList) and hasattr(module, "quantize") and hasattr(module, "codes_to_indices")


def _latent_inputs(module, state):
    # With random values, no index is close to an integer before the library truncates it, so rounding cannot change it.
    for name in state:
        if name.startswith("values_per_latent."):
            state[name] = random(state[name], len(state[name]))
    like = state["values_per_latent.0"]
    return (random(like, 2, module.dim, 5, 7) * 1.6 - 0.3,)


def _is_vector_quantizer(module):
    codes = getattr(getattr(module, "_codebook", None), "embed", None)
    alone = getattr(module, "dim", None) == getattr(module, "heads", None) == 1
    return alone and isinstance(codes, torch.Tensor) and codes.dim() == 3 and codes.shape[0] == codes.shape[2] == 1


def _vector_inputs(module, state):
    # Codes that are far from each other, and numbers nearer to one than to any other by more than theirs is rounded.
    codes = state["_codebook.embed"]
    state["_codebook.initted"].fill_(True)
    codes.copy_(torch.arange(codes.numel(), device=codes.device).flip(0).view_as(codes) / 8)
    shape = (2, 1, 5, 7) if module.accept_image_fmap else (2, 1, 3, 5, 7) if module.accept_3d_fmap else (2, 9, 1)
    if not (module.channel_last or module.accept_image_fmap or module.accept_3d_fmap):
        shape = (2, 1, 9)
    numbers = random(codes, *shape)
    chosen = codes.flatten()[(numbers * codes.numel()).long()]
    return (chosen + (numbers * 1000 % 1 - 0.5) / 12,)


# --- attention pools -------------------------------------------------------------------------------------------------


def _are(kind, *parts):
    return all(isinstance(part, kind) for part in parts)


def _has(module, *names):
    return all(hasattr(module, name) for name in names)


def _cannot_fold(queries, heads, channels, *layers):
    if any(type(layer) is not nn.Linear for layer in layers):
        return "its projections are not plain nn.Linear layers, whose weights could be folded"
    if not pays(queries, heads, channels):
        return (
            f"its {queries} queries in {heads} heads are more than half its {channels} channels: folding takes longer"
        )
    return None


def _is_latent_pool(module):
    latent, kv = getattr(module, "latent", None), getattr(module, "kv", None)
    named = _has(module, "q", "q_norm", "k_norm", "latent_len", "num_heads", "head_dim", "pool", "proj", "pos_embed")
    return named and isinstance(latent, nn.Parameter) and isinstance(kv, nn.Module)


def _latent_pool_reason(module):
    if not _are(nn.Identity, module.q_norm, module.k_norm):
        return "it normalizes the keys (qk_norm=True), which does not fold"
    return _cannot_fold(module.latent_len, module.num_heads, module.num_heads * module.head_dim, module.kv)


def _latent_pool_inputs(module, state):
    if "pos_embed" in state:  # for few positions, which are compared sooner
        state["pos_embed"] = state["pos_embed"][:6].clone()
    return (random(state["latent"], 2, 6, module.kv.in_features) * 4 - 2,)


def _is_pool_2d(module):
    named = _has(module, "pool_type", "cls_token", "drop", "proj", "pos_embed", "num_heads", "head_dim")
    return named and _are(nn.Module, *_pool_2d_layers(module))


def _pool_2d_layers(module):
    qkv = getattr(module, "qkv", None)
    return [getattr(module, name, None) for name in ("q", "k", "v")] if qkv is None else [qkv]


def _pool_2d_reason(module):
    if not isinstance(module.pos_embed, nn.Parameter):
        return "it rotates the keys by their positions (rotary embedding), which does not fold"
    if module.pool_type != "token":
        return f"it returns every position (pool_type={module.pool_type!r}), so that there is nothing to pool"
    return _cannot_fold(1, module.num_heads, module.num_heads * module.head_dim, *_pool_2d_layers(module))


def _pool_2d_inputs(module, state):
    return (random(state["pos_embed"], 2, module.in_features, 2, 3) * 4 - 2,)


def _clip_pool_layers(module):
    return [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "c_proj")]


def _is_clip_pool(module):
    positions, heads = getattr(module, "positional_embedding", None), getattr(module, "num_heads", None)
    named = isinstance(positions, nn.Parameter) and positions.dim() == 2 and isinstance(heads, int)
    return named and _are(nn.Module, *_clip_pool_layers(module))


def _clip_pool_reason(module):
    channels = module.positional_embedding.shape[1]
    return _cannot_fold(1, module.num_heads, channels, *_clip_pool_layers(module))


def _clip_pool_inputs(_, state):
    state["positional_embedding"] = state["positional_embedding"][:7].clone()
    like = state["positional_embedding"]
    return (random(like, 2, like.shape[1], 2, 3) * 4 - 2,)


def _multihead_inputs(module, state):
    like = state["out_proj.weight"]
    query, x = random(like, 2, 1, module.embed_dim) * 4 - 2, random(like, 2, 6, module.kdim) * 4 - 2
    return (query, x) if module.batch_first else (query.transpose(0, 1), x.transpose(0, 1))


def learned_queries(model: nn.Module) -> dict[nn.Module, int]:
    """The ``nn.MultiheadAttention`` modules beside learned queries -> the number of queries.

    SigLIP's pooling heads have ``probe`` (1, 1, C) and ``attention``, open_clip's ``query`` (Q, C) and ``attn``.
    """
    found = {}
    for module in model.modules():
        for queries, attention in (("probe", "attention"), ("query", "attn")):
            queries, attention = module._parameters.get(queries), module._modules.get(attention)
            if isinstance(attention, nn.MultiheadAttention) and queries is not None and queries.dim() > 1:
                found[attention] = math.prod(queries.shape[:-1])
    return found


def multihead(pooling: dict[nn.Module, int | None]) -> Known:
    """Recognises the ``nn.MultiheadAttention`` modules of ``pooling``, which maps them to their queries, if known."""

    def reason(module):
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds a position to the keys (add_bias_kv, add_zero_attn)"
        if module.kdim != module.vdim:
            return f"its keys and values have different channels, {module.kdim} and {module.vdim}"
        return _cannot_fold(pooling[module] or 1, module.num_heads, module.embed_dim)

    return Known(
        pooling.__contains__, _attention_pools.MultiheadAttention, _multihead_inputs, refuses=reason, folds=True,
        arguments=lambda inputs: (*inputs, inputs[1]),
    )  # fmt: skip


KNOWN = [
    Known(_is_attention, compat.LinearAttentionBlock, _attention_inputs, refuses=_weights_by_sigmoids),
    Known(_is_quantizer, compat.StraightThroughQuantizer, lambda _, state: _around(state["anchors"])),
    Known(_is_bottleneck_quantizer, compat.VectorQuantizer, lambda _, state: _around(state["weight"])),
    Known(_is_latent_quantizer, _vector_quantize.LatentQuantize, _latent_inputs, rounds=True),
    Known(_is_vector_quantizer, _vector_quantize.VectorQuantize, _vector_inputs, rounds=True),
    Known(
        _is_latent_pool, _attention_pools.AttentionPoolLatent, _latent_pool_inputs, refuses=_latent_pool_reason,
        folds=True,
    ),
    Known(
        _is_pool_2d, _attention_pools.AttentionPool2d, _pool_2d_inputs, refuses=_pool_2d_reason, folds=True,
        drops=True,
    ),
    Known(
        _is_clip_pool, _attention_pools.ClipAttentionPool2d, _clip_pool_inputs, refuses=_clip_pool_reason,
        folds=True,
    ),
]  # fmt: skip
