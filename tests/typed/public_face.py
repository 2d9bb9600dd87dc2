"""The types of the public functions, checked by mypy --strict and never run."""

from typing import assert_type

import torch

import attnkern

x, rectangle, a, anchors, query = (torch.zeros(()) for _ in range(5))

assert_type(attnkern.window_map(rectangle, (3, 4), scale=5.0, aspect=True, backend="native"), torch.Tensor)
assert_type(attnkern.window_map(rectangle[:, None], (3, 4), shape="ellipse"), torch.Tensor)
windowed = attnkern.window_attention(x, rectangle, rescale=False, residual=False)
assert_type(windowed, attnkern.WindowAttended)
assert_type(windowed.map, torch.Tensor)
assert_type(attnkern.anchor_quantize(a, anchors, reduction="sum").counts, torch.Tensor)
assert_type(attnkern.anchor_attention(x, a, anchors), attnkern.AnchorAttended)
pooled, attention, scores = attnkern.compatibility_pool(x, query)
assert_type(pooled, torch.Tensor)
assert_type(attnkern.rectangle_corners(rectangle, (3, 4)), torch.Tensor)
assert_type(attnkern.ellipse_outline(rectangle, (3, 4), points=8), torch.Tensor)
with attnkern.use_backend("reference") as chosen:
    assert_type(chosen, attnkern.use_backend)
assert_type(attnkern.insert(torch.nn.Linear(1, 1), "", torch.nn.Linear), torch.nn.Module)
assert_type(attnkern.accelerate(torch.nn.Linear(1, 1)).left, dict[str, str])
assert_type(attnkern.nn.WindowAttention(4).rectangle(x), torch.Tensor)
