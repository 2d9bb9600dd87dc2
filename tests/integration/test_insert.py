"""attnkern.insert adds attention after a named layer of networks from torchvision and timm."""

import copy
import pickle
from collections import OrderedDict

import numpy
import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import attnkern
import attnkern.nn as ann
from attnkern import _insert

#: build, layer, its channels
TORCHVISION = {
    "resnet": (lambda models: models.resnet18(), "layer3", 256),
    "resnet block": (lambda models: models.resnet18(), "layer3.1", 256),
    "efficientnet": (lambda models: models.efficientnet_b0(), "features.6", 192),
    "mobilenet": (lambda models: models.mobilenet_v3_large(), "features.12", 112),
    "convnext": (lambda models: models.convnext_tiny(), "features.3", 192),
    "vit": (lambda models: models.VisionTransformer(224, 16, 5, 3, 192, 768), "encoder.layers.encoder_layer_3", 192),
    "swin": (lambda models: models.SwinTransformer([4, 4], 24, [2, 2, 2, 2], [3, 6, 12, 24], [7, 7]), "features.1", 24),
}
TIMM = {
    "resnet": ("resnet18", "layer3", 256),
    "efficientnet": ("efficientnet_b0", "blocks.5", 192),
    "mobilenet": ("mobilenetv3_large_100", "blocks.4", 112),
    "convnext": ("convnext_atto", "stages.2", 160),
    "vit": ("vit_tiny_patch16_224", "blocks.3", 192),
}


def check_inserted(model, layer, channels, module):
    """The network uses and trains the module, keeps the other keys, and loads its own state_dict."""
    plain = model.state_dict().keys()
    sequential = type(model.get_submodule(layer)) is nn.Sequential
    twin = copy.deepcopy(model)
    model.train()
    inserted = attnkern.insert(model, layer, module)
    assert inserted.channels == channels
    assert all(part.training for part in model.modules())
    assert sequential == (plain <= model.state_dict().keys())
    attnkern.insert(twin, layer, module)
    twin.load_state_dict(model.state_dict())
    model.eval(), twin.eval()
    side = 224 if "VisionTransformer" in type(model).__name__ else 96
    x = torch.randn(2, 3, side, side)
    seen = []
    inserted.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    output = model(x)
    ((features, attended),) = seen
    assert attended.shape == features.shape
    assert not torch.equal(attended, features)
    (output.square().mean() + attended.square().mean()).backward()  # the head of some networks is initialised to zero
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in inserted.parameters())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    build, layer, channels = TORCHVISION[name]
    check_inserted(build(models), layer, channels, ann.ProgressiveAttention)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    architecture, layer, channels = TIMM[name]
    check_inserted(timm.create_model(architecture), layer, channels, ann.WindowAttention)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU()), nn.Flatten(), nn.Linear(200, 2)
    )


EXAMPLE = torch.zeros(1, 3, 9, 9)


def test_what_is_inserted_is_applied_and_found_by_name():
    model, x = small(), torch.randn(2, 3, 9, 9)
    features = model[1](model[0](x))
    inserted = attnkern.insert(model, "1", ann.WindowAttention, example=EXAMPLE, hidden=(4,), residual=False)
    assert model.get_submodule("1.attention") is inserted
    assert inserted.residual is False
    torch.testing.assert_close(model(x), model[3](model[2](inserted(features))))
    again = attnkern.insert(model, "0", ann.PositionwiseAttention(6), example=EXAMPLE)
    assert model.get_submodule("0.attention") is again
    assert isinstance(model.get_submodule("0.layer"), nn.Conv2d)
    attnkern.insert(model, "1", ann.ProgressiveAttention, example=EXAMPLE)
    assert set(dict(model[1].named_children())) == {"layer", "attention"}


def test_a_layer_under_two_names_attends_under_both():
    layer = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(OrderedDict(first=layer, again=layer, inner=nn.Sequential(layer)))
    inserted = attnkern.insert(model, "again", ann.WindowAttention, example=EXAMPLE, hidden=(4,))
    assert model.first is model.again is model.inner[0]
    assert model.first.layer is layer
    assert type(layer.weight.data) is torch.Tensor
    x = expected = torch.randn(2, 3, 9, 9)
    for _ in range(3):
        expected = inserted(layer(expected))
    torch.testing.assert_close(model(x), expected)


def test_an_activation_that_a_model_shares_attends_where_it_was_named():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), relu, nn.Conv2d(8, 16, 1), relu)
    with pytest.raises(TypeError, match="must give back the features"):
        attnkern.insert(model, "3", ann.BottleneckAttention, example=EXAMPLE)
    assert model[3] is relu, "an error leaves the model as it was"
    inserted = attnkern.insert(model, "3", ann.WindowAttention, example=EXAMPLE, hidden=(4,))
    assert inserted.channels == 16
    assert model[1] is relu
    assert type(model[3].layer) is nn.ReLU
    assert model(torch.randn(2, 3, 9, 9)).shape == (2, 16, 9, 9)


def test_an_activation_of_one_name_stays_the_same_object():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), relu := nn.ReLU())
    attnkern.insert(model, "1", ann.WindowAttention, example=EXAMPLE, hidden=(4,))
    assert model[1].layer is relu


def test_probing_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    attention, state = ann.ProgressiveAttention(4).double(), torch.get_rng_state()
    attnkern.insert(model, "1", attention)
    assert [part.training for part in (model, model[0], model[1], model[2])] == [True, True, False, True]
    assert all(torch.equal(before[key], model.state_dict()[key.replace("1.", "1.layer.")]) for key in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].attention.score.weight.dtype == torch.float32


def test_tokens_before_the_grid_pass_unchanged():
    on_tokens = _insert.OnTokens(ann.ProgressiveAttention(6))
    tokens = torch.randn(2, 1 + 16, 6)
    found = on_tokens(tokens)
    assert torch.equal(found[:, 0], tokens[:, 0])
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(found[:, 1:], on_tokens.module(grid).flatten(2).transpose(1, 2))


# --- layouts ---------------------------------------------------------------------------------------------------------


class Laid(nn.Module):
    """Returns features (N, C, H, W) in another arrangement; ``size`` is the only image size that it accepts."""

    def __init__(self, channels, arrange, size=None):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, channels, 2, stride=2), nn.Identity()
        self.arrange = arrange
        self.position = None if size is None else nn.Parameter(torch.zeros(channels, size[0] // 2, size[1] // 2))

    def forward(self, x):
        features = self.stem(x)
        return self.layer(self.arrange(features if self.position is None else features + self.position))


def nchw(features):
    return features


def nhwc(features):
    return features.permute(0, 2, 3, 1)


def tokens(features):
    return features.flatten(2).mT


#: (channels, arrangement, image, fixed, layout or None) -> the channels found, or what the error says
LAYOUTS = {
    "maps": (6, nchw, (16, 16), False, None, 6),
    "maps with as many channels as rows": (8, nchw, (16, 24), False, None, 8),
    "maps of one row": (6, lambda x: x.mean(2, keepdim=True), (16, 16), False, None, 6),
    "channels last": (6, nhwc, (16, 16), False, None, 6),
    "channels last with as many channels as columns": (8, nhwc, (24, 16), False, None, 8),
    "square maps of a fixed size": (6, nchw, (16, 16), True, None, 6),
    "square maps of a fixed size, channels last": (6, nhwc, (16, 16), True, None, 6),
    "pooled to one size": (6, lambda x: nn.functional.adaptive_avg_pool2d(x, 3), (16, 24), False, "NCHW", 6),
    "a cube": (8, nchw, (16, 16), True, None, r"layout must be given, 'NCHW' or 'NHWC', .* \(1, 8, 8, 8\)"),
    "a cube, said": (8, nhwc, (16, 16), True, "NHWC", 8),
    "a fixed size that is not square": (8, nchw, (16, 24), True, None, "layout must be given"),
    "channels between": (6, lambda x: x.transpose(1, 2), (16, 16), False, None, "layout must be given"),
    "tokens": (6, tokens, (16, 16), False, None, 6),
    "tokens of a fixed size": (6, tokens, (16, 16), True, None, 6),
    "tokens whose channels could be positions": (9, tokens, (16, 16), False, None, 9),
    "tokens of oblong images that could be square": (6, tokens, (8, 32), False, None, "layout must be 'NLC' if"),
    "tokens of oblong patches": (6, tokens, (8, 32), False, "NLC", 6),
    "channels before positions": (
        9,
        lambda x: x.flatten(2),
        (16, 16),
        False,
        None,
        "the last axis changes with the si",
    ),
    "positions before images": (6, lambda x: x.flatten(2).permute(2, 0, 1), (16, 16), True, None, "the batch is anoth"),
    "said of another number of axes": (6, tokens, (16, 16), False, "NHWC", "layout must fit the output of layer"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_layout_is_found_or_said(case, capfd):
    channels, arrange, size, fixed, layout, expected = LAYOUTS[case]
    torch.manual_seed(0)
    model = Laid(channels, arrange, size if fixed else None).eval()
    x = torch.randn(1, 3, *size)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            attnkern.insert(model, "layer", ann.ProgressiveAttention, example=x, layout=layout)
        assert type(model.layer) is nn.Identity
        return
    features = model(x)
    inserted = attnkern.insert(model, "layer", ann.ProgressiveAttention, example=x, layout=layout)
    assert inserted.channels == expected == channels
    assert capfd.readouterr() == ("", ""), "runs that fail are answers, not news"
    # The layers after it weigh every position by a score of its features.
    on_positions = {"nchw": (0, 2, 3, 1), "nhwc": (0, 1, 2, 3)}.get("nhwc" if arrange is nhwc else "nchw")
    last = features if features.dim() == 3 else features.permute(on_positions)
    score = last @ inserted.score.weight.flatten() + inserted.score.bias
    attended = model(x)
    attended = attended if features.dim() == 3 else attended.permute(on_positions)
    torch.testing.assert_close(attended, last * score.sigmoid()[..., None])
    assert case.startswith("tokens") or fixed or model(torch.randn(2, 3, 20, 12)).shape[0] == 2


# --- what stands in a layer's place ----------------------------------------------------------------------------------


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.factor = nn.Conv2d(16, 8, 1), 2

    def forward(self, x, skip, *, scale=1.0):
        return scale * self.mix(torch.cat((x, skip), 1))


class Branched(nn.Module):
    """Calls a layer with further arguments, and reads attributes of layers."""

    def __init__(self):
        super().__init__()
        self.down, self.body, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), Up()

    def forward(self, x):
        features = self.down(x)
        return self.up(self.body(features), skip=features, scale=self.up.factor) * self.down.stride[0]


@pytest.mark.parametrize("layer", ["up", "down"])
def test_arguments_and_attributes_of_the_layer_are_passed_on(layer):
    torch.manual_seed(0)
    model, x = Branched().eval(), torch.randn(2, 3, 16, 16)
    features = model.down(x)
    expected = 2 * 2 * model.up.mix(torch.cat((model.body(features), features), 1))
    plain = copy.deepcopy(model.get_submodule(layer))
    inserted = attnkern.insert(model, layer, ann.PositionwiseAttention, hidden=4)
    if layer == "up":
        torch.testing.assert_close(model(x), 2 * inserted(expected / 2))
    else:
        features = inserted(plain(x))
        torch.testing.assert_close(model(x), 4 * model.up.mix(torch.cat((model.body(features), features), 1)))
        assert model.down.weight is model.down.layer.weight
        model.down.padding = (0, 0)
        assert model.down.layer.padding == model.down.padding == (0, 0)
    model.get_submodule(layer).note = "its own"
    assert not hasattr(model.get_submodule(layer).layer, "note")
    model.get_submodule(layer).layer._mark = True
    assert not hasattr(model.get_submodule(layer), "_mark"), "other libraries' marks are of the layer that has them"
    with pytest.raises(AttributeError, match=f"'{type(plain).__name__}' object has no attribute 'nothing'"):
        model.get_submodule(layer).nothing  # noqa: B018
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(x), model(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "record", [lambda model, x: torch.jit.trace(model, (x,)), lambda model, _: symbolic_trace(model)]
)
def test_what_stands_around_a_module_is_recorded(record):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = _insert.OnTokens(nn.Conv2d(6, 6, 1))
            self.last = _insert.OnChannelsLast(nn.Conv2d(6, 6, 1))
            self.layer = _insert.Attended(nn.Linear(6, 5), nn.Tanh())

        def forward(self, x):
            return self.layer(self.last(self.tokens(x)[:, None]))

    model, x = Around().eval(), torch.randn(2, 17, 6)
    assert torch.equal(record(model, x)(x), model(x))


def test_a_subclass_of_sequential_stays_what_it_is():
    class Block(nn.Sequential):
        pass

    model = nn.Sequential(Block(nn.Conv2d(3, 8, 1), nn.ReLU()))
    keys = set(model.state_dict())
    attnkern.insert(model, "0", ann.ProgressiveAttention, example=EXAMPLE)
    assert type(model[0]) is Block
    assert isinstance(model[0][0], nn.Conv2d)
    assert keys < set(model.state_dict())


@pytest.mark.parametrize("example", [None, EXAMPLE])
def test_a_model_that_does_not_run_with_the_module_stays_as_it_was(example):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            assert type(self.last) is nn.Conv2d, "no convolution"
            return self.last(self.body(x))

    model = Picky()
    keys, body = set(model.state_dict()), list(model.body.named_children())
    with pytest.raises(ValueError, match=r"the model must run.* with module after last: AssertionError: no convolut"):
        attnkern.insert(model, "last", ann.ProgressiveAttention, example=example)
    with pytest.raises(ValueError, match="with module after body: ValueError: ProgressiveAttention: x must be"):
        attnkern.insert(model, "body", ann.ProgressiveAttention(3), example=example)
    assert set(model.state_dict()) == keys
    assert list(model.body.named_children()) == body
    assert type(model.last) is nn.Conv2d


# --- how the model is run --------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Does not run on fake tensors; records its inputs."""

    def __init__(self, how):
        super().__init__()
        self.how, self.seen, self.cache, self.last = how, 0, {}, None
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.mean = torch.full((3, 1, 1), 0.5)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.total += 1
        self.last = self.cache["x"] = x
        y = self.first(x - self.mean)
        if self.how == "branch" and y.abs().max() > 99:
            y = y / 2
        if self.how == "numpy":
            y = y + float(numpy.abs(y.detach().numpy()).max() < 0)
        y = self.second(y)
        if self.how == "late branch" and y.abs().max() > 99:
            y = y / 2
        return y


@pytest.mark.parametrize("how", ["plain", "branch", "numpy", "late branch"])
def test_models_that_need_numbers(how):
    torch.manual_seed(0)
    model, x = Odd(how), torch.randn(1, 3, 20, 20)
    if how in ("branch", "numpy"):
        with pytest.raises(
            ValueError, match="example must be given, an input of the model, which does not run on a fa"
        ):
            attnkern.insert(model, "second", ann.ProgressiveAttention)
    else:
        attnkern.insert(copy.deepcopy(model), "second", ann.ProgressiveAttention)
    attention, state = ann.ProgressiveAttention(8), torch.get_rng_state()
    inserted = attnkern.insert(model, "second", attention, example=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.seen, model.cache, model.last, model.total.item()) == (0, {}, None, 0)
    assert all(part.training for part in model.modules())
    assert not model.second.layer._forward_hooks
    torch.testing.assert_close(model(x), inserted(model.second.layer(model.first(x - 0.5))))
    assert type(model.last) is type(model.mean) is torch.Tensor


def test_an_example_of_several_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 5, 1)

        def forward(self, x, shift):
            return self.body(x + shift)

    inserted = attnkern.insert(Two(), "body", ann.ProgressiveAttention, example=(EXAMPLE, torch.ones(1)))
    assert inserted.channels == 5


def test_the_module_goes_where_the_features_are():
    """Packed or offloaded weights do not tell the dtype and device of the features."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return torch.einsum("kc,nchw->nkhw", self.weight.to(x), x)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Packed()).double()
    inserted = attnkern.insert(model, "1", ann.ProgressiveAttention)
    assert inserted.score.weight.dtype == torch.float64
    layer = nn.Conv2d(3, 4, 1).to("meta")
    layer.forward = lambda x: nn.functional.conv2d(x, torch.ones(4, 3, 1, 1))
    inserted = attnkern.insert(nn.Sequential(layer), "0", ann.ProgressiveAttention, example=EXAMPLE)
    assert inserted.score.weight.device.type == "cpu"
    with torch.device("meta"):
        model = small()
    inserted = attnkern.insert(model, "1", ann.ProgressiveAttention)
    assert inserted.score.weight.is_meta


def test_distributed_models_are_refused(monkeypatch):
    class Distributed(nn.Sequential):
        pass

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Distributed)
    for model, layer in ((Distributed(small()), "0.1"), (nn.Sequential(Distributed(nn.Conv2d(3, 4, 1))), "0.0")):
        with pytest.raises(ValueError, match=r"must not be distributed yet, .* got Distributed: insert first"):
            attnkern.insert(model, layer, ann.ProgressiveAttention, example=EXAMPLE)


# --- errors ----------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.body, self.count = nn.Linear(4, 4), count

    def forward(self, x):
        return self.body(x.new_zeros(2, self.count, 4))


WRONG = {
    "no such layer": (lambda: attnkern.insert(small(), "2.5", ann.WindowAttention, example=EXAMPLE),
                      ValueError, "name must be a layer of the model, got '2.5'; its parts: 0, 1, 2, 3"),
    "whole model": (lambda: attnkern.insert(small(), "", ann.WindowAttention), ValueError, "name must be a layer"),
    "vectors": (lambda: attnkern.insert(small(), "2", ann.WindowAttention, example=EXAMPLE),
                ValueError, r"2 must return \(N, C, H, W\), .* or tokens \(N, L, C\), got shape \(1, 200\)"),
    "losses": (lambda: attnkern.insert(small(), "1", ann.BottleneckAttention, example=EXAMPLE),
               TypeError, "must give back the features it takes .*, got BottleneckAttention"),
    "pooled": (lambda: attnkern.insert(small(), "1", ann.AttentionPool, example=EXAMPLE, num_heads=1),
               TypeError, "must give back the features it takes .*, got AttentionPool"),
    "no module": (lambda: attnkern.insert(small(), "1", lambda channels: None, example=EXAMPLE),
                  TypeError, "module must be a class or function that returns a Module, got one that returns None"),
    "options": (lambda: attnkern.insert(small(), "1", nn.Identity(), exampel=EXAMPLE, hidden=(4,)),
                TypeError, "module must be a class or function to take options, got an instance of Identity and the "
                r"options exampel, hidden; did you mean 'example'\?$"),
    "no tensor": (lambda: attnkern.insert(nn.Sequential(nn.LSTM(3, 4)), "0", nn.Identity(), example=torch.ones(2, 3)),
                  TypeError, "name must be a layer that returns a Tensor, got '0', which returns tuple"),
    "no square": (lambda: attnkern.insert(Tokens(35), "body", ann.WindowAttention, example=EXAMPLE),
                  ValueError, "tokens must be a square grid after at most 8 others, got 35 of them"),
    "lazy": (lambda: attnkern.insert(nn.Sequential(nn.LazyConv2d(4, 1)), "0", ann.WindowAttention, example=EXAMPLE),
             ValueError, "model must have run once, got one whose lazy layers have no parameters yet"),
    "another input": (lambda: attnkern.insert(small(), "1", ann.WindowAttention, example=torch.zeros(1, 4, 9, 9)),
                      ValueError, "example must be an input that the model runs on: RuntimeError: .*channels"),
    "layout": (lambda: attnkern.insert(small(), "1", ann.WindowAttention, example=EXAMPLE, layout="CHWN"),
               ValueError, "layout must be 'NCHW', 'NHWC', 'NLC' or None, got 'CHWN'"),
    "no image": (lambda: attnkern.insert(Tokens(35), "body", ann.WindowAttention),
                 ValueError, "example must be given for a model without a Conv2d, got None"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_layer_that_does_not_run():
    model = small()
    model.unused = nn.Conv2d(1, 1, 1)
    model.forward = lambda x: model[0](x)
    with pytest.raises(ValueError, match="name must be a layer that the model runs, got 'unused', which did not"):
        attnkern.insert(model, "unused", ann.WindowAttention, example=EXAMPLE)
