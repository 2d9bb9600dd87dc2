"""Strides, offsets, dtypes of gradients, shared storage and very large tensors: docs/reliability.md."""

import os

import pytest
import torch
from cases import FUNCTIONS, POOLS, WINDOWS, call, case_id, check, doubles, make, run, same, upstream
from conftest import every_function, large

SIZE = (3, 4)


# --- strides and offsets ---------------------------------------------------------------------------------------------


def odd(tensor, how):
    """The same numbers in an odd memory layout; ``overlapping`` gives other numbers, in shared storage."""
    match how:
        case "flipped":  # PyTorch has no negative strides: flip makes a copy
            return tensor.flip(-1).flip(-1)
        case "every other":
            storage = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan).to(tensor)
            storage[..., 1::2] = tensor
            return storage[..., 1::2]
        case "overlapping":  # each row starts one element after the previous one
            storage = tensor.flatten()
            strides = [1] * tensor.dim()
            return storage.as_strided(tensor.shape, strides) if storage.numel() else tensor
        case int():
            storage = torch.full((tensor.numel() + how,), torch.nan).to(tensor)
            return storage[how:].view(tensor.shape).copy_(tensor)
    raise ValueError(how)


@pytest.mark.pairs
@pytest.mark.parametrize("how", ["flipped", "every other", "overlapping"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=large)], ids=case_id)
@every_function
def test_odd_strides(function, how, dtype, backend, device):
    """For inputs and gradients; overlapping inputs have the gradient of a contiguous tensor of the same values."""
    tensors = make(function, 2, 3, SIZE, dtype=dtype, device=device)
    if "rectangle" in tensors:  # all columns in the same range, because overlapping mixes them
        tensors["rectangle"] = tensors["rectangle"].abs() * 0.4 + 0.3
    tensors = {name: odd(tensor, how) for name, tensor in tensors.items()}
    options = {"size": SIZE, "backend": backend}
    grads = {k: odd(g, how) if g.dim() else g for k, g in upstream(call(function, tensors, **options)).items()}
    found = run(function, tensors, grads=grads, **options)
    plain, plain_grads = ({k: t.contiguous() for k, t in d.items()} for d in (tensors, grads))
    check(found, run(function, doubles(plain), grads=doubles(plain_grads), **options | {"backend": "reference"}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
@every_function
def test_storage_offsets(function, dtype, backend, device, interpreted):
    """Every alignment of the first element gives the same bits (in the reference: the same numbers)."""
    tensors = make(function, 2, 9, (4, 5), dtype=dtype, device=device)
    options = {"size": (4, 5), "backend": backend}
    grads = upstream(call(function, tensors, **options))
    first = run(function, tensors, grads=grads, **options)
    for offset in (1, 7) if interpreted else range(1, 8):
        moved, moved_grads = ({k: odd(t, offset) for k, t in d.items()} for d in (tensors, grads))
        assert next(iter(moved.values())).storage_offset() == offset
        found = run(function, moved, grads=moved_grads, **options)
        if backend == "reference":
            check(found, doubles(first))
        else:
            same(found, first, f"at offset {offset}")


@every_function
def test_gradients_of_another_dtype(function, backend, device):
    """PyTorch casts gradients to the dtype of the result before it calls backward."""
    tensors = make(function, 2, 3, SIZE, dtype=torch.float32, device=device)
    options = {"size": SIZE, "backend": backend}
    grads = upstream(call(function, tensors, **options))
    for dtype in (torch.float64, torch.bfloat16):
        other = {name: grad.to(dtype) for name, grad in grads.items()}
        found = run(function, tensors, grads=other, **options)
        cast = {name: grad.float() for name, grad in other.items()}
        same(found, run(function, tensors, grads=cast, **options), f"with gradients in {dtype}")
        assert all(found[f"grad_{name}"].dtype == torch.float32 for name in FUNCTIONS[function][0])


def test_one_tensor_as_two_arguments(backend, device):
    """The same tensor, or views of one storage, as two arguments: its gradient is the sum of both gradients."""
    x, flat, tokens = torch.rand(2, 1, 3, 4), torch.rand(5), torch.rand(2, 3, 6)
    rows = torch.rand(2, 1, 1, 5) * 0.5 + 0.25
    calls = {
        "anchor_attention": (x, lambda t: {"x": t, "a": t, "anchors": t[0, 0, 0]}),
        "anchor_quantize": (flat, lambda t: {"a": t, "anchors": t}),
        "window_attention": (rows, lambda t: {"x": t, "rectangle": t.view(2, 5)}),
        "compatibility_pool": (tokens, lambda t: {"local": t, "query": t[:, :, 2]}),
    }
    for function, (tensor, views) in calls.items():

        def gradient(share, tensor, backend, function=function, views=views):
            leaf = tensor.to(device).requires_grad_()
            given = views(leaf)
            if not share:
                given = {name: value.clone() for name, value in given.items()}
            results = call(function, given, backend=backend)
            used = [results[name] for name in FUNCTIONS[function][1]]
            return {"grad": torch.autograd.grad(sum(r.square().sum() for r in used), leaf)[0]}

        check(gradient(True, tensor, backend), gradient(False, tensor.double(), "reference"))


# --- large tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@large
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [*WINDOWS, "anchor_attention", *POOLS])
def test_tensors_too_large_for_the_caches(function, layout, dtype, backend, device):
    """Streaming stores of a large batch give the same bits as ordinary stores of each image alone, at any alignment."""
    if os.environ.get("ATTNKERN_TEST_CUDA_ON_HOST") == "1":
        pytest.skip("only the CPU kernels choose stores by cache size")
    size = (211, 127)
    c = 40 * 2**20 // (3 * size[0] * size[1] * dtype.itemsize)
    tensors = make(function, 3, c, size, dtype=dtype, layout=layout, device=device)
    grads = upstream(call(function, tensors, backend=backend))
    options = {"wrt": [next(iter(tensors))], "through": FUNCTIONS[function][1][:1], "backend": backend}
    found = run(function, tensors, grads=grads, **options)
    for i in range(3):
        alone = {k: t if k == "anchors" else t[i : i + 1] for k, t in tensors.items()}
        wanted = run(function, alone, grads={k: g[i : i + 1] for k, g in grads.items() if g.dim()}, **options)
        same({k: found[k][i : i + 1] for k in options["through"]}, {k: wanted[k] for k in options["through"]})
        name = f"grad_{options['wrt'][0]}"
        same({name: found[name][i : i + 1]}, {name: wanted[name]}, f"in image {i}")


@pytest.mark.kernels
@large
@pytest.mark.skipif(os.environ.get("ATTNKERN_TEST_LARGE") != "1", reason="needs 14 GiB: set ATTNKERN_TEST_LARGE=1")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [*WINDOWS, "anchor_attention", "compatibility_pool"])
def test_more_elements_than_an_int32_counts(function, layout, backend, device):
    """All channels are zero except three, the last one beyond 2**31 elements: the results are those of these three."""
    c, size, picked = 2**17 + 1, (128, 128), [0, 2**16, 2**17]
    few = make(function, 1, 3, size, dtype=torch.bfloat16, device=device)
    first, *_ = few
    vast = torch.zeros(1, c, *size, dtype=torch.bfloat16, device=device)
    if layout == "channels_last":
        vast = torch.zeros(1, *size, c, dtype=torch.bfloat16, device=device).movedim(-1, 1)
    assert vast.numel() > 2**31
    vast[:, picked] = few[first]
    given = few | {first: vast}
    if "query" in few:
        given["query"] = torch.zeros(1, c, dtype=torch.bfloat16, device=device)
        given["query"][:, picked] = few["query"]
    companion = next(name for name in given if name != first)
    given[companion].requires_grad_()
    results = call(function, given, backend=backend)
    name = FUNCTIONS[function][1][0]
    leaves = {key: t.detach().double().requires_grad_(key == companion) for key, t in few.items()}
    expected = call(function, leaves, backend="reference")
    check({name: results[name][:, picked].detach()}, {name: expected[name].detach()})
    (grad,) = torch.autograd.grad(results[name][:, picked[-1:]].float().sum(), given[companion])
    (want,) = torch.autograd.grad(expected[name][:, -1:].sum(), leaves[companion])
    check({"grad": grad[:, picked] if "query" in few else grad}, {"grad": want})
