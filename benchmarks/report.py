"""Results as tables and pictures: each run beside its JSON, all of them in docs/performance.md.

``python -m benchmarks.report`` writes everything again from the committed JSON. With ``--choice FILE`` it compares the
native kernels with Triton's, row by row, and prints the rule for the automatic choice that follows.
"""

import argparse
import itertools
import json
import math
import re
from pathlib import Path

from benchmarks.store import COMMITTED, ROOT, name_of

PAGE = ROOT / "docs/performance.md"
#: Passes of a network, and the attention in the first of them alone.
TRAINING, INFERENCE, ATTENTION = NETWORK_PASSES = ("training step", "inference", "attention of a training step")

#: above the latencies of a GPU
LATENCY = (
    "Latency of a single call, launch and wait included, after the L2 cache is flushed, and the host's time for a call:"
)

#: Of forward and backward, by suite: geometric means over eager and over torch.compile, and the slowest row over
#: torch.compile. Those of CORE hold in the default process.
TARGETS = {"": (3, 1.3, 1), "full": (4, 1.5, 1)}
CORE_TARGETS = (6.5, 2.2, 1.2)
CORE = re.compile(r"(window_attention|compatibility_pool|anchor_quantize) \S+ float32 contiguous$")
#: above a table of both processes, benchmarks.run.PROCESSES
BOTH = "Where a cell has two numbers, the first is from the default process and the second from the tuned one:"
OURS = ("native", "triton")
COLUMNS = ("eager", "compile", "sdpa", "reference", "reference compiled", *OURS, *(f"{name} compiled" for name in OURS))


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
    ratios = ratios or [name for name in ("reference", "reference compiled") if name in columns]
    head = ["case", "pass", *(f"{name} ms" for name in columns), *(f"× {name}" for name in ratios)]
    head += [f"{name} host µs" for name in host]
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
        lines.append([*name, *times, *faster, *costs])
    return markdown(head, lines)


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
    return ["Failed:\n" + "\n".join(lines)] if lines else []


def tables(rows: list[dict]) -> str:
    """Operators, then networks."""
    networks = [row for row in rows if row["pass"] in NETWORK_PASSES]
    operators = [row for row in rows if row["pass"] not in NETWORK_PASSES]
    on_device = [row for row in operators if "device_ms" in row]
    parts = [f"Device time:\n\n{device_table(on_device)}", LATENCY] if on_device else []
    parts += [BOTH] if len(processes(rows)) > 1 else []
    parts += [table(part) for part in (operators, networks) if part]
    return "\n\n".join([*parts, *failures(rows), *speeds(_first(networks)), *shares(_first(networks))])


def speeds(rows: list[dict]) -> list[str]:
    """Images a second of training, by backend."""
    lines = []
    for row in rows:
        if row["pass"] == TRAINING and "images" in row and row["ms"]:
            found = [f"{row['images'] / ms * 1e3:.0f} with {name}" for name, ms in row["ms"].items()]
            lines.append(f"- {row['case']}: {', '.join(found)}")
    return ["Images a second of a training step:\n" + "\n".join(lines)] if lines else []


def shares(rows: list[dict]) -> list[str]:
    """The share of a training step that its attention takes, before and after."""
    ms = {(row["case"], row["pass"]): row["ms"] for row in rows}
    lines = []
    for name, which in ms:
        if which == ATTENTION and (name, TRAINING) in ms:
            part, whole = ms[name, which], ms[name, TRAINING]
            found = [f"{part[b] / whole[b]:.1%} with {b}" for b in ("reference", *OURS) if b in part and b in whole]
            lines.append(f"- {name}: {', '.join(found)}")
    return ["Share of a training step that the attention operators take:\n" + "\n".join(lines)] if lines else []


def geometric_mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def verdict(rows: list[dict], suite: str = "") -> str:
    """The targets of a CPU's run in float32, as met or missed, for each process."""
    parts = []
    rows = [row for row in rows if "float32" in row["case"] and "compile" in row["times"]]
    for process in processes(rows):
        forward, both = (
            [row for row in _of(process, rows) if row["pass"] == which] for which in ("forward", "forward+backward")
        )
        if both:
            lines = [*_means(both, *TARGETS[suite]), *([_lowest(forward, 1, "forward alone")] if forward else [])]
            parts.append("\n".join([f"Forward and backward, float32, {process} process:", *lines]))
        core = [row for row in both if CORE.match(row["case"])]
        if core and process == "default" and suite == "":
            names = "window_attention, compatibility_pool and anchor_quantize, contiguous"
            lines = _means(core, *CORE_TARGETS)
            parts.append("\n".join([f"Forward and backward, float32, {process} process, {names}:", *lines]))
    return "\n\n".join(parts)


def _target(text: str, value: float, least: float) -> str:
    return f"- {'met' if value >= least else 'MISSED'}: {value:.2f} {text} (target: at least {least})"


def _means(rows: list[dict], over_eager: float, over_compile: float, least: float) -> list[str]:
    means = {name: geometric_mean(row["times"][name] for row in rows) for name in ("eager", "compile")}
    return [
        _target("× eager by geometric mean", means["eager"], over_eager),
        _target("× torch.compile by geometric mean", means["compile"], over_compile),
        _lowest(rows, least),
    ]


def _lowest(rows: list[dict], least: float, what: str = "") -> str:
    """The slowest row against torch.compile, and how many more miss the target."""
    slowest = min(rows, key=lambda row: row["times"]["compile"])
    below = sum(row["times"]["compile"] < least for row in rows)
    more = f", one of {below} rows below" if below > 1 else ""
    where = f"{what}, {slowest['case']}" if what else slowest["case"]
    return _target(f"× torch.compile at the slowest, {where}{more}", slowest["times"]["compile"], least)


LARGE = 2**26  # bytes of a working set that no L2 cache holds
#: On a GPU, by what is looked at: the least that every row of it should reach. "copy" is the share of the bandwidth of
#: a copy in the same run, forward and backward apart; the others are times faster, launches included where nothing else
#: is said.
GPU_TARGETS = {
    "large maps, window and anchor attention": {
        "copy, forward": 0.9, "copy, backward": 0.85, "eager": 2.5, "compile": 1.15
    },
    "large maps, compatibility_pool": {"copy, forward": 0.9, "copy, backward": 0.85, "eager": 4, "compile": 1.6},
    "small maps": {"eager": 5, "compile": 1.3, "compile, on the device": 1.2},
    "anchor_quantize": {"eager": 8, "compile": 2},
}  # fmt: skip
#: microseconds of the host for forward and backward of tiny tensors, at most
HOST_TARGETS = {"native": 25, "triton": 45}


def _gpu_group(case: str, bytes_forward: int) -> str:
    op = case.split()[0]
    if op == "anchor_quantize":
        return op
    if bytes_forward < LARGE:
        return "small maps"
    return f"large maps, {op if op == 'compatibility_pool' else 'window and anchor attention'}"


def gpu_figures(rows: list[dict], copy_gb_per_s: float) -> dict[str, dict[str, list[tuple[float, str]]]]:
    """What GPU_TARGETS look at: (figure, case) by group and name, from rows that have been measured."""
    by_case = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["pass"]] = row
    found = {group: {name: [] for name in targets} for group, targets in GPU_TARGETS.items()}
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


def gpu_verdict(rows: list[dict], copy_gb_per_s: float) -> str:
    """The targets of a GPU's run: how many rows reach each, and the farthest from it; what has not been measured."""
    lines = ["| on a GPU | at least | rows that reach it | lowest |", "|---" * 4 + "|"]
    for group, names in gpu_figures(rows, copy_gb_per_s).items():
        for name, figures in names.items():
            target = GPU_TARGETS[group][name]
            text = f"{target:.0%} of a {name}" if name.startswith("copy") else f"{target} × {name}"
            reached = sum(figure >= target for figure, _ in figures)
            lowest = "{0[0]:.2f}, {0[1]}".format(min(figures)) if figures else "–"
            lines.append(
                f"| {group} | {text} | {f'{reached} of {len(figures)}' if figures else 'not measured'} | {lowest} |"
            )
    return "\n".join(lines)


# --- pictures, readable on a light and on a dark page -----------------------------------------------------------------

GREY = "#808080"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _finish(figure, path):
    """Everything drawn that is no data in a grey that both backgrounds carry; the background is the page's."""
    for axes in figure.axes:
        axes.tick_params(which="both", colors=GREY)
        for item in (axes.title, axes.xaxis.label, axes.yaxis.label):
            item.set_color(GREY)
        for side in axes.spines.values():
            side.set_color(GREY)
        if legend := axes.get_legend():
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set_color(GREY)
    figure.tight_layout()
    figure.savefig(path, transparent=True)
    _pyplot().close(figure)


def plot(rows: list[dict], path: Path) -> None:
    """Speed over eager PyTorch, forward and backward, one group of bars a case."""
    key = "device_ms" if any("device_ms" in row for row in rows) else "ms"
    chosen = [row for row in _first(rows) if row["pass"] == "forward+backward" and "eager" in row.get(key, ())]
    names = _columns(chosen, key)[1:]
    if not names:
        return
    figure, axes = _pyplot().subplots(figsize=(9, 0.45 * len(chosen) + 1.5))
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        places = [i + k * height for i, row in enumerate(chosen) if name in row[key]]
        values = [row[key]["eager"] / row[key][name] for row in chosen if name in row[key]]
        axes.barh(places, values, height, label=name)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(chosen))], [row["case"] for row in chosen], fontsize=7)
    axes.set_ylim(len(chosen) - 0.1, -0.3)
    axes.set_xlabel("times faster than eager PyTorch, forward and backward")
    axes.legend()
    _finish(figure, path)


def plot_scaling(rows: list[dict], path: Path) -> None:
    """Milliseconds against bytes along each axis: a line of slope 1 is a cost that grows with the bytes."""
    axes_names = list(dict.fromkeys(row["pass"] for row in rows))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, panels = _pyplot().subplots(1, len(axes_names), figsize=(4 * len(axes_names), 4), squeeze=False)
    for panel, axis in zip(panels[0], axes_names, strict=True):
        for k, op in enumerate(ops):
            chosen = [row for row in rows if row["pass"] == axis and row["op"] == op]
            for name, style in zip(("eager", *OURS), (":", "-", "--"), strict=True):
                points = [(row["bytes"] / 1e6, row["ms"][name]) for row in chosen if name in row["ms"]]
                if points:
                    panel.loglog(*zip(*points, strict=True), style, color=f"C{k}", label=f"{op}, {name}")
        panel.set_title(f"more {axis}")
        panel.set_xlabel("MB moved")
    panels[0][0].set_ylabel("ms, forward and backward")
    panels[0][0].legend(fontsize=7)
    _finish(figure, path)


# --- text ------------------------------------------------------------------------------------------------------------


def scaling_table(rows: list[dict]) -> str:
    """By axis and op: times at both ends, and the exponent of time over bytes in the last doubling."""
    lines = [
        "| axis | op | smallest: ms | largest: ms | × eager there | time grows as bytes to the |",
        "|---" * 6 + "|",
    ]
    for axis, op in dict.fromkeys((row["pass"], row["op"]) for row in rows):
        chosen = [row for row in rows if row["pass"] == axis and row["op"] == op]
        first, before, last = chosen[0], chosen[-2], chosen[-1]
        best = {id(row): row["ms"]["eager"] / row["times"]["eager"] for row in (first, before, last)}
        power = math.log(best[id(last)] / best[id(before)]) / math.log(last["bytes"] / before["bytes"])
        cells = f"{best[id(first)]:.3f} | {best[id(last)]:.3f} | {last['times']['eager']:.1f} | {power:.2f}"
        lines.append(f"| {axis} | {op} | {cells} |")
    return "\n".join(lines)


def host_table(costs: dict[str, dict[str, float]]) -> str:
    """Host time of calls on tiny tensors."""
    names = [name for name in COLUMNS if any(name in found for found in costs.values())]
    lines = [f"| forward and backward of tiny tensors | {' | '.join(f'{name} µs' for name in names)} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for what, found in costs.items():
        cells = [f"{found[name]:.1f}" if name in found else "–" for name in names]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    missed = [
        f"- MISSED: {found[name]:.0f} µs of {what} through {name} (target: at most {most})"
        for what, found in costs.items()
        for name, most in HOST_TARGETS.items()
        if found.get(name, 0) > most
    ]
    return "\n".join([*lines, *(["", *missed] if missed else [])])


def regressions(content: dict, earlier: dict) -> list[str]:
    """Rows that lost more than a tenth of their lead over eager since an earlier run of the same machine."""
    known = {name_of(row): row["times"].get("eager") for row in earlier["rows"]}
    lines = []
    for row in content["rows"]:
        before, now = known.get(name_of(row)), row["times"].get("eager")
        if before and now and now < 0.9 * before:
            name = f"{row['case']}, {row['pass']}{_process(row, content['rows'])}"
            lines.append(f"- {name}: {now:.2f} × eager, was {before:.2f} ({earlier['date']})")
    return lines


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def body(content: dict) -> str:
    """A run in Markdown."""
    rows, suite = content["rows"], content.get("suite", "")
    heading = (
        f"{content['machine']}, {_threads(content['threads'])}, torch {content['torch']}, {content['date']}; "
        f"a copy moves {content['copy_gb_per_s']:.1f} GB/s"
    )
    if "load" in content:
        heading += f"; load average {content['load']:.1f} before the run"
    on_gpu = any("device_ms" in row for row in rows)
    if not on_gpu and len(found := processes(rows)) == 1:
        heading += f"; {found[0]} process"
    if suite == "scaling":
        note = "The exponent is that of the last doubling; it is above 1 where the bytes leave the caches."
        return "\n\n".join([heading, scaling_table(rows), note])
    judged = gpu_verdict(rows, content["copy_gb_per_s"]) if on_gpu else verdict(rows, suite)
    parts = [heading, tables(rows), judged, *(profile_table(*found) for found in content.get("profiles", {}).items())]
    parts.append(host_table(content["host_us"]) if "host_us" in content else "")
    return "\n\n".join(filter(None, parts))


def write(path: Path) -> str:
    """A run's Markdown and picture beside its JSON, and the page of all runs; the run's Markdown."""
    content = json.loads(path.read_text(encoding="utf-8"))
    text = body(content)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    if content.get("suite") != "networks":
        try:
            (plot_scaling if content.get("suite") == "scaling" else plot)(content["rows"], path.with_suffix(".svg"))
        except ImportError as error:
            print(f"no picture: {error}")
    if path.parent == COMMITTED:
        PAGE.write_text(page(), encoding="utf-8")
    return text


TITLES = {"": "Operators and training steps", "full": "More shapes", "networks": "Networks", "scaling": "Scaling"}
INTRODUCTION = """# Performance

Written by `python -m benchmarks.report` from the runs in `benchmarks/results/`. Competitors are the papers' literal
formulas in eager PyTorch and under `torch.compile`, and scaled_dot_product_attention for pooling; every result is
checked against the reference in float64 before it is timed. Competitors take turns of ten milliseconds, and medians
are compared. On a CPU every competitor is measured in two processes. In the default one, as Python starts it, glibc
returns large blocks to the kernel when they are freed and maps them anew at the next call; in the tuned one malloc
keeps them (`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` are 4 GiB). On one thread (`OMP_NUM_THREADS=1`) the
clock is that of the process, page faults included, which other programs on the machine do not lengthen. On a GPU,
device time is measured with CUDA events around replays of a CUDA graph whose calls use inputs that together exceed
three L2 caches; latency is the time of single calls after the L2 cache is flushed. Where attnkern loses, the row stays;
a competitor that fails is listed with its error.
"""


def page() -> str:
    """Every machine's newest run of each suite, and what it lost since the one before."""
    runs = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(COMMITTED.glob("*.json"))]
    groups = {}
    for path, content in sorted(runs, key=lambda run: run[1]["date"]):
        if content.get("suite", "") not in TITLES:
            continue  # a rehearsal
        groups.setdefault((content["machine"], content["threads"], content.get("suite", "")), []).append(
            (path, content)
        )
    parts = [INTRODUCTION]
    for (machine, threads, suite), found in sorted(groups.items()):
        path, content = found[-1]
        parts.append(f"## {TITLES[suite]}: {machine}, {_threads(threads)}\n\n{body(content)}\n")
        if suite != "networks":
            parts.append(f"![{TITLES[suite]}](../benchmarks/results/{path.stem}.svg)\n")
        lost = regressions(content, found[-2][1]) if len(found) > 1 else []
        if lost:
            parts.append("Slower than in the run before:\n\n" + "\n".join(lost) + "\n")
    if not any("device_ms" in row for _, content in runs for row in content["rows"]):
        parts.append(f"## GPU\n\nNothing has been measured on a GPU yet: `make gpu` does.\n\n{gpu_verdict([], 1)}\n")
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
        if row["pass"] in ("forward", "forward+backward") and set(OURS) <= row.get("device_ms", {}).keys():
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
    parser.add_argument("--choice", metavar="FILE", type=Path, help="compare native with Triton in this results file")
    options = parser.parse_args()
    if options.choice:
        print(choice(json.loads(options.choice.read_text(encoding="utf-8"))["rows"]))
        return
    for path in sorted(COMMITTED.glob("*.json")):
        write(path)
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
