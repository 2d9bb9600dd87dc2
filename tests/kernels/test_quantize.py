"""The nearest anchor is exact: ties, duplicates, neighbours one ulp apart, every half-precision number, NaN and Inf."""

import math
from fractions import Fraction
from random import Random

import pytest
import torch
from cases import case_id, check, doubles, lay, make, nearest, run
from conftest import every_dtype

import attnkern


def check_exact(a, anchors, backend, function="anchor_quantize"):
    """Compare indices, values and counts with exact arithmetic."""
    if function == "anchor_attention":
        a = a.view(1, 1, 1, -1)
        tensors = {"x": torch.ones(1, 2, 1, a.numel(), dtype=a.dtype, device=a.device), "a": a, "anchors": anchors}
    else:
        tensors = {"a": a, "anchors": anchors}
    found = run(function, tensors, backend=backend, reduction="sum", through=("anchor_loss",))
    expected = [nearest(element, anchors.tolist()) for element in a.flatten().tolist()]
    assert found["indices"].flatten().tolist() == expected
    dead, poisoned = a.isnan(), bool(anchors.isnan().any())
    values = anchors[found["indices"]].to(a.dtype).masked_fill(dead | poisoned, math.nan)
    torch.testing.assert_close(found["values"], values, rtol=0, atol=0, equal_nan=True)
    counted = [i for i, element in zip(expected, a.flatten().tolist(), strict=True) if not math.isnan(element)]
    counts = [0 if poisoned else counted.count(k) for k in range(len(anchors))]
    assert found["counts"].tolist() == counts
    return found


# --- exactness -------------------------------------------------------------------------------------------------------


def ulps(start, count, dtype):
    """``count`` neighbouring numbers of ``dtype`` from ``start`` on."""
    numbers = [torch.tensor(start, dtype=dtype)]
    while len(numbers) < count:
        numbers.append(torch.nextafter(numbers[-1], torch.tensor(math.inf, dtype=dtype)))
    return [number.item() for number in numbers]


TRAPS = {  # a, anchors; both are rounded to the dtype first
    "difference that rounds to a tie": ([1.0, -1.0, 0.0], [-1e-9, 1e-9]),
    "the same, reversed": ([1.0, -1.0, 0.0], [1e-9, -1e-9]),
    "midpoints, ascending": ([0.125, 0.375, 0.625, 0.875], [0, 0.25, 0.5, 0.75, 1]),
    "midpoints, descending": ([0.125, 0.375, 0.625, 0.875], [1, 0.75, 0.5, 0.25, 0]),
    "midpoints, shuffled": ([0.125, 0.375, 0.625, 0.875], [0.5, 0, 1, 0.25, 0.75]),
    "duplicates": ([0.1, 0.3, 0.7, 0.5, 2.0], [0.7, 0.1, 0.4, 0.1, 0.7, 0.4]),
    "all the same": ([0.0, 1.0, -5.0], [0.5, 0.5, 0.5]),
    "zeros of both signs": ([0.0, -0.0, 1.0, -1.0], [0.0, -0.0]),
    "zeros of both signs, reversed": ([0.0, -0.0, 1.0, -1.0], [-0.0, 0.0]),
    "zeros of both signs among others": ([0.0, -0.0, 0.25, -0.25], [-0.5, -0.0, 0.5, 0.0]),
    "one anchor": ([-3.0, 0.0, 9.0], [0.3]),
    "large": ([6e4, -6e4, 1.0, 2.9e4], [6.5e4, -6.5e4, 6.4e4]),
    "tiny": ([0.0, 6e-8, 1.2e-7, 1.8e-7, -6e-8], [1.2e-7, 0.0, 6e-8]),
}


@pytest.mark.pairs
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
@every_dtype
@pytest.mark.parametrize("a, anchors", TRAPS.values(), ids=TRAPS)
def test_traps(a, anchors, function, dtype, backend, device):
    check_exact(
        torch.tensor(a, dtype=dtype, device=device),
        torch.tensor(anchors, dtype=dtype, device=device),
        backend,
        function,
    )


@pytest.mark.parametrize("order", ["ascending", "descending"])
@every_dtype
def test_anchors_one_ulp_apart(order, dtype, backend, device):
    """Anchors one ulp apart are nearest to themselves; the midpoint of anchors two ulps apart is a tie."""
    chain = ulps(0.7, 9, dtype)
    for anchors in (chain, chain[::2], [0.1, *chain[::4]]):
        anchors = anchors if order == "ascending" else anchors[::-1]
        a = torch.tensor([*chain, 0.0, 1.0], dtype=dtype, device=device)
        check_exact(a, torch.tensor(anchors, dtype=dtype, device=device), backend)


@pytest.mark.parametrize(
    "companion", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.large)], ids=case_id
)
def test_every_half_precision_number(companion, backend, device, interpreted):
    """All 65,536 bit patterns (interpreted: one in 16).

    In float64 their differences to these anchors are exact, so argmin is the truth.
    """
    patterns = torch.arange(-(2**15), 2**15, 16 if interpreted else 1, dtype=torch.int32, device=device)
    a = patterns.to(torch.int16).view(torch.float16).view(64, -1)
    anchors = torch.tensor([0.5, 2e-7, 1.0, -3.0, 0.75, -2e-7, 0.5, 300.0, 1 / 3], device=device).to(companion)
    result = attnkern.anchor_quantize(a, anchors, backend=backend)
    expected = (a.double()[..., None] - anchors.double()).abs().argmin(-1).masked_fill(a.isnan(), 0)
    expected = torch.where(a == math.inf, 7, torch.where(a == -math.inf, 3, expected))
    assert torch.equal(result.indices, expected)
    assert torch.equal(result.counts, expected[~a.isnan()].bincount(minlength=9))


@every_dtype
def test_random_neighbours_of_midpoints(dtype, backend, device):
    """Elements within two ulps of the midpoint of two random anchors."""
    anchors = torch.rand(33, dtype=torch.float64).mul(4).sub(1).to(dtype)
    ordered = anchors.sort().values
    middle = ((ordered[1:].double() + ordered[:-1].double()) / 2).to(dtype)
    infinity = torch.full_like(middle, math.inf)
    above, below = torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)
    check_exact(torch.cat([middle, above, below]).to(device), anchors.to(device), backend)


# --- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
@every_dtype
def test_nan_and_infinite_elements(function, dtype, backend, device):
    """NaN gives value NaN, index 0 and no count, ±Inf the extreme anchor; finite elements are not affected."""
    a = torch.tensor([0.2, math.nan, math.inf, -math.inf, 0.9, math.nan], dtype=dtype, device=device)
    found = check_exact(a, torch.tensor([0.5, 1.0, 0.0, 1.0], dtype=dtype, device=device), backend, function)
    assert found["indices"].flatten().tolist() == [2, 0, 1, 2, 1, 0]
    assert found["anchor_loss"].isnan()
    assert found["commitment_loss"].isnan()


@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
@pytest.mark.parametrize("position", [0, 2])
@every_dtype
def test_a_nan_anchor_poisons_everything(position, function, dtype, backend, device):
    anchors = torch.tensor([0.5, 1.0, 0.0], dtype=dtype, device=device)
    anchors[position] = math.nan
    found = check_exact(torch.tensor([0.2, 0.7, math.inf], dtype=dtype, device=device), anchors, backend, function)
    assert found["anchor_loss"].isnan()


@pytest.mark.parametrize(
    "anchors", [[0.5, math.inf], [-math.inf, 0.5, math.inf], [math.inf, -math.inf], [math.inf] * 2]
)
@every_dtype
def test_infinite_anchors_attract_only_infinities(anchors, dtype, backend, device):
    a = torch.tensor([0.0, 1e4, -1e4, math.inf, -math.inf], dtype=dtype, device=device)
    check_exact(a, torch.tensor(anchors, dtype=dtype, device=device), backend)


def test_nan_gradients_stay_with_their_elements(backend, device):
    """A NaN or Inf element does not change the gradients of the other elements."""
    x, a = torch.randn(1, 3, 2, 4, device=device), torch.rand(1, 1, 2, 4, device=device)
    tensors = {"x": x, "a": a, "anchors": torch.tensor([0.2, 0.8], device=device)}
    through = ("output", "values")
    clean = run("anchor_attention", tensors, backend=backend, through=through)
    dirty = a.clone()
    dirty[0, 0, 0, 1], dirty[0, 0, 1, 2] = math.nan, math.inf
    found = run("anchor_attention", tensors | {"a": dirty}, backend=backend, through=through)
    kept = dirty.isfinite()
    torch.testing.assert_close(found["grad_a"][kept], clean["grad_a"][kept])
    torch.testing.assert_close(found["output"][kept.expand_as(x)], clean["output"][kept.expand_as(x)])
    assert found["output"][0, :, 0, 1].isnan().all()


# --- losses, gradients, shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4), (2, 1, 3, 4), (2, 3, 2, 2, 2), (0,), (0, 3)])
def test_any_shape_with_n_first(shape, backend, device):
    a, anchors = torch.rand(shape, device=device), torch.tensor([0.75, 0.25], device=device)
    found = run("anchor_quantize", {"a": a, "anchors": anchors}, backend=backend, reduction="batchmean")
    want = torch.where(a >= 0.5, 0.75, 0.25)  # the tie at 0.5 goes to the first anchor
    assert torch.equal(found["values"], want)
    assert torch.equal(found["indices"], (a < 0.5).long())
    loss = (a.double() - want).square().sum() / max(1, shape[0])
    assert found["anchor_loss"].item() == found["commitment_loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    if a.numel() == 0:
        assert found["anchor_loss"] == 0
        assert not found["counts"].any()
        assert not found["grad_anchors"].any()


def test_each_loss_moves_its_own(backend, device):
    """anchor_loss has a gradient for the anchors only, commitment_loss for a only, values for a only, with slope 1."""
    tensors = {"a": torch.rand(3, 7, device=device), "anchors": torch.rand(4, device=device)}
    moved = {}
    for through in ("anchor_loss", "commitment_loss", "values"):
        grads = {through: torch.ones((3, 7) if through == "values" else (), device=device)}
        found = run("anchor_quantize", tensors, through=(through,), grads=grads, backend=backend, reduction="sum")
        moved[through] = {name: gradient for name, gradient in found.items() if name.startswith("grad_")}
    difference = found["values"] - tensors["a"]
    pull = torch.zeros(4, device=device).index_add(0, found["indices"].flatten(), difference.flatten())
    nothing = {"grad_a": None, "grad_anchors": None}
    check(moved["anchor_loss"], nothing | {"grad_anchors": 2 * pull})
    check(moved["commitment_loss"], nothing | {"grad_a": -2 * difference})
    assert torch.equal(moved["values"]["grad_a"], torch.ones_like(difference))
    check({"grad_anchors": moved["values"]["grad_anchors"]}, {"grad_anchors": None})


def test_gradient_through_values_is_one_even_where_nothing_is_finite(backend, device):
    a = torch.tensor([0.3, math.nan, math.inf, -math.inf], device=device)
    for last in (1.0, math.nan):
        anchors = torch.tensor([0.0, last], device=device)
        grads = {"values": torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)}
        found = run("anchor_quantize", {"a": a, "anchors": anchors}, through=("values",), grads=grads, backend=backend)
        assert torch.equal(found["grad_a"], grads["values"])


def test_close_elements_cancel_no_digits(backend, device):
    """Σ(v - a) is summed directly: Q·v - Σa would lose most digits of such small residuals."""
    a = (0.5 + 1e-5 * torch.randn(64, 100, dtype=torch.float64)).float().to(device)
    tensors = {"a": a, "anchors": torch.tensor([0.5, 0.9], device=device)}
    grads = {"anchor_loss": torch.ones((), device=device)}
    options = {"through": ("anchor_loss",), "reduction": "sum"}
    found = run("anchor_quantize", tensors, grads=grads, backend=backend, **options)
    want = run("anchor_quantize", doubles(tensors), grads=doubles(grads), backend="reference", **options)
    error = (found["grad_anchors"].double() - want["grad_anchors"]).abs().max().item()
    assert error <= 4 * torch.finfo(torch.float32).eps * (2 * (a.double() - 0.5).abs().sum().item())


def test_every_midpoint_in_exact_arithmetic(backend, device):
    """Anchors from denormals to the largest numbers, with elements at and next to their midpoints."""
    if backend == "triton":
        pytest.skip("has no float64")
    random = Random(0)
    pool = [0.0, 5e-324, 1e-323, 1.5e-323, 2.2250738585072009e-308, 2.2250738585072014e-308, 4.4501477170144023e-308]
    pool += [1.0, 1.0000000000000002, 1e308, 1.7e308, 1.7976931348623157e308]
    for _ in range(400):
        anchors = [random.choice(pool) * random.choice((1, -1)) for _ in range(random.choice((2, 3, 4)))]
        middles = [float((Fraction(lo) + Fraction(hi)) / 2) for lo in anchors for hi in anchors]
        a = [each for m in middles for each in (m, math.nextafter(m, math.inf), math.nextafter(m, -math.inf))]
        tensors = (torch.tensor(values, dtype=torch.float64, device=device) for values in ([a], anchors))
        found = attnkern.anchor_quantize(*tensors, backend=backend).indices[0].tolist()
        assert found == [nearest(each, anchors) for each in a], anchors


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_halves_round_to_even(dtype, layout, backend, device):
    """Midpoints of neighbouring numbers of a half type, slightly above and below, of both signs, in every binade."""
    step = torch.finfo(dtype).eps / 2
    middle = 1 + step * torch.arange(1, 16, 2)
    beside = torch.cat([torch.nextafter(middle, torch.tensor(bound)) for bound in (0.0, 2.0)])
    anchors = torch.cat([middle, beside, -middle, middle * 2.0**-9, middle * 2.0**9]).to(device)
    a = anchors.reshape(1, 1, 4, -1)
    x = lay(torch.ones(1, 9, *a.shape[2:], dtype=dtype, device=device), layout)
    output = attnkern.anchor_attention(x, a, anchors, residual=False, backend=backend).output
    assert torch.equal(output, a.to(dtype).expand_as(output))


@pytest.mark.parametrize("position", [0, 1, 33, 47])
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_a_nan_element_reaches_the_loss_and_the_first_anchor(function, position, backend, device):
    """A NaN element has index 0, so it makes the gradient of anchor 0 NaN, and no other."""
    tensors = make(function, 2, 3, (4, 6), dtype=torch.float32, device=device)
    tensors["a"].view(-1)[position] = torch.nan
    grads = {"anchor_loss": torch.tensor(0.7, device=device)}
    found = run(function, tensors, through=("anchor_loss",), grads=grads, backend=backend)
    assert found["anchor_loss"].isnan()
    assert found["grad_anchors"].isnan().tolist() == [True] + [False] * 6
    expected = run(function, doubles(tensors), through=("anchor_loss",), grads=doubles(grads), backend="reference")
    check({"grad": found["grad_anchors"]}, {"grad": expected["grad_anchors"]})
