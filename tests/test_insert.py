"""attnkern.insert: attention behind a named layer of torchvision's and timm's networks."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import attnkern
import attnkern.nn as ann

#: build, layer, its channels
TORCHVISION = {
    "resnet": (lambda models: models.resnet18(), "layer3", 256),
    "resnet block": (lambda models: models.resnet18(), "layer3.1", 256),
    "efficientnet": (lambda models: models.efficientnet_b0(), "features.6", 192),
    "mobilenet": (lambda models: models.mobilenet_v3_large(), "features.12", 112),
    "convnext": (lambda models: models.convnext_tiny(), "features.3", 192),
    "vit": (lambda models: models.vit_b_16(), "encoder.layers.encoder_layer_3", 768),
}
TIMM = {
    "resnet": ("resnet18", "layer3", 256),
    "efficientnet": ("efficientnet_b0", "blocks.5", 192),
    "mobilenet": ("mobilenetv3_large_100", "blocks.4", 112),
    "convnext": ("convnext_atto", "stages.2", 160),
    "vit": ("vit_tiny_patch16_224", "blocks.3", 192),
}


def check_inserted(model, layer, channels, module):
    """The network computes with the module, trains it, keeps the keys of the others, and loads what it saves."""
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
    x = torch.randn(2, 3, 224, 224)
    seen = []
    inserted.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    output = model(x)
    ((features, attended),) = seen
    assert attended.shape == features.shape
    assert not torch.equal(attended, features)
    (output.square().mean() + attended.square().mean()).backward()  # some networks start with a head of zeros
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
    on_tokens = attnkern._insert.OnTokens(ann.ProgressiveAttention(6))
    tokens = torch.randn(2, 1 + 16, 6)
    found = on_tokens(tokens)
    assert torch.equal(found[:, 0], tokens[:, 0])
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(found[:, 1:], on_tokens.module(grid).flatten(2).transpose(1, 2))


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
                ValueError, r"2 must return \(N, C, H, W\) or tokens \(N, L, C\), got shape \(1, 200\)"),
    "losses": (lambda: attnkern.insert(small(), "1", ann.BottleneckAttention, example=EXAMPLE),
               TypeError, "must give back the features it takes .*, got BottleneckAttention"),
    "no square": (lambda: attnkern.insert(Tokens(35), "body", ann.WindowAttention, example=EXAMPLE),
                  ValueError, "tokens must be a square grid behind at most 8 others, got 35 of them"),
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
    with pytest.raises(ValueError, match="must run when the model does"):
        attnkern.insert(model, "unused", ann.WindowAttention, example=EXAMPLE)
