"""Results of which only some are used, and tensors that change before backward: docs/reliability.md."""

import pytest
import torch
from cases import FUNCTIONS, call, case_id, check, leaves_of, make, same
from conftest import every_function

ARGUMENTS = [(function, name) for function, (names, _) in FUNCTIONS.items() for name in names]
ARGUMENTS.append(("compatibility_pool_masked", "mask"))


@pytest.mark.parametrize(
    "function, used, without",
    [
        ("window_attention", "map", {"x"}),
        ("window_attention", "output", set()),
        ("compatibility_pool", "pooled", set()),
        ("compatibility_pool", "attention", set()),
        ("compatibility_pool", "scores", set()),
    ],
)
def test_only_one_result_used(function, used, without, backend, device):
    """An input that the result does not depend on gets None, not zeros. test_transforms tests the anchor functions."""
    tensors = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
    result = call(function, tensors, backend=backend)[used]
    grads = torch.autograd.grad(result.square().sum(), list(tensors.values()), allow_unused=True)
    assert {name for name, grad in zip(tensors, grads, strict=True) if grad is None} == without


@pytest.mark.kernels
@pytest.mark.parametrize("function, name", ARGUMENTS, ids=case_id)
def test_an_input_changed_before_backward_is_refused(function, name, backend, device):
    """For each input, even if only another one needs a gradient."""
    tensors = make(function, dtype=torch.float32, device=device)
    for wrt in FUNCTIONS[function][0]:
        leaves = {k: t.clone().requires_grad_(k == wrt) for k, t in tensors.items()}
        results = call(function, leaves, size=(4, 6), backend=backend)
        total = sum(r.square().sum() for r in results.values() if r.requires_grad)
        with torch.no_grad():
            leaves[name].logical_not_() if name == "mask" else leaves[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, leaves[wrt])


@pytest.mark.kernels
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_indices_changed_before_backward(function, backend, device):
    """PyTorch raises an error for the indices; the counts may be changed."""
    tensors = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
    result = call(function, tensors, backend=backend)
    result["counts"].zero_()
    result["commitment_loss"].backward(retain_graph=True)
    result["indices"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result["commitment_loss"].backward()


@pytest.mark.kernels
@pytest.mark.parametrize("wrong", [-1, 7, 40, 10**6, -(2**40), 2**62])
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_indices_changed_through_data(function, wrong, backend, device):
    """PyTorch does not notice a change through .data: backward treats indices out of range as 0 and stays in bounds."""

    def gradients(index):
        tensors = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
        results = call(function, tensors, backend=backend)
        results["indices"].data.fill_(index)
        total = sum(results[name].square().sum() for name in FUNCTIONS[function][1])
        return dict(enumerate(torch.autograd.grad(total, list(tensors.values()))))

    same(gradients(wrong), gradients(0))


CHANGES = {
    "larger": lambda t: torch.ones(*(5 * n for n in t.shape), dtype=t.dtype, device=t.device),
    "smaller": lambda t: t.new_ones((1,) * t.dim()),
    "other dtype": lambda t: t.double(),
    "other dimensions": lambda t: t[None].clone(),
}


@pytest.mark.kernels
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("function, name", ARGUMENTS, ids=case_id)
def test_other_data_before_backward(function, name, change, backend, device):
    """``tensor.data = other`` raises RuntimeError: PyTorch does not notice it, and kernels would read out of bounds."""
    leaves = leaves_of(make(function, dtype=torch.float32, device=device))
    results = call(function, leaves, size=(4, 6), backend=backend)
    total = sum(r.square().sum() for r in results.values() if r.requires_grad)
    was = leaves[name].dtype
    leaves[name].data = CHANGES[change](leaves[name].detach())
    with pytest.raises(RuntimeError, match=rf"attnkern: a tensor that backward needs was {was}, \(.*and became"):
        total.backward()


@pytest.mark.kernels  # the reference is a graph of PyTorch, which refuses other changes
@every_function
def test_a_result_changed_before_backward(function, backend, device):
    """relu_() after a layer: correct gradients, or PyTorch's error if the backward pass uses that result."""
    tensors = make(function, dtype=torch.float32, device=device)

    def gradients(name, change):
        leaves = leaves_of({k: t.clone() for k, t in tensors.items()})
        results = call(function, leaves, size=(4, 6), backend=backend)
        results[name] = change(results[name])
        total = sum(results[key].square().sum() for key in FUNCTIONS[function][1])
        return torch.autograd.grad(total, [leaf for leaf in leaves.values() if leaf.requires_grad])

    refused = {"pooled", "attention"} if function.startswith("compatibility_pool") else set()
    for name in FUNCTIONS[function][1]:
        want = gradients(name, lambda r: (r * 3).relu())
        if name in refused:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(name, lambda r: r.mul_(3).relu_())
        else:
            check(dict(enumerate(gradients(name, lambda r: r.mul_(3).relu_()))), dict(enumerate(want)))
