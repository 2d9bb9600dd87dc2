"""Building for CUDA on a machine with or without a GPU: what setup.py decides, and the library that comes of it."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from attnkern import _ops
from attnkern._schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]

# --- what setup.py decides -------------------------------------------------------------------------------------------

#: setup.py with setup() replaced; {patches} simulate a machine that lacks something.
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(not TOOLKIT, reason="needs a CUDA build of PyTorch and nvcc")
def test_force_cuda():
    assert decide("", force_cuda="1")[:2] == (0, "extensions: attnkern._C attnkern._C_cuda")
    assert decide("", force_cuda="0")[:2] == (0, "extensions: attnkern._C")


# --- libraries that are beside the package already -------------------------------------------------------------------


class Carried:
    """The sources in a folder of their own, with libraries that were built from them for 8.0 and 9.0+PTX."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / "attnkern").mkdir()
        for name in ("setup.py", "attnkern/_schemas.py"):
            shutil.copy(ROOT / name, folder / name)
        self.build("8.0;9.0+PTX")

    def setup(self, capabilities=(), architectures=None):
        """The names of setup.py where GPUs of these capabilities are and TORCH_CUDA_ARCH_LIST is ``architectures``."""
        environment = {
            key: value for key, value in os.environ.items() if key not in ("TORCH_CUDA_ARCH_LIST", "FORCE_CUDA")
        }
        if architectures is not None:
            environment["TORCH_CUDA_ARCH_LIST"] = architectures
        with self.monkeypatch.context() as patch:
            patch.setattr(os, "environ", environment)
            patch.setattr(setuptools, "setup", lambda **_: None)
            patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
            patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
            patch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
            return runpy.run_path(str(self.folder / "setup.py"))

    def build(self, architectures):
        """Libraries with the build ids that setup.py gives them, and nothing else in them."""
        names = self.setup(architectures=architectures)
        for kind in names["MODULES"]:
            build_id = "-Wl,--build-id=0x" + names["build_id"](kind).hex()
            subprocess.run(
                ["gcc", "-shared", "-x", "c", "/dev/null", "-o", names["library"](kind), build_id], check=True
            )

    def unfit(self, *capabilities, architectures=None):
        """Why either library has to be built again; loading is left out."""
        unfit = self.setup(capabilities, architectures)["unfit"]
        unfit.__globals__["load_error"] = lambda path: None
        return [unfit(kind) for kind in ("cpu", "cuda")]


@pytest.fixture
def carried(tmp_path, monkeypatch):
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    return Carried(tmp_path, monkeypatch)


@pytest.mark.skipif(not TOOLKIT, reason="needs a CUDA build of PyTorch and nvcc")
def test_cuda_is_built_where_a_gpu_is_visible_or_it_is_asked_for(carried):
    assert carried.setup()["missing"] is None  # a library beside the package is kept up to date
    carried.setup()["library"]("cuda").unlink()
    names = carried.setup()
    assert (names["kinds"], names["missing"]) == (["cpu"], names["NO_GPU"])
    assert carried.setup(capabilities=[(9, 0)])["kinds"] == ["cpu", "cuda"]
    assert carried.setup(architectures="9.0")["kinds"] == ["cpu", "cuda"]


@pytest.mark.parametrize(
    "kind, architectures, jobs, message",
    [
        ("cpu", "9.0", "3", "compiling the CPU kernels: 3 files, 3 at a time, less than a minute"),
        ("cuda", "8.0;9.0+PTX", "2",
         "compiling the CUDA kernels for compute capability 8.0 9.0+PTX: 4 files, 2 at a time, about 6 minutes"),
    ],
)  # fmt: skip
def test_building_says_what_is_compiled_and_how_long_it_takes(kind, architectures, jobs, message, carried, capsys):
    carried.monkeypatch.setenv("MAX_JOBS", jobs)
    names = carried.setup(architectures=architectures)
    capsys.readouterr()
    names["announce"](kind)
    assert capsys.readouterr().err == f"attnkern: {message}\n"


OTHER = "it was built from other sources"


def test_libraries_of_these_sources_stay(carried):
    for path in carried.folder.rglob("*.*"):  # whatever the timestamps are
        os.utime(path, (2_000_000_000, 2_000_000_000) if path.suffix != ".so" else (1, 1))
    assert carried.unfit() == [None, None]


@pytest.mark.parametrize(
    "file, reasons",
    [
        ("csrc/cpu/pool.cpp", [OTHER, None]),
        ("csrc/cuda/common.cuh", [None, OTHER]),
        ("csrc/pool.h", [OTHER, OTHER]),
        ("attnkern/_schemas.py", [OTHER, OTHER]),
    ],
)
def test_libraries_of_other_sources_are_built_again(file, reasons, carried):
    path = carried.folder / file
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("CONTRACT = ", "CONTRACT = 1") if path.suffix == ".py" else text + "\n", encoding="utf-8"
    )
    assert carried.unfit() == reasons


@pytest.mark.slow
def test_libraries_that_are_missing_or_damaged_are_built_again(carried):
    names = carried.setup()
    assert names["unfit"]("cpu") is None
    names["library"]("cuda").unlink()
    assert names["unfit"]("cuda") == "it is not there"
    content = names["library"]("cpu").read_bytes()
    names["library"]("cpu").write_bytes(content[:0x600])  # a copy that broke off, with its build id
    assert names["unfit"]("cpu").startswith("it does not load: ")


@pytest.mark.parametrize(
    "capabilities, architectures, reason",
    [
        ([(8, 0)], None, None),
        ([(8, 6), (9, 0)], None, None),
        ([(12, 1)], None, None),
        ([(7, 5)], None, "it has code for compute capability 8.0 9.0+PTX, the GPU has 7.5"),
        ([], "8.0 9.0+PTX", None),
        ([(9, 0)], "9.0", "it has code for compute capability 8.0 9.0+PTX, not for 9.0"),
    ],
)
def test_a_library_has_code_for_the_gpus(capabilities, architectures, reason, carried):
    assert carried.unfit(*capabilities, architectures=architectures) == [None, reason]


def test_without_ptx_a_library_serves_one_major_version(carried):
    carried.build("8.6")
    assert carried.unfit((8, 9)) == [None, None]
    assert carried.unfit((9, 0))[1] == "it has code for compute capability 8.6, the GPU has 9.0"
    assert carried.unfit((8, 0))[1] == "it has code for compute capability 8.6, the GPU has 8.0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "toolkit", [pytest.param(True, marks=pytest.mark.skipif(not TOOLKIT, reason="needs nvcc")), False]
)
def test_building_in_place_compiles_only_what_does_not_fit(toolkit, carried):
    """No compiler is there that works. Without a toolkit, a library that does not fit is refused: it would be used."""

    def build():
        environment = {key: value for key, value in os.environ.items() if key != "TORCH_CUDA_ARCH_LIST"}
        environment |= {"CXX": "/bin/false", "CC": "/bin/false", "FORCE_CUDA": ""}
        code = "" if toolkit else NO_TOOLKIT
        code += "import sys; sys.argv = ['setup.py', '--quiet', 'build_ext', '--inplace']; runpy.run_path('setup.py')"
        done = subprocess.run(
            [sys.executable, "-c", "import pathlib, runpy, torch\n" + code],
            cwd=carried.folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("attnkern: _C")]

    assert build() == (0, ["attnkern: _C.so stays", "attnkern: _C_cuda.so stays"])
    (carried.folder / "csrc/cuda/pool.cu").write_text("changed", encoding="utf-8")
    code, lines = build()
    assert code != 0
    said = "is built" if toolkit else "cannot be used"
    assert lines[-1].startswith(f"attnkern: _C_cuda.so {said}: {OTHER}")


# --- the library -----------------------------------------------------------------------------------------------------

LIBRARY = next(iter(sorted((ROOT / "attnkern").glob("_C_cuda*.so"))), None)
#: `make test-all` builds the library and sets this variable: there the tests fail rather than skip.
REQUIRED = os.environ.get("ATTNKERN_TEST_CUDA_LIBRARY") == "1"
needs_library = pytest.mark.skipif(
    LIBRARY is None and not REQUIRED, reason="attnkern/_C_cuda is not built; make test-all builds it"
)


@needs_library
def test_the_library_loads_and_registers_without_a_gpu():
    assert _ops.NATIVE_REASON["cuda"] is None
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attnkern::{name}", "CUDA"), name


def cuobjdump():
    """The path of NVIDIA's disassembler, from the toolkit or from Triton."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def demangled(names):
    return subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True).stdout.split("\n")


#: bytes of stack beyond which registers have been spilled: the reduction of huge angles takes 32, double's 40. Kernels
#: of several windows have copies of it.
STACK = {"window": 40, "windows": 80}
#: kernels that walk through features
FEATURES = [f"{operator}_{which}_kernel" for operator in ("window", "anchor") for which in ("forward", "backward")]


def resources():
    """(architecture, kernel, registers, stack, shared memory, symbol) of each kernel in the library."""
    text = subprocess.run([cuobjdump(), "-res-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    for part in text.split("arch = sm_")[1:]:
        rows = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", part)
        for name, (symbol, *numbers) in zip(demangled([name for name, *_ in rows]), rows, strict=False):
            name = re.sub(r"attnkern::|\(anonymous namespace\)::", "", name).removeprefix("void ")
            yield int(re.match(r"\d+", part)[0]), name, *map(int, numbers), symbol


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
    for architecture, name, registers, stack, *_ in rows:
        if architecture == 90:
            assert stack <= STACK.get(name.split("_")[0], 0), name
            if any(name.startswith(kernel) for kernel in FEATURES) and "double" not in name:
                assert registers <= 80, f"{name}: three blocks do not fit a multiprocessor"


@needs_library
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("kernel", FEATURES)
def test_features_move_in_whole_vectors(kernel):
    """The loops over a tile, one for each layout, keep four vectors on their way; each is read and written at once."""
    symbols = {row[-1]: row[1] for row in resources() if row[0] == 90 and row[1].startswith(kernel)}
    assert len(symbols) == 4  # storage types
    text = subprocess.run(
        [cuobjdump(), "-sass", "-arch", "sm_90", "-fun", ",".join(symbols), LIBRARY],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    layouts, on_their_way = 2, 4
    outputs = on_their_way if "forward" in kernel else on_their_way // 2  # of two inputs one becomes an output
    for part in text.split("Function : ")[1:]:
        name = symbols[part.split()[0]]
        # What is asked for before the loops is written there for each layout, too.
        assert len(re.findall(r"\bLDG\.E\.128\b", part)) >= 2 * layouts * on_their_way, name
        assert len(re.findall(r"\bSTG\.E\.128\b", part)) == layouts * outputs, name
