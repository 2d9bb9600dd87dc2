"""Other features of torch.nn modules: copies, transforms, lazy and fake tensors, determinism, interpretability."""

import copy
import io
import pickle
import re

import pytest
import torch
from cases import FUNCTIONS, call, leaves_of, make
from conftest import every_function
from test_nn import MODULES, build, inputs, run, scalar
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

import attnkern
import attnkern.nn as ann

every_module = pytest.mark.parametrize("name", list(MODULES))
SIZE = (3, 4)


def seeded(module, tensors):
    torch.manual_seed(1)  # the bottleneck draws noise
    return run(module, tensors)


def equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# --- copies and parameters -------------------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_compute_the_same(name, how):
    module, tensors = build(name), inputs(name)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    elif how == "save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = build(name)
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        twin.load_state_dict(module.state_dict())
    equal(seeded(twin, tensors), seeded(module, tensors))
    assert all(a is not b for a, b in zip(module.parameters(), twin.parameters(), strict=True))


@every_module
def test_built_on_meta_and_given_memory_later(name):
    module, tensors = build(name), inputs(name)
    with torch.device("meta"):
        empty = build(name)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(module.state_dict())
    equal(seeded(loaded, tensors), seeded(module, tensors))


@pytest.mark.parametrize(
    "name, key",
    [("window", "regressor.weight"), ("positionwise", "head.0.weight"), ("pool-parametrised", "weight"),
     ("pool-dot-local", "projection.weight"), ("progressive", "score.weight")],
)  # fmt: skip
def test_swapped_and_parametrized_parameters(name, key):
    module, tensors = build(name), inputs(name)
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    before = run(module, tensors)[0].detach()

    class Shifted(nn.Module):
        def forward(self, weight):
            return weight + 0.5

    nn.utils.parametrize.register_parametrization(owner, leaf, Shifted())
    after = run(module, tensors)[0]
    assert not torch.equal(after, before)
    scalar([after]).backward()
    assert owner.parametrizations[leaf].original.grad.abs().max() > 0
    swapped = build(name)
    torch.utils.swap_tensors(
        getattr(swapped.get_submodule(path), leaf), nn.Parameter(getattr(build(name).get_submodule(path), leaf) + 0.5)
    )
    # Not bitwise: only a projection without parametrization is folded into the query.
    torch.testing.assert_close(run(swapped, tensors)[0], after)


@every_module
def test_hooks_of_the_state_dict(name):
    module = build(name)
    module.register_state_dict_post_hook(lambda _m, state, prefix, _l: state.__setitem__(prefix + "mark", 1))
    seen = []
    module.register_load_state_dict_pre_hook(lambda _m, state, prefix, *_: seen.append(state.pop(prefix + "mark")))
    module.load_state_dict(module.state_dict())
    assert seen == [1]


# --- transforms ------------------------------------------------------------------------------------------------------


@every_module
def test_functional_call_and_gradients_per_sample(name):
    if name.startswith("bottleneck"):
        pytest.skip("draws: vmap wants its randomness named")
    module, (x, *others) = build(name, torch.float64).train(False), inputs(name, torch.float64)
    x, others = x.detach(), [other.detach() for other in others]
    parameters = {key: parameter.detach() for key, parameter in module.named_parameters()}

    def loss(parameters, x, *others):
        outputs = functional_call(module, parameters, (x[None], *(other[None] for other in others)))
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return sum(output.sin().sum() for output in outputs if output.is_floating_point())

    together = vmap(grad(loss), (None, *[0] * (1 + len(others))))(parameters, x, *others)
    for n in range(len(x)):
        alone = grad(loss)(parameters, x[n], *(other[n] for other in others))
        for key in parameters:
            torch.testing.assert_close(together[key][n], alone[key], rtol=1e-9, atol=1e-9)


@every_function
def test_jacobians_agree(function, backend, device):
    """Reverse over forward mode, vmap over each argument, and nested vmap."""
    tensors = make(function, 1, 2, (2, 3), device=device, anchors=3)
    names, results = FUNCTIONS[function]
    result = results[0]

    def f(*values):
        found = call(function, tensors | dict(zip(names, values, strict=True)), size=(2, 3), backend=backend)
        return found[result]

    values = tuple(tensors[name] for name in names)
    for argument in range(len(values)):
        torch.testing.assert_close(jacrev(f, argument)(*values), jacfwd(f, argument)(*values), rtol=1e-9, atol=1e-9)
        batch = torch.stack([values[argument], values[argument] * 0.9])
        dims = tuple(0 if k == argument else None for k in range(len(values)))
        given = [batch if k == argument else value for k, value in enumerate(values)]
        alone = [f(*(batch[i] if k == argument else v for k, v in enumerate(values))) for i in range(2)]
        torch.testing.assert_close(vmap(f, dims)(*given), torch.stack(alone))
        nested = vmap(vmap(f, dims), dims)(*(b[None] if k == argument else b for k, b in enumerate(given)))
        torch.testing.assert_close(nested, torch.stack(alone)[None])


@every_function
def test_fake_and_meta_tensors(function):
    """Meta and fake tensors have the shapes, dtypes and strides of real results."""
    tensors = make(function, dtype=torch.bfloat16, layout="channels_last" if function != "window_map" else "contiguous")
    real = call(function, tensors, size=SIZE)
    with FakeTensorMode() as mode:
        fake = call(function, {k: mode.from_tensor(v) for k, v in tensors.items()}, size=SIZE)
    meta = call(function, {k: v.to("meta") for k, v in tensors.items()}, size=SIZE)
    for key, wanted in real.items():
        for found in (fake[key], meta[key]):
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), key
        assert fake[key].stride() == wanted.stride(), key


@every_module
def test_inference_mode_and_requires_grad(name):
    module, tensors = build(name).eval(), inputs(name)
    with torch.inference_mode():
        found = seeded(module, tensors)
    assert not any(result.requires_grad for result in found)
    module.requires_grad_(False)
    assert seeded(module, [tensor.detach() for tensor in tensors])[0].grad_fn is None


# --- numerics --------------------------------------------------------------------------------------------------------


@every_function
def test_deterministic_algorithms_change_nothing(function, backend, device):
    tensors = leaves_of(make(function, dtype=torch.float32, device=device))
    names, ends = FUNCTIONS[function]

    def everything():
        found = call(function, tensors, size=SIZE, backend=backend)
        results = [found[key] for key in ends]
        total = sum(r.double().sin().sum() for r in results)
        gradients = torch.autograd.grad(total, [tensors[name] for name in names])
        return [*results, *gradients]

    found = []
    try:
        for demanded in (False, True):
            torch.use_deterministic_algorithms(demanded)
            found.append(everything())
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)  # as conftest has it
    equal(*found)


@every_module
def test_scaled_gradients_of_autocast(name):
    """float16 with a GradScaler takes steps, and an overflow skips a step."""
    module, tensors = build(name), inputs(name)
    if not list(module.parameters()):
        pytest.skip("has no parameters")
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for factor in (1.0, float("inf")):
        with torch.autocast("cpu", torch.float16):
            loss = scalar(seeded(module, tensors)) * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            stepped = [parameter.detach().clone() for parameter in module.parameters()]
            assert any(not torch.equal(a, b) for a, b in zip(before, stepped, strict=True))
    equal(list(module.parameters()), stepped)


# --- interpretability ------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.attention = attention
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.attention(self.body(x))
        if isinstance(x, tuple):
            x = x.output
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


ATTENTIONS = {
    "window": lambda: ann.WindowAttention(6, (4,)),
    "positionwise": lambda: ann.PositionwiseAttention(6, 4, 1),
    "progressive": lambda: ann.ProgressiveAttention(6),
    "pool": lambda: ann.CompatibilityPool(6, 6),
    "bottleneck": lambda: ann.BottleneckAttention(6, 100),
}


def classifier(name):
    torch.manual_seed(0)
    return Classifier(ATTENTIONS[name]()).eval(), torch.rand(2, 3, 8, 9)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_captum_attributes_to_the_map(name):
    """Gradient times activation at ``map`` sums to the score, which is linear in the map."""
    attributions = pytest.importorskip("captum.attr")
    model, x = classifier(name)
    found = attributions.LayerGradientXActivation(model, model.attention.map).attribute(x, target=1)
    assert found.shape == (2, 8, 9)
    model.head.bias.data.zero_()
    residual = model.head(model.body(x).mean((2, 3)))[:, 1] if name in ("window", "positionwise", "bottleneck") else 0
    torch.testing.assert_close(found.sum((1, 2)), model(x)[:, 1] - residual, rtol=1e-4, atol=1e-5)
    image = attributions.IntegratedGradients(model).attribute(x, target=1, n_steps=4)
    assert image.abs().max() > 0


@pytest.mark.parametrize("name", ATTENTIONS)
def test_grad_cam_at_the_map(name):
    cam = pytest.importorskip("pytorch_grad_cam")
    model, x = classifier(name)
    model.head.weight.data.abs_()  # grad-cam shows positive contributions only
    target = cam.utils.model_targets.ClassifierOutputTarget

    class Channel(nn.Module):  # grad-cam reads (N, C, H, W): one channel
        def forward(self, map):
            return self.seen(map[:, None])[:, 0]

    model.attention.map = Channel()
    model.attention.map.seen = nn.Identity()
    with cam.GradCAM(model, [model.attention.map.seen]) as explain:
        found = explain(x, [target(1)] * 2)
    assert found.shape == (2, 8, 9)
    assert found.max() > 0
    plain, _ = classifier(name)
    plain.head.weight.data.abs_()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


# --- compilation of modules and networks -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_modes_of_compile(mode):
    module, (x,) = build("window"), inputs("window")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    output = compiled(x)
    torch.testing.assert_close(output, module(x))
    expected = torch.autograd.grad(module(x).sin().sum(), list(module.parameters()))
    found = torch.autograd.grad(output.sin().sum(), list(module.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_deep_network_is_one_graph():
    """Only traced, because compiling its many generated kernels takes half a minute."""
    pytest.importorskip("torchvision")
    from attnkern.models import create_model

    torch.manual_seed(0)
    network = create_model("efficientnet_b0_window", 3, width=0.1).eval()
    torch._dynamo.reset()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg_aib_qt", "vgg_att2_concat_pc"])
def test_networks_are_one_graph(name, capsys):
    """The whole network is one graph; the launches in the generated code are counted and printed."""
    from torch._inductor.utils import run_and_get_code

    from attnkern.models import create_model

    torch.manual_seed(0)
    network = create_model(name, 3, width=0.1).eval()
    torch._dynamo.reset()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(network, fullgraph=True), x)
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)
    ours = re.findall(r"= torch\.ops\.attnkern\.(\w+)\.default\(", code)
    generated = len(re.findall(r"^ +cpp_\w+\(", code, re.MULTILINE))
    library = len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.(?!attnkern)\w+\.\w+[\w.]*\(", code))
    assert ours
    with capsys.disabled():
        print(f"\n{name}, compiled: {generated} generated kernels, {library} of libraries, ours: {', '.join(ours)}")


def test_use_backend_inside_a_compiled_function(device):
    tensors = make("window_map", dtype=torch.float32, device=device)

    @torch.compile(fullgraph=True, backend="eager")
    def f(rectangle):
        with attnkern.use_backend("reference"):
            return attnkern.window_map(rectangle, SIZE)

    torch.testing.assert_close(f(**tensors), attnkern.window_map(**tensors, size=SIZE))
    assert attnkern._backend.current() is None
