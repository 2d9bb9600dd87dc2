"""The benchmark's bookkeeping; no timing."""

import json

import pytest
import torch

from benchmarks import report, run
from benchmarks.cases import CPU_CASES, GPU_CASES, PASSES, Case, calls

ROWS = [
    run.row_of("window float32 contiguous", "forward+backward", {"eager": 6e-3, "compile": 3e-3, "native": 1e-3}),
    run.row_of("pool float32 contiguous", "forward+backward", {"eager": 4e-3, "compile": 1e-3, "native": 2e-3}),
]


def test_shards_cover_every_case_once():
    parts = [run.shard(GPU_CASES, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(str(case) for part in parts for case in part) == sorted(map(str, GPU_CASES))
    assert parts[0][0] == GPU_CASES[0]
    with pytest.raises(ValueError, match="GPU_SHARD must be i/n"):
        run.shard(GPU_CASES, "4/3")


def test_losses_stay_in_the_table():
    assert [row["times"]["compile"] for row in ROWS] == [pytest.approx(3), pytest.approx(0.5)]
    text = report.table(ROWS)
    assert "| 3.00" in text
    assert "| 0.50" in text
    verdict = report.verdict(ROWS)
    assert "met: 3.46 × eager" in verdict
    assert "MISSED: 1.22 × torch.compile by geometric mean" in verdict
    assert "MISSED: 0.50 × torch.compile at the slowest, pool" in verdict


def test_store_resumes(tmp_path):
    path = tmp_path / "results.json"
    run.Store(path, {"machine": "m"}, resume=True).add(ROWS[0])
    again = run.Store(path, {"machine": "m"}, resume=True)
    assert again.has("window float32 contiguous", "forward+backward")
    assert not again.has("window float32 contiguous", "forward")
    again.add(ROWS[1])
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert run.Store(path, {"machine": "m"}, resume=False).content["rows"] == []


def test_regressions_are_flagged():
    earlier = {"date": "2026-01-01", "rows": ROWS}
    slower = run.row_of(ROWS[0]["case"], ROWS[0]["pass"], {"eager": 6e-3, "native": 1.5e-3})
    (line,) = report.regressions({"rows": [slower, ROWS[1]]}, earlier)
    assert line == "- window float32 contiguous, forward+backward: 4.00 × eager, was 6.00 (2026-01-01)"


def test_targets_of_a_gpu():
    """1 GB forward at 0.5 ms and 2.5 GB in all at 1.5 ms, beside a copy of 2,000 GB/s: 100 % and 75 % of it."""

    def row(case, which, size, graph_ms):
        ms = {"eager": 4e-3, "compile": 2e-3, "native": 1e-3}
        return run.row_of(case, which, ms, bytes=size, graph_ms=graph_ms)

    rows = [
        row("window_attention big", "forward", 1e9, {"native": 0.5}),
        row("window_attention big", "forward+backward", 2.5e9, {"native": 1.5}),
        row("compatibility_pool small", "forward", 1e6, {"native": 0.01, "compile": 0.01}),
        row("compatibility_pool small", "forward+backward", 2e6, {"native": 0.02, "compile": 0.03}),
    ]
    text = report.gpu_verdict(rows, 2000.0)
    assert "| large maps, window and anchor attention | 90% of a copy, forward | 1 of 1 | 1.00, window_att" in text
    assert "| large maps, window and anchor attention | 85% of a copy, backward | 0 of 1 | 0.75, window_att" in text
    assert "| large maps, window and anchor attention | 2.5 × eager | 1 of 1 | 4.00, window_attention big |" in text
    assert "| small maps | 5 × eager | 0 of 1 | 4.00, compatibility_pool small |" in text
    assert "| small maps | 1.2 × compile, in graphs | 1 of 1 | 1.50, compatibility_pool small |" in text
    assert "| anchor_quantize | 8 × eager | not measured | – |" in text


def test_host_costs_above_the_target_are_missed():
    text = report.host_table({"pool": {"eager": 50.0, "native": 30.0, "triton": 40.0}, "window": {"native": 20.0}})
    assert "- MISSED: 30 µs of pool through native (target: at most 25)" in text
    assert text.count("MISSED") == 1


def test_scaling_shows_the_exponent(tmp_path):
    rows = [
        run.row_of(str(n), "images", {"eager": 3e-3 * n, "native": 1e-3 * n}, op="pool", bytes=n * 1000)
        for n in (1, 2, 4)
    ]
    assert "| images | pool | 1.000 | 4.000 | 3.0 | 1.00 |" in report.scaling_table(rows)
    report.plot_scaling(rows, tmp_path / "scaling.svg")
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


def test_every_committed_run_is_on_the_page():
    page = report.page()
    for path in report.RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["machine"] in page
    assert report.PAGE.read_text() == page, "run `python -m benchmarks.report`"


def test_plot(tmp_path):
    report.plot(ROWS, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<svg" in drawn
    assert "legend" in drawn


@pytest.mark.parametrize("op", sorted({case.op for case in CPU_CASES}))
def test_every_competitor_computes_the_same(op):
    """`calls` refuses a competitor whose result is wrong; here each of them runs."""
    case = Case(op, (2, 1, 4, 4) if op == "anchor_quantize" else (2, 6, 5, 7))
    for which in PASSES:
        for call in calls(case, which, torch.device("cpu"), compiled=False).values():
            call()


@pytest.mark.parametrize("which", report.NETWORK_PASSES)
def test_passes_of_a_network(which, monkeypatch):
    from benchmarks import cases

    monkeypatch.setitem(cases.MODELS, "vgg_aib_qt", ({"width": 0.05}, 32, 2))
    device = torch.device("cpu")
    if which == report.ATTENTION:
        ready = cases.attention_calls("vgg_aib_qt", device)
    else:
        ready = cases.network_calls("vgg_aib_qt", which, device, compiled=False)
    assert {"reference", "native"} <= ready.keys()
    for call in ready.values():
        call()


def test_shares_of_attention():
    rows = [
        run.row_of("net", report.TRAINING, {"reference": 0.1, "native": 0.08}),
        run.row_of("net", report.ATTENTION, {"reference": 0.03, "native": 0.008}),
    ]
    assert "- net: 30.0% with reference, 10.0% with native" in report.tables(rows)


def test_a_wrong_competitor_is_refused(monkeypatch):
    from benchmarks import cases

    monkeypatch.setattr(cases, "_sdpa", lambda local, query: cases.attnkern.CompatibilityPooled(query, None, None))
    with pytest.raises(AssertionError, match="sdpa computes compatibility_pool"):
        calls(Case("compatibility_pool", (2, 6, 5, 7)), "forward", torch.device("cpu"), compiled=False)
