"""Runs the tests in lanes, two at a time, and prints how many passed: `python tests/run.py [--quick] [LANE ...]`.

A lane is one pytest process: folders of tests and an environment. With --quick (`make test`) it leaves out the tests
marked slow and some parametrisations; without it (`make test-all`) it runs everything.

project       archives, documentation, types, and the tools: benchmarks, planted faults, sanitizers
networks      what is built on the kernels: models, data, training, evaluation
native        the CPU kernels and the reference, and their use from PyTorch
interpreted   the Triton kernels in Triton's interpreter, on small shapes
cuda          the CUDA kernels: the library's resources, and their code emulated on the CPU
ahead         the Triton and CUDA kernels compiled for GPUs: resources, spills, barriers, counted instructions
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent

#: PyTorch fills new tensors with NaN in the tests, but not those that the kernels allocate: glibc fills these (0x7f).
POISON = {"MALLOC_PERTURB_": "128"}

#: The random tests of `make fuzz` draw the same calls in every run here.
SEED = {"ATTNKERN_FUZZ_SEED": "0"}

#: Two lanes share the cores: one thread where more test nothing new, and threads that sleep while they wait.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PASSIVE = {"OMP_WAIT_POLICY": "passive"}

COMPILED = {"ATTNKERN_TEST_BACKENDS": "native,reference"}

#: lane: folders, environment; in an order in which both cores are busy to the end
LANES = {
    "native": (["kernels", "native", "integration"], {**COMPILED, **PASSIVE, **POISON, **SEED}),
    "networks": (["networks"], {**COMPILED, **ONE_THREAD, **POISON}),
    "project": (["project", "tools"], {**COMPILED, **ONE_THREAD}),
    "ahead": (["ahead"], ONE_THREAD),
    "interpreted": (["kernels"], {"ATTNKERN_TEST_BACKENDS": "triton", "TRITON_INTERPRET": "1", **ONE_THREAD}),
    "cuda": (
        ["cuda_kernels", "kernels"],
        {"ATTNKERN_TEST_BACKENDS": "native", "ATTNKERN_TEST_CUDA_ON_HOST": "1", **ONE_THREAD, **POISON},
    ),
}  # fmt: skip

OUTCOMES = ("passed", "failed", "skipped")
PROGRESS = 10  # seconds between two lines of progress

#: A line of pytest -v: the test, its outcome, and the share of the tests that are done.
TEST_LINE = re.compile(r"^(?:tests/)?(\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *(\d+)%\]")


class Lane:
    """One lane as it runs: its log is read for progress, and failures are printed when they happen."""

    def __init__(self, name: str, options: list[str]):
        self.name, self.options = name, options
        self.share, self.at, self.began = "0", "collecting", 0.0
        self.running = False

    def __str__(self) -> str:
        return f"{self.name} {self.share} % ({time.monotonic() - self.began:.0f} s, after {self.at})"

    def read(self, stream) -> str:
        """The output after the lines of single tests."""
        rest = []
        for line in stream:
            if match := TEST_LINE.match(line):
                self.at, outcome, self.share = match.groups()
                if outcome in ("FAILED", "ERROR"):
                    print(f"{self.name}: {outcome} {self.at}", flush=True)
            elif rest or line.startswith("==="):
                rest.append(line)
        # The first heading is that of the session.
        return "".join(rest[1:])

    def run(self) -> tuple[dict[str, int], float]:
        """Count the outcomes and measure the seconds."""
        folders, environment = LANES[self.name]
        self.began, self.running = time.monotonic(), True
        print(f"{self.name}: starts ({', '.join(folders)})", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-v", "--durations=10", f"--junit-xml={report}", *self.options]
            process = subprocess.Popen(
                [*command, *(str(HERE / name) for name in folders)], cwd=HERE.parent, text=True, errors="replace",
                env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            )  # fmt: skip
            output = self.read(process.stdout)
            code = process.wait()
            self.running = False
            counts = count(report)
        seconds = time.monotonic() - self.began
        # A lane that was killed, or that ran no test, has failed whatever its report says.
        if code != 0 and counts["failed"] == 0:
            counts["failed"] = 1
        summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
        print(f"\n=== {self.name}: {summary} in {seconds:.0f} s\n{output}", flush=True)
        return counts, seconds


def count(report: Path) -> dict[str, int]:
    """The outcomes in a JUnit report; all zero if there is none."""
    if not report.exists():
        return dict.fromkeys(OUTCOMES, 0)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


@contextlib.contextmanager
def progress(lanes: list[Lane]):
    """Print where the running lanes are, every few seconds."""
    ended = threading.Event()

    def watch():
        while not ended.wait(PROGRESS):
            print("... " + "; ".join(str(lane) for lane in lanes if lane.running), flush=True)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lanes", nargs="*", metavar="LANE", help="lanes to run; default: all")
    parser.add_argument("--quick", action="store_true", help="leave out slow tests and some parametrisations")
    arguments = parser.parse_args()
    if unknown := set(arguments.lanes) - LANES.keys():
        parser.error(f"unknown lane {', '.join(sorted(unknown))}; the lanes are {', '.join(LANES)}")
    options = ["--quick"] if arguments.quick else []
    lanes = [Lane(name, options) for name in arguments.lanes or LANES]
    with progress(lanes), ThreadPoolExecutor(2) as pool:
        results = list(pool.map(Lane.run, lanes))
    print(f"{'lane':12} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for lane, (counts, seconds) in zip(lanes, results, strict=True):
        print(f"{lane.name:12} {counts['passed']:7} {counts['failed']:7} {counts['skipped']:8} {seconds:8.0f}")
    total = {outcome: sum(counts[outcome] for counts, _ in results) for outcome in OUTCOMES}
    print("\n{passed} passed, {failed} failed, {skipped} skipped".format(**total))
    return total["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
