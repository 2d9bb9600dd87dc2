"""The backends and the device of a test run, the selection of tests, and uninitialised memory filled with NaN.

ATTNKERN_TEST_BACKENDS (comma-separated) names the backends to test: if one of them cannot run, the run fails. Without
it, all backends that can run here are tested. With ATTNKERN_TEST_CUDA_ON_HOST=1 the backend "native" is the CUDA
kernels, emulated on the CPU. ``--quick`` selects the tests of `make test`.

A test marked ``pairs`` runs only enough combinations of its parameters that each pair of values of two parameters
occurs, for each backend: a case with each layout, with each dtype and with each shape, but not with each triple of
them.
"""

import collections
import itertools
import os
import zlib

import pytest
import torch
from cases import CASES, FUNCTIONS, case_id

import attnkern
from attnkern import _backend, _ops

#: Seconds after which a test gives up waiting. No outcome depends on the machine's speed otherwise.
PATIENCE = 1200

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not _ops.TRITON_INTERPRETS else "cpu")

# Deterministic mode fills the results of torch.empty and the like with NaN, in kernels too; ATTNKERN_TEST_FILL=0 turns
# this off. Only the filling matters here, so operators without a deterministic implementation only warn.
torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("ATTNKERN_TEST_FILL") != "0"
torch.use_deterministic_algorithms(True, warn_only=True)

large = pytest.mark.large


#: Whether the kernels run on a CPU that they were not written for.
EMULATED = os.environ.get("ATTNKERN_TEST_CUDA_ON_HOST") == "1"
SLOW = EMULATED or _ops.TRITON_INTERPRETS


def rows(functions):
    """Slow kernels of many queries are tested with a mask only, of several windows with features only."""
    left_out = ("compatibility_pool_many", "window_map_many") if SLOW else ()
    return [pytest.param(*row) for row in functions if row[0] not in left_out]


every_function = pytest.mark.parametrize("function", rows((function,) for function in FUNCTIONS))
every_case = pytest.mark.parametrize("function, options", rows(CASES), ids=case_id)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=case_id
)


def missing(name, dtype=torch.float32):
    return _backend.reason(name, DEVICE, dtype)


if EMULATED:
    import cuda_on_host

    cuda_on_host.load()
    _ops.BACKENDS["native"] = _ops.Handles("attnkern_host")

if _ops.TRITON_INTERPRETS:
    from triton.runtime import interpreter

    # The interpreter replaces the functions of triton.language again in each call of a device function, which takes a
    # third of its time. Once in each launch is enough, because the end of the launch restores them.
    _replace, _launch, _replaced = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def _replace_once(function):
        modules = {x for x in function.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core}
        if not modules <= _replaced:
            _replaced.update(modules)
            return _replace(function)

    def _launch_afresh(*args, **kwargs):
        _replaced.clear()
        return _launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = _replace_once, _launch_afresh


_asked = os.environ.get("ATTNKERN_TEST_BACKENDS")
BACKENDS = _asked.split(",") if _asked else [name for name in _backend.NAMES if missing(name) is None]


#: With --quick about one in so many parametrisations of a test runs, and at least one.
SAMPLE = 5


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out slow tests and most parametrisations")


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: a promise of the kernels that the reference does not make")
    config.addinivalue_line("markers", "large: too slow for interpreted kernels")
    config.addinivalue_line("markers", "pairs: only combinations in which any two values of two parameters meet")
    config.addinivalue_line("markers", "slow: not part of `make test`, only of `make test-all`")
    # NumPy warns about the NaN and Inf of the tests, and PyTorch about its own use of jit.script.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:FutureWarning")
    for name in BACKENDS:
        if missing(name) is not None:
            raise pytest.UsageError(f"ATTNKERN_TEST_BACKENDS names {name}, which cannot run: {missing(name)}")


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _exists(item):
    """Whether the backend supports this combination of a test's parameters."""
    parameters = _parameters(item)
    backend, dtype = parameters.get("backend"), parameters.get("dtype")
    if backend in BACKENDS and dtype is not None and missing(backend, dtype) is not None:
        return False
    if backend == "reference" and item.get_closest_marker("kernels"):
        return False
    return not (backend == "triton" and _ops.TRITON_INTERPRETS and item.get_closest_marker("large"))


def _pairs(items):
    """Of each test marked pairs, combinations in which any two values of two parameters meet; all other tests."""
    products = {}
    for item in items:
        if item.get_closest_marker("pairs"):
            test = item.nodeid.partition("[")[0], _parameters(item).get("backend")
            products.setdefault(test, []).append(item)
        else:
            yield item
    for product in products.values():
        # One id for each parametrize, also for one of several parameters.
        rows = {item: list(enumerate(item.callspec._idlist)) for item in product}
        pairs, triples = ({i: set(itertools.combinations(row, k)) for i, row in rows.items()} for k in (2, 3))
        left, met = set().union(*pairs.values()), collections.Counter()

        def gain(item, pairs=pairs, triples=triples, left=left, met=met):
            """New pairs, and of several items with as many, how rarely its pairs and triples have met."""
            return (
                len(pairs[item] & left),
                -sum(map(met.__getitem__, pairs[item])),
                -sum(map(met.__getitem__, triples[item])),
            )

        while left:
            chosen = max(product, key=gain)
            left -= pairs[chosen]
            met.update(pairs[chosen] | triples[chosen])
            yield chosen


def _sample(items):
    """The first parametrisation of each test and some of the others, the same in every run; no slow tests."""
    begun = set()
    for item in items:
        test = item.nodeid.partition("[")[0], getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if not item.get_closest_marker("slow") and (
            test not in begun or zlib.crc32(item.nodeid.encode()) % SAMPLE == 0
        ):
            begun.add(test)
            yield item


def pytest_collection_modifyitems(config, items):
    kept = set(_pairs([item for item in items if _exists(item)]))
    if config.getoption("quick"):
        kept = set(_sample([item for item in items if item in kept]))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def interpreted(backend):
    """Whether Triton interprets its kernels, which takes about a thousand times as long."""
    return backend == "triton" and _ops.TRITON_INTERPRETS


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def isolated():
    torch.manual_seed(0)
    with attnkern.use_backend(_backend.current()):
        yield
