"""Errors in ulp: they are measured correctly, planted errors are found, and the page matches the committed JSON."""

import math

import numpy as np
import pytest
import torch

import attnkern
from benchmarks import accuracy, truth

SMALL = {
    op: [((3, 0 if op == "window_map" else 1 if op == "anchor_quantize" else 5, 6, 7), layout, 1)]
    for op, layout in zip(accuracy.CASES, ("contiguous", "channels_last") * 3, strict=False)
}
MEASURED = [(op, name, dtype) for op in SMALL for name in ("native", "reference", "eager") for dtype in accuracy.DTYPES]
#: One is enough, because compiling takes seconds.
MEASURED.append(("anchor_quantize", "compile", "bfloat16"))


def rows(op, dtype, competitor):
    """By result and unit."""
    if accuracy.missing(competitor, dtype, "cpu"):
        pytest.skip(f"{competitor} cannot take {dtype} here")
    return {(row["result"], row.get("of")): row for row in accuracy.measure(op, dtype, competitor, SMALL[op])}


def test_units_in_the_last_place():
    numbers = np.array([1.0, 1.99, 2.0, 0.75, 0.0, 2.0**-126, 2.0**-140], np.longdouble)
    steps = [2.0**-23, 2.0**-23, 2.0**-22, 2.0**-24, 2.0**-149, 2.0**-149, 2.0**-149]
    assert accuracy.ulp(numbers, "float32").tolist() == steps
    assert accuracy.ulp(np.longdouble([1.0, 0.0]), "bfloat16").tolist() == [2.0**-7, 2.0**-133]
    assert accuracy.ulp(np.longdouble([1.0, 0.0]), "float16").tolist() == [2.0**-10, 2.0**-24]
    assert accuracy.ulp(np.longdouble([1.0, 0.0]), "float64").tolist() == [2.0**-52, 2.0**-1074]


@pytest.mark.parametrize("op, competitor, dtype", MEASURED)
def test_numbers_of_the_right_order(op, competitor, dtype):
    """At most a few dozen roundings of the terms of a result; attnkern rounds half-precision results once."""
    found = rows(op, dtype, competitor)
    ours = competitor in ("native", "reference")
    results = {result for result, _ in found}
    assert results >= {"map": {"map", "grad_rectangle"}, "pool": {"pooled", "attention", "scores", "grad_local"}}.get(
        op.split("_")[-1], set()
    )
    for (result, of), row in found.items():
        assert row["count"] > 0
        if result == "indices":
            assert row["wrong"] == 0 or not ours
        elif ours and (of != "itself" or result not in accuracy.MADE_OF):
            assert row["max"] <= (0.51 if "16" in dtype else 40), (result, of)
    if dtype == "bfloat16" and competitor == "eager":  # the literal formulas round each step, fused ones only some
        worst = max(row["max"] for row in found.values() if "max" in row and row["of"] == "itself")
        assert worst > 1


def test_a_planted_error_shows(monkeypatch):
    """Values off by 8 ε are 8 to 16 ulp away, one wrong index counts, and a NaN gradient is an infinite error."""
    right = attnkern.anchor_quantize

    def wrong(a, anchors, backend):
        found = right(a, anchors, backend=backend)
        indices = found.indices.clone()
        indices[0] = (indices[0] + (torch.arange(42).view(1, 6, 7) == 3)) % 7
        return found._replace(
            values=found.values * (1 + 8 * torch.finfo(a.dtype).eps),
            indices=indices,
            anchor_loss=found.anchor_loss * math.nan,
        )

    before = rows("anchor_quantize", "float32", "reference")
    monkeypatch.setattr(attnkern, "anchor_quantize", wrong)
    after = rows("anchor_quantize", "float32", "reference")
    assert before["values", "itself"]["max"] == 0
    assert 8 <= after["values", "itself"]["max"] <= 16.5
    assert (before["indices", None]["wrong"], after["indices", None]["wrong"]) == (0, 1)
    for key in (("anchor_loss", "itself"), ("grad_anchors", accuracy.MADE_OF["grad_anchors"])):
        assert before[key]["max"] < 40
        assert after[key]["max"] == math.inf
        assert accuracy.number(after[key]["max"]) == "∞"


@pytest.mark.skipif(not truth.WIDER, reason="numpy's longdouble is float64 here")
def test_truth_has_more_digits_than_float64():
    """Against it float64 has as many ulp of error as float32."""
    by_dtype = [
        rows("compatibility_pool", dtype, "reference")["scores", "Σ\\|terms\\|"] for dtype in ("float32", "float64")
    ]
    assert all(0.2 < row["max"] < 4 for row in by_dtype)


def test_tables_show_who_is_worse():
    def row(competitor, result, of, largest, percentile):
        about = {"op": "pool", "dtype": "float32", "competitor": competitor, "result": result, "of": of}
        return about | {"count": 2000, "max": largest, "p999": percentile}

    made_of = accuracy.MADE_OF["pooled"]
    given = [
        row("native", "pooled", "itself", 123_456.0, 700.0), row("native", "pooled", made_of, 3.0, 0.001),
        row("eager", "pooled", "itself", 12.0, 7.0), row("eager", "pooled", made_of, 1.5, None),
    ]  # fmt: skip
    text = accuracy.table(given)
    assert "| 1e5 / 700 " in text
    assert "| 3.00 / <0.01 | 1.50 / –" in text
    assert accuracy.glance(given).splitlines()[-1].replace(" ", "") == "|pool|float32|3.00|1.50|"
    compiled = [row | {"competitor": "compile"} for row in given[2:]]
    assert "- none" in accuracy.worse(given + compiled)
    given[1]["max"] = 3.01
    assert "- pool float32 pooled: native 3.01, eager 1.50, compile 1.50" in accuracy.worse(given + compiled)


def test_the_page_is_what_was_measured():
    assert accuracy.PAGE.read_text(encoding="utf-8") == accuracy.page(), "run `python -m benchmarks.accuracy --page`"
