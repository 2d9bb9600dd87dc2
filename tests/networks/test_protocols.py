"""``attnkern evaluate`` and ``attnkern show`` on small trained networks."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("captum")

from PIL import Image

from attnkern import cli
from attnkern.evaluation import box_masks, fitting_rate, protocols, rectangle_mask, tight_boxes, upsample
from attnkern.evaluation import summary as summary_module
from attnkern.evaluation.maps import map_of
from attnkern.nn import AnchorQuantizer
from attnkern.training.data import ImageData
from attnkern.training.show import Explained, draw, explain, read_image, summary
from attnkern.training.train import load_run, train

SMALL = [
    "--data.count", "64", "--data.batch_size", "16", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
    "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
#: Recipe: what its network has.
RUNS = {
    "vgg": set(),
    "vgg_att2_concat_dp": {"query"},
    "vgg_aib_qt": {"anchors"},
    "mobilenet_v3_large_window": {"rectangles", "rates", "equivariance"},
}
ONLY_SOME = {"query", "anchors", "rectangles", "rates", "equivariance"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name in RUNS:
        size = ["--data.size", "64"] if "mobilenet" in name else ["--model.options.width", "0.0625"]
        train(name, "digits-clutter", [*SMALL, *size, "--out", str(folder / name)])
        found[name] = folder / name / "last.ckpt"
    return found


def subject(checkpoint, **options):
    run = load_run(checkpoint)
    images = ImageData(**run.data)
    images.setup()
    return protocols.Subject(run.network, images, run.normalise, **options)


def oriented(checkpoint):
    """The orientation of the map that is evaluated, or none for Grad-CAM."""
    entries = json.loads(checkpoint.with_name("result.json").read_text(encoding="utf-8"))["orientations"]
    return [entries[name] for name in (map_of(load_run(checkpoint).network)[0],) if name in entries]


@pytest.mark.parametrize("name", RUNS)
def test_every_protocol_says_numbers_or_why_not(name, checkpoints, tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(checkpoints[name]), "--limit", "60", "--out", str(out), "--device", "cpu"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["protocols"]) == set(protocols.PROTOCOLS)
    missing = {key for key, value in result["protocols"].items() if "not applicable" in value}
    assert missing == ONLY_SOME - RUNS[name] | {"transfer"} | ({"crossdomain", "orientation"} & missing)
    assert ("orientation" in missing) == all(found["sign"] == 0 for found in oriented(checkpoints[name]))
    assert (result["network"], result["images"], result["seed"]) == (name, 60, 0)
    assert result["data"]["name"] == "digits-clutter"
    table, (omitted, details) = printed.splitlines()[:-2], printed.splitlines()[-2:]
    assert [line.split()[0] for line in table] == ["protocol", *(n for n in protocols.PROTOCOLS if n not in missing)]
    assert omitted == f"not applicable: {', '.join(n for n in protocols.PROTOCOLS if n in missing)}"
    assert details == f"details: {out}"
    assert f"accuracy {result['protocols']['top1']['accuracy']:.3f}" in printed
    assert f"rate {result['protocols']['fooling']['rates'][3]:.3f}" in printed
    # The same once more: nothing depends on what was drawn before.
    again = tmp_path / "again.json"
    assert cli.main([*arguments[:-4], "--out", str(again), "--device", "cpu"]) == 0
    assert json.loads(again.read_text(encoding="utf-8")) == result


def test_numbers_of_the_protocols_are_those_of_the_functions(checkpoints):
    whole = subject(checkpoints["vgg_att2_concat_dp"])
    results = protocols.evaluate(whole, ["top1", "localisation", "query"])
    with torch.no_grad():
        logits, maps = whole.predict(whole.normalise(whole.raw))
    right = (logits.argmax(1) == whole.labels).double().mean().item()
    assert results["top1"]["accuracy"] == pytest.approx(right)
    boxes, _ = whole.located
    inside = 0
    for map, box in zip(upsample(maps, (32, 32)), boxes, strict=True):
        row, column = divmod(map.argmax().item(), 32)
        inside += box[0] <= row <= box[2] and box[1] <= column <= box[3]
    assert results["localisation"]["pointing"] == pytest.approx(inside / len(boxes))
    assert results["localisation"]["images"] == 359
    assert len(tight_boxes(maps)) == 359
    # Under the dot product the query matters.
    assert results["query"]["attention13"]["mean change"] > 0


def test_transfer_to_other_classes(checkpoints):
    """As CIFAR-10's networks on STL-10: shared names count, and what the network cannot know is wrong."""
    whole = subject(checkpoints["vgg"], class_names=["car", *map(str, range(1, 8)), "frog", "9"])
    results = protocols.evaluate(whole, ["top1", "transfer", "localisation"])
    assert "not those of digits-clutter" in results["top1"]["not applicable"]
    with torch.no_grad():
        chosen = whole.network(whole.normalise(whole.raw)).argmax(1)
    known = (whole.labels != 0) & (whole.labels != 8)
    right = ((chosen == whole.labels) & known).sum().item()
    assert results["transfer"]["accuracy"] == pytest.approx(right / 359)
    assert results["transfer"]["accuracy_shared"] == pytest.approx(right / known.sum().item())
    assert results["localisation"]["images"] == 359
    strangers = subject(checkpoints["vgg"], class_names=[f"c{i}" for i in range(10)])
    assert "share a class" in protocols.evaluate(strangers, ["transfer"])["transfer"]["not applicable"]


def test_small_classes_are_named(checkpoints):
    few = subject(checkpoints["vgg"], limit=20)
    few.images.class_names[1] = "o_$ne$"
    reason = protocols.evaluate(few, ["crossdomain"])["crossdomain"]["not applicable"]
    assert reason == (
        "five folds need at least five images of each class, got fewer of '0', 'o_$ne$', '2', '3', '4' and 5 more"
    )


def test_a_limit_draws_from_all_classes(checkpoints):
    labels = [0] * 60 + [1] * 30 + [2] * 9 + [3]
    found = protocols.stratified(labels, 20, seed=1)
    assert found == protocols.stratified(labels, 20, seed=1) == protocols.stratified(labels, 50, seed=1)[:20]
    assert found != protocols.stratified(labels, 20, seed=2)
    # One of each class first, then in proportion: 12, 6 and 2 of 20, one more or less.
    assert {labels[index] for index in found[:4]} == {0, 1, 2, 3}
    counts = [sum(labels[index] == label for index in found) for label in range(4)]
    assert all(abs(count - expected) <= 1 for count, expected in zip(counts, (12, 6, 2, 1), strict=True))
    assert sorted(protocols.stratified(labels, 1000)) == list(range(100))
    few = subject(checkpoints["vgg"], limit=20)
    assert few.labels.bincount().tolist() == [2] * 10
    boxes, masks = few.located
    inside = torch.stack([mask.nonzero().amin(0) for mask in masks])
    assert torch.equal(inside, boxes[:, :2].long())  # the same images, in the same order


def test_a_failing_protocol_does_not_end_the_others(checkpoints, tmp_path, capsys, monkeypatch):
    def fails(subject):
        raise torch.OutOfMemoryError("out of memory\nand more")

    chosen = {"fooling": fails, "top1": protocols.PROTOCOLS["top1"], "anchors": protocols.PROTOCOLS["anchors"]}
    monkeypatch.setattr(protocols, "PROTOCOLS", chosen)
    out = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(checkpoints["vgg"]), "--limit", "20", "--out", str(out), "--device", "cpu"]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["fooling", "failed", "OutOfMemoryError:", "out", "of", "memory"]
    assert printed[2].split()[:2] == ["top1", "accuracy"]
    assert printed[3:] == ["not applicable: anchors", f"details: {out}"]
    result = json.loads(out.read_text(encoding="utf-8"))["protocols"]
    assert result["fooling"]["error"] == "OutOfMemoryError: out of memory\nand more"
    assert "in fails" in result["fooling"]["traceback"]
    assert 0 <= result["top1"]["accuracy"] <= 1


def test_the_summary_shows_classes_of_any_name():
    """Segmentation has a result for each class, whatever its name."""
    classes = {name: {"jaccard": share} for name, share in (("error", 0.25), ("not applicable", 0.75))}
    results = {"segmentation": classes}
    assert summary_module.failures(results) == []
    assert summary_module.summary(results).splitlines()[1].split()[:3] == ["segmentation", "IoU", "0.500"]


def test_every_protocol_has_a_headline():
    assert summary_module._HEADLINES.keys() == protocols.PROTOCOLS.keys()


def test_anchors_are_counted(checkpoints):
    found = protocols.evaluate(subject(checkpoints["vgg_aib_qt"], limit=50), ["anchors"])["anchors"]
    entry = found["attention.quantizer"]
    assert len(entry["values"]) == entry["used"] + sum(share == 0 for share in entry["frequencies"]) == 20
    assert sum(entry["frequencies"]) == pytest.approx(1)
    assert 1 <= entry["perplexity"] <= 20


def test_anchors_are_counted_on_the_quantized_maps():
    """Each quantizer has its own map, whatever map the other protocols use."""

    class Quantized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.not_run = AnchorQuantizer(2), AnchorQuantizer(5), AnchorQuantizer(3)
            self.features = torch.nn.Identity()
            self.eval()

        def forward(self, images):
            pixels = self.features(images).mean(1)
            self.first(pixels)
            return self.second(1 - pixels).values.flatten(1)

    network, pixels = Quantized(), torch.tensor([0.1, 0.3, 0.9, 0.2, 0.0, 0.6])
    for batch_size, name in ((2, None), (1, "first.map"), (1, "features")):
        common = {"raw": pixels.view(3, 1, 1, 2), "normalise": lambda raw: raw, "device": torch.device("cpu")}
        found = protocols._anchors(SimpleNamespace(network=network, batch_size=batch_size, map_name=name, **common))
        assert list(found) == ["first", "second"]
        assert found["first"]["frequencies"] == pytest.approx([4 / 6, 2 / 6])
        # 1 - pixels: 0.9, 0.7, 0.1, 0.8, 1, 0.4
        assert found["second"]["frequencies"] == pytest.approx([1 / 6, 0, 1 / 6, 2 / 6, 2 / 6])


def test_limits_and_batch_sizes_are_checked():
    with pytest.raises(ValueError, match=r"^stratified: limit must be at least 1, got -1$"):
        protocols.stratified([0, 1, 1], -1)
    for options in ({"limit": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"^Subject: (limit|batch_size) must be at least 1, got 0$"):
            protocols.Subject(None, None, None, **options)


def test_one_protocol_or_all_of_them(monkeypatch):
    monkeypatch.setattr(protocols, "PROTOCOLS", {"top1": lambda _: {"a": 1}, "anchors": lambda _: {"b": 2}})
    assert protocols.evaluate(None, "top1") == {"top1": {"a": 1}}
    assert protocols.evaluate(None, "all") == protocols.evaluate(None, ["top1", "all"])
    assert list(protocols.evaluate(None, ["all"])) == ["top1", "anchors"]
    with pytest.raises(ValueError, match="protocol must be one of all, top1, anchors, got 'bogus'"):
        protocols.evaluate(None, ["all", "bogus"])
    with pytest.raises(ValueError, match=r"got 'top2'; did you mean 'top1'"):
        protocols.evaluate(None, "top2")


def test_a_chosen_map(checkpoints, tmp_path):
    out = tmp_path / "one.json"
    arguments = ["evaluate", str(checkpoints["vgg_att2_concat_dp"]), "--protocol", "localisation", "--limit", "20"]
    assert cli.main([*arguments, "--map", "attention13.map", "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["map"] == "attention13.map"
    assert cli.main([*arguments, "--map", "local10", "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["map"] == "Grad-CAM local10"


def test_plain_values(tmp_path):
    assert protocols.plain({1: float("nan"), "a": (1, torch.tensor([2.0]))}) == {"1": None, "a": [1, [2.0]]}
    protocols.write_json(tmp_path / "x.json", {"a": math.inf})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": None}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_show(checkpoints, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "digit.png"
    images = ImageData(size=64)
    images.setup()
    image = images.raw()[0][0]
    Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(picture)
    torch.testing.assert_close(read_image(picture, 64), image, atol=1 / 255, rtol=0)
    for name, checkpoint in checkpoints.items():
        out = tmp_path / f"{name}.png"
        assert cli.main(["show", str(picture), "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
        assert out.exists()
        with Image.open(out) as drawn:
            assert min(drawn.size) > 100
    assert "Grad-CAM" in capsys.readouterr().out.splitlines()[0]
    wide = tmp_path / "wide.png"
    Image.effect_noise((600, 200), 50).save(wide)
    assert explain(checkpoints["vgg"], wide).image.shape == (3, 200, 600)
    assert cli.main(["show", str(wide), "--checkpoint", str(checkpoints["vgg"]), "--out", str(out)]) == 0
    with Image.open(out) as drawn:
        assert drawn.width >= 600  # the picture's own resolution, not the network's
    shown = explain(checkpoints["mobilenet_v3_large_window"], picture)
    assert shown.rectangle.shape == (5,)
    assert shown.map == "attention.map"
    assert explain(checkpoints["vgg_aib_qt"], picture).quantized


def test_several_ellipses_on_two_digits(tmp_path):
    """The union of the windows is compared with the two boxes; every window is drawn."""
    pytest.importorskip("matplotlib")
    windows = ["--model.options.num_windows", "3", "--model.options.shape", "ellipse", "--model.equivariance", "0.1"]
    train("mobilenet_v3_large_window", "digits-pairs", [*SMALL, *windows, "--data.size", "64", "--out", str(tmp_path)])
    found = subject(tmp_path / "last.ckpt", limit=40)
    assert found.class_names == ["odd", "even"]
    boxes, masks = found.located
    assert (boxes.shape, masks.shape) == ((40, 2, 4), (40, 64, 64))
    results = protocols.evaluate(found, ["top1", "localisation", "rectangles", "rates", "equivariance"])
    assert all(not {"not applicable", "error"} & result.keys() for result in results.values()), results
    with torch.no_grad():
        rectangles = found.rectangles_of(found.normalise(found.raw))
    assert rectangles.shape == (40, 3, 5)
    assert results["rectangles"]["window 2"]["row"]["mean"] == pytest.approx(rectangles[:, 2, 0].mean().item())
    assert results["rectangles"]["row"]["mean"] == pytest.approx(rectangles[:, :, 0].mean().item())
    inside = box_masks(boxes, (64, 64))
    caught = upsample(rectangle_mask(rectangles, (2, 2), shape="ellipse").float(), (64, 64)) > 0.5
    assert results["rates"]["fitting"] == pytest.approx(fitting_rate(caught, inside).mean().item())
    picture = tmp_path / "digits.png"
    Image.fromarray((found.raw[0].permute(1, 2, 0) * 255).byte().numpy()).save(picture)
    shown = explain(tmp_path / "last.ckpt", picture)
    assert (shown.rectangle.shape, shown.shape) == ((3, 5), "ellipse")
    (ax,) = draw(shown).axes
    assert [len(patch.get_xy()) for patch in ax.patches] == [65] * 3  # closed outlines
    assert {patch.get_linestyle() for patch in ax.patches} == {"-"}


@pytest.mark.parametrize("least, said", [(0.5, ""), (0.999, ", nearly constant: 0.999 to 1")])
def test_show_says_when_a_map_is_nearly_constant(least, said):
    map = torch.linspace(least, 1, 16).view(4, 4)
    shown = Explained(torch.rand(3, 20, 30), map, None, "attention.map", "three", 0.5, False)
    assert summary(shown) == f"three (50%), attention.map{said}"
    (ax,) = draw(shown).axes
    assert ax.get_xlabel() == said.removeprefix(", ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "nowhere.ckpt"], "there is no file 'nowhere.ckpt'"),
        (["evaluate", "{vgg}", "--device", "abacus"], "device must be a device such as .*, got 'abacus'"),
        (["evaluate", "{text}"], "is not a checkpoint of attnkern train"),
        (["evaluate", "{vgg}", "--protocol", "top2"], "got .top2.; did you mean .top1."),
        (["evaluate", "{vgg}", "--map", "attention.map"], "map must be an attention map .* got 'attention.map'"),
        (["evaluate", "{vgg}", "--data", "imagenet"], "name must be one of .*, got 'imagenet'"),
        (["evaluate", "{vgg}", "--data", "cub", "--root", "nowhere"], "cub: .*nowhere"),
        (["show", "nowhere.png", "--checkpoint", "{vgg}"], "there is no image 'nowhere.png'"),
        (["show", "{text}", "--checkpoint", "{vgg}"], "is not an image that can be read"),
        (["show", "{text}", "--checkpoint", "{text}"], "is not a checkpoint of attnkern train"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, message, checkpoints, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    filled = [each.format(text="text.png", vgg=checkpoints["vgg"]) for each in arguments]
    assert cli.main(filled) == 1
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


def test_map_of_names_its_map(checkpoints):
    network = load_run(checkpoints["vgg"]).network
    assert map_of(network)[0] == "Grad-CAM block4"
    assert map_of(load_run(checkpoints["vgg_att2_concat_dp"]).network)[0] == "attention10.map x attention13.map"
