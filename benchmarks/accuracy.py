"""`make accuracy`: errors of every function, dtype and competitor in units in the last place, outputs and gradients.

Prints one table a function and writes JSON to benchmarks/results/accuracy/ and all of it to docs/accuracy.md;
``--page`` writes the page again from the committed JSON. With ``--device cuda`` all competitors run on the GPU.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import numpy as np

from benchmarks import truth
from benchmarks.report import markdown
from benchmarks.store import COMMITTED, ROOT

FOLDER = COMMITTED / "accuracy"
PAGE = ROOT / "docs/accuracy.md"

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: On a CPU the CUDA kernels run under the emulation of the tests, and Triton interprets.
COMPETITORS = {
    "cpu": ("native", "CUDA C++", "Triton", "reference", "eager", "compile"),
    "cuda": ("native", "Triton", "reference", "eager", "compile"),
}
#: (N, C, H, W), layout, and how many batches are drawn: enough numbers for a percentile, several numbers of summands.
CASES = {
    "window_map": [((128, 0, 14, 14), "contiguous", 3), ((8, 0, 56, 56), "contiguous", 1)],
    "window_attention": [((192, 16, 7, 7), "contiguous", 1), ((8, 256, 14, 14), "channels_last", 1)],
    "anchor_quantize": [((16, 1, 14, 14), "contiguous", 32)],
    "anchor_attention": [((16, 32, 14, 14), "contiguous", 2), ((8, 256, 14, 14), "channels_last", 1)],
    "compatibility_pool": [
        ((192, 16, 7, 7), "contiguous", 1), ((4, 2048, 7, 7), "contiguous", 1), ((2, 8, 128, 128), "channels_last", 1)
    ],
}  # fmt: skip
#: Results that may be small compared with the terms they are computed from. They have a second row, in ulp of this:
MADE_OF = {
    "map": "its image's largest",
    **dict.fromkeys(("grad_a", "grad_anchors", "pooled", "scores"), "Σ\\|terms\\|"),
    **dict.fromkeys(("grad_rectangle", "grad_local", "grad_query"), "Σ\\|terms\\|"),
}
ENOUGH = 1000  # numbers that a 99.9th percentile needs
#: Rows of an earlier run are kept if these are the same.
SAME = ("machine", "threads", "python", "torch", "attnkern", "numpy", "libc", "device", "cases")

# --- measuring -------------------------------------------------------------------------------------------------------


def ulp(magnitude: np.ndarray, dtype: str) -> np.ndarray:
    """The step of ``dtype`` at a magnitude: 2^(⌊log₂|t|⌋ − p + 1), and among denormals and at zero their one step."""
    import torch

    info = torch.finfo(getattr(torch, dtype))
    return np.ldexp(np.longdouble(info.eps), np.frexp(np.maximum(magnitude, info.smallest_normal))[1] - 1)


class Errors(NamedTuple):
    """What is kept of the errors of one result by one competitor."""

    count: int
    max: float
    p999: float | None  #: None of fewer than ENOUGH numbers

    @classmethod
    def of(cls, parts: list[np.ndarray]) -> "Errors":
        errors = np.nan_to_num(np.concatenate(parts).astype(np.float64), nan=math.inf)
        percentile = np.quantile(errors, 0.999, method="higher") if errors.size >= ENOUGH else None
        return cls(errors.size, *(None if e is None else float(f"{e:.4g}") for e in (errors.max(), percentile)))


def wide(tensors: dict) -> dict[str, np.ndarray]:
    return {key: tensor.cpu().double().numpy().astype(np.longdouble) for key, tensor in tensors.items()}


class Batch(NamedTuple):
    """One seeded draw: what every competitor gets, and what is true of exactly these numbers."""

    inputs: dict
    gradients: dict  #: of the outputs, numbers of the features' dtype
    truth: dict[str, np.ndarray]
    terms: dict[str, np.ndarray]  #: what MADE_OF says


def draw(op: str, shape: tuple, layout: str, dtype: str, seed: int, device: str) -> Batch:
    import torch

    from attnkern import testing

    kind = getattr(torch, dtype)
    name = "window_attention" if op == "window_map" else op  # of features without a channel
    drawn = testing.OPS[name]
    inputs = testing.make_inputs(name, shape, kind, layout=layout, seed=seed, device=device)
    outputs = drawn.function(**inputs, backend="reference")._asdict()
    # In the features' dtype, so that nobody has to round them first.
    gradients = {key: grad.to(kind) for key, grad in testing.output_gradients(outputs, seed).items()}
    exact = getattr(truth, op)(wide(inputs), wide(gradients), shape[2:])

    def doubles(arrays):
        kinds = {key: np.int64 if key == "indices" else np.float64 for key in arrays}
        return {key: torch.from_numpy(np.asarray(value, kinds[key])) for key, value in arrays.items()}

    # Σ|terms| is a scale: for that float64 will do.
    terms = drawn.terms(*map(doubles, (wide(inputs), exact, wide(gradients))))
    if "map" in terms:
        terms["map"] = terms["map"].amax((1, 2), keepdim=True).expand_as(terms["map"])
    terms = {key: terms[key].numpy().reshape(exact[key].shape) for key in MADE_OF.keys() & exact.keys()}
    # An anchor that nothing chose sums nothing: its batch's largest sum stands in.
    terms = {key: np.where(scale == 0, scale.max(), scale) for key, scale in terms.items()}
    if op == "window_map":
        inputs, gradients = {"rectangle": inputs["rectangle"]}, {"map": gradients["map"]}
    return Batch(inputs, gradients, exact, terms)


class Map(NamedTuple):
    map: object


def function_of(competitor: str, op: str, size: tuple):
    """What a competitor calls with an op's inputs by name."""
    import torch

    import attnkern
    from attnkern import testing

    literal = getattr(testing, f"literal_{op}")
    if competitor == "eager":
        function = literal
    elif competitor == "compile":
        torch._dynamo.reset()  # past its limit of compilations a function would silently run as it is
        function = torch.compile(literal, dynamic=False)
    else:
        backend = {"CUDA C++": "native", "Triton": "triton"}.get(competitor, competitor)
        function = functools.partial(getattr(attnkern, op), backend=backend)
    return (lambda rectangle: Map(function(rectangle, size))) if op == "window_map" else function


@functools.cache
def _host_kernels():
    """Operators of the CUDA kernels under the emulation of the tests."""
    from attnkern import _ops

    sys.path.append(str(ROOT / "tests"))
    import cuda_on_host

    cuda_on_host.load()
    return _ops.Handles("attnkern_host")


def running(competitor: str):
    """The context that a competitor runs in."""
    from attnkern import _ops

    if competitor == "CUDA C++":
        return mock.patch.dict(_ops.BACKENDS, native=_host_kernels())
    return contextlib.nullcontext()


def missing(competitor: str, dtype: str, device: str) -> bool:
    """Whether this competitor does not take this dtype."""
    import torch

    from attnkern import _backend

    if dtype == "float64" and not truth.WIDER:
        return True
    backend = {"native": "native", "CUDA C++": "native", "Triton": "triton"}.get(competitor, "reference")
    return _backend.reason(backend, torch.device(device), getattr(torch, dtype)) is not None


def measure(op: str, dtype: str, competitor: str, cases: list, device: str = "cpu") -> list[dict]:
    """A row for each result, and one more for each that MADE_OF names; of indices the number of wrong ones."""
    from attnkern import testing

    errors, wrong = {}, []
    for shape, layout, batches in cases:
        function = function_of(competitor, op, shape[2:])
        for seed in range(batches):
            batch = draw(op, shape, layout, dtype, seed, device)
            with running(competitor):
                got = testing.evaluate(function, batch.inputs, batch.gradients)
            if "indices" in got:
                wrong.append(got.pop("indices").cpu().numpy() != batch.truth["indices"])
                got.pop("counts")
            for key, value in wide(got).items():
                error = np.abs(value - batch.truth[key])
                units = {"itself": np.abs(batch.truth[key])}
                if key in MADE_OF:
                    units[MADE_OF[key]] = batch.terms[key]
                for of, magnitude in units.items():
                    errors.setdefault((key, of), []).append(np.ravel(error / ulp(magnitude, dtype)))
    about = {"op": op, "dtype": dtype, "competitor": competitor}
    rows = [about | {"result": key, "of": of} | Errors.of(parts)._asdict() for (key, of), parts in errors.items()]
    if wrong:
        wrong = np.concatenate([part.ravel() for part in wrong])
        rows.append(about | {"result": "indices", "count": wrong.size, "wrong": int(wrong.sum())})
    return rows


# --- showing ---------------------------------------------------------------------------------------------------------


def number(error: float | None) -> str:
    if error is None:
        return "–"
    if not math.isfinite(error):
        return "∞"
    if 0 < error < 0.005:
        return "<0.01"
    if error >= 99_999.5:
        return f"{error:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{error:,.0f}" if error >= 99.5 else f"{error:.1f}" if error >= 9.95 else f"{error:.2f}"


def cell(row: dict | None) -> str:
    if row is None:
        return "–"
    if row["result"] == "indices":
        return f"{row['wrong'] / row['count']:.2%}" if row["wrong"] else "0"
    return f"{number(row['max'])} / {number(row['p999'])}"


def table(rows: list[dict]) -> str:
    """A function's rows: max / 99.9th percentile of every competitor."""
    columns = list(dict.fromkeys(row["competitor"] for row in rows))
    found = {}
    for row in rows:
        found.setdefault((row["dtype"], row["result"], row.get("of")), {})[row["competitor"]] = row
    lines = []
    for (dtype, result, of), by_competitor in found.items():
        count = f"{next(iter(by_competitor.values()))['count']:,}"
        unit = "share that is wrong" if result == "indices" else of
        lines.append([dtype, result, unit, count, *(cell(by_competitor.get(name)) for name in columns)])
    return markdown(["dtype", "result", "in ulp of", "numbers", *columns], lines)


def glance(rows: list[dict]) -> str:
    """The largest error of any result by function and dtype, in ulp of what the result is made of."""
    columns = list(dict.fromkeys(row["competitor"] for row in rows))
    worst = {}
    for row in rows:
        if "max" in row and (row["of"] != "itself" or row["result"] not in MADE_OF):
            by_competitor = worst.setdefault((row["op"], row["dtype"]), {})
            by_competitor[row["competitor"]] = max(row["max"], by_competitor.get(row["competitor"], 0))
    lines = [[*key, *(number(found.get(name)) for name in columns)] for key, found in worst.items()]
    return markdown(["function", "dtype", *columns], lines)


def body(content: dict) -> str:
    heading = f"{content['machine']}, torch {content['torch']}, numpy {content['numpy']}, {content['date']}"
    caption = "The largest error of any output or gradient, in ulp of Σ\\|terms\\| where that has a row:"
    parts = [heading, caption, glance(content["rows"]), worse(content["rows"])]
    for op in dict.fromkeys(row["op"] for row in content["rows"]):
        drawn = "; ".join(
            f"{batches} × {'×'.join(map(str, shape[:1] * (op == 'window_map') + shape[2:] if 0 in shape else shape))} "
            f"{layout}" for shape, layout, batches in content["cases"][op]
        )  # fmt: skip
        parts.append(f"### {op}\n\nBatches of {drawn}.\n")
        parts.append(table([row for row in content["rows"] if row["op"] == op]))
    return "\n\n".join(parts)


INTRODUCTION = """# Accuracy

Written by `make accuracy` from the runs in `benchmarks/results/accuracy/`. Every function, forward and backward with
gradients of all its outputs; seeds count from 0, all tensors have the row's dtype, options have their defaults.

- **Truth** is computed from exactly the rounded numbers that every competitor gets, by formulas and derivatives written
  independently of attnkern (`benchmarks/truth.py`) in numpy's longdouble, 11 bits more than float64 on x86.
- **An ulp** is the step of the row's dtype at the true value, 2^(⌊log₂|t|⌋ − p + 1) of p significant bits; among
  denormals and at zero it is the denormals' one step. A correctly rounded result is at most 0.50 away. The row's dtype
  also counts where a result is wider: for half-precision features attnkern's maps, attention, scores and losses are
  float32, and their errors are far below 0.50 where nothing cancels.
- **Σ|terms|**: a sum that cancels may be any number of its own ulp away in any implementation. Such results have a
  second row, in ulp of the sum of the magnitudes of the terms (for a window's map: of its image's largest value, since
  far outside a window the exponent is large, and with it the relative error of the exponential).
- Cells are the largest error / the 99.9th percentile; – stands for too few numbers, or for a dtype that a backend
  does not take; ∞ for a result that overflowed or is NaN. For indices the cell is the share that is wrong. The column
  *numbers* says how many values were compared. Batches are given as their number × N×C×H×W (N×H×W for `window_map`).
- **Competitors**: `eager` is the papers' formula in PyTorch as one would write it (`attnkern.testing`), in the row's
  dtype; `compile` is that under torch.compile; `reference` is attnkern's plain PyTorch. On a CPU the CUDA C++ kernels
  run under the emulation of the tests, with the C library's exponentials, and Triton is interpreted by numpy, which
  adds a tile's channels one after the other where a GPU adds in parts. Neither number is that of a GPU. All run on one
  thread.

What stands out: in bfloat16 and float16 attnkern computes in float32 and rounds each result once, gradients included;
the formulas written in PyTorch round every step, and so does torch.compile between its kernels. In float32 and float64
all errors have the same order of magnitude, except those listed after each summary and these: eager's `values` are
a + (v − a), which is not v, and its `map` underflows far outside the window. Where eager's rounded distances choose a
wrong anchor, all results that depend on the index are far off.
"""


def worse(rows: list[dict]) -> str:
    """Lists the results for which a kernel's largest error is over twice eager's and over one ulp."""
    found = {}
    for row in rows:
        if "max" in row and (row["of"] != "itself" or row["result"] not in MADE_OF):
            found.setdefault((row["op"], row["dtype"], row["result"]), {})[row["competitor"]] = row["max"]
    lines = []
    for key, errors in found.items():
        kernels = [
            name for name in ("native", "CUDA C++", "Triton") if errors.get(name, 0) > max(1, 2 * errors["eager"])
        ]
        if kernels:
            shown = ", ".join(f"{name} {number(errors[name])}" for name in (*kernels, "eager", "compile"))
            lines.append(f"- {' '.join(key)}: {shown}")
    caption = "Results for which a kernel's largest error is over twice eager's and over one ulp:\n"
    return "\n".join([caption, *(lines or ["- none"])])


def page() -> str:
    parts = [INTRODUCTION]
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"## {content['machine']}\n\n{body(content)}\n")
    return "\n".join(parts)


def write(content: dict) -> None:
    """A machine's JSON, a row a line, and the page. What was not measured now stays where all else is the same."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / (re.sub(r"[^a-z0-9]+", "-", content["machine"].lower()).strip("-") + ".json")
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = json.loads(json.dumps(content))  # tuples as lists, like what was read
    if all(before.get(key) == content[key] for key in SAME):
        groups = {}
        for rows in (before["rows"], content["rows"]):
            new = {}
            for row in rows:
                new.setdefault((row["op"], row["dtype"], row["competitor"]), []).append(row)
            groups |= new
        content = content | {"rows": [row for group in groups.values() for row in group]}
    rows = ",\n".join(json.dumps(row) for row in content["rows"])
    about = json.dumps({key: value for key, value in content.items() if key != "rows"})
    path.write_text(f'{about[:-1]}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=COMPETITORS, default="cpu")
    parser.add_argument("--only", default="", help="functions, dtypes and competitors whose name contains this")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page again")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    # Read when torch and attnkern are imported, by the processes below. Sums depend on the number of threads.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if options.device == "cpu" else "0"}

    import torch

    from benchmarks.run import machine

    about = machine(torch.device(options.device)) | {"numpy": np.__version__, "libc": " ".join(platform.libc_ver())}
    content = about | {"device": options.device, "cases": CASES, "rows": []}
    work = [
        (op, dtype, name, CASES[op], options.device)
        for op in CASES for dtype in DTYPES for name in COMPETITORS[options.device]
        if any(options.only in word for word in (op, dtype, name)) and not missing(name, dtype, options.device)
    ]  # fmt: skip
    if "CUDA C++" in COMPETITORS[options.device]:
        _host_kernels()  # built once
    began = time.monotonic()
    processes = len(os.sched_getaffinity(0)) if options.device == "cpu" else 1
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done, rows in enumerate(pool.map(measure, *zip(*work, strict=True)), 1):
            content["rows"] += rows
            place = f"[{done}/{len(work)}, {time.monotonic() - began:.0f} s] {' '.join(work[done - 1][:3])}"
            print(f"\r\033[K{place}", end="", file=sys.stderr, flush=True)
    print("\r\033[K", end="", file=sys.stderr)
    write(content)
    print(PAGE.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
