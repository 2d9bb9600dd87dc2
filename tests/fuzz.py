"""Compares random valid calls on every backend with float64: `python tests/fuzz.py --examples 200000`.

Hypothesis draws and shrinks cases, which are dictionaries that can be written as JSON; `--case` repeats one. The seed
of a run is ATTNKERN_FUZZ_SEED, or drawn and printed.

The allowed error is the budget of attnkern.testing for each image of a case: twice the error of the literal formula in
the precision of the arithmetic (at least float32), plus Σ|terms| times one ε of a half-precision result and 16 ε of the
arithmetic, plus the change of the result when the inputs are rounded. The last two terms are needed because the literal
formula may be exact by chance in one case, unlike over a seeded set, and equal summands are all rounded the same way.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import hypothesis
import torch
from cases import FUNCTIONS, POOLS, call, doubles, run
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st

from attnkern import testing

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in testing.DTYPES}
ALL_DTYPES = DTYPES | {"bool": torch.bool}
SEED = int(os.environ.get("ATTNKERN_FUZZ_SEED") or random.randrange(2**32))

#: Allowed roundings of the inputs or of Σ|terms|: about the number of operations between an input and a result.
ROUNDINGS = 16
#: A result that one rounding of the inputs changes by more than this fraction is not compared.
ILL_CONDITIONED = 0.01
#: Above it, products and squares overflow in float32: only NaN, indices and the other images are checked.
WILD = 1e15

# --- drawing a case --------------------------------------------------------------------------------------------------

VALUES = {
    "x": ("normal", "shifted", "large", "small", "mixed", "zeros", "nan", "inf", "huge"),
    "a": ("unit", "ties", "large", "small", "nan", "inf", "huge"),
    "anchors": ("unit", "duplicates", "neighbours", "large", "small", "nan", "inf", "huge"),
    "rectangle": ("inside", "outside", "thin", "vanishing", "wide", "turned", "far", "nan", "inf", "huge"),
    "gradient": ("normal", "shifted", "zeros", "nan"),
}
VALUES |= {"local": VALUES["x"], "query": VALUES["x"]}
#: Share of the positions that a mask keeps.
MASKS = {"half": 0.5, "few": 0.1, "most": 0.95, "none": 0, "all": 1}

flag = st.booleans()
scale = st.one_of(st.floats(0.5, 12, width=16), st.sampled_from((0.0, -2.0, 60.0)))
reduction = st.sampled_from(("mean", "batchmean", "sum"))
OPTIONS = {
    "window_map": {"scale": scale, "rescale": flag, "aspect": flag},
    "window_attention": {"scale": scale, "rescale": flag, "aspect": flag, "residual": flag},
    "anchor_quantize": {"reduction": reduction},
    "anchor_attention": {"reduction": reduction, "residual": flag},
    **{pool: {} for pool in POOLS},
}


@st.composite
def layouts(draw, dim):
    """Keywords of `lay` for a tensor with this number of axes."""
    axes = list(range(dim))
    kind = draw(st.sampled_from(("contiguous", "channels_last", "any", "any")))
    if kind == "channels_last" and dim > 2:
        return {"order": [0, *axes[2:], 1]}
    if kind != "any":
        return {}
    some = st.lists(st.sampled_from(axes), unique=True, max_size=2) if axes else st.just([])
    drawn = {
        "order": draw(st.permutations(axes)),
        "steps": draw(st.lists(st.integers(1, 3), min_size=dim, max_size=dim)),
        "expanded": draw(some),
        "flipped": draw(some),
        "offset": draw(st.integers(0, 5)),
        "negated": draw(flag),
    }
    plain = {"order": axes, "steps": [1] * dim}
    return {name: value for name, value in drawn.items() if value and value != plain.get(name)}


@st.composite
def cases(draw, functions=tuple(FUNCTIONS), backends=("native",), largest=20000):
    function = draw(st.sampled_from(functions))
    names, differentiable = FUNCTIONS[function]
    pools = function in POOLS
    fast = "triton" not in backends
    lengths = st.integers(1, 20 if fast else 9)
    n, size = draw(st.integers(0, 4)), [draw(lengths), draw(lengths)]
    if fast and draw(st.integers(0, 15)) == 15:  # tiles of positions
        size[draw(st.integers(0, 1))] = draw(st.integers(20, 300))
    c = draw(st.integers(0, 70 if fast else 9))
    if fast and draw(st.integers(0, 15)) == 15:  # blocks of channels
        c = draw(st.integers(70, 2500))
    c = min(c, largest // (max(1, n) * math.prod(size)))
    shapes = {"rectangle": [n, 5], "anchors": [draw(st.integers(1, 70))]}
    if function == "anchor_quantize":
        shapes["a"] = [
            n,
            *draw(st.sampled_from(([], size[:1], size, [1, *size], [min(c, 3) or 1, *size], [2, 1, *size]))),
        ]
    else:
        size = [math.prod(size)] if pools and draw(flag) else size
        shapes["x"] = shapes["local"] = [n, c, *size]
        shapes["a"] = [n, *([1] if draw(flag) else []), *size]
        shapes["query"] = [c] if draw(flag) else [n, c]
        if function == "compatibility_pool_many" or (function == "compatibility_pool_masked" and draw(flag)):
            shapes["query"] = [draw(st.sampled_from((1, n))), draw(st.integers(0, 20 if fast else 5)), c]
    known = [name for name in DTYPES if name != "float64" or fast]
    dtype = draw(st.sampled_from(known))
    mask = {}
    if function == "compatibility_pool_masked":
        layout = {key: value for key, value in draw(layouts(1 + len(size))).items() if key != "negated"}
        mask = {"shape": [draw(st.sampled_from((1, n))), *size], "dtype": "bool", "layout": layout}
        mask = {"mask": mask | {"values": draw(st.sampled_from(tuple(MASKS)))}}
    return {
        "function": function,
        "size": size,
        "options": {name: draw(values) for name, values in OPTIONS[function].items()},
        "tensors": {
            name: {
                "shape": shapes[name],
                "dtype": dtype if i == 0 else draw(st.sampled_from((dtype, "float32"))),
                # Ordinary values in half of the cases, so that most results are compared in full precision.
                "values": draw(st.one_of(st.just(VALUES[name][0]), st.sampled_from(VALUES[name]))),
                "layout": draw(layouts(len(shapes[name]))),
            }
            for i, name in enumerate(names)
        }
        | mask,
        "gradients": {
            name: {
                "values": draw(
                    st.one_of(st.just("normal"), st.sampled_from(VALUES["gradient"][: 3 if "loss" in name else 4]))
                ),
                # Results have at most as many axes as the first tensor; surplus entries are ignored.
                "layout": draw(layouts(draw(st.integers(0, 4)))),
            }
            for name in differentiable
            if draw(st.integers(0, 3))
        }
        or {differentiable[0]: {"values": "normal", "layout": {}}},
        "wrt": [name for name in names if draw(st.integers(0, 3))] or list(names),
        "seed": draw(st.integers(0, 2**16)),
    }


# --- making its tensors ----------------------------------------------------------------------------------------------


def values(kind, shape, dtype, generator, others):
    """Numbers of a kind in a dtype; ``others`` are the tensors made before."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def rectangles(centre=(0.1, 0.9), extent=(0.15, 0.6), angle=(-1.5, 1.5)):
        ranges = (centre, centre, extent, extent, angle)
        return torch.cat([uniform(*limits, shape[0], 1) for limits in ranges], 1)

    if dtype == torch.bool:
        return uniform(0, 1, *shape) < MASKS[kind]
    base = rectangles() if "rectangle" in kind else uniform(0, 1, shape) if "unit" in kind else normal(shape)
    base = {
        "normal": lambda: base,
        "shifted": lambda: base + 100,
        "large": lambda: base * 1e4,
        "small": lambda: base * 10.0 ** -uniform(3, 40, ()),
        "mixed": lambda: base * 10 ** uniform(-6, 3, shape),
        "zeros": lambda: base.sign() * 0,
        "unit": lambda: uniform(-0.2, 1.2, shape),
        "duplicates": lambda: uniform(0, 4, shape).round() / 4,
        "inside": rectangles,
        "outside": lambda: rectangles(centre=(-60, 60)),
        "thin": lambda: rectangles(extent=(1e-3, 0.03)),
        "vanishing": lambda: rectangles(extent=(-3e-6, 3e-6)),
        "wide": lambda: rectangles(extent=(-80, 80)),
        "turned": lambda: rectangles(angle=(-100, 100)),
        "far": lambda: rectangles(centre=(-1e12, 1e12), extent=(2e-3, 1)),
        "neighbours": lambda: base,
        "ties": lambda: base,
    }.get(kind, lambda: rectangles() if len(shape) == 2 and shape[1] == 5 else base)()
    made = base.to(dtype)
    if kind == "neighbours":  # one unit in the last place apart, unsorted
        chain = [torch.tensor(0.7, dtype=dtype)]
        while len(chain) < shape[0]:
            chain.append(torch.nextafter(chain[-1], chain[-1] + 1))
        made = torch.stack(chain)[torch.randperm(shape[0], generator=generator)]
    elif kind == "ties" and made.numel():  # at the midpoint of two anchors, or one unit away from it
        anchors = others["anchors"].double()
        pick = torch.randint(0, len(anchors), (2, *shape), generator=generator)
        made = (anchors[pick[0]] / 2 + anchors[pick[1]] / 2).to(dtype)
        beside = torch.nextafter(made, made + normal(shape).to(dtype))
        made = torch.where(normal(shape) > 0, made, beside)
    elif kind in ("nan", "inf", "huge") and made.numel():
        at = torch.randint(0, made.numel(), (1 + made.numel() // 50,), generator=generator)
        most = torch.finfo(dtype).max
        made.view(-1)[at] = {"nan": math.nan, "inf": math.inf, "huge": most}[kind] * normal(len(at)).sign().to(dtype)
    return made


def lay(tensor, order=None, steps=None, expanded=(), flipped=(), offset=0, negated=False):
    """The same numbers in another memory layout, with NaN between and around them; expanded axes have stride 0."""
    kept = [axis for axis in range(tensor.dim()) if axis in (order or range(tensor.dim()))]
    order = [axis for axis in order or kept if axis < tensor.dim()] + [a for a in range(tensor.dim()) if a not in kept]
    steps = [*(steps or []), *[1] * tensor.dim()]
    expanded, flipped = ([axis for axis in axes if axis < tensor.dim()] for axes in (expanded, flipped))
    shape = tensor.shape
    for axis in expanded:
        tensor = tensor.narrow(axis, 0, min(1, shape[axis]))
    strides, length = [0] * tensor.dim(), 1
    for axis in reversed(order):
        strides[axis] = length * steps[axis]
        length = strides[axis] * max(1, tensor.shape[axis])
    storage = torch.full((offset + length + 1,), math.nan, dtype=tensor.dtype)
    laid = storage.as_strided(tensor.shape, strides, offset)
    laid.copy_((-tensor if negated else tensor).flip(flipped))
    laid = (torch._neg_view(laid) if negated else laid).expand(shape)  # negated when it is read
    return laid.flip(flipped) if flipped else laid  # PyTorch has no negative strides: flip copies


def make(case):
    """Inputs by name, and the gradients of results by name."""
    generator = torch.Generator().manual_seed(case["seed"])
    plain = {}
    for name in sorted(case["tensors"], key=["query", "anchors", "a", "x", "local", "rectangle", "mask"].index):
        tensor = case["tensors"][name]
        plain[name] = values(tensor["values"], tensor["shape"], ALL_DTYPES[tensor["dtype"]], generator, plain)
    tensors = {name: lay(plain[name], **tensor["layout"]) for name, tensor in case["tensors"].items()}
    like = call(case["function"], tensors, case["size"], backend="reference", **case["options"])
    grads = {}
    for name, gradient in case["gradients"].items():
        drawn = values(gradient["values"], tuple(like[name].shape), like[name].dtype, generator, {})
        grads[name] = lay(drawn, **gradient["layout"])
    return tensors, grads, like


# --- checking it -----------------------------------------------------------------------------------------------------

SUMMED = ("anchor_loss", "commitment_loss", "counts", "grad_anchors")


def largest(tensor, images, where=None):
    """Largest finite magnitude of each image."""
    tensor = tensor.double().abs()
    kept = tensor.isfinite() if where is None else where
    return torch.where(kept, tensor, 0).reshape(images, -1).amax(1)


def _bytes(tensor):
    """The whole storage as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def run_plain(function, tensors, grads, size, options, arithmetic, literal=False):
    """Results, all gradients and Σ|terms| of the reference or of the literal formula, in the tensors' dtype."""
    op = testing.OPS[function]
    if function == "window_map":
        options = options | {"size": size}
    keywords = options if literal else options | {"backend": "reference"}
    found = testing.evaluate(op.literal if literal else op.function, tensors, grads, **keywords)
    if literal:
        return found, None
    g = {name: grads.get(name, torch.zeros_like(found[name])) for name in FUNCTIONS[function][1]}
    if function == "anchor_attention" and tensors["a"].dim() == 3:  # the terms expect a channel axis
        wide = lambda d: {k: v[:, None] if k in ("a", "values", "indices") else v for k, v in d.items()}  # noqa: E731
        return found, op.terms(wide(tensors), wide(found), wide(g), **options)
    terms = op.terms(tensors, found, g, **options)
    if "rectangle" in tensors:
        # Two factors of a rescaled gradient are differences, whose rounding errors are those of their terms. Autograd,
        # also in float64, sums the terms before it subtracts.
        plain = op.terms(tensors, found, g, **options | {"rescale": False})["grad_rectangle"]
        terms["uncentred"] = plain
        terms["grad_rectangle"] += plain * (
            1 if arithmetic == torch.float64 else ROUNDINGS * torch.finfo(arithmetic).eps
        )
    return found, terms


def exponent_error(function, exact, other, size, options, epsilon):
    """Largest change of the logarithm of each image's weights when the inputs are rounded, over the positions whose
    weight is not negligible."""

    def logarithm(tensors):
        if function in POOLS:
            query = tensors["query"]
            query = query if query.dim() == 3 else query.expand(1, -1)[:, None] if query.dim() == 1 else query[:, None]
            scores = query @ tensors["local"].flatten(2)
            return scores.where(tensors["mask"].flatten(1)[:, None], -math.inf) if "mask" in tensors else scores
        window = testing.reference.log_window
        z = window(tensors["rectangle"][..., None, None], *size, options["scale"], options["aspect"])
        return z.flatten(1)[:, None]

    z, shifted = logarithm(exact), logarithm(other)
    if not z.numel():
        return torch.zeros(len(z), dtype=torch.float64)
    seen = z >= z.amax(2, keepdim=True) - 16
    return torch.where(seen, (shifted - z).abs() + epsilon * z.abs(), 0).nan_to_num(0).flatten(1).amax(1)


def moved(name, tensor, epsilon, generator):
    """The tensor with each number changed by up to one rounding."""
    by = epsilon * tensor.abs()
    if name == "rectangle":  # positions and angles are rounded in sums with numbers of size 1
        by[:, [0, 1, 4]] += epsilon
    return tensor + by * torch.randint(0, 2, tensor.shape, generator=generator).mul(2).sub(1)


def check(case, backends=None):
    """Raise AssertionError unless every backend is right. Returns the numbers of results compared and not compared."""
    function, size, options = case["function"], case["size"], case["options"]
    tensors, grads, like = make(case)
    n = case["tensors"][FUNCTIONS[function][0][0]]["shape"][0]
    first = next(iter(tensors.values()))
    kept = [(t, _bytes(t).clone()) for t in (*tensors.values(), *grads.values())]
    plain, plain_grads = (
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in d.items()} for d in (tensors, grads)
    )
    exact, exact_grads = doubles(plain), doubles(plain_grads)
    arithmetic = testing.reference.wide(first.dtype)
    epsilon = torch.finfo(arithmetic).eps
    through, wrt = tuple(grads), tuple(case["wrt"])
    finite = all(grad.isfinite().all() for grad in grads.values())
    zeros = any(gradient["values"] == "zeros" for gradient in case["gradients"].values())
    elements = max(tensor.numel() for tensor in tensors.values())
    compared = skipped = 0
    truth, bounds = None, {}
    if n:
        truth, terms = run_plain(function, exact, exact_grads, size, options, arithmetic)
        literal, _ = run_plain(
            function, {k: v.to(arithmetic) if k != "mask" else v for k, v in plain.items()},
            {k: v.to(arithmetic) for k, v in plain_grads.items()}, size, options, arithmetic, literal=True,
        )  # fmt: skip
        others, uncertain = [], torch.zeros(n, dtype=torch.float64)
        if "anchors" not in tensors:  # the choice of an anchor is exact
            generator = torch.Generator().manual_seed(case["seed"])
            for _ in range(2):
                other = {k: moved(k, v, epsilon, generator) if k != "mask" else v for k, v in exact.items()}
                others.append(run_plain(function, other, exact_grads, size, options, arithmetic)[0])
                error = exponent_error(function, exact, other, size, options, epsilon)
                uncertain = torch.maximum(uncertain, error)
        shared = "query" in tensors and (tensors["query"].dim() == 1 or tensors["query"].shape[:-2] == (1,))
        infected, seen = {}, exact
        if "mask" in exact and "scores" not in through:  # what the mask hides reaches the scores alone
            kept_only = torch.where(exact["mask"][:, None], exact["local"], 0)
            seen = exact | {"local": kept_only}
        wild, sick = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
        for name, tensor in seen.items():
            images = n if tensor.shape[0] == n and name != "anchors" and tensor.dim() > 1 - (name == "a") else 1
            if tensor.numel() and name != "mask":
                wild |= largest(tensor, images, ~tensor.isnan()) > WILD
                sick |= tensor.isnan().reshape(images, -1).any(1)
        for name, value in truth.items():
            if not value.is_floating_point() or not value.numel():
                continue
            images = 1 if name in SUMMED or (name == "grad_query" and shared) else n
            size_of = largest(value, images)
            agree = "indices" not in truth or torch.equal(truth["indices"], literal["indices"])
            by_literal = largest(literal[name].double() - value, images) * agree
            by_rounding = (
                sum(largest(other[name] - value, images) for other in others) if others else torch.zeros(images)
            )
            term = largest(terms[name], images)
            known = ~(wild if images == n else wild.any()) & (term < WILD**2) & (size_of < WILD**2)
            doubt = uncertain if images == n else uncertain.amax()
            # Terms that NaN hides.
            hidden = (terms[name].isnan().reshape(images, -1) & value.isfinite().reshape(images, -1)).any(1)
            infected[name] = known
            sure = (by_rounding <= ILL_CONDITIONED * size_of) & (doubt <= ILL_CONDITIONED) & ~hidden
            bounds[name] = 2 * by_literal + ROUNDINGS * (by_rounding + doubt * term), term, known & sure
    for backend in backends or testing.available_backends(dtype=first.dtype):
        found = run(function, tensors, wrt=wrt, grads=grads, through=through, size=size, backend=backend, **options)
        for tensor, before in kept:
            assert torch.equal(_bytes(tensor), before), f"{backend} wrote into a tensor of shape {tuple(tensor.shape)}"
        for name, got in found.items():
            where = f"{name} on {backend}"
            expected = tensors[name.removeprefix("grad_")] if name.startswith("grad_") else like[name]
            if got is None:
                assert truth is None or not truth[name].any(), f"{where}: a gradient is missing"
                continue
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), f"{where}: {got.dtype}, {got.shape}"
            if truth is None:
                assert not (got.any() and finite), f"{where} of an empty batch is not zero"
                continue
            want = truth[name]
            if name in ("values", "indices", "counts"):
                assert torch.equal(got.double().nan_to_num(77), want.to(got.dtype).double().nan_to_num(77)), (
                    f"{where} differ"
                )
                continue
            if name not in bounds:
                continue
            bound, term, ordinary = bounds[name]
            if name == "grad_rectangle" and backend == "reference":
                term = term + largest(terms["uncentred"], n)
            images, info = len(bound), torch.finfo(got.dtype)
            lost = (want.isnan() & ~got.isnan()).reshape(images, -1).any(1)
            # Zero times NaN in a gradient may give zero or NaN.
            assert not (lost & infected[name]).any() or (name.startswith("grad_") and zeros), f"{where}: NaN is lost"
            # Sums over the batch, also in float64, are sequential: equal summands are all rounded the same way.
            plain_sum = arithmetic == torch.float64 or name == "grad_anchors"
            sums = epsilon * (max(ROUNDINGS, elements) if plain_sum else ROUNDINGS)
            floor = max(info.smallest_normal * info.eps, torch.finfo(arithmetic).tiny)
            allowed = bound + (info.eps * (got.dtype != arithmetic) + sums) * term + floor
            inside = want.isfinite() & (want.abs() < 0.99 * info.max)
            before = bound + sums * term  # rounding to a half type
            before = before.view(-1, *[1] * (got.dim() - 1)) if got.dim() else before[0]
            inside &= ~(got.isinf() & (want.abs() + before >= info.max))  # rounded to Inf
            if name.startswith("grad_") and "anchors" not in tensors:
                # In an image with NaN, gradients may have more NaN than the formula, which omits terms that are zero.
                bad = sick if images == n else sick.any().expand(images)
                inside &= ~(got.isnan() & bad.view(-1, *[1] * (got.dim() - 1)))
            error = largest((got.double() - want).nan_to_num(math.inf, math.inf), images, inside)
            over = ordinary & ~(error <= allowed)
            worst = f"{error[over][0]:.3e}, allowed {allowed[over][0]:.3e}" if over.any() else ""
            assert not over.any(), f"{where}: image {over.nonzero()[0].item()} is off by {worst}"
            compared, skipped = compared + int(ordinary.sum()), skipped + int((~ordinary).sum())
            if name == "attention" or (name == "map" and options["rescale"]):
                # Of a map 1 for each position, of attention 1 for each query, or 0 without a position.
                total, exact_total = (t.double().flatten(t.dim() - len(size)).sum(-1) for t in (got, want))
                right = (total - exact_total).abs() <= 1e-5 * exact_total.clamp(min=1)
                bad = infected[name] & want.reshape(n, -1).isfinite().all(1) & ~right.reshape(n, -1).all(1)
                assert not bad.any(), f"{where}: image {bad.nonzero()[0].item()} does not add up: {total[bad][0]}"
    return compared, skipped


# --- running many ----------------------------------------------------------------------------------------------------


def find(examples, seed=SEED, functions=tuple(FUNCTIONS), backends=None, shrink=True, watch=lambda case, counts: None):
    """The first failing case, shrunk, and its error; None if all pass. ``watch`` gets each case and its counts."""
    backends = backends or testing.available_backends()
    failure = None

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=False, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), print_blob=False, verbosity=Verbosity.quiet,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
    )  # fmt: skip
    @hypothesis.given(cases(functions, tuple(backends)))
    def one(case):
        nonlocal failure
        watch(case, None)
        try:
            first = next(iter(case["tensors"].values()))["dtype"]
            counts = check(case, [b for b in backends if b in testing.available_backends(dtype=DTYPES[first])])
        except Exception as error:
            failure = case, error
            raise
        watch(case, counts)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower on tensors this small
    try:
        one()
    except Exception:
        if failure is None:
            raise
    finally:
        torch.set_num_threads(threads)
    return failure


def repro(case):
    """The command that repeats a case."""
    return f"python tests/fuzz.py --case '{json.dumps(case)}'"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=200_000)
    parser.add_argument("--case", help="repeat this one")
    parser.add_argument("--backends", help="comma-separated; default: all that run here")
    options = parser.parse_args(arguments)
    backends = options.backends.split(",") if options.backends else None
    if options.case:
        try:
            compared, skipped = check(json.loads(options.case), backends)
        except AssertionError as error:
            print(f"fails: {error}")
            return 1
        print(f"passes: {compared} results compared, {skipped} without a bound")
        return 0
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # PyTorch's forward-mode AD
    totals, began, done, piece = [0, 0], time.monotonic(), 0, 5000
    print(f"ATTNKERN_FUZZ_SEED={SEED}, backends {', '.join(backends or testing.available_backends())}", flush=True)
    with tempfile.NamedTemporaryFile("w", prefix="attnkern-fuzz-", suffix=".json", encoding="utf-8") as current:
        print(f"should the process die, the case is in {current.name}", flush=True)

        def watch(case, counts):
            if counts is None:
                Path(current.name).write_text(json.dumps(case), encoding="utf-8")
            else:
                totals[:] = (a + b for a, b in zip(totals, counts, strict=True))

        while done < options.examples:
            # In parts, each with the next seed, because Hypothesis keeps every example of a run in memory.
            count, seed = min(piece, options.examples - done), SEED + done // piece
            failure = find(count, seed, backends=backends, watch=watch)
            if failure is not None:
                print(f"{type(failure[1]).__name__}: {failure[1]}\n{repro(failure[0])}\nATTNKERN_FUZZ_SEED={seed}")
                return 1
            done += count
            share = totals[0] / max(1, sum(totals))
            print(f"{done} cases in {time.monotonic() - began:.0f} s, {share:.0%} of results compared", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
