"""The functions as a table, seeded inputs in any shape, dtype and layout, and how to run and compare.

Inputs, gradients of the outputs and the functions themselves are those of attnkern.testing.
"""

import math
from fractions import Fraction

import torch

from attnkern import testing
from attnkern._numerics import loss_divisor

POOLS = ("compatibility_pool", "compatibility_pool_many", "compatibility_pool_masked")
POOLED = ("pooled", "attention", "scores")

#: function -> names of its differentiable tensors and results. A mask comes with the tensors of `make`.
FUNCTIONS = {
    "window_map": (("rectangle",), ("map",)),
    "window_attention": (("x", "rectangle"), ("output", "map")),
    "anchor_quantize": (("a", "anchors"), ("values", "anchor_loss", "commitment_loss")),
    "anchor_attention": (("x", "a", "anchors"), ("output", "values", "anchor_loss", "commitment_loss")),
}
FUNCTIONS |= {pool: (("local", "query"), POOLED) for pool in POOLS}

#: (function, options), every value of every option at least once
CASES = [
    ("window_map", {}),
    ("window_map", {"rescale": False, "scale": 10.0}),
    ("window_map", {"aspect": True}),
    ("window_attention", {}),
    ("window_attention", {"rescale": False, "scale": 10.0}),
    ("window_attention", {"residual": False, "aspect": True}),
    ("window_attention", {"rescale": False, "residual": False, "aspect": True}),
    ("anchor_quantize", {}),
    ("anchor_quantize", {"reduction": "batchmean"}),
    ("anchor_quantize", {"reduction": "sum"}),
    ("anchor_attention", {}),
    ("anchor_attention", {"residual": False, "reduction": "batchmean"}),
    ("anchor_attention", {"reduction": "sum"}),
    ("compatibility_pool", {}),
    ("compatibility_pool_many", {}),
    ("compatibility_pool_masked", {}),
]

assert FUNCTIONS.keys() == {function for function, _ in CASES} == testing.OPS.keys() - {"compatibility_pool_shared"}


def case_id(value):
    """Readable parameter ids: pass as ``ids=`` to parametrize."""
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items()) or "default"
    if isinstance(value, tuple):
        return "x".join(map(case_id, value))
    return str(value).removeprefix("torch.")


# --- inputs ----------------------------------------------------------------------------------------------------------


def lay(tensor, layout):
    """The same numbers in another memory layout; ``expanded`` repeats the first channel with stride 0."""
    match layout:
        case "contiguous":
            return tensor.contiguous()
        case "channels_last":
            return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        case "transposed":
            return tensor.mT.contiguous().mT
        case "sliced":  # NaN between the elements
            return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
        case "misaligned":  # one element into the storage, strides kept
            storage = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype, device=tensor.device)
            return storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)
        case "expanded":
            return tensor[:, :1].expand_as(tensor)
    raise ValueError(layout)


def make(
    function, n=3, c=5, size=(4, 6), *, dtype=torch.float64, companion=None, layout="contiguous",
    anchors=7, shared=False, device="cpu", seed=0,
):  # fmt: skip
    """Seeded inputs of a function by name.

    ``layout`` is that of the features, or of the map where there are none; ``companion`` is the dtype, or a tuple of
    dtypes, of the other tensors (default: that of the first); ``shared`` gives the pool one query for the batch. With
    a mask the third image has no position.
    """
    name = "compatibility_pool_shared" if shared else function
    inputs = testing.make_inputs(name, (n, c, *size), torch.float64, seed=seed)
    if "anchors" in inputs:
        inputs["anchors"] = torch.rand(anchors, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    names = FUNCTIONS[function][0]
    rest = companion if isinstance(companion, tuple) else (companion or dtype,) * (len(names) - 1)
    tensors = {name: inputs[name].to(device, to) for name, to in zip(names, (dtype, *rest), strict=True)}
    tensors[names[0]] = lay(tensors[names[0]], layout)
    if "mask" in inputs:
        inputs["mask"][2:3] = False
        tensors["mask"] = inputs["mask"].to(device)
    return tensors


def leaves_of(tensors):
    """The same tensors; those of floating numbers require a gradient."""
    return {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}


doubles = testing.doubles


# --- running ---------------------------------------------------------------------------------------------------------


def call(function, tensors, size=None, **options):
    """The results of a function by name. Only window_map takes a size, because it has no features."""
    if function == "window_map":
        options["size"] = size
    return testing.OPS[function].function(**tensors, **options)._asdict()


#: Seeded gradients of the differentiable results, in their dtypes.
upstream = testing.output_gradients


def run(function, tensors, *, wrt=None, through=None, grads=None, **options):
    """Results and gradients (``grad_<name>``) by name.

    ``wrt`` names the tensors that are differentiated (default: all), ``through`` the results that have a gradient
    (default: all), ``grads`` gives those gradients (default: seeded ones).
    """
    names, differentiable = FUNCTIONS[function]
    wrt, through = names if wrt is None else wrt, differentiable if through is None else through
    leaves = {name: tensor.detach().requires_grad_(name in wrt) for name, tensor in tensors.items()}
    results = call(function, leaves, **options)
    grads = upstream(results) if grads is None else grads
    ends = [name for name in through if results[name].requires_grad]
    gradients = [None] * len(wrt)
    if ends and wrt:
        gradients = torch.autograd.grad(
            [results[name] for name in ends], [leaves[name] for name in wrt], [grads[name] for name in ends],
            allow_unused=True,
        )  # fmt: skip
    found = {name: result.detach() for name, result in results.items()}
    return found | {f"grad_{name}": gradient for name, gradient in zip(wrt, gradients, strict=True)}


# --- comparing -------------------------------------------------------------------------------------------------------


#: Tolerances by dtype that tell a wrong result from a rounded one, for ill-conditioned inputs too; accuracy is tested
#: by the tighter bounds of attnkern.testing. Half types are rounded once, to half a unit in the last place.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1.05 * 2**-8, torch.float16: 1.2 * 2**-11}


def check(found, expected, scales=None):
    """Each result is within the tolerance of its dtype times its scale; integers are equal; None counts as zero.

    A result's scale is its largest magnitude, at least 1; ``scales`` may give larger ones by name.
    """
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        if got is None or want is None:
            present = got if want is None else want
            assert present is None or not present.any(), f"{name}: a gradient is missing"
        elif want.is_floating_point():
            want = want.double()
            largest = torch.where(want.isfinite(), want.abs(), 0).amax().item() if want.numel() else 0
            scale = max(1, largest, (scales or {}).get(name, 0))
            torch.testing.assert_close(
                got.double(), want, rtol=0, atol=TOLERANCES[got.dtype] * scale, equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
        else:
            assert torch.equal(got, want), f"{name} differs"


def check_run(function, tensors, backend, size=None, wrt=None, through=None, grad_layout="contiguous", **options):
    """Compare results and gradients with the reference in float64 on the same numbers, and return them."""
    options["size"] = size
    grads = upstream(call(function, tensors, backend=backend, **options))
    grads = {name: lay(grad, grad_layout) if grad.dim() > 2 else grad for name, grad in grads.items()}
    options |= {"wrt": wrt, "through": through}
    found = run(function, tensors, grads=grads, backend=backend, **options)
    expected = run(function, doubles(tensors), grads=doubles(grads), backend="reference", **options)
    check(found, expected, _cancelling(tensors, expected, grads, options))
    return found


def _cancelling(tensors, expected, grads, options):
    """Scale of the anchors' gradient: Σ|v - a| may be far larger than Σ(v - a)."""
    if "anchors" not in tensors:
        return {}
    pulls = (expected["values"] - tensors["a"].double()).abs().sum() * 2 * grads["anchor_loss"].abs()
    return {"grad_anchors": pulls.item() / loss_divisor(tensors["a"], options.get("reduction", "mean"))}


def nearest(element, anchors):
    """Index of the nearest anchor in exact arithmetic, the lowest on ties; 0 for NaN. Plain Python numbers."""
    if math.isnan(element) or any(map(math.isnan, anchors)):
        return 0
    if math.isinf(element):
        return anchors.index(max(anchors) if element > 0 else min(anchors))
    distances = [abs(Fraction(element) - Fraction(k)) if math.isfinite(k) else math.inf for k in anchors]
    return distances.index(min(distances))


def same(found, expected, what=""):
    """Bitwise equal, NaN included."""
    for name, want in expected.items():
        got = found[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert torch.equal(torch.nan_to_num(got, 77.0), torch.nan_to_num(want, 77.0)), f"{name} differs {what}"
