"""Profiles the call of one row with NVIDIA Nsight Compute and prints the metrics of its kernels.

``python -m benchmarks.profile "window_attention 32x256x56x56 bfloat16 contiguous" forward --backend native`` runs
itself under ``ncu`` and prints a line for each kernel of the call. With ``--store FILE`` the table is added to a
results file of ``benchmarks.run``.
"""

import argparse
import contextlib
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import profile_table
from benchmarks.store import ROOT, Store

#: Exit code if ncu is not installed or the host refuses it access to the counters.
NOT_RUN = 5

#: metric of Hopper and its neighbours: (column, digits)
METRICS = {
    "gpu__time_duration.sum": ("µs", 1),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("DRAM %", 0),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("L2 %", 0),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("issue slots %", 0),
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": ("sectors/load", 1),
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": ("sectors/store", 1),
    "dram__bytes_read.sum": ("MB read", 1),
    "dram__bytes_write.sum": ("MB written", 1),
    "launch__registers_per_thread": ("registers", 0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy %", 0),
}
#: to microseconds and megabytes, by the names that ncu's versions have for units
UNITS = {
    "ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6,
    "byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1, "Gbyte": 1e3,
}  # fmt: skip


def ncu() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("ncu") or shutil.which("ncu", path=f"{home}/bin")


def parse(text: str) -> list[dict[str, str]]:
    """Columns of each kernel, from ncu's CSV output, which has a line per metric between lines of its own."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels = {}
    for record in csv.DictReader(lines):
        kernel = kernels.setdefault(record["ID"], {"kernel": _short(record["Kernel Name"])})
        if record["Metric Name"] in METRICS:
            column, digits = METRICS[record["Metric Name"]]
            with contextlib.suppress(ValueError):  # "n/a" where the GPU has no such counter
                value = float(record["Metric Value"].replace(",", "")) * UNITS.get(record["Metric Unit"], 1)
                kernel[column] = f"{value:.{digits}f}"
    order = ["kernel", *(column for column, _ in METRICS.values())]
    return [{column: kernel[column] for column in order if column in kernel} for kernel in kernels.values()]


def _short(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    return name.split("(")[0].split("<")[0].removeprefix("void ")[-60:]


def call(case: str, which: str, backend: str) -> None:
    """Run the call once under the profiler, after it has been checked and warmed up."""
    import torch

    from benchmarks.cases import Call, Case, competitors, workload

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = Case.parse(case)
    ready = Call(backend, competitors(found, device)[backend], workload(found, device), which)
    ready()
    with torch.cuda.profiler.profile() if device.type == "cuda" else contextlib.nullcontext():
        ready()


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument("case", help="as the tables name it")
    parser.add_argument("which", choices=("forward", "forward+backward"))
    parser.add_argument("--backend", default="native", help="or another competitor, such as compile")
    parser.add_argument("--store", type=Path, metavar="FILE", help="results that the table is added to")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # what runs under ncu
    options = parser.parse_args()
    if options.inside:
        call(options.case, options.which, options.backend)
        return 0
    program = ncu()
    if program is None:
        print("ncu: not run, not installed")
        return NOT_RUN
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            program, "--csv", "--log-file", log, "--metrics", ",".join(METRICS), "--profile-from-start", "off",
            "--target-processes", "all", "--clock-control", "none", "--print-units", "base",
            sys.executable, "-m", "benchmarks.profile", options.case, options.which, "--backend", options.backend,
            "--inside",
        ]  # fmt: skip
        # LC_ALL: ncu formats numbers by the locale.
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    kernels = parse(text)
    if not kernels:
        output = text + done.stdout + done.stderr
        refused = "ERR_NVGPUCTRPERM" in output or "Failed to initialize the profiler" in output
        print(f"ncu: {'not run, the host refuses it' if refused else 'no kernel was profiled'}")
        print("\n".join(output.splitlines()[-10:]))
        return NOT_RUN if refused else 1
    name = f"{options.case}, {options.which}, {options.backend}"
    print(profile_table(name, kernels))
    if options.store:
        store = Store.of(options.store)
        store.put("profiles", {**store.content.get("profiles", {}), name: kernels})
    return 0


if __name__ == "__main__":
    sys.exit(main())
