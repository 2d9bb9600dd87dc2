"""Triton kernels compiled ahead of time, without a GPU: no spills, shared memory that the chip has, 128-bit loads,
barriers between what one thread stores and another loads.

The launchers run on meta tensors and a recorder stands in for the launch, so what is compiled here is exactly what
they would launch: the same kernels, argument types, constants and warps.
"""

import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from attnkern import _ops  # noqa: E402

if _ops.TRITON_INTERPRETS:
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from attnkern._triton import pool, quantize, window  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: bytes of shared memory that a block may have
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

FLOAT, HALF = torch.float32, torch.bfloat16


# --- what is launched ------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: object
    arguments: tuple
    options: dict

    @property
    def name(self):
        return self.kernel.fn.__name__


@pytest.fixture
def launches(monkeypatch):
    """What the launchers launch within a test, in order."""
    recorded = []

    def record(kernel, grid):
        return lambda *arguments, **options: recorded.append(Launch(kernel, arguments, options))

    monkeypatch.setattr(triton.JITFunction, "__getitem__", record)
    return recorded


def meta(*shape, dtype=FLOAT, channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)


def run_window(x, companion):
    rectangle = meta(x.shape[0], 5, dtype=companion)
    output, map, stats = window.window_fwd(x, rectangle, 6.0, True, True, False)
    window.window_bwd(output, map, x, rectangle, stats, 6.0, True, True, False, True)


def run_window_map(x, companion):
    rectangle = meta(x.shape[0], 5, dtype=companion)
    map, stats = window.window_map_fwd(rectangle, *x.shape[2:], 6.0, True, False)
    window.window_map_bwd(map, rectangle, stats, 6.0, True, False)


def run_anchor_quantize(x, companion):
    a, anchors = meta(x.shape[0], 1, *x.shape[2:], dtype=x.dtype), meta(20, dtype=companion)
    values, indices, loss, _, residuals = quantize.quantize_fwd(a, anchors)
    quantize.quantize_bwd(values, loss, loss, a, anchors, indices, residuals, a.numel())


def run_anchor_attention(x, companion):
    a, anchors = meta(x.shape[0], 1, *x.shape[2:], dtype=companion), meta(20, dtype=companion)
    output, values, indices, loss, _, residuals = quantize.anchor_fwd(x, a, anchors, True)
    quantize.anchor_bwd(output, values, loss, loss, x, a, anchors, indices, residuals, True, a.numel(), True)


def run_pool(x, companion):
    query = meta(*x.shape[:2], dtype=companion)
    pooled, attention, scores, pooled_wide = pool.pool_fwd(x, query)
    pooled_wide = pooled_wide if pooled_wide.numel() else pooled
    pool.pool_bwd(pooled, attention, scores, x, query, attention, pooled_wide, True)


RUNS = {
    "window": run_window,
    "window_map": run_window_map,
    "anchor_quantize": run_anchor_quantize,
    "anchor_attention": run_anchor_attention,
    "pool": run_pool,
}


# --- compiling it ----------------------------------------------------------------------------------------------------


class Cubin(NamedTuple):
    registers: int
    stack: int  #: bytes that something is stored to, spilled registers among them
    shared: int  #: bytes
    loads: list  #: widths in bits of the loads from global memory
    unordered: set  #: arguments that are loaded from after a store, with no barrier between

    def row(self):
        widths = ", ".join(f"{self.loads.count(width)} x {width}" for width in sorted(set(self.loads), reverse=True))
        return f"{self.registers:5} registers {self.stack:4} stack {self.shared:6} shared   loads {widths}"


POINTERS = {FLOAT: "*fp32", HALF: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32"}


def source(launch):
    """What Triton's just-in-time compiler would make of the arguments: types, constants, divisibility by 16."""
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        divisible = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and special)
        if divisible and signature[name] != "constexpr":
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


_compiled = {}


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def cubin(launch, capability, folder):
    """The kernel's resources; each distinct one is compiled once."""
    options = {k: v for k, v in launch.options.items() if k not in launch.kernel.arg_names}
    ast = source(launch)
    key = launch.name, capability, ast.hash(), str(sorted(options.items()))
    if key not in _compiled:
        compiled = triton.compile(ast, target=GPUTarget("cuda", capability, 32), options=options)
        path = folder / f"{launch.name}.cubin"
        path.write_bytes(compiled.asm["cubin"])
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", path)).groups()
        code = tool("nvdisasm", "-c", path)
        stack = stack if "STL" in code else 0  # capability 10.0 reserves some for calls that are never made
        loads = re.findall(r"\bLDG\.E(?:\.(U?\d+))?[\w.]*", code)
        widths = [int(width.strip("U")) if width else 32 for width in loads]
        races = unordered(compiled.asm["ttir"])
        _compiled[key] = Cubin(int(registers), int(stack), compiled.metadata.shared, widths, races)
    return _compiled[key]


def unordered(ir):
    """Arguments that a program may load from after storing there, with no barrier between: by then another thread's
    store may not be seen. Outer loops are taken twice; an inner one's steps touch different channels."""
    origin, events, loop = {}, [], 0
    for line in ir.splitlines():
        if "tt.func" in line:
            origin = {name: name for name in re.findall(r"(%\w+): !tt\.ptr", line)}
        for made, of in re.findall(r"(%\w+) = tt\.(?:addptr|splat|broadcast|expand_dims) (%\w+)", line):
            origin[made] = origin.get(of)
        for made, of in re.findall(r"(%\w+) = (%\w+)", line):  # what a loop carries
            origin[made] = origin.get(of)
        if found := re.search(r"tt\.(store|load) (%\w+)|\b(barrier)\b", line):
            events.append((found[1] or found[3], origin.get(found[2])))
        if line.startswith("    ") and line[4] != " " and "scf.for" in line:
            loop = len(events)
        elif line.startswith("    }"):
            events += events[loop:]
    stored, found = set(), set()
    for kind, where in events:
        if kind == "load" and where in stored:
            found.add(where)
        stored = set() if kind == "barrier" else stored | {where} if kind == "store" else stored
    return found


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Prints the largest resource use of each kernel when all is compiled."""
    yield
    groups = {}
    for (name, capability), found in sorted(_by_kernel().items()):
        groups.setdefault(name, {})[capability] = found
    lines = [f"\n\n{'registers / bytes of shared memory, at most':44}" + "".join(f"{c:>16}" for c in SHARED_MEMORY)]
    for name, found in groups.items():
        cells = [f"{found[c][0]} / {found[c][1]}" if c in found else "" for c in SHARED_MEMORY]
        lines.append(f"{name:44}" + "".join(f"{cell:>16}" for cell in cells))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(lines))


def _by_kernel():
    worst = {}
    for key, found in _compiled.items():
        registers, shared = worst.get(key[:2], (0, 0))
        worst[key[:2]] = max(registers, found.registers), max(shared, found.shared)
    return worst


# --- tests -----------------------------------------------------------------------------------------------------------

#: features that a kernel reads; the others read maps, statistics and partial sums only
FEATURES_READ = {
    "_window_fwd_kernel": 1,
    "_window_bwd_kernel": 2,
    "_anchor_fwd_kernel": 1,
    "_anchor_bwd_kernel": 2,
    "_pool_fwd_kernel": 1,
    "_pool_bwd_kernel": 1,
}
#: cos and sin bring a stack frame for huge arguments; whatever lies above it is spilled registers
STACK_OF_COSINE = 32


def check(launch, x, capability, folder):
    found, constants = cubin(launch, capability, folder), launch.options
    where = f"{launch.name}, {tuple(x.shape)}, {x.dtype}, sm_{capability}: {found.row()}"
    assert found.stack <= (STACK_OF_COSINE if launch.name.startswith("_window") else 0), where
    assert found.shared <= SHARED_MEMORY[capability], where
    assert not found.unordered, f"{where}: no barrier before {found.unordered} is read again"
    vector = constants.get("VEC_C", 1) * constants.get("VEC_P", 1)
    if vector * x.itemsize == 16:
        tile = constants["BLOCK_C"] * constants["BLOCK_P"] * x.itemsize // (32 * constants["num_warps"])
        assert 16 * found.loads.count(128) >= FEATURES_READ[launch.name] * tile, where


SHAPES = [
    (32, 256, 56, 56),
    (32, 64, 128, 128),
    (32, 512, 32, 32),
    (32, 512, 14, 14),
    (32, 512, 7, 7),
    (32, 2048, 7, 7),
]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_fits(run, capability, shape, launches, tmp_path):
    """No spills, no more shared memory than there is, features loaded by 128 bits where rows are whole vectors."""
    for dtype, channels_last in itertools.product((FLOAT, HALF), (False, True)):
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        run(x, FLOAT)
        assert launches
        while launches:
            check(launches.pop(), x, capability, tmp_path)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_half_precision_companions_fit(run, launches, tmp_path):
    """Rectangle, map, anchors and query in the features' type; channels that fill no vector."""
    for shape in ((32, 320, 10, 10), (2, 3, 5, 5)):
        x = meta(*shape, dtype=torch.float16)
        run(x, torch.float16)
        while launches:
            check(launches.pop(), x, 90, tmp_path)


@pytest.mark.parametrize("shape", [(2, 4096, 20, 20), (2, 3000, 7, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_channels_than_a_tile_fit(shape, channels_last, launches, tmp_path):
    x = meta(*shape, channels_last=channels_last)
    run_pool(x, FLOAT)
    for launch in launches:
        check(launch, x, 90, tmp_path)


def test_a_missing_barrier_shows(launches):
    run_pool(meta(2, 3000, 7, 7), FLOAT)
    ir = triton.compile(source(launches[0]), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ttir"]
    assert not unordered(ir)
    assert unordered(ir.replace("ttg.barrier all", "")) == {"%sums"}


def test_at_most_two_launches(launches):
    """Of each pass; one where the map is small enough for one block."""
    for run, shape, channels_last in itertools.product(RUNS.values(), [*SHAPES, (2, 64, 7, 7)], (False, True)):
        run(meta(*shape, channels_last=channels_last), FLOAT)
        small = shape == (2, 64, 7, 7)
        assert len(launches) <= (2 if small else 4), (run.__name__, shape, [launch.name for launch in launches])
        launches.clear()
