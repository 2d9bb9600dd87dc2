"""Several windows and ellipses: the union, one window with an axis, extreme windows, and the reference's logarithm."""

import math

import mpmath
import pytest
import torch
from cases import MAPS, WINDOWS, case_id, check, check_run, doubles, make, run, same
from conftest import every_dtype, large

import attnkern
from attnkern import reference

every_shape = pytest.mark.parametrize("shape", ["rectangle", "ellipse"])
full_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
SIZE = (5, 7)


def windows(*rows, dtype=torch.float64, device="cpu"):
    """One image with these windows."""
    return torch.tensor([rows], dtype=dtype, device=device)


def attend(rectangle, backend, **options):
    """Results and gradients of window_attention for ordinary features."""
    x = torch.randn(len(rectangle), 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return run("window_attention", {"x": x.to(rectangle), "rectangle": rectangle}, backend=backend, **options)


# --- what a union is -------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@every_shape
@pytest.mark.parametrize("options", [{}, pytest.param({"rescale": False, "aspect": True}, marks=large)], ids=case_id)
@every_dtype
@pytest.mark.parametrize("function", ["window_map", "window_attention"])
def test_one_window_with_an_axis(function, dtype, options, shape, backend, device):
    """(N, 1, 5) gives the bits of (N, 5)."""
    tensors = make(function, 2, 9, SIZE, dtype=dtype, device=device)
    options = options | {"size": SIZE, "shape": shape, "backend": backend}
    plain = run(function, tensors, **options)
    found = run(function, tensors | {"rectangle": tensors["rectangle"][:, None]}, **options)
    assert found["grad_rectangle"].shape == (2, 1, 5)
    same(found | {"grad_rectangle": found["grad_rectangle"][:, 0]}, plain)


@every_shape
@full_precision
def test_the_union_of_single_maps(dtype, shape, backend, device):
    """f = 1 - Π (1 - f_k), from the maps of the windows one by one."""
    rectangle = make("window_map_many", 2, dtype=dtype, device=device)["rectangle"]
    options = {"rescale": False, "shape": shape, "backend": backend}
    single = [attnkern.window_map(rectangle[:, k], SIZE, **options).double() for k in range(3)]
    wanted = 1 - torch.stack([1 - f for f in single]).prod(0)
    found = attnkern.window_map(rectangle, SIZE, **options).double()
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-13}
    torch.testing.assert_close(found, wanted, **tolerance)
    scaled = attnkern.window_map(rectangle, SIZE, shape=shape, backend=backend).double()
    wanted = wanted / wanted.mean((1, 2), keepdim=True)
    torch.testing.assert_close(scaled, wanted, **tolerance)


@every_shape
@full_precision
@pytest.mark.parametrize("function", [MAPS[1], WINDOWS[1]])
def test_the_order_of_windows_does_not_matter(function, dtype, shape, backend, device):
    tensors = make(function, 2, 4, SIZE, dtype=dtype, device=device)
    order = [2, 0, 1]
    options = {"size": SIZE, "shape": shape, "backend": backend}
    plain = run(function, tensors, **options)
    found = run(function, tensors | {"rectangle": tensors["rectangle"][:, order]}, **options)
    plain["grad_rectangle"] = plain["grad_rectangle"][:, order]
    check(found, doubles(plain))


@pytest.mark.pairs
@every_shape
@pytest.mark.parametrize("count", [2, 5, 40])
@pytest.mark.parametrize("function", [MAPS[1], WINDOWS[1]])
@full_precision
def test_numbers_of_windows(dtype, function, count, shape, backend, device):
    """Any number, also more than the kernels keep at a time."""
    tensors = make(function, 2, 4, SIZE, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(count)
    low, high = torch.tensor([0.0, 0, 0.05, 0.05, -1.5]), torch.tensor([1.0, 1, 0.3, 0.3, 1.5])
    rectangle = low + (high - low) * torch.rand(2, count, 5, generator=generator)
    check_run(function, tensors | {"rectangle": rectangle.to(device, dtype)}, backend, SIZE, shape=shape)


@every_shape
@full_precision
def test_equal_windows_have_equal_gradients(dtype, shape, backend, device):
    """They never part, because nothing tells them apart."""
    row = (0.4, 0.6, 0.25, 0.2, 0.3)
    found = attend(windows(row, row, row, row, dtype=dtype, device=device), backend, shape=shape)
    gradient = found["grad_rectangle"][0].double()
    assert gradient.abs().max() > 0
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(gradient, gradient[:1].expand(4, 5), rtol=0, atol=tolerance * gradient.abs().max())


@every_shape
@full_precision
def test_a_union_is_at_most_one(dtype, shape, backend, device, interpreted):
    """Also where many windows that are 1 up to rounding are added."""
    generator = torch.Generator().manual_seed(0)
    rectangle = (
        torch.rand(4 if interpreted else 64, 16, 5, generator=generator) * torch.tensor([1.0, 1.0, 0.9, 0.9, 3.0])
        + 0.05
    )
    map = attnkern.window_map(rectangle.to(device, dtype), SIZE, rescale=False, shape=shape, backend=backend)
    assert map.max() <= 1
    assert map.min() >= 0


@every_shape
@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_errors_do_not_depend_on_how_small_the_windows_are(count, shape, backend, device, interpreted):
    """Relative errors of f in float32, for exact exponents: 1 - Π (1 - f_k) would lose all digits of a small f."""
    images = 16 if interpreted else 2000 // count
    rectangle = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0]).repeat(images, count, 1)
    steps = torch.randint(-40, 105, (images, count, 2), generator=torch.Generator().manual_seed(count))
    rectangle[..., :2] = steps / 64
    options = {"rescale": False, "shape": shape}
    exact = attnkern.window_map(rectangle.double(), (1, 1), backend="reference", **options)
    found = attnkern.window_map(rectangle.to(device), (1, 1), backend=backend, **options).double().cpu()
    # Kernels that keep log f have its error: some units in the last place of the exponent.
    exponents = exact.log().abs() + 6
    assert ((found - exact).abs() <= torch.finfo(torch.float32).eps * exponents * exact).all()
    assert count > 2 or exact.min() < (1e-6 if interpreted else 1e-12)


# --- extremes --------------------------------------------------------------------------------------------------------


@every_shape
@full_precision
def test_a_window_that_the_others_outweigh(dtype, shape, backend, device):
    """A window far off the map adds nothing to the others, and has no gradient."""
    row, far = (0.4, 0.6, 0.25, 0.2, 0.3), (80.0, -50.0, 0.1, 0.1, 0.0)
    alone = attend(windows(row, dtype=dtype, device=device), backend, shape=shape)
    for rows, place in (((row, far), 0), ((far, row), 1)):
        found = attend(windows(*rows, dtype=dtype, device=device), backend, shape=shape)
        assert not found["grad_rectangle"][0, 1 - place].any()
        found["grad_rectangle"] = found["grad_rectangle"][:, place : place + 1]
        check(found, doubles(alone))


FAR = {  # every f underflows in float32
    "on one side": ((4.0, -3.0, 0.3, 0.25, 0.4), (4.5, -3.0, 0.35, 0.25, 0.0)),
    "on two sides": ((-3.0, 0.5, 0.3, 0.3, 0.2), (4.0, 0.5, 0.3, 0.3, 0.2)),
    "slivers": ((0.5, 0.5, 1e-4, 0.4, 1.0), (0.3, 0.6, 1e-4, 0.4, -0.5)),
    "far and near": ((60.0, 0.5, 0.05, 0.3, 0.0), (0.5, 0.5, 0.2, 0.3, 0.0)),
    "below the floor": ((0.52, 0.31, 0.0, 0.3, 0.2), (0.1, 0.9, 1e-9, -1e-7, 0.2)),
}


@every_shape
@full_precision
@pytest.mark.parametrize("rows", FAR.values(), ids=FAR)
def test_finite_where_every_window_underflows(rows, dtype, shape, backend, device):
    """The rescaled map has mean 1; gradients are finite, and in float64 those of the reference."""
    rectangle = windows(*rows, dtype=dtype, device=device)
    found = attend(rectangle, backend, shape=shape)
    assert found["map"].mean().item() == pytest.approx(1, rel=1e-5)
    assert all(result.isfinite().all() for result in found.values())
    if dtype == torch.float64:
        check(found, attend(rectangle, "reference", shape=shape))
    plain = attend(rectangle, backend, shape=shape, rescale=False)
    assert all(result.isfinite().all() for result in plain.values())
    assert 0 <= plain["map"].min() <= plain["map"].max() <= 1


@every_shape
@full_precision
def test_no_gradient_on_a_plateau(dtype, shape, backend, device):
    """Where two windows are both 1 up to rounding, no window moves the map: the others cover it."""
    big = (0.5, 0.5, 60.0, 80.0, 0.2)
    found = attend(windows(big, big, (0.3, 0.4, 0.2, 0.2, 0.0), dtype=dtype, device=device), backend, shape=shape)
    torch.testing.assert_close(found["map"], torch.ones_like(found["map"]), rtol=0, atol=1e-4)
    lone = attend(windows((0.3, 0.4, 0.2, 0.2, 0.0), dtype=dtype, device=device), backend, shape=shape)
    assert found["grad_rectangle"].abs().max() < 1e-2 * lone["grad_rectangle"].abs().max()
    check(found, attend(windows(big, big, (0.3, 0.4, 0.2, 0.2, 0.0), device=device), "reference", shape=shape))


@every_shape
@pytest.mark.parametrize("index", range(5))
def test_nan_in_one_window(index, shape, backend, device):
    """It is NaN in the whole image, and does not reach the next one."""
    rectangle = make("window_map_many", 2, dtype=torch.float32, device=device)["rectangle"]
    clean = attend(rectangle, backend, shape=shape)
    rectangle = rectangle.clone()
    rectangle[0, 1, index] = math.nan
    found = attend(rectangle, backend, shape=shape)
    assert found["map"][0].isnan().all()
    same({name: result[1:] for name, result in found.items()}, {name: result[1:] for name, result in clean.items()})


@every_shape
@full_precision
@pytest.mark.parametrize("scale", [6.0, 60.0, 600.0])
def test_second_derivatives_of_the_reference_are_finite(scale, dtype, shape):
    """Also where windows are far off, steep, or 1 up to rounding."""
    rows = ((0.4, 0.6, 0.25, 0.2, 0.3), (4.0, -3.0, 0.3, 0.25, 0.4), (0.5, 0.5, 60.0, 80.0, 0.2))
    for chosen in (rows[:2], rows[1:2] * 2, rows[::2], rows[2:] * 2, rows):
        leaf = windows(*chosen, dtype=dtype).requires_grad_()
        for rescale in (True, False):
            map = attnkern.window_map(leaf, SIZE, scale=scale, shape=shape, rescale=rescale, backend="reference")
            (first,) = torch.autograd.grad(map.sin().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.sin().sum(), leaf)
            assert first.isfinite().all()
            assert second.isfinite().all()


# --- ellipses --------------------------------------------------------------------------------------------------------


@full_precision
def test_an_ellipse_is_rotated_rows_before_columns(dtype, backend, device):
    """f is Λ(6) at the centre and Λ(0) at the ends of the half axes, which a quarter turn exchanges."""
    r = torch.tensor([[0.5, 0.5, 0.5, 0.25, math.pi / 2]], dtype=dtype, device=device)
    map = attnkern.window_map(r, (9, 9), rescale=False, shape="ellipse", backend=backend)[0].double()
    for (row, column), p in {(4, 4): 6, (4, 0): 0, (2, 4): 0, (2, 0): -6, (0, 4): -18, (4, 6): 4.5}.items():
        assert map[row, column].item() == pytest.approx(1 / (1 + math.exp(-p)), rel=1e-4), (row, column)


# --- the reference's logarithm of a union ----------------------------------------------------------------------------


def precise(logits):
    """log f and its derivatives by log f_k, for f_k = Λ(p_k), with 60 digits."""
    with mpmath.workdps(60):
        inside = [1 / (1 + mpmath.exp(-mpmath.mpf(p))) for p in logits]
        outside = [1 / (1 + mpmath.exp(mpmath.mpf(p))) for p in logits]
        product = mpmath.fprod(outside)
        f = 1 - product
        shares = [own / f * product / rest for own, rest in zip(inside, outside, strict=True)]
        return float(mpmath.log(f)), [float(share) for share in shares]


def logits_around(f, count):
    """Logits at which all of ``count`` windows are f, and one of them somewhat less or more."""
    p = math.log(f / (1 - f))
    return [[p + shift] + [p] * (count - 1) for shift in (-1.0, -1e-3, 0.0, 1e-3, 1.0)]


@pytest.mark.parametrize("count", [2, 5])
@full_precision
def test_log_union_on_both_sides_of_its_thresholds(dtype, count):
    """Errors are a few units in the last place around each threshold, and in between; shares add what they should."""
    eps = torch.finfo(dtype).eps
    thresholds = {
        "f_k are added": eps / count,
        "log1p(-f_k)": 0.5,
        "log(-expm1) of Σ log(1 - f_k) = -1": -math.expm1(-1 / count),
    }
    rows = [row for f in thresholds.values() for row in logits_around(f, count)]
    rows += [[p] * count for p in range(-60, 30, 3)] + [[-50.0] + [float(p)] * (count - 1) for p in range(-80, 30, 5)]
    logits = torch.tensor(rows, dtype=dtype)
    z = torch.nn.functional.logsigmoid(logits)
    beside = torch.nn.functional.logsigmoid(-logits)
    leaf = z.clone().requires_grad_()
    # 1 - f_k depends on f_k: d log(1 - f)/d log f = -f/(1 - f).
    outside = beside + (leaf - z) * -(z - beside).exp()
    found = reference._log_union(leaf, outside)
    (shares,) = torch.autograd.grad(found.sum(), leaf)
    for row, got, share in zip(logits.tolist(), found.tolist(), shares.tolist(), strict=True):
        wanted, derivatives = precise(row)
        # An exponent's error is that of the exponential in units of its last place.
        exponents = 1 + sum(map(abs, row))
        assert abs(got - wanted) <= 4 * eps * exponents * abs(wanted) + 1e-30, row
        for a, b in zip(share, derivatives, strict=True):
            assert abs(a - b) <= 4 * eps * exponents * abs(b) + 1e-30, row
    assert found.isfinite().all()
    assert shares.isfinite().all()
