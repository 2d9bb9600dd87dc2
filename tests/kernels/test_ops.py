"""The functions against golden files, against the reference in float64 and against their literal formulas."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FUNCTIONS, POOLS, case_id, check, check_run, make, run, same
from conftest import EMULATED, SLOW, every_case, every_function, large

from attnkern import testing

DATA = Path(__file__).parents[1] / "data"


# --- golden files, made by independent programs (data/make_pools.py, data/make_windows.py) ---------------------------

GOLDEN = [
    pytest.param(path, dtype, id=f"{path.stem}-{case_id(dtype)}")
    for path in sorted(DATA.glob("*.npz"))
    for dtype in (torch.float64, torch.float32)
    # Exponents of windows far off the map have in float32 an error that is not small.
    if "far" not in path.stem or dtype == torch.float64
]


@pytest.mark.parametrize("path, dtype", GOLDEN)
def test_golden(path, dtype, backend, device):
    data = {}
    for name, array in np.load(path).items():
        plain = array.ndim == 0 and name not in ("anchor_loss", "commitment_loss")
        tensor = None if plain else torch.from_numpy(array).to(device)
        data[name] = array.item() if plain else tensor.to(dtype) if tensor.is_floating_point() else tensor
    kind = path.stem.split("_")[0]
    if kind == "window":
        options = {name: data[name] for name in ("scale", "rescale", "aspect", "shape") if name in data}
        golden(data, "window_attention", ("output",), backend, residual=data["residual"], **options)
        data["grad_rectangle"] = data["map_grad_rectangle"]
        golden(data, "window_map", ("map",), backend, size=data["map"].shape[1:], **options)
    elif kind == "quantize":
        data |= {f"grad_{name}_loss": data["anchors"].new_tensor(data[f"{name}_weight"]) for name in WEIGHTS}
        through = FUNCTIONS["anchor_quantize"][1]
        golden(data, "anchor_quantize", through, backend, reduction=data["reduction"])
    else:
        through = tuple(name for name in FUNCTIONS["compatibility_pool"][1] if name in data)
        golden(data, "compatibility_pool", through, backend)


WEIGHTS = ("anchor", "commitment")


def golden(data, function, through, backend, **options):
    names = FUNCTIONS[function][0]
    grads = {name: data[f"grad_{name}"] for name in through}
    tensors = {name: data[name] for name in (*names, "mask") if name in data}
    found = run(function, tensors, through=through, grads=grads, backend=backend, **options)
    expected = {name: data[name] for name in found if name in data}
    assert set(through) | {f"grad_{name}" for name in names} <= expected.keys()
    check({name: found[name] for name in expected}, expected)


# --- fresh cases -----------------------------------------------------------------------------------------------------

SHAPES = [  # (N, C, size)
    (3, 5, (4, 6)),
    (1, 1, (1, 1)),
    (3, 8, (1, 6)),
    (2, 65, (6, 1)),
    (0, 3, (5, 9)),
    (3, 0, (4, 3)),
    (2, 65, (7, 7)),
    pytest.param(3, 512, (7, 7), marks=large),
    pytest.param(1, 8, (14, 14), marks=large),
    pytest.param(2, 3, (33, 35), marks=large),
    pytest.param(1, 70, (40, 40), marks=large),
    pytest.param(1, 40, (67, 71), marks=large),  # tiles of positions and blocks of channels
]


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("n, c, size", SHAPES, ids=case_id)
@every_case
def test_shapes(function, options, n, c, size, layout, dtype, backend, device):
    tensors = make(function, n, c, size, dtype=dtype, layout=layout, device=device)
    check_run(function, tensors, backend, size, **options)


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("c, size", [(600, (7, 7)), (4200, (3, 3)), (70, (22, 23)), (5, (47, 45))], ids=case_id)
@pytest.mark.parametrize("function", [function for function in FUNCTIONS if function not in POOLS[1:]])
def test_images_of_several_programs(function, c, size, layout, backend, device):
    """Several blocks of channels, and splits and chunks of positions, with more than one image."""
    tensors = make(function, 2, c, size, dtype=torch.float32, layout=layout, device=device)
    check_run(function, tensors, backend, size)


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n, c, size", [(3, 8, (11,)), (0, 3, (4,)), (2, 65, (49,)), (3, 5, (4, 6))], ids=case_id)
def test_tokens_and_shared_queries(n, c, size, shared, layout, dtype, backend, device):
    """Features (N, C, L), also as a transposed view of tokens (N, L, C), with one query per image or for all."""
    tensors = make("compatibility_pool", n, c, size, dtype=dtype, layout=layout, shared=shared, device=device)
    check_run("compatibility_pool", tensors, backend)


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize(
    "anchors, size", [*((anchors, (6, 7)) for anchors in (1, 2, 20, 64, 300)), (70, (47, 45))], ids=case_id
)
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_numbers_of_anchors(function, anchors, size, dtype, backend, device):
    tensors = make(function, 2, 3, size, dtype=dtype, anchors=anchors, device=device)
    check_run(function, tensors, backend)


def test_map_with_or_without_a_channel(backend, device):
    """a of shape (N, H, W) or (N, 1, H, W) is the same map."""
    tensors = make("anchor_attention", dtype=torch.float32, device=device)
    flat = tensors | {"a": tensors["a"][:, 0]}
    with_channel, without = (run("anchor_attention", inputs, backend=backend) for inputs in (tensors, flat))
    for name in ("values", "indices", "grad_a"):
        assert without[name].shape == flat["a"].shape
        without[name] = without[name][:, None]
    same(without, with_channel)


# --- dtypes ----------------------------------------------------------------------------------------------------------

MIXES = [  # (function, features, the others): each has the features' dtype or float32
    (function, dtype, others)
    for function, (names, _) in FUNCTIONS.items()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for others in itertools.product(dict.fromkeys((dtype, torch.float32)), repeat=len(names) - 1)
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function, dtype, others", MIXES, ids=case_id)
def test_dtypes(function, dtype, others, layout, backend, device):
    """Features keep their dtype, maps and losses are float32 or float64, each gradient has the dtype of its input."""
    tensors = make(function, 2, 9, (5, 6), dtype=dtype, companion=others, layout=layout, device=device)
    found = check_run(function, tensors, backend, (5, 6))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = {name: dtype for name in ("output", "pooled")}
    expected |= {"values": tensors["a"].dtype} if "a" in tensors else {}
    expected |= {"indices": torch.int64, "counts": torch.int64}
    expected |= {f"grad_{name}": tensor.dtype for name, tensor in tensors.items()}
    assert {name: result.dtype for name, result in found.items()} == {name: expected.get(name, wide) for name in found}


# --- some gradients --------------------------------------------------------------------------------------------------


def subsets(names):
    return [subset for k in range(len(names) + 1) for subset in itertools.combinations(names, k)]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@every_function
def test_any_subset_of_gradients(function, dtype, backend, device, interpreted):
    """For any subset of inputs that need a gradient and of results that have one, as in the reference."""
    names, differentiable = FUNCTIONS[function]
    tensors = make(function, 2, 3, (4, 3), dtype=dtype, device=device)
    results = [(name,) for name in differentiable] if interpreted else subsets(differentiable)
    for wrt in subsets(names):
        for through in results:
            check_run(function, tensors, backend, (4, 3), wrt=wrt, through=through)


# --- the promise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=case_id)
@pytest.mark.parametrize(
    "name, options, layout",
    [
        ("window_map", {}, "contiguous"),
        ("window_map", {"rescale": False, "aspect": True}, "contiguous"),
        ("window_map", {"ellipse": True}, "contiguous"),
        ("window_map_many", {}, "contiguous"),
        ("window_map_many", {"ellipse": True, "rescale": False, "aspect": True}, "contiguous"),
        ("window_attention", {}, "contiguous"),
        ("window_attention", {"rescale": False, "residual": False}, "channels_last"),
        pytest.param("window_attention", {"aspect": True}, "channels_last", marks=large),
        ("window_attention", {"ellipse": True, "residual": False}, "contiguous"),
        ("window_attention_many", {}, "contiguous"),
        pytest.param("window_attention_many", {"rescale": False, "aspect": True}, "contiguous", marks=large),
        ("window_attention_many", {"ellipse": True, "residual": False}, "channels_last"),
        ("anchor_quantize", {"reduction": "batchmean"}, "contiguous"),
        pytest.param("anchor_attention", {}, "contiguous", marks=large),
        ("anchor_attention", {"residual": False, "reduction": "sum"}, "channels_last"),
        ("compatibility_pool", {}, "contiguous"),
        pytest.param("compatibility_pool", {}, "channels_last", marks=large),
        ("compatibility_pool_shared", {}, "tokens"),
        pytest.param("compatibility_pool_many", {}, "contiguous", marks=large),
        pytest.param("compatibility_pool_many", {}, "tokens", marks=large),
        pytest.param("compatibility_pool_masked", {}, "contiguous", marks=large),
        ("compatibility_pool_masked", {}, "channels_last"),
    ],
    ids=case_id,
)
def test_accuracy(name, options, layout, dtype, backend, device, interpreted, monkeypatch):
    if SLOW and not name.endswith("_many"):  # the errors of several windows vary more from seed to seed
        monkeypatch.setattr(testing, "SEEDS", testing.SEEDS[:8])
    shape = (1, 24, 6, 7) if interpreted else (2, 24, 6, 7)
    testing.check_accuracy(name, backend, dtype, shape=shape, layout=layout, device=device, **options)


@large
@pytest.mark.kernels
@pytest.mark.parametrize(
    "shape, layout", [((2, 2048, 7, 7), "contiguous"), ((1, 8, 128, 128), "channels_last")], ids=case_id
)
@pytest.mark.parametrize("function", POOLS[:1] if EMULATED else POOLS)
def test_accuracy_of_long_sums(function, shape, layout, backend, device):
    """The rounding error does not grow with the number of summands as it does in a sequential sum."""
    testing.check_accuracy(function, backend, torch.float32, shape=shape, layout=layout, device=device)
