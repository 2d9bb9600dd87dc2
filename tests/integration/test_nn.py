"""The modules agree on every backend, support hooks at their map, and equal their formulas in plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

import attnkern
from attnkern import _backend
from attnkern import nn as ann

CPU = torch.device("cpu")
BACKENDS = [name for name in _backend.NAMES if _backend.reason(name, CPU, torch.float32) is None]
DOUBLES = [name for name in BACKENDS if _backend.reason(name, CPU, torch.float64) is None]

N, C, H, W, G = 3, 6, 5, 4, 7  # batch, channels, map, channels of the query

#: name -> (constructor, has a query)
MODULES = {
    "window": (lambda: ann.WindowAttention(C, hidden=(4, 5)), False),
    "window-plain": (lambda: ann.WindowAttention(C, hidden=(4,), scale=10.0, rescale=False, residual=False), False),
    "windows": (lambda: ann.WindowAttention(C, hidden=(4, 5), num_windows=3), False),
    "ellipses": (lambda: ann.WindowAttention(C, hidden=(4,), num_windows=2, shape="ellipse"), False),
    "positionwise": (lambda: ann.PositionwiseAttention(C, hidden=5, dilation=2), False),
    "quantizer": (lambda: ann.AnchorQuantizer(5), False),
    "bottleneck": (lambda: ann.BottleneckAttention(C), False),
    "bottleneck-anchors": (lambda: ann.BottleneckAttention(C, num_anchors=4), False),
    "pool-parametrised": (lambda: ann.CompatibilityPool(C, C), True),
    "pool-parametrised-query": (lambda: ann.CompatibilityPool(C, G, project="query"), True),
    "pool-parametrised-local": (lambda: ann.CompatibilityPool(C, G, project="local"), True),
    "pool-dot": (lambda: ann.CompatibilityPool(C, C, "dot"), True),
    "pool-dot-query": (lambda: ann.CompatibilityPool(C, G, "dot", project="query"), True),
    "pool-dot-local": (lambda: ann.CompatibilityPool(C, G, "dot", project="local"), True),
    "progressive": (lambda: ann.ProgressiveAttention(C), False),
    "attention": (lambda: ann.AttentionPool(C, 1, 3), False),
    "attention-folded": (lambda: ann.AttentionPool(C, 3, 2, attention_channels=16, out_channels=5), False),
    "attention-plain": (lambda: ann.AttentionPool(C, 2, 1, project=False), False),
    "attention-given": (lambda: ann.AttentionPool(C, 2, 1, learned=False, query_channels=G, bias=False), True),
}
every_module = pytest.mark.parametrize("name", MODULES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def restored_backend():
    with attnkern.use_backend(None):
        yield


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    module = MODULES[name][0]()
    with torch.no_grad():
        for parameter in module.parameters():  # to avoid zeros, ties and symmetry
            parameter += 0.3 * torch.rand_like(parameter)
    return module.to(dtype)


def inputs(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(N, C, H, W, generator=generator, dtype=torch.float64)]
    if MODULES[name][1]:
        module = build(name)
        shape = (N, module.num_queries) if name.startswith("attention") else (N,)
        tensors.append(torch.randn(*shape, module.query_channels, generator=generator, dtype=torch.float64))
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def run(module, tensors):
    """All floating-point outputs of a forward pass, with noise from a fixed seed."""
    torch.manual_seed(2)
    results = module(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    return [result for result in results if result.is_floating_point()]


def scalar(outputs):
    """A loss that gives every element of every output another weight."""
    generator = torch.Generator().manual_seed(3)
    return sum((torch.randn(out.shape, generator=generator, dtype=torch.float64) * out).sum() for out in outputs)


def outputs_and_gradients(name, backend, dtype):
    module, tensors = build(name, dtype), inputs(name, dtype)
    with attnkern.use_backend(backend):
        outputs = run(module, tensors)
        scalar(outputs).backward()
    gradients = [tensor.grad for tensor in (*tensors, *module.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [*outputs, *gradients]


# --- backends --------------------------------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize(
    "backend, dtype, tolerance",
    [*((name, torch.float32, 2e-5) for name in BACKENDS), *((name, torch.float64, 1e-10) for name in DOUBLES)],
)
def test_outputs_and_gradients_equal_the_references(name, backend, dtype, tolerance):
    found, expected = (outputs_and_gradients(name, used, dtype) for used in (backend, "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


@every_module
def test_state_dict_does_not_depend_on_the_backend(name):
    states = []
    for backend in BACKENDS:
        with attnkern.use_backend(backend):
            module = build(name)
            run(module, inputs(name))
            states.append(module.state_dict())
    for state in states:
        assert list(state) == list(states[0])
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][key], rtol=0, atol=0)
    build(name).load_state_dict(states[0])


@every_module
@every_backend
def test_compiles_without_graph_breaks(name, backend):
    if backend == "triton":
        pytest.skip("interpreted kernels read data while tracing")
    module, tensors = build(name).eval(), inputs(name)
    torch._dynamo.reset()
    with attnkern.use_backend(backend):
        expected = run(module, tensors)
        found = run(torch.compile(module, fullgraph=True, backend="aot_eager"), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- the map ---------------------------------------------------------------------------------------------------------


@every_module
@every_backend
def test_hook_on_the_map_sees_the_references_gradient(name, backend):
    gradients = {}
    for used in (backend, "reference"):
        module, tensors = build(name), inputs(name)
        module.map.register_full_backward_hook(lambda _m, _i, out, used=used: gradients.__setitem__(used, out[0]))
        with attnkern.use_backend(used):
            scalar(run(module, tensors)[:1]).backward()
    assert gradients[backend].abs().min() > 0
    torch.testing.assert_close(gradients[backend], gradients["reference"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["window", "positionwise", "bottleneck", "bottleneck-anchors", "progressive"])
@every_backend
def test_gradient_at_the_map_is_the_sum_over_channels(name, backend):
    module, (x,) = build(name), inputs(name)
    seen = []
    module.map.register_full_backward_hook(lambda _m, _i, out: seen.append(out[0]))
    with attnkern.use_backend(backend):
        output = run(module, (x,))[0]
        weight = torch.randn_like(output)
        (output * weight).sum().backward()
    torch.testing.assert_close(seen[0], (weight * x).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pool-parametrised", "pool-dot", "pool-dot-query"])
@every_backend
def test_gradient_at_the_pools_map(name, backend):
    module, (local, query) = build(name), inputs(name)
    seen = []
    module.map.register_full_backward_hook(lambda _m, _i, out: seen.append(out[0]))
    with attnkern.use_backend(backend):
        pooled = module(local, query)
        weight = torch.randn_like(pooled)
        (pooled * weight).sum().backward()
    torch.testing.assert_close(seen[0], torch.einsum("nc,nchw->nhw", weight, local), rtol=1e-5, atol=1e-5)


@every_module
@every_backend
@pytest.mark.parametrize("change", ["hook", "replacement", "method"])
def test_changing_the_map_changes_the_output(name, backend, change):
    module, tensors = build(name), inputs(name)

    class Zero(nn.Module):
        def forward(self, map):
            return map * 0

    with attnkern.use_backend(backend), torch.no_grad():
        before = run(module, tensors)[0]
        if change == "hook":
            handle = module.map.register_forward_hook(lambda _m, _i, map: map * 0)
        elif change == "method":
            module.map.forward = lambda map: map * 0
        else:
            module.map = Zero()
        after = run(module, tensors)[0]
        residual = name in ("window", "windows", "ellipses", "positionwise", "bottleneck", "bottleneck-anchors")
        expected = tensors[0] if residual else torch.zeros_like(before)
        if name.startswith("attention") and isinstance(module.out, nn.Linear) and module.out.bias is not None:
            expected = expected + module.out.bias
        torch.testing.assert_close(after, expected, rtol=0, atol=0)
        assert (before - after).abs().max() > 0.1
        if change == "hook":
            handle.remove()
        elif change == "method":
            del module.map.forward
        else:
            module.map = nn.Identity()
        torch.testing.assert_close(run(module, tensors)[0], before, rtol=0, atol=0)


HOOKS = {
    "forward": lambda map, see: map.register_forward_hook(lambda *_: see()),
    "forward pre": lambda map, see: map.register_forward_pre_hook(lambda *_: see()),
    "backward": lambda map, see: map.register_full_backward_hook(lambda *_: see()),
    "backward pre": lambda map, see: map.register_full_backward_pre_hook(lambda *_: see()),
    "global forward": lambda map, see: torch_module.register_module_forward_hook(
        lambda module, *_: see() if module is map else None
    ),
    "global backward": lambda map, see: torch_module.register_module_full_backward_hook(
        lambda module, *_: see() if module is map else None
    ),
}


@every_module
@pytest.mark.parametrize("kind", HOOKS)
def test_every_kind_of_hook_is_called_and_leaves_the_result_alone(name, kind):
    module, tensors = build(name), inputs(name)
    expected = run(module, tensors)
    calls = []
    handle = HOOKS[kind](module.map, lambda: calls.append(kind))
    try:
        found = run(module, tensors)
        scalar(found[:1]).backward()
    finally:
        handle.remove()
    assert calls == [kind]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_inside_the_bottleneck_are_called():
    module, (x,) = build("bottleneck-anchors"), inputs("bottleneck-anchors")
    expected = run(module, (x,))
    for inner in (module.quantizer, module.quantizer.map):
        calls = []
        handle = inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found = run(module, (x,))
        handle.remove()
        assert calls == [1]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(("bottleneck", "quantizer"))])
def test_return_map(name):
    module, tensors = build(name), inputs(name)
    seen = []
    handle = module.map.register_forward_hook(lambda _m, _i, map: seen.append(map))
    module(*tensors)
    handle.remove()
    output, map = module(*tensors, return_map=True)
    heads = (module.num_queries * module.num_heads,) if name.startswith("attention") else ()
    assert map.shape == (N, *heads, H, W)
    torch.testing.assert_close(map, seen[0])
    torch.testing.assert_close(output, module(*tensors))


# --- shapes, dtypes, layouts -----------------------------------------------------------------------------------------


@every_module
@every_backend
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1)])
def test_smallest_maps_and_a_batch_of_one(name, backend, size):
    module, tensors = build(name), inputs(name)
    tensors = [tensor[:1] for tensor in tensors]
    tensors[0] = tensors[0][..., : size[0], : size[1]]
    with attnkern.use_backend(backend):
        outputs = run(module, tensors)
        scalar(outputs).backward()
    assert all(out.isfinite().all() for out in outputs)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    if size == (1, 1) and name in ("window", "windows", "ellipses"):  # a rescaled map of one position is 1
        torch.testing.assert_close(outputs[0], 2 * tensors[0])
    if size == (1, 1) and name == "pool-dot":
        torch.testing.assert_close(outputs[0], tensors[0][:, :, 0, 0])


@every_module
def test_empty_batch(name):
    module, tensors = build(name), inputs(name)
    outputs = run(module, [tensor[:0] for tensor in tensors])
    assert outputs[0].shape[0] == 0
    scalar(outputs).backward()
    assert all(parameter.grad.count_nonzero() == 0 for parameter in module.parameters())


@every_backend
def test_in_a_sequential(backend):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, C, 3), ann.WindowAttention(C, (4,)), ann.PositionwiseAttention(C, 4),
        ann.ProgressiveAttention(C), ann.CompatibilityPool(C, C), nn.Linear(C, 2),
    )  # fmt: skip
    with attnkern.use_backend(backend):
        output = network(torch.randn(2, 3, 9, 8))
        output.sum().backward()
    assert output.shape == (2, 2)
    assert network[0].weight.grad.abs().max() > 0
    assert "1.map" in dict(network.named_modules())


@every_module
@every_backend
def test_channels_last_goes_through(name, backend):
    module, tensors = build(name), inputs(name)
    with attnkern.use_backend(backend), torch.no_grad():
        expected = run(module, tensors)
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        found = run(module, tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if found[0].dim() == 4:
        assert found[0].is_contiguous(memory_format=torch.channels_last)


@every_backend
@pytest.mark.parametrize("name", ["pool-dot", "pool-dot-local", "pool-parametrised"])
def test_pool_of_tokens(name, backend):
    module, (local, query) = build(name), inputs(name)
    with attnkern.use_backend(backend):
        expected = module(local, query)
        pooled, attention = module(local.flatten(2), query, return_map=True)
    assert attention.shape == (N, H * W)
    torch.testing.assert_close(pooled, expected)


@every_backend
def test_query_shared_by_the_batch(backend):
    module, (local, query) = build("pool-dot-local"), inputs("pool-dot-local")
    with attnkern.use_backend(backend):
        torch.testing.assert_close(module(local, query[0]), module(local, query[:1].expand(N, -1)))


@every_backend
@pytest.mark.parametrize("hooked", [False, True])
def test_attend_is_checked_and_wide_with_hooks_and_without(hooked, backend):
    quantizer, x = ann.AnchorQuantizer(5), torch.randn(2, C, H, W)
    a = torch.rand(2, 1, H, W)
    if hooked:
        quantizer.map.register_forward_hook(lambda *_: None)
    with attnkern.use_backend(backend):
        attended = quantizer.attend(x.bfloat16(), a.bfloat16())
        wide = x.bfloat16().float() * (1 + attended.values.float())
        assert attended.output.dtype == attended.values.dtype == torch.bfloat16
        torch.testing.assert_close(attended.output.float(), wide, rtol=2**-7, atol=1e-3)
        assert quantizer.counts.sum() == a.numel()
        with pytest.raises(ValueError, match=r"anchor_attention: a must be \(2, 1, "):
            quantizer.attend(x, a[:1])


@every_backend
@pytest.mark.parametrize("hooked", [False, True])
def test_rectangles_are_checked_and_wide_with_hooks_and_without(hooked, backend):
    module, x, rectangle = ann.WindowAttention(C, (4,)), torch.randn(2, C, H, W), torch.rand(2, 5) + 0.1
    if hooked:
        module.map.register_forward_hook(lambda *_: None)
    with attnkern.use_backend(backend):
        for wrong, kind, message in [
            (rectangle[:1], ValueError, r"rectangle must be \(2, 5\) or \(2, K, 5\) \(N as x\), got shape \(1, 5\)"),
            (rectangle.double(), TypeError, r"rectangle must be float32 \(as x\), got float64"),
            (rectangle.to("meta"), ValueError, r"rectangle must be on cpu \(as x\), got meta"),
        ]:
            with pytest.raises(kind, match="^window_attention: " + message):
                module(x, rectangle=wrong)
        with pytest.raises(ValueError, match=r"^window_attention: rectangle must be \(1, 5\) or"):
            module(x[:1], rectangle=rectangle)
        for half in (torch.bfloat16, torch.float16):
            output, map = module(x.to(half), True, rectangle.to(half))
            assert (output.dtype, map.dtype) == (half, torch.float32)
            torch.testing.assert_close(map, attnkern.window_map(rectangle.to(half), (H, W)))


def test_what_a_module_for_the_mean_returns_is_checked():
    module = ann.BottleneckAttention(C, mean=torch.nn.Conv2d(C, 2, 1))
    with pytest.raises(
        ValueError,
        match=rf"^BottleneckAttention: the output of mean must be \(2, 1, {H}, {W}\) \(as x\), got shape",
    ):
        module(torch.randn(2, C, H, W))


def test_counting_over_processes_needs_some():
    quantizer = ann.AnchorQuantizer(4, sync_counts=True)
    with pytest.raises(RuntimeError, match="sync_counts needs a process group: call "):
        quantizer(torch.rand(2, 3))
    quantizer.eval()(torch.rand(2, 3))


@every_backend
def test_parametrised_pool_of_a_query_that_is_not_finite(backend):
    module, (local, query) = build("pool-parametrised"), inputs("pool-parametrised")
    wild = torch.full_like(query, math.inf).index_fill_(1, torch.tensor([0]), math.nan).requires_grad_()
    with attnkern.use_backend(backend):
        expected, pooled = module(local), module(local, wild)
        pooled.sum().backward()
    assert torch.equal(pooled, expected)
    assert torch.equal(wild.grad, torch.zeros_like(wild))


def _map_and_tensors(name, module, tensors):
    """(output, map) from the results of any module."""
    if name.startswith("bottleneck"):
        return module(*tensors, sample=False)[:2]
    return module(*tensors, return_map=True)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "quantizer"])
@every_backend
def test_autocast_keeps_the_map_in_float32(name, backend):
    module, tensors = build(name), inputs(name)
    with attnkern.use_backend(backend):
        expected_output, expected_map = _map_and_tensors(name, module, tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, map = _map_and_tensors(name, module, tensors)
        scalar([output.float()]).backward()
    assert map.dtype == torch.float32
    torch.testing.assert_close(map, expected_map, rtol=0.1, atol=0.3 if "anchors" in name else 0.05)
    torch.testing.assert_close(output.float(), expected_output, rtol=0.2, atol=1.0 if "anchors" in name else 0.1)
    assert all(leaf.grad.isfinite().all() for leaf in (*tensors, *module.parameters()) if leaf.grad is not None)
    assert tensors[0].grad.abs().max() > 0


def test_autocast_keeps_the_rectangle_in_float32():
    module, (x,) = build("window"), inputs("window")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rectangle = module.rectangle(x)
        summary = module.head(x)
    assert summary.dtype == torch.bfloat16
    assert rectangle.dtype == torch.float32
    # The head's bfloat16 summary is not rounded to bfloat16 again before it becomes a rectangle.
    mu = (summary.float() @ module.regressor.weight.T + module.regressor.bias)[:, :2].sigmoid()
    torch.testing.assert_close(rectangle[:, :2], mu, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "quantizer"])
@every_backend
def test_whole_module_in_bfloat16(name, backend):
    module, tensors = build(name, torch.bfloat16), inputs(name, torch.bfloat16)
    with attnkern.use_backend(backend):
        output, map = _map_and_tensors(name, module, tensors)
        scalar([output]).backward()
    assert output.dtype == torch.bfloat16
    assert map.dtype == torch.float32
    assert all(
        parameter.grad.dtype == torch.bfloat16 for parameter in module.parameters() if parameter.grad is not None
    )


# --- WindowAttention -------------------------------------------------------------------------------------------------


def test_rectangle_starts_centred():
    rectangle = ann.WindowAttention(C).rectangle(torch.randn(N, C, 9, 1))
    rows, column = 0.5 / 8, 0.5  # half a grid step; an axis of one position counts as one step long
    expected = [0.5, 0.5, rows + (0.75 - rows) * 2 / 3, column + 0.25 * 2 / 3, 0.0]
    torch.testing.assert_close(rectangle, torch.tensor([expected] * N))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_rectangle_stays_in_range(sign):
    module = ann.WindowAttention(C)
    nn.init.constant_(module.regressor.bias, sign * 50)
    low, high = torch.tensor([0, 0, 0.5 / 9, 0.5 / 19, -math.pi / 2]), torch.tensor([1, 1, 0.75, 0.75, math.pi / 2])
    rectangle = module.rectangle(torch.randn(N, C, 10, 20))
    torch.testing.assert_close(rectangle, (high if sign > 0 else low).expand(N, 5))


def test_parameter_counts_of_the_two_heads():
    # Appendix G: three 3x3 convolutions and a Linear; a 1x1 and three 3x3 convolutions.
    window = (9 * 320 + 1) * 64 + (9 * 64 + 1) * 128 + (9 * 128 + 1) * 256 + 257 * 5
    positionwise = 321 * 80 + 2 * (9 * 80 + 1) * 80 + 9 * 80 + 1
    assert sum(p.numel() for p in ann.WindowAttention(320).parameters()) == window == 554_693
    assert sum(p.numel() for p in ann.PositionwiseAttention(320).parameters()) == positionwise == 141_761


def test_positionwise_attention_with_normalisation():
    # Normalised activations do not grow with the features, so the map does not saturate when these do.
    x, maps = torch.randn(N, C, H, W), {}
    for norm in (False, True):
        torch.manual_seed(0)
        module = ann.PositionwiseAttention(C, 5, 2, norm=norm)
        output, map = module(x, return_map=True)
        torch.testing.assert_close(output, x + map[:, None] * x)
        maps[norm] = map, module(1000 * x, return_map=True)[1]
    assert not torch.allclose(*maps[False], atol=0.1)
    torch.testing.assert_close(*maps[True], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("count", [2, 4, 16])
def test_several_windows_start_apart_on_a_ring(count):
    module = ann.WindowAttention(C, (4,), num_windows=count)
    rectangle = module.rectangle(torch.randn(N, C, 401, 401))
    assert rectangle.shape == (N, count, 5)
    turn = 2 * math.pi * (torch.arange(count) + 0.5) / count
    centres = torch.stack((0.5 + turn.sin() / 4, 0.5 + turn.cos() / 4), 1)
    torch.testing.assert_close(rectangle[0, :, :2], centres)
    torch.testing.assert_close(rectangle[0, :, 2:4], torch.full((count, 2), 0.5 / count**0.5), rtol=0, atol=2e-3)
    assert not rectangle[..., 4].any()
    map = attnkern.window_map(rectangle[:1], (31, 31), rescale=False)[0].double()
    torch.testing.assert_close(map, map.flip(0, 1), rtol=0, atol=1e-5)  # symmetric about the centre


def test_several_windows_part_in_training():
    """Each has a gradient of its own from the first step."""
    module = ann.WindowAttention(C, (4,), num_windows=4)
    module(torch.randn(N, C, 9, 9)).square().sum().backward()
    gradient = module.regressor.bias.grad.view(4, 5)
    assert gradient.isfinite().all()
    assert torch.pdist(gradient).min() > 1e-4 * gradient.abs().max()


def test_weights_of_one_window_stay_loadable():
    """The parameters of one window have the names and shapes that they had before there could be several."""
    shapes = {name: tuple(value.shape) for name, value in ann.WindowAttention(C, (4, 5)).state_dict().items()}
    assert shapes == {
        "head.0.weight": (4, C, 3, 3), "head.0.bias": (4,), "head.3.weight": (5, 4, 3, 3), "head.3.bias": (5,),
        "regressor.weight": (5, 5), "regressor.bias": (5,),
    }  # fmt: skip
    ellipse = ann.WindowAttention(C, (4, 5), shape="ellipse")
    ellipse.load_state_dict(ann.WindowAttention(C, (4, 5)).state_dict())


@every_backend
@pytest.mark.parametrize("hooked", [False, True])
def test_windows_that_are_given(hooked, backend):
    """Any number of windows may be given, whatever the head predicts; the shape is the module's."""
    module, x = ann.WindowAttention(C, (4,), shape="ellipse"), torch.randn(2, C, H, W)
    if hooked:
        module.map.register_forward_hook(lambda *_: None)
    rectangle = torch.rand(2, 3, 5) + 0.1
    with attnkern.use_backend(backend):
        output, map = module(x, True, rectangle)
        torch.testing.assert_close(map, attnkern.window_map(rectangle, (H, W), shape="ellipse"))
        torch.testing.assert_close(output, x * (1 + map[:, None]))


# --- AnchorQuantizer, BottleneckAttention ----------------------------------------------------------------------------


@every_backend
def test_counts_add_up_in_training_only(backend):
    module = ann.AnchorQuantizer(3)
    assert torch.equal(module.anchors, torch.tensor([0.0, 0.5, 1.0]))
    assert module.perplexity().isnan()
    a = torch.tensor([[-1.0, 0.1, 0.4, 2.0]])
    with attnkern.use_backend(backend):
        module(a)
        module(a)
        assert module.counts.tolist() == [4, 2, 2]
        module.eval()
        module(a)
    assert module.counts.tolist() == [4, 2, 2]
    assert module.perplexity().item() == pytest.approx(2**1.5)  # entropy of (1/2, 1/4, 1/4): 1.5 bits
    assert "counts" not in module.state_dict()
    module.reset_counts()
    assert module.counts.tolist() == [0, 0, 0]


def _count_in_a_group(rank, store, results):
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2)
    module = ann.AnchorQuantizer(2, sync_counts=True)
    quantized = module(torch.full((1, 3 + rank), float(rank)))
    results[rank] = (module.counts.tolist(), quantized.counts.tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_counts_add_up_over_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), results)
        workers = [context.Process(target=_count_in_a_group, args=(rank, *arguments)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert dict(results) == {0: ([3, 4], [3, 0]), 1: ([3, 4], [0, 4])}


@every_backend
def test_anchors_move_by_their_own_loss_alone(backend):
    module, (x,) = build("bottleneck-anchors"), inputs("bottleneck-anchors")
    with attnkern.use_backend(backend):
        attended = module(x)
        anchors = module.quantizer.anchors
        task = torch.autograd.grad(attended.output.sum(), anchors, retain_graph=True, allow_unused=True)[0]
        own = torch.autograd.grad(attended.anchor_loss, anchors)[0]
    assert task is None or task.count_nonzero() == 0
    assert own.abs().max() > 0


@every_backend
def test_bottleneck_written_out(backend):
    module, (x,) = build("bottleneck-anchors"), inputs("bottleneck-anchors")
    mean = torch.sigmoid(F.conv2d(x, module.mean.weight, module.mean.bias, padding=1))
    std = F.softplus(F.conv2d(mean, module.std.weight, module.std.bias, padding=1) - 5)
    torch.manual_seed(2)
    a = mean[:, 0] + std[:, 0] * torch.randn(N, H, W)
    anchors = module.quantizer.anchors
    nearest = anchors[(a[..., None] - anchors).abs().argmin(-1)]
    with attnkern.use_backend(backend):
        torch.manual_seed(2)
        attended = module(x)
    torch.testing.assert_close(attended.mean, mean[:, 0])
    torch.testing.assert_close(attended.std, std[:, 0])
    torch.testing.assert_close(attended.map, nearest)
    torch.testing.assert_close(attended.output, x + nearest[:, None] * x)
    torch.testing.assert_close(attended.anchor_loss, (a - nearest).square().mean())
    torch.testing.assert_close(attended.commitment_loss, (a - nearest).square().mean())


@pytest.mark.parametrize("num_anchors", [None, 4])
@pytest.mark.parametrize("observed", [False, True])
def test_bottleneck_without_residual(num_anchors, observed):
    """The output is v·x alone, on every path through the module."""
    module = ann.BottleneckAttention(C, num_anchors, residual=False).eval()
    if observed:  # a hook on the map takes another path than the fused operator
        module.map.register_forward_hook(lambda module, args, output: output * 0.5)
    (x,) = inputs("bottleneck")
    attended = module(x)
    torch.testing.assert_close(attended.output, attended.map[:, None] * x)
    with pytest.raises(TypeError, match=r"^BottleneckAttention: residual must be"):
        ann.BottleneckAttention(C, residual=1)


def test_bottleneck_noise():
    module, (x,) = build("bottleneck"), inputs("bottleneck")
    assert not torch.equal(module(x).map, module(x).map)
    assert torch.equal(module(x, sample=False).map, module(x, sample=False).mean)
    module.eval()
    assert torch.equal(module(x).map, module(x).mean)
    assert not torch.equal(module(x, sample=True).map, module(x, sample=True).map)
    assert module(x).anchor_loss == module(x).commitment_loss == 0
    fresh = ann.BottleneckAttention(C)
    nn.init.zeros_(fresh.std.weight)
    nn.init.zeros_(fresh.std.bias)
    torch.testing.assert_close(fresh(x).std, torch.full((N, H, W), math.log1p(math.exp(-5))))


# --- CompatibilityPool -----------------------------------------------------------------------------------------------


def literal_pool(local, scores):
    return torch.einsum("nhw,nchw->nc", scores.flatten(1).softmax(1).view_as(scores), local)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("pool")])
@every_backend
def test_pool_equals_the_papers_formula(name, backend):
    """Equals the printed formula with projected tensors and ℓ + g, gradients included."""
    found = outputs_and_gradients(name, backend, torch.float32)
    module, (local, query) = build(name, torch.float64), inputs(name, torch.float64)
    g, locals = query, local
    if module.project == "query":
        g = module.projection(query)
    if module.project == "local":
        locals = torch.einsum("dc,nchw->ndhw", module.projection.weight, local)
    if module.weight is None:
        scores = torch.einsum("nc,nchw->nhw", g, locals)
    else:
        scores = torch.einsum("c,nchw->nhw", module.weight, locals + g[:, :, None, None])
    pooled = literal_pool(locals, scores)
    scalar([pooled]).backward()
    expected = [pooled, local.grad, query.grad, *(parameter.grad for parameter in module.parameters())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("positions", [(H, W), (H * W,)])
@pytest.mark.parametrize("shape", [(N, C), (C,)])
def test_parametrised_gradient_of_g_from_the_map_alone(positions, shape):
    torch.manual_seed(0)
    module = ann.CompatibilityPool(C, C, project="query")
    local, query = torch.randn(N, C, *positions), torch.randn(shape, requires_grad=True)
    map = module(local, query, return_map=True)[1]
    assert torch.equal(map, module(local, return_map=True)[1])
    map.square().sum().backward()
    assert torch.equal(query.grad, torch.zeros_like(query))
    assert torch.equal(module.projection.weight.grad, torch.zeros(C, C))


@every_backend
@pytest.mark.parametrize("project", [None, "query", "local"])
def test_parametrised_gradient_of_g_is_exactly_zero(backend, project):
    torch.manual_seed(0)
    module = ann.CompatibilityPool(C, C, project=project)
    local, query = torch.randn(N, C, H, W), torch.randn(N, C, requires_grad=True)
    with attnkern.use_backend(backend):
        pooled = module(local, query)
        pooled.square().sum().backward()
        assert torch.equal(pooled, module(local, 3 * query))
        assert torch.equal(pooled, module(local))
    assert query.grad.count_nonzero() == 0
    assert module.weight.grad.abs().max() > 0
    if project == "query":
        assert module.projection.weight.grad.count_nonzero() == 0


def test_progressive_attention_adds_its_query_to_every_position():
    torch.manual_seed(0)
    module, x, query = ann.ProgressiveAttention(C), torch.randn(N, C, H, W), torch.randn(N, C, requires_grad=True)
    output, map = module(x, return_map=True, query=query)
    expected = torch.einsum("c,nchw->nhw", module.score.weight.flatten(), x + query[:, :, None, None])
    torch.testing.assert_close(map, (expected + module.score.bias).sigmoid())
    torch.testing.assert_close(output, map[:, None] * x)
    output.sum().backward()
    assert query.grad.abs().min() > 0


# --- what people do to layers ----------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A low-rank adapter around a layer, as in adapter libraries."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Packed(torch.Tensor):
    """A weight whose type supports only linear layers, like quantized and sharded weights."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight = args[:2]
            return F.linear(x, 2 * weight.detach().as_subclass(torch.Tensor))
        if function in (torch.Tensor.t, torch.Tensor.matmul):
            raise NotImplementedError("only as a layer's weight")
        return super().__torch_function__(function, types, args, kwargs or {})


def offloaded(layer):
    """The weight is moved to the device only during a call."""
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(weight.to("meta"))
    layer.forward = lambda x: F.linear(x, weight)


def stale_weight_norm(layer):
    """Until the first call ``weight`` is what it was before ``weight_g`` was loaded."""
    torch.nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g *= 1.5


def spectral_norm(layer):
    torch.nn.utils.spectral_norm(layer)(torch.zeros(C))
    layer.eval()  # in training mode each call updates the estimate of the norm


def packed(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)


#: Changes a layer in place or returns a replacement.
TO_A_LAYER = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda _layer, _inputs, output: 2 * output) and None,
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0].relu(),)) and None,
    "adapter": Adapted,
    "bias": lambda layer: nn.Linear(layer.in_features, layer.out_features),
    "offload": offloaded,
    "weight_norm": stale_weight_norm,
    "spectral_norm": spectral_norm,
    "parametrization": lambda layer: torch.nn.utils.parametrizations.orthogonal(layer) and None,
    "pruning": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5) and None,
    "packed weight": packed,
    "own class": lambda layer: type("Own", (nn.Linear,), {"forward": lambda self, x: 3 * F.linear(x, self.weight)})(
        layer.in_features, layer.out_features, bias=False
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("compatibility", ["dot", "parametrised"])
@pytest.mark.parametrize("how", TO_A_LAYER)
def test_a_projection_is_called_once_anything_is_done_to_it(how, compatibility, hooked):
    """Equals the formula over the projected local features, with the gradients of all parameters."""
    torch.manual_seed(0)
    pool = ann.CompatibilityPool(C, G, compatibility, project="local").train()
    pool.projection = TO_A_LAYER[how](pool.projection) or pool.projection
    local, query = torch.randn(N, C, H, W, requires_grad=True), torch.randn(N, G)
    leaves = [local, *(parameter for parameter in pool.parameters() if parameter.requires_grad)]
    leaves = [leaf for leaf in leaves if not leaf.is_meta]
    if hooked:
        pool.map.register_forward_hook(lambda *_: None)
    steps = []
    for _ in range(2):
        found = pool(local, query)
        steps.append([found, *torch.autograd.grad(scalar([found]), leaves)])
    projected = pool.projection(local.flatten(2).mT).mT.unflatten(2, (H, W))
    key = query if pool.weight is None else pool.weight.expand(N, -1)
    expected = literal_pool(projected, torch.einsum("nc,nchw->nhw", key, projected))
    expected = [expected, *torch.autograd.grad(scalar([expected]), leaves)]
    for step in steps:
        for a, b in zip(step, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["eager", "functional_call", "export"])
def test_an_untouched_projection_is_folded(how):
    """The layer is applied to one vector per image, never to every position."""
    pool, (local, query) = build("pool-dot-local"), inputs("pool-dot-local")
    if how == "export":
        call = torch.export.export(pool, (local, query)).module()
    elif how == "functional_call":
        state = {name: parameter.detach() for name, parameter in pool.named_parameters()}

        def call(*args):
            return torch.func.functional_call(pool, state, args)

    else:
        call = pool
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                products.append(tuple(output.shape))
            return output

    with torch.no_grad(), Products():
        found = call(local, query)
    torch.testing.assert_close(found, pool(local, query))
    assert products == [(N, C), (N, G)]


@pytest.mark.parametrize("name", ["window", "bottleneck", "bottleneck-anchors"])
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_have_no_weight_to_look_at(name, autocast):
    """Quantized layers, and adapters around them, return packed weights from a method or have none."""

    class Opaque(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.compute = layer.forward

        def weight(self):
            raise AssertionError("nobody's business")

        def forward(self, x):
            assert x.dtype == torch.float32
            return self.compute(x)

    module, tensors = build(name).eval(), inputs(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(module, tensors)
        part = "regressor" if name == "window" else "std"
        setattr(module, part, Opaque(getattr(module, part)))
        found = run(module, tensors)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "quantizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_of_data_parallel(name, dtype):
    """Their parameters are tensors in attributes, so ``parameters()`` is empty."""

    def replica_of(module):
        replica = module._replicate_for_data_parallel()
        for key, parameter in module._parameters.items():
            setattr(replica, key, None if parameter is None else parameter.clone())
        for key, child in module._modules.items():
            replica._modules[key] = child if child is None else replica_of(child)
        return replica

    module, tensors = build(name, dtype).eval(), inputs(name, dtype)
    replica = replica_of(module)
    assert not list(replica.parameters())
    for a, b in zip(run(replica, tensors), run(module, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["window", "bottleneck", "bottleneck-anchors"])
def test_a_module_in_bfloat16_under_autocast(name):
    module, tensors = build(name, torch.bfloat16).eval(), inputs(name, torch.bfloat16)
    expected = run(module, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(module, tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    "channels": (lambda: ann.WindowAttention(C)(torch.ones(1, 4, 3, 3)),
                 ValueError, r"WindowAttention: x must be \(N, 6, H, W\), got shape \(1, 4, 3, 3\)"),
    "three dims": (lambda: ann.PositionwiseAttention(C)(torch.ones(C, 3, 3)),
                   ValueError, r"PositionwiseAttention: x must be \(N, 6, H, W\), got shape \(6, 3, 3\)"),
    "no position": (lambda: ann.ProgressiveAttention(C)(torch.ones(1, C, 0, 3)),
                    ValueError, r"ProgressiveAttention: x must have at least one position, got a map of size \(0, 3\)"),
    "progressive query": (lambda: ann.ProgressiveAttention(C)(torch.ones(2, C, 3, 3), query=torch.ones(1, C)),
                          ValueError, r"query must be \(2, 6\) \(N and C as x\), got shape \(1, 6\)"),
    "integers": (lambda: ann.BottleneckAttention(C)(torch.ones(1, C, 3, 3, dtype=torch.int64)),
                 TypeError, "BottleneckAttention: x must be float32, bfloat16, float16 or float64, got int64"),
    "not a tensor": (lambda: ann.WindowAttention(C)([1.0]),
                     TypeError, "WindowAttention: x must be a Tensor, got list"),
    "hidden": (lambda: ann.WindowAttention(C, hidden=()),
               ValueError, "WindowAttention: hidden must name at least one convolution's channels, got none"),
    "no windows": (lambda: ann.WindowAttention(C, num_windows=0),
                   ValueError, "WindowAttention: num_windows must be at least 1, got 0"),
    "shape": (lambda: ann.WindowAttention(C, shape="circle"),
              ValueError, "WindowAttention: shape must be 'rectangle' or 'ellipse', got 'circle'"),
    "anchors": (lambda: ann.AnchorQuantizer(0),
                ValueError, "AnchorQuantizer: num_anchors must be at least 1, got 0"),
    "no anchors": (lambda: ann.BottleneckAttention(C, num_anchors=0),
                   ValueError, "AnchorQuantizer: num_anchors must be at least 1, got 0"),
    "reduction": (lambda: ann.AnchorQuantizer(2, reduction="max"),
                  ValueError, "AnchorQuantizer: reduction must be 'mean', 'batchmean' or 'sum', got 'max'"),
    "no channels": (lambda: ann.WindowAttention(0), ValueError, "WindowAttention: channels must be at least 1, got 0"),
    "half a channel": (lambda: ann.PositionwiseAttention(2.5),
                       TypeError, "PositionwiseAttention: channels must be an integer, got 2.5"),
    "norm": (lambda: ann.PositionwiseAttention(C, norm=1),
             TypeError, "PositionwiseAttention: norm must be True or False, got 1"),
    "hidden channels": (lambda: ann.WindowAttention(C, hidden=(4, 0)),
                        ValueError, "WindowAttention: hidden must be at least 1, got 0"),
    "anchors by name": (lambda: ann.BottleneckAttention(C, "20"),
                        TypeError, "AnchorQuantizer: num_anchors must be an integer, got '20'"),
    "no query channels": (lambda: ann.CompatibilityPool(C, 0, project="query"),
                          ValueError, "CompatibilityPool: query_channels must be at least 1, got 0"),
    "elsewhere": (lambda: ann.CompatibilityPool(C, C)(torch.ones(2, C, 2, 2), torch.ones(2, C, device="meta")),
                  ValueError, r"CompatibilityPool: query must be on cpu \(as local\), got meta"),
    "compatibility": (lambda: ann.CompatibilityPool(C, C, "cosine"),
                      ValueError, "CompatibilityPool: compatibility must be 'parametrised' or 'dot', got 'cosine'"),
    "project": (lambda: ann.CompatibilityPool(C, C, project="both"),
                ValueError, "CompatibilityPool: project must be 'query', 'local' or None, got 'both'"),
    "unequal": (lambda: ann.CompatibilityPool(C, G),
                ValueError, "query_channels must equal local_channels unless project is .* got 7 and 6"),
    "local": (lambda: ann.CompatibilityPool(C, C)(torch.ones(1, G, 2, 2)),
              ValueError, r"local must be \(N, 6, H, W\) or \(N, 6, L\), got shape \(1, 7, 2, 2\)"),
    "no query": (lambda: ann.CompatibilityPool(C, C, "dot")(torch.ones(1, C, 2, 2)),
                 ValueError, "query must be given where compatibility is 'dot', got None"),
    "query": (lambda: ann.CompatibilityPool(C, G, "dot", "query")(torch.ones(2, C, 2, 2), torch.ones(2, C)),
              ValueError, r"query must be \(2, 7\) or \(7,\) \(N as local\), got shape \(2, 6\)"),
    "inert query": (lambda: ann.CompatibilityPool(C, C)(torch.ones(2, C, 2, 2), torch.ones(3, C)),
                    ValueError, r"query must be \(2, 6\) or \(6,\) \(N as local\), got shape \(3, 6\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_per_sample_gradients_of_a_quantizer_count_nothing():
    module = ann.AnchorQuantizer(4).train()
    anchors = {"anchors": module.anchors.detach()}

    def loss(anchors, a):
        return torch.func.functional_call(module, anchors, (a[None],)).anchor_loss

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(anchors, torch.rand(3, 1, 4, 4))
    assert grads["anchors"].shape == (3, 4)
    assert not module.counts.any()
