"""Wrong calls raise, before any operator runs, an error that names the argument, its value and what is expected."""

import types
from importlib import metadata

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnkern
from attnkern import (
    _backend,
    _ops,
    anchor_attention,
    anchor_quantize,
    compatibility_pool,
    ellipse_outline,
    rectangle_corners,
    use_backend,
    window_attention,
    window_map,
)
from attnkern._checks import numbers_of

x, rectangle = torch.ones(2, 3, 4, 5), torch.full((2, 5), 0.5)
a, anchors, query = torch.ones(2, 1, 4, 5), torch.ones(4), torch.ones(2, 3)

QUERIES = "(2, 3) or (3,), or (2, M, 3) or (1, M, 3)"
FLOATS = "float32, bfloat16, float16 or float64"
NAMES = "expected one of 'triton', 'native', 'reference' or None"


def wrong(error, message, function, *args, **kwargs):
    """A row of the table: the exception, its message after the function's name, and the call."""
    if not message.startswith("backend:"):
        message = f"{function.__name__}: {message}"
    return pytest.param(lambda: function(*args, **kwargs), error, message, id=message)


WRONG = [
    # --- no tensor, or not one of floating numbers ---
    wrong(TypeError, "rectangle must be a Tensor, got list", window_map, [0.5] * 5, (3, 3)),
    wrong(TypeError, f"rectangle must be {FLOATS}, got int64", window_map, rectangle.long(), (3, 3)),
    wrong(TypeError, f"rectangle must be {FLOATS}, got complex64", window_map, rectangle + 0j, (3, 3)),
    wrong(TypeError, "rectangle must be a dense (strided) tensor, got layout torch.sparse_coo",
          window_map, rectangle.to_sparse(), (3, 3)),
    wrong(TypeError, "local must be a dense (strided) tensor, got a nested tensor",
          compatibility_pool, torch.nested.nested_tensor([x[0], x[1]]), query),
    wrong(TypeError, "rectangle must be a Tensor, got NoneType", window_attention, x, None),
    wrong(TypeError, f"x must be {FLOATS}, got int32", window_attention, x.int(), rectangle),
    wrong(TypeError, f"a must be {FLOATS}, got bool", anchor_quantize, a.bool(), anchors),
    wrong(TypeError, "anchors must be a Tensor, got int", anchor_quantize, a, 20),
    wrong(TypeError, f"a must be {FLOATS}, got bool", anchor_attention, x, a.bool(), anchors),
    wrong(TypeError, "local must be a Tensor, got ndarray", compatibility_pool, x.numpy(), query),
    wrong(TypeError, "query must be a Tensor, got NoneType", compatibility_pool, x, None),
    wrong(TypeError, "mask must be a Tensor, got list", compatibility_pool, x, query, mask=[True] * 20),
    *(
        wrong(TypeError, f"mask must be bool, got {dtype}",
              compatibility_pool, x, query, mask=torch.ones(2, 4, 5, dtype=getattr(torch, dtype)))
        for dtype in ("float32", "uint8", "int64")
    ),
    wrong(TypeError, "mask must be a dense (strided) tensor, got layout torch.sparse_coo",
          compatibility_pool, x, query, mask=torch.ones(2, 4, 5, dtype=torch.bool).to_sparse()),
    wrong(TypeError, f"rectangle must be {FLOATS}, got int64", rectangle_corners, rectangle.long(), (3, 3)),
    # --- dtypes that do not go together ---
    wrong(TypeError, "rectangle must be float32 (as x), got float16", window_attention, x, rectangle.half()),
    wrong(TypeError, "rectangle must be float16 (as x) or float32, got bfloat16",
          window_attention, x.half(), rectangle.bfloat16()),
    wrong(TypeError, "rectangle must be float16 (as x) or float32, got float64",
          window_attention, x.half(), rectangle.double()),
    wrong(TypeError, "anchors must be float32 (as a), got float64", anchor_quantize, a, anchors.double()),
    wrong(TypeError, "a must be float32 (as x), got float16", anchor_attention, x, a.half(), anchors),
    wrong(TypeError, "anchors must be float32 (as x), got float64", anchor_attention, x, a, anchors.double()),
    wrong(TypeError, "rectangle must be float32 (as x), got float16",
          window_attention, x.to("meta"), rectangle.half().to("meta")),
    wrong(TypeError, "query must be float32 (as local), got float16", compatibility_pool, x, query.half()),
    wrong(TypeError, "query must be float32 (as local), got float64", compatibility_pool, x, query.double()[:, None]),
    # --- shapes ---
    *(
        wrong(ValueError, f"rectangle must be (N, 5), or (N, K, 5) with K of at least 1, got shape {shape}",
              function, torch.ones(shape), (3, 3))
        for function in (window_map, rectangle_corners, ellipse_outline)
        for shape in [(5,), (2, 4), (2, 3, 4), (2, 0, 5), (2, 1, 3, 5)]
    ),
    wrong(ValueError, "x must be (N, C, H, W), got shape (3, 4, 5)", window_attention, x[0], rectangle),
    *(
        wrong(ValueError, f"rectangle must be (2, 5) or (2, K, 5) (N as x), got shape {shape}",
              window_attention, x, torch.ones(shape))
        for shape in [(1, 5), (1, 2, 5), (3, 5), (0, 1, 5)]
    ),
    wrong(ValueError, "rectangle must be (N, 5), or (N, K, 5) with K of at least 1, got shape (2, 0, 5)",
          window_attention, x, torch.ones(2, 0, 5)),
    wrong(ValueError, "a must be (N, ...), got shape ()", anchor_quantize, torch.tensor(1.0), anchors),
    wrong(ValueError, "anchors must be (Q,) with Q of at least 1, got shape (0,)", anchor_quantize, a, anchors[:0]),
    wrong(ValueError, "anchors must be (Q,) with Q of at least 1, got shape (1, 4)", anchor_quantize, a, anchors[None]),
    wrong(ValueError, "x must be (N, C, H, W), got shape (3, 4, 5)", anchor_attention, x[0], a, anchors),
    wrong(ValueError, "a must be (2, 1, 4, 5) or (2, 4, 5) (as x), got shape (2, 3, 4, 5)",
          anchor_attention, x, x, anchors),
    wrong(ValueError, "a must be (2, 1, 4, 5) or (2, 4, 5) (as x), got shape (1, 1, 4, 5)",
          anchor_attention, x, a[:1], anchors),
    wrong(ValueError, "anchors must be (Q,) with Q of at least 1, got shape (0,)", anchor_attention, x, a, anchors[:0]),
    wrong(ValueError, "local must be (N, C, H, W) or (N, C, L), got shape (4, 5)", compatibility_pool, x[0, 0], query),
    *(
        wrong(ValueError, f"query must be {QUERIES} (N and C as local), got shape {shape}",
              compatibility_pool, x, torch.ones(shape))
        for shape in [(1, 3), (2, 4), (2,), (), (2, 3, 4, 5), (3, 2, 3), (2, 2, 4), (2, 0, 4), (0, 1, 3)]
    ),
    *(
        wrong(ValueError, f"mask must be (2, 4, 5) or (1, 4, 5) (N and positions as local), got shape {shape}",
              compatibility_pool, x, query, mask=torch.ones(shape, dtype=torch.bool))
        for shape in [(4, 5), (3, 4, 5), (2, 5, 4), (2, 20), (2, 1, 4, 5), (2, 3, 4, 5), (0, 4, 5), ()]
    ),
    wrong(ValueError, "mask must be (2, 20) or (1, 20) (N and positions as local), got shape (2, 4, 5)",
          compatibility_pool, x.flatten(2), query, mask=torch.ones(2, 4, 5, dtype=torch.bool)),
    # --- no position ---
    wrong(ValueError, "x must have at least one position, got a map of size (0, 5)",
          window_attention, x[:, :, :0], rectangle),
    wrong(ValueError, "x must have at least one position, got a map of size (0, 5)",
          anchor_attention, x[:, :, :0], a, anchors),
    wrong(ValueError, "a must have at least one position, got a map of size (0, 5)",
          anchor_quantize, a[:, :, :0], anchors),
    wrong(ValueError, "a must have at least one position, got a map of size (0,)",
          anchor_quantize, a[:, 0, 0, :0], anchors),
    wrong(ValueError, "local must have at least one position, got a map of size (0, 5)",
          compatibility_pool, x[:, :, :0], query),
    wrong(ValueError, "local must have at least one position, got a map of size (0,)",
          compatibility_pool, x.flatten(2)[:, :, :0], query),
    # --- devices ---
    wrong(ValueError, "rectangle must be on cpu (as x), got meta", window_attention, x, rectangle.to("meta")),
    wrong(ValueError, "anchors must be on cpu (as a), got meta", anchor_quantize, a, anchors.to("meta")),
    wrong(ValueError, "a must be on cpu (as x), got meta", anchor_attention, x, a.to("meta"), anchors),
    wrong(ValueError, "anchors must be on cpu (as x), got meta", anchor_attention, x, a, anchors.to("meta")),
    wrong(ValueError, "query must be on cpu (as local), got meta", compatibility_pool, x, query.to("meta")),
    wrong(ValueError, "mask must be on cpu (as local), got meta",
          compatibility_pool, x, query, mask=torch.ones(2, 4, 5, dtype=torch.bool, device="meta")),
    # --- options ---
    wrong(ValueError, "size must be (H, W), got 3", window_map, rectangle, 3),
    wrong(ValueError, "size must be (H, W), got (3, 3, 3)", window_map, rectangle, (3, 3, 3)),
    wrong(ValueError, "size must be two integers of at least 1, got (0, 3)", window_map, rectangle, (0, 3)),
    wrong(ValueError, "size must be two integers of at least 1, got (3.0, 3)", window_map, rectangle, (3.0, 3)),
    wrong(ValueError, "size must be (H, W), got 3", rectangle_corners, rectangle, 3),
    wrong(ValueError, "size must be two integers of at least 1, got (0, 3)", rectangle_corners, rectangle, (0, 3)),
    wrong(ValueError, "size must be two integers of at least 1, got (True, 3)", window_map, rectangle, (True, 3)),
    *(
        wrong(ValueError, f"size must have fewer than 2**60 positions, got {size}", function, rectangle, size)
        for function in (window_map, rectangle_corners)
        for size in [(2**63, 1), (1, 2**70), (2**60, 1), (2**32, 2**32), (numpy.int64(2**32), numpy.int64(2**32))]
    ),
    wrong(ValueError, "scale must be a number that a float64 holds, got one larger",
          window_map, rectangle, (3, 3), scale=10**400),
    wrong(TypeError, "scale must be a number, got True", window_map, rectangle, (3, 3), scale=True),
    wrong(TypeError, "rescale must be True or False, got 1", window_map, rectangle, (3, 3), rescale=1),
    wrong(TypeError, "aspect must be True or False, got None", window_map, rectangle, (3, 3), aspect=None),
    wrong(TypeError, "residual must be True or False, got 'no'", window_attention, x, rectangle, residual="no"),
    wrong(TypeError, "residual must be True or False, got 0.0", anchor_attention, x, a, anchors, residual=0.0),
    wrong(TypeError, "aspect must be True or False, got 'w'", rectangle_corners, rectangle, (3, 3), aspect="w"),
    wrong(TypeError, "scale must be a number, got '6'", window_map, rectangle, (3, 3), scale="6"),
    wrong(TypeError, "scale must be a number, got Tensor", window_attention, x, rectangle, scale=torch.tensor(1.0)),
    *(
        wrong(ValueError, f"shape must be 'rectangle' or 'ellipse', got {got}", *call, shape=shape)
        for got, shape in (("'ellipsis'; did you mean 'ellipse'?", "ellipsis"), ("None", None), ("3", 3))
        for call in ((window_map, rectangle, (3, 3)), (window_attention, x, rectangle))
    ),
    wrong(TypeError, "points must be an integer, got 4.0", ellipse_outline, rectangle, (3, 3), points=4.0),
    wrong(ValueError, "points must be at least 3, got 2", ellipse_outline, rectangle, (3, 3), points=2),
    wrong(ValueError, "reduction must be 'mean', 'batchmean' or 'sum', got 'none'",
          anchor_quantize, a, anchors, reduction="none"),
    wrong(ValueError, "reduction must be 'mean', 'batchmean' or 'sum', got None",
          anchor_attention, x, a, anchors, reduction=None),
    # --- backends ---
    wrong(ValueError, f"backend: {NAMES}, got 'cuda'", window_map, rectangle, (3, 3), backend="cuda"),
    wrong(ValueError, f"backend: {NAMES}, got 'Native'", window_attention, x, rectangle, backend="Native"),
    wrong(ValueError, f"backend: {NAMES}, got 0", anchor_quantize, a, anchors, backend=0),
    wrong(ValueError, f"backend: {NAMES}, got 'auto'", anchor_attention, x, a, anchors, backend="auto"),
    wrong(ValueError, f"backend: {NAMES}, got ''", compatibility_pool, x, query, backend=""),
    wrong(ValueError, f"name: {NAMES}, got 'gpu'", use_backend, "gpu"),
    wrong(ValueError, "backend: 'triton' cannot run torch.float64 on cpu: "
          "its kernels compute in float32 and do not take float64",
          window_map, rectangle.double(), (3, 3), backend="triton"),
    wrong(ValueError, "backend: 'native' cannot run torch.float32 on meta: "
          "it has kernels for cpu and cuda, not for meta",
          window_map, rectangle.to("meta"), (3, 3), backend="native"),
]  # fmt: skip


@pytest.mark.parametrize(
    "items, got",
    [("123", "'123'"), (["1"], "['1']"), ((True,), "(True,)"), (3, "3"), ([None], "[None]"), ([1 + 1j], "[(1+1j)]")],
)
def test_what_is_no_list_of_numbers(items, got):
    with pytest.raises(TypeError) as raised:
        numbers_of("f", "eps", items)
    assert str(raised.value) == f"f: eps must be a list of numbers, got {got}"


def test_lists_of_numbers():
    assert numbers_of("f", "eps", iter([1, 2.5])) == [1, 2.5]
    assert numbers_of("f", "eps", torch.tensor([1, 2])) == [1, 2]
    assert numbers_of("f", "eps", numpy.array([1, 2.5])) == [1, 2.5]
    with pytest.raises(ValueError, match=r"^f: eps must be numbers that a float64 holds, got one larger$"):
        numbers_of("f", "eps", [10**400])


class Forbidden(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        raise AssertionError(f"{operator} ran before the arguments were checked")


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_call(call, error, message, monkeypatch):
    monkeypatch.setattr(_backend, "_TRITON_FOUND", True)
    with Forbidden(), pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert (type(raised.value), str(raised.value)) == (error, message)


@pytest.mark.parametrize(
    "found, message", [(False, "Triton is not installed: pip install triton"), (True, "it needs CUDA tensors")]
)
def test_triton_that_cannot_run_says_why(found, message, monkeypatch):
    monkeypatch.setattr(_backend, "_TRITON_FOUND", found)
    monkeypatch.setattr(_ops, "TRITON_INTERPRETS", False)
    with pytest.raises(ValueError, match=f"^backend: 'triton' cannot run torch.float32 on cpu: {message}"):
        window_attention(x, rectangle, backend="triton")


@pytest.mark.parametrize(
    "versions, message",
    [
        ({"triton": "3.6.0", "numpy": "2.4.0"}, "its interpreter before Triton 3.7 needs a NumPy before 2.4"),
        ({"triton": "3.8.0"}, "its interpreter needs NumPy: pip install numpy"),
        ({"pytorch-triton-rocm": "3.6.0", "numpy": "2.4.0"}, None),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
        ({"triton": "3.7.0", "numpy": "2.5.0"}, None),
    ],
)
def test_a_triton_that_cannot_interpret_says_why(versions, message, monkeypatch):
    def version(package):
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)
    fault = _backend._interpreter_fault()
    assert fault is None if message is None else fault.startswith(message)
    monkeypatch.setattr(_backend, "_TRITON_FOUND", True)
    monkeypatch.setattr(_ops, "TRITON_INTERPRETS", True)
    monkeypatch.setattr(_backend, "_INTERPRETER_FAULT", fault)
    assert _backend.reason("triton", torch.device("cpu"), torch.float32) == fault


@pytest.mark.parametrize("kind, many, missing, expected", [
    ("cuda", False, None, "native"),
    ("cuda", True, None, "triton"),  # faster there for many queries, masks and several windows
    ("cuda", True, "triton", "native"),
    ("cuda", False, "native", "triton"),
    ("cpu", True, None, "native"),
])  # fmt: skip
def test_the_automatic_choice(kind, many, missing, expected, monkeypatch):
    monkeypatch.setattr(_backend, "_current", None)
    monkeypatch.setattr(_backend, "reason", lambda name, *_: "missing" if name == missing else None)
    monkeypatch.setattr(_backend, "_first_kernel_fails", lambda device: False)
    x = types.SimpleNamespace(device=torch.device(kind), dtype=torch.float32)
    assert _backend.choose(None, x, many) == expected


@pytest.mark.parametrize("windows, many", [((), False), ((1,), False), ((2,), True)])
def test_several_windows_are_many(windows, many, monkeypatch):
    seen = []
    monkeypatch.setattr(_backend, "choose", lambda backend, x, many=False: seen.append(many) or "reference")
    rectangle = torch.full((2, *windows, 5), 0.5)
    attnkern.window_map(rectangle, (3, 4))
    attnkern.window_attention(torch.zeros(2, 1, 3, 4), rectangle)
    assert seen == [many, many]


def test_an_unbuilt_library_says_why_and_automatic_goes_on(monkeypatch):
    monkeypatch.setitem(_ops.NATIVE_REASON, "cpu", "attnkern/_C is not built: build it")
    with pytest.raises(
        ValueError, match=r"^backend: 'native' cannot run torch.float32 on cpu: attnkern/_C is not built"
    ):
        compatibility_pool(x, query, backend="native")
    pooled, reference = (compatibility_pool(x, query, backend=name).pooled for name in (None, "reference"))
    torch.testing.assert_close(pooled, reference)
