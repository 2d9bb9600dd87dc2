"""Results of which only some are used, and tensors that change before backward: docs/reliability.md."""

import pytest
import torch
from cases import FUNCTIONS, call, case_id, check, make, same
from conftest import every_function

ARGUMENTS = [(function, name) for function, (names, _) in FUNCTIONS.items() for name in names]


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
    """None, not zeros, for an input that the result does not depend on; the anchors' functions: test_transforms."""
    tensors = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
    result = call(function, tensors, backend=backend)[used]
    grads = torch.autograd.grad(result.square().sum(), list(tensors.values()), allow_unused=True)
    assert {name for name, grad in zip(tensors, grads, strict=True) if grad is None} == without


@pytest.mark.kernels
@pytest.mark.parametrize("function, name", ARGUMENTS, ids=case_id)
def test_an_input_changed_before_backward_is_refused(function, name, backend, device):
    """Each of them, also when only another needs a gradient."""
    tensors = make(function, dtype=torch.float32, device=device)
    for wrt in tensors:
        leaves = {k: t.clone().requires_grad_(k == wrt) for k, t in tensors.items()}
        results = call(function, leaves, size=(4, 6), backend=backend)
        total = sum(r.square().sum() for r in results.values() if r.requires_grad)
        with torch.no_grad():
            leaves[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, leaves[wrt])


@pytest.mark.kernels
@pytest.mark.parametrize("function", ["anchor_quantize", "anchor_attention"])
def test_indices_changed_before_backward(function, backend, device):
    """PyTorch's error; the counts are the user's."""
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
def test_indices_changed_behind_pytorchs_back(function, wrong, backend, device):
    """By way of .data, which nobody notices: backward takes those that name no anchor for 0, and reads nothing else."""

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
    """``tensor.data = other``: RuntimeError, since PyTorch does not notice and a kernel would leave its memory."""
    leaves = {k: t.requires_grad_() for k, t in make(function, dtype=torch.float32, device=device).items()}
    results = call(function, leaves, size=(4, 6), backend=backend)
    total = sum(r.square().sum() for r in results.values() if r.requires_grad)
    leaves[name].data = CHANGES[change](leaves[name].detach())
    with pytest.raises(RuntimeError, match=r"attnkern: a tensor that backward needs was torch.float32, \(.*and became"):
        total.backward()


@pytest.mark.kernels  # the reference is PyTorch's own graph, which refuses others
@every_function
def test_a_result_changed_before_backward(function, backend, device):
    """relu_() behind a layer: right gradients, or PyTorch's error where the backward pass starts from that result."""
    tensors = make(function, dtype=torch.float32, device=device)

    def gradients(name, change):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        results = call(function, leaves, size=(4, 6), backend=backend)
        results[name] = change(results[name])
        total = sum(results[key].square().sum() for key in FUNCTIONS[function][1])
        return torch.autograd.grad(total, list(leaves.values()))

    refused = {"pooled", "attention"} if function == "compatibility_pool" else set()
    for name in FUNCTIONS[function][1]:
        want = gradients(name, lambda r: (r * 3).relu())
        if name in refused:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(name, lambda r: r.mul_(3).relu_())
        else:
            check(dict(enumerate(gradients(name, lambda r: r.mul_(3).relu_()))), dict(enumerate(want)))
