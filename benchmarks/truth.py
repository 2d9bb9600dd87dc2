"""The five functions and their derivatives in numpy's longdouble, written independently of attnkern.

`benchmarks.accuracy` measures errors against them. On x86 longdouble has 11 bits more than float64, so that errors in
float64 can be measured, too. `inputs` are arrays by name and `g` the gradients of the outputs by name; each function
returns its results and ``grad_<input>`` by name. Formulas: docs/mathematics.md.
"""

import numpy as np

#: Whether longdouble is wider than float64 on this machine.
WIDER = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
SCALE = 6


def _sigmoid(p):
    return 1 / (1 + np.exp(-p))


def _log_sigmoid(p):
    return np.minimum(p, 0) - np.log1p(np.exp(-np.abs(p)))


def _window(rectangle, height, width):
    """The rescaled map (N, H, W), and ∂z by the rectangle less its mean under the map, (N, 5, H, W)."""
    mu1, mu2, sigma1, sigma2, alpha = rectangle.T[:, :, None, None]
    d1 = np.arange(height, dtype=np.longdouble)[:, None] / (height - 1) - mu1
    d2 = np.arange(width, dtype=np.longdouble) / (width - 1) - mu2
    cos, sin = np.cos(alpha), np.sin(alpha)
    u, v = cos * d1 + sin * d2, cos * d2 - sin * d1
    p, q = SCALE * (1 - (u / sigma1) ** 2), SCALE * (1 - (v / sigma2) ** 2)
    z = _log_sigmoid(p) + _log_sigmoid(q)
    weights = np.exp(z - z.max((1, 2), keepdims=True))
    map = weights * (height * width / weights.sum((1, 2), keepdims=True))
    by_u, by_v = -2 * SCALE * _sigmoid(-p) * u / sigma1**2, -2 * SCALE * _sigmoid(-q) * v / sigma2**2
    slopes = [
        -cos * by_u + sin * by_v, -sin * by_u - cos * by_v, -by_u * u / sigma1, -by_v * v / sigma2, by_u * v - by_v * u
    ]  # fmt: skip
    slopes = np.stack(slopes, 1)
    return map, slopes - (slopes * map[:, None]).mean((2, 3), keepdims=True)


def window_map(inputs, g, size):
    map, slopes = _window(inputs["rectangle"], *size)
    return {"map": map, "grad_rectangle": ((g["map"] * map)[:, None] * slopes).sum((2, 3))}


def window_attention(inputs, g, size):
    x = inputs["x"]
    map, slopes = _window(inputs["rectangle"], *size)
    factor = 1 + map[:, None]
    map_grad = (g["output"] * x).sum(1) + g["map"]
    grad_rectangle = ((map_grad * map)[:, None] * slopes).sum((2, 3))
    return {"output": factor * x, "map": map, "grad_x": factor * g["output"], "grad_rectangle": grad_rectangle}


def anchor_quantize(inputs, g, size):
    a, anchors = inputs["a"], inputs["anchors"]
    indices = np.abs(a[..., None] - anchors).argmin(-1)
    values = anchors[indices]
    difference = values - a
    loss = np.mean(difference**2)
    pull = 2 * difference / a.size
    moved = np.array([pull[indices == k].sum() for k in range(len(anchors))])
    return {
        "values": values,
        "indices": indices,
        "anchor_loss": loss,
        "commitment_loss": loss,
        "grad_a": g["values"] - pull * g["commitment_loss"],
        "grad_anchors": moved * g["anchor_loss"],
    }


def anchor_attention(inputs, g, size):
    x = inputs["x"]
    quantized = anchor_quantize(inputs, g, size)
    factor = 1 + quantized["values"]
    quantized["grad_a"] = quantized["grad_a"] + (g["output"] * x).sum(1, keepdims=True)
    return {"output": factor * x, "grad_x": factor * g["output"], **quantized}


def compatibility_pool(inputs, g, size):
    local, query = inputs["local"], inputs["query"][:, :, None, None]
    scores = (local * query).sum(1)
    weights = np.exp(scores - scores.max((1, 2), keepdims=True))
    attention = weights / weights.sum((1, 2), keepdims=True)
    grad_pooled = g["pooled"][:, :, None, None]
    attention_grad = (local * grad_pooled).sum(1) + g["attention"]
    delta = (attention * attention_grad).sum((1, 2), keepdims=True)
    grad_scores = (attention * (attention_grad - delta) + g["scores"])[:, None]
    return {
        "pooled": (attention[:, None] * local).sum((2, 3)),
        "attention": attention,
        "scores": scores,
        "grad_local": attention[:, None] * grad_pooled + grad_scores * query,
        "grad_query": (grad_scores * local).sum((2, 3)),
    }
