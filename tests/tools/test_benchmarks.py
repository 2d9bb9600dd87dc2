"""Tests of the benchmark scripts: which rows they measure, store and report. Nothing is timed here."""

import itertools
import json
import math
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import cases, profile, report, run
from benchmarks.cases import CPU_CASES, GPU_CASES, PASSES, Case, calls
from benchmarks.store import COMMITTED, Store, code_version

CPU = torch.device("cpu")
#: Small cases with many queries: two layers of timm, and pooling alone.
POOLING = [
    Case("AttentionPoolLatent", (3, 8, 6), layout="tokens", queries=2),
    Case("AttentionPool2d", (3, 8, 3, 4), queries=2),
    Case("compatibility_pool", (3, 8, 6), layout="tokens", queries=5),
    Case("compatibility_pool", (3, 8, 3, 4), queries=1),
]
ROWS = [
    run.row_of("window float32 contiguous", "forward+backward", {"eager": 6e-3, "compile": 3e-3, "native": 1e-3}),
    run.row_of("pool float32 contiguous", "forward+backward", {"eager": 4e-3, "compile": 1e-3, "native": 2e-3}),
]


def test_order_of_a_gpu_run():
    """Each case is measured once in both passes, and the most important cases come first."""
    work = cases.work("", gpu=True, compiled=True)
    assert len(set(work)) == len(work)
    assert set(itertools.product(GPU_CASES, PASSES)) <= set(work)

    def kind(case, which):
        if not isinstance(case, Case):
            return case if case == cases.HOST else "network"
        if case.queries:
            return "many queries"
        if case.windows:
            return "several windows"
        if which == cases.AUTOTUNED:
            return "autotuned"
        return case.op if case.op == "anchor_quantize" else f"{case.layout} {case.dtype}"

    order = [kind for kind, _ in itertools.groupby(kind(*item) for item in work)]
    assert order == [
        cases.HOST, "anchor_quantize", "contiguous torch.bfloat16", "contiguous torch.float32", "network",
        "many queries", "several windows", "channels_last torch.bfloat16", "channels_last torch.float32", "autotuned",
    ]  # fmt: skip


def test_many_queries_are_measured_in_both_processes():
    first, again = (cases.work("", gpu=False, compiled=True, again=again) for again in (False, True))
    left_out = [item for item in first if item not in again]
    assert left_out == [(case, "forward") for case in cases.CPU_POOLING]
    assert set(again) < set(first)


def test_a_case_is_found_by_its_name():
    for case in (*GPU_CASES, *CPU_CASES, *cases.CPU_POOLING, *cases.CPU_WINDOWS):
        assert Case.parse(str(case)) == case


def test_table_and_goals_keep_slower_rows():
    assert [row["times"]["compile"] for row in ROWS] == [pytest.approx(3), pytest.approx(0.5)]
    text = report.table(ROWS)
    assert "| 3.00" in text
    assert "| 0.50" in text
    goals = report.goals(ROWS)
    assert "**3.5 times as fast as eager PyTorch, 1.2 times as fast as torch.compile** in the default process" in goals
    assert cells_of(goals) == [
        ["default", "all", "eager, geometric mean", "3.46 ×", "3 ×", "yes"],
        ["default", "all", "torch.compile, geometric mean", "1.22 ×", "1.3 ×", "no"],
        ["default", "all", "torch.compile, slowest row: pool float32 contiguous", "0.50 ×", "1 ×", "no"],
    ]


def test_several_windows_have_goals_of_their_own():
    """Each row should reach them; the other goals are not about these rows."""

    def row(windows, eager, compiled):
        case = f"window_attention 2x2x2x2 float32 contiguous K={windows}"
        return run.row_of(case, "forward+backward", {"eager": eager, "compile": compiled, "native": 1e-3})

    text = report.goals([*ROWS, row(4, 6e-3, 1.4e-3), row(16, 9e-3, 2e-3)])
    case = "window_attention 2x2x2x2 float32 contiguous K=4"
    assert cells_of(text)[:3] == cells_of(report.goals(ROWS))
    assert cells_of(text)[3:] == [
        ["default", "several windows", f"eager, slowest row: {case}", "6.00 ×", "5 ×", "yes"],
        ["default", "several windows", f"torch.compile, slowest row: {case}", "1.40 ×", "1.5 ×", "no"],
    ]


def test_several_windows_are_drawn_and_right():
    case = Case("window_attention", (2, 3, 4, 5), windows=3)
    assert str(case) == "window_attention 2x3x4x5 float32 contiguous K=3"
    ready = calls(case, "forward+backward", torch.device("cpu"), None)
    assert {"eager", "native"} <= ready.keys()
    inputs, _ = ready["native"].work.copy(0)
    assert inputs["rectangle"].shape == (2, 3, 5)


def cells_of(text):
    """The cells of a table's rows, without the header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def in_both(case, which, default, tuned):
    return [run.row_of(case, which, default), run.row_of(case, which, tuned, process="tuned")]


def test_table_shows_both_processes_side_by_side(tmp_path):
    """Each case and pass has one line; a time missing in one process is shown as a dash."""
    rows = [
        *in_both("pool float32", "forward", {"eager": 9e-3, "native": 3e-3}, {"eager": 4e-3, "native": 2e-3}),
        *in_both("window float32", "forward", {"eager": 8e-3, "native": 4e-3}, {"native": 1e-3}),
    ]
    _, _, pool, window = report.table(rows).splitlines()
    assert [cell.strip() for cell in pool.split("|")[1:-1]] == [
        "pool float32", "forward", "9.000 / 4.000", "3.000 / 2.000", "3.00 / 2.00"
    ]  # fmt: skip
    assert [cell.strip() for cell in window.split("|")[3:-1]] == ["8.000 / –", "4.000 / 1.000", "2.00 / –"]
    assert report.BOTH in report.tables(rows)
    assert report.BOTH not in report.tables(rows[::2])
    failed = [{**rows[1], "errors": {"compile": "no luck"}}, rows[0]]
    assert "- pool float32, forward, tuned process, compile: no luck" in report.tables(failed)
    path = tmp_path / "plot.svg"
    both = in_both(
        "pool 2x2x2x2 float32 contiguous",
        "forward+backward",
        {"eager": 9e-3, "native": 3e-3},
        {"eager": 4e-3, "native": 2e-3},
    )
    report.plot(run_of(both), path)
    two = path.read_text(encoding="utf-8")
    report.plot(run_of(both[:1]), path)
    assert two.count("<path") == path.read_text(encoding="utf-8").count("<path")  # only the default process is plotted


def test_goals_of_each_process():
    """Core rows have goals in the default process only. The slowest forward pass is named."""

    def both(case, default, tuned):
        ours = {"eager": 7e-3, "native": 1e-3}
        return [
            *in_both(case, "forward+backward", {**ours, "compile": default}, {**ours, "compile": tuned}),
            *in_both(case, "forward", {**ours, "compile": 0.9e-3}, {**ours, "compile": 2e-3}),
        ]

    window, anchor = "window_attention 2x2x2x2 float32 contiguous", "anchor_attention 2x2x2x2 float32 contiguous"
    text = report.goals([*both(window, 2.5e-3, 1.1e-3), *both(anchor, 1e-3, 4e-3)])
    core, slowest = "contiguous, without anchor_attention", "torch.compile, slowest row: "
    assert cells_of(text) == [
        ["default", "all", "eager, geometric mean", "7.00 ×", "3 ×", "yes"],
        ["default", "all", "torch.compile, geometric mean", "1.58 ×", "1.3 ×", "yes"],
        ["default", "all", slowest + anchor, "1.00 ×", "1 ×", "yes"],
        ["default", "all, forward alone", f"{slowest}{window} (one of 2 below the goal)", "0.90 ×", "1 ×", "no"],
        ["default", core, "eager, geometric mean", "7.00 ×", "6.5 ×", "yes"],
        ["default", core, "torch.compile, geometric mean", "2.50 ×", "2.2 ×", "yes"],
        ["default", core, slowest + window, "2.50 ×", "1.2 ×", "yes"],
        ["tuned", "all", "eager, geometric mean", "7.00 ×", "3 ×", "yes"],
        ["tuned", "all", "torch.compile, geometric mean", "2.10 ×", "1.3 ×", "yes"],
        ["tuned", "all", slowest + window, "1.10 ×", "1 ×", "yes"],
        ["tuned", "all, forward alone", slowest + window, "2.00 ×", "1 ×", "yes"],
    ]


@pytest.mark.parametrize("codes, ran", [((0, 0), ["default", "tuned"]), ((3, 0), ["default"])])
def test_environments_of_both_processes(codes, ran, tmp_path, monkeypatch):
    """The default process has no malloc settings. If a process leaves rows unmeasured, the next one is not started."""
    found = []

    def start(command, env):
        found.append((command, env))
        return types.SimpleNamespace(returncode=codes[len(found) - 1])

    for name in run.PROCESSES["tuned"]:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(run.subprocess, "run", start)
    assert run.run_processes(tmp_path / "store.json", math.inf) == codes[0]
    assert [command[command.index("--process") + 1] for command, _ in found] == ran
    for (_, environment), name in zip(found, ran, strict=True):
        assert {key: environment[key] for key in run.PROCESSES["tuned"] if key in environment} == run.PROCESSES[name]
        assert environment["PATH"]


def test_single_thread_is_timed_by_cpu_time(monkeypatch):
    """A single thread is timed by CPU time, which excludes waiting."""
    for threads, clock in ((1, run.time.process_time), (2, run.time.perf_counter)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert run.clock_of(CPU) is clock
    ticks = itertools.count(step=0.5)
    assert run.median_times({"call": list}, budget=0, clock=lambda: next(ticks)) == {"call": 0.5}


ABOUT = {"machine": "m", "threads": 1, "date": "2026-01-01", "torch": "2", "suite": ""}
KEY = {"version": "a", "compiled": True}


def run_of(rows, **more):
    return {**ABOUT, "copy_gb_per_s": 10.0, "rows": rows, **more}


def test_attempt_with_the_least_noise_is_used(monkeypatch):
    """Measuring stops at the first attempt without noise; if all are noisy, the one with the least spread is used."""
    calm, noisy, noisier = [1.0] * 7, [1.0, 2.0] * 4, [1.0, 9.0] * 4
    for attempts, count, kept in (
        ([noisy, calm, noisier], 2, calm), ([noisier, noisy, noisier], 3, noisy), ([calm, noisy, noisy], 1, calm)
    ):  # fmt: skip
        left = iter(attempts)
        monkeypatch.setattr(run, "turns", lambda ready, left=left: {"call": next(left), "calm": calm})
        seconds, spreads = run.settled_times({"call": None}, 3)
        assert len(list(left)) == 3 - count
        assert seconds["call"] == run.statistics.median(kept)
        assert spreads == {"call": run.spread(kept), "calm": 0}


def test_noisy_rows_are_marked():
    rows = [{**ROWS[0], "spread": {"eager": 0.02, "native": 0.3}}, {**ROWS[1], "spread": {"eager": 0.1}}]
    assert [cells[-1] for cells in cells_of(report.table(rows))] == ["30% noisy", "10%"]
    assert "spread" not in report.table(ROWS)


@pytest.mark.parametrize(
    "load, during, spread, reasons",
    [
        (0.5, 2.2, 0.1, []),
        (9.0, 2.2, 0.1, []),  # a build that has just ended still raises the load average
        (0.5, 9.0, 0.1, ["the load average was 9.0 on 2 cores during the run"]),
        (0.5, 2.2, 0.5, ["the times of 2 of 2 rows vary by more than 25%"]),
    ],
)
def test_unreliable_numbers_come_with_a_warning(load, during, spread, reasons):
    rows = [{**row, "load": during, "spread": {"eager": spread}} for row in ROWS]
    content = run_of(rows, cores=2, load=load)
    assert report.doubts(content) == reasons
    for text in (report.body(content), report.printed(content)):
        assert f"load average {load} before the run and {during} during it" in text
        assert ("Do not trust these numbers" in text) == bool(reasons)
    assert report.doubts(run_of(ROWS)) == []  # runs that did not record the load get no warning


def test_a_second_run_does_not_replace_the_first(tmp_path):
    paths = []
    for _ in range(3):
        store = Store(tmp_path, ABOUT)
        store.add(ROWS[0])
        paths.append(store.path.name)
    assert paths == [f"m-1-threads-2026-01-01{number}.json" for number in ("", "-2", "-3")]


def test_publish_run(tmp_path, monkeypatch):
    """A run is published once, under an unused name. The page shows the latest run of a day."""
    published, results = tmp_path / "published", tmp_path / "results"
    published.mkdir()
    results.mkdir()
    monkeypatch.setattr(report, "COMMITTED", published)
    monkeypatch.setattr(report, "RESULTS", results)
    with pytest.raises(SystemExit, match="no run in"):
        report.newest()
    for time, factor in (("09:00:00", 1), ("10:00:00", 2)):
        path = results / "run.json"
        rows = [run.row_of(row["case"], row["pass"], {"eager": factor * 1e-3, "native": 1e-3}) for row in ROWS]
        path.write_text(json.dumps(run_of(rows, time=time)), encoding="utf-8")
        assert report.publish(report.newest()) == report.publish(path)
    assert sorted(path.name for path in published.iterdir()) == ["run-2.json", "run.json"]
    assert [cells[2] for cells in cells_of(report.page())[:2]] == ["2.000", "2.000"]


def test_each_run_gets_its_own_page(tmp_path):
    path = tmp_path / "run.json"
    case = "window_attention 2x2x2x2 float32 contiguous"
    row = run.row_of(case, "forward+backward", {"eager": 2e-3, "compile": 1.5e-3, "native": 1e-3})
    path.write_text(json.dumps(run_of([row])), encoding="utf-8")
    assert report.write(path) == [path, path.with_suffix(".md"), path.with_suffix(".svg")]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith("# Operators and training steps: m, 1 thread\n\nm, 1 thread, torch 2, 2026-01-01; ")
    assert text.index("(run.svg)") < text.index("2.0 times as fast as eager") < text.index(f"| {case}")


def test_store_resumes(tmp_path):
    """A run resumes if code version, options and machine match, even on another date; other files are left alone."""
    first = Store(tmp_path, {**ABOUT, "key": KEY})
    first.add(ROWS[0])
    again = Store(tmp_path, {**ABOUT, "key": KEY, "date": "2026-01-02"})
    assert again.path == first.path
    assert again.has("window float32 contiguous", "forward+backward")
    assert not again.has("window float32 contiguous", "forward")
    assert not again.has("window float32 contiguous", "forward+backward", "tuned")
    again.add(ROWS[1])
    assert len(json.loads(first.path.read_text(encoding="utf-8"))["rows"]) == 2
    for other in ({"key": {**KEY, "version": "b"}}, {"key": {**KEY, "compiled": False}}, {"key": KEY, "machine": "n"}):
        store = Store(tmp_path, {**ABOUT, **other})
        assert store.content["rows"] == []
        assert store.path != first.path
    assert Store(tmp_path, {**ABOUT}).content["rows"] == []


def test_remeasured_row_replaces_the_old_one(tmp_path):
    store = Store(tmp_path, ABOUT)
    for row in (*ROWS, {**ROWS[0], "ms": {"native": 5.0}}):
        store.add(row)
    assert [row["ms"]["native"] for row in store.content["rows"]] == [5.0, 2.0]
    assert Store.of(store.path).content == store.content


def test_code_version_depends_on_the_given_files(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.store.ROOT", tmp_path)
    (tmp_path / "a").write_text("1", encoding="utf-8")
    (tmp_path / "b").write_text("2", encoding="utf-8")
    before = code_version("a")
    (tmp_path / "b").write_text("3", encoding="utf-8")
    assert code_version("a") == before
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert code_version("a") != before


def pooling_rows():
    """A layer, tokens and an NCHW map with many queries, in both processes."""
    cases = {
        "AttentionPoolLatent 3x8x6 float32 tokens M=2": {"timm": 24e-3, "timm compile": 22e-3, "sdpa": 3e-3},
        "compatibility_pool 3x8x6 float32 tokens M=2": {"sdpa": 3e-3, "einsum": 1.96e-3},
        "compatibility_pool 3x8x3x4 float32 contiguous M=1": {"sdpa": 9e-3, "einsum": 5e-3, "einsum compile": 3e-3},
    }
    return [
        run.row_of(
            case, "forward+backward", {**ms, "native": 2e-3}, process=process, peak_mb={"sdpa": 6.0, "native": 3.0}
        )
        for case, ms in cases.items()
        for process in ("default", "tuned")
    ]


def test_goals_and_table_of_many_queries(monkeypatch):
    rows = pooling_rows()
    text = report.goals(rows)
    assert "**11.0 times as fast as timm's attention-pooling layers** in the default process" in text
    tokens, maps = "compatibility_pool 3x8x6 float32 tokens M=2", "compatibility_pool 3x8x3x4 float32 contiguous M=1"
    expected = [
        ["many queries, layers", f"timm's layer, the faster of eager and compiled, lowest row: {rows[0]['case']}",
         "11.00 ×", "10 ×", "yes"],
        ["many queries, all", f"the fastest folded form, lowest row: {tokens}", "0.98 ×", "0.95 ×", "yes"],
        ["many queries, NCHW maps", f"the fastest folded form, lowest row: {maps}", "1.50 ×", "2 ×", "no"],
        ["many queries, all", f"the least peak memory of a folded form, lowest row: {rows[0]['case']}",
         "2.00 ×", "1 ×", "yes"],
    ]  # fmt: skip
    lines = cells_of(text)
    assert [line[0] for line in lines] == ["default"] * 4 + ["tuned"] * 4
    for got, wanted in zip(lines[:4], expected, strict=True):
        assert [got[1], got[3], got[4], got[5]] == [wanted[0], *wanted[2:]]
    assert [line[2] for line in lines[1:3]] == [line[1] for line in expected[1:3]]
    content = run_of([*ROWS, *rows])
    for shown in (report.body(content), report.printed(content)):
        assert "× timm" in shown
        assert "3.5 times as fast as eager" in shown  # rows with many queries have no part in this
    assert cells_of(report.pooling_table(rows, brief=True))[0][2:] == ["2.00 / 2.00", "11.0 / 11.0", "1.5 / 1.5", "–"]
    (row,) = [line for line in cells_of(report.pooling_table(rows)) if line[0] == maps]
    assert row[2:] == [
        "–", "–", "9.00 / 9.00", "5.00 / 5.00", "3.00 / 3.00", "2.00 / 2.00", "–", "1.5 / 1.5",
        "–", "–", "6.0", "–", "–", "3.0", "–",
    ]  # fmt: skip


def test_rows_with_many_queries_are_no_others_on_a_gpu():
    """Neither the goals of a GPU nor the choice of a backend count them."""
    more = {"bytes": 1e6, "share_of_copy": 0.1, "device_ms": {"native": 1.0, "triton": 2.0}}
    rows = [{**row, **more} for row in pooling_rows()]
    assert not any(figures for group in report.gpu_figures(rows, 1.0).values() for figures in group.values())
    assert "No row has device times" in report.choice(rows)
    assert report.slowest(rows, 3) == []


def test_regressions_are_flagged():
    earlier = {"date": "2026-01-01", "rows": ROWS}
    slower = run.row_of(ROWS[0]["case"], ROWS[0]["pass"], {"eager": 6e-3, "native": 1.5e-3})
    text = report.regressions({"date": "2026-02-02", "rows": [slower, ROWS[1]]}, earlier)
    assert cells_of(text) == [["window float32 contiguous", "forward+backward", "default", "6.00", "4.00"]]
    assert "| × eager, 2026-01-01 | × eager, 2026-02-02 |" in text
    assert report.regressions({"date": "2026-02-02", "rows": ROWS}, earlier) == ""


def test_goals_of_a_gpu():
    """1 GB in 0.5 ms forward and 1.5 GB in 1 ms backward are 100 % and 75 % of a copy at 2,000 GB/s."""

    def row(case, which, size, device_ms):
        ms = {"eager": 4e-3, "compile": 2e-3, "native": 1e-3}
        return run.row_of(case, which, ms, bytes=size, device_ms=device_ms)

    rows = [
        row("window_attention big", "forward", 1e9, {"native": 0.5}),
        row("window_attention big", "forward+backward", 2.5e9, {"native": 1.5}),
        row("compatibility_pool small", "forward", 1e6, {"native": 0.01, "compile": 0.01}),
        row("compatibility_pool small", "forward+backward", 2e6, {"native": 0.02, "compile": 0.03}),
    ]
    text = report.gpu_goals(rows, 2000.0)
    assert "| large maps, window and anchor attention | 90% of a copy, forward | 1 of 1 | 1.00, window_att" in text
    assert "| large maps, window and anchor attention | 85% of a copy, backward | 0 of 1 | 0.75, window_att" in text
    assert "| large maps, window and anchor attention | 2.5 × eager | 1 of 1 | 4.00, window_attention big |" in text
    assert "| small maps | 5 × eager | 0 of 1 | 4.00, compatibility_pool small |" in text
    assert "| small maps | 1.2 × compile, on the device | 1 of 1 | 1.50, compatibility_pool small |" in text
    assert "| anchor_quantize | 8 × eager | not measured | – |" in text


def test_host_costs_are_multiples_of_an_empty_function():
    text = report.host_table({"pool": {"eager": 50.0, "native": 30.0, "triton": 40.0}, report.EMPTY: {"eager": 10.0}})
    assert "| native / empty (goal: 2.5) | triton / empty (goal: 4.5) |" in text
    assert cells_of(text) == [
        ["pool", "50.0", "30.0", "40.0", "3.0", "4.0"], [report.EMPTY, "10.0", "–", "–", "–", "–"]
    ]  # fmt: skip
    assert "empty" not in report.host_table({"pool": {"native": 30.0}}).split("|", 1)[1]


def test_scaling_table_shows_the_exponent(tmp_path):
    rows = [
        run.row_of(str(n), "images", {"eager": 3e-3 * n, "native": 1e-3 * n}, op="pool", bytes=n * 1000)
        for n in (1, 2, 4)
    ]
    assert "| images | pool | 1.000 | 4.000 | 3.0 | 1.00 |" in report.scaling_table(rows)
    report.plot_scaling(run_of(rows), tmp_path / "scaling.svg")
    assert "<svg" in (tmp_path / "scaling.svg").read_text(encoding="utf-8")


def test_every_committed_run_is_on_the_page():
    page = report.page()
    for path in COMMITTED.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["machine"] in page
    assert report.PAGE.read_text(encoding="utf-8") == page, "run `python -m benchmarks.report`"


def test_plot(tmp_path, monkeypatch):
    """The plot names machine, date, operator, case and competitors, and is reproducible byte for byte."""
    case = "compatibility_pool 2x3x4x5 float32 channels_last"
    row = run.row_of(case, "forward+backward", dict.fromkeys(("eager", "compile", "sdpa", "reference", "native"), 1e-3))
    texts = []
    monkeypatch.setitem(report._pyplot().rcParams, "svg.fonttype", "none")
    for name in ("one.svg", "two.svg"):
        report.plot(run_of([row]), tmp_path / name)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    for text in ("compatibility_pool", "2×3×4×5 channels_last", "m, 1 thread, torch 2, 2026-01-01", "attnkern"):
        assert f">{text}</" in texts[0]


def small(op, dtype=torch.float32):
    return Case(op, (2, 1, 4, 4) if op == "anchor_quantize" else (2, 6, 5, 7), dtype)


every_op = pytest.mark.parametrize("op", sorted({case.op for case in CPU_CASES}))


@every_op
def test_all_competitors_compute_the_same_result(op):
    """`calls` raises if a competitor's result is wrong; this test also runs each competitor."""
    for which in PASSES:
        for call in calls(small(op), which, CPU, compiled=None).values():
            call()


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_literal_formulas_compile_without_graph_breaks(op, dtype):
    """torch.compile captures the formula, forward and backward, as one graph."""
    torch._dynamo.reset()
    for which in PASSES:
        calls(small(op, dtype), which, CPU, {"fullgraph": True, "dynamic": False, "backend": "aot_eager"})["compile"]()


@every_op
def test_input_copies_give_the_same_results(op):
    """Copies of the inputs have their own memory and give the same results and gradients."""
    for call in calls(small(op), "forward+backward", CPU, compiled=None).values():
        first, second = call.run(0), call.run(1)
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        copies = [[*inputs.values(), *grads] for inputs, grads in map(call.work.copy, (0, 1))]
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(*copies, strict=True))


pooled = pytest.mark.parametrize("case", POOLING, ids=lambda case: f"{case.op} {case.layout}")


@pooled
def test_competitors_with_many_queries_have_the_same_gradients(case):
    """timm's layer, its folded forms and ours: results, and gradients of inputs and parameters."""
    pytest.importorskip("timm")
    ready = calls(case, "forward+backward", CPU, compiled=None)
    layer = case.op != "compatibility_pool"
    assert set(ready) == {*(["timm"] if layer else []), "sdpa", "einsum", "native"}
    found = {name: [each for each in call.run() if each is not None] for name, call in ready.items()}
    expected = found["timm" if layer else "einsum"]
    for name, results in found.items():
        results = results if layer or name == "einsum" else [results[0], *results[-2:]]
        assert len(results) == len(expected)
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result, right, atol=2e-6, rtol=2e-5)


@pooled
def test_competitors_with_many_queries_compile(case):
    pytest.importorskip("timm")
    torch._dynamo.reset()
    ready = calls(case, "forward+backward", CPU, cases.REHEARSED)
    compiled = [name for name in ready if name.endswith(" compile")]
    layers = ["timm compile", "einsum compile", "native compile"]
    assert compiled == (["einsum compile"] if case.op == "compatibility_pool" else layers)
    for name in compiled:
        ready[name]()


def test_slow_calls_have_few_turns():
    """Slow calls are measured three times, others seven times or more."""
    clock = {"now": 0.0}

    def call(seconds):
        def run():
            clock["now"] += seconds

        return run

    times = run.turns({"slow": call(2.0), "fast": call(0.25)}, 0, None, lambda: clock["now"])
    assert times == {"slow": [2.0] * 3, "fast": [0.25] * 7}
    assert run.turns({"slow": call(2.0)}, 100, None, lambda: clock["now"]) == {"slow": [2.0] * 3}
    assert len(run.turns({"fast": call(0.25)}, 10, None, lambda: clock["now"])["fast"]) == 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory on a CPU is Linux's")
def test_peak_of_the_memory():
    """The peak includes what a call has freed again when it ends, and not what was there before.

    It is measured in a new process, because malloc keeps more of what is freed the longer a process runs.
    """
    program = """
import torch
from benchmarks import run

kept = torch.ones(2**22)

def call():
    torch.ones(2**22)
    kept.add_(1)
    return torch.ones(2**23)

print(run.peak_bytes(call, torch.device("cpu")) / 2**25)
"""
    command, folder = [sys.executable, "-c", program], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert 0.95 < float(done.stdout) < 1.2


# --- the steps of a run on a GPU, tested on the CPU -----------------------------------------------------------------


class Counted:
    """A call that records the index of the input copy of each run."""

    def __init__(self, size):
        self.work = types.SimpleNamespace(bytes=size)
        self.numbers = []

    def run(self, number=0):
        self.numbers.append(number)


@pytest.mark.parametrize("size, copies", [(1000, 2), (100, 3), (7, 43)])
def test_input_copies_fill_three_times_the_cache(size, copies, monkeypatch):
    monkeypatch.setattr(run, "cache_bytes", lambda device: 100)
    call = Counted(size)
    run.device_seconds(call, CPU, budget=0)
    assert call.numbers[: max(8, copies)] == list(itertools.islice(itertools.cycle(range(copies)), max(8, copies)))
    assert set(call.numbers) == set(range(copies))
    assert copies * size >= 300


def test_device_time_is_per_call(monkeypatch):
    """The fake clock advances by one second per call."""
    call = Counted(100)
    monkeypatch.setattr(run, "mark", lambda device: float(len(call.numbers)))
    assert run.device_seconds(call, CPU, budget=0) == 1


def bench(**options):
    return run.Bench(CPU, None, copy_gb_per_s=1.0, rehearsal=True, **options)


def fail(*arguments, **inputs):
    raise RuntimeError("no luck\nat all")


def test_failed_competitor_is_reported_as_an_error(tmp_path, monkeypatch):
    competitors = cases.competitors
    monkeypatch.setattr(cases, "competitors", lambda *arguments: {"compile": fail, **competitors(*arguments)})
    store = Store(tmp_path, ABOUT)
    assert run.measure(store, bench(), [(small("compatibility_pool"), "forward")]) == 0
    (row,) = json.loads(store.path.read_text(encoding="utf-8"))["rows"]
    assert row["errors"] == {"compile": "RuntimeError: no luck"}
    assert {"eager", "sdpa", "native"} <= row["ms"].keys() == row["device_ms"].keys() == row["host_us"].keys()
    text = report.tables([row])
    assert text.count("| error ") == 0  # the table has no columns for it
    assert f"- {row['case']}, forward, compile: RuntimeError: no luck" in text
    other = {**row, "errors": {}, "device_ms": {**row["device_ms"], "compile": 1.0}}
    assert report.device_table([row, other]).count("| error ") == 2  # in the columns of the time and the ratio


def test_run_continues_after_a_case_whose_inputs_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "workload", fail)
    store = Store(tmp_path, ABOUT)
    work = [(small(op), "forward") for op in ("window_attention", "anchor_quantize")]
    assert run.measure(store, bench(), work) == 0
    assert [list(row["errors"]) for row in store.content["rows"]] == [["inputs"]] * 2
    assert "- anchor_quantize 2x1x4x4 float32 contiguous, forward, inputs: RuntimeError: no luck" in report.tables(
        store.content["rows"]
    )


def test_host_costs_are_stored_separately(tmp_path, monkeypatch):
    """Host costs are stored outside the rows; a failure is stored as a row with its error."""
    monkeypatch.setattr(cases, "host_calls", lambda device: {"empty": {"eager": int}, "broken": {"native": fail}})
    store = Store(tmp_path, ABOUT)
    for _ in range(2):
        assert run.measure(store, bench(), [(cases.HOST, "")]) == 0
    assert store.content["host_us"]["empty"]["eager"] > 0
    assert [row["errors"] for row in store.content["rows"]] == [{"broken": "RuntimeError: no luck"}]


def test_time_limit_interrupts_an_endless_loop():
    before = signal.getsignal(signal.SIGALRM)
    limit = run.TimeLimit(0.01)

    def endless():
        with limit:
            while True:
                pass

    with pytest.raises(TimeoutError, match="it took more than 0 s"):
        endless()
    assert limit.reached
    assert signal.getsignal(signal.SIGALRM) == before


def reaches_its_limit(**inputs):
    """Raises the timer's signal itself, so that the test does not depend on the speed of the machine."""
    signal.raise_signal(signal.SIGALRM)


def test_timeout_of_a_competitor_is_recorded_as_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "competitors", lambda *arguments: {"compile": reaches_its_limit})
    store = Store(tmp_path, ABOUT)
    assert run.measure(store, bench(), [(small("window_attention"), "forward")]) == 0
    assert store.content["rows"][0]["errors"]["compile"].startswith("TimeoutError: it took more than")


def test_interrupted_row_is_left_for_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "competitors", lambda *arguments: {"compile": reaches_its_limit})
    store = Store(tmp_path, ABOUT)
    work = [(small("window_attention"), "forward")]
    assert run.measure(store, bench(), work, end=run.time.monotonic() + run.REHEARSED_LIMIT / 2) == run.UNFINISHED
    assert store.content["rows"] == []
    assert store.content["begun"] == {}
    assert run.measure(store, bench(), work, end=run.time.monotonic() - 1) == run.UNFINISHED


def test_row_that_ended_the_process_twice_is_skipped(tmp_path, monkeypatch):
    """Other rows are still measured. The start of a row is on disk while the row is measured."""
    store = Store(tmp_path, ABOUT)
    first, second = ((small(op), "forward") for op in ("window_attention", "anchor_quantize"))

    def end_process(*arguments):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(run.Bench, "operator", end_process)
        for _ in range(2):
            with pytest.raises(SystemExit):
                run.measure(Store.of(store.path) if store.path.exists() else store, bench(), [first, second])
    store = Store.of(store.path)
    assert run.measure(store, bench(), [first, second]) == 0
    assert [list(row.get("errors", {})) for row in store.content["rows"]] == [["row"], []]
    assert store.content["begun"] == {}


def test_stored_rows_are_remeasured_only_on_request(tmp_path, monkeypatch):
    store, work = Store(tmp_path, ABOUT), [(small("anchor_quantize"), "forward")]
    measured = []

    def operator(self, attempts, case, which):
        measured.append(case)
        return run.row_of(str(case), which, {})

    monkeypatch.setattr(run.Bench, "operator", operator)
    for again in (False, False, True):
        assert run.measure(store, bench(), work, again=again) == 0
    assert len(measured) == 2
    assert len(store.content["rows"]) == 1


# --- native or Triton ------------------------------------------------------------------------------------------------


def pair(op, shape, native, triton, which="forward+backward"):
    return run.row_of(f"{op} {shape} float32 contiguous", which, {}, device_ms={"native": native, "triton": triton})


def test_backend_choice_from_measured_rows():
    """A rule is a bound on the positions or a single backend; it never depends on the number of images."""
    rows = [
        pair("window_attention", "32x256x7x7", 1.0, 2.0),
        pair("window_attention", "64x256x14x14", 1.0, 1.5),
        pair("window_attention", "32x256x32x32", 3.0, 1.0),
        pair("window_attention", "1x256x56x56", 3.0, 1.0),
        pair("compatibility_pool", "32x256x7x7", 3.0, 1.0, "forward"),
        pair("compatibility_pool", "32x256x7x7", 2.0, 1.0),
        run.row_of("compatibility_pool 9x9x9x9 float32 contiguous", "forward", {}, device_ms={"native": 1.0}),
    ]
    text = report.choice(rows)
    rule = "triton from 1024 positions on, native below (1.000; native alone 1.732, triton alone 1.316; 4 cases)"
    assert f"- window_attention, float32, contiguous: {rule}" in text
    alone = f"triton (1.000; native alone {math.sqrt(6):.3f}, triton alone 1.000; 1 cases)"
    assert f"- compatibility_pool, float32, contiguous: {alone}" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| window_attention 32x256x32x32")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        "forward+backward",
        "3000.0",
        "1000.0",
        "triton",
        "3.00",
    ]
    assert "9x9x9x9" not in text
    assert "both native and Triton" in report.choice([])


def test_simplest_choice_within_the_tolerance_wins():
    def rows(few, many):
        return [pair("window_attention", "8x64x7x7", 1.0, few), pair("window_attention", "8x512x7x7", 1.0, many)]

    assert "contiguous: native (1.003; " in report.choice(rows(0.995, 2.0))
    assert "contiguous: triton from 512 channels on, native below (" in report.choice(rows(2.0, 0.5))


def test_the_slowest_rows():
    """Large maps come first, then the lowest share of a copy; one row per operator and pass, our faster backend."""

    def row(op, shape, share, size=2 * report.LARGE, which="forward"):
        ms = {"native": 2.0, "triton": 1.0, "eager": 0.5}
        return run.row_of(f"{op} {shape}", which, {}, device_ms=ms, share_of_copy=share, bytes=size)

    rows = [
        row("window", "big", 0.5), row("window", "bigger", 0.4), row("window", "big", 0.9, which="forward+backward"),
        row("pool", "small", 0.1, size=10), run.row_of("net", report.TRAINING, {"native": 1.0}),
    ]  # fmt: skip
    assert report.slowest(rows, 9) == [
        ("window bigger", "forward", "triton"), ("window big", "forward+backward", "triton"),
        ("pool small", "forward", "triton"),
    ]  # fmt: skip
    assert len(report.slowest(rows, 2)) == 2


def test_parse_ncu_output():
    """ncu writes one line per metric, mixed with its own messages and the program's output."""
    kernels = profile.parse((Path(__file__).parents[1] / "data/ncu.csv").read_text(encoding="utf-8"))
    assert kernels == [
        {"kernel": "attnkern::window_fwd", "µs": "53.2", "MB read": "51.4", "registers": "96"},
        {"kernel": "_anchor_fwd_kernel", "µs": "2.5"},
    ]
    table = report.profile_table("a row", kernels)
    assert "| attnkern::window_fwd | 53.2 | 51.4    | 96        |" in table
    assert "| _anchor_fwd_kernel   | 2.5  | –       | –         |" in table
    assert profile.parse("==ERROR== ERR_NVGPUCTRPERM") == []


@pytest.mark.parametrize("which", report.NETWORK_PASSES)
def test_passes_of_a_network(which):
    (name,) = cases.TINY_MODELS
    if which == report.ATTENTION:
        ready = cases.attention_calls(name, CPU)
    else:
        ready = cases.network_calls(name, which, CPU, compiled=False)
    assert {"reference", "native"} <= ready.keys()
    for call in ready.values():
        call()


@pytest.mark.parametrize("name", cases.TIMM_MODELS)
def test_timm_networks_are_measured_with_and_without_their_pools(name, monkeypatch):
    """A training step of the network, and its head alone, for timm's own code and for ours."""
    pytest.importorskip("timm")
    small = {
        "resnet50_clip": ({"width_factor": 0.125}, 64, 2),
        "vit_base_patch32_siglip_256": ({"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 64}, 64, 2),
    }
    monkeypatch.setitem(cases.NETWORKS, name, small[name])
    for which in report.NETWORK_PASSES:
        found = (
            cases.attention_calls(name, CPU)
            if which == report.ATTENTION
            else cases.network_calls(name, which, CPU, compiled=False)
        )
        assert list(found) == ["timm", "native"]
        for call in found.values():
            call()


def test_shares_of_attention():
    rows = [
        run.row_of("net", report.TRAINING, {"reference": 0.1, "native": 0.08}),
        run.row_of("net", report.ATTENTION, {"reference": 0.03, "native": 0.008}),
    ]
    assert "- net: 30.0% with reference, 10.0% with native" in report.summary(run_of(rows))


def test_competitor_with_wrong_results_is_rejected(monkeypatch):
    monkeypatch.setattr(cases, "_sdpa", lambda local, query: cases.attnkern.CompatibilityPooled(query, None, None))
    with pytest.raises(AssertionError, match="sdpa computes compatibility_pool"):
        calls(small("compatibility_pool"), "forward", CPU, compiled=None)
