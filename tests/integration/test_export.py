"""Exported programs: decompositions to ATen, ONNX in onnxruntime, AOTInductor, TorchScript, torch.fx."""

import io
import pickle
import warnings

import pytest
import torch
import torch.fx
from cases import call, case_id, check, doubles, make, nearest, same
from conftest import every_function
from test_nn import MODULES, build, inputs
from test_nn import run as run_module
from test_transforms import operator_calls
from torch import nn

import attnkern
import attnkern.compat
import attnkern.nn as ann
from attnkern import _ops, reference
from attnkern._operators import OPERATORS


class Function(nn.Module):
    """A function as a module that returns its results."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        named = dict(zip(make(self.function), tensors, strict=True))
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
        found = OPERATORS[name].decomposition(*arguments)
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
        found = dict(enumerate(OPERATORS["quantize_fwd"].decomposition(a, anchors, 1)[:2]))
        same(found, dict(enumerate(_ops.BACKENDS["native"].quantize_fwd(a, anchors, 1)[:2])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=case_id)
def test_nearest_anchors_by_distances_are_exact(dtype):
    """Also if distances round to a tie or overflow."""
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
        found = reference.nearest_by_distance(a, anchors)
        assert found.tolist() == [nearest(element, anchors.tolist()) for element in a.tolist()]


@every_function
def test_a_decomposed_program_is_plain_aten(function):
    """At any batch size and, with features, any map size."""
    sizes = {0: torch.export.Dim("batch", min=2, max=64)}
    if function != "window_map":
        sizes |= {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    names = list(make(function))
    dynamic = {
        "x": sizes,
        "a": sizes,
        "local": sizes,
        "anchors": {},
        "query": {0: sizes[0]},
        "rectangle": {0: sizes[0]},
        "mask": {axis - (axis > 0): size for axis, size in sizes.items()},
    }

    def inputs(n, size):
        return tuple(make(function, n, size=size, dtype=torch.float32).values())

    program = exported(
        Function(function), inputs(3, (4, 6)), (tuple(dynamic.get(name, {0: sizes[0]}) for name in names),)
    )
    assert namespaces(program) == {"aten"}
    given = inputs(5, (7, 3))
    check(dict(enumerate(program.module()(*given))), doubles(dict(enumerate(Function(function)(*given)))))


def test_a_shared_query_ties_the_batch_to_nothing():
    """Also at N = C, because the number of axes tells whether the query is shared."""

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
    """The longer side is determined when the program runs, not when it is exported."""

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


class Attended(Everything):
    """Every result of the bottleneck, losses and anchors included."""

    def forward(self, x):
        attended = self.bottleneck(self.window(x))
        return (*attended, self.pool(attended.output, self.query(x.mean((2, 3)))))


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_in_one_step(dynamo, tmp_path):
    """Both exporters export the model itself, which runs at other batch and map sizes."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module, path = Attended().eval(), tmp_path / "module.onnx"
    sizes = {"dynamic_shapes": (BATCH_AND_SIZE,)} if dynamo else {"dynamic_axes": {"x": [0, 2, 3]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about its older exporter
        torch.onnx.export(
            module, (torch.randn(2, 6, 8, 9),), path, input_names=["x"], dynamo=dynamo, verbose=False, **sizes
        )
    session = runtime.InferenceSession(path)
    for shape in ((2, 6, 8, 9), (5, 6, 11, 7)):
        x = torch.randn(shape)
        for found, wanted in zip(session.run(None, {"x": x.numpy()}), module(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_of_many_queries(dynamo, masked, tmp_path):
    """At another number of images, queries and positions; NaN at masked positions reaches the scores alone."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Pool(nn.Module):
        def forward(self, local, query, mask=None):
            return tuple(attnkern.compatibility_pool(local, query, mask=mask))

    def inputs(n, m, size):
        tensors = make("compatibility_pool_masked", n, 5, size, dtype=torch.float32)
        given = {"local": tensors["local"], "query": torch.randn(n, m, 5)}
        return given | {"mask": tensors["mask"]} if masked else given

    axes = {"local": {0: "n", 2: "h", 3: "w"}, "query": {0: "n", 1: "m"}, "mask": {0: "n", 1: "h", 2: "w"}}
    example, path = inputs(3, 4, (4, 6)), tmp_path / "module.onnx"
    free = [dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in example]
    sizes = {"dynamic_shapes": tuple(free)} if dynamo else {"dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Pool(), tuple(example.values()), path, input_names=list(example), dynamo=dynamo, verbose=False, **sizes
        )
    session = runtime.InferenceSession(path)
    for n, m, size in ((3, 4, (4, 6)), (5, 7, (6, 3))):
        given = inputs(n, m, size)
        if masked:
            given["local"] = given["local"].masked_fill(~given["mask"][:, None], torch.nan)
        found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        for got, wanted in zip(found, Pool()(**given), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_onnx_of_a_module_with_options(tmp_path):
    """The older exporter passes default arguments as tensors."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, x = ann.ProgressiveAttention(6).eval(), torch.randn(2, 6, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), tmp_path / "module.onnx", input_names=["x"], dynamo=False, verbose=False)
    (found,) = runtime.InferenceSession(tmp_path / "module.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
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


# --- TorchScript -----------------------------------------------------------------------------------------------------


def reloaded(module, example):
    """``module`` traced with an example, saved and loaded: it contains only PyTorch's own operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about TorchScript and comparisons of sizes
        traced = torch.jit.trace(module, example)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds
    return loaded


@pytest.mark.parametrize("name", MODULES)
def test_traced_modules(name):
    """Also at another batch and map size, with correct gradients."""
    module, tensors = build(name).eval(), inputs(name)
    loaded = reloaded(module, tuple(torch.cat([tensor, tensor]).detach() for tensor in tensors))
    tensors[0] = torch.cat([tensors[0], tensors[0].flip(2)], 2).detach().requires_grad_()
    found, expected = run_module(loaded, tensors), run_module(module, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = (
        torch.autograd.grad(sum(out.sin().sum() for out in outputs if out.requires_grad), tensors, allow_unused=True)
        for outputs in (found, expected)
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aspect", [False, True])
def test_traced_maps_of_any_size(aspect):
    """With the size of the features, and with another longer side than in the example."""

    class Map(nn.Module):
        def forward(self, x):
            rectangle = x.mean((2, 3))[:, :5].sigmoid()
            map = attnkern.window_map(rectangle, x.shape[2:], aspect=aspect)
            return map, attnkern.rectangle_corners(rectangle, (x.shape[2], x.shape[3]), aspect=aspect)

    loaded = reloaded(Map(), torch.randn(2, 6, 4, 7))
    for shape in ((2, 6, 4, 7), (3, 6, 9, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), Map()(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_kernels_in_a_trace_are_refused():
    module = ann.WindowAttention(6, (4,))
    message = (
        "^backend: 'native' cannot run torch.float32 on cpu: a TorchScript or ONNX program has only PyTorch's "
        "own operators; torch.export keeps these kernels$"
    )
    with attnkern.use_backend("native"), pytest.raises(ValueError, match=message):
        torch.jit.trace(module, torch.randn(1, 6, 4, 5))


@pytest.mark.parametrize("kind", [*attnkern.compat.__all__, *MODULES])
def test_script_is_refused_in_one_sentence(kind):
    arguments = {"LinearAttentionBlock": (3,), "StraightThroughQuantizer": (5,)}  # others take two numbers
    module = build(kind) if kind in MODULES else getattr(attnkern.compat, kind)(*arguments.get(kind, (1, 4)))
    message = (
        f"^{type(module).__name__}: torch.jit.script cannot compile it: use torch.export.export, .*torch.jit.trace"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(nn.Sequential(nn.ReLU(), module))


# --- torch.fx --------------------------------------------------------------------------------------------------------


class Functions(nn.Module):
    """Functions and modules called in the usual ways."""

    def __init__(self):
        super().__init__()
        self.bottleneck = ann.BottleneckAttention(6, num_anchors=5)
        self.pool = ann.CompatibilityPool(6, 6)

    def forward(self, x):
        rectangle = x.mean((2, 3))[:, :5].sigmoid()
        output, map = attnkern.window_attention(self.bottleneck(x).output, rectangle, scale=5.0)
        map = map + attnkern.window_map(rectangle=rectangle, size=(x.shape[2], x.shape[3]))
        values = attnkern.anchor_quantize(map, rectangle[0]).values
        attended = attnkern.anchor_attention(output, values, anchors=rectangle[0])
        pooled, attention = self.pool(attended.output, return_map=True)
        return attnkern.compatibility_pool(output, pooled).pooled, attention


def test_symbolic_traces_hold_calls_of_ours():
    torch.manual_seed(0)
    module = Functions().eval()
    traced = torch.fx.symbolic_trace(module)
    called = {node.target for node in traced.graph.nodes if node.op in ("call_module", "call_function")}
    names = ("window_map", "window_attention", "anchor_quantize", "anchor_attention", "compatibility_pool")
    assert called >= {"bottleneck", "pool", *(getattr(attnkern, name) for name in names)}
    for copied in (traced, pickle.loads(pickle.dumps(traced))):
        x = torch.randn(3, 6, 5, 4)
        torch.testing.assert_close(copied(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [ann.WindowAttention, ann.PositionwiseAttention, ann.ProgressiveAttention])
def test_features_after_insert(kind):
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
    attnkern.insert(model, "layer2", kind)
    expected = {}
    model.layer2.register_forward_hook(lambda _m, _i, output: expected.update(attention=output))
    model.layer3.register_forward_hook(lambda _m, _i, output: expected.update(layer3=output))
    extract = create_feature_extractor(model, {"layer2.attention": "attention", "layer3": "layer3"})
    found = extract(x)
    model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_fx_cannot_trace_says_so():
    message = r"^WindowAttention: torch.fx can trace a module that contains it, but not the module alone$"
    with pytest.raises(TypeError, match=message):
        torch.fx.symbolic_trace(ann.WindowAttention(6))

    class Rectangle(nn.Module):
        def __init__(self):
            super().__init__()
            self.window = ann.WindowAttention(6)

        def forward(self, x):
            return self.window.rectangle(x)

    message = (
        r"^WindowAttention: torch.fx cannot trace code that reads shapes: use torch.export.export or forward hooks$"
    )
    with pytest.raises(TypeError, match=message):
        torch.fx.symbolic_trace(Rectangle())
