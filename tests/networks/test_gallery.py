"""The gallery: the first test images and the first wrong ones, from the folders of two runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("captum")
pytest.importorskip("matplotlib")

from attnkern.training.train import train

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "docs" / "make_gallery.py"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("make_gallery", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["--data.count", "64", "--data.batch_size", "16", "--trainer.max_epochs", "1"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.limit_val_batches", "0", "--model.options.width", "0.0625"]
    for name in ("vgg_aib_qt", "vgg"):
        train(name, "digits-clutter", [*arguments, "--out", str(folder / name)])
    return folder


def columns(figure):
    """For each column the picture and the titles of all rows."""
    count = len(figure.axes) // 3
    for i in range(count):
        image, *maps = (figure.axes[row * count + i] for row in range(3))
        yield torch.tensor(image.get_images()[0].get_array()), [ax.get_title() for ax in (image, *maps)]


def test_the_first_images_and_the_first_wrong_ones(gallery, runs):
    first, wrong = gallery.against_none("attention", runs / "vgg_aib_qt", runs / "vgg")
    subject = gallery.subject_of(runs / "vgg_aib_qt")
    with torch.no_grad():
        best = subject.network(subject.normalise(subject.raw)).argmax(1)
    missed = (best != subject.labels).nonzero().flatten().tolist()
    for figure, indices in ((first, range(8)), (wrong, missed[:8])):
        drawn = list(columns(figure))
        assert len(drawn) == 8
        for index, (picture, (truth, ours, _)) in zip(indices, drawn, strict=True):
            assert torch.equal(picture, subject.raw[index].permute(1, 2, 0))
            assert truth == str(subject.labels[index].item())
            verdict = "" if best[index] == subject.labels[index] else "wrong: "
            assert ours.startswith(f"{verdict}{best[index]} (")
    assert first.get_suptitle() == "The first 8 of 359 test images"
    assert f"The first 8 of {len(missed)} test images that" in wrong.get_suptitle().replace("\n", " ")


def test_fewer_wrong_images_than_a_row(gallery, runs, monkeypatch):
    monkeypatch.setattr(gallery, "correct", lambda subject: torch.arange(len(subject.raw)) != 5)
    first, wrong = gallery.against_none("attention", runs / "vgg_aib_qt", runs / "vgg")
    assert (len(first.axes), len(wrong.axes)) == (24, 3)
    monkeypatch.setattr(gallery, "correct", lambda subject: torch.ones(len(subject.raw), dtype=torch.bool))
    assert len(gallery.against_none("attention", runs / "vgg_aib_qt", runs / "vgg")) == 1


def test_gradcam_is_where_the_result_says(gallery, runs):
    result = json.loads((runs / "vgg" / "result.json").read_text(encoding="utf-8"))
    assert gallery.subject_of(runs / "vgg").map_name == result["localisation"]["map"]
    assert gallery.subject_of(runs / "vgg_aib_qt").map_name == "attention.map"


def test_pictures_without_runs_stay(gallery, runs, tmp_path, monkeypatch, capsys):
    """The page has a section for each picture that is there; a run that is missing is named."""
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "levels.png").write_bytes(b"as it was")
    monkeypatch.setattr(gallery, "DOCS", tmp_path)
    monkeypatch.setattr(gallery, "ENTRIES", [entry for entry in gallery.ENTRIES if entry.runs])
    monkeypatch.setattr(sys, "argv", ["make_gallery.py", str(runs)])
    assert gallery.main() == 0
    assert (tmp_path / "gallery" / "levels.png").read_bytes() == b"as it was"
    assert f"levels stays as it is: there is no run of vgg_att2_concat_pc in {runs}" in capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "gallery").iterdir()}
    assert drawn == {"levels.png", "bottleneck.png", "anchors.png"}
    page = (tmp_path / "gallery.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 3
    assert all(f"](gallery/{name})" in page for name in drawn)
    monkeypatch.setattr(sys, "argv", ["make_gallery.py", str(runs), "--only", "levels"])
    with pytest.raises(SystemExit):
        gallery.main()
    assert "levels: there is no run of vgg_att2_concat_pc" in capsys.readouterr().err
