"""Backends and device of a test run, and uninitialised memory that shows.

ATTNKERN_TEST_BACKENDS (comma-separated) names the backends that this run is about: one that is missing fails the run
instead of vanishing from it. Without it, all that can run here are tested. With ATTNKERN_TEST_CUDA_ON_HOST=1 the CUDA
kernels under the host emulation stand in for the native ones.
"""

import os

import pytest
import torch

import attnkern
from attnkern import _backend, _ops

#: Seconds after which what a test waits for hangs. Nothing else depends on a clock: a busy machine changes no outcome.
PATIENCE = 1200

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not _ops.TRITON_INTERPRETS else "cpu")

# Deterministic mode fills what torch.empty and its kind return with NaN, in kernels too. What has no deterministic
# implementation in PyTorch only warns: here it is about the filling, which ATTNKERN_TEST_FILL=0 leaves out.
torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("ATTNKERN_TEST_FILL") != "0"
torch.use_deterministic_algorithms(True, warn_only=True)


def missing(name, dtype=torch.float32):
    return _backend.reason(name, DEVICE, dtype)


if os.environ.get("ATTNKERN_TEST_CUDA_ON_HOST") == "1":
    import cuda_on_host

    cuda_on_host.load()
    _ops.BACKENDS["native"] = _ops.Handles("attnkern_host")

_asked = os.environ.get("ATTNKERN_TEST_BACKENDS")
BACKENDS = _asked.split(",") if _asked else [name for name in _backend.NAMES if missing(name) is None]


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: a promise of the kernels that the reference does not make")
    config.addinivalue_line("markers", "large: too slow for interpreted kernels")
    # NumPy's remarks on the NaN and Inf of tests, and one of PyTorch about itself.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:FutureWarning")
    for name in BACKENDS:
        if missing(name) is not None:
            raise pytest.UsageError(f"{name} is to be tested, but cannot run: {missing(name)}")


def _meaningful(item):
    """Does this combination of a test's parameters exist?"""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend, dtype = parameters.get("backend"), parameters.get("dtype")
    if backend in BACKENDS and dtype is not None and missing(backend, dtype) is not None:
        return False
    if backend == "reference" and item.get_closest_marker("kernels"):
        return False
    return not (backend == "triton" and _ops.TRITON_INTERPRETS and item.get_closest_marker("large"))


def pytest_collection_modifyitems(config, items):
    kept = {item for item in items if _meaningful(item)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def interpreted(backend):
    """Kernels that Triton interprets: right, and a thousand times slower."""
    return backend == "triton" and _ops.TRITON_INTERPRETS


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def isolated():
    torch.manual_seed(0)
    with attnkern.use_backend(_backend.current()):
        yield
