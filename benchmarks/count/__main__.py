"""`make count`: counts what every kernel executes at the benchmark's shapes, without a GPU, and estimates its time.

``python -m benchmarks.count --op compatibility_pool --backend native`` prints a part of it; without a choice everything
is counted, and docs/gpu.md and the committed counts are written. ``--section`` counts pooling with many queries, or
several windows, and writes their section, for the backends that are chosen.
"""

import argparse
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.cases import GPU_CASES, GPU_POOLING, GPU_WINDOWS
from benchmarks.count import choice, estimate, page, rows
from benchmarks.count.launches import PASSES
from benchmarks.count.sass import SassError

#: Cases of the sections of docs/gpu.md that are counted by themselves.
SECTIONS = {
    "pooling": [case for case in GPU_POOLING if case.op == "compatibility_pool"],
    "windows": GPU_WINDOWS,
}


def _arguments():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.count", description=__doc__.split("\n")[0])
    operators = sorted({case.op for case in GPU_CASES})
    parser.add_argument("--op", action="append", choices=operators)
    parser.add_argument("--backend", action="append", choices=list(rows.BACKENDS))
    parser.add_argument("--shape", action="append", help="such as 32x256x56x56")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--layout", action="append", choices=["contiguous", "channels_last"])
    parser.add_argument("--pass", action="append", choices=PASSES, dest="passes")
    parser.add_argument("--library", action="append", type=Path, help="native machine code of another build")
    parser.add_argument("--cubin", action="append", type=Path, help="native machine code of a cubin")
    parser.add_argument("--kernels", action="store_true", help="a line for each launch")
    parser.add_argument("--section", choices=SECTIONS, help="this section of the page instead of all else")
    parser.add_argument("--page", action="store_true", help="write docs/gpu.md from the committed counts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def chosen(arguments):
    """The cases that the options select."""
    for case in SECTIONS[arguments.section] if arguments.section else GPU_CASES:
        values = case.op, "x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch."), case.layout
        options = arguments.op, arguments.shape, arguments.dtype, arguments.layout
        if all(option is None or value in option for value, option in zip(values, options, strict=True)):
            yield case


def _rows(task):
    import torch

    torch.set_num_threads(1)
    case, backend, sources = task
    try:
        return rows.rows(case, backend, **({"sources": sources} if backend == "native" else {}))
    except (SassError, LookupError) as error:
        return [f"{case} {backend}: {error}"]


def count_all(cases, backends, sources=(), jobs=1):
    """Yields the rows of each case when they are ready, or a message if the case cannot be counted."""
    tasks = [(case, backend, sources) for case, backend in itertools.product(cases, backends)]
    if jobs == 1 or len(tasks) == 1:
        found = map(_rows, tasks)
        for counted in found:
            yield from counted
        return
    with ProcessPoolExecutor(jobs) as pool:
        for counted in pool.map(_rows, tasks):
            yield from counted


HEAD = (
    f"{'row':66} {'launches':>8} {'instr/el':>8} {'regs':>5} {'spill':>5} {'blk/SM':>6} {'loads':>10} {'stores':>10}"
    f" {'H200 µs':>8} {'H100 µs':>8} {'limit':>7} {'goal':>6}"
)


def line(row):
    case = rows.case_of(row)
    main = rows.main_launch(row)
    name = f"{case} {row['pass']} {row['backend']}"
    launches = len(row["launches"]) + len(row["others"])
    times = {device: estimate.row(row, device) for device in ("H200", "H100")}
    return (
        f"{name:66} {launches:8} {rows.per_element(row):8.1f} {main['registers']:5}"
        f" {main['stack']:5} {main['resident']:6} {page.widest(row, 'loads'):>10}"
        f" {page.widest(row, 'stores'):>10} {times['H200'].seconds * 1e6:8.1f}"
        f" {times['H100'].seconds * 1e6:8.1f} {times['H200'].limit:>7} {rows.goal(row, 'H200') * 1e6:6.1f}"
    )


def detail(launch):
    limit = estimate.kernel(launch, "H200")
    opcodes = ", ".join(f"{name} {n:.0f}" for name, n in list(launch["opcodes"].items())[:8])
    lines = [
        f"    {launch['kernel']}: {launch['grid']} blocks of {launch['threads']}, {launch['registers']} registers,"
        f" stack {launch['stack']}, shared {launch['shared']}, {launch['resident']} blocks/SM,"
        f" {limit.seconds * 1e6:.1f} µs ({limit.limit}), {launch['bytes'] / 1e6:.2f} MB",
        f"      {launch['instructions']:.0f} instructions a block, longest warp {launch['longest_warp']},"
        f" waits {launch['waits']}: {opcodes}",
    ]
    for kind in ("loads", "stores"):
        parts = [f"{n:.0f} x {width} ({launch[kind[:-1] + '_sectors_by'][width] / n:.1f} sectors each)"
                 for width, n in launch[f"{kind}_by"].items()]  # fmt: skip
        lines.append(f"      {kind} {', '.join(parts) or 'none'}")
    parts = [f"{n:.0f} x {key} ({launch['shared_cycles_by'][key] / n:.1f} cycles each)"
             for key, n in launch["shared_by"].items()]  # fmt: skip
    lines.append(f"      shared {', '.join(parts) or 'none'}")
    return "\n".join(lines)


def versions():
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def main():
    arguments = _arguments()
    if arguments.page:
        page.write()
        return
    sources = tuple((arguments.library or []) + (arguments.cubin or []))
    # torch.compile calls a library for the products of many queries, whose code cannot be counted.
    known = [name for name in rows.BACKENDS if not (arguments.section == "pooling" and name == "compile")]
    cases, backends = list(chosen(arguments)), arguments.backend or known
    if not cases:
        sys.exit("no case is left")
    print(HEAD)
    counted, errors = [], []
    for row in count_all(cases, backends, sources, arguments.jobs):
        if isinstance(row, str):
            errors.append(row)
            print(row, file=sys.stderr, flush=True)
        elif arguments.passes is None or row["pass"] in arguments.passes:
            counted.append(row)
            print(line(row), flush=True)
            if arguments.kernels:
                print("\n".join(detail(launch) for launch in row["launches"]), flush=True)
    if arguments.section:
        if not (sources or errors):
            page.save_section(arguments.section, counted)
            page.write()
        sys.exit(len(errors) > 0)
    for op, rule in choice.rules(counted).items():
        print(f"{op}: {rule}; {rule.mean:.2f} × the better one's time, at most {rule.worst:.2f} × ({rule.worst_at})")
    if cases == GPU_CASES and backends == list(rows.BACKENDS) and not (sources or arguments.passes or errors):
        page.save(counted, versions())
        page.write()
    sys.exit(len(errors) > 0)


if __name__ == "__main__":
    main()
