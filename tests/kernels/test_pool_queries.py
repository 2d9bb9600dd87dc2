"""Compatibility pooling with many queries and with a mask."""

import math

import pytest
import torch
from cases import POOLED, call, case_id, check, check_run, doubles, lay, leaves_of, make, run, same, upstream
from conftest import EMULATED, every_dtype, large

import attnkern

POOL = "compatibility_pool"
WEIGHTED = ("pooled", "attention")  # the results that a mask changes


def pool(queries, n=3, c=9, size=(5, 6), mask=None, shared=False, **options):
    """Inputs with this number of queries (None: without the axis), and a mask: None, "own" or "shared"."""
    tensors = make("compatibility_pool_masked", n, c, size, **options)
    generator = torch.Generator().manual_seed(7)
    shape = (() if shared else (n,)) if queries is None else (1 if shared else n, queries)
    query = torch.randn(*shape, c, generator=generator, dtype=torch.float64) / max(1, c) ** 0.5
    tensors["query"] = query.to(tensors["query"])
    if mask != "own":
        first = tensors.pop("mask")[:1]
        if mask == "shared":
            tensors["mask"] = first
    return tensors


float_and_half = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=large)], ids=case_id
)


SHAPES = [(1, (1, 3)), (3, (17,)), (65, (7, 7)), (130, (3, 43))]
SHAPES += [] if EMULATED else [(600, (33,)), (70, (67, 71)), (4200, (5, 5))]  # they take seconds


# --- queries ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mask", [pytest.param(None, marks=large), "own", pytest.param("shared", marks=large)])
@pytest.mark.parametrize("queries", [*(pytest.param(m, marks=large) for m in (1, 2, 3, 7, 8, 16)), 4, 33])
@every_dtype
def test_numbers_of_queries(queries, mask, layout, dtype, backend, device):
    check_run(POOL, pool(queries, mask=mask, layout=layout, dtype=dtype, device=device), backend)


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("c, size", [(130, (3, 3)), (9, (15, 10))], ids=case_id)
@float_and_half
def test_images_of_several_programs(dtype, c, size, layout, backend, device):
    """Blocks of channels and splits of positions."""
    check_run(POOL, pool(3, 2, c, size, mask="own", layout=layout, dtype=dtype, device=device), backend)


@pytest.mark.pairs
@large
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [5, 16])
@pytest.mark.parametrize("c, size", SHAPES, ids=case_id)
def test_shapes_with_queries_and_masks(c, size, queries, layout, dtype, backend, device):
    """Tiles of positions, blocks of channels, and remainders of both."""
    check_run(POOL, pool(queries, 3, c, size, mask="own", layout=layout, dtype=dtype, device=device), backend)
    check_run(POOL, pool(queries, 2, c, size, layout=layout, dtype=dtype, device=device), backend)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mask", [None, "own"])
@float_and_half
def test_one_query_is_a_query_without_the_axis(dtype, mask, layout, backend, device):
    one = pool(1, c=65, mask=mask, layout=layout, dtype=dtype, device=device)
    grads = upstream(call(POOL, one, backend=backend))
    found = run(POOL, one, grads=grads, backend=backend)
    for name in (*POOLED, "grad_query"):
        found[name] = found[name].squeeze(1)
    plain = one | {"query": one["query"][:, 0]}
    wanted = run(POOL, plain, grads={name: grad[:, 0] for name, grad in grads.items()}, backend=backend)
    same(found, wanted)


@pytest.mark.parametrize("queries", [None, 1, 3, pytest.param(9, marks=large)])
@pytest.mark.parametrize("mask", [None, "own"])
def test_a_shared_query_is_an_expanded_one(mask, queries, backend, device):
    """The same results and gradients of the features; its gradient is the sum over the batch."""
    tensors = pool(queries, mask=mask, shared=True, dtype=torch.float32, device=device)
    found = run(POOL, tensors, backend=backend)
    shape = (3, *tensors["query"].shape[-1:]) if queries is None else (3, *tensors["query"].shape[1:])
    expanded = run(POOL, tensors | {"query": tensors["query"].expand(shape)}, backend=backend)
    total = expanded.pop("grad_query").sum(0, keepdim=queries is not None)
    torch.testing.assert_close(found.pop("grad_query"), total)
    (check if backend == "reference" else same)(found, expanded)


@pytest.mark.parametrize("mask", [None, "own"])
@pytest.mark.parametrize("shared", [False, True])
def test_no_queries(shared, mask, backend, device):
    """Empty results, and a gradient of zero for the features."""
    tensors = pool(0, mask=mask, shared=shared, dtype=torch.float32, device=device)
    found = run(POOL, tensors, backend=backend)
    assert found["pooled"].shape == (3, 0, 9)
    assert found["attention"].shape == found["scores"].shape == (3, 0, 5, 6)
    assert torch.equal(found["grad_local"], torch.zeros_like(tensors["local"]))
    assert found["grad_query"].shape == tensors["query"].shape


@pytest.mark.parametrize("queries", [None, 0, 2])
@pytest.mark.parametrize("n, c", [(0, 3), (2, 0), (0, 0)])
def test_no_images_or_channels(n, c, queries, backend, device):
    for mask in (None, "own", "shared"):
        for shared in (False, True):
            tensors = pool(queries, n, c, (2, 3), dtype=torch.float32, shared=shared, device=device)
            if mask is not None:
                tensors["mask"] = torch.ones(1 if mask == "shared" else n, 2, 3, dtype=torch.bool, device=device)
            found = check_run(POOL, tensors, backend)
            assert not found["grad_query"].any()


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [None, 3, pytest.param(9, marks=large)])
@float_and_half
def test_a_mask_of_all_positions_changes_nothing(dtype, queries, layout, backend, device):
    tensors = pool(queries, layout=layout, dtype=dtype, device=device)
    wanted = run(POOL, tensors, backend=backend)
    for n in (1, 3):
        mask = torch.ones(n, 5, 6, dtype=torch.bool, device=device)
        check(run(POOL, tensors | {"mask": mask}, backend=backend), doubles(wanted))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [None, 3, pytest.param(9, marks=large)])
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=large)])
def test_masked_positions_might_as_well_be_absent(shared, queries, layout, backend, device):
    """The results at the other positions are those of features without the masked ones, and the gradients as well."""
    tensors = pool(queries, mask="own", shared=shared, layout=layout, dtype=torch.float32, device=device)
    tensors["mask"] = tensors["mask"][:1]
    kept = tensors["mask"][0].flatten()
    found = run(POOL, tensors, through=WEIGHTED, backend=backend)
    few = {"local": tensors["local"].flatten(2)[:, :, kept], "query": tensors["query"]}
    grads = {"pooled": torch.ones_like(found["pooled"]), "attention": found["attention"].cos()}
    few_grads = {"pooled": grads["pooled"], "attention": grads["attention"].flatten(-2)[..., kept]}
    found = run(POOL, tensors, through=WEIGHTED, grads=grads, backend=backend)
    wanted = run(POOL, few, through=WEIGHTED, grads=few_grads, backend=backend)
    for name in ("attention", "scores", "grad_local"):
        found[name] = found[name].flatten(-2)[..., kept]
    check(found, doubles(wanted))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [None, 3, pytest.param(9, marks=large)])
@float_and_half
def test_what_a_mask_promises(dtype, queries, layout, backend, device):
    """Attention and the gradients of masked features are exactly zero, and so is all of an image without positions."""
    tensors = pool(queries, mask="own", layout=layout, dtype=dtype, device=device)
    mask = tensors["mask"]
    assert not mask[2].any()
    assert mask[:2].flatten(1).any(1).all()
    found = run(POOL, tensors, through=WEIGHTED, backend=backend)
    over = mask if queries is None else mask[:, None].expand_as(found["attention"])
    assert not found["attention"][~over].any()
    assert (found["attention"][over] > 0).all()
    assert not found["grad_local"].movedim(1, -1)[~mask].any()
    assert found["grad_local"].movedim(1, -1)[mask].any(1).all()
    for name in (*WEIGHTED, "grad_local", "grad_query"):
        assert not found[name][2].any(), name
    scores = call(POOL, {"local": tensors["local"], "query": tensors["query"]}, backend=backend)["scores"]
    torch.testing.assert_close(found["scores"], scores)  # another kernel may add in another order


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [None, 3, pytest.param(9, marks=large)])
def test_scores_of_masked_positions_have_their_gradient(queries, layout, backend, device):
    """A masked local gets Σ_m dscore_m q_m and nothing else, also in an image without positions."""
    tensors = pool(queries, mask="own", layout=layout, dtype=torch.float32, device=device)
    found = run(POOL, tensors, backend=backend)
    grads = {"pooled": torch.ones_like(found["pooled"]), "attention": found["attention"] + 1}
    grads["scores"] = found["scores"].sin()
    found = run(POOL, tensors, grads=grads, backend=backend)
    query, slope = (t if queries is not None else t[:, None] for t in (tensors["query"], grads["scores"]))
    alone = torch.einsum("nmhw,nmc->nhwc", slope.double(), query.double())
    gone = ~tensors["mask"]
    check({"local": found["grad_local"].movedim(1, -1)[gone]}, {"local": alone[gone]})
    whole = torch.einsum("nmhw,nchw->nmc", slope[2:].double(), tensors["local"][2:].double())
    check({"query": found["grad_query"][2:]}, {"query": whole if queries is not None else whole[:, 0]})


@pytest.mark.pairs
@pytest.mark.parametrize("value", [math.nan, *(pytest.param(x, marks=large) for x in (math.inf, -math.inf, "max"))])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [None, 3, pytest.param(9, marks=large)])
@every_dtype
def test_what_is_stored_at_masked_positions_reaches_only_scores(dtype, queries, layout, value, backend, device):
    """To the bit: NaN, Inf or anything else gives what zeros give."""
    tensors = pool(queries, mask="own", layout=layout, dtype=dtype, device=device)
    value = torch.finfo(dtype).max if value == "max" else value
    gone = ~tensors["mask"][:, None].expand_as(tensors["local"])
    clean, dirty = (lay(tensors["local"].masked_fill(gone, fill), layout) for fill in (0, value))
    found, wanted = (run(POOL, tensors | {"local": x}, through=WEIGHTED, backend=backend) for x in (dirty, clean))
    hidden = gone[:, 0] if queries is None else gone[:, :1].expand_as(found["scores"])
    scores, zeros = found.pop("scores"), wanted.pop("scores")
    same({"scores": scores[~hidden]}, {"scores": zeros[~hidden]})
    expected = call(POOL, doubles(tensors | {"local": dirty}), backend="reference")["scores"]
    assert torch.equal(scores.isnan(), expected.isnan()) or value not in (math.nan, math.inf, -math.inf)
    assert all(result.isfinite().all() for result in found.values())
    same(found, wanted)


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=large)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [None, 3, pytest.param(9, marks=large)])
def test_gradients_of_masked_attention_reach_nothing(queries, layout, value, backend, device):
    """Not even if they are infinite, as those of a logarithm are where the attention is 0."""
    tensors = pool(queries, mask="own", layout=layout, dtype=torch.float32, device=device)
    grads = upstream(call(POOL, tensors, backend=backend))
    grads = {name: grads[name] for name in WEIGHTED}
    gone = ~tensors["mask"] if queries is None else ~tensors["mask"][:, None].expand_as(grads["attention"])
    dirty = grads | {"attention": grads["attention"].masked_fill(gone, value)}
    found, wanted = (run(POOL, tensors, through=WEIGHTED, grads=g, backend=backend) for g in (dirty, grads))
    same({"grad_local": found["grad_local"]}, {"grad_local": wanted["grad_local"]})
    same({"grad_query": found["grad_query"]}, {"grad_query": wanted["grad_query"]})


@pytest.mark.parametrize("queries", [None, 3])
def test_second_derivatives_beside_nan(queries, backend, device):
    tensors = pool(queries, mask="own", device=device, dtype=torch.float32)
    gone = ~tensors["mask"][:, None].expand_as(tensors["local"])
    clean, dirty = (tensors | {"local": tensors["local"].masked_fill(gone, fill)} for fill in (0, math.nan))

    def second(tensors):
        leaves = leaves_of(tensors)
        found = call(POOL, leaves, backend=backend)
        wrt = [leaves["local"], leaves["query"]]
        first = torch.autograd.grad(sum(found[name].sin().sum() for name in WEIGHTED), wrt, create_graph=True)
        more = torch.autograd.grad(sum(grad.sin().sum() for grad in first), wrt)
        return dict(enumerate([*(grad.detach() for grad in first), *more]))

    found = second(dirty)
    assert all(grad.isfinite().all() for grad in found.values())
    same(found, second(clean))


@pytest.mark.pairs
@large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("queries", [None, 3, 9])
@float_and_half
def test_masks_of_whole_tiles(dtype, queries, layout, backend, device):
    """The first or the last half of the positions, and all but one."""
    size = (24, 20) if EMULATED else (96, 72)
    tensors = pool(queries, 3, 64, size, layout=layout, dtype=dtype, device=device)
    mask = torch.ones(3, *size, dtype=torch.bool, device=device)
    mask[0, : size[0] // 2] = mask[1, size[0] // 2 :] = mask[2] = False
    mask[2, -1, -1] = True
    found = check_run(POOL, tensors | {"mask": mask}, backend)
    assert (found["attention"][2, ..., -1, -1] == 1).all()


@pytest.mark.parametrize("queries", [None, 3])
def test_masked_scores_beyond_all_others(queries, backend, device):
    """A mask hides the largest score, before which the others would underflow."""
    tensors = pool(queries, dtype=torch.float32, device=device)
    tensors["local"][:, :, 2, 3] = 1e4 * tensors["query"].reshape(3, -1, 9)[:, 0].sign()
    mask = torch.ones(1, 5, 6, dtype=torch.bool, device=device)
    mask[0, 2, 3] = False
    found = check_run(POOL, tensors | {"mask": mask}, backend)
    total = found["attention"].flatten(-2).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(
    "how", ["sliced", "transposed", *(pytest.param(how, marks=large) for how in ("expanded", "flipped", "misaligned"))]
)
@pytest.mark.parametrize("queries", [None, 3])
def test_masks_and_queries_in_any_layout(how, queries, backend, device):
    tensors = pool(queries, mask="own", dtype=torch.float32, device=device)
    mask, query = tensors["mask"], tensors["query"]
    laid = {
        "sliced": lambda t: torch.stack((t, ~t if t.dtype == torch.bool else t * torch.nan), -1)[..., 0],
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": lambda t: t[:, :1].expand_as(t),
        "flipped": lambda t: t.flip(-1).flip(-1),
        "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    }[how]
    odd = tensors | {"mask": laid(mask), "query": laid(query)}
    plain = {name: tensor.contiguous() for name, tensor in odd.items()}
    check(run(POOL, odd, backend=backend), doubles(run(POOL, plain, backend=backend)))


def test_heads_of_a_folded_projection(backend, device):
    """Multi-head attention of one learned query: keys and values are projections of the locals, which fold away."""
    torch.manual_seed(3)
    n, c, heads, length = 2, 12, 3, 7
    attend = torch.nn.MultiheadAttention(c, heads, batch_first=True, device=device)
    tokens, probe = torch.randn(n, length, c, device=device), torch.randn(1, 1, c, device=device)
    gone = torch.zeros(n, length, dtype=torch.bool, device=device)
    gone[0, 2:4] = gone[1, :3] = True
    wanted, weights = attend(probe.expand(n, 1, c), tokens, tokens, gone, average_attn_weights=False)
    (w_q, w_k, w_v), (b_q, _, b_v) = (attend.in_proj_weight.chunk(3), attend.in_proj_bias.chunk(3))
    q = (probe[0, 0] @ w_q.T + b_q).view(heads, 1, c // heads) / (c // heads) ** 0.5
    query = (q @ w_k.view(heads, c // heads, c)).transpose(0, 1)
    found = attnkern.compatibility_pool(tokens.mT, query, mask=~gone, backend=backend)
    values = torch.einsum("nmc,mdc->nmd", found.pooled, w_v.view(heads, c // heads, c)) + b_v.view(heads, -1)
    torch.testing.assert_close(attend.out_proj(values.flatten(1)), wanted[:, 0])
    torch.testing.assert_close(found.attention, weights[:, :, 0])
