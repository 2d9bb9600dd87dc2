"""The CUDA kernels on a CPU: builds csrc/cuda/*.cu with the C++ compiler and loads them as ``attnkern_host::*``."""

import os
import re
import subprocess
from pathlib import Path

import torch

from attnkern._ops import define
from attnkern._schemas import HASH

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build/cuda_on_host"
TORCH = Path(torch.__file__).parent

FLAGS = [
    "-std=c++20", "-O1", "-fPIC",
    "-U_FORTIFY_SOURCE",  # its longjmp rejects a jump to another fiber's stack
    "-Wno-unknown-pragmas", "-DATTNKERN_ON_HOST", f'-DATTNKERN_SCHEMA_HASH="{HASH}"',
    f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-isystem{TORCH / 'include'}",
]  # fmt: skip


def make(target: Path, inputs: list[Path], *arguments) -> Path:
    """Run the C++ compiler for a target that is older than one of its inputs."""
    if not target.exists() or target.stat().st_mtime <= max(path.stat().st_mtime for path in inputs):
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([os.environ.get("CXX", "g++"), *map(str, arguments), "-o", str(partial)], check=True)
        os.replace(partial, target)
    return target


def included(source: Path, found: set[Path]) -> set[Path]:
    """A source and the files of this project that it includes."""
    found.add(source)
    for name in re.findall(r'^#include "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE):
        for path in (ROOT / "csrc" / name, HERE / name):
            if path.exists() and path not in found:
                included(path, found)
    return found


def cuda_sources() -> list[Path]:
    """The sources of the CUDA library in csrc/sources.txt, as setup.py builds them."""
    lines = map(str.split, (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines())
    return [ROOT / line[1] for line in lines if line[:1] == ["cuda"]]


def build(sources: list[Path]) -> Path:
    """The library of some sources."""
    BUILD.mkdir(parents=True, exist_ok=True)
    always = [Path(__file__), ROOT / "attnkern/_schemas.py"]
    objects = [
        make(BUILD / f"{source.stem}.o", [*included(source, set()), *always], "-x", "c++", *FLAGS, "-c", source)
        for source in sources
    ]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return make(BUILD / "attnkern_host.so", objects, "-shared", *objects, *libraries)


_library = define("attnkern_host")
# A sum with planted faults; see faulty.cu.
_library.define("faulty_sum(Tensor x, int fault) -> Tensor")
#: How many kernels have been launched; the tensor only names the device.
_library.define("launches(Tensor x) -> int")


def load():
    """``torch.ops.attnkern_host`` with the kernels."""
    torch.ops.load_library(build([*cuda_sources(), HERE / "faulty.cu"]))
    return torch.ops.attnkern_host
