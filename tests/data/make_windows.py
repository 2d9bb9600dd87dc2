"""Writes the golden files of ellipses and of several windows: `python tests/data/make_windows.py`.

A program of its own, in NumPy and mpmath: the literal formulas, position by position, with 300 digits or more, so that
neither 1 - f nor 1 - Π (1 - f_k) loses any that count. Gradients are central differences of the weighted sum of the
output and, separately, of the map.
"""

from pathlib import Path

import mpmath
import numpy as np

STEP = mpmath.mpf(10) ** -100


def window_map(windows, height, width, *, scale, rescale, aspect, ellipse):
    """{position: f} of the union of K windows, rescaled to mean 1 if asked."""
    longest = max(height, width) - 1
    row = mpmath.mpf(height - 1) / longest if aspect and longest else mpmath.mpf(1)
    column = mpmath.mpf(width - 1) / longest if aspect and longest else mpmath.mpf(1)
    turns = [(mpmath.cos(window[4]), mpmath.sin(window[4])) for window in windows]

    def sigmoid(p):
        return 1 / (1 + mpmath.exp(-p))

    values = {}
    for i in range(height):
        for j in range(width):
            t1 = mpmath.mpf(i) / (height - 1) if height > 1 else mpmath.mpf("0.5")
            t2 = mpmath.mpf(j) / (width - 1) if width > 1 else mpmath.mpf("0.5")
            outside = mpmath.mpf(1)
            for (mu1, mu2, sigma1, sigma2, _), (cos, sin) in zip(windows, turns, strict=True):
                d1, d2 = (t1 - mu1) * row, (t2 - mu2) * column
                u, v = (cos * d1 + sin * d2) / sigma1, (cos * d2 - sin * d1) / sigma2
                if ellipse:
                    f = sigmoid(scale * (1 - u * u - v * v))
                else:
                    f = sigmoid(scale * (1 - u * u)) * sigmoid(scale * (1 - v * v))
                outside *= 1 - f
            values[i, j] = 1 - outside
    if rescale:
        total = sum(values.values())
        values = {at: height * width * f / total for at, f in values.items()}
    return values


def array(values, height, width):
    return np.array([[float(values[i, j]) for j in range(width)] for i in range(height)])


def write(
    name, seed, size, rectangle, *, scale=6.0, rescale=True, residual=True, aspect=False, ellipse=False, digits=300
):  # fmt: skip
    """Save the results and gradients for rectangles (N, 5) or (N, K, 5), with drawn features and output gradients."""
    mpmath.mp.dps = digits
    draw = np.random.default_rng(seed)
    rectangle = np.array(rectangle, np.float64)
    n, (height, width) = len(rectangle), size
    x, grad_output = draw.standard_normal((2, n, 2, *size))
    grad_map = draw.standard_normal((n, *size))
    options = {"scale": mpmath.mpf(scale), "rescale": rescale, "aspect": aspect, "ellipse": ellipse}
    maps, through_output, through_map = [], np.zeros_like(rectangle), np.zeros_like(rectangle)
    for image in range(n):
        windows = [[mpmath.mpf(float(b)) for b in window] for window in rectangle[image].reshape(-1, 5)]
        maps.append(array(window_map(windows, height, width, **options), height, width))
        pull = (grad_output[image] * x[image]).sum(0)
        for k, window in enumerate(windows):
            for b in range(5):
                kept = window[b]
                window[b] = kept + STEP
                after = window_map(windows, height, width, **options)
                window[b] = kept - STEP
                before = window_map(windows, height, width, **options)
                window[b] = kept
                slope = {at: (after[at] - before[at]) / (2 * STEP) for at in after}
                for result, weight in ((through_output, pull), (through_map, grad_map[image])):
                    total = mpmath.fsum(mpmath.mpf(float(weight[at])) * slope[at] for at in slope)
                    result.reshape(n, -1, 5)[image, k, b] = float(total)
    map = np.stack(maps)
    factor = map[:, None] + residual
    np.savez_compressed(
        Path(__file__).parent / f"window_{name}.npz", x=x, rectangle=rectangle, scale=scale, rescale=rescale,
        residual=residual, aspect=aspect, shape="ellipse" if ellipse else "rectangle", output=factor * x, map=map,
        grad_output=grad_output, grad_x=factor * grad_output, grad_rectangle=through_output, grad_map=grad_map,
        map_grad_rectangle=through_map,
    )  # fmt: skip


def main():
    def some(seed, *shape):
        low, high = [0.1, 0.1, 0.1, 0.1, -1.5], [0.9, 0.9, 0.5, 0.5, 1.5]
        return np.random.default_rng(seed).uniform(low, high, (*shape, 5))

    one, two, five = some(1, 2), some(2, 2, 2), some(5, 2, 5)
    far = [  # every f underflows, in float64 as well: two windows on one side of the map, and on two sides
        [[4.0, -3.0, 0.3, 0.25, 0.4], [4.5, -3.0, 0.35, 0.25, 0.0]],
        [[-5.0, 0.5, 0.4, 0.3, 0.2], [6.0, 0.5, 0.4, 0.3, 0.2]],
    ]
    same = [[[0.4, 0.6, 0.3, 0.2, 0.5]] * 5, [[0.4, 0.6, 0.3, 0.2, 0.5]] * 4 + [[0.41, 0.6, 0.3, 0.2, 0.5]]]
    sizes = [  # one window is huge and the other one tiny
        [[0.5, 0.4, 40.0, 60.0, 0.3], [0.3, 0.6, 0.02, 0.03, 0.1]],
        [[0.5, 0.5, 2.0, 1.5, 0.3], [0.3, 0.6, 1e-3, 0.05, 0.1]],
    ]
    write("ellipse", 1, (5, 4), one, ellipse=True)
    write("ellipse_plain_aspect", 2, (4, 7), one, ellipse=True, rescale=False, aspect=True, scale=10.0)
    write("many1", 3, (5, 4), one[:, None])
    write("many1_ellipse", 4, (3, 5), one[:, None], ellipse=True, residual=False)
    write("many2", 5, (5, 6), two)
    write("many2_plain_aspect", 6, (4, 7), two, rescale=False, aspect=True, residual=False)
    write("many2_ellipse_aspect", 7, (4, 7), two, ellipse=True, aspect=True)
    write("many2_far", 8, (4, 5), far, digits=1500)
    write("many2_far_ellipse", 9, (4, 5), far, ellipse=True, digits=1500)
    write("many2_sizes", 10, (4, 5), sizes)
    write("many2_sizes_ellipse_plain", 11, (4, 5), sizes, ellipse=True, rescale=False)
    write("many2_one_row", 12, (1, 6), two)
    write("many2_one_column_ellipse", 13, (6, 1), two, ellipse=True, aspect=True)
    write("many5", 14, (6, 5), five, residual=False)
    write("many5_plain", 15, (5, 6), five, rescale=False, scale=10.0)
    write("many5_ellipse", 16, (5, 5), five, ellipse=True)
    write("many5_ellipse_plain", 17, (5, 5), five, ellipse=True, rescale=False)
    write("many5_same", 18, (4, 5), same)
    write("many5_same_ellipse", 19, (4, 5), same, ellipse=True)


if __name__ == "__main__":
    main()
