"""Results as tables and plots: a page for each run, and docs/performance.md with the published runs of every machine.

``python -m benchmarks.report`` writes the pages and plots of the published runs again from their JSON files.
``--publish FILE.json`` publishes a run: it copies the file to benchmarks/results/ first, and never over another run;
``--publish newest`` takes the newest one of build/bench/ (`make bench-publish`). ``--choice FILE.json`` compares the
native kernels with Triton's, row by row, and prints the rule for the automatic choice that follows.
"""

import argparse
import itertools
import json
import math
import re
import shutil
import statistics
from pathlib import Path

from benchmarks.store import COMMITTED, RESULTS, ROOT, name_of, unused

PAGE = ROOT / "docs/performance.md"
#: Passes of a network, and the attention in the first of them alone.
TRAINING, INFERENCE, ATTENTION = NETWORK_PASSES = ("training step", "inference", "attention of a training step")

#: above the latencies of a GPU
LATENCY = (
    "Latency of a single call, launch and wait included, after the L2 cache is flushed, and the host's time for a call:"
)

#: Goals for forward and backward, by suite: geometric means over eager and over torch.compile, and the slowest row over
#: torch.compile. Those of CORE are for the default process.
GOALS = {"": (3, 1.3, 1), "full": (4, 1.5, 1)}
CORE_GOALS = (6.5, 2.2, 1.2)
CORE = re.compile(r"(window_attention|compatibility_pool|anchor_quantize) \S+ float32 contiguous$")
#: above the tables of goals
ABOUT_GOALS = (
    "The goals were set for the machines whose runs are published in `benchmarks/results/`. A goal that is not reached "
    "on another machine does not mean that anything is wrong with it or with the installation."
)
#: above a table of both processes, benchmarks.run.PROCESSES
BOTH = "Where a cell has two numbers, the first is from the default process and the second from the tuned one:"
#: A row is measured again if the interquartile range of a competitor's times exceeds this share of their median.
NOISY = 0.25
#: at the start of a run on a busy machine
BUSY = "The machine is busy (load average {load:.1f} on {cores} cores). If that lasts, the times will not be reliable."
OURS = ("native", "triton")
#: Names in plots.
LABELS = {
    "compile": "torch.compile", "sdpa": "scaled_dot_product_attention",
    "native": "attnkern", "triton": "attnkern, Triton", "reference": "attnkern, reference (plain PyTorch)",
}  # fmt: skip
#: The competitors with many queries: timm's layers, and what they become when they are folded.
TIMM, FOLDED = ("timm", "timm compile"), ("sdpa", "einsum", "einsum compile")
ABOUT_POOLING = (
    "Many queries. M is the number of queries per image; for a layer, its number of heads. `timm` is timm's own layer; "
    "`sdpa` and `einsum` are folded forms, in which keys and values are never computed, with "
    "scaled_dot_product_attention or two matrix products where attnkern has its kernel. `native` is the layer after "
    "`attnkern.accelerate`, or `compatibility_pool`; `compile` is torch.compile of the same. Columns with × compare "
    "the fastest of each. MB are the memory that a call needs at its peak, in the default process."
)
#: Goals for several windows, forward and backward: what every row should reach.
WINDOW_GOALS = {"eager": 5, "compile": 1.5}
#: Goals for many queries, forward and backward: rows, what they are compared with, the key and the names of its
#: numbers, and how many times ours it should be at least. Folded forms should never be faster; 0.05 is for noise.
POOLING_GOALS = (
    ("layers", "timm's layer, the faster of eager and compiled", "ms", TIMM, 10),
    ("all", "the fastest folded form", "ms", FOLDED, 0.95),
    ("NCHW maps", "the fastest folded form", "ms", FOLDED, 2),
    ("all", "the least peak memory of a folded form", "peak_mb", FOLDED, 1),
)
COLUMNS = (
    "eager", "compile", *TIMM, "timm compiled", *FOLDED, "reference", "reference compiled",
    *OURS, *(f"{name} compile" for name in OURS), *(f"{name} compiled" for name in OURS),
)  # fmt: skip


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table whose columns line up in the source, too."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in [head, rule, *lines]
    )


def processes(rows: list[dict]) -> list[str]:
    """The processes that measured the rows, in order."""
    return list(dict.fromkeys(row["process"] for row in rows))


def _of(process: str, rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["process"] == process]


def _first(rows: list[dict]) -> list[dict]:
    """The rows of the first process: the default one, where there are two."""
    return _of(rows[0]["process"], rows) if rows else []


def _process(row: dict, rows: list[dict]) -> str:
    """The process of a row, where its run has several."""
    return f", {row['process']} process" if len(processes(rows)) > 1 else ""


def _cell(row: dict, key: str, name: str, digits: int, factor: float = 1) -> str:
    found = row.get(key, {})
    return f"{found[name] * factor:.{digits}f}" if name in found else "error" if name in row.get("errors", ()) else "–"


def _columns(rows: list[dict], key: str) -> list[str]:
    return [name for name in COLUMNS if any(name in row.get(key, ()) for row in rows)]


def table(rows: list[dict]) -> str:
    """Rows as aligned Markdown: milliseconds, how many times faster the best of ours is, and host time if measured.

    A case and pass that several processes measured are one line, and its cells have a number for each process.
    """
    columns, host = _columns(rows, "ms"), _columns(rows, "host_us")
    ratios = [name for name in ("eager", "compile") if name in columns]
    theirs = ("timm", "timm compiled", "reference", "reference compiled")
    ratios = ratios or [name for name in theirs if name in columns]
    head = ["case", "pass", *(f"{name} ms" for name in columns), *(f"× {name}" for name in ratios)]
    head += [f"{name} host µs" for name in host]
    head += ["spread"] if any(row.get("spread") for row in rows) else []
    by_name = {}
    for row in rows:
        by_name.setdefault((row["case"], row["pass"]), {})[row["process"]] = row
    lines = []
    for name, found in by_name.items():

        def cell(*what, found=found):
            cells = [_cell(found.get(process, {}), *what) for process in processes(rows)]
            return "–" if set(cells) == {"–"} else " / ".join(cells)

        times = [cell("ms", column, 3) for column in columns]
        faster = [cell("times", column, 2) for column in ratios]
        costs = [cell("host_us", column, 1) for column in host]
        spreads = " / ".join(_spread(found.get(process, {})) for process in processes(rows))
        lines.append([*name, *times, *faster, *costs, spreads][: len(head)])
    return markdown(head, lines)


def noise(row: dict) -> float:
    """The largest spread of a competitor's times in a row."""
    return max(row.get("spread", {}).values(), default=0)


def _spread(row: dict) -> str:
    return f"{noise(row):.0%}{' noisy' * (noise(row) > NOISY)}" if row.get("spread") else "–"


def device_table(rows: list[dict]) -> str:
    """Device time in microseconds, how many times faster the best of ours is, and its share of a copy's bandwidth."""
    columns = _columns(rows, "device_ms")
    ratios = [name for name in ("eager", "compile") if name in columns]
    head = ["case", "pass", *(f"{name} µs" for name in columns), *(f"× {name}" for name in ratios), "share of copy"]
    lines = []
    for row in rows:
        best = min((row["device_ms"][name] for name in OURS if name in row["device_ms"]), default=math.nan)
        times = [_cell(row, "device_ms", name, 1, 1e3) for name in columns]
        faster = [_cell(row, "device_ms", name, 2, 1 / best) for name in ratios]
        share = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else "–"
        lines.append([row["case"], row["pass"], *times, *faster, share])
    return markdown(head, lines)


def failures(rows: list[dict]) -> list[str]:
    lines = [
        f"- {row['case']}, {row['pass']}{_process(row, rows)}, {name}: {error}"
        for row in rows
        for name, error in row.get("errors", {}).items()
    ]
    return ["Failed:\n\n" + "\n".join(lines)] if lines else []


def many(row: dict) -> bool:
    """Is this a row of pooling with many queries?"""
    return " M=" in row["case"]


def several(row: dict) -> bool:
    """Is this a row of several windows?"""
    return " K=" in row["case"]


def lead(row: dict, names: tuple[str, ...], key: str = "ms") -> float | None:
    """The least of a row's numbers for these competitors over the least of ours, compiled or not."""
    found = row.get(key, {})
    mine = [name + suffix for name in OURS for suffix in ("", " compile")]
    theirs, ours = ([found[name] for name in group if name in found] for group in (names, mine))
    return min(theirs) / min(ours) if theirs and ours else None


def pooling_table(rows: list[dict], brief: bool = False) -> str:
    """Rows with many queries: milliseconds (on a GPU device time), how many times faster the best of ours is, and the
    peak of the memory in the first process. ``brief`` leaves out the memory, and the times of the others."""
    key = "device_ms" if any("device_ms" in row for row in rows) else "ms"
    columns = [name for name in _columns(rows, key) if not brief or name.startswith(OURS)]
    memory = [] if brief else columns
    head = ["case", "pass", *(f"{name} ms" for name in columns), "× timm", "× folded"]
    head += [f"{name} MB" for name in memory] + ["spread"]
    by_name = {}
    for row in rows:
        by_name.setdefault((row["case"], row["pass"]), {})[row["process"]] = row
    lines = []
    for name, found in by_name.items():
        measured = [found.get(process, {}) for process in processes(rows)]
        cells = [[_cell(row, key, column, 2) for row in measured] for column in columns]
        leads = [[lead(row, names, key) for row in measured] for names in (TIMM, FOLDED)]
        cells += [["–" if value is None else f"{value:.1f}" for value in each] for each in leads]
        cells += [[_cell(measured[0], "peak_mb", column, 1)] for column in memory]
        cells += [[_spread(row) for row in measured]]
        lines.append([*name, *("–" if set(cell) == {"–"} else " / ".join(cell) for cell in cells)])
    return markdown(head, lines)


def pooling_goals(rows: list[dict]) -> list[list[str]]:
    """The goals for many queries beside what was measured in forward and backward, for each process."""
    lines = []
    for process in processes(rows):
        both = [row for row in _of(process, rows) if row["pass"] == "forward+backward" and many(row)]
        groups = {
            "all": both,
            "layers": [row for row in both if not row["case"].startswith("compatibility_pool")],
            "NCHW maps": [row for row in both if re.match(r"compatibility_pool .* contiguous", row["case"])],
        }
        for group, what, key, names, least in POOLING_GOALS:
            figures = [(lead(row, names, key), row["case"]) for row in groups[group]]
            figures = [(figure, case) for figure, case in figures if figure is not None]
            if figures:
                below = sum(figure < least for figure, _ in figures)
                more = f" (one of {below} below the goal)" if below > 1 else ""
                lowest = f"{what}, lowest row: {min(figures)[1]}{more}"
                lines.append([process, f"many queries, {group}", *_goal(lowest, min(figures)[0], least)])
    return lines


def tables(rows: list[dict]) -> str:
    """Tables of operators, then of many queries, then of networks."""
    networks = [row for row in rows if row["pass"] in NETWORK_PASSES]
    pooling = [row for row in rows if many(row)]
    operators = [row for row in rows if row["pass"] not in NETWORK_PASSES and not many(row)]
    on_device = [row for row in operators if "device_ms" in row]
    parts = [f"Device time:\n\n{device_table(on_device)}", LATENCY] if on_device else []
    parts += [BOTH] if len(processes(rows)) > 1 else []
    parts += [table(operators)] if operators else []
    parts += [ABOUT_POOLING, pooling_table(pooling)] if pooling else []
    parts += [table(networks)] if networks else []
    return "\n\n".join([*parts, *failures(rows)])


def speeds(rows: list[dict]) -> list[str]:
    """Images a second of training, by backend."""
    lines = []
    for row in rows:
        if row["pass"] == TRAINING and "images" in row and row["ms"]:
            found = [f"{row['images'] / ms * 1e3:.0f} with {name}" for name, ms in row["ms"].items()]
            lines.append(f"- {row['case']}: {', '.join(found)}")
    return ["Images per second in training:\n\n" + "\n".join(lines)] if lines else []


def shares(rows: list[dict]) -> list[str]:
    """The share of a training step that its attention operators take, by backend."""
    ms = {(row["case"], row["pass"]): row["ms"] for row in rows}
    lines = []
    for name, which in ms:
        if which == ATTENTION and (name, TRAINING) in ms:
            part, whole = ms[name, which], ms[name, TRAINING]
            found = [
                f"{part[b] / whole[b]:.1%} with {b}" for b in ("timm", "reference", *OURS) if b in part and b in whole
            ]
            lines.append(f"- {name}: {', '.join(found)}")
    return ["Share of a training step that the attention operators take:\n\n" + "\n".join(lines)] if lines else []


def geometric_mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def goals(rows: list[dict], suite: str = "") -> str:
    """The goals of a CPU's run in float32 beside what was measured, for each process."""
    parts, lines, pooled = [], [], pooling_goals(rows)
    for process in processes(rows):
        both = [row for row in _of(process, rows) if row["pass"] == "forward+backward"]
        if leads := [found for row in both if many(row) and (found := lead(row, TIMM))]:
            parts.append(
                f"**{geometric_mean(leads):.1f} times as fast as timm's attention-pooling layers** in the {process} "
                f"process, by geometric mean over {len(leads)} rows of forward and backward."
            )
    rows = [row for row in rows if "float32" in row["case"] and "compile" in row["times"]]
    windows = [row for row in rows if several(row) and row["pass"] == "forward+backward"]
    rows = [row for row in rows if not several(row)]
    for process in processes(rows):
        forward, both = (
            [row for row in _of(process, rows) if row["pass"] == which] for which in ("forward", "forward+backward")
        )
        if both:
            eager, compiled = (geometric_mean(row["times"][name] for row in both) for name in ("eager", "compile"))
            parts.append(
                f"**{eager:.1f} times as fast as eager PyTorch, {compiled:.1f} times as fast as torch.compile** in the "
                f"{process} process, by geometric mean over {len(both)} rows of forward and backward in float32."
            )
            lines += [[process, "all", *line] for line in _means(both, *GOALS[suite])]
            lines += [[process, "all, forward alone", *_slowest(forward, 1)]] if forward else []
        core = [row for row in both if CORE.match(row["case"])]
        if core and process == "default" and suite == "":
            lines += [[process, "contiguous, without anchor_attention", *line] for line in _means(core, *CORE_GOALS)]
    for process in processes(windows):
        for name, least in WINDOW_GOALS.items():
            lines.append([process, "several windows", *_slowest(_of(process, windows), least, name)])
    lines += pooled
    if not lines:
        return ""
    found = markdown(["process", "rows", "compared with", "measured", "goal", "reached"], lines)
    return "\n\n".join([*parts, ABOUT_GOALS, found])


def _goal(figure: str, value: float, least: float) -> list[str]:
    return [figure, f"{value:.2f} ×", f"{least} ×", "yes" if value >= least else "no"]


def _means(rows: list[dict], over_eager: float, over_compile: float, least: float) -> list[list[str]]:
    means = {name: geometric_mean(row["times"][name] for row in rows) for name in ("eager", "compile")}
    return [
        _goal("eager, geometric mean", means["eager"], over_eager),
        _goal("torch.compile, geometric mean", means["compile"], over_compile),
        _slowest(rows, least),
    ]


def _slowest(rows: list[dict], least: float, name: str = "compile") -> list[str]:
    """The row with the lowest speed against a competitor, and how many are below the goal."""
    slowest = min(rows, key=lambda row: row["times"][name])
    below = sum(row["times"][name] < least for row in rows)
    more = f" (one of {below} below the goal)" if below > 1 else ""
    what = "torch.compile" if name == "compile" else name
    return _goal(f"{what}, slowest row: {slowest['case']}{more}", slowest["times"][name], least)


LARGE = 2**26  # bytes of a working set that no L2 cache holds
#: Goals on a GPU by group of rows: the least that every row of the group should reach. "copy" is the share of the
#: bandwidth of a copy in the same run, forward and backward apart; the others are times faster, launches included where
#: nothing else is said.
GPU_GOALS = {
    "large maps, window and anchor attention": {
        "copy, forward": 0.9, "copy, backward": 0.85, "eager": 2.5, "compile": 1.15
    },
    "large maps, compatibility_pool": {"copy, forward": 0.9, "copy, backward": 0.85, "eager": 4, "compile": 1.6},
    "small maps": {"eager": 5, "compile": 1.3, "compile, on the device": 1.2},
    "anchor_quantize": {"eager": 8, "compile": 2},
}  # fmt: skip
#: Goals for the host's time of forward and backward on tiny tensors: at most so many times that of an empty
#: autograd.Function in the same run, which every operator pays.
HOST_GOALS = {"native": 2.5, "triton": 4.5}
EMPTY = "an empty autograd.Function"


def _gpu_group(case: str, bytes_forward: int) -> str:
    op = case.split()[0]
    if op == "anchor_quantize":
        return op
    if bytes_forward < LARGE:
        return "small maps"
    return f"large maps, {op if op == 'compatibility_pool' else 'window and anchor attention'}"


def gpu_figures(rows: list[dict], copy_gb_per_s: float) -> dict[str, dict[str, list[tuple[float, str]]]]:
    """The figures that GPU_GOALS are about: (figure, case) by group and name, from rows that have been measured."""
    by_case = {}
    for row in rows:
        if not many(row):
            by_case.setdefault(row["case"], {})[row["pass"]] = row
    found = {group: {name: [] for name in names} for group, names in GPU_GOALS.items()}
    for case, passes in by_case.items():
        forward, both = passes.get("forward"), passes.get("forward+backward")
        if forward is None or both is None or "device_ms" not in both:
            continue
        figures = {name: both["times"].get(name) for name in ("eager", "compile")}
        ours = [name for name in OURS if name in forward["device_ms"] and name in both["device_ms"]]
        if ours:
            seconds = [min(row["device_ms"][name] for name in ours) / 1e3 for row in (forward, both)]
            per_second = copy_gb_per_s * 1e9
            figures["copy, forward"] = forward["bytes"] / seconds[0] / per_second
            if seconds[1] > seconds[0]:  # noise may be larger than a tiny backward
                figures["copy, backward"] = (both["bytes"] - forward["bytes"]) / (seconds[1] - seconds[0]) / per_second
            if "compile" in both["device_ms"]:
                figures["compile, on the device"] = both["device_ms"]["compile"] / 1e3 / seconds[1]
        for name, figure in found[_gpu_group(case, forward["bytes"])].items():
            if figures.get(name) is not None:
                figure.append((figures[name], case))
    return found


def gpu_goals(rows: list[dict], copy_gb_per_s: float) -> str:
    """The goals of a GPU's run: how many rows reach each, and the row farthest from it; what has not been measured."""
    lines = ["| on a GPU | goal: at least | rows that reach it | lowest |", "|---" * 4 + "|"]
    for group, names in gpu_figures(rows, copy_gb_per_s).items():
        for name, figures in names.items():
            goal = GPU_GOALS[group][name]
            text = f"{goal:.0%} of a {name}" if name.startswith("copy") else f"{goal} × {name}"
            reached = sum(figure >= goal for figure, _ in figures)
            lowest = "{0[0]:.2f}, {0[1]}".format(min(figures)) if figures else "–"
            lines.append(
                f"| {group} | {text} | {f'{reached} of {len(figures)}' if figures else 'not measured'} | {lowest} |"
            )
    return "\n".join(lines)


# --- plots, readable on a light and on a dark page --------------------------------------------------------------------

GREY = "#808080"
COLORS = {
    "compile": "#8da0b8", "sdpa": "#b7c4a1", "reference": "#c9c9c9", "native": "#d1495b", "triton": "#7b3fa0"
}  # fmt: skip


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "attnkern"  # the same rows give the same file
    import matplotlib.pyplot as plt

    return plt


def _finish(figure, path):
    """Draw everything that is no data in a grey that is readable on both backgrounds, and leave the background out."""
    for axes in figure.axes:
        axes.tick_params(which="both", colors=GREY)
        for item in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts):
            item.set_color(GREY)
        for side in axes.spines.values():
            side.set_color(GREY)
    for text in (figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())):
        text.set_color(GREY)
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
    _pyplot().close(figure)


def _short(case: str) -> str:
    """A case's shape, layout and, unless it is float32, dtype."""
    _, shape, dtype, layout, *more = case.split()
    words = [shape.replace("x", "×"), "NCHW" if layout == "contiguous" else layout, dtype, *more]
    return " ".join(word for word in words if word != "float32")


def plot(content: dict, path: Path) -> None:
    """Speed over eager PyTorch in forward and backward: a panel for each operator, a group of bars for each case."""
    rows = content["rows"]
    key = "device_ms" if any("device_ms" in row for row in rows) else "ms"
    chosen = [row for row in _first(rows) if row["pass"] == "forward+backward" and "eager" in row.get(key, ())]
    names = _columns(chosen, key)[1:]
    if not names:
        return
    by_op = {}
    for row in chosen:
        by_op.setdefault(row["case"].split()[0], []).append(row)
    # One unit of height is a bar; half a unit separates two cases.
    heights = [sum(len(row[key]) - 0.5 for row in group) for group in by_op.values()]
    inches = 0.15 * sum(heights) + 0.55 * len(by_op) + 1.6
    figure, panels = _pyplot().subplots(
        len(by_op), 1, figsize=(9, inches), sharex=True, squeeze=False, height_ratios=heights, layout="constrained"
    )
    drawn = {}
    for axes, (op, group) in zip(panels[:, 0], by_op.items(), strict=True):
        place, ticks = 0.0, []
        for row in group:
            shown = [name for name in names if name in row[key]]
            for name in shown:
                speed = row[key]["eager"] / row[key][name]
                drawn[name] = axes.barh(place, speed, 0.9, color=COLORS[name])
                if name in OURS:
                    axes.text(speed, place, f" {speed:.1f}", va="center", fontsize=7)
                place += 1
            ticks.append(place - (len(shown) + 1) / 2)
            place += 0.5
        axes.set_yticks(ticks, [_short(row["case"]) for row in group], fontsize=8)
        axes.set_ylim(place - 1, -0.5)
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_title(op, loc="left", fontsize=9, fontweight="bold", color=GREY)
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("times as fast as eager PyTorch (grey line: 1), forward and backward")
    figure.suptitle(f"Speed over eager PyTorch\n{_where(content)}", fontsize=10)
    figure.legend(
        [drawn[name] for name in names], [LABELS[name] for name in names],
        loc="outside lower center", ncols=min(4, len(names)), fontsize=8, frameon=False,
    )  # fmt: skip
    _finish(figure, path)


def plot_scaling(content: dict, path: Path) -> None:
    """Milliseconds against bytes along each axis: a line of slope 1 is a cost that grows with the bytes."""
    rows = content["rows"]
    axes_names = list(dict.fromkeys(row["pass"] for row in rows))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, panels = _pyplot().subplots(
        1, len(axes_names), figsize=(3.6 * len(axes_names), 4.4), squeeze=False, sharey=True, layout="constrained"
    )
    lines = {}
    for panel, axis in zip(panels[0], axes_names, strict=True):
        for k, op in enumerate(ops):
            chosen = [row for row in rows if row["pass"] == axis and row["op"] == op]
            for name, style in zip(("eager", *OURS), (":", "-", "--"), strict=True):
                points = [(row["bytes"] / 1e6, row["ms"][name]) for row in chosen if name in row["ms"]]
                if points:
                    label = f"{op}, {LABELS.get(name, name)}"
                    (lines[label],) = panel.loglog(*zip(*points, strict=True), style, color=f"C{k}")
        panel.set_title(f"more {axis}", fontsize=9)
        panel.set_xlabel("megabytes read and written")
    panels[0][0].set_ylabel("milliseconds, forward and backward")
    figure.suptitle(f"Time against size\n{_where(content)}", fontsize=10)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(ops), fontsize=8, frameon=False)
    _finish(figure, path)


def _where(content: dict) -> str:
    """Machine, threads, PyTorch and date of a run."""
    return f"{content['machine']}, {_threads(content['threads'])}, torch {content['torch']}, {content['date']}"


# --- text ------------------------------------------------------------------------------------------------------------


def scaling_table(rows: list[dict]) -> str:
    """By axis and op: times at both ends, and the exponent of time over bytes in the last doubling."""
    lines = ["| axis | operator | smallest, ms | largest, ms | × eager at the largest | exponent |", "|---" * 6 + "|"]
    for axis, op in dict.fromkeys((row["pass"], row["op"]) for row in rows):
        chosen = [row for row in rows if row["pass"] == axis and row["op"] == op]
        first, before, last = chosen[0], chosen[-2], chosen[-1]
        best = {id(row): row["ms"]["eager"] / row["times"]["eager"] for row in (first, before, last)}
        power = math.log(best[id(last)] / best[id(before)]) / math.log(last["bytes"] / before["bytes"])
        cells = f"{best[id(first)]:.3f} | {best[id(last)]:.3f} | {last['times']['eager']:.1f} | {power:.2f}"
        lines.append(f"| {axis} | {op} | {cells} |")
    return "\n".join(lines)


def host_table(costs: dict[str, dict[str, float]]) -> str:
    """Host time of calls on tiny tensors, and the goals for it."""
    names = [name for name in COLUMNS if any(name in found for found in costs.values())]
    empty = costs.get(EMPTY, {}).get("eager")
    ours = [name for name in names if name in HOST_GOALS and empty]
    lines = []
    for what, found in costs.items():
        cells = [f"{found[name]:.1f}" if name in found else "–" for name in names]
        lines.append([what, *cells, *(f"{found[name] / empty:.1f}" if name in found else "–" for name in ours)])
    head = ["forward and backward of tiny tensors", *(f"{name} µs" for name in names)]
    head += [f"{name} / empty (goal: {HOST_GOALS[name]})" for name in ours]
    caption = (
        "What a call costs on tensors of a few elements. The goal is a multiple of the time of an empty "
        "autograd.Function, which depends on the processor and on the build of Python:"
    )
    return f"{caption}\n\n{markdown(head, lines)}"


def regressions(content: dict, earlier: dict) -> str:
    """Rows that lost more than a tenth of their lead over eager since an earlier run of the same machine."""
    known = {name_of(row): row["times"].get("eager") for row in earlier["rows"]}
    lines = []
    for row in content["rows"]:
        before, now = known.get(name_of(row)), row["times"].get("eager")
        if before and now and now < 0.9 * before:
            lines.append([row["case"], row["pass"], row["process"], f"{before:.2f}", f"{now:.2f}"])
    if not lines:
        return ""
    head = ["case", "pass", "process", f"× eager, {earlier['date']}", f"× eager, {content['date']}"]
    return f"Rows whose lead over eager is more than a tenth smaller than in the run before:\n\n{markdown(head, lines)}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def doubts(content: dict) -> list[str]:
    """Reasons not to trust a run's numbers: other programs used the processor, or many rows are noisy. The load before
    the run is none, since it may come from a build that has just ended."""
    rows, cores, found = content["rows"], content.get("cores"), []
    during = load_during(content)
    if cores and during is not None and during > cores + content["threads"] / 2:
        found.append(f"the load average was {during:.1f} on {cores} cores during the run")
    noisy = sum(noise(row) > NOISY for row in rows)
    if noisy > len(rows) / 10:
        found.append(f"the times of {noisy} of {len(rows)} rows vary by more than {NOISY:.0%}")
    return found


def load_during(content: dict) -> float | None:
    """The median of the load averages at the ends of the rows. The run itself adds about its number of threads."""
    loads = [row["load"] for row in content["rows"] if "load" in row]
    return statistics.median(loads) if loads else None


def warning(content: dict) -> str:
    found = doubts(content)
    return f"**Do not trust these numbers:** {'; '.join(found)}. Repeat the run on a quiet machine." if found else ""


def heading(content: dict) -> str:
    """Where and when a run was made, and on how busy a machine."""
    text = f"{_where(content)}; a copy moves {content['copy_gb_per_s']:.1f} GB/s"
    if "load" in content:
        text += f"; load average {content['load']:.1f} before the run"
    if (during := load_during(content)) is not None:
        text += f" and {during:.1f} during it"
    if _on_gpu(content) or len(found := processes(content["rows"])) != 1:
        return text
    return f"{text}; {found[0]} process"


def _on_gpu(content: dict) -> bool:
    return any("device_ms" in row for row in content["rows"])


def summary(content: dict) -> str:
    """The goals and the networks of a run."""
    rows, suite = content["rows"], content.get("suite", "")
    if suite == "scaling":
        return ""
    judged = gpu_goals(rows, content["copy_gb_per_s"]) if _on_gpu(content) else goals(rows, suite)
    networks = [row for row in _first(rows) if row["pass"] in NETWORK_PASSES]
    return "\n\n".join(filter(None, [judged, *speeds(networks), *shares(networks)]))


def details(content: dict) -> str:
    """The tables of a run."""
    if content.get("suite") == "scaling":
        note = (
            "Times are attnkern's, forward and backward, at the smallest and the largest size along each axis. The "
            "exponent relates time to bytes in the last doubling: time ∝ bytes^exponent. It exceeds 1 where the data "
            "no longer fits the caches."
        )
        return f"{scaling_table(content['rows'])}\n\n{note}"
    parts = [tables(content["rows"]), *(profile_table(*found) for found in content.get("profiles", {}).items())]
    parts.append(host_table(content["host_us"]) if "host_us" in content else "")
    return "\n\n".join(filter(None, parts))


def title(content: dict) -> str:
    name = TITLES.get(content.get("suite", ""), content.get("suite", ""))
    return f"{name}: {content['machine']}, {_threads(content['threads'])}"


def body(content: dict, picture: str = "") -> str:
    """A run in Markdown: warning, summary, plot, tables. ``picture`` is the plot's address."""
    image = f"![{title(content)}]({picture})" if picture else ""
    parts = [heading(content), warning(content), image, summary(content), details(content)]
    return "\n\n".join(filter(None, parts))


def printed(content: dict) -> str:
    """A run for the terminal: the rows of the default process, and the summary, where it stays visible, below them."""
    rows = _first(content["rows"])
    shown = ("eager", "compile", *OURS)
    operators = [
        row | {"ms": {name: row["ms"][name] for name in shown if name in row["ms"]}}
        for row in rows
        if row["pass"] not in NETWORK_PASSES and not many(row)
    ]
    if content.get("suite") == "scaling":
        text = scaling_table(rows)
    else:
        pooling = [row for row in rows if many(row)]
        text = "\n\n".join(
            [*([table(operators)] if operators else []), *([pooling_table(pooling, brief=True)] if pooling else [])]
        )
    # The warning stands at both ends, since the first one may have scrolled away.
    return "\n\n".join(filter(None, [heading(content), warning(content), text, summary(content), warning(content)]))


def write(path: Path) -> list[Path]:
    """Write a run's plot and page beside its JSON file. Returns the three paths."""
    content = json.loads(path.read_text(encoding="utf-8"))
    picture, text = path.with_suffix(".svg"), path.with_suffix(".md")
    if content.get("suite") != "networks":
        try:
            (plot_scaling if content.get("suite") == "scaling" else plot)(content, picture)
        except ImportError as error:
            print(f"no plot: {error}")
    drawn = picture.exists()
    text.write_text(f"# {title(content)}\n\n{body(content, picture.name * drawn)}\n", encoding="utf-8")
    return [path, text, *([picture] if drawn else [])]


def publish(path: Path) -> Path:
    """Copy a run's JSON file to the published ones, unless it is there already. Returns its new path."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for found in COMMITTED.glob("*.json"):
        if json.loads(found.read_text(encoding="utf-8")) == content:
            return found
    target = unused(COMMITTED / path.name)
    shutil.copyfile(path, target)
    return target


def newest() -> Path:
    """The run that was written last."""
    runs = sorted(RESULTS.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise SystemExit(f"no run in {RESULTS}: `make bench` makes one")
    return runs[-1]


TITLES = {"": "Operators and training steps", "full": "More shapes", "networks": "Networks", "scaling": "Scaling"}
INTRODUCTION = """# Performance

attnkern beside its competitors, in runs on the machines below. This page and `benchmarks/results/` are written by
`make bench-publish`; `make bench` measures your machine and writes to `build/bench/` alone.

- **Competitors** are the papers' literal formulas in eager PyTorch (`eager`) and under `torch.compile` (`compile`), and
  scaled_dot_product_attention for pooling (`sdpa`). attnkern is `native` (compiled kernels), `triton`, or `reference`
  (plain PyTorch). A run that measures pooling with many queries has a table for it, with timm's attention-pooling
  layers (`timm`) and folded forms of them in plain PyTorch ([Faster attention pooling](attention-pooling.md)).
- **Columns with ×** are the competitor's time divided by that of the faster of attnkern's kernels. Below 1 the
  competitor is faster: these rows stay in the tables. A competitor that fails is listed with its error.
- **Cases** name the operator, the shape N×C×H×W, the dtype and the memory format. Without `Q=`, `M=` or `K=` there are
  20 anchors, one query and one window. "A copy moves" is the bandwidth of copying a large tensor on the same machine,
  as a scale.
- **Method**: every result is checked against the reference in float64 before it is timed. Competitors take turns of ten
  milliseconds, and medians are compared. `spread` is the largest interquartile range of a row's times, as a share of
  the median; a row whose spread exceeds 0.25 is measured up to three times, and marked as noisy if it stays so. Runs up
  to 2026-11-25 did not record it.
- **Two processes** on a CPU: in the default one, as Python starts it, glibc returns large blocks to the kernel when
  they are freed and maps them again at the next call; in the tuned one malloc keeps them (`MALLOC_MMAP_THRESHOLD_`
  and `MALLOC_TRIM_THRESHOLD_` are 4 GiB).
- **Clock**: wall time; on one thread (`OMP_NUM_THREADS=1`) the CPU time of the process, page faults included, which
  other programs do not lengthen. On a GPU, device time is measured with CUDA events around replays of a CUDA graph
  whose calls use inputs that together exceed three L2 caches; latency is the time of single calls after the L2 cache is
  flushed.
"""


def page() -> str:
    """Every machine's newest run of each suite, and what it lost since the one before."""
    runs = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(COMMITTED.glob("*.json"))]
    groups = {}
    for path, content in sorted(runs, key=lambda run: (run[1]["date"], run[1].get("time", ""))):
        if content.get("suite", "") not in TITLES:
            continue  # a rehearsal
        groups.setdefault((content["machine"], content["threads"], content.get("suite", "")), []).append(
            (path, content)
        )
    parts = [INTRODUCTION]
    for _, found in sorted(groups.items()):
        path, content = found[-1]
        picture = f"../benchmarks/results/{path.stem}.svg" if content.get("suite") != "networks" else ""
        parts.append(f"## {title(content)}\n\n{body(content, picture)}\n")
        lost = regressions(content, found[-2][1]) if len(found) > 1 else ""
        parts += [f"{lost}\n"] if lost else []
    if not any(_on_gpu(content) for _, content in runs):
        parts.append(f"## GPU\n\nNothing has been measured on a GPU yet: `make gpu` does.\n\n{gpu_goals([], 1)}\n")
    return "\n".join(parts)


# --- native or Triton -------------------------------------------------------------------------------------------------


class Pair:
    """A case measured with both: microseconds by pass and backend."""

    def __init__(self, case: str, passes: dict[str, dict[str, float]]):
        self.case, self.us = case, {which: {name: ms[name] * 1e3 for name in OURS} for which, ms in passes.items()}
        self.op, shape, self.dtype, self.layout, *_ = case.split()
        _, self.channels, *size = map(int, shape.split("x"))
        self.positions = math.prod(size)

    def loss(self, name: str) -> float:
        """Logarithm of this backend's time over that of the faster one, averaged over the passes."""
        return sum(math.log(us[name] / min(us.values())) for us in self.us.values()) / len(self.us)


def _rules(pairs: list[Pair]) -> list[tuple[str, dict[str, str]]]:
    """(words, backend by case), the simplest first: one backend, or a threshold on positions or channels. The number
    of images is not used."""
    found = [(name, {pair.case: name for pair in pairs}) for name in OURS]
    for what in ("positions", "channels"):
        for bound in sorted({getattr(pair, what) for pair in pairs})[1:]:
            for above, below in (OURS, OURS[::-1]):
                chosen = {pair.case: above if getattr(pair, what) >= bound else below for pair in pairs}
                found.append((f"{above} from {bound} {what} on, {below} below", chosen))
    return found


def choice(rows: list[dict], tolerance: float = 0.01) -> str:
    """Device times of native and Triton, and per operator, dtype and layout the simplest rule within ``tolerance`` of
    the best one."""
    by_case = {}
    for row in rows:
        measured = not many(row) and set(OURS) <= row.get("device_ms", {}).keys()
        if measured and row["pass"] in ("forward", "forward+backward"):
            by_case.setdefault(row["case"], {})[row["pass"]] = row["device_ms"]
    pairs = [Pair(case, passes) for case, passes in by_case.items()]
    if not pairs:
        return "No row has device times of both native and Triton."
    lines = []
    for pair in pairs:
        for which, us in pair.us.items():
            faster = min(us, key=us.get)
            cells = [f"{us[name]:.1f}" for name in OURS]
            lines.append([pair.case, which, *cells, faster, f"{max(us.values()) / us[faster]:.2f}"])
    head = ["case", "pass", *(f"{name} µs" for name in OURS), "faster", "times"]
    text = [markdown(head, lines), "", "Time over that of the faster backend in each row, geometric mean:", ""]

    def cost(group, chosen):
        return math.exp(sum(pair.loss(chosen[pair.case]) for pair in group) / len(group))

    def key(pair):
        return pair.op, pair.dtype, pair.layout

    for name, group in itertools.groupby(sorted(pairs, key=key), key):
        group = list(group)
        costs = [(words, cost(group, chosen)) for words, chosen in _rules(group)]
        least = min(value for _, value in costs)
        words, value = next((words, value) for words, value in costs if value <= least + tolerance)
        alone = ", ".join(f"{words} alone {value:.3f}" for words, value in costs[: len(OURS)])
        text.append(f"- {', '.join(name)}: {words} ({value:.3f}; {alone}; {len(group)} cases)")
    return "\n".join(text)


def slowest(rows: list[dict], count: int) -> list[tuple[str, str, str]]:
    """(case, pass, the faster of ours) of the rows with the lowest share of a copy's bandwidth: large maps first, one
    row per operator and pass."""
    found = {}
    known = [row for row in rows if {"share_of_copy", "device_ms"} <= row.keys() and "max" not in row["pass"]]
    known = [row for row in known if not many(row)]
    for row in sorted(known, key=lambda row: (row["bytes"] < LARGE, row["share_of_copy"])):
        ours = {name: ms for name, ms in row["device_ms"].items() if name in OURS}
        found.setdefault((row["case"].split()[0], row["pass"]), (row["case"], row["pass"], min(ours, key=ours.get)))
    return list(found.values())[:count]


def profile_table(name: str, kernels: list[dict]) -> str:
    """Metrics of the kernels of a call."""
    columns = list(dict.fromkeys(column for kernel in kernels for column in kernel))
    lines = [[str(kernel.get(column, "–")) for column in columns] for kernel in kernels]
    return f"Kernels of {name}:\n\n{markdown(columns, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--publish", metavar="FILE", help="add a run to the published ones; 'newest' is the last one")
    parser.add_argument("--choice", metavar="FILE", type=Path, help="compare native with Triton in this results file")
    options = parser.parse_args()
    if options.choice:
        print(choice(json.loads(options.choice.read_text(encoding="utf-8"))["rows"]))
        return
    if options.publish:
        path = publish(newest() if options.publish == "newest" else Path(options.publish))
        if reasons := doubts(json.loads(path.read_text(encoding="utf-8"))):
            print(f"Published, but the numbers cannot be trusted: {'; '.join(reasons)}.")
        print(f"Published: {path.relative_to(ROOT)}")
    for path in sorted(COMMITTED.glob("*.json")):
        write(path)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
