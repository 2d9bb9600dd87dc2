"""Weights from files: published checkpoints, prefixes of wrappers, invalid files."""

import argparse
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnkern import cli
from attnkern.models import create_model
from attnkern.models.weights import save_state

WIDTH = 1 / 32


def small(name, num_classes=4, **options):
    return create_model(name, num_classes, **({"width": WIDTH} | options))


# --- published checkpoints -------------------------------------------------------------------------------------------
# Stand-ins: the published implementations' modules under their names, small, and their forward passes without noise.


class ConvBlock(nn.Module):
    def __init__(self, inputs, outputs, convs, pool=False):
        super().__init__()
        layers = []
        for _ in range(convs):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
            inputs = outputs
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        activated = self.bn1(x).relu()
        out = self.conv2(self.bn2(self.conv1(activated)).relu())
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class NetworkBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.layer = nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))

    def forward(self, x):
        return self.layer(x)


class Quantizer(nn.Module):
    def __init__(self, anchors):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 1, anchors)[None])


class Bottlenecked(nn.Module):
    """The bottleneck authors' networks: modules by their names; ``stem`` is what computes the features."""

    def __init__(self, stem, anchors=None, **modules):
        super().__init__()
        self.stem = stem
        for name, module in modules.items():
            setattr(self, name, module)
        self.att_module_std = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
        if anchors:
            self.emb = Quantizer(anchors)

    def forward(self, x):
        for name in self.stem:
            x = self.get_submodule(name)(x)
        a = self.att_module_mu(x)
        if hasattr(self, "emb"):
            anchors = self.emb.weight[0]
            a = anchors[(a[..., None] - anchors).abs().argmin(-1)]
        statistics = self.encode(x + x * a)
        return self.decode(statistics[:, : statistics.shape[1] // 2])


def cifar_vgg(anchors):
    blocks = [ConvBlock(3, 2, 2), ConvBlock(2, 4, 2), ConvBlock(4, 8, 3), nn.MaxPool2d(2)]
    encode = [
        ConvBlock(8, 16, 3), nn.MaxPool2d(2), ConvBlock(16, 16, 3), nn.MaxPool2d(2), ConvBlock(16, 16, 2, pool=True),
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16),
    ]  # fmt: skip
    return Bottlenecked(
        ["features"],
        anchors,
        features=nn.Sequential(*blocks),
        encode=nn.Sequential(*encode),
        att_module_mu=nn.Sequential(nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid()),
        decode=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
    )


def cifar_wrn(anchors):
    parts = {
        "conv1": nn.Conv2d(3, 1, 3, padding=1, bias=False), "block1": NetworkBlock(1, 5, 1),
        "block2": NetworkBlock(5, 10, 2), "block3": NetworkBlock(10, 20, 2), "bn1": nn.BatchNorm2d(20),
        "att_block3": NetworkBlock(10, 20, 1), "bn_att": nn.BatchNorm2d(20),
        "att_conv": nn.Conv2d(20, 4, 1, bias=False), "bn_att2": nn.BatchNorm2d(4),
        "att_conv3": nn.Conv2d(4, 1, 3, padding=1, bias=False), "bn_att3": nn.BatchNorm2d(1),
    }  # fmt: skip
    head = ["att_block3", "bn_att", "att_conv", "bn_att2", nn.ReLU(), "att_conv3", "bn_att3", nn.Sigmoid()]
    encode = ["block3", "bn1", nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 32)]
    return Bottlenecked(
        ["conv1", "block1", "block2"],
        anchors,
        **parts,
        encode=nn.Sequential(*(parts[layer] if isinstance(layer, str) else layer for layer in encode)),
        att_module_mu=nn.Sequential(*(parts[layer] if isinstance(layer, str) else layer for layer in head)),
        decode=nn.Sequential(nn.ReLU(), nn.Linear(16, 4)),
    )


def cub_vgg(anchors):
    vgg = pytest.importorskip("torchvision").models.vgg
    plan = [c if c == "M" else c // 32 for c in vgg.cfgs["D"]]
    hidden = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())] if anchors else []
    return Bottlenecked(
        ["features"],
        anchors,
        features=vgg.make_layers(plan)[:-1],
        encode=nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 16)),
        att_module_mu=nn.Sequential(*hidden, nn.Conv2d(16, 1, 3, padding=1), nn.Sigmoid()),
        decode=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
    )


def cub_wrn(anchors):
    resnet = pytest.importorskip("torchvision").models.resnet
    net = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3], width_per_group=4)
    own = copy.deepcopy(net.layer4)
    for module in own.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    stem = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"]
    return Bottlenecked(
        stem,
        anchors,
        **{name: net.get_submodule(name) for name in [*stem, "layer4"]},
        tmp_layer=nn.Sequential(nn.Conv2d(2, 2, 1)),
        att_layer4=own,
        encode=nn.Sequential(net.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 16)),
        att_module_mu=nn.Sequential(own, nn.Conv2d(2048, 1, 3, padding=1), nn.Sigmoid()),
        decode=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
    )


class AttnVgg(nn.Module):
    """SaoYan's, with a u of ``attn1.op`` and the like, and the global vector that the softmax cancels."""

    def __init__(self, before):
        super().__init__()
        self.before = before
        for index, (inputs, outputs, convs) in enumerate(((3, 2, 2), (2, 4, 2), (4, 8, 3), (8, 16, 3), (16, 16, 3))):
            self.add_module(f"conv_block{index + 1}", ConvBlock(inputs, outputs, convs))
        self.conv_block6, self.dense = ConvBlock(16, 16, 2, pool=True), nn.Conv2d(16, 16, 1)
        self.projector = nn.ModuleDict({"op": nn.Conv2d(8, 16, 1, bias=False)})
        for index in range(3):
            self.add_module(f"attn{index + 1}", nn.ModuleDict({"op": nn.Conv2d(16, 1, 1, bias=False)}))
        self.classify = nn.Linear(48, 4)

    def forward(self, x):
        x, maps = self.conv_block2(self.conv_block1(x)), []
        for block in (self.conv_block3, self.conv_block4, self.conv_block5):
            x = block(x)
            maps.append(x if self.before else F.max_pool2d(x, 2))
            x = F.max_pool2d(x, 2)
        g, vectors = self.dense(self.conv_block6(x)), []
        maps[0] = self.projector["op"](maps[0])
        for local, attn in zip(maps, (self.attn1, self.attn2, self.attn3), strict=True):
            weight = attn["op"](local + g).flatten(2).softmax(2)
            vectors.append((weight * local.flatten(2)).sum(2))
        return self.classify(torch.cat(vectors, 1))


def wrapped(state):
    return {f"module.{key}": value for key, value in state.items()}


def cifar_file(state):
    args = argparse.Namespace(lr=0.1, env_name="vgg_va_cifar10", epoch_step=[60, 120])
    return {"epoch": 200, "args": args, "model_states": {"net": wrapped(state)}, "optim_states": {}, "test_acc": 95.7}


def cub_file(state):
    average = {key: value + 1 for key, value in state.items()}
    return {"args": argparse.Namespace(K=256), "model_states": {"net": state, "net_ema": average}, "history": {}}


def wrn_file(state):
    return {"epoch": 200, "state_dict": wrapped(state), "amp": {"loss_scaler0": {"loss_scale": 65536.0}}}


#: The stand-in, its file, what the file is said to be, and options of the network here.
PUBLISHED = {
    "vgg_aib": (lambda: cifar_vgg(None), cifar_file, "VGG-aib of the bottleneck paper's authors (CIFAR)", {}),
    "vgg_aib_qt": (lambda: cifar_vgg(7), cifar_file, "VGG-aib of", {"num_anchors": 7}),
    "wrn28_10_aib": (lambda: cifar_wrn(None), wrn_file, "WRN-aib of the bottleneck paper's authors (CIFAR)",
                     {"blocks": 2}),
    "wrn28_10_aib_qt": (lambda: cifar_wrn(7), wrn_file, "WRN-aib of", {"num_anchors": 7, "blocks": 2}),
    "vgg16_aib": (lambda: cub_vgg(None), cub_file, "VGG-aib of the bottleneck paper's authors (CUB)", {}),
    "vgg16_aib_qt": (lambda: cub_vgg(7), cub_file, "VGG-aib of", {"num_anchors": 7}),
    "wrn50_2_aib_qt": (lambda: cub_wrn(7), cub_file, "WRN-aib of the bottleneck paper's authors (CUB)",
                       {"num_anchors": 7}),
    "attn_vgg_before": (lambda: AttnVgg(True), wrapped, "SaoYan's AttnVGG", {}),
    "attn_vgg_after": (lambda: AttnVgg(False), wrapped, "SaoYan's AttnVGG", {}),
}  # fmt: skip


def published(name, path):
    """A stand-in with weights that no layer ignores, in float64, and its file at ``path``."""
    torch.manual_seed(0)
    build, form, _, _ = PUBLISHED[name]
    theirs = build()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.bias, -0.5)):
                nn.init.uniform_(tensor, low, low + 1)
    theirs = theirs.double().eval()
    torch.save(form(theirs.state_dict()), path)
    return theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_give_the_published_logits(name, tmp_path):
    theirs, (_, _, layout, options) = published(name, tmp_path / "best.tar"), PUBLISHED[name]
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.warns(UserWarning, match=r"best\.tar' was read as ") as caught:
            ours = small(name, pretrained=tmp_path / "best.tar", **options).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    message = str(caught[0].message)
    assert layout in message
    assert "entries were renamed" in message
    assert caught[0].filename == __file__
    images = torch.rand(2, 3, 96 if "16" in name or "50" in name else 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)


def test_published_checkpoint_for_other_classes(tmp_path):
    theirs = published("vgg_aib", tmp_path / "best.tar")
    expected = "; not loaded, because the number of classes differs: classifier.weight, classifier.bias$"
    with pytest.warns(UserWarning, match=expected):
        ours = small("vgg_aib", 9, pretrained=tmp_path / "best.tar")
    assert torch.equal(ours.encoder[32].weight.double(), theirs.encode[8].weight.float().double())
    assert ours.classifier.out_features == 9


def test_published_checkpoint_of_another_network(tmp_path):
    published("vgg_aib_qt", tmp_path / "best.tar")
    expected = (
        r"holds weights of another network than VggBottleneck: 1 entries differ, 'attention\.quantizer\.anchors' with "
        r"shape \(7,\) instead of \(20,\) among them; it was read as VGG-aib of .* \(CIFAR\), for "
        r'create_model\("vgg_aib_qt", 4, num_anchors=7\)'
    )
    with pytest.raises(ValueError, match=expected):
        small("vgg_aib_qt", pretrained=tmp_path / "best.tar")
    torch.save(AttnVgg(True).state_dict(), tmp_path / "net.pth")
    expected = r'for create_model\("attn_vgg_before", 4\) or create_model\("attn_vgg_after", 4\)'
    with pytest.raises(ValueError, match=expected):
        small("vgg_att3_concat_pc", pretrained=tmp_path / "net.pth")


def test_own_files_are_loaded_without_a_warning(tmp_path):
    torch.save(small("vgg_aib").state_dict(), tmp_path / "own.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small("vgg_aib", pretrained=tmp_path / "own.pth")


def test_convert_shows_the_names_and_writes_the_weights(tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors")
    published("vgg16_aib", tmp_path / "best.tar")
    # The command builds the network at full width, where the stand-in is small.
    build = create_model
    monkeypatch.setattr("attnkern.models.create_model", lambda *args, **options: build(*args, width=WIDTH, **options))
    for out in ("weights.pth", "weights.safetensors", "average.pth"):
        average = ["--average"] if out == "average.pth" else []
        assert cli.main(["convert", str(tmp_path / "best.tar"), "--out", str(tmp_path / out), *average]) == 0
        shown = capsys.readouterr().out
        assert "VGG-aib of the bottleneck paper's authors (CUB)" in shown
        assert 'create_model("vgg16_aib", 4)' in shown
        assert "decode.2.* classifier.* 2 entries" in " ".join(shown.split())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [small("vgg16_aib", pretrained=tmp_path / f).state_dict() for f in ("weights.pth", "average.pth")]
        other = small("vgg16_aib", pretrained=tmp_path / "weights.safetensors").state_dict()
    for key, value in found[0].items():
        assert torch.equal(value, other[key]), key
        torch.testing.assert_close(found[1][key], value + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "average.pth", "best.tar", "weights.pth", "weights.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name, writer", [("a.pth", "torch.save"), ("a.safetensors", "safetensors.torch.save_file")])
def test_a_failed_write_leaves_the_folder_as_it_was(name, writer, tmp_path, monkeypatch):
    pytest.importorskip("safetensors.torch")

    def fails(_state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr(writer, fails)
    with pytest.raises(OSError, match="No space left"):
        save_state({"weight": torch.ones(2)}, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"before"


def test_convert_of_other_files(tmp_path, capsys):
    torch.save(small("vgg").state_dict(), tmp_path / "own.pth")
    published("vgg_aib", tmp_path / "best.tar")
    for arguments, expected in (
        (["own.pth"], "does not have the weight names of a known published implementation"),
        (["best.tar", "--average"], "holds no average of the weights (net_ema)"),
        (["nowhere.pth"], "there is no file"),
        (["best.tar"], "with shape (2, 3, 3, 3) instead of (64, 3, 3, 3)"),  # the stand-in is small
    ):
        assert cli.main(["convert", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("attnkern: convert: checkpoint: ")
        assert expected in shown.err


# --- wrappers --------------------------------------------------------------------------------------------------------


def compiled_part(network):
    network.local7 = torch.compile(network.local7)
    return network


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda network: nn.DataParallel(torch.compile(network)),
        lambda network: torch.compile(nn.DataParallel(network)),
        compiled_part,
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["DataParallel", "compile", "compiled in DataParallel", "DataParallel compiled", "a part compiled", "average"],
)
@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
def test_prefixes_of_wrappers_are_removed(wrap, holder, tmp_path):
    network = small("vgg_att2_concat_pc")
    plain = {key: value.clone() for key, value in network.state_dict().items()}
    state = wrap(network).state_dict()
    assert state.keys() != plain.keys()
    torch.save({holder: state, "optimizer": {}, "epoch": 3} if holder else state, tmp_path / "w.pth")
    for key, value in small("vgg_att2_concat_pc", pretrained=tmp_path / "w.pth").state_dict().items():
        assert torch.equal(value, plain[key]), key


# --- files that are no weights ---------------------------------------------------------------------------------------


class Options:
    """An object that a checkpoint must not load."""


def damage(kind, path):
    network = small("vgg_gap")
    if kind == "cut short":
        torch.save(network.state_dict(), path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "cut short, old format":
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "LFS":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    elif kind == "module":
        torch.save(network, path)
    elif kind == "class":
        torch.save({"model_states": {"net": network.state_dict()}, "args": Options()}, path)
    elif kind == "class in Namespace":
        torch.save({"model_states": {"net": network.state_dict()}, "args": argparse.Namespace(inner=Options())}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Options()))
    elif kind == "page":
        path.write_text("<!DOCTYPE html><html>", encoding="utf-8")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    elif kind == "nothing":
        torch.save({}, path)
    elif kind == "options alone":
        torch.save({"args": argparse.Namespace(lr=0.1)}, path)


DAMAGED = "is damaged, cut short, or not a file of weights written by PyTorch or safetensors$"
FAULTS = {
    "cut short": DAMAGED,
    "cut short, old format": DAMAGED,
    "page": DAMAGED,
    "empty": DAMAGED,
    "pickle": DAMAGED,
    "LFS": "is a Git LFS pointer instead of weights: run 'git lfs pull'",
    "module": r"holds an object of attnkern\.models\.\w+\.VggGap, not weights alone, .* save the state_dict where",
    "class": r"holds an object of \S*\.Options, not weights alone",
    "class in Namespace": r"holds an object of \S*\.Options, not weights alone",
    "TorchScript": "is a TorchScript archive: save the module's state_dict instead",
    "nothing": "holds no state_dict",
    "options alone": "holds no state_dict",
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:'torch.load' received a zip file")
@pytest.mark.parametrize("kind", FAULTS)
def test_files_that_are_no_weights(kind, tmp_path):
    path = tmp_path / "w.pth"
    damage(kind, path)
    with pytest.raises(ValueError, match=FAULTS[kind]) as caught:
        small("vgg_gap", pretrained=path)
    message = str(caught.value)
    assert message.startswith(f"create_model: pretrained: '{path}' ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    # Only the one class was allowed, and only for that file.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("content", [b"abc", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 20])
def test_broken_safetensors(content, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors' (is damaged, cut short|holds no state_dict)"):
        small("vgg_gap", pretrained=path)


def test_safetensors_under_another_name(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    network = small("vgg_gap")
    safetensors.save_file(network.state_dict(), tmp_path / "w.bin")
    state = small("vgg_gap", pretrained=tmp_path / "w.bin").state_dict()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_damaged_weights_of_a_backbone(tmp_path):
    pytest.importorskip("torchvision")
    damage("cut short", tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"^ImageNetBottleneck: weights: '.*w\.pth' {DAMAGED}"):
        create_model("vgg16_aib", 4, weights=tmp_path / "w.pth")
