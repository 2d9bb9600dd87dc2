"""Failed allocations, and a Triton that does not compile or import: docs/reliability.md."""

import itertools
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import FUNCTIONS, POOLS, WINDOWS, call, case_id, check, doubles, make, same
from conftest import DEVICE, PATIENCE, large

import attnkern
from attnkern import _backend, _ops

SIZE = (3, 4)


# --- memory ----------------------------------------------------------------------------------------------------------


def python(code, **environment):
    """Run ``code`` in a new process and return its exit code and output."""
    folders = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(attnkern.__file__).parents[1])))
    inherited = {k: v for k, v in os.environ.items() if k not in ("ATTNKERN_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | {"PYTHONPATH": folders} | environment, capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
    # PyTorch reports exceptions of its C interface on standard error even if they are caught.
    return done.returncode, (done.stdout + (done.stderr if done.returncode else "")).strip()


#: Memory ends before each large block of a forward and a backward pass once (tests/failing_malloc.c).
SCARCE = """
import ctypes, torch, attnkern
from cases import FUNCTIONS, call, doubles, leaves_of, make, run, upstream

left = ctypes.c_int.in_dll(ctypes.CDLL(None), "blocks_left")
plenty = 1 << 30
torch.set_num_threads(2)
size, small = (320, 256), (5, 6)
for function in FUNCTIONS:
    tensors, few = (make(function, 2, 4, s, dtype=torch.float32) for s in (size, small))
    expected = run(function, doubles(few), size=small, backend="reference")
    leaves = leaves_of(tensors)
    ends = FUNCTIONS[function][1]
    grads = upstream(call(function, leaves, size=size, backend={backend!r}))
    where, failed = None, dict(forward=0, backward=0)
    while where != "nowhere":
        results = gradients = None
        where = "forward"
        left.value = sum(failed.values())
        try:
            results = call(function, leaves, size=size, backend={backend!r})
            where = "backward"
            gradients = torch.autograd.grad(
                [results[name] for name in ends], [leaves[name] for name in FUNCTIONS[function][0]],
                [grads[name] for name in ends],
            )
            where = "nowhere"
            assert left.value >= 0, "a failed allocation raised nothing"
        except (RuntimeError, MemoryError) as error:
            assert "alloc" in str(error), error
            failed[where] += 1
        left.value = plenty
        again = run(function, few, size=small, backend={backend!r})
        assert again.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(again[name].to(want), want, rtol=1e-3, atol=1e-3)
    print(function, *failed.values())
"""


@pytest.mark.slow
@large
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not shutil.which("cc"), reason="needs glibc, a C compiler")
def test_each_allocation_fails_once(backend, tmp_path):
    """Forward or backward raises, whichever thread a block of 16 KiB or more failed on; the next call is correct."""
    if backend == "triton":
        pytest.skip("Triton allocates on a GPU only, by PyTorch's allocator")
    library = tmp_path / "failing_malloc.so"
    source = Path(__file__).parents[1] / "failing_malloc.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-fno-builtin", source, "-o", library], check=True)
    status, found = python(SCARCE.format(backend=backend), LD_PRELOAD=str(library))
    assert status == 0, found
    counts = {function: rest for function, *rest in map(str.split, found.splitlines())}
    assert counts.keys() == FUNCTIONS.keys()
    assert "0" not in itertools.chain(*counts.values()), found


IMPOSSIBLE = """
import resource, torch, attnkern
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.getrlimit(resource.RLIMIT_AS)[1]))
r = torch.full((1, 5), 0.5)
try:
    attnkern.window_map(r, {size}, backend={backend!r})
except (RuntimeError, MemoryError):
    print(attnkern.window_map(r, (1, 1), backend={backend!r}).item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("size", [(2**20, 2**20), (2**30, 2**29)], ids=case_id)
def test_a_map_larger_than_any_memory(size, backend):
    """The allocator's error and no crash; the next call is correct."""
    interprets = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    assert python(IMPOSSIBLE.format(size=size, backend=backend), **interprets) == (0, "1.0")


@pytest.mark.parametrize("function", [*WINDOWS, "anchor_attention", *POOLS])
def test_features_larger_than_any_memory(function, backend, device):
    """One number expanded to 2**50 channels: the output cannot be allocated, and the next call is correct."""
    tensors = make(function, 1, 1, SIZE, dtype=torch.float32, device=device)
    expected = call(function, tensors, backend=backend)
    first, *_ = tensors
    vast = tensors | {first: tensors[first].expand(1, 2**50, *SIZE)}
    if "query" in vast:
        vast["query"] = vast["query"].expand(*vast["query"].shape[:-1], 2**50)
    with pytest.raises((RuntimeError, MemoryError), match="alloc"):
        call(function, vast, backend=backend)
    same(call(function, tensors, backend=backend), expected, "after a failure")


# --- Triton ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_triton(monkeypatch):
    """A Triton whose compiler fails, chosen because there are no native kernels."""

    class Broken:
        calls = 0

        def __getattr__(self, name):
            self.calls += 1
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setitem(_ops.BACKENDS, "triton", Broken())
    monkeypatch.setattr(_backend, "_TRITON_FOUND", True)
    monkeypatch.setattr(_ops, "TRITON_INTERPRETS", True)  # so that it may be chosen on a CPU
    monkeypatch.setitem(_ops.NATIVE_REASON, DEVICE.type, "attnkern/_C is not built")
    _backend._first_kernel_fails.cache_clear()
    yield _ops.BACKENDS["triton"]
    _backend._first_kernel_fails.cache_clear()


def test_a_triton_that_does_not_compile(broken_triton, device):
    """The automatic choice skips Triton after one attempt and one warning; an explicit choice always raises."""
    tensors = make("window_attention", dtype=torch.float32, device=device)
    with pytest.warns(RuntimeWarning, match=r"does not use Triton.*Failed to find C compiler") as warned:
        found = call("window_attention", tensors, backend=None)
    assert [Path(warning.filename).name for warning in warned] == ["cases.py"], "it points at the call"
    check(found, call("window_attention", doubles(tensors), backend="reference"))
    assert broken_triton.calls == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in FUNCTIONS:
            call(function, make(function, dtype=torch.float32, device=device), size=(4, 6), backend=None)
    assert broken_triton.calls == 1
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^Failed to find C compiler"):
            call("window_attention", tensors, backend="triton")


def test_out_of_memory_does_not_exclude_triton(broken_triton, monkeypatch, device):
    """The error is raised, and the next call tries Triton again."""

    def full(self, name):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(type(broken_triton), "__getattr__", full)
    tensors = make("window_attention", dtype=torch.float32, device=device)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            call("window_attention", tensors, backend=None)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="on a CPU Triton compiles nothing")
def test_no_compiler_at_run_time(tmp_path):
    code = """
import torch, attnkern, warnings
from attnkern import _ops
_ops.NATIVE_REASON["cuda"] = "not built"
r = torch.full((1, 5), 0.5, device="cuda")
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    print(attnkern.window_map(r, (1, 1)).item(), attnkern.window_map(r, (1, 1)).item(), len(warned))
try:
    attnkern.window_map(r, (1, 1), backend="triton")
except Exception as error:
    print("raised")
"""
    missing = {"CC": str(tmp_path / "cc"), "TRITON_CACHE_DIR": str(tmp_path)}
    assert python(code, **missing) == (0, "1.0 1.0 1\nraised")


def test_a_triton_that_does_not_import():
    """A broken installation: an explicit choice raises, the automatic choice warns, and other backends run."""
    pytest.importorskip("triton")
    code = """
import sys, torch, attnkern, warnings
from attnkern import _ops
_ops.NATIVE_REASON["cpu"] = "not built"
sys.modules["triton.language"] = None
r = torch.full((1, 5), 0.5)
for backend in ("triton", "triton", "reference"):
    try:
        print(attnkern.window_map(r, (1, 1), backend=backend).item())
    except ImportError as error:
        print("triton" in str(error))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    print(attnkern.window_map(r, (1, 1)).item(), *(warning.category.__name__ for warning in warned))
"""
    assert python(code, TRITON_INTERPRET="1") == (0, "True\nTrue\n1.0\n1.0 RuntimeWarning")
