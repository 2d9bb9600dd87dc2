"""Compares the CUDA kernels, emulated on the CPU (tests/cuda_on_host), with the reference in float64."""

import pytest
import torch
from cuda_on_host import load

from attnkern import reference
from attnkern._schemas import SCHEMAS

FLOAT, HALF, BF16, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64

ops = load()

# (N, C, H, W), channels_last, dtype of the features, dtype of their companions, residual
FEATURES = [
    ((2, 3, 7, 7), False, BF16, FLOAT, True),
    ((2, 65, 7, 7), False, FLOAT, FLOAT, True),
    ((2, 40, 7, 7), False, BF16, BF16, False),
    ((1, 700, 7, 7), False, HALF, FLOAT, True),  # several tiles of rows
    ((2, 65, 5, 6), True, FLOAT, FLOAT, False),
    ((2, 64, 7, 7), True, BF16, FLOAT, True),
    ((1, 300, 9, 8), True, HALF, HALF, True),  # more channels than a warp's vectors hold
    ((3, 1, 1, 9), False, FLOAT, FLOAT, True),
    ((2, 3, 6, 1), True, DOUBLE, FLOAT, True),
    ((2, 2, 1, 1), False, DOUBLE, DOUBLE, True),
    ((2, 3, 33, 35), False, FLOAT, FLOAT, True),  # too many positions for one block to compute the statistics
    ((1, 5, 36, 40), True, DOUBLE, DOUBLE, False),
    ((1, 2, 61, 41), False, BF16, FLOAT, True),  # several tiles of columns
    ((46, 9, 7, 7), False, BF16, FLOAT, True),  # too many elements for one block to quantize, rows of several channels
    ((1, 65, 48, 47), True, BF16, FLOAT, True),
    ((0, 3, 5, 5), False, FLOAT, FLOAT, True),
    ((2, 0, 5, 5), False, FLOAT, FLOAT, True),
    ((1, 0, 40, 40), False, BF16, FLOAT, True),
]


@pytest.fixture(params=["reverse", "shuffled"], autouse=True)
def order(request, monkeypatch):
    monkeypatch.setenv("ATTNKERN_HOST_ORDER", request.param)
    return request.param


def normal(shape, dtype, seed, channels_last=False):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def double(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_()


def assert_near(name, got, want, *dtypes):
    """Bounds the largest error, relative to the largest value, by 30 ε of the least precise of ``dtypes``."""
    want = want.detach()
    assert got.shape == want.shape, name
    assert torch.equal(got.isnan(), want.isnan()), name
    if got.numel():
        got, want = got.double().nan_to_num(), want.nan_to_num()
        scale = want.abs().max().clamp(min=1e-3)
        assert (got - want).abs().max() <= 30 * max(torch.finfo(dtype).eps for dtype in dtypes) * scale, name


def gradients(outputs, grads, inputs):
    pairs = [(out, grad.double()) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True)]


def rectangles(n, dtype, kind="ordinary"):
    random = torch.rand((n, 5), generator=torch.Generator().manual_seed(3))
    low, high = {
        "ordinary": ([0.2, 0.2, 0.15, 0.15, -1.5], [0.8, 0.8, 0.7, 0.7, 1.5]),
        "thin": ([0.4, 0.4, 0.02, -0.03, -1.0], [0.6, 0.6, 0.03, -0.02, 1.0]),
        "outside": ([4.0, -3.0, 0.1, 0.1, 0.3], [5.0, -2.0, 0.2, 0.2, 0.4]),
    }[kind]
    return torch.lerp(torch.tensor(low), torch.tensor(high), random).to(dtype)


# --- the emulation itself ---


@pytest.mark.parametrize("threads", [32, 256])
def test_emulation_sums(threads):
    x = torch.arange(threads, dtype=FLOAT)
    assert ops.faulty_sum(x, 0) == x.sum()


def test_emulation_detects_a_missing_barrier():
    assert ops.faulty_sum(torch.ones(64), 1).isnan()


def test_emulation_detects_a_race(monkeypatch):
    x = torch.arange(64, dtype=FLOAT)
    sums = set()
    for order in ("forward", "reverse"):
        monkeypatch.setenv("ATTNKERN_HOST_ORDER", order)
        sums.add(ops.faulty_sum(x, 2).item())
    assert len(sums) == 2


@pytest.mark.parametrize("fault", [3, 4], ids=["barrier", "shuffle"])
def test_emulation_detects_a_deadlock(fault):
    with pytest.raises(RuntimeError, match="waits for threads that do not arrive"):
        ops.faulty_sum(torch.ones(64), fault)


# --- window ---

WINDOWS = [
    (FEATURES[0], dict(), "ordinary"),
    *((case, dict(), "ordinary") for case in FEATURES[1:]),
    (FEATURES[2], dict(rescale=False), "ordinary"),
    (FEATURES[5], dict(rescale=False, aspect=True), "ordinary"),
    (FEATURES[10], dict(rescale=False), "ordinary"),
    (FEATURES[10], dict(aspect=True, scale=10.0), "ordinary"),
    (FEATURES[1], dict(), "thin"),
    (FEATURES[4], dict(), "outside"),
    (FEATURES[12], dict(), "outside"),
    (FEATURES[11], dict(), "thin"),
]


@pytest.mark.parametrize("case, options, kind", WINDOWS)
def test_window(case, options, kind):
    shape, channels_last, dtype, companion, residual = case
    options = dict(scale=6.0, rescale=True, aspect=False) | options
    scale, rescale, aspect = options.values()
    x, rectangle = normal(shape, dtype, 0, channels_last), rectangles(shape[0], companion, kind)
    grad_output, grad_map = normal(shape, dtype, 1, channels_last), normal((shape[0], *shape[2:]), FLOAT, 2)
    wide = DOUBLE if dtype == DOUBLE else FLOAT
    grad_map = grad_map.to(wide)
    # The differences of coordinates behind a map with one peak lose digits to cancellation.
    sums = wide if kind == "ordinary" else {FLOAT: BF16, DOUBLE: FLOAT}[wide]

    output, map, stats = ops.window_fwd(x, rectangle, scale, rescale, residual, aspect, False)
    assert output.stride() == x.stride()
    assert stats.shape == (shape[0], 7 if rescale else 0)
    for grad_maps in ((grad_map,), ()):
        exact = double(x), double(rectangle)
        want = reference.window_attention(*exact, residual=residual, **options)
        assert_near("output", output, want[0], dtype, sums)
        assert_near("map", map, want[1], sums)
        wants = gradients(want[: 1 + len(grad_maps)], (grad_output, *grad_maps), exact)
        args = (grad_output, *(grad_maps or (None,)), x, rectangle, stats, scale, rescale, residual, aspect, False)
        grad_x, grad_rectangle = ops.window_bwd(*args, True)
        assert grad_x.stride() == x.stride()
        assert_near("grad_x", grad_x, wants[0], dtype, sums)
        assert_near("grad_rectangle", grad_rectangle, wants[1], companion, sums)
        none, again = ops.window_bwd(*args, False)
        assert none.shape == (0,)
        assert torch.equal(again, grad_rectangle)


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (40, 27), (96, 91)])
@pytest.mark.parametrize("dtype", [BF16, FLOAT, DOUBLE])
@pytest.mark.parametrize("rescale", [True, False])
def test_window_map(size, dtype, rescale):
    rectangle = rectangles(3, dtype)
    exact = double(rectangle)
    want = reference.window_map(exact, size, rescale=rescale)
    map, stats = ops.window_map_fwd(rectangle, *size, 6.0, rescale, False, False)
    assert_near("map", map, want, map.dtype)
    grad_map = normal((3, *size), map.dtype, 4)
    grad = ops.window_map_bwd(grad_map, rectangle, stats, 6.0, rescale, False, False)
    assert_near("grad", grad, *gradients((want,), (grad_map,), (exact,)), dtype, map.dtype)


def test_window_nan_propagation():
    x, rectangle = normal((3, 5, 7, 7), FLOAT, 0), rectangles(3, FLOAT)
    x[0, 1, 2, 3] = rectangle[2, 4] = torch.nan
    output, map, stats = ops.window_fwd(x, rectangle, 6.0, True, True, False, False)
    assert output.isnan().nonzero()[:, 0].bincount().tolist() == [1, 0, 5 * 49]
    assert map.isnan().flatten(1).sum(1).tolist() == [0, 0, 49]
    _, grad = ops.window_bwd(torch.ones_like(x), None, x, rectangle, stats, 6.0, True, True, False, False, False)
    assert grad.isnan().sum(1).tolist() == [5, 0, 5]


# --- quantize, anchor ---

ANCHORS = {
    "plain": [0.0, 1.0, -1.0, 0.5, -0.5],
    "one": [0.25],
    "duplicates": [0.5, -0.5, 0.5, -0.5, 0.0, 0.0],
    "ties": [1.0, 0.0, -1.0, 2.0],
    "infinite": [torch.inf, -1.0, -torch.inf, 1.0],
    "nan": [0.0, torch.nan, 1.0],
    "many": torch.linspace(-2, 2, 700).tolist(),  # too many for shared memory
}


def elements(shape, dtype, kind):
    a = normal(shape, dtype, 5)
    if kind in ("ties", "infinite", "duplicates"):
        a = (a * 4).round() / 4
    return a


def assert_quantized(got, want, divisor, dtype):
    values, index, anchor_loss, commitment_loss, counts, residuals = got
    want_values, want_index, want_loss, _, want_counts = want
    want_loss = want_loss.detach() / divisor
    assert torch.equal(index, want_index)
    assert torch.equal(counts, want_counts)
    assert torch.equal(values.isnan(), want_values.isnan())
    assert torch.equal(values.nan_to_num(), want_values.to(dtype).nan_to_num())
    if want_loss.isfinite():
        assert_near("anchor_loss", anchor_loss, want_loss, FLOAT)
    else:
        assert torch.equal(anchor_loss.double(), want_loss) or anchor_loss.isnan()
    assert torch.equal(anchor_loss.nan_to_num(), commitment_loss.nan_to_num())
    assert residuals.shape == counts.shape


@pytest.mark.parametrize("kind", ANCHORS)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, DOUBLE])
@pytest.mark.parametrize("shape", [(3, 700), (2, 1, 5, 3), (0, 4)])
def test_quantize(kind, dtype, shape):
    anchors, a = torch.tensor(ANCHORS[kind], dtype=dtype), elements(shape, dtype, kind)
    exact_a, exact_anchors = double(a), double(anchors)
    want = reference.anchor_quantize(exact_a, exact_anchors, reduction="sum")
    divisor = 3
    got = ops.quantize_fwd(a, anchors, divisor)
    assert_quantized(got, want, divisor, dtype)
    wide = got[2].dtype
    grads = normal(shape, dtype, 6), torch.tensor(0.7, dtype=wide), torch.tensor(1.3, dtype=wide)
    wants = gradients((want[0], want[2] / divisor, want[3] / divisor), grads, (exact_a, exact_anchors))
    grad_a, grad_anchors = ops.quantize_bwd(*grads, a, anchors, got[1], got[5], divisor)
    if kind == "infinite":  # an infinite distance has no defined gradient
        return
    assert_near("grad_a", grad_a, wants[0], dtype)
    if kind == "nan":  # the reference computes the loss from another anchor than its index names
        assert grad_anchors.isnan().any() == (a.numel() > 0)
        return
    assert_near("grad_anchors", grad_anchors, wants[1], dtype)
    grad_a, grad_anchors = ops.quantize_bwd(None, None, None, a, anchors, got[1], got[5], divisor)
    assert not grad_a.any()
    assert not grad_anchors.any()


def test_quantize_nan_and_infinity():
    a = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.2]])
    values, index, loss, _, counts, residuals = ops.quantize_fwd(a, torch.tensor([0.0, 1.0, -1.0]), 4)
    assert index.tolist() == [[0, 1, 2, 0]]
    assert counts.tolist() == [1, 1, 1]
    assert values[0, 0].isnan()
    assert values[0, 1:].tolist() == [1.0, -1.0, 0.0]
    assert loss.isnan()
    assert residuals.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize(
    "case, kind", [*((case, "duplicates") for case in FEATURES), *((FEATURES[i], "many") for i in (1, 5, 10))]
)
def test_anchor(case, kind):
    shape, channels_last, dtype, companion, residual = case
    x, grad_output = normal(shape, dtype, 0, channels_last), normal(shape, dtype, 1, channels_last)
    a = normal((shape[0], 1, *shape[2:]), companion, 5)
    anchors = torch.tensor(ANCHORS[kind], dtype=companion)
    exact = double(x), double(a), double(anchors)
    want = reference.anchor_attention(*exact, residual=residual, reduction="sum")
    divisor = 3
    output, *got = ops.anchor_fwd(x, a, anchors, residual, divisor)
    assert output.stride() == x.stride()
    assert_near("output", output, want[0], dtype)
    assert_quantized(got, want[1:], divisor, companion)
    wide = got[2].dtype
    grads = normal(a.shape, companion, 6), torch.tensor(0.7, dtype=wide), torch.tensor(1.3, dtype=wide)
    # The exact gradient of a sum over channels, without rounding.
    wants = gradients((want[0], want[1], want[3] / divisor, want[4] / divisor), (grad_output, *grads), exact)
    args = (x, a, anchors, got[1], got[5], residual, divisor)
    grad_x, grad_a, grad_anchors = ops.anchor_bwd(grad_output, *grads, *args, True)
    assert grad_x.stride() == x.stride()
    for name, grad, exact_grad, of in zip(
        ("grad_x", "grad_a", "grad_anchors"), (grad_x, grad_a, grad_anchors), wants, (dtype, companion, companion),
        strict=True,
    ):  # fmt: skip
        assert_near(name, grad, exact_grad, of, wide)
    none, again, _ = ops.anchor_bwd(grad_output, *grads, *args, False)
    assert none.shape == (0,)
    assert torch.equal(again, grad_a)


@pytest.mark.parametrize("poison", ["a", "anchors"])
def test_anchor_nan_propagation(poison):
    x, a, anchors = normal((2, 5, 3, 3), FLOAT, 0), normal((2, 1, 3, 3), FLOAT, 1), torch.tensor([0.0, 1.0])
    (a[1, 0, 2] if poison == "a" else anchors)[1] = torch.nan
    output, values, index, _, _, counts, residuals = ops.anchor_fwd(x, a, anchors, True, 1)
    bad = a.isnan() if poison == "a" else torch.ones_like(a, dtype=torch.bool)
    assert torch.equal(output.isnan(), bad.expand_as(x))
    assert torch.equal(values.isnan(), bad)
    assert counts.sum() == (~bad).sum()
    grad_x, *_ = ops.anchor_bwd(torch.ones_like(x), None, None, None, x, a, anchors, index, residuals, True, 1, True)
    assert torch.equal(grad_x.isnan(), bad.expand_as(x))


# --- pool ---

# (N, C, H, W), channels_last, dtype of the features, dtype of the query, and what the case covers
POOLED = [
    ((1, 96, 14, 14), False, BF16, FLOAT, "pieces of half a vector, several tiles in one split"),
    ((1, 320, 14, 14), False, HALF, HALF, "several splits"),
    ((1, 320, 14, 14), True, BF16, FLOAT, "five groups of channels"),
    ((2, 40, 30, 30), True, BF16, FLOAT, "several tiles a split, the last one cut short"),
    ((2, 40, 30, 31), False, FLOAT, FLOAT, "rows of odd length"),
    ((1, 1100, 9, 8), False, BF16, FLOAT, "four lanes a row"),
    ((1, 1100, 9, 9), False, FLOAT, FLOAT, "four lanes a row, one element an access"),
    ((1, 1500, 5, 5), True, BF16, FLOAT, "one set of positions"),
    ((1, 600, 9, 9), False, DOUBLE, DOUBLE, "four lanes a row"),
    ((1, 300, 6, 6), True, DOUBLE, DOUBLE, "two sets of positions"),
    ((1, 3, 128, 128), False, FLOAT, FLOAT, "as many splits as there can be"),
    ((20, 3, 9, 9), True, FLOAT, FLOAT, "many images"),
    ((1, 4096, 5, 5), True, BF16, FLOAT, "as much shared memory as a walk can take"),
    ((2, 1100, 7, 7), False, HALF, FLOAT, "slices of channels"),
    ((1, 2100, 17, 17), False, BF16, BF16, "slices of channels, more positions than a block has threads"),
    ((1, 2100, 7, 7), True, FLOAT, FLOAT, "slices of channels"),
    ((1, 600, 7, 7), False, DOUBLE, DOUBLE, "slices of channels"),
]


@pytest.mark.parametrize(
    "case, shared",
    [
        *((case, False) for case in FEATURES + POOLED),
        *((case, True) for case in (FEATURES[0], FEATURES[4], POOLED[1], POOLED[11], POOLED[13])),
    ],
)
def test_pool(case, shared):
    shape, channels_last, dtype, companion, _ = case
    local = normal(shape, dtype, 0, channels_last)
    query = normal(shape[1:2] if shared else shape[:2], companion, 1) / max(1, shape[1]) ** 0.5
    exact = double(local), double(query)
    want = reference.compatibility_pool(*exact)
    pooled, attention, scores, pooled_wide = ops.pool_fwd(local, query, None)
    wide = attention.dtype
    assert pooled_wide.shape == ((0,) if wide == dtype else shape[:2])
    for name, got, exact_output, of in zip(
        ("pooled", "attention", "scores"), (pooled, attention, scores), want, (dtype, wide, wide), strict=True
    ):
        assert_near(name, got, exact_output, of, wide)
    positions = (shape[0], *shape[2:])
    grads = normal(shape[:2], dtype, 2), normal(positions, wide, 3), normal(positions, wide, 4)
    for present in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        given = tuple(grad if here else None for grad, here in zip(grads, present, strict=True))
        wants = gradients(reference.compatibility_pool(*exact), given, exact)
        grad_local, grad_query = ops.pool_bwd(*given, local, query, None, attention,
                                              pooled_wide if wide != dtype else pooled, True)  # fmt: skip
        assert grad_local.stride() == local.stride()
        assert_near("grad_local", grad_local, wants[0], dtype, wide)
        assert_near("grad_query", grad_query, wants[1], companion, wide)
        kept = pooled_wide if wide != dtype else pooled
        none, again = ops.pool_bwd(*given, local, query, None, attention, kept, False)
        assert none.shape == (0,)
        assert torch.equal(again, grad_query)


def test_pool_tokens():
    tokens, query = normal((2, 33, 40), BF16, 0), normal((2, 40), FLOAT, 1)
    pooled, attention, scores, _ = ops.pool_fwd(tokens.transpose(1, 2), query, None)
    want = reference.compatibility_pool(tokens.double().transpose(1, 2), query.double())
    assert_near("pooled", pooled, want[0], BF16)
    assert_near("attention", attention, want[1], FLOAT)
    assert_near("scores", scores, want[2], FLOAT)


# --- pool with many queries, or with a mask ---

# (N, C, H, W), channels_last, dtype of the features, dtype of the query, queries, and what the case covers
MANY = [
    ((2, 24, 6, 7), False, BF16, FLOAT, 3, "rows in pieces of one element"),
    ((2, 24, 6, 7), True, HALF, HALF, 17, "two groups of queries"),
    ((2, 5, 7, 7), True, FLOAT, FLOAT, 1, "an odd number of channels"),
    ((3, 70, 1, 9), False, DOUBLE, DOUBLE, 4, "channels of the last unit that do not exist"),
    ((1, 40, 28, 32), False, FLOAT, FLOAT, 2, "several tiles in each of several splits, two stages"),
    ((1, 40, 27, 31), True, BF16, FLOAT, 16, "several tiles in each of several splits"),
    ((1, 768, 5, 8), True, FLOAT, FLOAT, 16, "as many channels as 99 KiB of shared memory take, in slices"),
    ((2, 600, 7, 8), True, BF16, FLOAT, 12, "three units of channels a warp, one stage"),
    ((1, 520, 9, 8), False, HALF, FLOAT, 20, "pieces of four elements in rows of positions"),
    ((1, 1500, 5, 5), False, BF16, BF16, 2, "slices of channels"),
    ((1, 300, 4, 4), True, DOUBLE, DOUBLE, 2, "slices of channels"),
    ((2, 0, 3, 3), False, FLOAT, FLOAT, 2, "no channels"),
    ((0, 8, 3, 3), False, BF16, FLOAT, 2, "no images"),
    ((2, 8, 3, 3), True, FLOAT, FLOAT, 0, "no queries"),
    ((2, 33, 5, 5), False, FLOAT, FLOAT, None, "one query without an axis"),
    ((1, 5, 14, 14), True, FLOAT, FLOAT, 33, "a long sum over queries"),
]


def masked(kind, shape):
    """A mask of a kind; "empty" leaves out every position of the first image."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(9)
    mask = torch.rand((1 if kind == "shared" else shape[0], *shape[2:]), generator=generator) > 0.4
    if kind == "empty":
        mask[:1] = False
    return mask


def many_inputs(shape, channels_last, dtype, companion, queries, shared):
    local = normal(shape, dtype, 0, channels_last)
    of_query = shape[:2] if queries is None else ((1 if shared else shape[0]), queries, shape[1])
    return local, (normal(of_query, FLOAT, 1) / max(1, shape[1]) ** 0.5).to(companion)


@pytest.mark.parametrize(
    "case, shared, kind",
    [
        *((case, False, None if case[4] is not None else "own") for case in MANY),
        *((MANY[i], True, "own") for i in (0, 1, 4, 9)),
        *((MANY[i], False, kind) for i, kind in ((0, "shared"), (1, "empty"), (3, "own"), (7, "own"), (9, "empty"))),
    ],
)
def test_pool_with_many_queries(case, shared, kind):
    shape, channels_last, dtype, companion, queries, _ = case
    local, query = many_inputs(shape, channels_last, dtype, companion, queries, shared)
    mask = masked(kind, shape)
    exact = double(local), double(query)
    want = reference.compatibility_pool(*exact, mask)
    pooled, attention, scores, pooled_wide = ops.pool_fwd(local, query, mask)
    wide = attention.dtype
    for name, got, exact_output, of in zip(
        ("pooled", "attention", "scores"), (pooled, attention, scores), want, (dtype, wide, wide), strict=True
    ):
        assert_near(name, got, exact_output, of, wide)
    kept = pooled_wide if wide != dtype else pooled
    grads = normal(pooled.shape, dtype, 2), normal(scores.shape, wide, 3), normal(scores.shape, wide, 4)
    for present in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        given = tuple(grad if here else None for grad, here in zip(grads, present, strict=True))
        wants = gradients(reference.compatibility_pool(*exact, mask), given, exact)
        grad_local, grad_query = ops.pool_bwd(*given, local, query, mask, attention, kept, True)
        assert grad_local.stride() == local.stride()
        assert_near("grad_local", grad_local, wants[0], dtype, wide)
        assert_near("grad_query", grad_query, wants[1], companion, wide)
        if mask is not None and not present[2]:
            assert not grad_local.masked_select(~mask[:, None]).any()
        none, again = ops.pool_bwd(*given, local, query, mask, attention, kept, False)
        assert none.shape == (0,)
        assert torch.equal(again, grad_query)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [FLOAT, BF16, DOUBLE])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [24, 1600], ids=["whole", "slices"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_stands_at_a_masked_position_does_not_matter(dtype, channels_last, channels, poison):
    shape = (2, channels, 5, 4)
    local, query = many_inputs(shape, channels_last, dtype, dtype, 3, False)
    mask = masked("own", shape)
    poisoned = torch.where(mask[:, None], local, poison)
    assert poisoned.stride() == local.stride()
    clean, pooled = ops.pool_fwd(local, query, mask), ops.pool_fwd(poisoned, query, mask)
    assert torch.equal(clean[0], pooled[0])
    assert torch.equal(clean[1], pooled[1])
    assert not pooled[2].masked_select(~mask[:, None]).isfinite().any()
    grads = normal(clean[0].shape, dtype, 2), normal(clean[1].shape, clean[1].dtype, 3)
    kept = clean[3] if dtype == BF16 else clean[0]
    for x in (local, poisoned):
        grad_local, grad_query = ops.pool_bwd(*grads, None, x, query, mask, clean[1], kept, True)
        assert not grad_local.masked_select(~mask[:, None]).any()
        if x is local:
            want = grad_local, grad_query
        assert torch.equal(grad_local, want[0])
        assert torch.equal(grad_query, want[1])


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("channels_last", [False, True])
def test_infinite_features_and_queries(dtype, channels_last):
    """A product with Inf is Inf, and not NaN: factors are split into parts."""
    local, query = many_inputs((1, 8, 3, 3), channels_last, dtype, dtype, 2, False)
    local[0, 2, 1, 1] = torch.inf
    query[0, 1, 3] = -torch.inf
    want = reference.compatibility_pool(local.double(), query.double())
    for got, exact in zip(ops.pool_fwd(local, query, None)[:3], want, strict=True):
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.equal(got.isposinf(), exact.isposinf())
        assert torch.equal(got.isneginf(), exact.isneginf())


def test_a_mask_of_an_image_whose_scores_are_all_infinite():
    """No position that takes part gives zeros; only positions of weight zero give NaN, as softmax does."""
    local, query = torch.ones(2, 3, 2, 2), torch.full((1, 2, 3), -torch.inf)
    mask = torch.tensor([[[False, False], [False, False]], [[True, False], [True, True]]])
    pooled, attention, *_ = ops.pool_fwd(local, query, mask)
    assert not pooled[0].any()
    assert not attention[0].any()
    assert pooled[1].isnan().all()
    assert torch.equal(attention[1].isnan(), mask[1].expand(2, 2, 2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [40, 1600], ids=["whole", "slices"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_many_queries_do_not_depend_on_batch_place_or_alignment(channels_last, channels, dtype):
    shape = (3, channels, 5, 8)
    local, query = many_inputs(shape, channels_last, dtype, FLOAT, 5, False)
    mask, grad = masked("own", shape), normal((3, 5, channels), dtype, 2)

    def run(local, query, mask, grad):
        pooled, attention, scores, wide = ops.pool_fwd(local, query, mask)
        kept = pooled if dtype == FLOAT else wide
        return pooled, attention, scores, *ops.pool_bwd(grad, None, None, local, query, mask, attention, kept, True)

    last = [tensor[2:] for tensor in (local, query, mask, grad)]
    moved = torch.empty(last[0].numel() + 1, dtype=dtype)[1:].as_strided(last[0].shape, last[0].stride(), 1)
    for whole, alone, elsewhere in zip(
        run(local, query, mask, grad), run(*last), run(moved.copy_(last[0]), *last[1:]), strict=True
    ):
        assert torch.equal(whole[2:], alone)
        assert torch.equal(alone, elsewhere)


@pytest.mark.parametrize(
    "case, forward, backward", [(MANY[0], 2, 4), (MANY[1], 2, 4), (MANY[9], 3, 5), (MANY[14], 2, 4)]
)
def test_launches_for_many_queries(case, forward, backward):
    """Forward: the pooling and its end, and before them the scores of slices. Backward: Δ, the weights of the features
    and their sums, the sum over splits, and the gradient of the features."""
    shape, channels_last, dtype, companion, queries, _ = case
    local, query = many_inputs(shape, channels_last, dtype, companion, queries, False)
    mask = masked("own", shape)
    before = ops.launches(torch.empty(0))
    pooled, attention, _, wide = ops.pool_fwd(local, query, mask)
    between = ops.launches(torch.empty(0))
    ops.pool_bwd(pooled, None, None, local, query, mask, attention, pooled if wide.dtype == dtype else wide, True)
    assert between - before == forward
    assert ops.launches(torch.empty(0)) - between == backward


# --- launches ---


def passes(shape, channels_last, anchors):
    """A call of each operator, by its name."""
    x, a, query = (
        normal(shape, FLOAT, 0, channels_last),
        normal((shape[0], 1, *shape[2:]), FLOAT, 1),
        normal(shape[:2], FLOAT, 2),
    )
    rectangle, anchors = rectangles(shape[0], FLOAT), torch.linspace(-1, 1, anchors)
    map, map_stats = ops.window_map_fwd(rectangle, *shape[2:], 6.0, True, False, False)
    _, _, stats = ops.window_fwd(x, rectangle, 6.0, True, True, False, False)
    _, _, index, loss, _, _, residuals = ops.anchor_fwd(x, a, anchors, True, 1)
    pooled, attention, scores, _ = ops.pool_fwd(x, query, None)
    return {
        "window_map_fwd": lambda: ops.window_map_fwd(rectangle, *shape[2:], 6.0, True, False, False),
        "window_map_bwd": lambda: ops.window_map_bwd(map, rectangle, map_stats, 6.0, True, False, False),
        "window_fwd": lambda: ops.window_fwd(x, rectangle, 6.0, True, True, False, False),
        "window_bwd": lambda: ops.window_bwd(x, map, x, rectangle, stats, 6.0, True, True, False, False, True),
        "quantize_fwd": lambda: ops.quantize_fwd(a, anchors, 1),
        "quantize_bwd": lambda: ops.quantize_bwd(a, loss, loss, a, anchors, index, residuals, 1),
        "anchor_fwd": lambda: ops.anchor_fwd(x, a, anchors, True, 1),
        "anchor_bwd": lambda: ops.anchor_bwd(x, a, loss, loss, x, a, anchors, index, residuals, True, 1, True),
        "pool_fwd": lambda: ops.pool_fwd(x, query, None),
        "pool_bwd": lambda: ops.pool_bwd(pooled, attention, scores, x, query, None, attention, pooled, True),
    }


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape, anchors, most",
    [
        ((2, 64, 7, 7), 20, 1),
        ((2, 64, 7, 7), 700, 2),
        ((2, 3, 40, 40), 20, 2),
        ((1, 600, 9, 9), 20, 2),
        ((0, 3, 5, 5), 5, 1),
    ],
)
def test_at_most_two_launches(shape, channels_last, anchors, most):
    """One launch if a single block can process the map."""
    calls = passes(shape, channels_last, anchors)
    assert calls.keys() == SCHEMAS.keys()
    for name, call in calls.items():
        before = ops.launches(torch.empty(0))
        call()
        assert ops.launches(torch.empty(0)) - before <= most, name


# --- independence of batch and alignment ---


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(7, 8), (7, 7), (33, 34)])
def test_results_do_not_depend_on_batch_place_or_alignment(dtype, channels_last, size):
    shape = (3, 16, *size)
    x, grad_output = normal(shape, dtype, 0, channels_last), normal(shape, dtype, 1, channels_last)
    rectangle, a, anchors = rectangles(3, FLOAT), normal((3, 1, *size), FLOAT, 2), torch.tensor([0.0, 1.0, -1.0])

    def run(x, grad_output, rectangle, a):
        output, map, stats = ops.window_fwd(x, rectangle, 6.0, True, True, False, False)
        grads = ops.window_bwd(grad_output, None, x, rectangle, stats, 6.0, True, True, False, False, True)
        modulated, values, index, _, _, _, residuals = ops.anchor_fwd(x, a, anchors, True, 1)
        others = ops.anchor_bwd(grad_output, None, None, None, x, a, anchors, index, residuals, True, 1, True)
        query, grad_pooled = rectangle.repeat(1, 4)[:, : x.shape[1]].contiguous(), x[:, :, 1, 1].contiguous()
        pooled = ops.pool_fwd(x, query, None)
        grads_pool = ops.pool_bwd(
            grad_pooled, None, None, x, query, None, pooled[1], pooled[0] if x.dtype == FLOAT else pooled[3], True
        )
        return output, map, *grads, modulated, values, *others[:2], *pooled[:3], *grads_pool

    def misaligned(tensor):
        moved = torch.empty(tensor.numel() + 1, dtype=dtype)[1:].as_strided(tensor.shape, tensor.stride(), 1)
        return moved.copy_(tensor)

    last = [tensor[2:] for tensor in (x, grad_output, rectangle, a)]
    for whole, alone, moved in zip(
        run(x, grad_output, rectangle, a), run(*last), run(misaligned(last[0]), misaligned(last[1]), *last[2:]),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(whole[2:], alone)
        assert torch.equal(alone, moved)
