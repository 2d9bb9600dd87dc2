"""Runs the test lanes, each in processes of its own, two at a time, and sums them up: `make test`.

native        compiled CPU kernels and references
networks      what is built on them: models, data, training, evaluation
ahead         Triton kernels compiled ahead of time for three GPUs, resources and spills; counted instructions
interpreted   Triton kernels in Triton's interpreter, small shapes
house         archives, pages, pictures, tools, sanitizers
cuda          CUDA C++: the built library and its resources; kernels run on the CPU under the host emulation
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

#: The kernels' new tensors come straight from the allocator, past PyTorch's filling: glibc fills them, every byte 0x7f.
POISON = {"MALLOC_PERTURB_": "128"}

#: What is random elsewhere (`make fuzz`) is the same in every run here.
SEED = {"ATTNKERN_FUZZ_SEED": "0"}

#: Lanes share the processors: one thread where several prove nothing, and none that spins while it waits.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PATIENT = {"OMP_WAIT_POLICY": "passive"}

#: What runs on the CPU's own kernels.
COMPILED = {"ATTNKERN_TEST_BACKENDS": "native,reference"}

#: lane: folders, environment; in the order in which they begin.
LANES = {
    "native": (["kernels", "native", "integration"], {**COMPILED, **PATIENT, **POISON, **SEED}),
    "networks": (["networks"], {**COMPILED, **ONE_THREAD, **POISON}),
    "ahead": (["ahead"], {}),
    "interpreted": (["kernels"], {"ATTNKERN_TEST_BACKENDS": "triton", "TRITON_INTERPRET": "1", **ONE_THREAD}),
    "house": (["project", "tools"], {**COMPILED, **ONE_THREAD}),
    "cuda": (
        ["cuda_kernels", "kernels"], {"ATTNKERN_TEST_BACKENDS": "native", "ATTNKERN_TEST_CUDA_ON_HOST": "1", **POISON},
    ),
}  # fmt: skip


def run(lane: str, beside_others: bool = False) -> tuple[dict[str, int], float]:
    """Counts of a lane's outcomes, and its seconds. Beside others its output is printed in one piece, at the end."""
    folders, environment = LANES[lane]
    heading = f"\n=== lane {lane}: {' '.join(folders)}"
    print(f"lane {lane} begins" if beside_others else heading, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--durations=5", f"--junit-xml={report}"]
        log = Path(folder) / "log"
        with log.open("w", encoding="utf-8") if beside_others else contextlib.nullcontext() as output:
            done = subprocess.run(
                [*command, *(str(HERE / name) for name in folders)],
                env={**os.environ, **environment}, cwd=HERE.parent, stdout=output, stderr=output,
            )  # fmt: skip
        if beside_others:
            print(heading, log.read_text(encoding="utf-8", errors="replace"), sep="\n", flush=True)
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
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(lanes, pool.map(lambda lane: run(lane, len(lanes) > 1), lanes), strict=True))
    print(f"\n{'lane':12} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for lane, (counts, seconds) in results.items():
        print(f"{lane:12} {counts['passed']:7} {counts['failed']:7} {counts['skipped']:8} {seconds:8.0f}")
    total = {key: sum(counts[key] for counts, _ in results.values()) for key in ("passed", "failed", "skipped")}
    print("\n{passed} passed, {failed} failed, {skipped} skipped".format(**total))
    return total["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
