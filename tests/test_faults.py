"""What goes wrong in use, row by row of docs/reliability.md: extreme numbers and shapes, odd memory, threads, forks."""

import concurrent.futures
import itertools
import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from cases import CASES, FUNCTIONS, call, case_id, check, check_run, doubles, make, run, same, upstream
from conftest import DEVICE, PATIENCE

import attnkern
from attnkern import _backend, _ops

every_case = pytest.mark.parametrize("function, options", CASES, ids=case_id)
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=case_id
)
large = pytest.mark.large

SIZE = (3, 4)
ARGUMENTS = [(function, name) for function, (names, _) in FUNCTIONS.items() for name in names]
OF_AN_IMAGE = [(function, name) for function, name in ARGUMENTS if name != "anchors"]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "max", "-max"])
@pytest.mark.parametrize("function, name", OF_AN_IMAGE, ids=case_id)
@every_dtype
def test_an_extreme_number_stays_in_its_image(function, name, value, dtype, backend, device):
    """NaN, ±Inf or the largest number in one image: the other image and its gradients are as without it.

    NaN reaches exactly what it reaches in float64; so does Inf where the mathematics says what it does.
    """
    tensors = make(function, 2, 3, SIZE, dtype=dtype, device=device)
    options = {"size": SIZE, "backend": backend} | ({"reduction": "sum"} if "anchor" in function else {})
    grads = upstream(call(function, tensors, **options))
    number = float(value) if "max" not in value else math.copysign(torch.finfo(dtype).max, -1 if "-" in value else 1)
    dirty = tensors | {name: tensors[name].clone()}
    dirty[name].view(2, -1)[0, 1] = number
    clean, found = (run(function, t, grads=grads, **options) for t in (tensors, dirty))
    expected = run(function, doubles(dirty), grads=doubles(grads), **options | {"backend": "reference"})
    for key, result in found.items():
        if result is None or key == "grad_anchors" or result.dim() == 0 or key == "counts":
            continue
        torch.testing.assert_close(result[1], clean[key][1], rtol=1e-5, atol=1e-6)
        if value == "nan" or ("inf" in value and name != "rectangle"):
            assert torch.equal(result[0].isfinite(), expected[key][0].isfinite()), key
        if value == "nan":
            assert torch.equal(result[0].isnan(), expected[key][0].isnan()), key


@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
@every_dtype
def test_the_largest_anchors(function, dtype, backend, device):
    """±max among the anchors: elements choose as in exact arithmetic, and the anchors in the middle lose nothing."""
    largest = torch.finfo(dtype).max
    a = torch.tensor([0.0, 1.0, largest, -largest, largest / 4, largest / 1.5], dtype=dtype, device=device)
    tensors = {"a": a.view(1, 1, 1, -1), "anchors": torch.tensor([largest, 0.5, -largest], dtype=dtype, device=device)}
    if function == "anchor_attention":
        tensors = {"x": torch.zeros(1, 2, 1, 6, dtype=dtype, device=device)} | tensors
    found = run(function, tensors, backend=backend, through=("values",))
    assert found["indices"].flatten().tolist() == [1, 1, 0, 2, 1, 0]
    assert torch.equal(found["values"].flatten(), tensors["anchors"][found["indices"].flatten()])
    assert found["counts"].tolist() == [2, 3, 1]


INTERPRETER = "Triton's interpreter widens denormals of bfloat16 to other numbers"


@every_dtype
@every_case
def test_denormal_numbers(function, options, dtype, backend, device, interpreted):
    """Every number of every argument so small that it is denormal: no flush, no division by zero."""
    if interpreted and dtype == torch.bfloat16:
        pytest.skip(INTERPRETER)
    tensors = make(function, 2, 3, SIZE, dtype=dtype, device=device)
    for name, tensor in tensors.items():
        tensors[name] = (tensor.double() * torch.finfo(dtype).tiny / 8).to(dtype)
        assert tensors[name].any()
    options = options | {"size": SIZE}
    grads = upstream(call(function, tensors, **options))
    found = run(function, tensors, grads=grads, backend=backend, **options)
    expected = run(function, doubles(tensors), grads=doubles(grads), backend="reference", **options)
    if "rectangle" in tensors:  # slopes of 1e6: float16 overflows, and its denormals lie above the extents' floor
        gradient, _ = (results.pop("grad_rectangle") for results in (found, expected))
        assert dtype == torch.float16 or not gradient[:, 2:4].any()
    check(found, expected)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tight = {"output", "pooled", "values", "grad_x", "grad_query", "grad_anchors"}
    for name in tight & found.keys():  # check()'s tolerance is far above them
        assert expected[name].any() or options.get("residual") is False  # v·x alone underflows
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-2, atol=8 * smallest)
    if function == "anchor_attention" and options.get("residual", True):
        assert torch.equal(found["output"], tensors["x"])  # v·x is far below the last place, and x is not flushed


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    ],
    ids=case_id,
)
def test_neighbouring_denormal_anchors(dtype, backend, device, interpreted):
    """The smallest number and zero, in the order in which a tie would go to the former: zero is nearest to itself."""
    if interpreted and dtype == torch.bfloat16:
        pytest.skip(INTERPRETER)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    anchors = torch.tensor([smallest, 0.0], dtype=dtype, device=device)
    a = torch.tensor([[0.0, smallest, -smallest, 3 * smallest]], dtype=dtype, device=device)
    assert a[0, 1] > 0
    assert attnkern.anchor_quantize(a, anchors, backend=backend).indices.tolist() == [[1, 0, 1, 0]]


RECTANGLES = {  # centre row, centre column, half height, half width, angle
    "enormous": (0.4, 0.6, 1e30, 1e25, 0.3),
    "largest": (0.4, 0.6, 3e38, 3e38, 0.3),
    "tiny": (0.5, 0.5, 1e-30, 1e-38, 0.7),
    "zero": (0.0, 0.0, 0.0, 0.0, 0.0),
    "negative": (-0.5, -0.25, -0.7, -0.6, -0.2),
    "turned by a million": (0.5, 0.45, 0.3, 0.2, 1e6),
    "turned back by a million": (0.5, 0.45, 0.3, 0.2, -1e6),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("parameters", RECTANGLES.values(), ids=RECTANGLES)
def test_rectangles_of_any_extent_and_angle(parameters, rescale, dtype, backend, device):
    """The map and dx of float64; gradients finite; an extent below its floor has none."""
    r = torch.tensor([parameters], dtype=dtype, device=device)
    x = make("window_attention", 1, 3, (5, 7), dtype=dtype, device=device)["x"]
    options = {"rescale": rescale}
    found = run("window_attention", {"x": x, "rectangle": r}, backend=backend, **options)
    expected = run("window_attention", doubles({"x": x, "rectangle": r}), backend="reference", **options)
    floored = min(map(abs, parameters[2:4])) < 1e-6
    names = ["output", "map"] if floored else list(found)
    if dtype == torch.float64 or not floored:
        # A gradient by an angle of 1e6 is that of the angle which float32 holds: it is in the inputs of both.
        check({name: found[name] for name in names}, {name: expected[name] for name in names})
    assert all(result.isfinite().all() for result in found.values())
    if floored:
        assert not found["grad_rectangle"][0, 2:4].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("scale", [0, 0.0, -1.0, -6.0, 1e4, -1e4])
def test_any_scale(scale, rescale, dtype, backend, device):
    """0 is a constant map, a negative scale turns the window inside out, a huge one is a step."""
    tensors = make("window_attention", 2, 3, SIZE, dtype=dtype, device=device)
    options = {"scale": scale, "rescale": rescale}
    found = run("window_attention", tensors, backend=backend, **options)
    expected = run("window_attention", doubles(tensors), backend="reference", **options)
    if abs(scale) < 100 or dtype == torch.float64:
        check(found, expected)
    assert all(result.isfinite().all() for result in found.values())
    if scale == 0:
        torch.testing.assert_close(found["map"], torch.full_like(found["map"], 1 if rescale else 0.25))
        assert not found["grad_rectangle"].any()
    if abs(scale) == 1e4 and not rescale:
        torch.testing.assert_close(found["map"].double(), expected["map"], rtol=0, atol=1e-2)


def test_a_scale_beyond_every_number(backend, device):
    """1e30 is a step still; NaN gives NaN; neither crashes."""
    r = torch.tensor([[0.5, 0.5, 0.4, 0.4, 0.0]], device=device)
    step = attnkern.window_map(r, (3, 3), scale=1e30, rescale=False, backend=backend)
    assert torch.equal(step[0].cpu(), torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert attnkern.window_map(r, (3, 3), scale=math.nan, backend=backend).isnan().all()
    assert attnkern.window_map(r, (3, 3), scale=1e300, rescale=False, backend=backend)[0, 1, 1] == 1


@pytest.mark.parametrize("rescale", [True, False])
def test_an_infinite_scale(rescale, backend, device):
    """A step, where Inf does not meet zero on an edge; the other way round every position is far outside or inside."""
    r = torch.tensor([[0.5, 0.5, 0.4, 0.4, 0.0]], device=device)
    for scale in (math.inf, -math.inf):
        found = attnkern.window_map(r, (3, 3), scale=scale, rescale=rescale, backend=backend)
        expected = attnkern.window_map(r.double(), (3, 3), scale=scale, rescale=rescale, backend="reference")
        assert torch.equal(found.double().nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("order", ["random", "equal"])
@pytest.mark.parametrize("q", [1, 64, 65, pytest.param(1024, marks=large), pytest.param(5000, marks=large)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_many_anchors(function, q, order, dtype, backend, device):
    """Unsorted, or all of them the same, far more than there are elements."""
    tensors = make(function, 2, 3, (5, 6), dtype=dtype, anchors=q, device=device)
    if order == "equal":
        tensors["anchors"].fill_(0.5)
    found = check_run(function, tensors, backend)
    distance = (tensors["a"].double()[..., None] - tensors["anchors"].double()).abs()
    assert torch.equal(found["indices"], distance.argmin(-1))
    assert torch.equal(found["counts"], found["indices"].flatten().bincount(minlength=q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_scores_that_overflow_half(layout, dtype, backend, device):
    """Scores of ±1e8, far beyond float16: float32 all the way, so the attention is a choice of one position."""
    local = make("compatibility_pool", 2, 9, (5, 6), dtype=dtype, layout=layout, device=device)["local"]
    local[:, 0] = torch.arange(-15, 15, device=device).view(5, 6) * 1000
    query = torch.full((2, 9), 0.0, dtype=dtype, device=device)
    query[:, 0] = torch.tensor([8192.0, -8192.0])
    found = run("compatibility_pool", {"local": local, "query": query}, backend=backend)
    scores = local[:, 0].double() * query[:, 0, None, None].double()
    assert found["scores"].abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(found["scores"].double(), scores, rtol=1e-6, atol=0)
    for image, (row, column) in enumerate([(4, 5), (0, 0)]):
        assert found["attention"][image, row, column] == 1
        assert torch.equal(found["pooled"][image], local[image, :, row, column])
    assert found["attention"].isfinite().all()


# --- shapes ----------------------------------------------------------------------------------------------------------


@every_case
def test_every_product_of_zero_and_one(function, options, backend, device):
    """N and C of 0 give empty results and zero gradients, 1 an ordinary one; no position and no anchor raise."""
    for n, c, height, width, q in itertools.product((0, 1), repeat=5):
        tensors = make(function, n, c, (height, width), dtype=torch.float32, anchors=q, device=device)
        if 0 in (height, width) or (q == 0 and "anchors" in tensors):
            with pytest.raises(ValueError, match="at least"):
                call(function, tensors, size=(height, width), backend=backend, **options)
        else:
            check_run(function, tensors, backend, (height, width), **options)


# --- memory ----------------------------------------------------------------------------------------------------------


def odd(tensor, how):
    """The same numbers in memory of another kind; ``overlapping`` gives others, whose storage is shared."""
    match how:
        case "flipped":  # PyTorch has no negative strides: this is a copy, turned before and after
            return tensor.flip(-1).flip(-1)
        case "every other":
            storage = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan).to(tensor)
            storage[..., 1::2] = tensor
            return storage[..., 1::2]
        case "overlapping":  # each row begins one element after the one before
            storage = tensor.flatten()
            strides = [1] * tensor.dim()
            return storage.as_strided(tensor.shape, strides) if storage.numel() else tensor
        case int():
            storage = torch.full((tensor.numel() + how,), torch.nan).to(tensor)
            return storage[how:].view(tensor.shape).copy_(tensor)
    raise ValueError(how)


@pytest.mark.parametrize("how", ["flipped", "every other", "overlapping"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=large)], ids=case_id)
@every_function
def test_odd_strides(function, how, dtype, backend, device):
    """Inputs and gradients; of overlapping inputs the gradient is that of the tensor which they look like."""
    tensors = make(function, 2, 3, SIZE, dtype=dtype, device=device)
    if "rectangle" in tensors:  # numbers that may change places
        tensors["rectangle"] = tensors["rectangle"].abs() * 0.4 + 0.3
    tensors = {name: odd(tensor, how) for name, tensor in tensors.items()}
    options = {"size": SIZE, "backend": backend}
    grads = {k: odd(g, how) if g.dim() else g for k, g in upstream(call(function, tensors, **options)).items()}
    found = run(function, tensors, grads=grads, **options)
    plain, plain_grads = ({k: t.contiguous() for k, t in d.items()} for d in (tensors, grads))
    check(found, run(function, doubles(plain), grads=doubles(plain_grads), **options | {"backend": "reference"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
@every_function
def test_storage_offsets(function, dtype, backend, device, interpreted):
    """Every alignment that an element may have: the bits of an aligned one (the reference: its numbers)."""
    tensors = make(function, 2, 9, (4, 5), dtype=dtype, device=device)
    options = {"size": (4, 5), "backend": backend}
    grads = upstream(call(function, tensors, **options))
    first = run(function, tensors, grads=grads, **options)
    for offset in (1, 7) if interpreted else range(1, 8):
        moved, moved_grads = ({k: odd(t, offset) for k, t in d.items()} for d in (tensors, grads))
        assert next(iter(moved.values())).storage_offset() == offset
        found = run(function, moved, grads=moved_grads, **options)
        if backend == "reference":
            check(found, doubles(first))
        else:
            same(found, first, f"at offset {offset}")


@every_function
def test_gradients_of_another_dtype(function, backend, device):
    """PyTorch casts them to the result's dtype before they come."""
    tensors = make(function, 2, 3, SIZE, dtype=torch.float32, device=device)
    options = {"size": SIZE, "backend": backend}
    grads = upstream(call(function, tensors, **options))
    for dtype in (torch.float64, torch.bfloat16):
        other = {name: grad.to(dtype) for name, grad in grads.items()}
        found = run(function, tensors, grads=other, **options)
        cast = {name: grad.float() for name, grad in other.items()}
        same(found, run(function, tensors, grads=cast, **options), f"with gradients in {dtype}")
        assert all(found[f"grad_{name}"].dtype == torch.float32 for name in tensors)


def test_one_tensor_as_two_arguments(backend, device):
    """The same tensor, or views of one storage, as features and companion: the leaf gets the sum of both gradients."""
    x, flat, tokens = torch.rand(2, 1, 3, 4), torch.rand(5), torch.rand(2, 3, 6)
    rows = torch.rand(2, 1, 1, 5) * 0.5 + 0.25
    calls = {
        "anchor_attention": (x, lambda t: {"x": t, "a": t, "anchors": t[0, 0, 0]}),
        "anchor_quantize": (flat, lambda t: {"a": t, "anchors": t}),
        "window_attention": (rows, lambda t: {"x": t, "rectangle": t.view(2, 5)}),
        "compatibility_pool": (tokens, lambda t: {"local": t, "query": t[:, :, 2]}),
    }
    for function, (tensor, views) in calls.items():

        def gradient(share, tensor, backend, function=function, views=views):
            leaf = tensor.to(device).requires_grad_()
            given = views(leaf)
            if not share:
                given = {name: value.clone() for name, value in given.items()}
            results = call(function, given, backend=backend)
            used = [results[name] for name in FUNCTIONS[function][1]]
            return {"grad": torch.autograd.grad(sum(r.square().sum() for r in used), leaf)[0]}

        check(gradient(True, tensor, backend), gradient(False, tensor.double(), "reference"))


# --- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, used, without",
    [
        ("window_attention", "map", {"x"}),
        ("window_attention", "output", set()),
        ("compatibility_pool", "pooled", set()),
        ("compatibility_pool", "attention", set()),
        ("compatibility_pool", "scores", set()),
    ],
)
def test_only_one_result_used(function, used, without, backend, device):
    """None, not zeros, for an input that the result does not depend on; the anchors' functions: test_transforms."""
    tensors = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
    result = call(function, tensors, backend=backend)[used]
    grads = torch.autograd.grad(result.square().sum(), list(tensors.values()), allow_unused=True)
    assert {name for name, grad in zip(tensors, grads, strict=True) if grad is None} == without


@pytest.mark.kernels
@pytest.mark.parametrize("function, name", ARGUMENTS, ids=case_id)
def test_an_input_changed_before_backward_is_refused(function, name, backend, device):
    """Each of them, also when only another needs a gradient."""
    tensors = make(function, dtype=torch.float32, device=device)
    for wrt in tensors:
        leaves = {k: t.clone().requires_grad_(k == wrt) for k, t in tensors.items()}
        results = call(function, leaves, size=(4, 6), backend=backend)
        total = sum(r.square().sum() for r in results.values() if r.requires_grad)
        with torch.no_grad():
            leaves[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, leaves[wrt])


@pytest.mark.kernels
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_indices_changed_before_backward(function, backend, device):
    """PyTorch's error; the counts are the user's."""
    tensors = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
    result = call(function, tensors, backend=backend)
    result["counts"].zero_()
    result["commitment_loss"].backward(retain_graph=True)
    result["indices"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result["commitment_loss"].backward()


@pytest.mark.kernels
@pytest.mark.parametrize("wrong", [-1, 7, 40, 10**6, -(2**40), 2**62])
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_indices_changed_behind_pytorchs_back(function, wrong, backend, device):
    """By way of .data, which nobody notices: backward takes those that name no anchor for 0, and reads nothing else."""

    def gradients(index):
        tensors = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
        results = call(function, tensors, backend=backend)
        results["indices"].data.fill_(index)
        total = sum(results[name].square().sum() for name in FUNCTIONS[function][1])
        return dict(enumerate(torch.autograd.grad(total, list(tensors.values()))))

    same(gradients(wrong), gradients(0))


CHANGES = {
    "larger": lambda t: torch.ones(*(5 * n for n in t.shape), dtype=t.dtype, device=t.device),
    "smaller": lambda t: t.new_ones((1,) * t.dim()),
    "other dtype": lambda t: t.double(),
    "other dimensions": lambda t: t[None].clone(),
}


@pytest.mark.kernels
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("function, name", ARGUMENTS, ids=case_id)
def test_other_data_before_backward(function, name, change, backend, device):
    """``tensor.data = other``: RuntimeError, since PyTorch does not notice and a kernel would leave its memory."""
    leaves = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
    results = call(function, leaves, size=(4, 6), backend=backend)
    total = sum(r.square().sum() for r in results.values() if r.requires_grad)
    leaves[name].data = CHANGES[change](leaves[name].detach())
    with pytest.raises(RuntimeError, match=r"attnkern: a tensor that backward needs was torch.float32, \(.*and became"):
        total.backward()


@pytest.mark.kernels  # the reference is PyTorch's own graph, which refuses others
@every_function
def test_a_result_changed_before_backward(function, backend, device):
    """relu_() behind a layer: right gradients, or PyTorch's error where the backward pass starts from that result."""
    tensors = make(function, dtype=torch.float32, device=device)

    def gradients(name, change):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        results = call(function, leaves, size=(4, 6), backend=backend)
        results[name] = change(results[name])
        total = sum(results[key].square().sum() for key in FUNCTIONS[function][1])
        return torch.autograd.grad(total, list(leaves.values()))

    refused = {"pooled", "attention"} if function == "compatibility_pool" else set()
    for name in FUNCTIONS[function][1]:
        want = gradients(name, lambda r: (r * 3).relu())
        if name in refused:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(name, lambda r: r.mul_(3).relu_())
        else:
            check(dict(enumerate(gradients(name, lambda r: r.mul_(3).relu_()))), dict(enumerate(want)))


# --- devices ---------------------------------------------------------------------------------------------------------


@every_function
def test_features_elsewhere_than_their_companions(function, backend, device):
    """The features on meta and the rest here: named before anything runs (the other way round: test_errors)."""
    tensors = make(function, dtype=torch.float32, device=device)
    first, *rest = tensors
    moved = tensors | {first: tensors[first].to("meta")}
    if rest:
        with pytest.raises(ValueError, match=rf"{function}: {rest[0]} must be on meta \(as {first}\), got {device}"):
            call(function, moved, backend=backend)
    elif backend != "reference":
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run torch.float32 on meta"):
            call(function, moved, size=SIZE, backend=backend)


# --- threads and processes -------------------------------------------------------------------------------------------


@large
def test_eight_threads_at_once(backend, device):
    """Forward and backward of every function in 8 Python threads, each many times: the bits of one thread alone."""
    # Large enough that each call is threaded itself and that calls overlap.
    work = [
        (case, make(case[0], 2, 24, (17, 19), dtype=torch.float32, device=device, seed=seed), {"size": (17, 19)})
        for seed, case in enumerate(CASES)
    ]

    def everything():
        return [run(case[0], tensors, backend=backend, **case[1], **size) for case, tensors, size in work]

    alone = everything()
    barrier = threading.Barrier(8)

    def loop(_):
        barrier.wait(PATIENCE)
        return [everything() for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in itertools.chain(*pool.map(loop, range(8))):
            for results, expected in zip(found, alone, strict=True):
                same(results, expected, "in a thread")


class Attended(torch.utils.data.Dataset):
    """What data loading may do with the functions: pooled features of an image, and a gradient."""

    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        found = {}
        for function in FUNCTIONS:
            tensors = make(function, 1, 16, (9, 10), dtype=torch.float32, seed=seed)
            results = run(function, tensors, size=(9, 10), backend=self.backend)
            found |= {f"{function}.{name}": result for name, result in results.items()}
        return found


@large
@pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_initialized(), reason="CUDA does not survive a fork")
def test_forked_workers_of_a_data_loader(backend):
    """After the parent has used the functions on several threads of its own."""
    data, threads = Attended(backend), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        big = make("compatibility_pool", 4, 64, (32, 32), dtype=torch.float32)
        run("compatibility_pool", big, backend=backend)  # its threads run now
        here = [data[i] for i in range(len(data))]
        loader = torch.utils.data.DataLoader(
            data, None, num_workers=2, timeout=PATIENCE, multiprocessing_context="fork", persistent_workers=False
        )
        count = 0
        for there, expected in zip(loader, here, strict=True):
            same(there, expected, "in a worker")
            count += 1
        assert count == len(data)
        run("compatibility_pool", big, backend=backend)  # and the parent still works
    finally:
        torch.set_num_threads(threads)


# --- failures --------------------------------------------------------------------------------------------------------


def python(code, **environment):
    """Return code and output of ``code`` in a process of its own."""
    folders = os.pathsep.join((str(Path(__file__).parent), str(Path(attnkern.__file__).parents[1])))
    inherited = {k: v for k, v in os.environ.items() if k not in ("ATTNKERN_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | {"PYTHONPATH": folders} | environment, capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
    # PyTorch writes of exceptions in its C interface to standard error, also where they are caught.
    return done.returncode, (done.stdout + (done.stderr if done.returncode else "")).strip()


#: Address space may grow by so much and no further: from nothing to nearly enough, so that one allocation after the
#: other of a forward and a backward pass is the first that fails.
SCARCE = """
import resource, torch, attnkern
from cases import FUNCTIONS, call, doubles, make, run, upstream

def allow(extra=None):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else used + extra, hard))

torch.set_num_threads(2)
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
size, small = (320, 256), (5, 6)
for function in FUNCTIONS:
    tensors, few = (make(function, 2, 4, s, dtype=torch.float32) for s in (size, small))
    expected = run(function, doubles(few), size=small, backend="reference")
    leaves = {{name: tensor.requires_grad_() for name, tensor in tensors.items()}}
    ends = FUNCTIONS[function][1]
    grads = upstream(call(function, leaves, size=size, backend={backend!r}))
    ended, room = [], 0
    while "nowhere" not in ended:
        results = gradients = None
        where = "forward"
        allow(room)
        try:
            results = call(function, leaves, size=size, backend={backend!r})
            where = "backward"
            gradients = torch.autograd.grad(
                [results[name] for name in ends], list(leaves.values()), [grads[name] for name in ends]
            )
            where = "nowhere"
        except (RuntimeError, MemoryError) as error:
            assert "alloc" in str(error), error
        allow()
        if where not in ended:
            ended.append(where)
        room += {step}
        again = run(function, few, size=small, backend={backend!r})
        assert again.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(again[name].to(want), want, rtol=1e-3, atol=1e-3)
    print(function, *ended)
"""


@large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_ends_midway(backend):
    """Forward or backward raises, on whatever thread the allocation failed, and the next call is right."""
    if backend == "triton":
        pytest.skip("Triton allocates on a GPU only, by PyTorch's allocator")
    # Every block of memory from the system, none from what was freed before.
    # The reference's blocks are MiB large; kernels have small ones, too.
    code = SCARCE.format(backend=backend, step=1 << (20 if backend == "reference" else 18))
    status, found = python(code, MALLOC_MMAP_THRESHOLD_="65536")
    assert status == 0, found
    ended = {function: where for function, *where in map(str.split, found.splitlines())}
    assert ended.keys() == FUNCTIONS.keys()
    for function, where in ended.items():  # what has no features needs nothing in backward that forward had not
        both = ["forward", "backward", "nowhere"]
        assert where == both or (function in ("window_map", "anchor_quantize") and where == ["forward", "nowhere"])


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
    """An error, whose kind is the allocator's, and no crash; the next call is right."""
    interprets = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    assert python(IMPOSSIBLE.format(size=size, backend=backend), **interprets) == (0, "1.0")


@pytest.mark.parametrize("function", ["window_attention", "anchor_attention", "compatibility_pool"])
def test_features_larger_than_any_memory(function, backend, device):
    """One number expanded to 2**50 channels: no output of that size can be had, and the next call is right."""
    tensors = make(function, 1, 1, SIZE, dtype=torch.float32, device=device)
    expected = call(function, tensors, backend=backend)
    first, *_ = tensors
    vast = tensors | {first: tensors[first].expand(1, 2**50, *SIZE)}
    if "query" in vast:
        vast["query"] = vast["query"].expand(1, 2**50)
    with pytest.raises((RuntimeError, MemoryError), match="alloc"):
        call(function, vast, backend=backend)
    same(call(function, tensors, backend=backend), expected, "after a failure")


# --- kernels that cannot be had --------------------------------------------------------------------------------------


@pytest.fixture
def broken_triton(monkeypatch):
    """A Triton that may be chosen here, without native kernels, whose compiler fails."""

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
    """The automatic choice leaves it out after one attempt and one warning; an explicit one always gets the error."""
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


def test_memory_that_ends_says_nothing_of_the_compiler(broken_triton, monkeypatch, device):
    """It comes out, and the next call asks again."""

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
    """Installed and broken: each call that asks for it says so, the automatic choice warns, and the others run."""
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


@large
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", ["window_attention", "anchor_attention", "compatibility_pool"])
def test_tensors_too_large_for_the_caches(function, layout, dtype, backend, device):
    """Written past them: the bits of each image alone, which is not. Rows begin wherever they do."""
    if os.environ.get("ATTNKERN_TEST_CUDA_ON_HOST") == "1":
        pytest.skip("only the CPU's kernels know of caches")
    size = (211, 127)
    c = 40 * 2**20 // (3 * size[0] * size[1] * dtype.itemsize)
    tensors = make(function, 3, c, size, dtype=dtype, layout=layout, device=device)
    grads = upstream(call(function, tensors, backend=backend))
    options = {"wrt": [next(iter(tensors))], "through": FUNCTIONS[function][1][:1], "backend": backend}
    found = run(function, tensors, grads=grads, **options)
    for i in range(3):
        alone = {k: t if k == "anchors" else t[i : i + 1] for k, t in tensors.items()}
        wanted = run(function, alone, grads={k: g[i : i + 1] for k, g in grads.items() if g.dim()}, **options)
        same({k: found[k][i : i + 1] for k in options["through"]}, {k: wanted[k] for k in options["through"]})
        name = f"grad_{options['wrt'][0]}"
        same({name: found[name][i : i + 1]}, {name: wanted[name]}, f"in image {i}")


# --- more than 2**31 elements ----------------------------------------------------------------------------------------


@pytest.mark.kernels
@large
@pytest.mark.skipif(os.environ.get("ATTNKERN_TEST_LARGE") != "1", reason="needs 14 GiB: set ATTNKERN_TEST_LARGE=1")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", ["window_attention", "anchor_attention", "compatibility_pool"])
def test_more_elements_than_an_int32_counts(function, layout, backend, device):
    """Zero but for three channels, the last beyond 2**31: the results are those of the three alone."""
    c, size, picked = 2**17 + 1, (128, 128), [0, 2**16, 2**17]
    few = make(function, 1, 3, size, dtype=torch.bfloat16, device=device)
    first, *_ = few
    vast = torch.zeros(1, c, *size, dtype=torch.bfloat16, device=device)
    if layout == "channels_last":
        vast = torch.zeros(1, *size, c, dtype=torch.bfloat16, device=device).movedim(-1, 1)
    assert vast.numel() > 2**31
    vast[:, picked] = few[first]
    given = few | {first: vast}
    if "query" in few:
        given["query"] = torch.zeros(1, c, dtype=torch.bfloat16, device=device)
        given["query"][:, picked] = few["query"]
    companion = next(name for name in given if name != first)
    given[companion].requires_grad_()
    results = call(function, given, backend=backend)
    name = FUNCTIONS[function][1][0]
    leaves = {key: t.detach().double().requires_grad_(key == companion) for key, t in few.items()}
    expected = call(function, leaves, backend="reference")
    check({name: results[name][:, picked].detach()}, {name: expected[name].detach()})
    (grad,) = torch.autograd.grad(results[name][:, picked[-1:]].float().sum(), given[companion])
    (want,) = torch.autograd.grad(expected[name][:, -1:].sum(), leaves[companion])
    check({"grad": grad[:, picked] if "query" in few else grad}, {"grad": want})
