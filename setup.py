"""Builds attnkern/_C (CPU) and attnkern/_C_cuda (CUDA) from csrc/sources.txt.

The CUDA library is built where a GPU is visible or the environment asks for it. Environment:
- FORCE_CUDA=1 builds the CUDA library without a GPU too, and fails where this is impossible; FORCE_CUDA=0 omits it.
- TORCH_CUDA_ARCH_LIST asks for CUDA and names the compute capabilities. Default: those of the visible GPUs, else 8.0
  and its PTX, which runs on all later GPUs.
- ATTNKERN_NO_NATIVE=1 builds neither library: Triton and the reference need no compiler.
- MAX_JOBS limits how many compilers run at a time. CUDA_HOME names the toolkit.

For builds in place (build_ext --inplace, an editable install), a library beside the package is kept if it was built
from these sources, loads, and has code for the visible GPUs; the build folder and timestamps do not matter.

Wheels are tagged py3-none: the libraries do not use Python's C API, so one file serves every CPython of a platform,
free-threaded ones included. The build number of a wheel with CUDA kernels names CUDA's major version.
"""

import gzip
import hashlib
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036, for those who call this file directly
    sys.exit(
        f"attnkern: needs Python 3.11 or later, this is {sys.version.split()[0]}: use a newer one, for example "
        "python3.12 -m venv .venv"
    )

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # pip does not check this without build isolation
    sys.exit(
        f"attnkern: building needs setuptools 77 or later, this is {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

# --- the compiler ---


WITHOUT = "or set ATTNKERN_NO_NATIVE=1 to install without compiled kernels: Triton and the reference need no compiler"
# Never -ffast-math: it changes the floating-point mode of the whole process and removes checks for NaN. Symbols are
# hidden because PyTorch loads all libraries into one namespace, where equal names of two libraries would be merged.
COMMON = ["-O3", "-std=c++20"]


def compiler_fault(compiler: str) -> str | None:
    """Why this is no C++20 compiler, or None if it is one."""
    try:
        command = [*shlex.split(compiler), *COMMON, "-x", "c++", "-fsyntax-only", "-"]
        done = subprocess.run(command, input="#include <concepts>\n", capture_output=True, text=True)
    except OSError as error:
        return f"{compiler} does not run: {error.strerror}"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
    return f"{compiler} does not compile C++20: {lines[0]}"


def require_compiler(compiler: str) -> None:
    if fault := compiler_fault(compiler):
        sys.exit(
            f"attnkern: building the kernels needs GCC 12 or Clang 16 or later, and {fault}; install one, "
            f"name one in CXX, {WITHOUT}"
        )


native = os.environ.get("ATTNKERN_NO_NATIVE") != "1"

try:
    import torch
except ImportError:
    if "egg_info" not in sys.argv:
        sys.exit(
            "attnkern: building needs PyTorch 2.11 or later: install torch first, then attnkern --no-build-isolation"
        )
    # With build isolation, pip asks for the requirements first. Checking here fails before PyTorch is downloaded.
    if native:
        require_compiler(os.environ.get("CXX", "c++"))
    setup(setup_requires=["torch>=2.11", "ninja"])
    sys.exit()

ROOT = Path(__file__).parent
SCHEMA_HASH = runpy.run_path(str(ROOT / "attnkern/_schemas.py"))["HASH"]


# --- whether CUDA is built, and for which GPUs ---


NO_TOOLKIT = "no CUDA toolkit with nvcc was found; install one or set CUDA_HOME"
NO_GPU = "no GPU is visible; FORCE_CUDA=1 builds the CUDA kernels too"
MODULES = {"cpu": "attnkern._C", "cuda": "attnkern._C_cuda"}


def library(kind: str) -> Path:
    """The library beside the package."""
    return ROOT / (MODULES[kind].replace(".", "/") + ".so")


def cuda_home() -> str | None:
    """The toolkit's folder, which has cudart's headers and library. The folder of an nvcc launcher may lack them."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        # A dry run prints where the compiler itself lives.
        plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        candidates += re.findall(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    candidates.append("/usr/local/cuda")
    for candidate in filter(None, candidates):
        home = Path(candidate).resolve()
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return str(home)
    return None


def cuda_missing(home: str | None) -> str | None:
    """Why the CUDA library cannot be built here, or None."""
    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0"
    if torch.version.hip:
        return "this PyTorch is built for ROCm, where the Triton kernels run"
    if not torch.version.cuda:
        return "this PyTorch is a CPU build; install one built for CUDA"
    if home is None:
        return NO_TOOLKIT
    # A library beside the package is kept up to date.
    if not (capabilities or asked or os.environ.get("FORCE_CUDA") == "1" or library("cuda").exists()):
        return NO_GPU
    return None


home = cuda_home()
if home:
    os.environ["CUDA_HOME"] = home  # before torch looks for it
capabilities = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
if asked is None and not capabilities:
    os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0+PTX"
if "MAX_JOBS" not in os.environ and hasattr(os, "sysconf"):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, memory // 2**32)))  # 4 GiB a compiler

# PyTorch warns where a toolkit is found and no GPU; setup.py says itself what it builds.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler  # noqa: E402

FLAGS = {
    "cpu": [*COMMON, "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"],
    "cuda": [*COMMON, "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden"],
}


def sources(kind: str) -> list[str]:
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines()]
    return [line[1] for line in lines if line[:1] == [kind]]


def extension(kind: str):
    # Errors name files relative to the projects, not the folder where a wheel was built; the later of two maps wins.
    homes = (ROOT.absolute(), Path(torch.__file__).absolute().parents[1])
    maps = [f"-ffile-prefix-map={folder}/=" for folder in homes]
    if kind == "cuda":  # nvcc splits these arguments at commas and removes one level of quotes
        quoted = ['"' + flag.replace(",", "\\,") + '"' for flag in maps]
        maps = [part for flag in quoted for part in ("-Xcompiler", flag)]
    make, compiler = (CppExtension, "cxx") if kind == "cpu" else (CUDAExtension, "nvcc")
    return make(
        MODULES[kind],
        sources(kind),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("ATTNKERN_SCHEMA_HASH", f'"{SCHEMA_HASH}"')],
        extra_compile_args={compiler: FLAGS[kind] + maps},
        extra_link_args=[f"-Wl,--build-id=0x{build_id(kind).hex()}"],
        depends=["attnkern/_schemas.py", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*h"))],
        py_limited_api=True,  # no Python.h is used: one binary for every Python
    )


# --- libraries that exist already: a build id tells what they were built from ---


listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(f"{major}.{minor}" for major, minor in capabilities)
#: The compute capabilities that a library is built for here.
ARCHITECTURES = {"cpu": "", "cuda": " ".join(listed.replace(";", " ").split())}


def digest(kind: str) -> bytes:
    """A hash of what a library is built from, except for compilers, PyTorch's headers and the architectures."""
    files = sorted(path for path in (*ROOT.glob("csrc/*.h"), *ROOT.glob(f"csrc/{kind}/*")) if path.is_file())
    texts = [(path.relative_to(ROOT).as_posix(), path.read_bytes()) for path in files]
    return hashlib.sha256(repr((SCHEMA_HASH, sources(kind), FLAGS[kind], texts)).encode()).digest()[:16]


def build_id(kind: str) -> bytes:
    return digest(kind) + ARCHITECTURES[kind].encode() + b"\0"


def serves(held: str, capability: tuple[int, int]) -> bool:
    """Does code for these compute capabilities run on a GPU?

    It runs on later minor versions of its major version, and PTX on all later GPUs.
    """
    for major, minor, ptx in re.findall(r"\b(\d+)\.(\d)(\+PTX)?(?!\w)", held):
        code = int(major), int(minor)
        if code <= capability and (ptx or code[0] == capability[0]):
            return True
    return False


def load_error(path: Path) -> str | None:
    """Why a library does not load. This runs in another process, because a damaged library may end it."""
    code = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return "it does not load: " + (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]


def unfit(kind: str) -> str | None:
    """Why the library beside the package has to be built again, or None."""
    path = library(kind)
    if not path.exists():
        return "it is not there"
    found = re.search(b"GNU\0" + re.escape(digest(kind)) + rb"([\w.+ ]*)\0", path.read_bytes())
    if found is None:
        return "it was built from other sources"
    held = found[1].decode()
    if kind == "cuda" and asked and held != ARCHITECTURES[kind]:
        return f"it has code for compute capability {held}, not for {ARCHITECTURES[kind]}"
    for capability in capabilities if kind == "cuda" else ():
        if not serves(held, capability):
            return "it has code for compute capability {}, the GPU has {}.{}".format(held, *capability)
    return load_error(path)


def announce(kind: str) -> None:
    """Say what is compiled and about how long it takes."""
    files, jobs = len(sources(kind)), min(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)), len(sources(kind)))
    targets = ARCHITECTURES[kind].split()
    minutes = MINUTES[kind] * max(1, len(targets)) / jobs
    what = "the CPU kernels" if kind == "cpu" else f"the CUDA kernels for compute capability {' '.join(targets)}"
    length = "less than a minute" if minutes < 1 else f"about {minutes:.0f} minute{'s' if minutes >= 1.5 else ''}"
    print(f"attnkern: compiling {what}: {files} files, {jobs} at a time, {length}", file=sys.stderr, flush=True)


#: How long one compiler takes for all sources, for one compute capability.
MINUTES = {"cpu": 0.8, "cuda": 6}


class Build(BuildExtension):
    def build_extensions(self):
        if self.extensions:
            require_compiler(get_cxx_compiler())
        try:
            super().build_extensions()
        except Exception:  # the compilers' messages stand above
            traceback.print_exc()
            sys.exit(f"attnkern: the kernels could not be built, for the reason above; remove it, {WITHOUT}")

    def build_extension(self, ext):
        announce(next(kind for kind, name in MODULES.items() if name == ext.name))
        super().build_extension(ext)

    def run(self):
        if self.inplace:
            reasons = {kind: unfit(kind) for kind in kinds}
            self.extensions = [ext for ext, kind in zip(self.extensions, kinds, strict=True) if reasons[kind]]
            if missing == NO_TOOLKIT and library("cuda").exists():  # built elsewhere; the package would load it
                reasons["cuda"] = unfit("cuda")
                if reasons["cuda"]:
                    sys.exit(f"attnkern: _C_cuda.so cannot be used: {reasons['cuda']}; to build it: {missing}")
            for kind, reason in reasons.items():
                print(f"attnkern: {library(kind).name} {'is built: ' + reason if reason else 'stays'}", file=sys.stderr)
        super().run()


missing = cuda_missing(home) if native else "ATTNKERN_NO_NATIVE=1"
kinds = (["cpu"] if native else []) + (["cuda"] if missing is None else [])
if missing is not None:
    if os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"attnkern: FORCE_CUDA=1, but the CUDA kernels cannot be built: {missing}")
    print(f"attnkern: building {'the CPU library' if native else 'Python'} only: {missing}", file=sys.stderr)
if kinds and "bdist_wheel" in sys.argv:  # before hundreds of files are copied
    require_compiler(get_cxx_compiler())


class SourceArchive(sdist):
    """The same files give the same bytes: all times are SOURCE_DATE_EPOCH, and owners and permissions are fixed."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != "gztar":
            raise ValueError(f"source archives are .tar.gz, got the format {format!r}")
        moment = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = moment
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            return member

        archive = f"{base_name}.tar.gz"
        os.makedirs(self.dist_dir, exist_ok=True)
        with gzip.GzipFile(archive, "wb", mtime=moment) as file, tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(base_dir, filter=anonymous)  # sorted by name
        return archive


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        if missing is None and self.build_number is None:
            self.build_number = f"1cu{torch.version.cuda.split('.')[0]}"

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[extension(kind) for kind in kinds],
    cmdclass={
        "bdist_wheel": Wheel,
        "build_ext": Build.with_options(no_python_abi_suffix=True),
        "sdist": SourceArchive,
    },
)
