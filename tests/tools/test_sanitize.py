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
    """A compiler that lacks a library names it without a folder."""
    found = shutil.which(CXX) and subprocess.run([CXX, f"-print-file-name={library}"], capture_output=True, text=True)
    return bool(found) and "/" in found.stdout


@pytest.mark.slow
def test_sanitizers():
    """No report from the operators' tests; from each sanitizer one of the error that is planted for it."""
    for library in ("libasan.so", "libubsan.so"):
        if not has(library):
            pytest.skip(f"{CXX} has no {library}")
    done = subprocess.run(["bash", HERE / "sanitize.sh", sys.executable], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("address", "undefined"):
        assert f"{name}: the planted error is found" in done.stdout
