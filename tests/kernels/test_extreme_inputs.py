"""Extreme numbers, rectangles, scales, anchors and sizes: docs/reliability.md."""

import itertools
import math

import pytest
import torch
from cases import FUNCTIONS, POOLS, call, case_id, check, check_run, doubles, make, run, upstream
from conftest import EMULATED, every_case, every_dtype, large

import attnkern

SIZE = (3, 4)
OF_AN_IMAGE = [
    pytest.param(function, name, marks=large if function in POOLS[1:] else ())
    for function, (names, _) in FUNCTIONS.items()
    for name in names
    if name != "anchors"
]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "max", "-max"])
@pytest.mark.parametrize("function, name", OF_AN_IMAGE, ids=case_id)
@every_dtype
def test_an_extreme_number_stays_in_its_image(function, name, value, dtype, backend, device):
    """NaN, ±Inf or the largest number in one image does not change the other image and its gradients.

    NaN spreads exactly as in float64, and so does Inf where the formula defines its effect.
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
    """With ±max among the anchors, the nearest anchor is that of exact arithmetic for all elements."""
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
    """All numbers of all arguments are denormal: nothing is flushed to zero or divided by zero."""
    if interpreted and dtype == torch.bfloat16:
        pytest.skip(INTERPRETER)
    tensors = make(function, 2, 3, SIZE, dtype=dtype, device=device)
    for name in FUNCTIONS[function][0]:
        tensors[name] = (tensors[name].double() * torch.finfo(dtype).tiny / 8).to(dtype)
        assert tensors[name].any()
    options = options | {"size": SIZE}
    grads = upstream(call(function, tensors, **options))
    found = run(function, tensors, grads=grads, backend=backend, **options)
    expected = run(function, doubles(tensors), grads=doubles(grads), backend="reference", **options)
    if "rectangle" in tensors:  # slopes of 1e6 overflow in float16, whose denormals are above the floor of the extents
        gradient, _ = (results.pop("grad_rectangle") for results in (found, expected))
        assert dtype == torch.float16 or not gradient[..., 2:4].any()
    check(found, expected)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    on_gpu = backend == "triton" or (backend == "native" and (EMULATED or device.type == "cuda"))
    if on_gpu and function in POOLS[1:] and dtype != torch.float64:
        smallest = max(smallest, 2.0**-136)  # the last bit of TF32, whose products are used
    tight = {"output", "pooled", "values", "grad_x", "grad_query", "grad_anchors"}
    for name in tight & found.keys():  # the tolerance of check() is far larger than these numbers
        assert expected[name].any() or options.get("residual") is False  # v·x alone underflows
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-2, atol=8 * smallest)
    if function == "anchor_attention" and options.get("residual", True):
        assert torch.equal(found["output"], tensors["x"])  # v·x is far below the last place of x, and x is not flushed


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
    """Zero chooses the anchor 0 and not the smallest number, which comes first and would win a tie."""
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
    """Map and dx are those of float64, gradients are finite, and an extent below its floor has gradient zero."""
    r = torch.tensor([parameters], dtype=dtype, device=device)
    x = make("window_attention", 1, 3, (5, 7), dtype=dtype, device=device)["x"]
    options = {"rescale": rescale}
    found = run("window_attention", {"x": x, "rectangle": r}, backend=backend, **options)
    expected = run("window_attention", doubles({"x": x, "rectangle": r}), backend="reference", **options)
    floored = min(map(abs, parameters[2:4])) < 1e-6
    names = ["output", "map"] if floored else list(found)
    if dtype == torch.float64 or not floored:
        # The rounded angle of 1e6 is the input of both.
        check({name: found[name] for name in names}, {name: expected[name] for name in names})
    assert all(result.isfinite().all() for result in found.values())
    if floored:
        assert not found["grad_rectangle"][0, 2:4].any()


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("scale", [0, 0.0, -1.0, -6.0, 1e4, -1e4])
def test_any_scale(scale, rescale, dtype, backend, device):
    """Scale 0 gives a constant map, a negative scale inverts the window, and a huge scale gives a step."""
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
    """1e30 gives a step, NaN gives NaN, and neither crashes."""
    r = torch.tensor([[0.5, 0.5, 0.4, 0.4, 0.0]], device=device)
    step = attnkern.window_map(r, (3, 3), scale=1e30, rescale=False, backend=backend)
    assert torch.equal(step[0].cpu(), torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert attnkern.window_map(r, (3, 3), scale=math.nan, backend=backend).isnan().all()
    assert attnkern.window_map(r, (3, 3), scale=1e300, rescale=False, backend=backend)[0, 1, 1] == 1


@pytest.mark.parametrize("rescale", [True, False])
def test_an_infinite_scale(rescale, backend, device):
    """A step, except on an edge, where Inf times zero is NaN; with -Inf the step is inverted."""
    r = torch.tensor([[0.5, 0.5, 0.4, 0.4, 0.0]], device=device)
    for scale in (math.inf, -math.inf):
        found = attnkern.window_map(r, (3, 3), scale=scale, rescale=rescale, backend=backend)
        expected = attnkern.window_map(r.double(), (3, 3), scale=scale, rescale=rescale, backend="reference")
        assert torch.equal(found.double().nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.pairs
@pytest.mark.parametrize("order", ["random", "equal"])
@pytest.mark.parametrize("q", [1, 64, 65, pytest.param(1024, marks=large), pytest.param(5000, marks=large)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_many_anchors(function, q, order, dtype, backend, device):
    """Far more anchors than elements, unsorted or all equal."""
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
    """Scores of ±1e8 exceed float16 but are computed in float32, so the attention chooses one position."""
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
    """N or C of 0 gives empty results and zero gradients, 1 ordinary ones; no position or no anchor is an error."""
    for n, c, height, width, q in itertools.product((0, 1), repeat=5):
        tensors = make(function, n, c, (height, width), dtype=torch.float32, anchors=q, device=device)
        if 0 in (height, width) or (q == 0 and "anchors" in tensors):
            with pytest.raises(ValueError, match="at least"):
                call(function, tensors, size=(height, width), backend=backend, **options)
        else:
            check_run(function, tensors, backend, (height, width), **options)
