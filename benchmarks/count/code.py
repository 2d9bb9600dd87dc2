"""Reads machine code of kernels from a library or a cubin, with the resources of a block."""

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.count.sass import Function, Region, parse

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/count"
LIBRARIES = "attnkern/_C_cuda*.so"


class Kernel(NamedTuple):
    """A kernel's machine code and resources."""

    function: Function
    registers: int  #: per thread
    stack: int  #: bytes per thread
    shared: int  #: bytes per block known at compile time, the kilobyte that the system reserves included


def tool(name: str, *arguments, **options) -> str:
    """The output of one of NVIDIA's tools, from Triton or from the toolkit."""
    path = shutil.which(name)
    try:
        import triton
    except ImportError:
        pass
    else:
        path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if path is None:
        raise FileNotFoundError(f"{name} is part of Triton and of the CUDA toolkit; neither is installed")
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True, **options).stdout


def demangled(names: list[str]) -> dict[str, str]:
    """C++ names without parameters, "attnkern::" and anonymous namespaces."""
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"attnkern::|\(anonymous namespace\)::", "", name) for name in text.splitlines())
    return {name: text.removeprefix("void ") for name, text in zip(names, short, strict=True)}


def stored(key: str, make):
    """The result of ``make``, cached in build/count under a key made of everything that it depends on."""
    path = CACHE / f"{key}.json"
    if path.exists():
        return _restored(json.loads(path.read_text(encoding="utf-8")))
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(_plain(made), file)
    Path(file.name).replace(path)
    return made


def _plain(value):
    """Convert to JSON values: bytes, tuples and named tuples become objects that name their type."""
    match value:
        case bytes():
            return {"type": "bytes", "value": value.hex()}
        case tuple():
            return {"type": type(value).__name__, "value": [_plain(item) for item in value]}
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {"type": "dict", "value": {key: _plain(item) for key, item in value.items()}}
    return value


def _restored(value):
    from benchmarks.count.launches import Launch, Recorded

    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, value = value["type"], value["value"]
    if kind == "bytes":
        return bytes.fromhex(value)
    if kind == "dict":
        return {key: _restored(item) for key, item in value.items()}
    items = tuple(_restored(item) for item in value)
    named = {made.__name__: made for made in (Function, Kernel, Launch, Recorded, Region)}
    return named[kind](*items) if kind in named else items


def digest(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def _of_cubin(path: Path) -> dict[str, Kernel]:
    functions = parse(tool("nvdisasm", "-c", path))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage", path))
    names = demangled([name for name, *_ in usage])
    return {names[name]: Kernel(functions[name], *map(int, numbers)) for name, *numbers in usage if name in functions}


@cache
def of_cubin(path: Path) -> dict[str, Kernel]:
    """The kernels of a cubin, by name."""
    return stored(f"code/{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}", lambda: _of_cubin(path))


@cache
def of_library(path: Path) -> dict[str, Kernel]:
    """The kernels for compute capability 9.0 in a library, by name."""

    def extract():
        kernels = {}
        with tempfile.TemporaryDirectory() as folder:
            tool("cuobjdump", "-xelf", "sm_90", path.resolve(), cwd=folder)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                kernels |= _of_cubin(cubin)
        return kernels

    return stored(f"code/{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}", extract)


def built_library() -> Path | None:
    """The library of the CUDA kernels, if it has been built."""
    return next(iter(sorted(ROOT.glob(LIBRARIES))), None)


def native_kernels(sources: tuple[Path, ...] = ()) -> dict[str, Kernel]:
    """The native kernels by name, from the given libraries and cubins or from the built library."""
    sources = sources or tuple(path for path in [built_library()] if path)
    if not sources:
        raise FileNotFoundError(f"{LIBRARIES} is not built: run `make setup` where nvcc is found")
    kernels = {}
    for path in sources:
        kernels |= of_cubin(path) if path.suffix == ".cubin" else of_library(path)
    return kernels
