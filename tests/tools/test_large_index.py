"""More than 2**31 elements in the kernels of GPUs, without one (large_index.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

HERE = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that takes no room until it is touched")
@pytest.mark.parametrize("kind", ["triton", "cuda"])
def test_the_last_image_is_where_it_belongs(kind, monkeypatch):
    if kind == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if kind == "triton" else "0")
    monkeypatch.delenv("MALLOC_PERTURB_", raising=False)  # it would touch all of it
    command = [sys.executable, HERE / "large_index.py", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" same") == 13
