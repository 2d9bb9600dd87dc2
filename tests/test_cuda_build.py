"""Building for CUDA on a machine with or without a GPU: what setup.py decides, and the library that comes of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnkern import _ops
from attnkern._schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]

# --- what setup.py decides -------------------------------------------------------------------------------------------

#: setup.py with setup() replaced; {patches} take something away from the machine.
DECIDE = """
import pathlib, runpy, setuptools, torch
{patches}
setuptools.setup = lambda ext_modules, **_: print("extensions:", *(extension.name for extension in ext_modules))
runpy.run_path("setup.py")
"""
CPU_BUILD = "torch.version.cuda = None"
NO_TOOLKIT = """
torch.version.cuda = "13.0"
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: path.name != "nvcc" and exists(path)
"""


def decide(patches, force_cuda=None):
    environment = {key: value for key, value in os.environ.items() if key != "FORCE_CUDA"}
    if force_cuda is not None:
        environment["FORCE_CUDA"] = force_cuda
    done = subprocess.run(
        [sys.executable, "-c", DECIDE.format(patches=patches)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.strip(), [line for line in done.stderr.splitlines() if "attnkern" in line]


@pytest.mark.parametrize(
    "patches, reason",
    [(CPU_BUILD, "this PyTorch is a CPU build"), (NO_TOOLKIT, "no CUDA toolkit with nvcc was found")],
    ids=["cpu-torch", "no-nvcc"],
)
def test_without_cuda_the_cpu_library_is_built_and_one_line_says_why(patches, reason):
    code, out, lines = decide(patches)
    assert (code, out) == (0, "extensions: attnkern._C")
    assert len(lines) == 1
    assert reason in lines[0]
    code, out, lines = decide(patches, force_cuda="1")
    assert (code, out) == (1, "")
    assert "FORCE_CUDA=1" in lines[0]
    assert reason in lines[0]


TOOLKIT = torch.version.cuda and shutil.which("nvcc")


@pytest.mark.skipif(not TOOLKIT, reason="needs a CUDA build of PyTorch and nvcc")
def test_force_cuda():
    assert decide("", force_cuda="1")[:2] == (0, "extensions: attnkern._C attnkern._C_cuda")
    assert decide("", force_cuda="0")[:2] == (0, "extensions: attnkern._C")


# --- the library -----------------------------------------------------------------------------------------------------

LIBRARY = next(iter(sorted((ROOT / "attnkern").glob("_C_cuda*.so"))), None)
needs_library = pytest.mark.skipif(LIBRARY is None and not TOOLKIT, reason="attnkern/_C_cuda cannot be built here")


@needs_library
def test_the_library_loads_and_registers_without_a_gpu():
    assert _ops.NATIVE_REASON["cuda"] is None
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attnkern::{name}", "CUDA"), name


def cuobjdump():
    """NVIDIA's disassembler, from the toolkit or from Triton."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def demangled(names):
    return subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True).stdout.split("\n")


#: bytes of stack beyond which registers have been spilled: the reduction of huge angles takes 32, double's 40
STACK = {"window": 40}


def resources():
    """(architecture, kernel, registers, stack, shared memory) of each kernel in the library."""
    text = subprocess.run([cuobjdump(), "-res-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    for part in text.split("arch = sm_")[1:]:
        rows = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", part)
        for name, (_, *numbers) in zip(demangled([name for name, *_ in rows]), rows, strict=False):
            name = re.sub(r"attnkern::|\(anonymous namespace\)::", "", name).removeprefix("void ")
            yield int(re.match(r"\d+", part)[0]), name, *map(int, numbers)


@needs_library
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
def test_resources(capsys):
    """Prints the registers, stack and shared memory of every kernel; on compute capability 9.0 none spills."""
    rows = sorted(resources())
    assert len(rows) > 40
    with capsys.disabled():
        print(f"\n\n{'resources':6} {'kernel':66} {'registers':>10} {'stack':>6} {'shared':>7}")
        for row in rows:
            print("sm_{:<6} {:66} {:10} {:6} {:7}".format(*row))
    for architecture, name, _, stack, _ in rows:
        if architecture == 90:
            assert stack <= STACK.get(name.split("_")[0], 0), name
