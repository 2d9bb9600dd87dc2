"""pytest-benchmark suite of the ops: `pytest benchmarks/bench_ops.py --benchmark-group-by=group`."""

import pytest
import torch

from benchmarks.cases import CPU_CASES, GPU_CASES, PASSES, Call, competitors, workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = GPU_CASES if DEVICE.type == "cuda" else CPU_CASES


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    "case, name",
    [(case, name) for case in CASES for name in competitors(case, DEVICE)],
    ids=str,
)
def test_latency(benchmark, case, name, which):
    call = Call(name, competitors(case, DEVICE)[name], workload(case, DEVICE), which)
    benchmark.group = f"{case} {which}"
    benchmark.extra_info["bytes"] = case.bytes(which)
    benchmark(call)
    benchmark.extra_info["GB/s"] = case.bytes(which) / benchmark.stats.stats.median / 1e9
