"""Fresh processes: what import needs, costs and leaves alone; missing and stale parts; every CPU instruction set; huge
pages.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FUNCTIONS, TOLERANCES, check_run, make

import attnkern
from attnkern import _schemas

PACKAGE = Path(attnkern.__file__).parent
LIBRARY = next(PACKAGE.glob("_C.*so"), None)
needs_library = pytest.mark.skipif(LIBRARY is None, reason="attnkern/_C is not built")

#: hides a module as if it were not installed
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def python(code, folder=None, **environment):
    """Run ``code`` in a new process with ``attnkern`` from ``folder`` and return its output."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ATTNKERN_") and k != "TRITON_INTERPRET"}
    inherited["PYTHONPATH"] = str(folder or PACKAGE.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path):
    """A copy of the package without its compiled libraries."""
    shutil.copytree(PACKAGE, tmp_path / "attnkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


# --- missing parts ---------------------------------------------------------------------------------------------------

#: the reference runs everything, and naming a missing backend is an error
DEGRADED = """
import torch, attnkern
x, rectangle = torch.ones(2, 3, 4, 5, requires_grad=True), torch.full((2, 5), 0.5)
attnkern.window_attention(x, rectangle).output.sum().backward()
assert x.grad.isfinite().all()
assert attnkern.anchor_attention(x, x[:, :1], torch.ones(2)).counts.tolist() == [40, 0]
assert attnkern.compatibility_pool(x, torch.ones(3)).pooled.shape == (2, 3)
for backend in ("native", "triton"):
    try:
        attnkern.compatibility_pool(x, torch.ones(3), backend=backend)
        print(backend, "runs")
    except ValueError as error:
        print(error)
"""
NOT_BUILT = "backend: 'native' cannot run torch.float32 on cpu: attnkern/_C is not built: run `pip install"
NO_TRITON = "backend: 'triton' cannot run torch.float32 on cpu: Triton is not installed: pip install triton"


@pytest.mark.slow
@needs_library
def test_without_triton():
    assert python(WITHOUT_TRITON + DEGRADED).splitlines() == ["native runs", NO_TRITON]


@pytest.mark.slow
def test_without_the_library(copy):
    native, triton = python(DEGRADED, copy).splitlines()
    assert native.startswith(NOT_BUILT)
    assert triton.startswith("backend: 'triton' cannot run torch.float32 on cpu: ")


def test_without_both(copy):
    native, triton = python(WITHOUT_TRITON + DEGRADED, copy).splitlines()
    assert native.startswith(NOT_BUILT)
    assert triton == NO_TRITON


@needs_library
def test_a_library_for_other_schemas_is_refused(copy):
    """A library with another hash is not loaded, and the reason is given."""
    other = LIBRARY.read_bytes().replace(_schemas.HASH.encode(), b"0" * len(_schemas.HASH))
    (copy / "attnkern" / LIBRARY.name).write_bytes(other)
    native, _ = python(DEGRADED, copy).splitlines()
    reason = f"{LIBRARY.name} was built for another version of attnkern: rebuild it"
    assert native == f"backend: 'native' cannot run torch.float32 on cpu: {reason}"


@pytest.mark.parametrize("content", [b"", b"no library, but attnkern-schema:" + _schemas.HASH.encode()])
def test_a_library_that_does_not_load_says_why(copy, content):
    (copy / "attnkern" / "_C.so").write_bytes(content)
    native, _ = python(DEGRADED, copy).splitlines()
    assert native.startswith("backend: 'native' cannot run torch.float32 on cpu: _C.so does not load: ")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_a_library_without_an_operators_kernel_says_which(copy, tmp_path):
    """As if the source of the operators were missing in csrc/sources.txt."""
    source = tmp_path / "empty.c"
    source.write_text(f'const char schema[] = "attnkern-schema:{_schemas.HASH}";\n', encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", copy / "attnkern" / LIBRARY.name], check=True)
    native, _ = python(DEGRADED, copy).splitlines()
    missing = f"{LIBRARY.name} has no kernels for {', '.join(_schemas.SCHEMAS)}: "
    assert native.startswith(f"backend: 'native' cannot run torch.float32 on cpu: {missing}")


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
@pytest.mark.parametrize("library", sorted(path.name for path in PACKAGE.glob("_C*.so")))
def test_libraries_keep_their_symbols_to_themselves(library):
    """PyTorch loads both into one namespace, where the first would replace functions of the second."""
    listed = subprocess.run(
        ["nm", "-DC", "--defined-only", PACKAGE / library], capture_output=True, text=True, check=True
    )
    assert [line for line in listed.stdout.splitlines() if " attnkern::" in line] == []


def test_the_environment_chooses_and_a_wrong_name_is_refused():
    code = "from attnkern import _backend; print(_backend.current())"
    assert python(code, ATTNKERN_BACKEND="reference") == "reference"
    with pytest.raises(AssertionError, match="ValueError: ATTNKERN_BACKEND: expected one of 'triton', 'native'"):
        python(code, ATTNKERN_BACKEND="fastest")


def test_submodules_come_on_first_use():
    code = """
import attnkern, sys
assert "torchvision" not in sys.modules and "models" in dir(attnkern)
print(attnkern.models.list_models("vgg_att2*pc"), attnkern.nn.AnchorQuantizer.__name__)
try:
    attnkern.unknown
except AttributeError as error:
    print(error)
"""
    assert python(code).splitlines() == [
        "['vgg_att2_concat_pc', 'vgg_att2_indep_pc'] AnchorQuantizer", "module 'attnkern' has no attribute 'unknown'"
    ]  # fmt: skip


#: as notebooks, plugin hosts and reloaders do
CLEAR = """
for name in [name for name in sys.modules if name.split(".")[0] == "attnkern"]:
    del sys.modules[name]
del attnkern
gc.collect()
"""


@needs_library
def test_imported_again_after_its_modules_were_cleared():
    """Objects made before still work, and the module imported again uses the same operators."""
    code = f"""
import gc, sys, torch, attnkern
x, rectangle = torch.rand(2, 3, 4, 5, requires_grad=True), torch.full((2, 5), 0.5)
module = attnkern.nn.WindowAttention(3)
first = attnkern.window_attention(x, rectangle, backend="native").output
{CLEAR}
import attnkern
second = attnkern.window_attention(x, rectangle, backend="native").output
{CLEAR}
import attnkern
assert torch.equal(first, second)
(module(x) + first).sum().backward()
attnkern.window_attention(x, rectangle, backend="native").output.sum().backward()
assert x.grad.isfinite().all()
assert type(attnkern.nn.WindowAttention(3)) is not type(module)
"""
    python(code)


@pytest.mark.slow
def test_imported_again_as_another_version():
    code = f"""
import gc, sys, torch, attnkern
torch.ops.attnkern._library = torch.ops.attnkern._library[0], "the hash of other schemas"
{CLEAR}
try:
    import attnkern
except ImportError as error:
    print(error)
"""
    expected = "attnkern: another version was imported earlier in this process: restart the process"
    assert python(code) == expected


# --- what import costs and touches -----------------------------------------------------------------------------------


def test_import_is_quick_and_touches_nothing():
    """Only torch is imported, CUDA is not initialised, and at most twice as many functions are called as when 7,100 in
    Python and 10,800 in C took 35 ms."""
    code = """
import sys, torch
known, calls = set(sys.modules), 0

def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")

sys.setprofile(count)
import attnkern
sys.setprofile(None)
new = {name.split(".")[0] for name in set(sys.modules) - known}
assert not new & {"triton", "torchvision", "numpy", "sklearn", "matplotlib"}, new
assert not torch.cuda.is_initialized()
print(calls)
"""
    assert int(python(code)) <= 36_000


@needs_library
def test_denormals_and_nan_survive_in_every_thread():
    """Importing and running do not change the floating-point mode of the main, PyTorch's or new threads."""
    code = """
import math, threading, torch, attnkern

def modes():
    tiny = torch.full((1 << 18,), 1e-40)  # large enough for PyTorch's own threads
    assert (tiny * 0.5 > 0).all() and (tiny + tiny > tiny).all()
    assert 5e-324 / 1 > 0 and 1e-310 * 0.5 > 0
    nan = torch.full((1 << 18,), math.nan)
    assert (nan != nan).all() and not (nan == nan).any() and torch.isnan(nan + 1).all()
    assert math.nan != math.nan

modes()
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    x = torch.randn(4, 64, 28, 28, dtype=dtype, requires_grad=True)
    rectangle, anchors = torch.rand(4, 5, dtype=dtype), torch.rand(7, dtype=dtype)
    attnkern.window_attention(x, rectangle, backend="native").output.sum().backward()
    attnkern.anchor_attention(x, x[:, :1], anchors, backend="native").output.sum().backward()
    attnkern.compatibility_pool(x, rectangle.new_ones(64), backend="native").pooled.sum().backward()
modes()
failures = []
def guarded():
    try:
        modes()
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=guarded) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
print("intact")
"""
    assert python(code) == "intact"


@needs_library
def test_denormal_numbers_are_numbers():
    """The kernels do not flush them either: features of 1e-40 are doubled and pooled."""
    x = torch.full((1, 4, 3, 3), 1e-40)
    output = attnkern.anchor_attention(x, torch.ones(1, 1, 3, 3), torch.ones(1), backend="native").output
    assert torch.equal(output, x + x)
    pooled = attnkern.compatibility_pool(x, torch.ones(4), backend="native").pooled
    torch.testing.assert_close(pooled, x[:, :, 0, 0], rtol=1e-4, atol=0)


# --- instruction sets ------------------------------------------------------------------------------------------------

SETS = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}


def core():
    """Check the vector bodies and tails of every CPU kernel and return a digest of their results."""
    digest = hashlib.sha256()
    for function, (c, size), layout, dtype in itertools.product(
        FUNCTIONS, ((3, (1, 1)), (67, (7, 7)), (40, (15, 17))), ("contiguous", "channels_last"), TOLERANCES
    ):
        found = check_run(function, make(function, 2, c, size, dtype=dtype, layout=layout), "native", size)
        for result in found.values():
            digest.update(result.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
@needs_library
def test_each_instruction_set_is_right():
    """Each set in ATTNKERN_CPU_ISA agrees with the reference; their bits differ, which shows that each one ran."""
    code = "import test_import; print(test_import.core())"
    here = Path(__file__).parent
    folders = os.pathsep.join(map(str, (here, here.parent, PACKAGE.parent)))
    names = SETS.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])
    digests = {name: python(code, folders, ATTNKERN_CPU_ISA=name) for name in names}
    assert len(set(digests.values())) == len(names), digests
    if "ATTNKERN_CPU_ISA" not in os.environ:
        assert core() == digests[names[-1]], "without the variable the best set runs"


# --- huge pages ------------------------------------------------------------------------------------------------------

POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: prints the ranges passed to madvise, and the whole pages of outputs and gradients of at least 4 MiB
ADVISED = """
import json, re, resource, torch, attnkern

def joined(ranges):
    found = []
    for begin, end in sorted(ranges):
        if found and found[-1][1] == begin:
            found[-1][1] = end
        elif begin < end:
            found.append([begin, end])
    return found

def pages(tensor):
    size, begin = resource.getpagesize(), tensor.data_ptr()
    return -(-begin // size) * size, (begin + tensor.nbytes) // size * size

def leaf(*shape):
    return torch.rand(shape).requires_grad_()

made = []
for channels in (8, 7):  # 4 MiB, and a little less
    x, a, rectangle, query = leaf(2, channels, 256, 256), leaf(2, 1, 256, 256), leaf(2, 5), leaf(channels)
    wide = leaf(channels, 1, 512, 256)
    for results, leaves in (
        (attnkern.window_attention(x, rectangle), (x, rectangle)),
        (attnkern.anchor_attention(x, a, torch.ones(2)), (x, a)),
        (attnkern.compatibility_pool(x, query), (x, query)),
        (attnkern.anchor_quantize(wide, torch.ones(2)), (wide,)),
    ):
        made += [*results, *torch.autograd.grad(results[0], leaves, torch.ones_like(results[0]))]
advised, mapping = [], None
for line in open("/proc/self/smaps"):
    if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        mapping = [int(bound, 16) for bound in found.groups()]
    elif line.startswith("VmFlags:") and "hg" in line.split():
        advised.append(mapping)
large = [pages(tensor) for tensor in made if tensor is not None and tensor.nbytes >= 4 << 20]
print(json.dumps([joined(advised), joined(large), len(large)]))
"""


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(not POLICY.exists(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_large_outputs_ask_for_huge_pages(asked):
    """Exactly the whole pages are advised, only under the policy "madvise" and unless the variable is 0."""
    environment = {} if asked is None else {"ATTNKERN_HUGE_PAGES": asked}
    advised, large, count = json.loads(python(ADVISED, **environment))
    # Two of window_attention, two of anchor_attention, one of compatibility_pool, four of anchor_quantize.
    assert count == 9
    assert advised == (large if asked != "0" and "[madvise]" in POLICY.read_text(encoding="utf-8") else [])
