"""The window in difficult cases: tiny and enormous rectangles, windows off the image, single rows, aspect."""

import math

import pytest
import torch
from cases import case_id, check, run

import attnkern

every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)


def rectangle(*parameters, dtype=torch.float64, device="cpu"):
    return torch.tensor([parameters], dtype=dtype, device=device)


def attend(r, backend, size=(5, 7), **options):
    """Results and gradients of window_attention for one rectangle and ordinary features."""
    x = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return run("window_attention", {"x": x.to(r), "rectangle": r}, backend=backend, **options)


HARD = {  # centre row, centre column, half height, half width, angle
    "off the image": (4.0, -3.0, 0.3, 0.2, 0.4),
    "far off the image": (60.0, 0.5, 0.05, 0.3, 0.0),
    "a sliver": (0.5, 0.5, 1e-4, 0.4, 1.0),
    "larger than the image": (0.4, 0.6, 50.0, 80.0, 0.3),
    "turned by many turns": (0.5, 0.5, 0.3, 0.2, 100.0),
    "negative extents": (0.4, 0.6, -0.3, -0.2, 0.5),
}


@every_dtype
@pytest.mark.parametrize("parameters", HARD.values(), ids=HARD)
def test_hard_rectangles(parameters, dtype, backend, device):
    """A map of mean 1 and its gradients, even where every f underflows: HW·softmax(log f)."""
    r = rectangle(*parameters, dtype=dtype, device=device)
    found = attend(r, backend)
    assert found["map"].mean().item() == pytest.approx(1, rel=1e-5)
    expected = attend(r.double(), "reference")
    if dtype == torch.float64:
        check(found, expected)
    else:
        # log f reaches -1e7 here: what float32 keeps of its differences is the argument's rounding, not the kernel's.
        z = 6 * max((abs(parameters[0]) / parameters[2]) ** 2, (abs(parameters[1]) / parameters[3]) ** 2)
        torch.testing.assert_close(found["map"].double(), expected["map"], rtol=0, atol=35 * max(1e-5, 1e-6 * z))
        assert all(found[name].isfinite().all() for name in found)


@every_dtype
@pytest.mark.parametrize("extent", [0.0, 1e-7, -1e-9])
def test_vanishing_extents_have_a_floor(extent, dtype, backend, device):
    """|σ| below 1e-6 is treated as 1e-6 and has gradient zero; the other gradients do not change."""
    found = attend(rectangle(0.52, 0.31, extent, 0.3, 0.2, dtype=dtype, device=device), backend)
    floored = attend(rectangle(0.52, 0.31, 1e-6, 0.3, 0.2, dtype=dtype, device=device), backend)
    assert found["map"].isfinite().all()
    assert found["map"].mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(found["map"], floored["map"])
    assert found["grad_rectangle"][0, 2] == 0
    assert found["grad_rectangle"].isfinite().all()
    if dtype == torch.float64:
        check(found, attend(rectangle(0.52, 0.31, extent, 0.3, 0.2, device=device), "reference"))


@every_dtype
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("mu, sigma", [(1e9, 1e-6), (-1e12, 1e-3), (1e15, 1.0)])
def test_finite_up_to_1e15(mu, sigma, rescale, dtype, backend, device):
    """Up to |μ|/|σ| of 1e15 the map is finite, and has mean 1 when rescaled."""
    r = rectangle(mu, 0.5, sigma, 0.3, 0.1, dtype=dtype, device=device)
    map = attnkern.window_map(r, (4, 5), rescale=rescale, backend=backend)
    assert map.isfinite().all()
    assert map.mean().item() == pytest.approx(1 if rescale else 0, rel=1e-5)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_beyond_that_never_a_crash(value, index, backend, device):
    """NaN and Inf in one image do not reach the next."""
    rectangles = torch.full((2, 5), 0.5, device=device)
    clean = attnkern.window_map(rectangles, (3, 4), backend=backend)[1]
    rectangles[0, index] = value
    x = torch.ones(2, 2, 3, 4, device=device)
    found = run("window_attention", {"x": x, "rectangle": rectangles}, backend=backend)
    if math.isnan(value):
        assert found["map"][0].isnan().all()
        assert found["output"][0].isnan().all()
    torch.testing.assert_close(found["map"][1], clean)
    assert all(found[name][1].isfinite().all() for name in found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_features_reaches_what_depends_on_it(value, backend, device):
    x = torch.ones(2, 2, 3, 4, device=device)
    x[0, 1, 2, 3] = value
    found = run("window_attention", {"x": x, "rectangle": torch.full((2, 5), 0.5, device=device)}, backend=backend)
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[0, 1, 2, 3] = True
    assert torch.equal(~found["output"].isfinite(), bad)
    assert found["map"].isfinite().all()
    assert found["grad_x"].isfinite().all()
    assert torch.equal(found["grad_rectangle"].isfinite().all(1).cpu(), torch.tensor([False, True]))


@every_dtype
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_an_axis_of_length_one_sits_at_a_half(size, dtype, backend, device):
    """A map of one row equals the middle row of a map of three rows, before rescaling, for any rectangle."""
    r = rectangle(0.3, 0.6, 0.25, 0.4, 0.7, dtype=dtype, device=device)
    three = [3 if length == 1 else length for length in size]
    whole = attnkern.window_map(r, three, rescale=False, backend=backend)
    middle = whole[:, slice(1, 2) if size[0] == 1 else slice(None), slice(1, 2) if size[1] == 1 else slice(None)]
    torch.testing.assert_close(attnkern.window_map(r, size, rescale=False, backend=backend), middle)


@every_dtype
def test_the_rectangle_is_rotated_rows_before_columns(dtype, backend, device):
    """After a quarter turn the half height is along the columns; f is Λ(6)² at the centre and Λ(0)Λ(6) on an edge."""
    r = rectangle(0.5, 0.5, 0.5, 0.25, math.pi / 2, dtype=dtype, device=device)
    map = attnkern.window_map(r, (9, 9), rescale=False, backend=backend)[0].double()
    inside, edge = 1 / (1 + math.exp(-6)), 0.5
    for (row, column), want in {
        (4, 4): inside * inside,
        (4, 0): edge * inside,  # half height 0.5, now across
        (2, 4): edge * inside,  # half width 0.25, now along the rows
        (0, 4): 1 / (1 + math.exp(18)) * inside,
    }.items():
        assert map[row, column].item() == pytest.approx(want, rel=1e-4), (row, column)


@every_dtype
def test_aspect_keeps_a_rectangle_rigid(dtype, backend, device):
    """With aspect, a quarter turn keeps the distance of an edge in pixels, on a map twice as wide as high."""
    upright = rectangle(0.5, 0.5, 0.1, 0.25, 0.0, dtype=dtype, device=device)
    turned = rectangle(0.5, 0.5, 0.1, 0.25, math.pi / 2, dtype=dtype, device=device)
    first, second = (
        attnkern.window_map(r, (21, 41), rescale=False, aspect=True, backend=backend)[0] for r in (upright, turned)
    )
    square = slice(10, 31)
    torch.testing.assert_close(first[:, square], second[:, square].T, rtol=0, atol=1e-5)
    assert not torch.allclose(first, attnkern.window_map(upright, (21, 41), rescale=False, backend=backend)[0])


@pytest.mark.parametrize("aspect", [False, True])
def test_corners_lie_on_two_edges(aspect):
    """At a corner of the rectangle both factors are Λ(0) = 1/2, so f = 1/4."""
    r, size = rectangle(0.5, 0.4, 0.15, 0.2, 0.6), (601, 401)
    map = attnkern.window_map(r, size, rescale=False, aspect=aspect)[0]
    corners = attnkern.rectangle_corners(r, size, aspect=aspect)[0]
    for row, column in corners.round().long().tolist():
        assert map[row, column].item() == pytest.approx(0.25, abs=0.03)
    centre = corners.mean(0)
    torch.testing.assert_close(centre, torch.tensor([0.5 * 600, 0.4 * 400], dtype=torch.float64))


def test_corners_on_an_axis_without_extent():
    corners = attnkern.rectangle_corners(rectangle(0.5, 0.5, 0.2, 0.3, 0.0), (1, 11), aspect=True)[0]
    expected = torch.tensor([[0, 2], [0, 8], [0, 8], [0, 2]], dtype=torch.float64)
    torch.testing.assert_close(corners, expected)


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("size", [(10, 10), (40, 45)], ids=case_id)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("sigma", [0.3, 0.03, 0.01, 1e-3, 1e-6])
def test_gradients_of_thin_windows_do_not_depend_on_the_mean(sigma, mean, size, backend, device, interpreted):
    """A large mean of the incoming gradient or steep slopes do not add rounding noise."""
    g = torch.Generator().manual_seed(0)
    n = 4 if interpreted else 64
    r = torch.rand(n, 5, generator=g)
    r[:, 2:4] = sigma * (0.5 + r[:, 2:4])
    upstream = torch.randn(n, *size, generator=g) + mean

    def gradient(r, backend):
        r = r.to(device).requires_grad_()
        map = attnkern.window_map(r, size, backend=backend)
        return torch.autograd.grad(map, r, upstream.to(map))[0].double()

    exact = gradient(r.double(), "reference")
    # In float32 the weights of the few positions of a thin window are uncertain by some thousandths.
    assert (gradient(r, backend) - exact).abs().max() <= 5e-3 * exact.abs().max() + 1e-6
