"""The three networks: sizes, registry, losses, frozen trunk, attention maps by name."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnkern import models
from attnkern.models import Bottlenecked, bottleneck_loss, create_model, list_models

#: name -> (names of the attention maps, map's share of the image's resolution)
MODELS = {
    "efficientnet_b0_window": (["attention.map"], [32]),
    "vgg_aib_qt": (["attention.map"], [2]),
    "vgg_att2_concat_pc": (["attention10.map", "attention13.map"], [2, 4]),
}
every_model = pytest.mark.parametrize("name", MODELS)


def small(name, num_classes=4, **options):
    if "efficientnet" in name:
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    return create_model(name, num_classes, width=0.125, **options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- registry --------------------------------------------------------------------------------------------------------


def test_list_models():
    assert list_models() == sorted(MODELS)
    assert list_models("vgg*") == ["vgg_aib_qt", "vgg_att2_concat_pc"]
    assert list_models("*window") == ["efficientnet_b0_window"]
    assert list_models("resnet*") == []


def test_unknown_model():
    with pytest.raises(ValueError, match=r"name must be one of 'efficientnet_b0_window', .*, got 'vgg_att2'"):
        create_model("vgg_att2", 10)


def test_registered_by_decorator(monkeypatch):
    monkeypatch.setattr(models.registry, "_MODELS", {})
    models.register_model("linear")(lambda num_classes, bias=True: nn.Linear(3, num_classes, bias))
    assert list_models() == ["linear"]
    assert create_model("linear", 7, bias=False).bias is None


def test_networks_import_without_torchvision():
    code = """
import sys
sys.modules["torchvision"] = None
import attnkern.models as models
models.create_model("vgg_aib_qt", 2, width=0.05)
models.create_model("vgg_att2_concat_pc", 2, width=0.05)
try:
    models.create_model("efficientnet_b0_window", 2)
except ImportError as error:
    assert str(error) == "efficientnet_b0_window needs torchvision: pip install torchvision", error
else:
    raise AssertionError("built without torchvision")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- all three -------------------------------------------------------------------------------------------------------


def test_parameter_counts_at_full_width():
    # IB attention's VGG: 20.04 M and 20.06 M for CIFAR-10 and CIFAR-100.
    assert [round(parameters(create_model("vgg_aib_qt", k)) / 1e6, 2) for k in (10, 100)] == [20.04, 20.06]
    # VGG-att2: fifteen 3x3 convolutions with BatchNorm, Linear to g, two u, two context norms, classifier.
    plan = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 8]
    convs = sum((9 * a + 1) * b + 2 * b for a, b in itertools.pairwise(plan))
    assert parameters(create_model("vgg_att2_concat_pc", 10)) == convs + 513 * 512 + 2 * 512 + 4 * 512 + 1025 * 10


def test_efficientnet_parameter_count():
    torchvision = pytest.importorskip("torchvision")
    original = torchvision.models.efficientnet_b0(weights=None)
    found = create_model("efficientnet_b0_window", 37)
    assert {k: v.shape for k, v in found.features.state_dict().items()} == {
        k: v.shape for k, v in original.features.state_dict().items()
    }
    assert parameters(found) == parameters(original.features) + 554_693 + 1281 * 512 + 513 * 37


@every_model
@pytest.mark.parametrize("size", [(32, 32), (40, 67), (96, 64)])
def test_forward_backward_and_evaluation(name, size):
    model, images, labels = small(name), torch.rand(3, 3, *size), torch.tensor([0, 3, 1])
    loss = model.loss(model(images), labels)
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, 4)
        torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("size", [32, 64])
def test_trains_on_a_batch_of_one(name, size):
    model = small(name)
    loss = model.loss(model(torch.rand(1, 3, size, size)), torch.tensor([2]))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


@every_model
def test_other_image_channels(name):
    assert small(name, in_chans=1).eval()(torch.rand(2, 1, 32, 32)).shape == (2, 4)


@every_model
def test_attention_maps_by_module_name(name):
    model, images = small(name).eval(), torch.rand(2, 3, 64, 96)
    seen = {}
    with torch.no_grad():
        before = model(images)
        for key in MODELS[name][0]:
            model.get_submodule(key).register_forward_hook(lambda _m, _i, map, key=key: seen.__setitem__(key, map))
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
        for key, step in zip(*MODELS[name], strict=True):
            assert seen[key].shape == (2, 64 // step, 96 // step)
            handle = model.get_submodule(key).register_forward_hook(lambda _m, _i, map: map * 0)
            assert not torch.equal(model(images), before)
            handle.remove()


@pytest.mark.parametrize(
    "name, published",
    [("vgg_att2_concat_pc", [0.3] + [0.4] * 7 + [0.4] * 2 + [0.5] + [0.5] * 2), ("efficientnet_b0_window", [0.2])],
)
def test_dropout_is_a_multiplier_of_the_published_rates(name, published):
    for multiplier in (0.0, 0.5, 1.0):
        model = small(name, dropout=multiplier)
        rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
        assert rates == pytest.approx([multiplier * rate for rate in published])
        if name == "efficientnet_b0_window":
            depths = [module.p for module in model.modules() if type(module).__name__ == "StochasticDepth"]
            assert depths == pytest.approx([multiplier * 0.2 * block / 16 for block in range(16)])


@every_model
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 31, 32), (3, 32, 32)])
def test_wrong_images(name, shape):
    expected = r"x must be \(N, 3, H, W\) with H and W of at least 32, got shape"
    with pytest.raises(ValueError, match=expected):
        small(name)(torch.rand(shape))


@every_model
@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ({"in_chans": "rgb"}, TypeError, "in_chans must be an integer, got 'rgb'"),
        ({"width": 0.0}, ValueError, "width must be positive, got 0.0"),
    ],
)
def test_wrong_options(name, options, kind, message):
    with pytest.raises(kind, match=message):
        create_model(name, **({"num_classes": 4} | options))


def test_wrong_options_of_one_network():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        create_model("vgg_aib_qt", 4, samples=(4, 0))
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="weights need width=1 and in_chans=3, got width=1"):
        create_model("efficientnet_b0_window", 4, in_chans=1, weights="DEFAULT")


# --- vgg_att2_concat_pc ----------------------------------------------------------------------------------------------


def test_trunk_is_frozen_and_not_run():
    model = small("vgg_att2_concat_pc")
    calls = []
    model.trunk.register_forward_hook(lambda *_: calls.append("run"))
    before = {key: value.clone() for key, value in model.trunk.state_dict().items()}
    assert before
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model.loss(model(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert calls == []
    for key, value in model.trunk.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_global_branch_runs_on_zero_gradients_and_changes_nothing():
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    frozen = small("vgg_att2_concat_pc", dropout=0.0)
    whole = small("vgg_att2_concat_pc", dropout=0.0, global_branch=True)
    whole.load_state_dict(frozen.state_dict())
    for model in (frozen, whole):
        model.loss(model(images), labels).backward()
    torch.testing.assert_close(frozen(images), whole(images), rtol=0, atol=0)
    assert all(parameter.grad.count_nonzero() == 0 for parameter in whole.trunk.parameters())
    for (key, a), b in zip(frozen.named_parameters(), whole.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=key)


# --- vgg_aib_qt ------------------------------------------------------------------------------------------------------


def _output():
    generator = torch.Generator().manual_seed(0)
    logits, mean = (torch.randn(3, k, generator=generator, dtype=torch.float64) for k in (4, 5))
    std = torch.rand(3, 5, generator=generator, dtype=torch.float64) + 0.05
    return Bottlenecked(
        logits, mean, std, torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    )


@pytest.mark.parametrize("variant", ["correct", "reference"])
def test_loss_by_hand(variant):
    output, labels = _output(), torch.tensor([3, 0, 1])
    nll = -sum(math.log(output.logits[i].softmax(0)[label]) for i, label in enumerate(labels)) / 3
    scale = output.std if variant == "correct" else output.std.exp()
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(output.mean, scale), prior).sum().item() / 3
    found = bottleneck_loss(output, labels, beta=0.02, anchor_weight=0.5, commitment_weight=0.25, variant=variant)
    assert found.item() == pytest.approx((nll + 0.02 * kl) / math.log(2) + 0.5 * 0.3 + 0.25 * 0.2, rel=1e-12)
    default = bottleneck_loss(output, labels, variant=variant)
    assert default.item() == pytest.approx((nll + 0.005 * kl) / math.log(2) + 0.4 * 0.3 + 0.1 * 0.2, rel=1e-12)


def test_network_uses_its_variant():
    output, labels = _output(), torch.tensor([3, 0, 1])
    losses = [small("vgg_aib_qt", variant=variant).loss(output, labels) for variant in ("correct", "reference")]
    assert losses == [bottleneck_loss(output, labels, variant=variant) for variant in ("correct", "reference")]
    assert losses[0] != losses[1]


def test_unknown_variant():
    message = "variant must be 'correct' or 'reference', got 'wrong'"
    with pytest.raises(ValueError, match=message):
        create_model("vgg_aib_qt", 10, variant="wrong")
    with pytest.raises(ValueError, match=message):
        bottleneck_loss(_output(), torch.tensor([0, 0, 0]), variant="wrong")


def test_evaluation_averages_samples():
    model, images = small("vgg_aib_qt", samples=(2, 3)).eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(1)
        found = model(images)
        assert not torch.equal(model(images), found)
        torch.manual_seed(1)
        features, logits = model.features(images), []
        for _ in range(2):
            mean, raw = model.encoder(model.attention(features, sample=True).output).chunk(2, 1)
            for _ in range(3):
                logits.append(model.decoder(mean + F.softplus(raw - 5) * torch.randn_like(mean)))
        torch.testing.assert_close(found, sum(logits) / 6)


def test_counts_of_the_anchors():
    model = small("vgg_aib_qt", num_anchors=7)
    model(torch.rand(2, 3, 32, 32))
    assert model.attention.quantizer.counts.sum() == 2 * 16 * 16
    assert model.attention.quantizer.anchors.shape == (7,)
    assert not any("counts" in key for key in model.state_dict())


# --- efficientnet_b0_window ------------------------------------------------------------------------------------------


def test_window_stands_after_the_last_block():
    model = small("efficientnet_b0_window").eval()
    seen = []
    model.features[7].register_forward_hook(lambda _m, _i, output: seen.append(output))
    model.features[8].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.rand(1, 3, 96, 96))
        torch.testing.assert_close(seen[1], model.attention(seen[0]))
    assert sum(len(stage) for stage in model.features[1:8]) == 16


def test_weights_from_a_file(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(1)
    original = torchvision.models.efficientnet_b0(weights=None)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    model = create_model("efficientnet_b0_window", 5, weights=tmp_path / "weights.pth")
    for key, value in model.features.state_dict().items():
        assert torch.equal(value, original.features.state_dict()[key]), key


def test_unknown_weights():
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"weights must be None, 'IMAGENET1K_V1', .* or a file, got 'nowhere\.pth'"):
        create_model("efficientnet_b0_window", 5, weights="nowhere.pth")


@pytest.mark.parametrize("name", ["vgg_att2_concat_pc", "vgg_aib_qt", "efficientnet_b0_window"])
def test_loss_of_an_evaluation(name):
    model = create_model(name, 4, **({"width": 0.125} if name.startswith("vgg") else {})).eval()
    with torch.no_grad():
        assert model.loss(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 3])).isfinite()
