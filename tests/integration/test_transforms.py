"""Operator checks, higher derivatives, transforms, compilation and checkpointing of the functions."""

import itertools
from fractions import Fraction

import pytest
import torch
from cases import CASES, FUNCTIONS, MAPS, POOLS, WINDOWS, call, case_id, check, doubles, leaves_of, make, run, same
from conftest import every_case, every_function
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attnkern
from attnkern import _backend, _operators, _ops, _sharding

smooth_case = pytest.mark.parametrize(
    "function, options", [case for case in CASES if "anchor" not in case[0]], ids=case_id
)

SIZE = (3, 4)


def positional(function, tensors, size=SIZE, backend=None, names=None, **options):
    """A function of tensors that returns the differentiable results, and its arguments.

    They are the tensors of these names (default: the differentiable ones); the others, such as a mask, are fixed.
    """
    differentiable, results = FUNCTIONS[function]
    names = names or differentiable

    def f(*values):
        given = tensors | dict(zip(names, values, strict=True))
        found = call(function, given, size=size, backend=backend, **options)
        return tuple(found[name] for name in results)

    return f, tuple(tensors[name] for name in names)


# --- operators -------------------------------------------------------------------------------------------------------


def operator_calls(device, backend, dtype, layout):
    """Arguments of every operator in the order of its schema, for a forward and a backward call."""
    ops = _ops.BACKENDS[backend]
    w, several = (make(window, 2, 4, SIZE, dtype=dtype, layout=layout, device=device) for window in WINDOWS)
    q = make("anchor_attention", 2, 4, SIZE, dtype=dtype, layout=layout, device=device)
    p, many, masked = (make(pool, 3, 4, SIZE, dtype=dtype, layout=layout, device=device) for pool in POOLS)
    x, rectangle, a, anchors = (*w.values(), *list(q.values())[1:])
    for rescale, ellipse, r in itertools.product((True, False), (False, True), (rectangle, several["rectangle"])):
        window, shape = (6.0, rescale), (False, ellipse)
        map, stats = ops.window_map_fwd(r, *SIZE, *window, *shape)
        yield "window_map_fwd", (r, *SIZE, *window, *shape)
        yield "window_map_bwd", (torch.ones_like(map), r, stats, *window, *shape)
        yield "window_fwd", (x, r, *window, True, *shape)
        for grad_map, need in ((torch.ones_like(map), True), (None, False)):
            yield "window_bwd", (x, grad_map, x, r, stats, *window, True, *shape, need)
    yield "quantize_fwd", (a, anchors, 24)
    values, indices, loss, _, _, residuals = ops.quantize_fwd(a, anchors, 24)
    one = torch.ones_like(loss)
    yield "quantize_bwd", (torch.ones_like(values), one, one, a, anchors, indices, residuals, 24)
    yield "quantize_bwd", (None, None, one, a, anchors, indices, residuals, 1)
    yield "anchor_fwd", (x, a, anchors, True, 24)
    yield "anchor_bwd", (x, None, one, one, x, a, anchors, indices, residuals, True, 24, True)
    yield "anchor_bwd", (x, values, None, None, x, a, anchors, indices, residuals, False, 1, False)
    local, query, mask = p["local"], p["query"], masked["mask"]
    for q, kept in (
        (query, None), (query[0], mask), (many["query"], None), (many["query"][:1], mask[:1]), (masked["query"], mask),
    ):  # fmt: skip
        pooled, attention, scores, pooled_wide = ops.pool_fwd(local, q, kept)
        wide = pooled if pooled_wide.shape != pooled.shape else pooled_wide
        yield "pool_fwd", (local, q, kept)
        yield "pool_bwd", (pooled, attention, scores, local, q, kept, attention, wide, True)
        yield "pool_bwd", (pooled, None, None, local, q, kept, attention, wide, False)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float64, "contiguous"), (torch.float32, "channels_last"), (torch.bfloat16, "contiguous")],
    ids=case_id,
)
def test_opcheck(dtype, layout, backend, device):
    """Schema, autograd registration, fake kernel (shapes, dtypes, strides) and AOT dispatch of every operator."""
    checked = set()
    for name, arguments in operator_calls(device, backend, dtype, layout):
        torch.library.opcheck(getattr(_ops.BACKENDS[backend], name), arguments)
        checked.add(name)
    assert checked == set(_ops.SCHEMAS)


class Recorder(TorchDispatchMode):
    """Records the names of attnkern's operators that run, also in backward passes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __enter__(self):
        # On a GPU backward runs in another thread, where the mode is not active.
        self.one_thread = torch.autograd.set_multithreading_enabled(False)
        self.one_thread.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.one_thread.__exit__(*error)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace.startswith("attnkern"):
            self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


NAMESPACE = {"native": "attnkern", "triton": "attnkern_triton"}


def operators(function, backend):
    """The forward and the backward operator of a function."""
    if backend == "reference":
        return []
    groups = {WINDOWS: "window", MAPS: "window_map", POOLS: "pool"}
    groups |= {("anchor_quantize",): "quantize", ("anchor_attention",): "anchor"}
    (stem,) = (stem for functions, stem in groups.items() if function in functions)
    return [f"{NAMESPACE[backend]}::{stem}_{pass_}" for pass_ in ("fwd", "bwd")]


# --- choice ----------------------------------------------------------------------------------------------------------


@every_function
def test_argument_before_use_backend_before_environment(function, backend, device, monkeypatch):
    """The argument overrides use_backend, which overrides the environment; only that backend's operators run."""
    tensors = make(function, dtype=torch.float32, device=device)
    other = "reference" if backend != "reference" else _backend.choose(None, next(iter(tensors.values())))

    def ran(**options):
        with Recorder() as recorder:
            run(function, tensors, size=SIZE, **options)
        return recorder.names

    monkeypatch.setattr(_backend, "_current", other)  # as ATTNKERN_BACKEND does at import
    assert ran() == operators(function, other)
    assert ran(backend=backend) == operators(function, backend)
    with attnkern.use_backend(backend):
        assert ran() == operators(function, backend)
        assert ran(backend=other) == operators(function, other)
        with attnkern.use_backend(None):
            assert ran() == operators(function, _backend.choose(None, next(iter(tensors.values()))))
        assert ran() == operators(function, backend)
    assert _backend.current() == other
    attnkern.use_backend(backend)  # stays in effect outside a with block
    assert ran() == operators(function, backend)


def test_use_backend_again_and_later():
    """An object that is entered twice, or later than it was made, restores the previous choice after each block."""
    attnkern.use_backend("reference")
    again = attnkern.use_backend("native")
    with again:
        with attnkern.use_backend("triton"), again:
            assert _backend.current() == "native"
        with again:
            assert _backend.current() == "native"
        assert _backend.current() == "native"
    assert _backend.current() == "reference"
    with again:
        assert _backend.current() == "native"
    assert _backend.current() == "reference"


@every_function
def test_only_what_depends_on_an_input_requires_grad(function, backend, device):
    depends = {
        "x": {"output"}, "local": {"pooled", "attention", "scores"}, "query": {"pooled", "attention", "scores"},
        "rectangle": {"output", "map"}, "a": {"output", "values", "commitment_loss"}, "anchors": {"anchor_loss"},
    }  # fmt: skip
    tensors = make(function, dtype=torch.float32, device=device)
    for name in FUNCTIONS[function][0]:
        tensors[name].requires_grad_()
        results = call(function, tensors, size=SIZE, backend=backend)
        tensors[name].requires_grad_(False)
        assert {key for key, result in results.items() if result.requires_grad} == depends[name] & results.keys()


@every_function
def test_backward_uses_the_backend_of_its_forward(function, backend, device):
    f, values = positional(function, make(function, dtype=torch.float32, device=device))
    leaves = [value.requires_grad_() for value in values]
    with attnkern.use_backend(backend):
        results = f(*leaves)
    with Recorder() as recorder, attnkern.use_backend("reference"):
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    assert recorder.names == operators(function, backend)[1:]


@pytest.mark.kernels
@every_function
def test_backward_twice_and_after_a_change(function, backend, device):
    """A second backward pass gives the same gradients, and an error if an input was changed in between."""
    f, values = positional(function, make(function, dtype=torch.float32, device=device), backend=backend)
    leaves = [value.requires_grad_() for value in values]
    results = f(*leaves)
    total = sum(result.double().square().sum() for result in results)
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaves)


@every_function
def test_inference_and_autocast_change_nothing(function, backend, device):
    """Under autocast maps and losses stay float32 or float64, and features keep their dtype."""
    tensors = make(function, dtype=torch.float32, device=device)
    options = {"size": SIZE, "backend": backend}
    plain = call(function, tensors, **options)
    with torch.inference_mode():
        same(call(function, tensors, **options), plain)
    with torch.autocast(device.type, torch.bfloat16):
        same(call(function, tensors, **options), plain)
        check(run(function, tensors, **options), doubles(run(function, tensors, **options)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=case_id)
@every_function
def test_companions_made_by_autocast(function, half, backend, device):
    """Half-precision tensors from a layer under autocast are accepted with float32 features."""
    tensors = make(function, dtype=torch.float32, device=device)
    rest = FUNCTIONS[function][0][1:]
    tensors |= {name: tensors[name].to(half) for name in rest}
    wide = tensors | {name: tensors[name].float() for name in rest}
    with torch.autocast(device.type, half):
        found = run(function, tensors, size=SIZE, backend=backend)
    expected = run(function, wide, size=SIZE, backend=backend)
    assert all(found[f"grad_{name}"].dtype == half for name in rest)
    check(found, expected)
    if rest:
        with pytest.raises(TypeError, match=f"{rest[0]} must be float32"):
            call(function, tensors, size=SIZE, backend=backend)


def test_numpy_numbers_are_numbers(backend, device):
    numpy = pytest.importorskip("numpy")
    rectangle = make("window_map", device=device, dtype=torch.float32)["rectangle"]
    found = attnkern.window_map(rectangle, (numpy.int64(3), numpy.int32(4)), scale=numpy.float32(5), backend=backend)
    assert torch.equal(found, attnkern.window_map(rectangle, (3, 4), scale=5, backend=backend))
    found = attnkern.window_map(rectangle, (numpy.uint8(20), numpy.int8(100)), scale=Fraction(5), backend=backend)
    assert torch.equal(found, attnkern.window_map(rectangle, (20, 100), scale=5, backend=backend)), "no overflow"


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64], ids=case_id)
@smooth_case
def test_gradcheck(function, options, dtype, backend, device):
    """First and second derivatives against finite differences, for all results at once."""
    tensors = make(function, 2, 2, (2, 3), dtype=dtype, device=device)
    f, values = positional(function, tensors, (2, 3), backend=backend, **options)
    leaves = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("dtype", [torch.float64], ids=case_id)
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_gradcheck_where_quantization_is_smooth(function, dtype, backend, device):
    """Without straight-through gradients: the commitment loss by a, the anchor loss by the anchors, the output by x."""
    tensors = make(function, 2, 3, SIZE, dtype=dtype, device=device)
    pairs = [("a", "commitment_loss"), ("anchors", "anchor_loss")] + [("x", "output")] * (
        function == "anchor_attention"
    )
    for name, result in pairs:

        def f(value, name=name, result=result):
            return call(function, tensors | {name: value}, backend=backend, reduction="batchmean")[result]

        leaf = tensors[name].clone().requires_grad_()
        assert torch.autograd.gradcheck(f, leaf)
        assert torch.autograd.gradgradcheck(f, leaf)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@every_case
def test_create_graph_is_the_reference(function, options, dtype, backend, device):
    """With create_graph the backward pass uses the reference, also if one input depends on another."""

    def penalty(backend, dtype):
        tensors = make(function, 2, 3, SIZE, dtype=dtype, device=device)
        f, values = positional(function, tensors, backend=backend, **options)
        leaves = [value.requires_grad_() for value in values]
        first = leaves[0]
        # The other inputs depend on the first, like a rectangle computed from the features.
        chained = [first, *(value * (1 + 0.1 * first.mean()) for value in leaves[1:])]
        total = sum((result.sin()).sum() for result in f(*chained))
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, allow_unused=True)
        return dict(enumerate([*(g.detach() for g in gradients), *second]))

    check(penalty(backend, dtype), penalty("reference", torch.float64))


def test_create_graph_through_a_part_of_a_tensor(backend, device):
    """The rectangle itself is saved, not a contiguous copy of it."""

    def second(backend):
        whole = torch.full((2, 7), 0.5, dtype=torch.float64, device=device, requires_grad=True)
        map = attnkern.window_map(whole[:, 1:6], (4, 5), backend=backend)
        (first,) = torch.autograd.grad(map[:, 0].sum(), whole, create_graph=True)
        return {"grad": torch.autograd.grad(first.square().sum(), whole)[0]}

    check(second(backend), second("reference"))


@pytest.mark.kernels
@every_function
def test_tangents_of_incoming_gradients_pass_through(function, backend, device):
    """Forward over reverse mode with a tangent for the output gradient only."""

    def tangents(backend):
        f, values = positional(function, make(function, 2, 3, SIZE, device=device), backend=backend)
        leaves = [value.requires_grad_() for value in values]
        results = f(*leaves)
        with torch.autograd.forward_ad.dual_level():
            grads = [torch.autograd.forward_ad.make_dual(torch.ones_like(r), r.detach().cos()) for r in results]
            found = torch.autograd.grad(results, leaves, grads)
            return dict(enumerate(torch.autograd.forward_ad.unpack_dual(grad).tangent for grad in found))

    found = tangents(backend)
    assert all(tangent is not None for tangent in found.values())
    check(found, tangents("reference"))


@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_what_no_gradient_reaches_has_none(function, backend, device):
    """An optimizer with weight decay would otherwise move anchors that no loss depends on."""
    _, results = FUNCTIONS[function]
    for used in results:
        tensors = {k: v.requires_grad_() for k, v in make(function, 2, 3, SIZE, device=device).items()}
        found = call(function, tensors, backend=backend)
        grads = torch.autograd.grad(found[used].sum(), list(tensors.values()), allow_unused=True)
        missing = {name for name, grad in zip(tensors, grads, strict=True) if grad is None}
        expected = set() if used == "anchor_loss" else {"anchors"}
        expected |= {"a"} if used == "anchor_loss" else set()
        expected |= {"x"} & tensors.keys() if used != "output" else set()
        assert missing == expected, used


# --- functorch and forward mode --------------------------------------------------------------------------------------


@every_function
def test_func_grad_and_vmap(function, backend, device):
    """Per-sample gradients by vmap(grad) equal those of a loop of backward passes."""
    names, _ = FUNCTIONS[function]
    samples = [make(function, 3, 3, SIZE, device=device, seed=seed) for seed in range(3)]
    backend = None if backend == "triton" else backend  # Triton does not take float64

    def loss(*values):
        found = call(function, dict(zip(samples[0], values, strict=True)), size=SIZE, backend=backend)
        return sum(found[name].sin().sum() for name in FUNCTIONS[function][1])

    stacked = [torch.stack([sample[name] for sample in samples]) for name in samples[0]]
    every = tuple(range(len(names)))
    batched = torch.func.vmap(torch.func.grad(loss, argnums=every))(*stacked)
    for i, sample in enumerate(samples):
        leaves = leaves_of(sample)
        want = torch.autograd.grad(loss(*leaves.values()), [leaves[name] for name in names])
        check(dict(enumerate(g[i] for g in batched)), dict(enumerate(want)))


@every_function
def test_forward_mode_is_the_transpose_of_backward(function, backend, device):
    """⟨u, J·t⟩ = ⟨Jᵀu, t⟩ for torch.func.jvp and for dual tensors, which agree bitwise."""
    backend = None if backend == "triton" else backend
    f, values = positional(function, make(function, 2, 3, SIZE, device=device), backend=backend)
    tangents = tuple(torch.randn_like(value) for value in values)
    results, pushed = torch.func.jvp(f, values, tangents)
    with torch.autograd.forward_ad.dual_level():
        duals = f(*map(torch.autograd.forward_ad.make_dual, values, tangents))
        for dual, tangent in zip(duals, pushed, strict=True):
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
        one_plain = f(*values)  # no dual tensor among the arguments: the kernels run
    assert not any(result.isnan().any() for result in one_plain)
    leaves = [value.requires_grad_() for value in values]
    u = [torch.randn_like(result) for result in results]
    pulled = torch.autograd.grad(f(*leaves), leaves, u)
    forward = sum((a * b).sum() for a, b in zip(u, pushed, strict=True))
    backward = sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True))
    torch.testing.assert_close(forward, backward)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "context_fn"])
@every_function
def test_checkpoint(function, how, backend, device):
    """Recomputation runs on the backend of the first pass, set by the argument or by a context."""
    tensors = make(function, dtype=torch.float32, device=device)
    f, values = positional(function, tensors, backend=backend if how == "argument" else None)
    leaves = [value.requires_grad_() for value in values]
    contexts = {"context_fn": lambda: (attnkern.use_backend(backend), attnkern.use_backend(backend))}
    options = {} if how == "argument" else contexts
    with Recorder() as recorder:
        results = checkpoint(f, *leaves, use_reentrant=False, **options)
        found = torch.autograd.grad(sum(r.sin().sum() for r in results), leaves)
    forward_then_both = [*operators(function, backend)[:1], *operators(function, backend)]
    assert recorder.names == forward_then_both
    assert _backend.current() is None
    with attnkern.use_backend(backend):
        want = torch.autograd.grad(sum(r.sin().sum() for r in f(*leaves)), leaves)
    torch.testing.assert_close(found, want)


# --- compilation -----------------------------------------------------------------------------------------------------


class Counter:
    """A compiler that compiles nothing, but counts graphs and records their operators."""

    def __init__(self):
        self.graphs, self.names = 0, []
        self.compiler = aot_autograd(fw_compiler=self.note, bw_compiler=self.note)

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return self.compiler(graph, example_inputs)

    def note(self, graph, example_inputs):
        targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        self.names += [target.name() for target in targets if target.namespace.startswith("attnkern")]
        return make_boxed_func(graph.forward)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(compiled, plain, values):
    """Results and gradients of a compiled function are those of the plain one."""

    def both(g):
        leaves = [value.detach().requires_grad_(value.is_floating_point()) for value in values]
        results = g(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(sum(result.sin().sum() for result in results), wanted)
        return dict(enumerate([*(result.detach() for result in results), *gradients]))

    found, expected = both(compiled), both(plain)
    check(found, doubles(expected))


@pytest.mark.usefixtures("fresh_compiler")
@every_case
def test_one_graph_with_both_operators(function, options, backend, device):
    """No graph break, and the graph has the operators of the chosen backend."""
    f, values = positional(function, make(function, dtype=torch.float32, device=device), backend=backend, **options)
    counter = Counter()
    compare(torch.compile(f, backend=counter, fullgraph=True), f, values)
    assert counter.graphs == 1
    assert counter.names == operators(function, backend)


@pytest.mark.usefixtures("fresh_compiler")
@every_function
def test_dynamic_shapes_do_not_recompile(function, backend, device):
    """One graph for every batch and every map size."""
    counter = Counter()
    names = list(make(function))

    def f(size, *values):
        return positional(function, dict(zip(names, values, strict=True)), size, backend, names)[0](*values)

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    for n, size in ((2, (4, 6)), (3, (4, 6)), (5, (7, 9)), (4, (9, 5))):
        values = tuple(make(function, n, 3, size, dtype=torch.float32, device=device).values())
        compare(lambda *v, size=size: compiled(size, *v), lambda *v, size=size: f(size, *v), values)
        if n == 2:
            first = counter.graphs  # PyTorch recompiles once for a float argument
    assert counter.graphs == first


@pytest.mark.usefixtures("fresh_compiler")
@every_function
def test_automatic_choice_adds_no_guard(function, device):
    """Without a backend, native runs if it is built, and new batch sizes add at most one dynamic graph."""
    counter = Counter()
    tensors = make(function, dtype=torch.float32, device=device)
    f, _ = positional(function, tensors, names=list(tensors))
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for n in (2, 3, 4, 5):
        compare(compiled, f, tuple(make(function, n, dtype=torch.float32, device=device).values()))
    assert counter.graphs <= 2
    chosen = _backend.choose(None, next(iter(tensors.values())))
    assert counter.names == operators(function, chosen) * counter.graphs


@pytest.mark.usefixtures("fresh_compiler")
def test_use_backend_recompiles(device):
    """Compiled code follows a change of the process-wide backend."""
    counter = Counter()
    f, values = positional("compatibility_pool", make("compatibility_pool", dtype=torch.float32, device=device))
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for name in ("reference", None, "reference"):
        with attnkern.use_backend(name):
            compare(compiled, f, values)
    assert counter.names == operators("compatibility_pool", _backend.choose(None, values[0]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.large
@every_function
def test_inductor(function, backend, device):
    """The default compiler, forward and backward, in channels_last."""
    tensors = make(function, 2, 8, SIZE, dtype=torch.float32, layout="channels_last", device=device)
    f, values = positional(function, tensors, backend=backend)
    compare(torch.compile(f, fullgraph=True), f, values)


@every_function
def test_export(function, backend, device):
    """An exported program holds the operators and gives the same numbers at another batch size."""

    names = list(make(function))

    class Module(torch.nn.Module):
        def forward(self, *values):
            return positional(function, dict(zip(names, values, strict=True)), backend=backend, names=names)[0](*values)

    def inputs(n):
        return tuple(make(function, n, dtype=torch.float32, device=device).values())

    batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = (tuple({} if name == "anchors" else {0: batch} for name in names),)
    exported = torch.export.export(Module(), inputs(3), dynamic_shapes=dynamic)
    targets = [node.target for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    held = [target.name() for target in targets if target.namespace.startswith("attnkern")]
    assert held == operators(function, backend)[:1]
    check(dict(enumerate(exported.module()(*inputs(5)))), doubles(dict(enumerate(Module()(*inputs(5))))))


# --- many queries and masks ------------------------------------------------------------------------------------------


def queries_and_mask(n, m, size, c=5, **options):
    """local, query and mask as arguments by position."""
    tensors = make("compatibility_pool_masked", n, c, size, **options)
    query = torch.randn(n, m, c, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    return tensors["local"], query.to(tensors["local"]), tensors["mask"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("masked", [False, True])
def test_any_number_of_queries_is_one_graph(masked, backend, device):
    """Dynamic numbers of queries, images and positions."""
    counter = Counter()

    def f(local, query, mask):
        return tuple(attnkern.compatibility_pool(local, query, mask=mask, backend=backend))

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    for n, m, size in ((2, 3, (4, 6)), (3, 5, (4, 6)), (4, 2, (7, 5)), (3, 16, (5, 9))):
        local, query, mask = queries_and_mask(n, m, size, dtype=torch.float32, device=device)
        mask = mask if masked else None
        compare(lambda *v, mask=mask: compiled(*v, mask), lambda *v, mask=mask: f(*v, mask), (local, query))
    assert counter.graphs == 1


@pytest.mark.parametrize("argument", range(3))
def test_vmap_over_features_queries_or_masks(argument, device):
    """Over one argument and over all; the gradient within."""
    sets = [queries_and_mask(2, 3, SIZE, device=device, seed=seed) for seed in range(3)]
    sets = [(*tensors[:2], tensors[2] ^ (torch.arange(4, device=device) == i)) for i, tensors in enumerate(sets)]

    def f(local, query, mask):
        return tuple(attnkern.compatibility_pool(local, query, mask=mask))

    def total(*tensors):
        return sum(result.sin().sum() for result in f(*tensors))

    for over in ({argument}, {0, 1, 2}):
        given = [torch.stack(values) if i in over else values[0] for i, values in enumerate(zip(*sets, strict=True))]
        dims = tuple(0 if i in over else None for i in range(3))
        found = torch.func.vmap(f, dims)(*given), torch.func.vmap(torch.func.grad(total, (0, 1)), dims)(*given)
        for k in range(3):
            alone = [sets[k][i] if i in over else sets[0][i] for i in range(3)]
            for got, want in zip(found, (f(*alone), torch.func.grad(total, (0, 1))(*alone)), strict=True):
                check(dict(enumerate(g[k] for g in got)), dict(enumerate(want)))


def test_make_fx_and_saved_tensor_hooks(backend, device):
    """The operators are recorded, and backward works with copies of what was saved."""
    from torch.fx.experimental.proxy_tensor import make_fx

    local, query, mask = queries_and_mask(2, 3, SIZE, dtype=torch.float32, device=device)

    def gradients(local, query, mask):
        leaves = local.detach().requires_grad_(), query.detach().requires_grad_()
        results = attnkern.compatibility_pool(*leaves, mask=mask, backend=backend)
        return torch.autograd.grad(sum(result.sin().sum() for result in results), leaves)

    wanted = dict(enumerate(gradients(local, query, mask)))
    graph = make_fx(gradients)(local, query, mask)
    targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    held = [target.name() for target in targets if target.namespace.startswith("attnkern")]
    assert held == operators("compatibility_pool", backend)
    check(dict(enumerate(graph(local, query, mask))), doubles(wanted))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().numpy().copy(), torch.from_numpy):
        check(dict(enumerate(gradients(local, query, mask))), doubles(wanted))


@pytest.mark.parametrize("decomposed", [False, True])
def test_export_for_any_number_of_queries(decomposed, device):
    """Of images and of positions as well."""

    class Module(torch.nn.Module):
        def forward(self, local, query, mask):
            return tuple(attnkern.compatibility_pool(local, query, mask=mask))

    n, m, h, w = (torch.export.Dim(name, min=2, max=64) for name in "nmhw")
    dynamic = ({0: n, 2: h, 3: w}, {0: n, 1: m}, {0: n, 1: h, 2: w})
    program = torch.export.export(
        Module(), queries_and_mask(3, 4, (4, 6), dtype=torch.float32, device=device), dynamic_shapes=dynamic
    )
    if decomposed:
        program = program.run_decompositions(attnkern.decompositions())
    for n, m, size in ((3, 4, (4, 6)), (5, 7, (6, 3)), (2, 3, (9, 8))):
        given = queries_and_mask(n, m, size, dtype=torch.float32, device=device)
        check(dict(enumerate(program.module()(*given))), doubles(dict(enumerate(Module()(*given)))))


# --- records of the operators ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fake": lambda local: local}, r"pool_fwd: the arguments of its fake are \['local'\], those of its schema"),
        ({"decomposition": lambda query, local: local}, "pool_fwd: the arguments of its decomposition are"),
        ({"features": ("x",)}, r"pool_fwd: its features name arguments that the schema does not have: \['x'\]"),
    ],
    ids=["fake", "decomposition", "features"],
)
def test_a_record_that_does_not_fit_its_schema(change, message):
    with pytest.raises(ImportError, match=message):
        _operators.check_record("pool_fwd", _operators.OPERATORS["pool_fwd"]._replace(**change))


@pytest.mark.parametrize("rule", ["0 0 -> 0 0 0 0", "0 0 0 -> 0 0"])
def test_a_sharding_rule_that_does_not_fit_its_operator(rule):
    arguments = torch.randn(2, 3, 4, 4), torch.randn(2, 3), None
    with pytest.raises(ValueError, match=f"the sharding rule '{rule}' must have 3 arguments and 4 results"):
        _sharding._strategies(torch.ops.attnkern.pool_fwd.default, lambda *_: (rule,), arguments)
