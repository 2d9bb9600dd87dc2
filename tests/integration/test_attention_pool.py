"""attnkern.nn.AttentionPool against multi-head attention that computes keys and values."""

import copy
import io

import pytest
import torch
from test_nn import TO_A_LAYER
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnkern
from attnkern import _backend
from attnkern import nn as ann
from attnkern.nn._folded import pays

CPU = torch.device("cpu")
BACKENDS = [name for name in _backend.NAMES if _backend.reason(name, CPU, torch.float32) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

N, C, H, W = 3, 24, 4, 5

#: Options of AttentionPool. The last two have more queries than folding pays for.
OPTIONS = {
    "one": {"num_heads": 4},
    "three": {"num_queries": 3, "num_heads": 2},
    "one head": {"num_queries": 2, "num_heads": 1},
    "channels": {"num_queries": 2, "num_heads": 4, "attention_channels": 16, "out_channels": 7, "query_channels": 5},
    "no bias": {"num_heads": 4, "bias": False},
    "plain": {"num_heads": 4, "project": False, "attention_channels": 12},
    "positions": {"num_heads": 4, "positions": H * W},
    "given": {"num_queries": 2, "num_heads": 4, "learned": False, "query_channels": 9},
    "many": {"num_queries": 16, "num_heads": 4},
    "many given": {"num_queries": 9, "num_heads": 2, "learned": False, "positions": H * W},
}
every_option = pytest.mark.parametrize("name", OPTIONS)


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    module = ann.AttentionPool(C, **OPTIONS[name])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module.to(dtype)


def inputs(module, dtype=torch.float64, size=(H, W)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, C, *size, generator=generator, dtype=torch.float64)
    tensors = [x]
    if module.queries is None:
        shape = (N, module.num_queries, module.query_channels)
        tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def literal(module, x, query=None, mask=None):
    """Keys and values of every position, one head after the other: (output, map)."""
    tokens = x.flatten(2).mT
    if module.position is not None:
        tokens = tokens + module.position
    q = module.query(module.queries.expand(len(x), -1, -1) if query is None else query)
    k, v = module.key(tokens), module.value(tokens)
    heads, maps = [], []
    for qh, kh, vh in zip(*(each.chunk(module.num_heads, 2) for each in (q, k, v)), strict=True):
        scores = qh @ kh.mT / qh.shape[2] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.flatten(1)[:, None], -torch.inf)
        maps.append(scores.softmax(2))
        heads.append(maps[-1] @ vh)
    map = torch.stack(maps, 2).flatten(1, 2).unflatten(2, x.shape[2:])
    return module.out(torch.cat(heads, 2)), map


def with_gradients(module, outputs, tensors):
    generator = torch.Generator().manual_seed(2)
    weights = (torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs)
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(total, [*tensors, *module.parameters()])]


def assert_alike(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, **tolerance)


@every_option
@every_backend
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_equals_attention_with_keys_and_values(name, backend, masked, hooked):
    """Outputs, maps and all gradients, also where a hook makes the module compute map and product separately."""
    dtype = torch.float64 if _backend.reason(backend, CPU, torch.float64) is None else torch.float32
    module, reference = build(name, dtype), build(name)
    mask = torch.rand(N, H, W, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    if hooked:
        module.map.register_forward_hook(lambda *_: None)
    tensors, wide = inputs(module, dtype), inputs(reference)
    query = tensors[1] if len(tensors) > 1 else None
    with attnkern.use_backend(backend):
        found = with_gradients(module, module(tensors[0], query, mask, return_map=True), tensors)
        alone = module(tensors[0], query, mask)
    expected = with_gradients(reference, literal(reference, *wide, mask=mask), wide)
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    assert_alike([alone, *found], [expected[0], *expected], **tolerance)


@pytest.mark.parametrize("name", ["three", "many"])
def test_tokens_layouts_and_queries_for_the_batch(name):
    module = build(name)
    (x,) = inputs(module)
    expected, map = module(x, return_map=True)
    for each in (x.contiguous(memory_format=torch.channels_last), x.flatten(2), x.flatten(2).mT.contiguous().mT):
        output, found = module(each, return_map=True)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(found, map.flatten(2) if each.dim() == 3 else map)
    given = build("given")
    x, query = inputs(given)
    torch.testing.assert_close(given(x, query[0]), given(x, query[:1].expand(N, -1, -1)))


@every_backend
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ["three", "many"])
def test_an_image_without_positions_gives_the_bias_of_the_output(name, hooked, backend):
    """Its weights are 0, and with them the share of the value's bias. NaN outside the mask reaches nothing."""
    module = build(name, torch.float32)
    (x,) = inputs(module, torch.float32)
    if hooked:
        module.map.register_forward_hook(lambda *_: None)
    mask = torch.ones(N, H, W, dtype=torch.bool)
    mask[1], mask[2, 0] = False, False
    poisoned = torch.where(mask[:, None], x.detach(), torch.nan).requires_grad_()
    with attnkern.use_backend(backend):
        for return_map in (False, True):
            output = module(poisoned, mask=mask, return_map=return_map)
            output, *map = output if return_map else (output,)
            assert torch.equal(output[1], module.out.bias.expand_as(output[1]))
            assert all(torch.equal(each[1], torch.zeros_like(each[1])) for each in map)
            torch.testing.assert_close(output[[0, 2]], module(x, mask=mask)[[0, 2]])
            grads = torch.autograd.grad(output.sin().sum(), [poisoned, *module.parameters()])
            assert all(grad.isfinite().all() for grad in grads)
            assert not grads[0].masked_select(~mask[:, None]).any()
        shared = module(x, mask=mask[2:])
        torch.testing.assert_close(shared, module(x, mask=mask[2:].expand(N, -1, -1)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("part", ["query", "key", "value", "out"])
@pytest.mark.parametrize("how", TO_A_LAYER)
def test_a_projection_is_called_once_anything_is_done_to_it(how, part):
    torch.manual_seed(0)
    module = ann.AttentionPool(6, 2, 2, attention_channels=6, bias=False).train()
    reference = module
    setattr(module, part, TO_A_LAYER[how](getattr(module, part)) or getattr(module, part))
    x = torch.randn(N, 6, H, W, requires_grad=True)
    leaves = [x, *(each for each in module.parameters() if each.requires_grad and not each.is_meta)]
    for _ in range(2):  # weight norm computes its weight in a call
        found, expected = module(x), literal(reference, x)[0]
        grads = [torch.autograd.grad(output.sin().sum(), leaves) for output in (found, expected)]
        assert_alike([found, *grads[0]], [expected, *grads[1]], rtol=1e-4, atol=1e-5)


class Products(TorchDispatchMode):
    """Records the shapes of what matrix products and SDPA read."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            self.read.append(tuple(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.startswith("many")])
def test_keys_and_values_are_not_computed(name):
    module = build(name)
    tensors = inputs(module)
    assert pays(module.num_queries, module.num_heads, module.attention_channels)
    with torch.no_grad(), Products() as products:
        module(*tensors)
    assert products.read
    assert not [shapes for shapes in products.read if any(H * W in shape or N * H * W in shape for shape in shapes)]


def test_dropout():
    """Weights are dropped with the probability and scaled, the bias of the value with them; hooks see what is used."""
    module = ann.AttentionPool(C, 2, 4, dropout=0.3, project=False).double()
    nn.init.normal_(module.value.bias)
    x = torch.randn(64, C, H, W, dtype=torch.float64)
    seen = []
    plain, map = module.eval()(x, return_map=True)
    module.train()
    module.map.register_forward_hook(lambda _m, _i, map: seen.append(map))
    torch.manual_seed(0)
    output, dropped = module(x, return_map=True)
    assert torch.equal(seen[0], dropped)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.7) < 0.01
    torch.testing.assert_close(dropped[kept], map[kept] / 0.7)
    torch.manual_seed(0)
    assert torch.equal(module(x), output)
    values = module.value(x.flatten(2).mT).unflatten(2, (4, -1))
    expected = torch.einsum("nqhl,nlhd->nqhd", dropped.flatten(2).unflatten(1, (2, 4)), values).flatten(2)
    torch.testing.assert_close(output, expected)
    torch.manual_seed(0)
    mean = torch.stack([module(x) for _ in range(300)]).mean(0)
    torch.testing.assert_close(mean, plain, rtol=0, atol=0.25)
    assert (mean - plain).abs().mean() < 0.03


def test_initial_values():
    torch.manual_seed(0)
    module = ann.AttentionPool(256, 4, 8, positions=49)
    for layer in (module.query, module.value, module.out):
        assert not layer.bias.any()
    assert module.key.bias is None
    assert module.key.weight.abs().max() <= (6 / 512) ** 0.5
    for parameter in (module.queries, module.position):
        assert abs(parameter.std() * 16 - 1) < 0.1
    keys = ["queries", "position", "query.weight", "query.bias", "key.weight", "value.weight", "value.bias"]
    assert list(module.state_dict()) == [*keys, "out.weight", "out.bias"]
    assert "256, 4, 8, learned=True" in repr(module)


@every_option
def test_copies_pickles_and_state_dicts(name):
    module = build(name)
    tensors = inputs(module)
    expected = module(*tensors)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other = ann.AttentionPool(C, **OPTIONS[name]).double()
    other.load_state_dict(module.state_dict())
    for each in (copy.deepcopy(module), torch.load(file, weights_only=False), other):
        assert torch.equal(each(*tensors), expected)


@pytest.mark.parametrize("name, masked", [("channels", True), ("given", False), ("positions", False), ("many", True)])
def test_compiled_and_exported(name, masked):
    module = build(name, torch.float32)
    x, *query = inputs(module, torch.float32)
    arguments = (x, *(query or [None]), torch.rand(N, H, W) < 0.7 if masked else None, True)
    expected = with_gradients(module, module(*arguments), [x, *query])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_alike(with_gradients(module, compiled(*arguments), [x, *query]), expected, rtol=1e-4, atol=1e-5)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = [None if each is None or not isinstance(each, torch.Tensor) else {0: batch} for each in arguments]
    program = torch.export.export(module.eval(), arguments, dynamic_shapes=shapes).module()
    longer = [each.repeat(2, *[1] * (each.dim() - 1)) if isinstance(each, torch.Tensor) else each for each in arguments]
    assert_alike(program(*longer), module(*longer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["three", "given", "many"])
def test_traced(name):
    module = build(name, torch.float32).eval()
    tensors = [tensor.detach() for tensor in inputs(module, torch.float32)]
    traced = torch.jit.trace(module, tuple(tensors))
    others = [torch.randn_like(tensor) for tensor in tensors]
    torch.testing.assert_close(traced(*others), module(*others))


def test_function_transforms():
    module = build("three")
    (x,) = inputs(module)
    state = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(state, x):
        return torch.func.functional_call(module, state, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x.detach())
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_not_above_that_of_attention_with_keys_and_values(dtype):
    """The sums of squared errors over seeds, of outputs and gradients, with a margin for chance."""
    ours, theirs = [], []
    for seed in range(16):
        torch.manual_seed(seed)
        module = ann.AttentionPool(64, 2, 4).to(dtype)
        x = torch.randn(2, 64, 7, 7).to(dtype).requires_grad_()
        wide = copy.deepcopy(module).double()
        x_wide = x.detach().double().requires_grad_()
        exact = with_gradients(wide, literal(wide, x_wide)[:1], [x_wide])
        for errors, output in ((ours, module(x)), (theirs, literal(module, x)[0])):
            found = with_gradients(module, [output], [x])
            errors.append(torch.stack([(a.double() - b).square().sum() for a, b in zip(found, exact, strict=True)]))
    ours, theirs = (torch.stack(errors).sum(0) for errors in (ours, theirs))
    assert (ours <= (1.5 if dtype == torch.float32 else 1.1) ** 2 * theirs).all(), (ours / theirs).sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["three", "many"])
def test_autocast(name, dtype):
    module = build(name, torch.float32)
    (x,) = inputs(module, torch.float32)
    expected, map = module(x, return_map=True)
    with torch.autocast("cpu", dtype):
        output, found = module(x, return_map=True)
    assert (output.dtype, found.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(found, map, rtol=0.05, atol=0.01)
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


ERRORS = {
    "num_heads": (lambda: ann.AttentionPool(10),
                  r"AttentionPool: num_heads must divide attention_channels \(by default channels\), got 8 and 10"),
    "queries": (lambda: ann.AttentionPool(8, 0), r"AttentionPool: num_queries must be at least 1, got 0"),
    "positions": (lambda: ann.AttentionPool(8, positions=0), r"AttentionPool: positions must be at least 1, got 0"),
    "out_channels": (lambda: ann.AttentionPool(8, project=False, out_channels=4),
                     r"must equal attention_channels \(by default channels\) with project=False, got 4 and 8"),
    "dropout": (lambda: ann.AttentionPool(8, dropout=1.0),
                r"AttentionPool: dropout must be at least 0 and less than 1, got 1.0"),
    "channels": (lambda: ann.AttentionPool(8)(torch.ones(1, 4, 2, 2)),
                 r"AttentionPool: x must be \(N, 8, H, W\) or \(N, 8, L\), got shape \(1, 4, 2, 2\)"),
    "other positions": (lambda: ann.AttentionPool(8, positions=5)(torch.ones(1, 8, 2, 2)),
                        r"AttentionPool: x must be features of 5 positions, got shape \(1, 8, 2, 2\)"),
    "learned": (lambda: ann.AttentionPool(8)(torch.ones(1, 8, 2, 2), torch.ones(1, 8)),
                r"AttentionPool: query must be None because the queries are learned, got a query"),
    "no query": (lambda: ann.AttentionPool(8, learned=False)(torch.ones(1, 8, 2, 2)),
                 r"AttentionPool: query must be given with learned=False, got None"),
    "query": (lambda: ann.AttentionPool(8, 2, learned=False)(torch.ones(3, 8, 2, 2), torch.ones(3, 8)),
              r"AttentionPool: query must be \(3, 2, 8\) or \(2, 8\) \(N as x\), got shape \(3, 8\)"),
    "mask": (lambda: ann.AttentionPool(8)(torch.ones(3, 8, 2, 2), mask=torch.ones(3, 4) > 0),
             r"AttentionPool: mask must be \(3, 2, 2\) or \(1, 2, 2\) \(N and positions as x\), got shape \(3, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_torch_fx_records_one_call_and_script_says_why_not():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), ann.AttentionPool(8, 2))
    x = torch.randn(2, 3, 4, 4)
    graph = torch.fx.symbolic_trace(network)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(graph(x), network(x))
    with pytest.raises(RuntimeError, match=r"^AttentionPool: torch.jit.script cannot compile it"):
        torch.jit.script(network)
