"""Runs the test lanes, each in processes of its own, and sums them up: `make test`. Two at a time, but the first alone.

1 native        compiled CPU kernels and references, and what is built on them
2 interpreted   Triton kernels in Triton's interpreter, small shapes
3 ahead         Triton kernels compiled ahead of time for three GPUs, resources and spills
4 cuda          CUDA C++: the built library and its resources; kernels run on the CPU under the host emulation
5 house         archives, pages, pictures, tools: what is slow and needs neither two threads nor a quiet clock
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CUDA = ["test_cuda_build.py", "test_cuda_on_host.py"]
AHEAD = ["test_triton_aot.py"]
OPS = ["test_ops.py", "test_window.py", "test_quantize.py", "test_pool.py", "test_promises.py"]
NETWORKS = ["test_model_backends.py"]
HOUSE = [
    "test_packaging.py", "test_release.py", "test_report.py", "test_docs.py", "test_viz.py", "test_public_names.py",
    "test_mutate.py", "test_accuracy.py", "test_large_index.py", "test_types.py",
]  # fmt: skip
EVERYTHING_ELSE = sorted({path.name for path in HERE.glob("test_*.py")} - set(CUDA + AHEAD + HOUSE))

#: The kernels' new tensors come straight from the allocator, past PyTorch's filling: glibc fills them, every byte 0x7f.
POISON = {"MALLOC_PERTURB_": "128"}

#: What is random elsewhere (`make fuzz`) is the same in every run here.
SEED = {"ATTNKERN_FUZZ_SEED": "0"}

LANES = {
    "native": (EVERYTHING_ELSE, {"ATTNKERN_TEST_BACKENDS": "native,reference", **POISON, **SEED}),
    "house": (HOUSE, {"ATTNKERN_TEST_BACKENDS": "native,reference", "OMP_NUM_THREADS": "1"}),
    "interpreted": (OPS + NETWORKS, {"ATTNKERN_TEST_BACKENDS": "triton", "TRITON_INTERPRET": "1"}),
    "ahead": (AHEAD, {}),
    "cuda": (CUDA + OPS, {"ATTNKERN_TEST_BACKENDS": "native", "ATTNKERN_TEST_CUDA_ON_HOST": "1", **POISON}),
}


#: It uses several threads, and some of its tests look at the clock.
ALONE = "native"


def run(lane: str, beside_others: bool = False) -> tuple[dict[str, int], float]:
    """Counts of a lane's outcomes, and its seconds. Beside others its output is printed in one piece, at the end."""
    files, environment = LANES[lane]
    heading = f"\n=== lane {lane}: {' '.join(files)}"
    print(f"lane {lane} begins" if beside_others else heading, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--durations=5", f"--junit-xml={report}"]
        log = Path(folder) / "log"
        with log.open("w") if beside_others else contextlib.nullcontext() as output:
            done = subprocess.run(
                [*command, *(str(HERE / name) for name in files)],
                env={**os.environ, **environment}, cwd=HERE.parent, stdout=output, stderr=output,
            )  # fmt: skip
        if beside_others:
            print(heading, log.read_text(), sep="\n", flush=True)
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        if report.exists():
            suite = ElementTree.parse(report).getroot().find("testsuite")
            total, failures, errors, skipped = (
                int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")
            )
            counts = {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}
        # A lane that broke off, or that ran nothing, has failed whatever it counted.
        if done.returncode != 0 and counts["failed"] == 0:
            counts["failed"] = 1
    return counts, time.monotonic() - began


def main() -> int:
    lanes = sys.argv[1:] or list(LANES)
    results = {lane: run(lane) for lane in lanes if lane == ALONE}
    others = [lane for lane in lanes if lane != ALONE]
    with ThreadPoolExecutor(2) as pool:
        results |= zip(others, pool.map(lambda lane: run(lane, len(others) > 1), others), strict=True)
    print(f"\n{'lane':12} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for lane, (counts, seconds) in results.items():
        print(f"{lane:12} {counts['passed']:7} {counts['failed']:7} {counts['skipped']:8} {seconds:8.0f}")
    total = {key: sum(counts[key] for counts, _ in results.values()) for key in ("passed", "failed", "skipped")}
    print("\n{passed} passed, {failed} failed, {skipped} skipped".format(**total))
    return total["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
