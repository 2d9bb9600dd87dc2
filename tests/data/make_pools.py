"""Writes the golden files of pooling with many queries and masks: `python tests/data/make_pools.py`.

A program of its own, in NumPy alone: the definitions, position by position, in long double. Gradients are central
differences of the weighted sum of all results.
"""

from pathlib import Path

import numpy as np

STEP = np.longdouble(2.0**-18)
#: Of a central difference of fourth order: sharp scores have large higher derivatives.
STENCIL = {1: 8, -1: -8, 2: -1, -2: 1}


def pool(local, query, mask):
    """pooled (N, M, C), attention and scores (N, M, L) of local (N, C, L), query (N, M, C) and mask (N, L)."""
    (n, c, length), m = local.shape, query.shape[1]
    pooled = np.zeros((n, m, c), np.longdouble)
    attention, scores = (np.zeros((n, m, length), np.longdouble) for _ in range(2))
    for image in range(n):
        places = [i for i in range(length) if mask[image, i]]
        for k in range(m):
            for i in range(length):
                scores[image, k, i] = (local[image, :, i] * query[image, k]).sum()
            if not places:
                continue
            largest = max(scores[image, k, i] for i in places)
            weights = {i: np.exp(scores[image, k, i] - largest) for i in places}
            total = sum(weights.values())
            for i in places:
                attention[image, k, i] = weights[i] / total
                pooled[image, k] += attention[image, k, i] * local[image, :, i]
    return pooled, attention, scores


def results(local, query, mask):
    """The results in the shapes of attnkern.compatibility_pool."""
    n, c, *positions = local.shape
    queries = query if query.ndim == 3 else query[None, None] if query.ndim == 1 else query[:, None]
    queries = np.broadcast_to(queries, (n, *queries.shape[1:]))
    kept = np.ones((n, *positions), bool) if mask is None else np.broadcast_to(mask, (n, *positions))
    found = pool(local.reshape(n, c, -1), queries, kept.reshape(n, -1))
    lead = (n, queries.shape[1]) if query.ndim == 3 else (n,)
    shapes = ((*lead, c), (*lead, *positions), (*lead, *positions))
    return [result.reshape(shape) for result, shape in zip(found, shapes, strict=True)]


def write(name, seed, local, query, mask=None, scale=1.0):
    """Draw inputs of these shapes, and save them with the results and gradients."""
    draw = np.random.default_rng(seed)
    local = draw.standard_normal(local)
    query = draw.standard_normal(query) * scale / np.sqrt(local.shape[1])
    inputs = {"local": local.astype(np.longdouble), "query": query.astype(np.longdouble)}
    outputs = dict(zip(("pooled", "attention", "scores"), results(*inputs.values(), mask), strict=True))
    grads = {key: draw.standard_normal(value.shape) for key, value in outputs.items()}

    def total():
        return sum(
            (grad * out).sum() for grad, out in zip(grads.values(), results(*inputs.values(), mask), strict=True)
        )

    data = {"local": local, "query": query, **outputs, **{f"grad_{key}": grad for key, grad in grads.items()}}
    for key, values in inputs.items():
        slope = np.zeros(values.shape, np.longdouble)
        for at in np.ndindex(values.shape):
            kept = values[at]
            for steps, weight in STENCIL.items():
                values[at] = kept + steps * STEP
                slope[at] += weight * total() / (12 * STEP)
            values[at] = kept
        data[f"grad_{key}"] = slope
    data = {key: value.astype(np.float64) for key, value in data.items()} | ({} if mask is None else {"mask": mask})
    np.savez_compressed(Path(__file__).parent / f"pool_{name}.npz", **data)


def main():
    def some(seed, *shape, empty=()):
        mask = np.random.default_rng(seed).random(shape) < 0.6
        mask[list(empty)] = False
        return mask

    write("queries1", 1, (2, 5, 3, 4), (2, 1, 5))
    write("queries3", 2, (2, 6, 3, 5), (2, 3, 6))
    write("queries3_shared", 3, (3, 5, 3, 3), (1, 3, 5))
    write("queries16_tokens", 4, (2, 7, 6), (2, 16, 7))
    write("queries3_sharp", 5, (2, 4, 3, 3), (2, 3, 4), scale=300.0)
    write("queries3_one_position", 6, (2, 5, 1, 1), (2, 3, 5), np.array([True, False]).reshape(2, 1, 1))
    write("masked", 7, (3, 5, 3, 4), (3, 5), some(7, 3, 3, 4, empty=[1]))
    write("masked_shared", 8, (2, 5, 3, 4), (5,), some(8, 1, 3, 4))
    write("masked_queries3", 9, (3, 5, 3, 4), (3, 3, 5), some(9, 3, 3, 4, empty=[2]))
    write("masked_queries16_sharp", 10, (2, 3, 9), (1, 16, 3), some(10, 2, 9), scale=300.0)


if __name__ == "__main__":
    main()
