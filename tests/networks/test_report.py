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
from attnkern.report import latency
from attnkern.training import data
from attnkern.training.train import train

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
            for key in ("image", "overlay"):
                picture = base64.b64decode(example[key].removeprefix("data:image/png;base64,"))
                with Image.open(io.BytesIO(picture)) as image:
                    assert min(image.size) > 100
            assert example["image"] != example["overlay"]
        assert examples[0]["caption"].startswith("1 of 5: ")
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

        def blocked_autorange(self, min_run_time):
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
    from attnkern.report import Subject, report

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
    page = report(whole, run, results, examples=12)
    found = Read(page)
    assert found.texts["h1"] == found.texts["title"] == ["$run_ & <b>"]
    assert found.texts["td"][: 2 * len(names) : 2] == [f"{name} · jaccard" for name in names]
    assert "<" not in re.search(r'<script id="examples"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
    with torch.no_grad():
        chosen = network(images.normalise(whole.raw)).argmax(1).tolist()
    for example, label, best in zip(examples_of(page), whole.labels.tolist(), chosen, strict=True):
        assert f": {names[best]} (" in example["caption"]
        assert label == best or example["caption"].endswith(f"wrong, it is {names[label]}")
    # Line ends and runs of spaces are kept.
    assert re.search(r"h1, h2, p, summary, td, [^{]*{ white-space: pre-wrap; }", found.texts["style"][0])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_slider_moves_in_a_browser(pages, tmp_path, width):
    """What the page says after the slider has moved, and what the console said, are written into the page itself."""
    probe = """<script>
    const failures = [];
    window.addEventListener("error", (event) => failures.push(event.message));
    console.error = (...all) => failures.push(all.join(" "));
    window.addEventListener("load", () => {
      const before = document.getElementById("overlay").src;
      const slider = document.getElementById("slider");
      slider.value = slider.max;
      slider.dispatchEvent(new Event("input"));
      document.body.dataset.probe = JSON.stringify({
        failures, max: slider.max, caption: document.getElementById("caption").textContent,
        changed: document.getElementById("overlay").src !== before,
        drawn: document.getElementById("image").naturalWidth,
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
        assert seen["caption"].startswith("5 of 5: ")
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
    (run / "evaluation.json").write_text('{"protocols": {"top1": {"Σ": 0.5}}}', encoding="utf-8")
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
