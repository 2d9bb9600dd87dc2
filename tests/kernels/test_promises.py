"""Promises of the kernels besides their numbers: layouts, repeatability, independence of the batch, saved memory."""

import pytest
import torch
from cases import POOLS, WINDOWS, call, case_id, check, doubles, lay, leaves_of, make, run, same, upstream
from conftest import every_case, every_function, large
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnkern import _ops
from attnkern._layout import in_layout

half_and_float = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=large)], ids=case_id
)

SIZE = (5, 6)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=large)], ids=case_id
)
@pytest.mark.parametrize(
    "layout", ["channels_last", pytest.param("transposed", marks=large), "sliced", "expanded", "misaligned"]
)
@every_case
def test_inputs_and_gradients_in_any_layout(function, options, layout, dtype, backend, device):
    """Sliced, transposed, expanded or misaligned inputs and gradients give the numbers of contiguous ones."""
    tensors = make(function, 3, 8, SIZE, dtype=dtype, device=device)
    options = options | {"size": SIZE, "backend": backend}
    grads = upstream(call(function, tensors, **options))

    def relay(tensor):
        if layout in ("channels_last", "transposed", "expanded") and tensor.dim() < 3:
            return lay(tensor, "sliced") if tensor.dim() else tensor
        return lay(tensor, layout)

    laid, laid_grads = ({name: relay(tensor) for name, tensor in d.items()} for d in (tensors, grads))
    found = run(function, laid, grads=laid_grads, **options)
    plain, plain_grads = ({name: tensor.contiguous() for name, tensor in d.items()} for d in (laid, laid_grads))
    check(found, doubles(run(function, plain, grads=plain_grads, **options)))


@every_function
def test_a_gradient_in_another_format(function, backend, device):
    """channels_last features with contiguous gradients, the reverse, and the gradient of a sum, which has stride 0."""
    for layout, grad_layout in (("channels_last", "contiguous"), ("contiguous", "channels_last")):
        tensors = make(function, 2, 8, SIZE, dtype=torch.float32, layout=layout, device=device)
        options = {"size": SIZE, "backend": backend}
        grads = upstream(call(function, tensors, **options))
        mixed = {name: lay(g, grad_layout) if g.dim() == 4 else g for name, g in grads.items()}
        check(run(function, tensors, grads=mixed, **options), doubles(run(function, tensors, grads=grads, **options)))
        ones = {name: torch.ones_like(g) for name, g in grads.items()}
        flat = {name: g.new_ones(()).expand_as(g) for name, g in grads.items()}
        check(run(function, tensors, grads=flat, **options), doubles(run(function, tensors, grads=ones, **options)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [*WINDOWS, "anchor_attention", *POOLS])
def test_results_lie_as_the_features_do(function, layout, backend, device):
    """The output and its gradient have the memory format of the features; maps are contiguous."""
    tensors = make(function, 2, 8, SIZE, dtype=torch.float32, layout=layout, device=device)
    found = run(function, tensors, backend=backend)
    gradients = () if backend == "reference" else ("grad_x", "grad_local")
    for name, result in found.items():
        if name in ("output", *gradients):
            assert result.stride() == next(iter(tensors.values())).stride(), name
        if name in ("map", "values", "attention", "scores"):
            assert result.is_contiguous(), name


def test_quantized_maps_lie_as_the_map_does(backend, device):
    a = lay(torch.rand(2, 3, *SIZE, device=device), "channels_last")
    found = run("anchor_quantize", {"a": a, "anchors": torch.linspace(0, 1, 5, device=device)}, backend=backend)
    assert found["values"].stride() == found["indices"].stride() == a.stride()
    assert backend == "reference" or found["grad_a"].stride() == a.stride()


@pytest.mark.kernels
@every_function
def test_operators_take_any_strides(function, backend, device):
    """An exported program may call an operator with other strides than those it was traced with."""
    tensors = make(function, 3, 8, SIZE, dtype=torch.float32, device=device)

    class Module(torch.nn.Module):
        def forward(self, *values):
            laid = dict(zip(tensors, values, strict=True))
            return tuple(call(function, laid, size=SIZE, backend=backend).values())

    exported = torch.export.export(Module(), tuple(tensors.values())).module()
    for layout in ("sliced", "transposed", "channels_last"):
        laid = [lay(tensor, layout if tensor.dim() == 4 else "sliced") for tensor in tensors.values()]
        check(dict(enumerate(exported(*laid))), doubles(dict(enumerate(Module()(*tensors.values())))))


@every_function
def test_tensors_that_are_only_said_to_be_zero(function, backend, device):
    """Forward-mode AD passes zero tensors without storage."""
    tensors = make(function, 2, 8, SIZE, dtype=torch.float32, device=device)
    first = next(iter(tensors))
    zeros = torch.zeros_like(tensors[first])
    unstored = torch._efficientzerotensor(zeros.shape, device=device)
    options = {"size": SIZE, "backend": backend}
    same(call(function, tensors | {first: unstored}, **options), call(function, tensors | {first: zeros}, **options))


@pytest.mark.kernels
def test_tokens_are_read_where_they_lie(backend, device):
    """The gradient of a transposed view of tokens is a transposed view of tokens."""
    tensors = make("compatibility_pool", 2, 8, (11,), dtype=torch.float32, layout="channels_last", device=device)
    found = run("compatibility_pool", tensors, backend=backend)
    assert found["grad_local"].stride() == tensors["local"].stride() == (88, 1, 8)


ODD = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: lay(x, "channels_last"),
    "columns left out": lambda x: torch.stack((x, x), -1)[..., 0],
    "columns left out of channels_last": lambda x: lay(torch.stack((x, x), -1).flatten(3), "channels_last")[..., ::2],
    "transposed": lambda x: lay(x, "transposed"),
    "one channel repeated": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.kernels
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("function", [*WINDOWS, "anchor_attention", *POOLS])
def test_strides_that_a_compiler_was_told(function, odd, backend, device):
    """Results have the strides that the fake kernels announce, for inputs in any layout."""

    def run(device):
        tensors = make(function, 2, 4, SIZE, dtype=torch.float32, device=device)
        first = ODD[odd](tensors.pop("local" if "local" in tensors else "x"))
        ops, (second, *_) = _ops.BACKENDS[backend], tensors.values()
        if function in WINDOWS:
            window = 6.0, True, True, False, function == "window_attention_many"  # ellipses
            output, map, stats = ops.window_fwd(first, second, *window)
            return output, map, stats, *ops.window_bwd(output, map, first, second, stats, *window, True)
        if function == "anchor_attention":
            output, *rest = ops.anchor_fwd(first, second, tensors["anchors"], True, 1)
            through = output, rest[0], rest[2], rest[3], first, second, tensors["anchors"], rest[1], rest[5]
            return output, *rest, *ops.anchor_bwd(*through, True, 1, True)
        mask = tensors.get("mask")
        pooled, attention, scores, pooled_wide = ops.pool_fwd(first, second, mask)
        through = pooled, attention, scores, first, second, mask, attention, pooled
        return pooled, attention, scores, pooled_wide, *ops.pool_bwd(*through, True)

    with FakeTensorMode() as mode:
        told = run(device)
    for found, fake in zip(run(device), told, strict=True):
        assert mode.is_our_fake(fake)
        assert (found.shape, found.stride(), found.dtype) == (fake.shape, fake.stride(), fake.dtype)


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_features_in_either_layout_are_not_copied(layout):
    """Python code makes no copies before the kernels, which the results alone would not show."""
    x, grad, rectangle = (lay(torch.randn(2, 3, 4, 5), layout) for _ in range(3))
    seen = []
    kernel = in_layout(
        ("x", "grad_output"), lambda grad_output, grad_map, x, rectangle: seen.extend((grad_output, x, rectangle))
    )
    with Recorded() as recorded:
        kernel(grad, None, x, rectangle)
    assert [tensor.data_ptr() for tensor in seen[:2]] == [grad.data_ptr(), x.data_ptr()]
    assert seen[2].is_contiguous()
    assert recorded.calls.count("clone") == (layout == "channels_last")  # the rectangle's


# --- repeatability ---------------------------------------------------------------------------------------------------

SHAPES = [(3, 65, (9, 7)), pytest.param(3, 40, (33, 31), marks=large)]
every_shape = pytest.mark.parametrize("n, c, size", SHAPES, ids=case_id)
every_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def per_image(found):
    """The results that have one part per image."""
    summed = ("anchor_loss", "commitment_loss", "counts", "grad_anchors")
    return {name: result for name, result in found.items() if name not in summed}


def without_means(options):
    """Options under which the gradients of an image do not depend on the batch: a mean divides by its size."""
    return options | {"reduction": "sum"} if "reduction" in options else options


@pytest.mark.pairs
@pytest.mark.kernels
@half_and_float
@every_layout
@every_shape
@every_case
def test_bitwise_repeatable(function, options, n, c, size, layout, dtype, backend, device):
    """The bits are the same in every run, at any storage offset and with any number of threads."""
    tensors = make(function, n, c, size, dtype=dtype, layout=layout, device=device)
    options = options | {"size": size, "backend": backend}
    grads = upstream(call(function, tensors, **options))
    first = run(function, tensors, grads=grads, **options)
    same(run(function, tensors, grads=grads, **options), first, "from run to run")
    moved, moved_grads = ({name: lay(t, "misaligned") for name, t in d.items()} for d in (tensors, grads))
    same(run(function, moved, grads=moved_grads, **options), first, "at another storage offset")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3) if backend == "native" else ():
            torch.set_num_threads(count)
            same(run(function, tensors, grads=grads, **options), first, f"on {count} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.pairs
@pytest.mark.kernels
@half_and_float
@every_layout
@every_shape
@every_case
def test_an_image_does_not_depend_on_its_batch(function, options, n, c, size, layout, dtype, backend, device):
    """The results and gradients of an image have the same bits alone and at any place of a larger batch."""
    options = without_means(options | ({"reduction": "sum"} if function.startswith("anchor") else {}))
    options |= {"size": size, "backend": backend}
    tensors = make(function, n, c, size, dtype=dtype, layout=layout, device=device)
    grads = upstream(call(function, tensors, **options))
    whole = per_image(run(function, tensors, grads=grads, **options))
    for places in ([1], [2, 2, 0, 1]):

        def pick(tensor, places=places):
            return tensor if tensor.dim() == 0 or tensor.shape[0] != n else lay(tensor[places], layout)

        part_inputs = {name: tensor if name == "anchors" else pick(tensor) for name, tensor in tensors.items()}
        part_grads = {name: pick(grad) for name, grad in grads.items()}
        part = per_image(run(function, part_inputs, grads=part_grads, **options))
        same(part, {name: result[places] for name, result in whole.items()}, f"for images {places}")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@half_and_float
@every_function
def test_nothing_of_feature_size_is_saved(function, dtype, layout, backend, device):
    """Autograd saves the inputs and nothing else as large as the features."""
    n, c, size = 2, 64, (6, 5)
    tensors = make(function, n, c, size, dtype=dtype, layout=layout, device=device)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in inputs:
            saved.append(tensor)
        return tensor

    leaves = leaves_of(tensors)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = call(function, leaves, size=size, backend=backend)
    assert results
    # A map with its indices, statistics of up to three windows, and pooled features: a few numbers per position and one
    # per channel.
    queries = tensors["query"].shape[1] if function.startswith("compatibility_pool_") else 1
    assert sum(tensor.numel() for tensor in saved) <= n * (queries * (2 * size[0] * size[1] + c) + 17) + 16, saved
