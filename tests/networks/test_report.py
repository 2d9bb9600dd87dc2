"""``attnkern report`` writes one complete page that needs no network, also tested in a browser if there is one."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("captum")
pytest.importorskip("matplotlib")

import io
from html.parser import HTMLParser

from conftest import PATIENCE
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from attnkern import _ops, cli, report
from attnkern.evaluation import protocols
from attnkern.models import create_model
from attnkern.report import Reported, Subject, correct, latency, saved_results, side_by_side
from attnkern.training import data
from attnkern.training.train import load_run, train

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--virtual-time-budget=3000",
]  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, pages = tmp_path_factory.mktemp("runs"), {}
    small = ["--data.count", "64", "--data.batch_size", "16", "--trainer.max_epochs", "2"]
    small += [
        "--trainer.limit_val_batches",
        "1",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
    ]
    for name in ("vgg_att2_concat_pc", "vgg_aib_qt", "mobilenet_v3_large_window"):
        size = ["--data.size", "64"] if "mobilenet" in name else ["--model.options.width", "0.0625"]
        train(name, "digits-clutter", [*small, *size, "--out", str(folder / name)])
        arguments = ["report", str(folder / name), "--limit", "40", "--examples", "5", "--device", "cpu"]
        assert cli.main(arguments) == 0
        pages[name] = folder / name / "report.html"
    return pages


def subject_of(run, **options):
    trained = load_run(run / "last.ckpt")
    images = data.ImageData(**trained.data)
    images.setup()
    return Subject(trained.network, images, trained.normalise, trained.class_names, **options)


def examples_of(text):
    return json.loads(re.search(r'<script id="examples"[^>]*>(.*?)</script>', text, re.S)[1])


def test_a_page_is_whole_and_fetches_nothing(pages):
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        assert name in text
        assert "$" not in re.sub(r"<script.*?</script>|base64,[^\"]*", "", text, flags=re.S)
        for address in re.findall(r"(?:src|href|srcset)=\"([^\"]*)\"|url\(([^)]*)\)", text):
            assert "".join(address).startswith("data:image/png;base64,")
        assert not re.search(r"https?://", text)
        examples = examples_of(text)
        assert len(examples) == 5
        for example in examples:
            for source in example["pictures"]:
                picture = base64.b64decode(source.removeprefix("data:image/png;base64,"))
                with Image.open(io.BytesIO(picture)) as image:
                    assert min(image.size) > 100
            assert len(set(example["pictures"])) == 2
        assert examples[0]["caption"] == "1 of 5"
        assert "attention of 32 images, native" in text
        assert "pointing game" in text
    assert "Anchors: attention.quantizer" in pages["vgg_aib_qt"].read_text(encoding="utf-8")
    assert "<h2>Rectangles</h2>" in pages["mobilenet_v3_large_window"].read_text(encoding="utf-8")
    assert "<h2>Rectangles</h2>" not in pages["vgg_aib_qt"].read_text(encoding="utf-8")


def test_latency_of_attention_alone(monkeypatch):
    """With the number of operators that are called in place of the time that they take."""

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **kwargs or {})

    class Counter:
        def __init__(self, statement, globals):
            self.call = globals["call"]

        def timeit(self, number):
            with Operators() as called:
                self.call()
            return types.SimpleNamespace(median=called.count)

    monkeypatch.setattr(report, "Timer", Counter)
    network, images = create_model("vgg_att2_concat_pc", 4, width=0.0625).eval(), torch.rand(4, 3, 32, 32)
    found = latency(network, images)
    assert set(found) == {"inference", "attention"}
    assert 0 < found["attention"]["reference"] < found["inference"]["reference"]
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert set(latency(create_model("vgg", 4, width=0.0625).eval(), images)) == {"inference"}


class Read(HTMLParser):
    """The texts of a page by element, and its style; what is in a script goes to its end, as in a browser."""

    def __init__(self, page):
        super().__init__()
        self.inside, self.texts = [""], {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "input", "source"):  # these have no end
            self.inside.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        self.inside.pop()

    def handle_data(self, data):
        if self.inside[-1]:
            self.texts[self.inside[-1]][-1] += data


def test_names_appear_as_they_are_written(tmp_path):
    names = [
        "$x^2$",
        "</script><!--<script>",
        "_a  b",
        "two\nlines",
        "50% & <b>",
        "a|b\\c",
        "{x}",
        "é 猫",
        "&amp;",
        "'\"",
    ]
    images = data.ImageData(count=10)
    images.setup()
    images.class_names = names
    network = create_model("vgg", 10, width=0.03).eval()
    whole = Subject(network, images, images.normalisation, limit=12)
    run = tmp_path / "$run_ & <b>"
    (run / "csv" / "version_0").mkdir(parents=True)
    table = run / "csv" / "version_0" / "metrics.csv"
    table.write_text("epoch,val_accuracy\n0,0.1\n1,0.2\n", encoding="utf-8")
    results = {"segmentation": {name: {"jaccard": 0.5} for name in names}}
    page = report.report(whole, run, results, examples=12)
    found = Read(page)
    assert found.texts["h1"] == found.texts["title"] == ["$run_ & <b>"]
    assert found.texts["td"][: 2 * len(names) : 2] == [f"{name} · jaccard" for name in names]
    assert "<" not in re.search(r'<script id="examples"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
    with torch.no_grad():
        chosen = network(images.normalise(whole.raw)).argmax(1).tolist()
    for example, label, best in zip(examples_of(page), whole.labels.tolist(), chosen, strict=True):
        truth, said = example["texts"]
        assert truth == f"class: {names[label]}"
        assert said.startswith(f"{names[best]} (" if label == best else f"wrong: {names[best]} (")
    # Line ends and runs of spaces are kept.
    assert re.search(r"h1, h2, p, summary, th, td, [^{]*{ white-space: pre-wrap; }", found.texts["style"][0])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_slider_moves_in_a_browser(pages, tmp_path, width):
    """What the page says after the slider has moved, and what the console said, are written into the page itself."""
    probe = """<script>
    const failures = [];
    window.addEventListener("error", (event) => failures.push(event.message));
    console.error = (...all) => failures.push(all.join(" "));
    window.addEventListener("load", () => {
      const shown = () => [...document.querySelectorAll("#pictures img")].map((image) => image.src).join();
      const before = shown();
      const slider = document.getElementById("slider");
      slider.value = slider.max;
      slider.dispatchEvent(new Event("input"));
      document.body.dataset.probe = JSON.stringify({
        failures, max: slider.max, caption: document.getElementById("caption").textContent,
        changed: shown() !== before, drawn: document.querySelector("#pictures img").naturalWidth,
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      });
    });
    </script>"""
    for name, path in pages.items():
        page = tmp_path / f"{name}.html"
        page.write_text(path.read_text(encoding="utf-8").replace("<head>", f"<head>{probe}", 1), encoding="utf-8")
        command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / name}", f"--window-size={width},900", "--dump-dom"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=PATIENCE)
        found = re.search(r'data-probe="([^"]*)"', done.stdout)
        assert found, done.stderr[-2000:]
        seen = json.loads(found[1].replace("&quot;", '"'))
        assert seen["failures"] == []
        assert (seen["max"], seen["changed"]) == ("4", True)
        assert seen["caption"] == "5 of 5"
        assert seen["drawn"] > 100
        assert seen["overflow"] <= 0


def test_without_the_compiled_library_the_reference_is_measured(monkeypatch):
    monkeypatch.setitem(_ops.NATIVE_REASON, "cpu", "it is not built")
    network, images = create_model("vgg_att2_concat_pc", 4, width=0.0625).eval(), torch.rand(4, 3, 32, 32)
    found = latency(network, images)
    assert {what: list(times) for what, times in found.items()} == {
        "inference": ["reference"],
        "attention": ["reference"],
    }


def test_a_locale_without_utf8(pages, tmp_path):
    """The page and what is read for it are in UTF-8; a name that the terminal cannot show does not end the command."""
    run = tmp_path / "run ü"
    shutil.copytree(pages["vgg_aib_qt"].parent, run)
    settings = protocols.plain(protocols.choices(subject_of(run, limit=20)))
    results = {name: {"not applicable": "left out"} for name in protocols.PROTOCOLS} | {"top1": {"Σ": 0.5}}
    text = json.dumps(settings | {"protocols": results}, ensure_ascii=False)
    (run / "evaluation.json").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "attnkern",
        "report",
        str(run),
        "--limit",
        "20",
        "--examples",
        "2",
        "--device",
        "cpu",
    ]
    ascii = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | ascii, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = (run / "report.html").read_text(encoding="utf-8")
    assert '<meta charset="utf-8">' in text
    assert "<td>Σ</td>" in text
    assert "·" in text  # of the page itself
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize("out", ["nowhere/page", "."])
@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_what_cannot_be_written_is_not_computed(command, out, pages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("attnkern.training.data.ImageData", lambda **_: pytest.fail("no image is to be read"))
    run = pages["vgg_aib_qt"].parent
    of = str(run / "last.ckpt" if command == "evaluate" else run)
    assert cli.main([command, of, "--out", out]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"attnkern: {command}: {out!r} cannot be written (")
    assert error.endswith("); choose another place with --out\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_numbers_are_printed_when_the_file_cannot_be_written(command, pages, tmp_path, monkeypatch, capsys):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(protocols.Path, "write_text", full)
    monkeypatch.setattr(protocols, "PROTOCOLS", {"top1": protocols.PROTOCOLS["top1"]})
    run = pages["vgg_aib_qt"].parent
    of = str(run / "last.ckpt" if command == "evaluate" else run)
    arguments = [command, of, "--limit", "20", "--device", "cpu", "--out", str(tmp_path / "out")]
    arguments += ["--examples", "2"] if command == "report" else []
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert re.search(r"^top1 +accuracy 0\.\d+ ", printed.out, re.MULTILINE)
    assert printed.err.endswith("attnkern: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "report"])
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_device_that_is_not_here(command, device, pages, capsys):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    run = pages["vgg_aib_qt"].parent
    of = str(run / "last.ckpt" if command == "evaluate" else run)
    assert cli.main([command, of, "--device", device]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"attnkern: {command}: device {device!r} cannot be used here: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["info"], ["models"]])
def test_a_reader_that_has_left_ends_a_command_silently(arguments):
    """As ``attnkern info | head -1`` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "attnkern", *arguments], stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupted_command(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "attnkern: interrupted\n"


def test_a_folder_without_a_run(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- two runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(pages, tmp_path_factory):
    """Two runs on the same test images, the second without attention, and their page."""
    first, folder = pages["vgg_att2_concat_pc"].parent, tmp_path_factory.mktemp("other")
    second = folder / "vgg"
    quiet = [
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--trainer.limit_val_batches",
        "1",
    ]
    small = ["--data.count", "64", "--data.batch_size", "16", "--trainer.max_epochs", "1"]
    train("vgg", "digits-clutter", [*quiet, *small, "--model.options.width", "0.0625", "--out", str(second)])
    page = folder / "page.html"
    arguments = ["--limit", "40", "--examples", "3", "--device", "cpu", "--out", str(page)]
    assert cli.main(["report", str(first), "--against", str(second), *arguments]) == 0
    return first, second, page


def rows_of(page):
    """The rows of all tables, as lists of texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


def test_a_page_about_two_runs(pair):
    first, second, path = pair
    page = path.read_text(encoding="utf-8")
    assert Read(page).texts["h1"] == ["vgg_att2_concat_pc against vgg"]
    subjects = [subject_of(run, limit=40) for run in (first, second)]
    predicted, right = [], []
    for subject in subjects:
        with torch.no_grad():
            predicted.append(subject.network(subject.normalise(subject.raw)).argmax(1))
        right.append(predicted[-1] == subject.labels)
        assert torch.equal(correct(subject), right[-1])
    rows = rows_of(page)
    assert ["", "vgg_att2_concat_pc", "vgg"] in rows
    assert ["top-1 accuracy", *(f"{found.float().mean().item():.3f}" for found in right)] in rows
    assert ["parameters", *(f"{sum(p.numel() for p in each.network.parameters()):,}" for each in subjects)] in rows
    # The second run has no attention: no latency of it, and no pool for this protocol.
    by_name = {row[0]: row[1:] for row in rows}
    assert [text == "–" for text in by_name["attention of 32 images, native"]] == [False, True]
    assert [text == "–" for text in by_name["attention10 · images"]] == [False, True]
    assert [name for name in protocols.PROTOCOLS if f"<summary>{name}</summary>" not in page] == []

    only = [(one & ~other).sum().item() for one, other in (right, right[::-1])]
    assert f"only vgg_att2_concat_pc on {only[0]}, only vgg on {only[1]}" in page
    for name, count in zip(("vgg_att2_concat_pc", "vgg"), only, strict=True):
        assert (f"<h2>Only {name} is right</h2>" in page) == (count > 0)
    assert page.count("<h2>Training</h2>") == 1
    assert "Grad-CAM block4 (vgg)" in page

    slides = examples_of(page)
    assert [slide["caption"] for slide in slides] == ["1 of 3", "2 of 3", "3 of 3"]
    for index, slide in enumerate(slides):
        assert len(set(slide["pictures"])) == 3
        assert slide["texts"][0] == f"class: {subjects[0].labels[index]}"
        for name, text, found in zip(("vgg_att2_concat_pc", "vgg"), slide["texts"][1:], predicted, strict=True):
            wrong = "" if found[index] == subjects[0].labels[index] else "wrong: "
            assert text.startswith(f"{name}: {wrong}{found[index]} (")
    for address in re.findall(r"(?:src|href|srcset)=\"([^\"]*)\"", page):
        assert address.startswith("data:image/png;base64,") or not address


def test_images_of_two_runs_side_by_side(pair):
    """The cells of the figure, and the maps that are drawn in them."""
    first, second, _ = pair
    subjects = {"ours": subject_of(first), "theirs": subject_of(second)}
    indices = [5, 0, 7]
    figure = side_by_side(subjects, indices)
    axes = figure.axes
    assert len(axes) == 9
    assert [axes[i].get_ylabel() for i in (0, 3, 6)] == ["image", "ours", "theirs"]
    labels = subjects["ours"].labels[indices].tolist()
    assert [ax.get_title() for ax in axes[:3]] == [str(label) for label in labels]
    for row, subject in enumerate(subjects.values(), 1):
        raw = subject.raw[indices]
        with torch.no_grad():
            logits = subject.network(subject.normalise(raw))
        for column, label in enumerate(labels):
            ax, best = axes[3 * row + column], logits[column].argmax().item()
            said = f"{best} ({logits[column].softmax(0)[best]:.0%})"
            assert ax.get_title() == ("" if best == label else "wrong: ") + said
            image, map = ax.get_images()
            assert torch.equal(torch.tensor(image.get_array()), raw[column].permute(1, 2, 0))
            assert map.get_array().shape == (32, 32)
        assert not axes[3 * row].patches
    # A picture of the same images in another order has the same cells in another order.
    turned = side_by_side(subjects, indices[::-1]).axes
    assert (turned[3].get_images()[1].get_array() == axes[5].get_images()[1].get_array()).all()


def test_runs_that_cannot_be_compared(pair, pages, tmp_path, capsys, monkeypatch):
    first, second, _ = pair
    link = tmp_path / "link"
    link.symlink_to(first)
    monkeypatch.setattr("attnkern.cli._measure", lambda *_: pytest.fail("nothing is to be measured"))
    out = ["--out", str(tmp_path / "page.html"), "--device", "cpu"]
    for other, said in (
        (
            tmp_path,
            f"report: against must be the folder of a run of attnkern train, got '{tmp_path}': there is no file ",
        ),
        (first, f"report: against must be another run, got '{first}' twice"),
        (link, f"report: against must be another run, got '{link}' twice"),
        (
            pages["mobilenet_v3_large_window"].parent,
            "report: against must be a run with the same test images, got one with size 64 instead of 32",
        ),
    ):
        assert cli.main(["report", str(first), "--against", str(other), *out]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"attnkern: {said}")
        assert error.count("\n") == 1
    assert cli.main(["report", str(first), "--against-map", "block3", *out]) == 1
    assert capsys.readouterr().err == "attnkern: report: --against-map needs a run to compare with: pass --against\n"
    assert cli.main(["report", str(first), "--against", str(second), "--against-map", "attention10.map", *out]) == 1
    assert "got 'attention10.map'" in capsys.readouterr().err
    pairs = data.ImageData(name="digits-pairs", count=10)
    pairs.setup()
    other = Subject(subject_of(second).network, pairs, pairs.normalisation)
    with pytest.raises(ValueError, match=r"^report: against must be a run on digits-clutter, got one on digits-pairs$"):
        report.check_against(Reported(subject_of(first), first), Reported(other, second))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_runs_of_the_same_recipe_are_told_apart(tmp_path):
    def side(folder, recipe):
        return report._Side(None, tmp_path / folder, {}, {"recipe": recipe}, [])

    assert list(report._named([side("a", "vgg"), side("b", "vgg_gap")])) == ["vgg", "vgg_gap"]
    assert list(report._named([side("a", "vgg"), side("b", "vgg")])) == ["a", "b"]
    assert list(report._named([side("1/a", "vgg"), side("2/a", "vgg")])) == [str(tmp_path / f"{i}/a") for i in "12"]


@pytest.mark.parametrize("content", ['{"protocols": {', "[]"])
def test_damaged_files_of_a_run_are_named(content, tmp_path):
    for name in ("evaluation.json", "result.json"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    expected = r"json' is not a whole file with a JSON object \(.*\): delete it or write it again with attnkern "
    with pytest.raises(ValueError, match=rf"^report: .*evaluation\.{expected}evaluate$"):
        saved_results(None, tmp_path)
    with pytest.raises(ValueError, match=rf"^report: .*result\.{expected}train$"):
        report._side(None, tmp_path, None)


def test_saved_results_are_of_the_same_images(pages, tmp_path):
    run = pages["vgg_aib_qt"].parent
    subject = subject_of(run, limit=40)
    saved = protocols.plain(protocols.choices(subject)) | {"protocols": {"top1": {"accuracy": 0.5}}}
    assert saved_results(subject, tmp_path) == {}
    for change in ({}, {"images": 41}, {"seed": 1}, {"map": "another"}, {"data": saved["data"] | {"name": "svhn"}}):
        (tmp_path / "evaluation.json").write_text(json.dumps(saved | change), encoding="utf-8")
        assert saved_results(subject, tmp_path) == ({} if change else saved["protocols"])
