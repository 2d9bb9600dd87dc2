"""Compatibility pooling in difficult cases: large scores, no channels, one position, NaN."""

import math

import pytest
import torch
from cases import case_id, check, doubles, lay, run

import attnkern


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=case_id)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_scores_of_ten_thousand(scale, dtype, backend, device):
    """The softmax chooses one position, nothing overflows, and gradients are exact."""
    local = torch.randn(2, 3, 5, 7, dtype=dtype, device=device)
    local[:, 0] = torch.linspace(-1, 1, 35, device=device).view(5, 7)
    query = torch.tensor([[scale, 0.0, 0.0]] * 2, dtype=dtype, device=device)
    found = run("compatibility_pool", {"local": local, "query": query}, backend=backend)
    chosen = (0, 0) if scale < 0 else (4, 6)
    assert torch.equal(found["attention"].sum((1, 2)), torch.ones(2, dtype=dtype, device=device))
    assert (found["attention"][:, *chosen] == 1).all()
    assert torch.equal(found["pooled"], local[:, :, *chosen])
    assert all(found[name].isfinite().all() for name in found)
    if dtype == torch.float64:
        check(found, run("compatibility_pool", {"local": local, "query": query}, backend="reference"))


def test_equal_scores_of_any_size_share(backend, device):
    """Equal scores give the mean, however large they are: a common offset changes nothing."""
    local = torch.randn(2, 3, 4, 5, device=device)
    local[:, 0] = 1
    for score in (0.0, 1e4, -3e4, 1e30):
        query = torch.tensor([[score, 0, 0]] * 2, dtype=torch.float32, device=device)
        result = attnkern.compatibility_pool(local, query, backend=backend)
        torch.testing.assert_close(result.attention, torch.full((2, 4, 5), 0.05, device=device))
        torch.testing.assert_close(result.pooled, local.mean((2, 3)))


def test_one_position(backend, device):
    """With one position the attention is 1: pooling is the identity and the gradient of the query is exactly zero."""
    local, query = torch.randn(3, 4, 1, 1, device=device), torch.randn(3, 4, device=device)
    found = run("compatibility_pool", {"local": local, "query": query}, through=("pooled",), backend=backend)
    assert torch.equal(found["attention"], torch.ones(3, 1, 1, device=device))
    assert torch.equal(found["pooled"], local[:, :, 0, 0])
    torch.testing.assert_close(found["grad_query"], torch.zeros(3, 4, device=device), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_no_channels(shared, backend, device):
    """Without channels the scores are 0 and the attention is uniform."""
    query = torch.empty(0, device=device) if shared else torch.empty(3, 0, device=device)
    tensors = {"local": torch.empty(3, 0, 2, 5, device=device), "query": query}
    found = run("compatibility_pool", tensors, backend=backend)
    assert torch.equal(found["scores"], torch.zeros(3, 2, 5, device=device))
    torch.testing.assert_close(found["attention"], torch.full((3, 2, 5), 0.1, device=device))
    assert found["pooled"].shape == (3, 0)


def test_an_empty_batch_gives_a_shared_query_no_gradient(backend, device):
    tensors = {"local": torch.empty(0, 4, 2, 5, device=device), "query": torch.randn(4, device=device)}
    found = run("compatibility_pool", tensors, backend=backend)
    assert torch.equal(found["grad_query"], torch.zeros(4, device=device))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 200, 7, 7)], ids=case_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_stays_in_its_image(value, shape, backend, device):
    local, query = torch.randn(shape, device=device), torch.randn(shape[:2], device=device)
    clean = run("compatibility_pool", {"local": local, "query": query}, backend=backend)
    local[0, 1, 2, 3] = value
    found = run("compatibility_pool", {"local": local, "query": query}, backend=backend)
    expected = run("compatibility_pool", {"local": local, "query": query}, backend="reference")
    for name in ("pooled", "attention", "scores", "grad_local", "grad_query"):
        torch.testing.assert_close(found[name][1], clean[name][1])
        assert torch.equal(found[name][0].isnan(), expected[name][0].isnan()), name
    if math.isnan(value):
        assert found["attention"][0].isnan().all()
        assert found["pooled"][0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
def test_large_means_cost_no_digits(dtype, backend, device):
    """Features after a ReLU have a large mean: dq must use pooled before it is rounded to the output."""
    local = torch.rand(2, 32, 6, 6, device=device).add(3).to(dtype)
    query = torch.randn(2, 32, device=device).mul(0.2).to(dtype)
    tensors, grads = {"local": local, "query": query}, {"pooled": torch.randn(2, 32, device=device).to(dtype)}
    options = {"through": ("pooled",)}
    found = run("compatibility_pool", tensors, grads=grads, backend=backend, **options)
    expected = run("compatibility_pool", doubles(tensors), grads=doubles(grads), backend="reference", **options)
    check(found, expected)


def test_parametrised_compatibility_is_this_function(backend, device):
    """⟨u, ℓ + g⟩ differs from ⟨u, ℓ⟩ by a constant: the attention is the same, and the gradient of g is zero."""
    local, u = torch.randn(2, 5, 3, 4, device=device), torch.randn(5, device=device)
    g = torch.randn(2, 5, device=device, requires_grad=True)
    attention = ((local + g[:, :, None, None]) * u[:, None, None]).sum(1).flatten(1).softmax(1)
    found = attnkern.compatibility_pool(local, u, backend=backend)
    torch.testing.assert_close(found.attention.flatten(1), attention)
    (gradient,) = torch.autograd.grad((local.flatten(2) * attention[:, None]).sum(), g)
    torch.testing.assert_close(gradient, torch.zeros_like(g), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels, size", [(32, (4, 6)), (32, (128, 72)), (200, (7, 7))], ids=case_id)
def test_parts_of_a_map_without_a_finite_score(channels, size, layout, backend, device):
    """Scores of half of the positions, in whole tiles, overflow to -Inf: the other positions have all the weight. If
    all scores are -Inf, the result is NaN."""
    local = torch.zeros(3, channels, *size, device=device)
    local[:, :, : size[0] // 2] = -1e20
    local[2] = -1e20
    local = lay(local, layout)
    pooled, attention, scores = attnkern.compatibility_pool(
        local, torch.full((3, channels), 1e20, device=device), backend=backend
    )
    assert scores[:, 0, 0].isneginf().all()
    assert not attention[:2, : size[0] // 2].any()
    torch.testing.assert_close(attention[:2, size[0] // 2 :].sum((1, 2)), torch.ones(2, device=device))
    assert not pooled[:2].any()
    assert attention[2].isnan().all()
    assert pooled[2].isnan().all()
