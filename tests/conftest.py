"""Backends and devices of a test run, and uninitialised memory that shows.

ATTNKERN_TEST_BACKENDS (comma-separated) names the backends that this run is about: one that is missing fails the run
instead of vanishing from it.
"""

import os

import pytest
import torch

from attnkern import _backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Deterministic mode fills what torch.empty and its kind return with NaN, in kernels too.
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)


def backends(dtype=torch.float32):
    """Backends of this run that take ``dtype``."""
    asked = os.environ.get("ATTNKERN_TEST_BACKENDS")
    names = asked.split(",") if asked else _backend.NAMES
    found = [name for name in names if _backend.reason(name, DEVICE, dtype) is None]
    return found


def pytest_configure(config):
    asked = os.environ.get("ATTNKERN_TEST_BACKENDS", "reference").split(",")
    for name in asked:
        missing = _backend.reason(name, DEVICE, torch.float32)
        if missing is not None:
            raise pytest.UsageError(f"backend {name} was asked for, but: {missing}")


@pytest.fixture(params=backends())
def backend(request):
    return request.param


@pytest.fixture(params=backends(torch.float64))
def backend64(request):
    return request.param


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
