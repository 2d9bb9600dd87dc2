"""Records what a call launches on a GPU, without a GPU.

The public functions run with their gradients on tensors that hold nothing. The native operators are those that
tests/cuda_on_host builds from csrc/cuda for the CPU: with ATTNKERN_HOST_RECORD they write down each launch instead of
running it. Triton's launchers run on meta tensors while a recorder stands in for the launch. So grids, constants and
parameters are those of the code as it is, and nothing here knows a kernel.
"""

import contextlib
import hashlib
import math
import os
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnkern import _backend, _ops
from attnkern._schemas import SCHEMAS
from attnkern.testing import OPS
from benchmarks import cases
from benchmarks.count.code import CACHE, ROOT, Kernel, demangled, native_kernels, of_cubin
from benchmarks.count.sass import Region

PASSES = ("forward", "backward")
#: Addresses for pointers: each tensor has its own region, aligned as the allocator aligns it.
_FIRST, _APART = 1 << 40, 1 << 33


class Launch(NamedTuple):
    """A kernel and the parameters of its launch."""

    name: str
    kernel: Kernel
    grid: tuple[int, ...]  #: blocks along each axis
    threads: int
    parameters: bytes
    regions: tuple[Region, ...]
    shared: int = 0  #: dynamic bytes per block
    cluster: int = 1

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


class Recorded(NamedTuple):
    """What one pass of a call launches."""

    launches: list[list[Launch]]  #: for each, the alternatives: one, or those that a tuner would choose from
    others: list[str]  #: PyTorch's own operators that launch kernels beside them


# --- calls -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_filled():
    """PyTorch does not fill uninitialised memory."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


def inputs(case: cases.Case, device: str) -> dict[str, torch.Tensor]:
    """Tensors with size, dtype and layout of the benchmark's inputs of a case, without data."""
    with FakeTensorMode():
        fake = cases._inputs(case, torch.device("cpu"))
    empty = {}
    for name, tensor in fake.items():
        empty[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return empty


class Others(TorchDispatchMode):
    """Lists the operators that launch kernels: all that write elements of a tensor that is not empty."""

    _ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket.__name__
        is_view = any(
            argument.alias_info and not argument.alias_info.is_write for argument in function._schema.arguments
        )
        own = function.namespace.startswith("attnkern")
        if not (own or is_view or packet in self._ALLOCATE) and isinstance(result, torch.Tensor) and result.numel():
            self.found.append(packet)
        return result


def _call(case: cases.Case, device: str, handles) -> tuple[list[str], list[str]]:
    """Run both passes of a case with these operators. Returns what PyTorch launches besides in each."""
    op = OPS[case.op]
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs(case, device).items()}
    used = cases._USED[case.op]
    with (
        mock.patch.dict(_ops.BACKENDS, {"native": handles}),
        mock.patch.object(_backend, "choose", return_value="native"),
    ):
        with Others() as forward:
            results = op.function(**leaves)
        outputs = [getattr(results, key) for key in used]
        gradients = [torch.empty_like(output) for output in outputs]
        handles.tensors += [*leaves.values(), *gradients]
        handles.current = "backward"
        with Others() as backward:
            torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
    return forward.found, backward.found


class _Handles:
    """Operators that record their tensors and the pass in which they run."""

    def __init__(self, operators: dict):
        self.tensors, self.current = [], "forward"
        for name, operator in operators.items():
            setattr(self, name, self._remembering(operator))

    def _remembering(self, operator):
        def call(*args):
            results = operator(*args)
            several = results if isinstance(results, tuple) else (results,)
            self.tensors += [tensor for tensor in (*args, *several) if isinstance(tensor, torch.Tensor)]
            self.after()
            return results

        return call

    def after(self):
        """Called after an operator has launched its kernels."""


# --- native ----------------------------------------------------------------------------------------------------------


@cache
def _host_operators() -> dict:
    """The native operators, built for the CPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import cuda_on_host
    finally:
        sys.path.remove(str(ROOT / "tests"))
    namespace = cuda_on_host.load()
    return {name: getattr(namespace, name).default for name in SCHEMAS}


@cache
def _symbols() -> dict[int, str]:
    """The kernels of the library for the CPU, by their offset in it."""
    library = ROOT / "build/cuda_on_host/attnkern_host.so"
    listing = subprocess.run(["nm", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    entries = [line.split() for line in listing.splitlines()]
    mangled = {int(address, 16): name for address, kind, name in entries if kind in "tTWw"}
    names = demangled(list(mangled.values()))
    return {address: names[name] for address, name in mangled.items()}


class _NativeHandles(_Handles):
    def __init__(self, operators, file):
        super().__init__(operators)
        self.file, self.lines = file, {"forward": [], "backward": []}

    def after(self):
        self.lines[self.current] += self.file.read().splitlines()


def _canonical(parameters: bytes, pointers: list[int], tensors: list[torch.Tensor]) -> tuple[bytes, tuple[Region, ...]]:
    """Parameters with their pointers moved to places that are the same in each run, and the regions there.

    ``pointers``: where they are among the parameters. ``tensors``: arguments and results; other memory is scratch.
    """
    known = sorted({(t.data_ptr(), t.numel() * t.itemsize, t.dtype) for t in tensors if t.numel()}, key=lambda k: k[:2])
    packed, bases, regions = bytearray(parameters), {}, []
    for at in pointers:
        (word,) = struct.unpack_from("<Q", packed, at)
        start, size, dtype = next(
            (region for region in known if region[0] <= word < region[0] + region[1]), (word, 0, None)
        )
        if start not in bases:
            bases[start] = _FIRST + _APART * len(bases)
            name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
            regions.append(Region(bases[start], size or _APART, name, dtype is None))
        struct.pack_into("<Q", packed, at, bases[start] + word - start)
    return bytes(packed), tuple(regions)


def native(case: cases.Case, sources: tuple[Path, ...] = ()) -> dict[str, Recorded]:
    """What a case launches natively, by pass, with machine code from the built library or from the given ones."""
    kernels, operators = native_kernels(sources), _host_operators()
    with (
        tempfile.NamedTemporaryFile("r", encoding="utf-8") as file,
        mock.patch.dict(os.environ, {"ATTNKERN_HOST_RECORD": file.name}),
        nothing_filled(),
    ):
        handles = _NativeHandles(operators, file)
        others = dict(zip(PASSES, _call(case, "cpu", handles), strict=True))
    return {which: Recorded([[_native(line, kernels, handles.tensors)] for line in handles.lines[which]], others[which])
            for which in PASSES}  # fmt: skip


def _native(line: str, kernels, tensors) -> Launch:
    offset, grid, threads, shared, cluster, parameters, *pointers = line.split(" ")
    name = _symbols()[int(offset)]
    if name not in kernels:
        raise LookupError(f"the library has no {name}: it was built from other sources")
    packed, regions = _canonical(bytes.fromhex(parameters), list(map(int, pointers)), tensors)
    return Launch(name, kernels[name], (int(grid),), int(threads), packed, regions, int(shared), int(cluster))


# --- Triton ----------------------------------------------------------------------------------------------------------

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


class _TritonHandles(_Handles):
    def __init__(self, operators):
        super().__init__(operators)
        self.launched = {"forward": [], "backward": []}

    def record(self, kernel, grid):
        return lambda *arguments, **options: self.launched[self.current].append((kernel, grid, arguments, options))


def triton(case: cases.Case) -> dict[str, Recorded]:
    """What a case launches through Triton, by pass; compiled ahead of time for compute capability 9.0."""
    from triton import JITFunction

    handles = _TritonHandles({name: _ops._triton_kernel(name) for name in SCHEMAS})
    with mock.patch.object(JITFunction, "__getitem__", lambda kernel, grid: handles.record(kernel, grid)):
        others = dict(zip(PASSES, _call(case, "meta", handles), strict=True))
    known = {tensor.untyped_storage()._cdata for tensor in handles.tensors}
    return {which: Recorded([[_triton(*launch, known)] for launch in handles.launched[which]], others[which])
            for which in PASSES}  # fmt: skip


def _triton(kernel, grid, arguments, options, known) -> Launch:
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, attributes, typed = {}, {}, {}, []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and special):
            attributes[(i,)] = [["tt.divisibility", 16]]
        typed.append((signature[name], value))
    source = ASTSource(kernel, signature, constants, attributes)
    compiler = {key: value for key, value in options.items() if key not in kernel.arg_names}
    return cubin_launch(kernel.fn.__name__, source, compiler, tuple(grid), typed, known)


#: How parameters of a Triton kernel are packed.
_PACKED = {"i1": "b", "i8": "b", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}


def cubin_launch(name, source, options, grid, typed, known) -> Launch:
    """The launch of a Triton kernel, compiled ahead of time for compute capability 9.0.

    ``typed``: types and values of the parameters that are no constants. ``known``: storages of arguments and results.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (machine_code,) = of_cubin(_kept(compiled.asm["cubin"])).values()
    packed, bases, regions = bytearray(), {}, []
    for kind, value in typed:
        if not isinstance(value, torch.Tensor):
            _pack(packed, _PACKED[kind], value)
            continue
        storage = value.untyped_storage()._cdata
        if storage not in bases:
            bases[storage] = _FIRST + _APART * len(bases)
            dtype = str(value.dtype).removeprefix("torch.")
            regions.append(Region(bases[storage], max(1, value.numel() * value.itemsize), dtype, storage not in known))
        _pack(packed, "Q", bases[storage] + value.storage_offset() * value.itemsize)
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    return Launch(name, machine_code, grid, threads, bytes(packed), tuple(regions), shared)


def _pack(packed: bytearray, kind: str, value) -> None:
    packed += bytes(-len(packed) % struct.calcsize(kind)) + struct.pack("<" + kind, value)


def _kept(cubin: bytes) -> Path:
    """A file with a cubin, for the tools."""
    path = CACHE / "cubin" / f"{hashlib.sha256(cubin).hexdigest()[:24]}.cubin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(cubin)
        partial.replace(path)
    return path
