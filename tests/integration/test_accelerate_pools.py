"""attnkern.accelerate on attention pools: timm's own, and others written from the descriptions of their interfaces."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from test_transforms import Recorder
from torch import nn

import attnkern

timm = pytest.importorskip("timm")
from timm.layers import AttentionPool2d, AttentionPoolLatent, RotAttentionPool2d  # noqa: E402

N, C, H, W = 3, 32, 4, 5


def attention(q, k, v, heads):
    """Multi-head attention of projected (N, L, C) tensors."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[3])
    return (scores.softmax(3) @ v).transpose(1, 2).flatten(2)


class ClipPool(nn.Module):
    """The interface of the pool of OpenAI's CLIP (ModifiedResNet), which calls none of its layers."""

    def __init__(self, spacial_dim, embed_dim, num_heads, output_dim=None):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x):
        tokens = x.flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding.to(x.dtype)
        tokens = tokens.transpose(0, 1)
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        output, _ = F.multi_head_attention_forward(
            tokens[:1], tokens, tokens, tokens.shape[-1], self.num_heads, None, biases, None, None, False, 0.0,
            self.c_proj.weight, self.c_proj.bias, self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return output.squeeze(0)


class OpenClipPool(ClipPool):
    """The interface of open_clip's: all tokens are queries, and the first one is returned."""

    def forward(self, x):
        tokens = x.reshape(*x.shape[:2], -1).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding.to(x.dtype)
        projected = (self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens))
        return self.c_proj(attention(*projected, self.num_heads))[:, 0]


class AttentionalPooler(nn.Module):
    """The interface of open_clip's pooler, as in CoCa."""

    def __init__(self, d_model, context_dim, n_head=8, n_queries=256):
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = nn.MultiheadAttention(d_model, n_head, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.ln_q = nn.LayerNorm(d_model)
        self.ln_k = nn.LayerNorm(context_dim)

    def forward(self, x):
        x = self.ln_k(x)
        query = self.ln_q(self.query)[None].expand(x.shape[0], -1, -1)
        return self.attn(query, x, x, need_weights=False)[0]


class SiglipHead(nn.Module):
    """The interface of the pooling head of SigLIP in Hugging Face's transformers; with a mask, of SigLIP 2."""

    def __init__(self, hidden_size, num_heads, eps=1e-6):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, 48), nn.GELU("tanh"), nn.Linear(48, hidden_size))
        self.num_heads = num_heads

    def forward(self, hidden_state, attention_mask=None):
        probe = self.probe.repeat(hidden_state.shape[0], 1, 1)
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None].expand(-1, self.num_heads, 1, -1).flatten(0, 1)
        pooled = self.attention(probe, hidden_state, hidden_state, attn_mask=attention_mask)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


def latent(**options):
    return lambda: AttentionPoolLatent(C, **{"num_heads": 4} | options)


def pool_2d(**options):
    return lambda: AttentionPool2d(C, feat_size=(H, W), **{"num_heads": 4} | options)


TOKENS, MAPS = (N, H * W, C), (N, C, H, W)

#: name -> (constructor, shape of the input, name of the replaced part)
POOLS = {
    "latent": (latent(), TOKENS, ""),
    "latent, out_features": (latent(out_features=12), TOKENS, ""),
    "latent, pre-logits": (latent(out_features=0), TOKENS, ""),
    "latent, positions": (latent(pos_embed="abs", feat_size=H * W), TOKENS, ""),
    "latent, mean of 3": (latent(latent_len=3, pool_type="avg"), TOKENS, ""),
    "latent, first of 2": (latent(latent_len=2, num_heads=2), TOKENS, ""),
    "latent, all of 2": (latent(latent_len=2, pool_type=""), TOKENS, ""),
    "latent, no bias": (latent(qkv_bias=False), TOKENS, ""),
    "latent, no q": (latent(q_proj=False), TOKENS, ""),
    "latent, latent_dim": (latent(latent_dim=20), TOKENS, ""),
    "latent, norm and dropout": (latent(norm_layer=nn.LayerNorm, drop=0.3, mlp_ratio=2.0), TOKENS, ""),
    "2d": (pool_2d(), MAPS, ""),
    "2d, separate": (pool_2d(qkv_separate=True), MAPS, ""),
    "2d, class token": (pool_2d(class_token=True), MAPS, ""),
    "2d, class token, separate": (pool_2d(class_token=True, qkv_separate=True, out_features=7), MAPS, ""),
    "2d, pre-logits": (pool_2d(out_features=0), MAPS, ""),
    "2d, embed_dim": (pool_2d(embed_dim=64, out_features=7), MAPS, ""),
    "2d, another size": (pool_2d(), (N, C, 6, 3), ""),
    "2d, no bias": (lambda: without_bias(pool_2d()()), MAPS, ""),
    "clip": (lambda: ClipPool(4, C, 4), (N, C, 4, 4), ""),
    "clip, output_dim": (lambda: ClipPool(4, C, 2, 9), (N, C, 4, 4), ""),
    "open_clip": (lambda: OpenClipPool(4, C, 4, 9), (N, C, 4, 4), ""),
    "pooler": (lambda: AttentionalPooler(C, 24, 2, 4), (N, H * W, 24), "attn"),
    "pooler of one width": (lambda: AttentionalPooler(C, C, 4, 2), TOKENS, "attn"),
    "siglip": (lambda: SiglipHead(C, 4), TOKENS, "attention"),
}
every_pool = pytest.mark.parametrize("name", POOLS)


def without_bias(pool):
    pool.qkv = nn.Linear(pool.qkv.in_features, pool.qkv.out_features, bias=False)
    return pool


def build(name, dtype=torch.float64):
    """The pool in a model, and what accelerate makes of it."""
    torch.manual_seed(0)
    make, shape, part = POOLS[name]
    model = nn.ModuleDict({"pool": make()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.to(dtype)
    fast = copy.deepcopy(model)
    done = attnkern.accelerate(fast)
    replaced = f"pool.{part}".rstrip(".")
    assert list(done.replaced) == [replaced], done
    assert done.left == {}
    assert done.replaced[replaced] == type(fast.get_submodule(replaced)).__name__
    return model, fast, torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def with_gradients(model, *arguments, call=None):
    output = (model["pool"] if call is None else call)(*arguments)
    leaves = [*(each for each in arguments if each.requires_grad), *model.parameters()]
    return [output, *torch.autograd.grad((output * output.detach().cos()).sum(), leaves)]


def assert_alike(found, expected, tolerance=1e-11):
    """Up to the tolerance times the largest number of each tensor, or 1."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


@every_pool
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_and_gradients_stay(name, dtype):
    model, fast, x = build(name, dtype)
    assert list(fast.state_dict()) == list(model.state_dict())
    with Recorder() as recorder:
        found = with_gradients(fast.eval(), x)
    assert {operator.split("::")[1] for operator in recorder.names} >= {"pool_fwd", "pool_bwd"}
    expected = with_gradients(model.eval(), x)
    assert_alike(found, expected, 1e-11 if dtype == torch.float64 else 1e-5)
    fast.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(fast.state_dict(), strict=True)
    assert attnkern.accelerate(fast).replaced == {}, "there is nothing left to do"


@every_pool
def test_copies_and_pickles(name):
    _, fast, x = build(name)
    expected = fast.eval()["pool"](x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for each in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert torch.equal(each["pool"](x), expected)
        assert isinstance(each["pool"], type(POOLS[name][0]()))


@pytest.mark.parametrize(
    "name", ["latent", "latent, positions", "2d", "2d, separate", "2d, another size", "clip", "pooler", "siglip"]
)
def test_compiled_and_exported(name):
    model, fast, x = build(name, torch.float32)
    expected = with_gradients(model.eval(), x)
    torch._dynamo.reset()
    compiled = torch.compile(fast.eval()["pool"], fullgraph=True, backend="aot_eager")
    assert_alike(with_gradients(fast, x, call=compiled), expected, 1e-5)
    program = torch.export.export(fast["pool"], (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    longer = torch.cat([x, -x])
    assert_alike([program.module()(longer)], [model["pool"](longer)], 1e-5)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("pool_fwd" in name for name in names)


@every_pool
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(name, dtype):
    model, fast, x = build(name, torch.float32)
    exact = model.eval()["pool"](x)
    for automatic in (True, False):
        if not automatic:
            model, fast, x = model.to(dtype), fast.to(dtype), x.to(dtype)
        with torch.autocast("cpu", dtype, enabled=automatic):
            outputs = [each.eval()["pool"](x) for each in (fast, model)]
        assert outputs[0].dtype == outputs[1].dtype
        errors = [(output - exact).square().mean().sqrt() for output in outputs]
        assert errors[0] < 1.5 * errors[1] + 1e-3
        outputs[0].float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in fast.parameters())


REFUSED = {
    "qk_norm": (latent(qk_norm=True), "", "it normalizes the keys (qk_norm=True), which does not fold"),
    "many latents": (
        latent(latent_len=5), "",
        "its 5 queries in 4 heads are more than half its 32 channels: folding takes longer",
    ),
    "every position": (
        pool_2d(pool_type=""), "",
        "it returns every position (pool_type=''), so that there is nothing to pool",
    ),
    "rotary": (
        lambda: RotAttentionPool2d(C, num_heads=4), "",
        "it rotates the keys by their positions (rotary embedding), which does not fold",
    ),
    "rotary, separate": (
        lambda: RotAttentionPool2d(C, num_heads=4, qkv_separate=True, class_token=True), "",
        "it rotates the keys by their positions (rotary embedding), which does not fold",
    ),
    "many queries": (
        lambda: AttentionalPooler(C, C, 4), "attn",
        "its 256 queries in 4 heads are more than half its 32 channels: folding takes longer",
    ),
    "adapters": (
        lambda: adapted(latent()(), "kv"), "",
        "its projections are not plain nn.Linear layers, whose weights could be folded",
    ),
    "adapters of 2d": (
        lambda: adapted(pool_2d(qkv_separate=True)(), "k"), "",
        "its projections are not plain nn.Linear layers, whose weights could be folded",
    ),
    "adapters of CLIP": (
        lambda: adapted(ClipPool(4, C, 4), "v_proj"), "",
        "its projections are not plain nn.Linear layers, whose weights could be folded",
    ),
    "hooks": (
        lambda: hooked(latent()()), "",
        "its parts carry hooks, which would not be called",
    ),
    "forward": (
        lambda: with_forward(pool_2d()()), "",
        "its forward has been replaced",
    ),
    "other mathematics": (
        lambda: Doubled(4, C, 4), "",
        "its results differ from those of ClipAttentionPool2d",
    ),
}  # fmt: skip


class Doubled(ClipPool):
    def forward(self, x):
        return 2 * super().forward(x)


def adapted(module, name):
    setattr(module, name, type("Adapted", (nn.Linear,), {})(C, getattr(module, name).out_features))
    return module


def hooked(module):
    module.kv.register_forward_hook(lambda *_: None)
    return module


def with_forward(module):
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_and_why(case):
    make, part, why = REFUSED[case]
    model = nn.ModuleDict({"pool": make()})
    name = f"pool.{part}".rstrip(".")
    kind = type(model.get_submodule(name))
    done = attnkern.accelerate(model)
    assert (done.replaced, done.left) == ({}, {name: why})
    assert type(model.get_submodule(name)) is kind


def test_what_only_looks_like_a_pool_is_not_touched():
    class Other(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    def layer():
        return nn.Linear(C, C)

    model = nn.ModuleDict({
        "clip": Other(**{f"{name}_proj": layer() for name in "qkvc"}, positional_embedding=nn.Parameter(torch.ones(C))),
        "latent": Other(latent=nn.Parameter(torch.ones(1, 1, C)), kv=layer(), q=layer()),
        "2d": Other(pos_embed=nn.Parameter(torch.ones(5, C)), qkv=layer(), pool_type="token"),
        "siglip": Other(probe=nn.Parameter(torch.ones(1, 1, C)), attention=layer()),
        "block": timm.layers.Attention(C),
    })  # fmt: skip
    assert str(attnkern.accelerate(model)) == "nothing to replace"


def test_parts_that_other_modules_use_are_left():
    """The same layer, and another layer with the same parameter."""

    class SelfAttention(nn.Module):
        def __init__(self, kv):
            super().__init__()
            self.kv = kv

    pools = [latent()() for _ in range(3)]
    tied = nn.Linear(C, 2 * C)
    tied.weight = pools[1].kv.weight
    model = nn.ModuleDict({"a": pools[0], "b": pools[1], "c": pools[2], "layer": SelfAttention(pools[0].kv)})
    model["layer"].other = tied
    done = attnkern.accelerate(model)
    assert done.left == {
        "a": "its parameters are shared with layer",
        "b": "its parameters are shared with layer.other",
    }
    assert list(done.replaced) == ["c"]
    model["again"] = model["c"]  # a module with two names shares nothing
    again = nn.ModuleDict({"d": latent()(), "e": nn.ModuleDict()})
    again["e"]["d"] = again["d"]
    assert list(attnkern.accelerate(again).replaced) == ["d"]


@pytest.mark.parametrize("name", ["latent", "2d", "2d, separate", "clip", "siglip"])
def test_what_is_done_to_parts_later_counts(name):
    """Hooks and adapters on layers: the module's own forward runs again."""
    model, fast, x = build(name)
    for each in (model, fast):
        pool = each.eval()["pool"]
        part = {"latent": "kv", "2d": "qkv", "2d, separate": "k", "clip": "k_proj", "siglip": "layernorm"}[name]
        layer = pool.get_submodule(part)
        layer.register_forward_hook(lambda _m, _i, output: 2 * output)
        torch.nn.utils.parametrizations.weight_norm(pool.mlp[0] if name == "siglip" else pool.get_submodule(part))
    assert_alike(with_gradients(fast, x), with_gradients(model, x))


def test_dropout_of_the_2d_pool():
    """Kept with the same probability and scaled; drawn for the pooled token alone."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"pool": pool_2d(drop_rate=0.4, out_features=0)()})
    x = torch.randn(2000, *MAPS[1:])
    assert list(attnkern.accelerate(model).replaced) == ["pool"]
    plain, dropped = model.eval()["pool"](x), model.train()["pool"](x)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.6) < 0.02
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.6)
    torch.manual_seed(1)
    first = model["pool"](x)
    torch.manual_seed(1)
    assert torch.equal(model["pool"](x), first)


def test_dropout_of_the_latent_pool_draws_the_same_numbers():
    model, fast, x = build("latent, norm and dropout")
    outputs = []
    for each in (model.train(), fast.train()):
        torch.manual_seed(1)
        outputs.append(each["pool"](x))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], model.eval()["pool"](x))


@pytest.mark.parametrize("shape", [(N, 1, 1, H * W), (1, 1, 1, H * W)])
def test_masks_of_the_latent_pool(shape):
    model, fast, x = build("latent, mean of 3")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    with Recorder() as recorder:
        found = with_gradients(fast.eval(), x, mask)
    assert "attnkern::pool_fwd" in recorder.names or "attnkern_triton::pool_fwd" in recorder.names
    assert_alike(found, with_gradients(model.eval(), x, mask))
    for other in (mask.expand(-1, 4, 3, -1), torch.where(mask, 0.0, -math.inf).to(x), torch.randn(shape).to(x)):
        assert_alike(with_gradients(fast, x, other), with_gradients(model, x, other))


def test_options_of_the_2d_pool():
    model, fast, x = build("2d, class token, separate")
    for each in (model.eval(), fast.eval()):
        each["pool"].reset(num_classes=5)
    fast["pool"].load_state_dict(model["pool"].state_dict())
    assert fast["pool"](x).shape == (N, 5)
    for options in ({}, {"pre_logits": True}):
        torch.testing.assert_close(fast["pool"](x, **options), model["pool"](x, **options))
    for each in (model, fast):
        each["pool"].reset(pool_type="")
    torch.testing.assert_close(fast["pool"](x), model["pool"](x))
    assert fast["pool"](x).shape == (N, 5, H, W)


def test_the_mask_of_siglip_2_is_honoured():
    model, fast, x = build("siglip")
    mask = torch.where(torch.rand(N, H * W, generator=torch.Generator().manual_seed(3)) < 0.6, 0.0, -1e9).to(x)
    assert_alike(with_gradients(fast, x, mask), with_gradients(model, x, mask))


# --- nn.MultiheadAttention by name -----------------------------------------------------------------------------------


def multihead(**options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(C, 4, **options)}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast = copy.deepcopy(model)
    return model, fast, attnkern.accelerate(fast, attention=["mha"])


def calls(batch_first=True, width=C):
    """Arguments of nn.MultiheadAttention by name, and whether the call is folded."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 10, width, dtype=torch.float64, generator=generator)
    queries = {n: torch.randn(N, n, C, dtype=torch.float64, generator=generator) for n in (1, 3, 4, 10)}
    padding = torch.rand(N, 10, generator=generator) < 0.4
    ordered = (lambda each: each) if batch_first else (lambda each: each.transpose(0, 1).contiguous())
    x, queries = ordered(x), {n: ordered(query) for n, query in queries.items()}
    pools = (queries[3], x, x)
    plain = {
        "pooling": (pools, {}, True),
        "one query": ((queries[1], x, x), {}, True),
        "no weights": (pools, {"need_weights": False}, True),
        "weights of heads": (pools, {"average_attn_weights": False}, True),
        "padding": (pools, {"key_padding_mask": padding}, True),
        "padding, no weights": (pools, {"key_padding_mask": padding, "need_weights": False}, True),
        "padding by numbers": (pools, {"key_padding_mask": torch.where(padding, -1.0, 0.5).double()}, False),
        "mask": (pools, {"attn_mask": torch.rand(3, 10, generator=generator) < 0.3}, False),
        "causal": (
            pools,
            {"attn_mask": torch.ones(3, 10).triu(1) > 0, "is_causal": True, "need_weights": False},
            False,
        ),
        "too many queries in 4 heads": ((queries[10], x, x), {}, False),
        "other values": ((queries[3], x, x + 1), {}, False),
        "a copy as values": ((queries[3], x, x.clone()), {}, False),
    }
    if batch_first and width == C:
        plain["self-attention"] = ((x, x, x), {}, False)
        plain["without batch"] = ((queries[3][0], x[0], x[0]), {}, False)
    return plain


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"batch_first": True, "bias": False}, {"batch_first": True, "kdim": 20, "vdim": 20}],
)
def test_multihead_attention_by_name(options):
    """Calls that pool are folded; all others are those of nn.MultiheadAttention."""
    model, fast, done = multihead(**options)
    assert done.replaced == {"mha": "MultiheadAttention"}
    for name, (arguments, named, folded) in calls(options.get("batch_first", False), options.get("kdim", C)).items():
        for training in (True, False):
            results = []
            for each in (model, fast):
                each.train(training)
                leaf = arguments[1].detach().requires_grad_()
                inputs = [leaf if tensor is arguments[1] else tensor for tensor in arguments]
                with Recorder() as recorder:
                    output, weights = each["mha"](*inputs, **named)
                assert any("pool_fwd" in operator for operator in recorder.names) == (folded and each is fast), name
                total = output.sin().sum() + (0 if weights is None else weights.square().sum())
                results.append([output, *torch.autograd.grad(total, [leaf, *each.parameters()])])
                results[-1] += [] if weights is None else [weights]
            assert_alike(*results)


def test_compiled_multihead_attention_chooses_for_each_call():
    model, fast, _ = multihead(batch_first=True)
    torch._dynamo.reset()
    compiled = torch.compile(fast["mha"], fullgraph=True, backend="aot_eager")
    for name in ("pooling", "padding", "mask", "self-attention", "a copy as values"):
        arguments, named, _ = calls()[name]
        assert_alike(compiled(*arguments, **named), model["mha"](*arguments, **named))


def test_multihead_attention_with_dropout():
    model, fast, _ = multihead(batch_first=True, dropout=0.3)
    arguments, _, _ = calls()["pooling"]
    for training in (True, False):
        outputs = []
        for each in (model, fast):
            torch.manual_seed(0)
            outputs.append(each.train(training)["mha"](*arguments)[0])
        torch.testing.assert_close(*outputs)


def test_multihead_attention_of_an_image_without_positions():
    _, fast, _ = multihead(batch_first=True)
    arguments, named, _ = calls()["padding"]
    padding = named["key_padding_mask"].clone()
    padding[1] = True
    output, weights = fast["mha"](*arguments, key_padding_mask=padding)
    assert torch.equal(output[1], fast["mha"].out_proj.bias.expand(3, -1))
    assert not weights[1].any()


@pytest.mark.parametrize(
    "options, why",
    [
        ({"add_bias_kv": True}, "it adds a position to the keys (add_bias_kv, add_zero_attn)"),
        ({"add_zero_attn": True}, "it adds a position to the keys (add_bias_kv, add_zero_attn)"),
        ({"kdim": 20, "vdim": 12}, "its keys and values have different channels, 20 and 12"),
    ],
)
def test_multihead_attention_that_stays(options, why):
    _, fast, done = multihead(**options)
    assert (done.replaced, done.left) == ({}, {"mha": why})
    assert type(fast["mha"]) is nn.MultiheadAttention


def test_multihead_attention_is_replaced_only_by_name():
    layer = nn.TransformerDecoderLayer(C, 4, batch_first=True).eval()
    model = nn.ModuleDict({"layer": layer, "linear": nn.Linear(C, C)})
    assert str(attnkern.accelerate(model)) == "nothing to replace"
    memory, target = torch.randn(2, 12, C), torch.randn(2, 3, C)
    expected = layer(target, memory)
    done = attnkern.accelerate(model, attention=("layer.multihead_attn",))
    assert list(done.replaced) == ["layer.multihead_attn"]
    torch.testing.assert_close(layer(target, memory), expected, rtol=1e-5, atol=1e-5)
    for name, what in (("linear", "Linear"), ("layer.other", "no module of it")):
        message = (
            f"^accelerate: attention must name nn.MultiheadAttention modules of model, got '{name}', which is {what}"
        )
        with pytest.raises(ValueError, match=message):
            attnkern.accelerate(model, attention=[name])
    with pytest.raises(TypeError, match=r"^accelerate: attention must be a list of str, got 'linear'"):
        attnkern.accelerate(model, attention="linear")


# --- whole models ----------------------------------------------------------------------------------------------------


def siglip():
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=C, depth=2, num_heads=4, global_pool="map", class_token=False,
        num_classes=0,
    )  # fmt: skip


MODELS = {
    "siglip": (siglip, (2, 3, 32, 32), "attn_pool", "AttentionPoolLatent"),
    "clip": (lambda: timm.create_model("resnet50_clip", pretrained=False, num_classes=6, width_factor=0.25),
             (2, 3, 64, 64), "head", "AttentionPool2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    torch.manual_seed(0)
    make, shape, part, kind = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    fast = copy.deepcopy(model)
    assert attnkern.accelerate(fast).replaced == {part: kind}
    results = []
    for each in (model, fast):
        output = each(x)
        results.append([output, *torch.autograd.grad(output.square().mean(), list(each.parameters()))])
    assert_alike(*results, 1e-5)
    fast.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.device("meta"), lambda: torch.autocast("cpu")])
def test_comparing_under_any_mode(mode):
    with mode():
        model = nn.ModuleList([make() for make, _, _ in POOLS.values()])
        done = attnkern.accelerate(model)
    assert len(done.replaced) == len(POOLS)
    assert done.left == {}


def test_recorded_programs():
    """TorchScript's tracer and torch.fx record what is folded; its compiler says what to use instead."""
    _, fast, x = build("latent", torch.float32)
    network, other = nn.Sequential(nn.Linear(C, C), fast["pool"]).eval(), torch.randn_like(x)
    for program in (torch.jit.trace(network, (x,)), torch.fx.symbolic_trace(network)):
        torch.testing.assert_close(program(other), network(other))
    with pytest.raises(RuntimeError, match=r"^AttentionPoolLatent: torch.jit.script cannot compile it"):
        torch.jit.script(network)


@pytest.mark.parametrize("name", ["latent", "2d"])
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, fast, x = build(name, torch.float32)
    module, path = fast["pool"].eval(), tmp_path / "pool.onnx"
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(module, (x.detach(),), path, dynamo=True, dynamic_shapes=batch, verbose=False)
    session, other = runtime.InferenceSession(path), torch.randn(5, *x.shape[1:])
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(other).detach(), rtol=1e-4, atol=1e-5)
