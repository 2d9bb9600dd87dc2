"""DDP, FSDP2 and DTensor in two gloo processes under torchrun; the checks are in distributed.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE

HERE = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_compute_what_one_does():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, HERE / "distributed.py"],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    checks = ("ddp", "fsdp", "counts", "uneven_losses", "dtensor")
    assert done.stdout.splitlines() == [f"{name}: ok" for name in checks]
