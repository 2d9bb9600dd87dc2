"""Exported programs: plain ATen by decomposition, ONNX checked with onnxruntime, an AOTInductor package."""

import pytest
import torch
from cases import FUNCTIONS, call, case_id, check, doubles, make, same
from test_quantize import nearest
from test_transforms import operator_calls
from torch import nn

import attnkern
import attnkern.nn as ann
from attnkern import _decompositions, _ops

every_function = pytest.mark.parametrize("function", FUNCTIONS)


class Function(nn.Module):
    """A function of its tensors as a module, giving its results."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        named = dict(zip(FUNCTIONS[self.function][0], tensors, strict=True))
        size = (5, 6) if self.function == "window_map" else None
        return tuple(call(self.function, named, size=size).values())


class Everything(nn.Module):
    """All modules with an attnkern operator inside, on features (N, 6, H, W)."""

    def __init__(self):
        super().__init__()
        self.window = ann.WindowAttention(6, (4,))
        self.bottleneck = ann.BottleneckAttention(6, num_anchors=5)
        self.pool = ann.CompatibilityPool(6, 4, "dot", "local")
        self.query = nn.Linear(6, 4)

    def forward(self, x):
        x = self.bottleneck(self.window(x)).output
        return self.pool(x, self.query(x.mean((2, 3))))


def exported(module, example, dynamic):
    program = torch.export.export(module.eval(), example, dynamic_shapes=dynamic)
    return program.run_decompositions(attnkern.decompositions())


def namespaces(program):
    return {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}


# --- decompositions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=case_id)
def test_every_decomposition_computes_what_its_operator_does(dtype, device):
    checked = set()
    for name, arguments in operator_calls(device, "native", dtype, "contiguous"):
        found = getattr(_decompositions, f"_{name}")(*arguments)
        wanted = getattr(_ops.BACKENDS["native"], name)(*arguments)
        pairs = [(found, wanted)] if isinstance(wanted, torch.Tensor) else list(zip(found, wanted, strict=True))
        if "window" in name and name.endswith("fwd"):
            stats, _ = pairs.pop()
            assert stats.isnan().all(), "must not pass for the statistics that kernels save"
        assert [a.dtype for a, _ in pairs] == [b.dtype for _, b in pairs]
        check(*({str(i): pair[k] for i, pair in enumerate(pairs)} for k in (0, 1)))
        checked.add(name)
    assert checked == set(_ops.SCHEMAS)


def test_nearest_anchors_at_the_edges(device):
    a = torch.tensor([[0.25, 0.75, -9.0, 9.0, torch.inf, -torch.inf, torch.nan]], device=device)
    for anchors in ([0.0, 0.5, 1.0], [1.0, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, torch.nan, 1.0], [0.3]):
        anchors = torch.tensor(anchors, device=device)
        found = dict(enumerate(_decompositions._quantize_fwd(a, anchors)[:2]))
        same(found, dict(enumerate(_ops.BACKENDS["native"].quantize_fwd(a, anchors)[:2])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=case_id)
def test_nearest_anchors_by_distances_are_exact(dtype):
    """Where distances round to a tie, and where they overflow."""
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    for anchors in (
        [1 + limits.eps, 1, 1 - limits.eps], [1e-9, -1e-9], [3 * least, -2 * least, 0], [limits.max, least],
        [0.75 * limits.max, -limits.max], [-torch.inf, limits.max, 0.5 * limits.max], [torch.inf, -torch.inf],
    ):  # fmt: skip
        anchors = torch.tensor(anchors, dtype=dtype)
        halves = 0.5 * anchors
        a = torch.cat([anchors, (halves[:, None] + halves).flatten(), torch.tensor([0, -0.0, 1, -1], dtype=dtype)])
        a = torch.cat([a, *(a.nextafter(torch.full_like(a, end)) for end in (-torch.inf, torch.inf))])
        found = _decompositions._nearest(a, anchors)
        assert found.tolist() == [nearest(element, anchors.tolist()) for element in a.tolist()]


@every_function
def test_a_decomposed_program_is_plain_aten(function):
    """At any batch size, and, features having one, at any size of the map."""
    sizes = {0: torch.export.Dim("batch", min=2, max=64)}
    if function != "window_map":
        sizes |= {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    names = FUNCTIONS[function][0]
    dynamic = {
        "x": sizes,
        "a": sizes,
        "local": sizes,
        "anchors": {},
        "query": {0: sizes[0]},
        "rectangle": {0: sizes[0]},
    }

    def inputs(n, size):
        return tuple(make(function, n, size=size, dtype=torch.float32).values())

    program = exported(Function(function), inputs(3, (4, 6)), (tuple(dynamic[name] for name in names),))
    assert namespaces(program) == {"aten"}
    given = inputs(5, (7, 3))
    check(dict(enumerate(program.module()(*given))), doubles(dict(enumerate(Function(function)(*given)))))


def test_a_shared_query_ties_the_batch_to_nothing():
    """Also at N = C: whether the query is shared is asked of its number of axes."""

    class Shared(nn.Module):
        def forward(self, local, query):
            return tuple(attnkern.compatibility_pool(local, query))

    def inputs(n):
        return torch.randn(n, 5, 3, 4), torch.randn(5)

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(Shared(), inputs(3), dynamic_shapes=(batch, {}))
    for n in (1, 5, 7):
        given = inputs(n)
        check(dict(enumerate(program.module()(*given))), doubles(dict(enumerate(Shared()(*given)))))


def test_rigid_rectangles_at_any_size():
    """The longer side is found when the program runs, not when it is exported."""

    class Rigid(nn.Module):
        def forward(self, x, rectangle):
            return tuple(attnkern.window_attention(x, rectangle, aspect=True))

    def inputs(size):
        return tuple(make("window_attention", 2, size=size, dtype=torch.float32).values())

    sizes = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    program = exported(Rigid(), inputs((4, 6)), (sizes, {}))
    for size in ((4, 6), (7, 3)):
        given = inputs(size)
        check(dict(enumerate(program.module()(*given))), doubles(dict(enumerate(Rigid()(*given)))))


# --- other runtimes --------------------------------------------------------------------------------------------------

BATCH_AND_SIZE = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def test_onnx(tmp_path):
    """Modules of all three mechanisms in onnxruntime, at another batch and map size than they were exported with."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module = Everything()
    program = exported(module, (torch.randn(2, 6, 8, 9),), ({key: BATCH_AND_SIZE[key] for key in BATCH_AND_SIZE},))
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "module.onnx")
    session = runtime.InferenceSession(tmp_path / "module.onnx")
    for shape in ((2, 6, 8, 9), (5, 6, 11, 7)):
        x = torch.randn(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-5, atol=1e-5)


def test_aotinductor(tmp_path):
    """A package holds the operators themselves and runs from Python."""
    torch.manual_seed(0)
    module = Everything().eval()
    x = torch.randn(2, 6, 8, 9)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(module, (x,), dynamic_shapes=dynamic)
    assert "attnkern" in namespaces(program)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "module.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for n in (2, 5):
        x = torch.randn(n, 6, 8, 9)
        torch.testing.assert_close(packaged(x), module(x), rtol=1e-5, atol=1e-5)
