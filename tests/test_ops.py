"""The functions against golden files, against the reference in float64 and against their literal formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, FUNCTIONS, case_id, check, doubles, lay, make, run

DATA = Path(__file__).parent / "data"
EXACT = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

every_case = pytest.mark.parametrize("function, options", CASES, ids=case_id)
every_function = pytest.mark.parametrize("function", FUNCTIONS)


# --- golden files, made by an independent program --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("path", sorted(DATA.glob("*.npz")), ids=lambda path: path.stem)
def test_golden(path, dtype, backend, device):
    data = {}
    for name, array in np.load(path).items():
        plain = array.ndim == 0 and name not in ("anchor_loss", "commitment_loss")
        tensor = None if plain else torch.from_numpy(array).to(device)
        data[name] = array.item() if plain else tensor.to(dtype) if tensor.is_floating_point() else tensor
    kind = path.stem.split("_")[0]
    if kind == "window":
        options = {name: data[name] for name in ("scale", "rescale", "aspect")}
        golden(data, "window_attention", ("output",), backend, residual=data["residual"], **options)
        data["grad_rectangle"] = data["map_grad_rectangle"]
        golden(data, "window_map", ("map",), backend, size=data["map"].shape[1:], **options)
    elif kind == "quantize":
        data |= {f"grad_{name}_loss": data["anchors"].new_tensor(data[f"{name}_weight"]) for name in WEIGHTS}
        through = FUNCTIONS["anchor_quantize"][1]
        golden(data, "anchor_quantize", through, backend, reduction=data["reduction"])
    else:
        golden(data, "compatibility_pool", ("pooled", "attention"), backend)


WEIGHTS = ("anchor", "commitment")


def golden(data, function, through, backend, **options):
    names = FUNCTIONS[function][0]
    grads = {name: data[f"grad_{name}"] for name in through}
    found = run(
        function, {name: data[name] for name in names}, through=through, grads=grads, backend=backend, **options
    )
    expected = {name: data[name] for name in found if name in data}
    assert set(through) | {f"grad_{name}" for name in names} <= expected.keys()
    check({name: found[name] for name in expected}, expected, EXACT[data[names[0]].dtype])


# --- fresh cases -----------------------------------------------------------------------------------------------------

large = pytest.mark.large
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
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("n, c, size", SHAPES, ids=case_id)
@every_case
def test_against_reference(function, options, n, c, size, layout, dtype, backend, device):
    """Results and gradients of fresh inputs are the reference's in float64."""
    if backend == "reference" and dtype == torch.float64:
        pytest.skip("the oracle itself: it has the golden files")
    tensors = make(function, n, c, size, dtype=dtype, layout=layout if len(size) else "", device=device)
