"""On aarch64 the CPU sources compile without warnings, and the scalar mathematics is the same under QEMU."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = [
    line.split()[1]
    for line in (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("cpu ")
]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++")


def compile_for(compiler, target, *arguments):
    flags = ["-std=c++20", "-O1", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    warnings = ["-Wall", "-Wextra", "-Werror", '-DATTNKERN_SCHEMA_HASH=""']
    include = [f"-I{ROOT / 'csrc'}", f"-isystem{Path(torch.__file__).parent / 'include'}"]
    done = subprocess.run(
        [compiler, *flags, *warnings, *include, *arguments, "-o", target], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings(source, tmp_path):
    compile_for(COMPILER, tmp_path / "object.o", "-fPIC", "-c", source)


@pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64-static")
def test_scalar_mathematics(tmp_path):
    """The same bits, except for the elementary functions in double, which are those of the C library."""
    program = "tests/scalar_math/print.cpp"
    compile_for(os.environ.get("CXX", "g++"), tmp_path / "here", program)
    compile_for(COMPILER, tmp_path / "there", "-static", program)
    here, there = (
        subprocess.check_output(command, text=True).splitlines()
        for command in ([tmp_path / "here"], [QEMU, tmp_path / "there"])
    )
    assert len(here) > 500_000
    for expected, found in zip(here, there, strict=True):
        if expected != found:
            name, _, number = expected.rpartition(" ")
            other, _, near = found.rpartition(" ")
            assert name.startswith("float64 "), (expected, found)
            assert name == other
            assert math.isclose(float.fromhex(number), float.fromhex(near), rel_tol=1e-12, abs_tol=1e-12), name
