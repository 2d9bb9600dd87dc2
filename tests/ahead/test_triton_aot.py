"""Compiles the Triton kernels ahead of time for NVIDIA and AMD, without a GPU.

The tests check that no registers spill, that shared memory fits, that features are loaded and stored in full vectors,
and that a barrier separates a store from a load of the same buffer. The launchers run on meta tensors and a recorder
replaces the launch, so these are the kernels, argument types, constants and warps of a real launch.
"""

import itertools
import math
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import FUNCTIONS, case_id

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from attnkern import _ops  # noqa: E402

if _ops.TRITON_INTERPRETS:
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from attnkern._triton import common, pool, quantize, window  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: compilation targets, each with the limit of shared memory per block in bytes
NVIDIA = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
}
AMD = {
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64 * 1024),
}
TARGETS = NVIDIA | AMD

FLOAT, HALF = torch.float32, torch.bfloat16


# --- recorded launches ----------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: object
    arguments: tuple
    options: dict

    @property
    def name(self):
        return self.kernel.fn.__name__


@pytest.fixture
def launches(monkeypatch):
    """The launches recorded during a test, in order."""
    recorded = []

    def record(kernel, grid):
        return lambda *arguments, **options: recorded.append(Launch(kernel, arguments, options))

    monkeypatch.setattr(triton.JITFunction, "__getitem__", record)
    return recorded


def meta(*shape, dtype=FLOAT, channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)


def run_window(x, companion, windows=(), ellipse=False):
    rectangle = meta(x.shape[0], *windows, 5, dtype=companion)
    output, map, stats = window.window_fwd(x, rectangle, 6.0, True, True, False, ellipse)
    window.window_bwd(output, map, x, rectangle, stats, 6.0, True, True, False, ellipse, True)


def run_window_map(x, companion, windows=(), ellipse=False):
    rectangle = meta(x.shape[0], *windows, 5, dtype=companion)
    map, stats = window.window_map_fwd(rectangle, *x.shape[2:], 6.0, True, False, ellipse)
    window.window_map_bwd(map, rectangle, stats, 6.0, True, False, ellipse)


# The number of windows is not a constant of the kernels.


def run_window_many(x, companion):
    run_window(x, companion, windows=(4,))


def run_window_map_many(x, companion):
    run_window_map(x, companion, windows=(4,))


def run_anchor_quantize(x, companion):
    a, anchors = meta(x.shape[0], 1, *x.shape[2:], dtype=x.dtype), meta(20, dtype=companion)
    values, indices, loss, _, _, residuals = quantize.quantize_fwd(a, anchors, a.numel())
    quantize.quantize_bwd(values, loss, loss, a, anchors, indices, residuals, a.numel())


def run_anchor_attention(x, companion):
    a, anchors = meta(x.shape[0], 1, *x.shape[2:], dtype=companion), meta(20, dtype=companion)
    output, values, indices, loss, _, _, residuals = quantize.anchor_fwd(x, a, anchors, True, a.numel())
    quantize.anchor_bwd(output, values, loss, loss, x, a, anchors, indices, residuals, True, a.numel(), True)


def run_pool(x, companion):
    query = meta(*x.shape[:2], dtype=companion)
    pool_both(x, query, None)


def run_pool_many(x, companion, queries=9):
    pool_both(x, meta(x.shape[0], queries, x.shape[1], dtype=companion), None)


def run_pool_masked(x, companion):
    query, mask = meta(1, 3, x.shape[1], dtype=companion), meta(x.shape[0], *x.shape[2:], dtype=torch.bool)
    pool_both(x, query, mask)


def pool_both(x, query, mask):
    pooled, attention, scores, pooled_wide = pool.pool_fwd(x, query, mask)
    pooled_wide = pooled_wide if pooled_wide.numel() else pooled
    pool.pool_bwd(pooled, attention, scores, x, query, mask, attention, pooled_wide, True)


RUNS = {
    "window_attention": run_window,
    "window_attention_many": run_window_many,
    "window_map": run_window_map,
    "window_map_many": run_window_map_many,
    "anchor_quantize": run_anchor_quantize,
    "anchor_attention": run_anchor_attention,
    "compatibility_pool": run_pool,
    "compatibility_pool_many": run_pool_many,
    "compatibility_pool_masked": run_pool_masked,
}
assert RUNS.keys() == FUNCTIONS.keys()


# --- compilation ----------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    registers: int
    spilled: int  #: bytes of stack that are stored to; on AMD, plus spilled registers
    shared: int  #: bytes
    loads: list  #: width in bits of each load from global memory
    stores: list  #: width in bits of each store to global memory
    unordered: set  #: arguments that are stored to and then loaded from without a barrier

    def row(self):
        return (
            f"{self.registers} registers, {self.spilled} spilled, {self.shared} bytes shared, "
            f"loads of {widths(self.loads)} bits, stores of {widths(self.stores)}"
        )


def widths(found):
    return ", ".join(f"{found.count(width)} x {width}" for width in sorted(set(found), reverse=True))


POINTERS = {
    FLOAT: "*fp32", HALF: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


def source(launch):
    """Specializes the arguments as Triton's JIT compiler does: types, constants, divisibility by 16."""
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


def nvidia_code(compiled, path):
    path.write_bytes(compiled.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", path)).groups()
    code = tool("nvdisasm", "-c", path)
    stack = stack if "STL" in code else 0  # sm_100 code reserves stack even when it is not used

    def accesses(name):
        found = re.findall(rf"\b{name}\.E(?:\.([US]?\d+))?[\w.]*", code)
        return [int(width.strip("US")) if width else 32 for width in found]

    return int(registers), int(stack), accesses("LDG"), accesses("STG")


#: width in bits of an AMD memory instruction, by the suffix of its name
AMD_WIDTHS = {
    "ubyte": 8, "byte": 8, "u8": 8, "b8": 8, "short": 16, "ushort": 16, "short_d16": 16, "short_d16_hi": 16,
    "d16_b16": 16, "d16_hi_b16": 16, "b16": 16, "u16": 16, "dword": 32, "b32": 32, "dwordx2": 64, "b64": 64,
    "dwordx3": 96, "b96": 96, "dwordx4": 128, "b128": 128,
}  # fmt: skip


def amd_code(compiled, path):
    code = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    def accesses(kind):
        return [AMD_WIDTHS[width] for width in re.findall(rf"^\s+(?:global|buffer|flat)_{kind}_(\w+)", code, re.M)]

    # Scalar registers spill to lanes of vector registers, not to memory.
    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spilled, accesses("load"), accesses("store")


def code_of(launch, name, folder):
    """Compiles a launch's kernel for a target, with a cache, and returns its resource use."""
    target, _ = TARGETS[name]
    options = {k: v for k, v in launch.options.items() if k not in launch.kernel.arg_names}
    ast = source(launch)
    key = launch.name, name, ast.hash(), str(sorted(options.items()))
    if key not in _compiled:
        compiled = triton.compile(ast, target=target, options=options)
        read = nvidia_code if target.backend == "cuda" else amd_code
        registers, spilled, loads, stores = read(compiled, folder / f"{launch.name}.cubin")
        races = unordered(compiled.asm["ttir"])
        _compiled[key] = Code(registers, spilled, compiled.metadata.shared, loads, stores, races)
    return _compiled[key]


def unordered(ir):
    """Arguments that a program may store to and then load from without a barrier, so that a thread may miss another
    thread's store. Outer loops are read twice, to cover consecutive iterations. Inner loops are read once, because
    their iterations access different channels."""
    origin, events, loop = {}, [], 0
    for line in ir.splitlines():
        if "tt.func" in line:
            origin = {name: name for name in re.findall(r"(%\w+): !tt\.ptr", line)}
        for made, of in re.findall(r"(%\w+) = tt\.(?:addptr|splat|broadcast|expand_dims) (%\w+)", line):
            origin[made] = origin.get(of)
        for made, of in re.findall(r"(%\w+) = (%\w+)", line):  # loop-carried values
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
    """Prints the largest resource use of each kernel after the last test."""
    yield
    groups = {}
    for (kernel, target), found in sorted(_by_kernel().items()):
        groups.setdefault(kernel, {})[target] = found
    lines = [f"\n\n{'registers / bytes of shared memory, at most':44}" + "".join(f"{name:>14}" for name in TARGETS)]
    for kernel, found in groups.items():
        cells = [f"{found[name][0]} / {found[name][1]}" if name in found else "" for name in TARGETS]
        lines.append(f"{kernel:44}" + "".join(f"{cell:>14}" for cell in cells))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(lines))


def _by_kernel():
    worst = {}
    for key, found in _compiled.items():
        registers, shared = worst.get(key[:2], (0, 0))
        worst[key[:2]] = max(registers, found.registers), max(shared, found.shared)
    return worst


# --- tests -----------------------------------------------------------------------------------------------------------

#: feature tensors that a kernel (reads, writes); other kernels access only maps, statistics and partial sums
FEATURES = {
    "_window_fwd_kernel": (1, 1),
    "_window_bwd_kernel": (2, 1),
    "_windows_fwd_kernel": (1, 1),
    "_windows_bwd_kernel": (2, 1),
    "_anchor_fwd_kernel": (1, 1),
    "_anchor_bwd_kernel": (2, 1),
    "_pool_fwd_kernel": (1, 0),
    "_pool_bwd_kernel": (1, 1),
    "_pool_score_kernel": (1, 0),
    "_pool_average_kernel": (1, 0),
    "_pool_grad_kernel": (1, 1),
}
#: bytes of stack that cos and sin use for huge arguments; a larger stack means spilled registers
STACK_OF_COSINE = 32


def vector(constants, itemsize):
    """The largest vector, in elements, that the kernel's constants guarantee to divide every row."""
    if constants["CHANNELS_LAST"]:
        return constants["VEC_C"]
    return constants.get("VEC_P") or math.gcd(constants["P"], 16 // itemsize)


def check(launch, x, name, folder):
    found, constants = code_of(launch, name, folder), launch.options
    target, shared = TARGETS[name]
    where = f"{launch.name}, {tuple(x.shape)}, {x.dtype}, {name}: {found.row()}"
    cosine = launch.name.startswith("_window") and target.backend == "cuda"
    assert found.spilled <= (STACK_OF_COSINE if cosine else 0), where
    assert found.shared <= shared, where
    assert not found.unordered, f"{where}: no barrier before {found.unordered} is read again"
    if launch.name in FEATURES and launch.arguments[0] is not None:
        numbers = constants["BLOCK_C"] * constants["BLOCK_P"] // (target.warp_size * constants["num_warps"])
        wide = min(vector(constants, x.itemsize), max(1, numbers))
        for accesses, features in zip((found.loads, found.stores), FEATURES[launch.name], strict=True):
            enough = accesses.count(8 * wide * x.itemsize) >= features * max(1, numbers // wide)
            assert enough, f"{where}: expected {features} x {numbers} numbers, {wide} at a time"


def check_run(run, shape, dtype, channels_last, name, launches, folder):
    x = meta(*shape, dtype=dtype, channels_last=channels_last)
    run(x, FLOAT)
    assert launches
    for launch in launches:
        check(launch, x, name, folder)


SHAPES = [
    (32, 256, 56, 56),
    (32, 64, 128, 128),
    (32, 512, 32, 32),
    (32, 512, 14, 14),
    (256, 320, 10, 10),
    (32, 512, 7, 7),
    (32, 2048, 7, 7),
]


every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
every_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
every_dtype = pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=case_id)


@pytest.mark.pairs
@every_dtype
@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_run
def test_fits(run, shape, channels_last, dtype, launches, tmp_path):
    """No spills, shared memory within the limit, features loaded and stored in the widest possible vectors."""
    check_run(run, shape, dtype, channels_last, "sm_90", launches, tmp_path)


@pytest.mark.slow
@pytest.mark.pairs
@every_dtype
@every_layout
@pytest.mark.parametrize("shape", [(32, 256, 56, 56), (256, 320, 10, 10), (32, 2048, 7, 7)], ids=str)
@pytest.mark.parametrize("name", ["sm_80", "sm_100"])
@every_run
def test_fits_other_nvidia_gpus(run, name, shape, channels_last, dtype, launches, tmp_path):
    check_run(run, shape, dtype, channels_last, name, launches, tmp_path)


@pytest.mark.pairs
@every_layout
@pytest.mark.parametrize(
    "shape, dtype", [((32, 256, 56, 56), FLOAT), ((32, 256, 56, 56), HALF), ((32, 2048, 7, 7), HALF)], ids=case_id
)
@pytest.mark.parametrize("name", AMD)
@every_run
def test_fits_amd_gpus(run, name, shape, dtype, channels_last, launches, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(common, "warp_size", lambda device: AMD[name][0].warp_size)
    check_run(run, shape, dtype, channels_last, name, launches, tmp_path)


@every_run
def test_half_precision_companions_fit(run, launches, tmp_path):
    """Rectangle, map, anchors and query have the features' dtype; one shape has too few channels for a vector."""
    for shape in ((32, 320, 10, 10), (32, 512, 14, 14), (32, 512, 7, 7), (2, 3, 5, 5)):
        x = meta(*shape, dtype=torch.float16)
        run(x, torch.float16)
        while launches:
            check(launches.pop(), x, "sm_90", tmp_path)


@pytest.mark.parametrize("windows", [(), (4,)], ids=str)
def test_ellipses_fit(windows, launches, tmp_path):
    x = meta(32, 512, 14, 14)
    run_window(x, FLOAT, windows=windows, ellipse=True)
    assert {launch.options["ELLIPSE"] for launch in launches if "ELLIPSE" in launch.options} == {True}
    for launch in launches:
        check(launch, x, "sm_90", tmp_path)


@pytest.mark.parametrize("shape", [(2, 4096, 20, 20), (2, 3000, 7, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_fits_more_channels_than_a_tile(shape, channels_last, launches, tmp_path):
    x = meta(*shape, channels_last=channels_last)
    run_pool(x, FLOAT)
    for launch in launches:
        check(launch, x, "sm_90", tmp_path)


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_within_a_tile_fit_in_32_bits(channels_last, launches):
    """Even for the largest images, of 2**32 elements."""
    for run, shape in itertools.product(
        (run_window, run_anchor_attention, run_pool), [(2048, 1 << 21), (1 << 23, 512)]
    ):
        channels, positions = shape
        run(meta(1, channels, positions // 16, 16, dtype=HALF, channels_last=channels_last), FLOAT)
        tiles = [launch.options for launch in launches if launch.name in FEATURES]
        assert tiles
        for tile in tiles:
            rows, length = (tile["BLOCK_P"], channels) if channels_last else (tile["BLOCK_C"], positions)
            assert rows * length <= 2**31, (run.__name__, channels, positions, tile)
        launches.clear()


def test_missing_barrier_is_detected(launches):
    run_pool(meta(2, 64, 7, 7), FLOAT)
    ir = triton.compile(source(launches[0]), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ttir"]
    assert not unordered(ir)
    assert unordered(ir.replace("ttg.barrier all", "")) == {"%scores"}


def test_at_most_two_launches(launches):
    """Two launches per pass; one if a single block can process the map. Many queries have one more for Δ. Of several
    windows the map is computed before the features are read: two launches forward, four backward."""
    for run, shape, channels_last in itertools.product(RUNS.values(), [*SHAPES, (2, 64, 7, 7)], (False, True)):
        run(meta(*shape, channels_last=channels_last), FLOAT)
        most = 2 if shape == (2, 64, 7, 7) else 4
        most = {run_pool_many: 5, run_pool_masked: 5, run_window_many: 6, run_window_map_many: 6}.get(run, most)
        assert len(launches) <= most, (run.__name__, shape, [launch.name for launch in launches])
        launches.clear()
