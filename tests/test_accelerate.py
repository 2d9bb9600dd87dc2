"""attnkern.accelerate on models written as their authors' interfaces are described."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_transforms import Recorder
from torch import nn

import attnkern
from attnkern import compat


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
    assert str(done) == "attention: now LinearAttentionBlock\nquantizer: now StraightThroughQuantizer"
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
        (lambda: Network(lambda c: Block(c, False)), "attention", "sigmoid weights are not softmax pooling"),
        (lambda: Network(Shifted), "attention", "it computes something else than LinearAttentionBlock"),
        (lambda: Network(quantizer=Learning), "quantizer", "it computes something else than StraightThroughQuantizer"),
    ],
)
def test_what_is_left_and_why(model, name, why):
    torch.manual_seed(0)
    model = model()
    kind = type(model.get_submodule(name))
    done = attnkern.accelerate(model)
    assert done.left[name].startswith(why)
    assert f"{name}: left, {why}" in str(done)
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
    """The same objects, frozen ones still frozen; a module under two names is replaced under both, shared as before."""

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
    """A LoRA or the like in its place may have no in_channels."""
    torch.manual_seed(0)
    local, g = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 1, 1)
    for block, arguments in [(compat.LinearAttentionBlock(6), (local, g)), (compat.ProjectorBlock(6, 4), (local,))]:
        expected = block(*arguments)
        block.op = nn.Sequential(block.op)
        torch.testing.assert_close(block(*arguments), expected)


class Counting(nn.Module):
    """Straight-through, and counts which anchors are in use."""

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
    assert attnkern.accelerate(model).left == {"0": "it computes something else than StraightThroughQuantizer"}
    assert not model[0].counts.any(), "comparing leaves no trace"


@pytest.mark.parametrize("positions", [(1, 1), (4, 5)])
def test_blocks_for_import(positions):
    """The class itself: with a global vector, and with a global map, where nothing cancels."""
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
