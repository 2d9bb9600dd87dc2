"""Writes docs/gpu.md from the counted rows."""

import json
import math
from pathlib import Path

from benchmarks.cases import GPU_CASES, Case
from benchmarks.count import choice, estimate, rows, sass
from benchmarks.count.code import ROOT
from benchmarks.count.launches import PASSES
from benchmarks.report import geometric_mean, markdown

PAGE = ROOT / "docs/gpu.md"
COUNTS = Path(__file__).with_name("counts.json")
OURS, BACKENDS = choice.OURS, (*choice.OURS, "compile")

#: More positions than this make a large map.
SMALL = 196
#: Goals: of the time for the bytes and the launches; faster than torch.compile on small maps; seconds of device work.
NEAR, SMALL_MAPS, QUANTIZE = 1.15, 1.3, 3e-6
#: Bytes a second at which the issue budget is stated.
STATED = estimate.BANDWIDTH["H200"]


# --- the committed counts --------------------------------------------------------------------------------------------


def save(counted: list[dict], versions: dict[str, str]) -> None:
    """Write one row a line, so that a diff shows what changes."""
    _write(load() | {"versions": versions, "rows": [_compact(row) for row in counted]})


def save_section(section: str, counted: list[dict]) -> None:
    """Replace the rows of a section, "pooling" or "windows", that have been counted again."""
    stored = load()
    found = {_identity(row): row for row in (*stored.get(section, []), *map(_compact, counted))}
    _write(stored | {section: list(found.values())})


def _identity(row):
    return rows.case_of(row), row["pass"], row["backend"]


def _write(stored):
    parts = [f'"versions": {json.dumps(stored["versions"])}']
    for name in ("rows", "pooling", "windows"):
        lines = ",\n".join(map(json.dumps, stored.get(name, [])))
        parts.append(f'"{name}": [\n{lines}\n]')
    COUNTS.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def _compact(row):
    """The row without values that neither the page nor a budget needs."""
    dropped = ("opcodes", "shared_by", "cluster")
    launches = [
        {
            key: round(value, 2) if isinstance(value, float) else value
            for key, value in launch.items()
            if key not in dropped
        }
        for launch in row["launches"]
    ]
    return row | {"launches": launches}


def load() -> dict:
    return json.loads(COUNTS.read_text(encoding="utf-8"))


# --- figures of a row -------------------------------------------------------------------------------------------------


def is_large(case: Case) -> bool:
    return math.prod(case.shape[2:]) > SMALL and case.op != "anchor_quantize"


def name(case: Case) -> str:
    return str(case).replace("contiguous", "NCHW").replace("channels_last", "NHWC")


def by_case(counted: list[dict]) -> dict[tuple[Case, str], dict[str, dict]]:
    """Rows of all backends by case and pass."""
    found = {}
    for row in counted:
        found.setdefault((rows.case_of(row), row["pass"]), {})[row["backend"]] = row
    return found


def micro(row: dict | None, device: str) -> float | None:
    return None if row is None else estimate.row(row, device).seconds * 1e6


def device_work(row: dict) -> float:
    """Estimated seconds of a row's own kernels, without the gaps between them."""
    return sum(estimate.kernel(launch, "H200").seconds for launch in row["launches"])


def issue_budget(row: dict) -> float:
    """Instructions for each element that all schedulers issue while the bytes that must be moved pass at 4.3 TB/s."""
    slots = estimate.MULTIPROCESSORS * estimate.SCHEDULERS * estimate.CLOCK * 32
    return rows.floor_bytes(row) / math.prod(row["shape"]) / STATED * slots


def best(found: dict[str, dict], device: str) -> tuple[float, str] | None:
    ours = [(estimate.row(found[backend], device).seconds, backend) for backend in OURS if backend in found]
    return min(ours, default=None)


# --- tables ----------------------------------------------------------------------------------------------------------


def times_table(table, device: str) -> str:
    head = ["case", "pass", *(f"{backend} µs" for backend in BACKENDS), "best / goal", "compile / best"]
    lines = []
    for (case, which), found in table.items():
        cells = []
        for backend in BACKENDS:
            row = found.get(backend)
            cells.append("–" if row is None else f"{micro(row, device):.1f} {estimate.row(row, device).limit}")
        fastest = best(found, device)
        near = rival = "–"
        if fastest:
            seconds, backend = fastest
            near = f"{seconds / rows.goal(found[backend], device):.2f}"
            if "compile" in found:
                rival = f"{estimate.row(found['compile'], device).seconds / seconds:.2f}"
        lines.append([name(case), which, *cells, near, rival])
    return markdown(head, lines)


def widest(row: dict, kind: str) -> str:
    """The width of the accesses that move most bytes of the main kernel."""
    return next((f"{width} ({share:.0%})" for width, share in rows.widths(row, kind).items()), "–")


def counts_table(table, backend: str) -> str:
    head = [
        "case", "pass", "launches", "instructions / element", "budget", "loads", "stores", "sectors / load",
        "sectors / store", "bank cycles", "registers", "blocks / SM", "stack", "MB",
    ]  # fmt: skip
    lines = []
    for (case, which), found in table.items():
        row = found.get(backend)
        if row is None:
            continue
        main = rows.main_launch(row)
        requests = [sum(main[f"{kind}s_by"].values()) for kind in ("load", "store")]
        sectors = [sum(main[f"{kind}_sectors_by"].values()) for kind in ("load", "store")]
        each = [f"{s / r:.1f}" if r else "–" for s, r in zip(sectors, requests, strict=True)]
        others = f" + {len(row['others'])}" if row["others"] else ""
        conflicts = sum(main["shared_cycles_by"].values())
        lines.append([
            name(case), which, f"{len(row['launches'])}{others}", f"{rows.per_element(row):.1f}",
            f"{issue_budget(row):.1f}", widest(row, "loads"), widest(row, "stores"), *each,
            f"{conflicts:.0f}", str(main["registers"]), str(main["resident"]), str(main["stack"]),
            f"{sum(launch['bytes'] for launch in row['launches']) / 1e6:.1f}",
        ])  # fmt: skip
    return markdown(head, lines)


# --- goals -----------------------------------------------------------------------------------------------------------


def _verdict(kept: int, of: int) -> str:
    return f"reached in all {of} rows" if kept == of else f"reached in {kept} of {of} rows"


def _misses(misses: list[tuple[float, str]], count: int = 6) -> list[str]:
    lines = [f"    - {text}" for _, text in sorted(misses, reverse=True)[:count]]
    return [*lines, f"    - and {len(misses) - count} more, in the table below"] if len(misses) > count else lines


def _issue_goal(table, backend):
    """Large maps whose instructions fit into the time of their bytes, and whose main kernel moves whole vectors."""
    misses, count = [], 0
    for (case, which), found in table.items():
        if backend not in found or not is_large(case):
            continue
        count += 1
        row, text = found[backend], f"{name(case)} {which}"
        executed, budget = rows.per_element(row), issue_budget(row)
        narrow = [
            f"{kind} {widest(row, kind)} bit"
            for kind in ("loads", "stores")
            if is_main_mover(case, which, kind) and wide_share(row, kind) < 0.5
        ]
        spilled = spills(row)
        problems = [f"{executed:.1f} instructions per element, budget {budget:.1f}"] if executed > budget else []
        problems += narrow + ([f"{spilled:.0f} bytes of stack"] if spilled else [])
        if problems:
            misses.append((max(executed / budget, 2.0 * bool(narrow)), f"{text}: {', '.join(problems)}"))
    return count, misses


def is_main_mover(case: Case, which: str, kind: str) -> bool:
    """Whether the main kernel moves features: pooling forward stores none."""
    return kind == "loads" or not (case.op == "compatibility_pool" and which == "forward")


def wide_share(row: dict, kind: str) -> float:
    """The share of the main kernel's bytes that move by 64 bits or more."""
    return sum(share for width, share in rows.widths(row, kind).items() if width in ("64", "128", "bulk"))


def spills(row: dict) -> float:
    """Bytes of stack of the main kernel beyond the frame for huge angles that cosine brings to windows."""
    return max(0, rows.main_launch(row)["stack"] - (40 if row["op"] == "window_attention" else 0))


def goals(table, device: str = "H200") -> str:
    lines = []
    for backend in OURS:
        count, misses = _issue_goal(table, backend)
        lines.append(
            f"- Main loops on large maps, {backend}: instructions within the issue budget, vectors of 64 or 128 bits,"
            f" no spills: {_verdict(count - len(misses), count)}."
        )
        lines += _misses(misses)
    near, rival, small = ([], 0), ([], 0), ([], 0)
    bounded = 0  # small maps whose bytes alone take too long
    for (case, which), found in table.items():
        fastest = best(found, device)
        if fastest is None or case.op == "anchor_quantize":
            continue
        seconds, backend = fastest
        text = f"{name(case)} {which}, {backend}"
        ratio = seconds / rows.goal(found[backend], device)
        if is_large(case):
            near = near[0] + ([(ratio, f"{text}: {ratio:.2f} × the goal")] if ratio > NEAR else []), near[1] + 1
        if "compile" in found:
            faster = estimate.row(found["compile"], device).seconds / seconds
            needed = 1.0 if is_large(case) else SMALL_MAPS
            at_goal = f"; at the goal it would be {ratio * faster:.2f} ×"
            miss = (
                [(1 / faster, f"{text}: {faster:.2f} × as fast as torch.compile{at_goal}")] if faster < needed else []
            )
            if is_large(case):
                rival = rival[0] + miss, rival[1] + 1
            else:
                small = small[0] + miss, small[1] + 1
                bounded += ratio * faster < SMALL_MAPS
    for text, (misses, count) in (
        (f"Large maps, the better of native and Triton: at most {NEAR} × the goal", near),
        ("Large maps, the better of the two: faster than the kernels of torch.compile", rival),
        (
            f"Small maps, the better of the two: at least {SMALL_MAPS} × as fast as torch.compile"
            f" (the goal itself is slower than that in {bounded} rows)",
            small,
        ),
    ):
        lines.append(f"- {text}: {_verdict(count - len(misses), count)}.")
        lines += _misses(misses)
    for (case, which), found in table.items():
        if case == Case("anchor_quantize", (128, 1, 16, 16)):
            for backend in OURS:
                if backend in found:
                    work = device_work(found[backend])
                    verdict = "reached" if work <= QUANTIZE else "not reached"
                    lines.append(
                        f"- {name(case)} {which}, {backend}: at most {QUANTIZE * 1e6:.0f} µs of device work: {verdict},"
                        f" {work * 1e6:.1f} µs."
                    )
    return "\n".join(lines)


def summary(table) -> str:
    """Geometric means over torch.compile by operator and pass."""
    head = ["", *(f"{backend}, {device}" for device in estimate.BANDWIDTH for backend in (*OURS, "better"))]
    groups = {}
    for (case, which), found in table.items():
        if "compile" in found and all(backend in found for backend in OURS):
            size = "" if case.op == "anchor_quantize" else ", large maps" if is_large(case) else ", small maps"
            groups.setdefault(f"{case.op} {which}{size}", []).append(found)
    lines = []
    for text, group in sorted(groups.items()):
        cells = []
        for device in estimate.BANDWIDTH:
            for backend in (*OURS, "better"):
                ratios = []
                for found in group:
                    mine = (
                        best(found, device)[0] if backend == "better" else estimate.row(found[backend], device).seconds
                    )
                    ratios.append(estimate.row(found["compile"], device).seconds / mine)
                cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})")
        lines.append([text, *cells])
    return markdown(head, lines)


def choices(counted: list[dict]) -> str:
    lines = []
    for op, rule in choice.rules(counted).items():
        lines.append(
            f"- {op}: {rule}. Its calls take {rule.mean:.2f} × the better backend's time by geometric mean, at most"
            f" {rule.worst:.2f} × ({rule.worst_at})."
        )
    native = choice.always_native(counted)
    lines += [
        "",
        "The automatic choice is native for every call, except for pooling with many queries or a mask and for several"
        " windows, where it is Triton. Over the calls of this section native takes"
        f" {native.mean:.2f} × the time of the better backend by geometric mean, at most {native.worst:.2f} ×"
        f" ({native.worst_at}). Most of these"
        " differences are smaller than the uncertainty of the estimates.",
        "",
        "The table has native's estimated time over Triton's on an H200, forward and backward together. Below 1, native"
        " is faster.",
    ]
    return "\n".join(lines)


def choice_table(counted: list[dict]) -> str:
    """Native over Triton of each call, forward and backward together."""
    kinds = [(dtype, layout) for dtype in ("bfloat16", "float32") for layout in ("contiguous", "channels_last")]
    head = ["native / triton", *(f"{dtype} {'NCHW' if layout == 'contiguous' else 'NHWC'}" for dtype, layout in kinds)]
    ratios = {}
    for call in choice.calls(counted, "H200"):
        if call.op != "anchor_quantize":
            of_shape = ratios.setdefault(f"{call.op} {'x'.join(map(str, call.shape))}", {})
            of_shape[call.dtype, call.layout] = f"{call.seconds['native'] / call.seconds['triton']:.2f}"
    return markdown(head, [[text, *(found.get(kind, "–") for kind in kinds)] for text, found in ratios.items()])


# --- the page --------------------------------------------------------------------------------------------------------

INTRODUCTION = """# Counted for a GPU

Written by `make count`, which needs no GPU. No time on this page was measured: instructions, registers, memory sectors
and launches are **counted** in the machine code for compute capability 9.0 (H100, H200); microseconds are **estimated**
from the counts, within about ±30 %. On a machine with a GPU, `make gpu` measures.

A row names the operator, the shape N×C×H×W (N×C×L for `tokens`), the dtype and the memory format: NCHW is contiguous,
NHWC is channels_last with the same shape. Q is the number of anchors (20 if not given), M the number of queries and K
the number of windows per image.

## What is counted, and how

- **Launches are recorded.** The operators run at the benchmark's shapes on tensors without data. Native ones are
  built for the CPU from the same sources, and record each launch with its parameters instead of running it.
  Triton's are recorded when their launchers start them, and compiled ahead of time. Those of torch.compile come from
  the code that Inductor generates for the papers' literal formulas, which is run the same way.
- **Machine code is interpreted.** An interpreter runs all threads of one block in the middle of the grid (of one
  cluster, where blocks form clusters) with these parameters: registers, predicates, divergence, shuffles, barriers and
  shared memory behave as on the GPU. It counts executed warp instructions, those whose predicate is off included;
  global loads and stores by width; the 32-byte sectors of each request; the cycles of shared memory with its bank
  conflicts.
- **Resources** (registers, shared memory, bytes of stack) are those that the compiler reports; blocks per
  multiprocessor follow from them. The stack holds spilled registers; 32 or 40 bytes of it in the window's kernels are
  the frame of the reduction of huge angles, which ordinary rectangles do not use.
- **Bytes** of a launch are the distinct sectors that the interpreted block touches, times the number of blocks, but at
  most the size of each tensor. Scratch that
  fits into the second-level cache is read from there.

Approximations: global memory holds ordinary numbers of the right dtype, so that branches on data are those of ordinary
data, and stores to it are not read back. The first and the last blocks of a grid may do more or less than the middle
one. A "last block" that finishes the work of all blocks is not run. Of the configurations that Inductor would time, the
one with the smallest estimate counts; those that it tries only for kernels with many registers are left out. Float
atomics of its kernels on one address are counted as ordinary stores, which favours Inductor.

## What is estimated, and how

"""

ESTIMATE = """The time of a launch is the largest of these, plus {fill:.1f} µs before its first
bytes arrive and after its last have left:

- **issue**: the warp instructions of a multiprocessor's blocks, through {schedulers} schedulers that issue in
  {issue:.0%} of the cycles at {clock:.3f} GHz; {multiprocessors} multiprocessors;
- **chain**: the serial work of a block, times the number of blocks that follow each other on a multiprocessor:
  loads whose latency nothing hides ({latency:.2f} µs from memory, {l2:.2f} µs from the second-level cache), and {chain}
  cycles for each instruction of the longest warp;
- **memory**: bytes at {share:.0%} of a copy's bandwidth, {h200:.1f} TB/s on an H200 and {h100:.1f} TB/s on an H100; one
  multiprocessor takes at most {single:.0f} GB/s;
- **l2**: sectors at {l2_bandwidth:.1f} TB/s; sectors that a block has read before come from its own cache;
- **shared**: cycles of shared memory, bank conflicts included, and of requests to global memory;
- **tensor**: cycles of the tensor cores (pooling with many queries).

If a multiprocessor runs more blocks than it can hold at once, {overlapped:.0%} of the blocks that it can hold are
added to its share, because the last blocks end unevenly. Each launch of a call adds {launch:.1f} µs. Each of PyTorch's
own kernels that the call starts (the "+" in the tables) adds {launch:.1f} µs + {fill:.1f} µs. The **goal** is the
time of the bytes that must be moved, features read and written once, at {share:.0%} of a copy's bandwidth, and
{launch:.1f} µs for each launch. The **budget** of instructions per element is what all schedulers can issue while these
bytes pass at {stated:.1f} TB/s.

"""


def pooling_table(counted: list[dict]) -> str:
    """Estimates of pooling with many queries, beside the time for its bytes and launches."""
    lines = []
    for (case, which), found in by_case(counted).items():
        for backend, row in found.items():
            time, main = estimate.row(row, "H200"), rows.main_launch(row)
            cycles = main["tensor_cycles"] * main["grid"] / (estimate.SCHEDULERS * estimate.MULTIPROCESSORS)
            times = estimate.row(row, "H100").seconds, rows.goal(row, "H200"), cycles / estimate.CLOCK
            lines.append([
                f"{name(case)} {which}", backend, f"{time.seconds * 1e6:.1f} ({time.limit})",
                *(f"{seconds * 1e6:.1f}" for seconds in times),
                str(len(row["launches"])), f"{rows.per_element(row):.1f}", str(main["registers"]),
            ])  # fmt: skip
    head = ["row", "backend", "H200", "H100", "goal", "tensor cores", "launches", "instructions", "registers"]
    return markdown(head, lines)


def pooling(counted: list[dict]) -> list[str]:
    """The section of pooling with many queries."""
    if not counted:
        return []
    return [
        "## Pooling with many queries\n\nEstimated microseconds with M queries per image. The goal is the time on an"
        " H200 for the launches and for the bytes of the features, read and written once; tensor cores are the"
        " microseconds of the main kernel's matrix products alone. Instructions are those of threads for each element"
        " of the features.",
        pooling_table(counted),
    ]


def windows(counted: list[dict]) -> list[str]:
    """The section of several windows."""
    if not counted:
        return []
    return [
        "## Several windows\n\nEstimated microseconds on an H200 with K windows per image. The map is computed by a"
        " launch of its own, whose time is proportional to K.",
        times_table(by_case(counted), "H200"),
    ]


def coverage(table) -> str:
    """How many of the benchmark's rows the page has."""
    wanted = [(case, which) for case in GPU_CASES for which in PASSES]
    missing = {name: sum(name not in table.get(key, ()) for key in wanted) for name in BACKENDS}
    parts = [f"{count} of {len(wanted)} through {name}" for name, count in missing.items() if count]
    return f"Rows that are not counted: {', '.join(parts)}." if parts else f"All {len(wanted)} rows are counted."


def text(stored: dict) -> str:
    counted = stored["rows"]
    table = by_case(counted)
    constants = dict(
        fill=estimate.FILL * 1e6, schedulers=estimate.SCHEDULERS, issue=estimate.ISSUE, clock=estimate.CLOCK / 1e9,
        multiprocessors=estimate.MULTIPROCESSORS, latency=estimate.LATENCY * 1e6, chain=estimate.CHAIN_CYCLES,
        l2=estimate.LATENCY * sass.L2_LATENCY / sass.MEMORY_LATENCY * 1e6, share=estimate.SHARE,
        h200=estimate.BANDWIDTH["H200"] / 1e12, h100=estimate.BANDWIDTH["H100"] / 1e12,
        single=estimate.OF_MULTIPROCESSOR / 1e9, l2_bandwidth=estimate.L2 / 1e12, overlapped=estimate.OVERLAPPED,
        launch=estimate.LAUNCH * 1e6, stated=STATED / 1e12,
    )  # fmt: skip
    versions = ", ".join(f"{package} {version}" for package, version in stored["versions"].items())
    parts = [
        INTRODUCTION + ESTIMATE.format(**constants) + f"Compiled with {versions}. {coverage(table)}",
        "## Goals\n\nFor the estimates on an H200; small maps have at most 196 positions. Below each goal are the rows"
        " that are farthest from it.",
        goals(table),
        "## Compared with torch.compile\n\nEstimated speed over torch.compile's kernels: the geometric mean, and in"
        " brackets the worst row. Below 1 torch.compile is faster.",
        summary(table),
        "## Native or Triton\n\nOne backend runs the forward and the backward pass of a call. The simplest rules of at"
        " most two conditions that fit the estimates on an H200:",
        choices(counted),
        choice_table(counted),
        "## Estimated microseconds\n\nEach time is followed by what limits the longest launch; best is the better of"
        " native and Triton.",
        *(f"### {device}\n\n{times_table(table, device)}" for device in ("H200", "H100")),
        *pooling(stored.get("pooling", [])),
        *windows(stored.get("windows", [])),
        "## Counts\n\nInstructions are those of all launches; the columns from loads on are the main kernel's, which"
        " moves most bytes. Loads and stores name the width in bits that most bytes have; bank cycles are those of a"
        " block; stack is in bytes per thread, spilled registers and the frame described above together; MB are the"
        " bytes of all launches.",
        *(f"### {title}\n\n{counts_table(table, backend)}" for title, backend in zip(TITLES, BACKENDS, strict=True)),
    ]
    return "\n\n".join(parts) + "\n"


TITLES = ("Native", "Triton", "torch.compile")


def write() -> None:
    """The page, from the committed counts."""
    PAGE.write_text(text(load()), encoding="utf-8")
