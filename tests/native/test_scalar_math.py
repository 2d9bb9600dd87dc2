"""The scalar mathematics that CPU and CUDA kernels share: errors in units in the last place, and extreme arguments."""

import importlib.util
import math
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from attnkern import reference

ROOT = Path(__file__).parents[2]
TYPES = {"float32": np.float32, "float64": np.float64}

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and (ROOT / "CMakeLists.txt").exists()), reason="needs CMake"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The module, built by CMake from csrc's headers."""
    folder = tmp_path_factory.mktemp("scalar_math")
    configure = ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", "-DATTNKERN_CHECK=OFF"]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (library,) = folder.glob("scalar_math.*")
    spec = importlib.util.spec_from_file_location("scalar_math", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=TYPES)
def precision(request, built):
    """The functions in one precision, and its dtype."""
    return getattr(built, request.param), TYPES[request.param]


def ulps(got, want):
    """Largest error in units in the last place of the results' dtype; ``want`` is in a wider one."""
    return float(np.max(np.abs(got.astype(np.longdouble) - want) / np.spacing(np.abs(want).astype(got.dtype))))


# --- elementary functions --------------------------------------------------------------------------------------------


def test_exponential(precision):
    f, dtype = precision
    low, high = (-87, 88.7) if dtype == np.float32 else (-708, 709)
    x = np.concatenate([np.linspace(low, high, 400_001), np.linspace(-1, 1, 100_001)]).astype(dtype)
    assert ulps(f.exponential(x), np.exp(x.astype(np.longdouble))) <= 1.1


def test_exponential_at_its_edges(precision):
    f, dtype = precision
    x = np.array([0, -0.0, np.inf, -np.inf, 1000, -1000], dtype)
    assert f.exponential(x).tolist() == [1, 1, math.inf, 0, math.inf, 0]
    assert math.isnan(f.exponential(dtype(math.nan)))
    denormal = np.linspace(-103, -88, 10_001).astype(np.float32) if dtype == np.float32 else np.array([-740.0, -709.5])
    error = np.abs(f.exponential(denormal) - np.exp(denormal.astype(np.longdouble)))
    assert (error <= 1.1 * np.finfo(dtype).smallest_subnormal).all()


def test_log1p_unit(precision):
    f, dtype = precision
    y = np.concatenate([np.linspace(0, 1, 200_001), np.logspace(-44, 0, 50_001)]).astype(dtype)
    y = y[y > 0]
    assert ulps(f.log1p_unit(y), np.log1p(y.astype(np.longdouble))) <= 2
    assert f.log1p_unit(dtype(0)) == 0
    assert math.isnan(f.log1p_unit(dtype(math.nan)))


def test_split_sigmoid(precision):
    """Λ(p) = e^exponent · fraction, and Λ(-p), to a few units in the last place, where they would overflow as well."""
    f, dtype = precision
    p = np.concatenate([np.linspace(-80, 80, 200_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(dtype)
    wide = p.astype(np.longdouble)
    exponent, fraction = f.sigmoid_exponent(p), f.sigmoid_fraction(p)
    found = np.exp(exponent.astype(np.longdouble)) * fraction
    error = np.abs(found * (1 + np.exp(-wide)) - 1) / np.finfo(dtype).eps
    assert (error <= (2 if dtype == np.float32 else 2 + np.abs(exponent))).all()  # in float64 the exponent is rounded
    assert (exponent <= 0).all()
    assert (exponent >= np.minimum(p, 0) - math.log(2) * (1 + np.finfo(dtype).eps)).all()
    assert (fraction >= 0.5).all()
    assert (fraction <= 1).all()
    assert ulps(f.sigmoid_complement(p), np.exp(-np.maximum(wide, 0)) / (1 + np.exp(-np.abs(wide)))) <= 4
    huge = np.array([1e30, -1e30, np.inf, -np.inf], dtype)
    assert f.sigmoid_exponent(huge).tolist() == [0, dtype(-1e30), 0, -math.inf]
    assert f.sigmoid_fraction(huge).tolist() == [1, 1, 1, 1]
    assert f.sigmoid_complement(huge).tolist() == [0, 1, 0, 1]
    assert math.isnan(f.sigmoid_fraction(dtype(math.nan)) * f.sigmoid_exponent(dtype(math.nan)))
    assert math.isnan(f.sigmoid_complement(dtype(math.nan)))


# --- window ----------------------------------------------------------------------------------------------------------


def test_coordinates(precision):
    f, _ = precision
    assert [f.coordinate(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert f.coordinate(0, 1) == 0.5


OUTLINES = ("rectangles", "ellipses")
HEIGHT, WIDTH, SCALE = 7, 4, 6.0


def points(count, windows, dtype):
    """Rectangles (count, windows, 5), pixels of the map, and their coordinates."""
    generator = np.random.default_rng(windows)
    low, high = [-0.2, -0.2, 0.1, 0.1, -3], [1.2, 1.2, 0.8, 0.8, 3]
    rectangles = generator.uniform(low, high, (count, windows, 5)).astype(dtype)
    rows, columns = generator.integers(0, HEIGHT, count), generator.integers(0, WIDTH, count)
    return rectangles, rows, columns, np.stack([rows / (HEIGHT - 1), columns / (WIDTH - 1)], 1).astype(dtype)


def logarithm_and_slopes(rectangles, rows, columns, aspect, outline):
    """log f and ∂log f/∂β of windows or unions at pixels, by autograd of the reference in float64."""
    beta = torch.from_numpy(rectangles).double().requires_grad_()
    z = reference.log_window(beta[..., None, None], HEIGHT, WIDTH, SCALE, aspect, outline == "ellipses")
    z = z[torch.arange(len(rectangles)), rows, columns]
    (slopes,) = torch.autograd.grad(z.sum(), beta)
    return torch.cat([z.detach()[:, None], slopes.flatten(1)], 1).numpy()


@pytest.mark.parametrize("outline", OUTLINES)
@pytest.mark.parametrize("aspect", [False, True])
@pytest.mark.parametrize("windows", [1, 2, 5])
def test_logarithms_and_their_derivatives(windows, aspect, outline, precision):
    """log f, 1 - f and ∂log f/∂β of a window and of unions at pixels of a map."""
    f, dtype = precision
    rectangles, rows, columns, at = points(500, windows, dtype)
    functions = [f"unions_of_{outline}"] + [f"windows_of_{outline}"] * (windows == 1)
    want = logarithm_and_slopes(rectangles, rows, columns, aspect, outline)
    for name in functions:
        found = getattr(f, name)(rectangles, at, HEIGHT, WIDTH, SCALE, aspect).astype(np.float64)
        logarithm, outside = found[:, 0] + np.log(found[:, 1]), found[:, 2]
        tolerance = 1e-11 if dtype == np.float64 else 3e-5
        scales = np.maximum(1, np.abs(want).max(1, keepdims=True))
        assert (np.abs(np.column_stack([logarithm, found[:, 3:]]) - want) <= tolerance * scales).all(), name
        np.testing.assert_allclose(outside, -np.expm1(want[:, 0]), rtol=tolerance * 10, atol=tolerance, err_msg=name)
        assert (found[:, 0] <= 0).all()


@pytest.mark.parametrize("outline", OUTLINES)
def test_shares_of_a_union(outline, precision):
    """Where windows are almost 1 or almost 0: ∂log f/∂log f_k = f_k/f · Π_{j≠k} (1 - f_j)."""
    f, dtype = precision
    row = [0.5, 0.5, 0.3, 0.2, 0.3]
    far, wide = [40.0, 0.5, 0.3, 0.2, 0.3], [0.5, 0.5, 50.0, 60.0, 0.3]
    for windows, scale in (([row, row], 60.0), ([far, far], 6.0), ([wide, row], 6.0), ([far, wide, row], -2.0)):
        rectangles = np.array([windows], dtype)
        at = np.full((1, 2), 0.4, dtype)
        found = getattr(f, f"unions_of_{outline}")(rectangles, at, HEIGHT, WIDTH, scale, False)[0]
        assert np.isfinite(found).all()
        beta = torch.tensor([windows], dtype=torch.float64, requires_grad=True)
        at = [torch.full((), float(dtype(0.4)), dtype=torch.float64)] * 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "coordinates", lambda length, like, at=at: at[0][None])
            z = reference.log_window(beta[..., None, None], 1, 1, scale, False, outline == "ellipses")
        (slopes,) = torch.autograd.grad(z.sum(), beta)
        want = slopes.numpy().ravel()
        # In float32 exponents of some thousand are wrong in the fourth digit.
        np.testing.assert_allclose(found[3:], want, rtol=2e-3 if dtype == np.float32 else 1e-9, atol=1e-25)


@pytest.mark.parametrize("outline", OUTLINES)
def test_the_floor_of_an_extent_has_no_slope(outline, precision):
    f, dtype = precision
    rectangles = np.array([[[0.5, 0.5, s, 0.3, 0.2]] for s in (0, 1e-9, -1e-7, 1e-6)], dtype)
    found = getattr(f, f"windows_of_{outline}")(rectangles, np.full((4, 2), 0.25, dtype), 5, 5, 6.0, False)
    assert np.isfinite(found).all()
    assert (found[:3, 5] == 0).all()
    assert (found[:, :3] == found[0, :3]).all()


# --- quantize --------------------------------------------------------------------------------------------------------


def test_thresholds_are_the_smallest_numbers_that_prefer_hi(built):
    """In exact arithmetic the threshold is nearer to hi, or a tie that hi wins; its predecessor is not."""
    generator = np.random.default_rng(1)
    lo = generator.uniform(-1, 1, 500)
    ulp = np.spacing(np.abs(lo))
    steps = [generator.uniform(1e-9, 1, 200), ulp[200:350], 2 * ulp[350:]]
    hi = lo + np.concatenate(steps)
    for first in (False, True):
        for a, b, t in zip(lo, hi, built.threshold(lo, hi, first), strict=True):

            def prefers_hi(x, a=a, b=b, first=first):
                to_lo, to_hi = abs(Fraction(x) - Fraction(a)), abs(Fraction(b) - Fraction(x))
                return to_hi < to_lo or (to_hi == to_lo and first)

            assert prefers_hi(t)
            assert not prefers_hi(np.nextafter(t, -np.inf))


def test_thresholds_of_extreme_anchors(built):
    largest = np.finfo(np.float64).max
    assert built.threshold(-math.inf, 0.0, False) == -largest  # every finite number prefers 0
    assert built.threshold(0.0, math.inf, False) == math.inf
    assert built.threshold(-math.inf, math.inf, True) == -largest
    assert built.threshold(-math.inf, math.inf, False) == math.inf
    assert math.isfinite(built.threshold(0.9 * largest, largest, False))


def test_round_up(built):
    """The smallest float32 that is not below a float64."""
    values = np.random.default_rng(2).uniform(-2, 2, 10_000)
    rounded = built.float32.round_up(values)
    assert rounded.dtype == np.float32
    assert (rounded.astype(np.float64) >= values).all()
    assert (np.nextafter(rounded, np.float32(-np.inf)).astype(np.float64) < values).all()
    assert built.float32.round_up(0.5) == 0.5
    assert built.float32.round_up(math.inf) == math.inf


def test_commitment_grad(precision):
    f, dtype = precision
    assert f.commitment_grad(dtype(0.75), dtype(0.5), dtype(3), dtype(4)) == 0.375


# --- pool ------------------------------------------------------------------------------------------------------------


def test_softmax_weight(precision):
    f, dtype = precision
    infinity = dtype(math.inf)
    assert f.softmax_weight(dtype(2), dtype(2)) == 1
    assert f.softmax_weight(dtype(-1e4), dtype(1e4)) == 0
    assert f.softmax_weight(-infinity, dtype(0)) == 0
    assert f.softmax_weight(-infinity, -infinity) == 0  # before the first score
    assert math.isnan(f.softmax_weight(dtype(math.nan), dtype(0)))
    assert math.isnan(f.softmax_weight(infinity, infinity))


def test_score_grad(precision):
    f, dtype = precision
    assert f.score_grad(dtype(0.25), dtype(3), dtype(1), dtype(0.5)) == 1
