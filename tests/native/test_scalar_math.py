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


def test_log_sigmoid_and_its_complement(precision):
    """log Λ(p) and Λ(-p) do not overflow, cancel or have a wrong sign."""
    f, dtype = precision
    p = np.concatenate([np.linspace(-80, 80, 200_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(dtype)
    wide = p.astype(np.longdouble)
    assert ulps(f.log_sigmoid(p), -np.log1p(np.exp(-np.abs(wide))) + np.minimum(wide, 0)) <= 4
    assert ulps(f.complement(p), np.exp(-np.maximum(wide, 0)) / (1 + np.exp(-np.abs(wide)))) <= 4
    huge = np.array([1e30, -1e30, np.inf, -np.inf], dtype)
    assert f.log_sigmoid(huge).tolist() == [0, dtype(-1e30), 0, -math.inf]
    assert f.complement(huge).tolist() == [0, 1, 0, 1]
    assert math.isnan(f.log_sigmoid(dtype(math.nan)))
    assert math.isnan(f.complement(dtype(math.nan)))


# --- window ----------------------------------------------------------------------------------------------------------


def test_coordinates(precision):
    f, _ = precision
    assert [f.coordinate(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert f.coordinate(0, 1) == 0.5


@pytest.mark.parametrize("aspect", [False, True])
def test_log_window_and_its_derivatives(aspect, precision):
    """z and ∂z/∂β at pixels of a 7 x 4 map, against autograd of the reference in float64."""
    f, dtype = precision
    height, width, scale, count = 7, 4, 6.0, 500
    generator = np.random.default_rng(0)
    rectangles = generator.uniform([-0.2, -0.2, 0.1, 0.1, -3], [1.2, 1.2, 0.8, 0.8, 3], (count, 5)).astype(dtype)
    rows, columns = generator.integers(0, height, count), generator.integers(0, width, count)
    points = np.stack([rows / (height - 1), columns / (width - 1)], 1).astype(dtype)
    found = f.log_windows(rectangles, points, height, width, scale, aspect)

    beta = torch.from_numpy(rectangles).double().requires_grad_()
    z = reference.log_window(beta[..., None, None], height, width, scale, aspect)[torch.arange(count), rows, columns]
    (slopes,) = torch.autograd.grad(z.sum(), beta)
    want = torch.cat([z.detach()[:, None], slopes], 1).numpy()
    tolerance = 1e-11 if dtype == np.float64 else 3e-5
    scales = np.maximum(1, np.abs(want).max(1, keepdims=True))
    assert (np.abs(found - want) <= tolerance * scales).all()


def test_the_floor_of_an_extent_has_no_slope(precision):
    f, dtype = precision
    rectangles = np.array([[0.5, 0.5, s, 0.3, 0.2] for s in (0, 1e-9, -1e-7, 1e-6)], dtype)
    found = f.log_windows(rectangles, np.full((4, 2), 0.25, dtype), 5, 5, 6.0, False)
    assert np.isfinite(found).all()
    assert (found[:3, 3] == 0).all()
    assert (found[:, 0] == found[0, 0]).all()


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
