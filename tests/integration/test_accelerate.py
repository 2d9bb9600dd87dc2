"""attnkern.accelerate on models written from the descriptions of public interfaces."""

import contextlib
import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from test_transforms import Recorder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attnkern
from attnkern import compat
from attnkern._known import KNOWN


class Block(nn.Module):
    """The interface of a public "Learn to Pay Attention" block, written from its description."""

    def __init__(self, in_features, normalize_attn=True):
        super().__init__()
        self.normalize_attn = normalize_attn
        self.op = nn.Conv2d(in_features, 1, 1, bias=False)

    def forward(self, local, g):
        n, c = local.shape[:2]
        score = self.op(local + g)
        if not self.normalize_attn:
            return score, F.adaptive_avg_pool2d(torch.sigmoid(score) * local, 1).view(n, c)
        weights = F.softmax(score.view(n, 1, -1), dim=2).view_as(score)
        return score, (weights.expand_as(local) * local).view(n, c, -1).sum(2)


class Shifted(Block):
    def forward(self, local, g):
        score, pooled = super().forward(local, g)
        return score, pooled + 1


class Detached(Block):
    """g gets no gradient from the pooled features, where attnkern gives zeros."""

    def forward(self, local, g):
        return super().forward(local, g)[0], super().forward(local, g.detach())[1]


class Noisy(Block):
    """Correct except in training."""

    def forward(self, local, g):
        score, pooled = super().forward(local, g)
        return score, pooled + self.training * torch.rand_like(pooled)


class Listing(Block):
    def forward(self, local, g):
        return list(super().forward(local, g))


class Masked(Block):
    def forward(self, local, g, mask=None):
        return super().forward(local, g)


class Quantizer(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.anchors = nn.Parameter(torch.rand(count))

    def forward(self, a):
        nearest = self.anchors[(a[..., None] - self.anchors).abs().argmin(-1)]
        return a + (nearest - a).detach()


class Learning(Quantizer):
    def forward(self, a):
        nearest = self.anchors[(a[..., None] - self.anchors).abs().argmin(-1)]
        return nearest + a - a.detach()


class Bottleneck(nn.Module):
    """The interface of the information bottleneck authors' quantizer, written from its description."""

    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, count))

    def forward(self, input):
        chosen = self.weight[0, (input[..., None] - self.weight).square().argmin(-1)]
        losses = F.mse_loss(chosen, input.detach()), F.mse_loss(input, chosen.detach())
        return input + (chosen - input).detach(), *losses


class Swapped(Bottleneck):
    def forward(self, input):
        values, anchor_loss, commitment_loss = super().forward(input)
        return values, commitment_loss, anchor_loss


class Network(nn.Module):
    def __init__(self, block=Block, quantizer=Quantizer):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.attention = block(6)
        self.quantizer = quantizer(5)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        features = self.body(x)
        score, pooled = self.attention(features, features.mean((2, 3), keepdim=True))
        features = features * self.quantizer(score.sigmoid())
        return self.head(pooled + features.mean((2, 3))), score


def loss_and_gradients(model, x):
    logits, score = model(x)
    loss = logits.square().mean() + score.sin().mean()
    return [logits, score, loss, *torch.autograd.grad(loss, [p for p in model.parameters()], allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_computes_the_same_through_our_operators(dtype):
    torch.manual_seed(0)
    model, x = Network().to(dtype), torch.randn(2, 3, 9, 8, dtype=dtype)
    before, keys, parameters = loss_and_gradients(model, x), list(model.state_dict()), list(model.parameters())
    calls = []
    model.attention.register_forward_hook(lambda *_: calls.append(1))
    model.eval()
    done = attnkern.accelerate(model)
    assert done.replaced == {"attention": "LinearAttentionBlock", "quantizer": "StraightThroughQuantizer"}
    assert done.left == {}
    assert str(done) == "attention: replaced by LinearAttentionBlock\nquantizer: replaced by StraightThroughQuantizer"
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(part.training for part in model.modules())
    with Recorder() as recorder:
        after = loss_and_gradients(model, x)
    assert {name.split("::")[1] for name in recorder.names} >= {"pool_fwd", "pool_bwd", "quantize_fwd", "quantize_bwd"}
    assert calls == [1], "comparing calls no hook, running calls it"
    for a, b in zip(after, before, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-6)
    assert attnkern.accelerate(model).replaced == {}, "there is nothing left to do"
    copy.deepcopy(model)(x)


@pytest.mark.parametrize(
    "model, name, why",
    [
        (lambda: Network(lambda c: Block(c, False)), "attention", "it weights by sigmoids"),
        (lambda: Network(Shifted), "attention", "its results differ from those of LinearAttentionBlock"),
        (lambda: Network(quantizer=Learning), "quantizer", "its results differ from those of StraightThroughQuantizer"),
        (lambda: Network(Detached), "attention", "its results differ from those of LinearAttentionBlock"),
        (lambda: Network(Noisy).eval(), "attention", "its results differ from those of LinearAttentionBlock"),
        (lambda: Network(Listing), "attention", "its results differ from those of LinearAttentionBlock"),
        (
            lambda: Network(Masked),
            "attention",
            "it could not be compared with LinearAttentionBlock: its forward takes (local, g, mask), not (l, g)",
        ),
        # Their values and the sum of their gradients are equal: only the single gradients differ.
        (lambda: nn.ModuleDict({"q": Swapped(5)}), "q", "its results differ from those of VectorQuantizer"),
    ],
)
def test_what_is_left_and_why(model, name, why):
    torch.manual_seed(0)
    model = model()
    kind = type(model.get_submodule(name))
    done = attnkern.accelerate(model)
    assert done.left[name].startswith(why)
    assert f"{name}: not replaced: {why}" in str(done)
    assert type(model.get_submodule(name)) is kind


def test_replaced_forwards_and_hooked_parts_are_left():
    model = Network()
    model.quantizer.forward = lambda a: a
    model.attention.op.register_forward_hook(lambda *_: None)
    done = attnkern.accelerate(model)
    assert done.left == {
        "attention": "its parts carry hooks, which would not be called",
        "quantizer": "its forward has been replaced",
    }


def test_comparing_leaves_the_random_state_alone():
    model, state = Network(), torch.get_rng_state()
    attnkern.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mapping_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchors = nn.Parameter(torch.tensor([0.1, 0.9]))

        def forward(self, a, extra=None):
            raise NotImplementedError

    class Extra(nn.Linear):
        pass

    model = nn.Sequential(Own(), nn.ReLU()).double().eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    done = attnkern.accelerate(model, {Own: lambda module: compat.StraightThroughQuantizer(len(module.anchors))})
    assert done.replaced == {"0": "StraightThroughQuantizer"}
    assert torch.equal(model(torch.tensor([[0.3, 0.6]]).double()), torch.tensor([[0.1, 0.9]]).double())
    assert calls == [1]
    assert not model[0].training
    model = nn.Sequential(Own(), Extra(2, 2))
    with pytest.raises(
        ValueError, match=r"must keep the keys of the state_dict, got \['bias', 'weight'\] for \['anchors'"
    ):
        attnkern.accelerate(model, {Own: lambda _: nn.Linear(1, 1)})
    assert isinstance(model[0], Own)


def test_a_mapping_keeps_parameters_and_every_name():
    """Parameters are the same objects, still frozen if they were; a shared module is replaced under both names."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchors = nn.Parameter(torch.tensor([0.1, 0.9]), requires_grad=False)

        def forward(self, a, extra=None):
            raise NotImplementedError

    model = nn.ModuleDict({"a": Own(), "c": nn.ModuleDict()})
    model["b"] = model["c"]["d"] = model["a"]
    anchors = model["a"].anchors
    done = attnkern.accelerate(model, {Own: lambda module: compat.StraightThroughQuantizer(len(module.anchors))})
    assert done.replaced == {"a": "StraightThroughQuantizer"}
    assert isinstance(model["a"], compat.StraightThroughQuantizer)
    assert model["a"] is model["b"] is model["c"]["d"]
    assert model["a"].anchors is anchors
    assert not anchors.requires_grad


def test_blocks_name_what_does_not_fit():
    local, g = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 1, 1)
    for normalize in (True, False):
        block = compat.LinearAttentionBlock(6, normalize)
        for arguments, message in [
            ((local[0], g), r"l must be \(N, 6, H, W\), got shape \(6, 4, 5\)"),
            ((local[:, :5], g), r"l must be \(N, 6, H, W\), got shape \(2, 5, 4, 5\)"),
            ((local, g[:, :5]), r"g must be \(N, 6, 1, 1\) or of the size of l, \(2, 6, 4, 5\), got shape"),
            ((local, g.expand(2, 6, 3, 3)), r"g must be \(N, 6, 1, 1\) or of the size of l, \(2, 6, 4, 5\), got shape"),
            ((local[:1], g), r"g must be \(N, 6, 1, 1\) or of the size of l, \(1, 6, 4, 5\), got shape \(2, 6, 1, 1\)"),
        ]:
            with pytest.raises(ValueError, match="^LinearAttentionBlock: " + message):
                block(*arguments)
    with pytest.raises(ValueError, match=r"^ProjectorBlock: inputs must be \(N, 5, H, W\) or \(5, H, W\), got"):
        compat.ProjectorBlock(5, 4)(local)
    projector = compat.ProjectorBlock(6, 4)
    torch.testing.assert_close(torch.vmap(projector)(local), projector(local))


def test_blocks_whose_convolution_was_wrapped():
    """An adapter such as LoRA in its place may have no in_channels."""
    torch.manual_seed(0)
    local, g = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 1, 1)
    for block, arguments in [(compat.LinearAttentionBlock(6), (local, g)), (compat.ProjectorBlock(6, 4), (local,))]:
        expected = block(*arguments)
        block.op = nn.Sequential(block.op)
        torch.testing.assert_close(block(*arguments), expected)


class Counting(nn.Module):
    """Straight-through gradient and usage counts."""

    def __init__(self, in_place):
        super().__init__()
        self.anchors = nn.Parameter(torch.linspace(0, 1, 4))
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64), persistent=False)
        self.in_place = in_place

    def forward(self, a):
        k = (a[..., None] - self.anchors).abs().argmin(-1)
        found = k.flatten().bincount(minlength=4)
        self.counts = self.counts.add_(found) if self.in_place else self.counts + found
        return a + (self.anchors[k] - a).detach()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_module_that_also_counts_is_left(in_place):
    model = nn.Sequential(Counting(in_place))
    assert attnkern.accelerate(model).left == {"0": "its results differ from those of StraightThroughQuantizer"}
    assert not model[0].counts.any(), "comparing leaves no trace"


@pytest.mark.parametrize("positions", [(1, 1), (4, 5)])
def test_blocks_for_import(positions):
    """The class itself, with a global vector and with a global map."""
    torch.manual_seed(0)
    ours, theirs = compat.LinearAttentionBlock(6), Block(6)
    ours.load_state_dict(theirs.state_dict())
    local, g = torch.randn(2, 6, 4, 5, requires_grad=True), torch.randn(2, 6, *positions, requires_grad=True)
    results = [block(local, g) for block in (ours, theirs)]
    grads = [torch.autograd.grad((c.sin().sum() + p.square().sum()), (local, g, b.op.weight))
             for (c, p), b in zip(results, (ours, theirs), strict=True)]  # fmt: skip
    for a, b in zip([*results[0], *grads[0]], [*results[1], *grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    projector = compat.ProjectorBlock(6, 9)
    assert projector(local).shape == (2, 9, 4, 5)
    assert list(projector.state_dict()) == ["op.weight"]


def used_alone_and_together(module, *inputs):
    """The gradients of inputs and parameters, None included, for every choice of outputs."""
    found = {}
    for name, backend in [("eager", None), ("compiled", "aot_eager")]:
        call = module if backend is None else torch.compile(module, fullgraph=True, backend=backend)
        count = len(outputs) if isinstance(outputs := module(*inputs), tuple) else 1
        for chosen in itertools.product((False, True), repeat=count):
            used = [i for i in range(count) if chosen[i]]
            if not used:
                continue
            leaves = [*inputs, *module.parameters()]
            for leaf in leaves:
                leaf.grad = None
            outputs = call(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum((outputs[i] * outputs[i].detach().cos()).sum() for i in used).backward()
            found[name, *used] = [leaf.grad for leaf in leaves]
    return found


@pytest.mark.parametrize(
    "theirs, ours, shapes",
    [
        (Block, compat.LinearAttentionBlock, [(2, 6, 4, 5), (2, 6, 1, 1)]),
        (Quantizer, compat.StraightThroughQuantizer, [(2, 1, 4, 5)]),
        (Bottleneck, lambda count: compat.VectorQuantizer(1, count), [(3, 8)]),
    ],
)
def test_what_had_a_gradient_has_one(theirs, ours, shapes):
    torch.manual_seed(0)
    theirs = theirs(6)
    ours, replaced = ours(6), nn.Sequential(copy.deepcopy(theirs))
    ours.load_state_dict(theirs.state_dict())
    assert attnkern.accelerate(replaced).left == {}
    inputs = [torch.rand(shape, requires_grad=True) for shape in shapes]
    expected = used_alone_and_together(theirs, *inputs)
    for module in (ours, replaced[0]):
        for key, grads in used_alone_and_together(module, *inputs).items():
            for grad, wanted in zip(grads, expected[key], strict=True):
                assert (grad is None) == (wanted is None), key
                if grad is not None:
                    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


class Pays(nn.Module):
    """A trunk after the last local features, whose output is only the query of the attention."""

    def __init__(self):
        super().__init__()
        self.body, self.trunk, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 7), nn.Linear(6, 2)
        self.attention = Block(6)

    def forward(self, x):
        local = self.body(x)
        return self.head(self.attention(local, self.trunk(local))[1])


def test_weight_decay_and_momentum_go_on():
    """Parameters with gradient zero decay; an optimizer skips those whose gradient is None."""
    torch.manual_seed(0)
    plain, x = Pays(), torch.randn(4, 3, 9, 9)
    fast = copy.deepcopy(plain)
    assert attnkern.accelerate(fast).replaced == {"attention": "LinearAttentionBlock"}
    before = plain.trunk.weight.detach().clone()
    for model in (plain, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            optimizer.step()
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Three steps of weight decay alone, with momentum: v = 0.9 v + 0.1 w, w = w - 0.1 v.
    torch.testing.assert_close(fast.trunk.weight, before * 0.944379, rtol=1e-5, atol=1e-6)


def test_a_query_that_is_not_finite_stays_without_influence():
    block, local = compat.LinearAttentionBlock(6), torch.randn(2, 6, 4, 5)
    g = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 1, 2]).view(1, 6, 1, 1).repeat(2, 1, 1, 1).requires_grad_()
    _, pooled = block(local, g)
    assert torch.equal(pooled, block(local, torch.zeros(2, 6, 1, 1))[1])
    pooled.sum().backward()
    assert torch.equal(g.grad, torch.zeros_like(g))


def test_what_is_pooled_may_be_changed_in_place():
    local, g = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 1, 1)
    block = compat.LinearAttentionBlock(6)
    block(local, g)[1].relu_().sum().backward()
    wanted, block.op.weight.grad = block.op.weight.grad, None
    block(local, g)[1].relu().sum().backward()
    assert torch.equal(block.op.weight.grad, wanted)


class Named(Block):
    def __init__(self, channels):
        super().__init__(channels)
        self.scale = 3

    def scaled(self):
        return self.scale * self.op.weight


def test_everything_but_the_forward_stays():
    """Methods, attributes, isinstance and argument names, also in copies and pickles."""
    torch.manual_seed(0)
    model = nn.Sequential(Named(6))
    local, g = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 1, 1)
    expected = model[0](g=g, local=local)
    attnkern.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        block = each[0]
        assert isinstance(block, Named)
        assert isinstance(block, compat.LinearAttentionBlock)
        assert torch.equal(block.scaled(), 3 * block.op.weight)
        for result in (block(g=g, local=local), block(local, g=g), block(local, g)):
            torch.testing.assert_close(result, expected)
        with pytest.raises(TypeError, match="mask"):
            block(local, g, mask=None)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            block(local)


@pytest.mark.parametrize("shape", [(3, 8), (3, 1, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bottleneck_quantizer(shape, dtype):
    torch.manual_seed(0)
    theirs, ours, a = Bottleneck(5), compat.VectorQuantizer(1, 5), torch.rand(shape).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    for result, expected in zip(ours(a), theirs(a), strict=True):
        torch.testing.assert_close(result, expected)
    model = nn.Sequential(theirs)
    assert attnkern.accelerate(model).replaced == {"0": "VectorQuantizer"}
    torch.testing.assert_close(model[0](a), ours(a))
    assert torch.equal(compat.VectorQuantizer(1, 5, rd_init=False).weight, torch.linspace(0, 1, 5)[None])


def test_layers_do_not_look_like_quantizers():
    model = nn.Sequential(nn.Linear(5, 1, bias=False), nn.Embedding(1, 5), nn.PReLU(), nn.Conv2d(5, 1, 1, bias=False))
    assert str(attnkern.accelerate(model, allow_rounding=True)) == "nothing to replace"


def test_the_bottleneck_quantizer_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^VectorQuantizer: embedding_dim must be 1, got 2"):
        compat.VectorQuantizer(2, 5)
    message = r"^VectorQuantizer: input must be \(N, L\) or \(N, 1, ...\), got shape \(2, 3, 4\)"
    with pytest.raises(ValueError, match=message):
        compat.VectorQuantizer(1, 5)(torch.rand(2, 3, 4))


@pytest.mark.parametrize("where", ["meta", "inside meta", "fake cuda"])
@pytest.mark.parametrize("kind, size", [(Block, 6), (Quantizer, 5), (Bottleneck, 5)])
def test_modules_without_data_are_compared_on_numbers_at_random(where, kind, size):
    mode = FakeTensorMode(allow_non_fake_inputs=True) if where == "fake cuda" else contextlib.nullcontext()
    with mode:
        with torch.device("cuda" if where == "fake cuda" else "meta"):
            model = nn.Sequential(kind(size), Shifted(4), Learning(4))
            done = attnkern.accelerate(model) if where == "inside meta" else None
        done = done or attnkern.accelerate(model)
    assert list(done.replaced) == ["0"]
    assert all("results differ" in why for why in done.left.values())
    assert list(done.left) == ["1", "2"]
    if where != "fake cuda":
        theirs = kind(size)
        model = model[:1].to_empty(device="cpu")
        model[0].load_state_dict(theirs.state_dict())
        inputs = [torch.rand(2, 6, 4, 5), torch.rand(2, 6, 1, 1)] if kind is Block else [torch.rand(3, 8)]
        torch.testing.assert_close(model[0](*inputs), theirs(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, size", [(Block, 6), (Quantizer, 5), (Bottleneck, 5)])
def test_modules_are_compared_where_they_live(kind, size):
    """Meta stands for a device that is not the CPU."""
    module = kind(size)
    (known,) = (known for known in KNOWN if known.fits(module))
    values = {name: tensor.to("meta", torch.float64) for name, tensor in module.state_dict().items()}
    inputs = known.inputs(module, values)
    assert all(tensor.device.type == "meta" and tensor.dtype == torch.float64 for tensor in inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_comparing_under_any_mode(mode):
    with mode():
        model = Network().requires_grad_(False)
        assert list(attnkern.accelerate(model).replaced) == ["attention", "quantizer"]


class Latent(nn.Module):
    """Gives the results of vector-quantize-pytorch's LatentQuantize."""

    def __init__(self, levels):
        super().__init__()
        self.dim = len(levels)
        values = [torch.arange(n) / n - 0.5 if n % 2 == 0 else torch.linspace(-0.5, 0.5, n) for n in levels]
        self.values_per_latent = nn.ParameterList(values)
        self.levels = levels

    def quantize(self, z):
        chosen = [v[(z[..., i, None] - v).abs().argmin(-1)] for i, v in enumerate(self.values_per_latent)]
        return z + (torch.stack(chosen, -1) - z).detach()

    def codes_to_indices(self, codes):
        """Digits of a number, rounded down."""
        total, base = 0, 1
        for i, n in enumerate(self.levels):
            total, base = total + (codes[..., i] * 2 * (n // 2) + n // 2) * base, base * n
        return total.to(torch.int32)

    def forward(self, z):
        codes = self.quantize(z.movedim(1, -1))
        out = codes.movedim(-1, 1)
        loss = F.mse_loss(z.detach(), out) if self.training else torch.tensor(0.0)
        return out, self.codes_to_indices(codes), loss


def test_latent_quantizers_by_a_flag():
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": Latent([20]), "two": Latent([5, 8])})
    left = attnkern.accelerate(model).left
    assert left == dict.fromkeys(["one", "two"], "it rounds where LatentQuantize is exact: pass allow_rounding=True")
    theirs = copy.deepcopy(model)
    done = attnkern.accelerate(model, allow_rounding=True)
    assert done.replaced == {"one": "LatentQuantize", "two": "LatentQuantize"}
    a = torch.randn(64, 1, 16, 16, requires_grad=True)
    (values, indices, loss), (their_values, their_indices, their_loss) = model["one"](a), theirs["one"](a)
    exact = attnkern.anchor_quantize(a, model["one"].values_per_latent[0])
    assert torch.equal(values, exact.values)
    assert torch.equal(indices, exact.indices[:, 0].int())
    assert 0 < (their_indices != indices).sum() < 0.2 * indices.numel(), "rounding is the difference"
    torch.testing.assert_close((values, loss), (their_values, their_loss))
    two = torch.rand(8, 2, 4, 5) - 0.5
    torch.testing.assert_close(model["two"](two), theirs["two"](two))


class Codebook(nn.Module):
    """The codebook of vector-quantize-pytorch that is updated by moving averages."""

    has_dead_code_replacement = learnable_codebook = False
    ema_update = True

    def __init__(self, size):
        super().__init__()
        self.register_buffer("initted", torch.tensor(True))
        self.register_buffer("embed", torch.rand(1, size, 1))

    def update_codebook(self, flatten, onehot):
        mean = (onehot.mT @ flatten) / onehot.sum(1)[..., None].clamp(min=1)
        self.embed.data.lerp_(mean.to(self.embed), 0.2)


class Vectors(nn.Module):
    """Gives the results of vector-quantize-pytorch's VectorQuantize with one channel."""

    dim = heads = commitment_weight = 1
    freeze_codebook = learnable_codebook = accept_3d_fmap = False
    channel_last = has_commitment_loss = route_gradients_to_input = True

    def __init__(self, size, accept_image_fmap=False):
        super().__init__()
        self.codebook_size, self.accept_image_fmap = size, accept_image_fmap
        self._codebook = Codebook(size)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def forward(self, x, mask=None):
        numbers, codes = x.float().reshape(1, -1, 1), self._codebook.embed.detach().clone().float()
        squares = numbers.square() + codes.square().mT - 2 * numbers @ codes.mT  # what rounding takes most from
        indices = squares.clamp(min=1e-8).argmin(-1)
        chosen = codes[0, indices[0]].view_as(x).to(x)
        indices = indices.view(x.squeeze(1 if self.accept_image_fmap else -1).shape)
        if mask is not None:
            return chosen * mask, indices, self.zero
        if not self.training:
            return chosen, indices, self.zero
        self._codebook.update_codebook(numbers.detach(), F.one_hot(indices.flatten(), self.codebook_size)[None].float())
        through = x + (chosen - x).detach() if x.requires_grad else chosen
        return through, indices, self.zero.requires_grad_() + F.mse_loss(chosen, x)


def gradient(output, x):
    if not output.requires_grad:
        return None
    return torch.autograd.grad(output.sum(), x, retain_graph=True, allow_unused=True)[0]


@pytest.mark.parametrize("images", [False, True])
def test_vector_quantizers_of_one_channel_by_a_flag(images):
    torch.manual_seed(0)
    theirs = nn.Sequential(Vectors(9, images))
    model = copy.deepcopy(theirs)
    assert attnkern.accelerate(model).left == {"0": "it rounds where VectorQuantize is exact: pass allow_rounding=True"}
    assert attnkern.accelerate(model, allow_rounding=True).replaced == {"0": "VectorQuantize"}
    for name, buffer in theirs.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), "comparing leaves no trace"
    codes = theirs[0]._codebook.embed.flatten()
    a = (codes[torch.arange(72) % 9] + 1e-3 * torch.randn(72)).view((2, 1, 4, 9) if images else (2, 36, 1))
    for training in (True, False):
        results = []
        for each in (model, theirs):
            each.train(training)
            x = a.clone().requires_grad_()
            outputs = each[0](x)
            results.append([*outputs, *each.buffers(), gradient(outputs[0], x), gradient(outputs[2], x)])
        for ours, wanted in zip(*results, strict=True):
            assert (ours is None) == (wanted is None)
            if ours is not None:
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    mask = torch.ones_like(a)
    torch.testing.assert_close(model[0](a, mask=mask), theirs[0](a, mask=mask))
    model[0]._codebook.embed.copy_(torch.tensor([1000.0, 1000.01, 0, 1, 2, 3, 4, 5, 6]).view(1, 9, 1))
    assert model[0](torch.full_like(a, 1000.01))[1].eq(1).all(), "the nearest, where matrix products lose it"
