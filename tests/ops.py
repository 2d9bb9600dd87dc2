"""Shapes, dtypes and comparison of the shared op tests; inputs and evaluation are attnkern.testing's."""

import torch

#: (op, options) to vary
CASES = [
    ("window_attention", {}),
    ("window_attention", {"rescale": False, "residual": False, "scale": 10.0}),
    ("window_attention", {"aspect": True, "residual": False}),
    ("window_attention", {"aspect": True, "rescale": False, "scale": 2}),
    ("anchor_quantize", {}),
    ("anchor_quantize", {"reduction": "batchmean"}),
    ("anchor_quantize", {"reduction": "sum"}),
    ("anchor_attention", {}),
    ("anchor_attention", {"residual": False, "reduction": "sum"}),
    ("compatibility_pool", {}),
    ("compatibility_pool_shared", {}),
]
SHAPES = [
    (2, 3, 1, 1), (2, 3, 1, 9), (3, 2, 9, 1), (2, 65, 7, 7), (1, 8, 14, 14), (3, 5, 6, 11), (2, 1, 5, 5),
    (2, 0, 3, 4), (0, 4, 3, 4), (1, 512, 7, 7), (1, 3, 40, 33),
]  # fmt: skip
SMALL_SHAPES = [(2, 3, 1, 1), (2, 3, 1, 9), (2, 33, 7, 7), (1, 8, 6, 11), (2, 0, 3, 4), (0, 4, 3, 4), (1, 3, 40, 33)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: (features, companions)
MIXED = [(dtype, dtype) for dtype in DTYPES] + [(dtype, torch.float32) for dtype in DTYPES[1:]]


def layouts(name):
    return ("contiguous", "channels_last", "tokens") if "pool" in name else ("contiguous", "channels_last")


def assert_close(results, expected, tolerance):
    """Each result within tolerance·max(1, |expected|max); indices and counts equal."""
    for key, value in expected.items():
        got = results[key]
        assert got.shape == value.shape, key
        if value.is_floating_point():
            bound = tolerance * max(1.0, value.abs().max().item() if value.numel() else 0.0)
            torch.testing.assert_close(got.to(value), value, rtol=0, atol=bound, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(got, value), key
