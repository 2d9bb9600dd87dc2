"""Which values of a map mark the objects: the signed score, and the orientation that a checkpoint keeps."""

import json

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from torch import nn
from torchvision.transforms import v2

from attnkern import cli
from attnkern.evaluation import (
    Orientation,
    box_masks,
    orient,
    orientation,
    pointing_game,
    protocols,
    signed_scores,
    upsample,
)
from attnkern.training.data import ImageData
from attnkern.training.train import load_run, orientations, train

BOXES = torch.tensor([[1, 1, 2, 2], [3, 4, 6, 6], [0, 0, 3, 7]]).float()
SIZE = (8, 8)


def inside():
    return box_masks(BOXES, SIZE).double()


def test_signed_scores_are_correlations():
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack((maps.double().flatten(1), inside().flatten(1)), 1)
    expected = [torch.corrcoef(pair)[0, 1] for pair in pairs]
    torch.testing.assert_close(signed_scores(maps, BOXES, SIZE, batch_size=2), torch.stack(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(signed_scores(-3 * maps + 7, BOXES, SIZE), -torch.stack(expected), rtol=0, atol=1e-6)
    small = maps[:, :4, :4]
    torch.testing.assert_close(signed_scores(small, BOXES, SIZE), signed_scores(upsample(small, SIZE), BOXES, SIZE))


def test_signed_scores_of_constant_maps_and_whole_boxes_are_zero():
    assert signed_scores(torch.full((3, 4, 4), 0.3), BOXES, SIZE).tolist() == [0, 0, 0]
    whole = torch.tensor([[0, 0, 7, 7]]).float()
    assert signed_scores(torch.rand(1, 4, 4), whole, SIZE).tolist() == [0]
    assert signed_scores(torch.zeros(0, 4, 4), torch.zeros(0, 4), SIZE).shape == (0,)


def test_signed_scores_check_the_batch_size():
    with pytest.raises(ValueError, match=r"^signed_scores: batch_size must be at least 1, got 0$"):
        signed_scores(torch.rand(3, 4, 4), BOXES, SIZE, batch_size=0)


def test_signed_scores_of_several_objects_use_all_boxes():
    boxes = torch.tensor([[[0, 0, 1, 1], [5, 5, 7, 7]]]).float()
    assert signed_scores(box_masks(boxes, SIZE).float(), boxes, SIZE).item() == pytest.approx(1)


def test_low_values_that_mark_the_objects_are_found_and_turned():
    maps = (1 - inside()).float() / 10  # low inside the boxes, as a map that never exceeds 0.1
    found = orientation(maps, BOXES, SIZE)
    assert found == (-1, pytest.approx(-1), pytest.approx(0, abs=1e-6), 3)
    assert str(found) == "low values mark the objects (mean correlation -1.000 ± 0.000, 3 images)"
    assert orientation(-maps, BOXES, SIZE).sign == 1
    assert "high values mark" in str(orientation(-maps, BOXES, SIZE))
    assert pointing_game(maps, BOXES, SIZE) == 0
    assert pointing_game(orient(maps, found.sign), BOXES, SIZE) == 1
    assert orient(maps, 1) is maps


def test_the_standard_error_decides():
    """Correlations of 1 and -1: their mean has to exceed twice its error."""
    maps = inside().float().repeat(4, 1, 1)
    maps[:5] *= -1  # of 12 images: mean 1/6, error 0.297
    found = orientation(maps, BOXES.repeat(4, 1), SIZE)
    assert (found.sign, found.images) == (0, 12)
    scores = torch.tensor([-1.0] * 5 + [1.0] * 7)
    assert found.score == pytest.approx(scores.mean().item())
    assert found.error == pytest.approx(scores.std().item() / 12**0.5)
    assert "neither" in str(found)
    maps[2:5] *= -1  # mean 2/3, error 0.225
    assert orientation(maps, BOXES.repeat(4, 1), SIZE).sign == 1
    assert orientation(maps[:1], BOXES[:1], SIZE).sign == 0  # one image has no error
    assert orientation(torch.ones(3, 8, 8), BOXES, SIZE).sign == 0


@pytest.mark.parametrize("sign", [0, 2, None])
def test_an_undecided_orientation_turns_nothing(sign):
    with pytest.raises(ValueError, match="orient: sign must be 1 or -1, got"):
        orient(torch.ones(1, 2, 2), sign)


@pytest.mark.parametrize("function", [signed_scores, orientation])
def test_wrong_arguments(function):
    with pytest.raises(ValueError, match="signed_scores: boxes must be"):
        function(torch.ones(3, 4, 4), BOXES[:2], SIZE)
    with pytest.raises(ValueError, match="signed_scores: maps must be"):
        function(torch.ones(3, 1, 4, 4), BOXES, SIZE)


class Bright(nn.Module):
    """Its map is the brightness, or with ``sign`` -1 the darkness, of the image; digits are its brightest object."""

    def __init__(self, sign=1):
        super().__init__()
        self.sign = sign
        self.map = nn.Identity()

    def forward(self, images):
        self.map(self.sign * images.mean(1))
        return torch.zeros(len(images), 10)


def digits():
    images = ImageData(name="digits-clutter", count=100)
    images.setup()
    return images


@pytest.mark.parametrize("sign", [1, -1])
def test_orientation_comes_from_the_training_images(sign):
    """Training and test images disagree: the orientation is that of the training images, and the test map stays."""
    images = digits()
    test = images.test.part.images.tensors
    images.test.part.images.tensors = (1 - test[0], *test[1:])  # the digit becomes the darkest object
    network = Bright(sign)
    found = orientations(network, images, 80)
    assert found.keys() == {"map"}
    chosen = Orientation(**found["map"])
    assert (chosen.sign, chosen.images) == (sign, 80)
    subject = protocols.Subject(network, images, images.normalisation, orientations={"map": chosen})
    boxes, _ = subject.located
    assert orientation(subject.maps, boxes, (32, 32)).sign == -sign
    results = protocols.evaluate(subject, ["localisation", "orientation"])
    assert results["localisation"]["signed_score"] * sign < -0.2
    turned = results["orientation"]
    assert (turned["sign"], turned["map"]) == (sign, {1: "as it is", -1: "negated"}[sign])
    assert turned["oriented"]["pointing"] == pointing_game(sign * subject.maps, boxes, (32, 32)) < 0.2
    assert results["localisation"]["pointing"] == pointing_game(subject.maps, boxes, (32, 32))


def test_orientation_sees_training_images_without_augmentation():
    images = digits()
    images.train.augment = [v2.Lambda(lambda image: 1 - image)]
    located = images.located("train")
    image, label, box, mask = located[7]
    assert torch.equal(image, images.normalisation(images.train.part[7][0]))
    assert len(located) == 100
    assert label == images.train.part[7][1]
    assert torch.equal(box, torch.cat((mask.nonzero().amin(0), mask.nonzero().amax(0))).float())
    assert orientations(Bright(), images, 100)["map"]["sign"] == 1
    with pytest.raises(ValueError, match=r"ImageData: part must be .test. or .train."):
        images.located("val")


def test_no_boxes_or_no_map_give_no_orientation():
    images = digits()
    assert orientations(nn.Flatten(), images, 10) == {}
    images.train.part.region = None
    assert orientations(Bright(), images, 10) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    options = [
        "--data.count", "320", "--data.batch_size", "16", "--data.size", "32", "--trainer.max_epochs", "1",
        "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1",
        "--trainer.enable_progress_bar", "false", "--out", str(out),
    ]  # fmt: skip
    return train("small_bottleneck", "digits-clutter", options), out


def test_a_checkpoint_keeps_the_orientation(run):
    result, out = run
    assert json.loads((out / "result.json").read_text(encoding="utf-8"))["orientations"] == result["orientations"]
    trained = load_run(out / "last.ckpt")
    assert {name: each._asdict() for name, each in trained.orientations.items()} == result["orientations"]
    assert result["orientations"]["attention.map"]["images"] == 256  # of 320
    images = ImageData(**trained.data)
    images.setup()
    again = orientations(trained.network, images, 256)
    assert again["attention.map"] == pytest.approx(result["orientations"]["attention.map"], abs=1e-6)
    assert not list(out.glob("*.partial"))


def evaluated(checkpoint, out, capsys):
    arguments = ["--protocol", "localisation", "orientation", "--limit", "50", "--device", "cpu", "--out", str(out)]
    assert cli.main(["evaluate", str(checkpoint), *arguments]) == 0
    return json.loads(out.read_text(encoding="utf-8"))["protocols"], capsys.readouterr().out


@pytest.mark.parametrize("sign", [1, -1, 0, None])
def test_evaluate_shows_raw_and_oriented_numbers(sign, run, tmp_path, capsys):
    """With each orientation that a checkpoint may hold; None: one of a version that stored none."""
    checkpoint, out = tmp_path / "last.ckpt", tmp_path / "evaluation.json"
    saved = torch.load(run[1] / "last.ckpt", weights_only=True)
    if sign is None:
        del saved["orientations"]
    else:
        saved["orientations"]["attention.map"] |= {"sign": sign, "score": 0.25 * sign}
    torch.save(saved, checkpoint)
    trained = load_run(checkpoint)
    images = ImageData(**trained.data)
    images.setup()
    subject = protocols.Subject(trained.network, images, trained.normalise, limit=50)
    boxes, _ = subject.located
    results, printed = evaluated(checkpoint, out, capsys)
    assert results["localisation"]["pointing"] == pytest.approx(pointing_game(subject.maps, boxes, (32, 32)))
    score = signed_scores(subject.maps, boxes, (32, 32)).mean().item()
    assert results["localisation"]["signed_score"] == pytest.approx(score)
    found = results["orientation"]
    if not sign:
        assert trained.orientations == {} or sign == 0
        why = "the checkpoint has no orientation of attention.map" if sign is None else "neither high nor low values"
        assert why in found["not applicable"]
        assert "not applicable: orientation" in printed
        return
    assert (found["sign"], found["chosen on"]) == (sign, "training images")
    oriented = pointing_game(orient(subject.maps, sign), boxes, (32, 32))
    assert found["oriented"]["pointing"] == pytest.approx(oriented)
    word = {1: "high", -1: "low"}[sign]
    assert found["meaning"].startswith(f"{word} values mark the objects (mean correlation {0.25 * sign:+.3f}")
    assert f"{word} values, pointing {oriented:.3f}" in printed


def test_train_says_the_orientation_in_words(run, tmp_path, capsys):
    options = ["--data.count", "64", "--data.batch_size", "16", "--data.size", "32", "--trainer.max_epochs", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "small_bottleneck", "--data", "digits-clutter", *options, *quiet]) == 0
    chosen = load_run(tmp_path / "run" / "last.ckpt").orientations["attention.map"]
    assert capsys.readouterr().out.splitlines()[1] == f"attention.map: on training images, {chosen}"
