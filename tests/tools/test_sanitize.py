"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: sanitize.sh, `make sanitize`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")


def has(library):
    """Whether the compiler has a library: it prints the path, or only the name if it has not."""
    found = shutil.which(CXX) and subprocess.run([CXX, f"-print-file-name={library}"], capture_output=True, text=True)
    return bool(found) and "/" in found.stdout


@pytest.mark.slow
def test_sanitizers():
    """The operators' tests give no report, and each sanitizer finds the error planted for it."""
    for library in ("libasan.so", "libubsan.so"):
        if not has(library):
            pytest.skip(f"{CXX} has no {library}")
    done = subprocess.run(["bash", HERE / "sanitize.sh", sys.executable], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("address", "undefined"):
        assert f"{name}: the planted error is found" in done.stdout
