"""The CUDA kernels on a CPU: builds csrc/cuda/*.cu with the C++ compiler and loads them as ``attnkern_host::*``."""

import os
import subprocess
from pathlib import Path

import torch

from attnkern._schemas import HASH, SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build/cuda_on_host"


def build(source: Path) -> Path:
    """The library of one source, compiled again when it or a header is newer."""
    torch_root = Path(torch.__file__).parent
    library = BUILD / f"{source.stem}.so"
    inputs = [source, *ROOT.glob("csrc/**/*.*h"), *HERE.glob("*.h"), Path(__file__), ROOT / "attnkern/_schemas.py"]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [
        os.environ.get("CXX", "g++"), "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-shared",
        "-U_FORTIFY_SOURCE",  # its longjmp takes another fiber's stack for a fault
        "-Wno-unknown-pragmas", "-DATTNKERN_ON_HOST", f'-DATTNKERN_SCHEMA_HASH="{HASH}"',
        f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-isystem{torch_root / 'include'}", str(source), "-o", str(partial),
        f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    os.replace(partial, library)
    return library


_library = torch.library.Library("attnkern_host", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
# A sum with planted faults; see faulty.cu.
_library.define("faulty_sum(Tensor x, int fault) -> Tensor")


def load(*sources: Path):
    """``torch.ops.attnkern_host`` with the kernels of ``sources``."""
    for source in sources:
        torch.ops.load_library(build(source))
    return torch.ops.attnkern_host
