"""GPU kernels on more than 2**31 elements, without a GPU (large_index.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

HERE = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs an allocator that commits memory lazily")
@pytest.mark.parametrize("kind", ["triton", "cuda"])
def test_the_last_image_has_the_same_bits_alone(kind, monkeypatch):
    if kind == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if kind == "triton" else "0")
    monkeypatch.delenv("MALLOC_PERTURB_", raising=False)  # it would touch all memory
    command = [sys.executable, HERE / "large_index.py", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" same") == 17
