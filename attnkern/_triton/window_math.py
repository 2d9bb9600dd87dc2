"""The windows' mathematics in Triton: one window at the positions of a map. Formulas: attnkern/window.py."""

import triton
import triton.language as tl

from attnkern._numerics import SIGMA_FLOOR

_SIGMA_FLOOR = tl.constexpr(SIGMA_FLOOR)


@triton.jit
def frame_of(rectangle, n):
    """Image n's rectangle: μ₁, μ₂, 1/σ₁, 1/σ₂, cos α, sin α, and for each σ 1 if it is not below its floor, else 0."""
    rectangle += n * 5
    sigma1 = tl.load(rectangle + 2).to(tl.float32)
    sigma2 = tl.load(rectangle + 3).to(tl.float32)
    floored1 = tl.abs(sigma1) < _SIGMA_FLOOR
    floored2 = tl.abs(sigma2) < _SIGMA_FLOOR
    alpha = tl.load(rectangle + 4).to(tl.float32)
    return (
        tl.load(rectangle).to(tl.float32),
        tl.load(rectangle + 1).to(tl.float32),
        1.0 / tl.where(floored1, _SIGMA_FLOOR, sigma1),
        1.0 / tl.where(floored2, _SIGMA_FLOOR, sigma2),
        tl.cos(alpha),
        tl.sin(alpha),
        tl.where(floored1, 0.0, 1.0),
        tl.where(floored2, 0.0, 1.0),
    )


@triton.jit
def _coordinate(i, length):
    """Pixel centres of an axis, from 0 to 1 with corners aligned; 0.5 for an axis of length 1."""
    i, last = i.to(tl.float32), tl.maximum(length - 1, 1).to(tl.float32)
    inverse = 1.0 / last  # the product with it and one correction round like a division, without branches
    t = i * inverse
    return tl.where(length == 1, 0.5, tl.fma(tl.fma(-t, last, i), inverse, t))


@triton.jit
def _log_sigmoids(p, q):
    """log Λ(p) + log Λ(q) and its derivatives, 1 - Λ(p) and 1 - Λ(q)."""
    e_p = tl.exp(-tl.abs(p))
    e_q = tl.exp(-tl.abs(q))
    z = tl.minimum(p, 0.0) + tl.minimum(q, 0.0) - tl.log((1.0 + e_p) * (1.0 + e_q))
    return z, tl.where(p < 0, 1.0, e_p) / (1.0 + e_p), tl.where(q < 0, 1.0, e_q) / (1.0 + e_q)


@triton.jit
def _offsets(position, frame, H, W, row, column):
    """Coordinates along the window's axes: u, v, u/σ₁, v/σ₂."""
    mu1, mu2, inverse1, inverse2, cosine, sine, _, _ = frame
    i = position.to(tl.uint32) // W.to(tl.uint32)
    j = position.to(tl.uint32) - i * W.to(tl.uint32)
    d1 = (_coordinate(i, H) - mu1) * row
    d2 = (_coordinate(j, W) - mu2) * column
    u = cosine * d1 + sine * d2
    v = cosine * d2 - sine * d1
    return u, v, u * inverse1, v * inverse2


@triton.jit
def _slopes(frame, offsets, outside1, outside2, scale, row, column):
    """The derivatives of log f with respect to the five parameters, from 1 - Λ(p) and 1 - Λ(q)."""
    _, _, inverse1, inverse2, cosine, sine, sigma1_free, sigma2_free = frame
    u, v, u_sigma, v_sigma = offsets
    by_u = -2.0 * scale * outside1 * u_sigma * inverse1  # ∂log f/∂u
    by_v = -2.0 * scale * outside2 * v_sigma * inverse2  # ∂log f/∂v
    by_mu1 = -row * (cosine * by_u - sine * by_v)
    by_mu2 = -column * (sine * by_u + cosine * by_v)
    by_sigma1 = -sigma1_free * by_u * u_sigma
    by_sigma2 = -sigma2_free * by_v * v_sigma
    return by_mu1, by_mu2, by_sigma1, by_sigma2, by_u * v - by_v * u


@triton.jit
def log_window(position, frame, H, W, scale, row, column):
    """log f of a rectangle at positions of the map, and its derivatives with respect to the five parameters."""
    offsets = _offsets(position, frame, H, W, row, column)
    _, _, u_sigma, v_sigma = offsets
    z, outside1, outside2 = _log_sigmoids(scale * (1.0 - u_sigma * u_sigma), scale * (1.0 - v_sigma * v_sigma))
    slopes = _slopes(frame, offsets, outside1, outside2, scale, row, column)
    return z, slopes[0], slopes[1], slopes[2], slopes[3], slopes[4]


@triton.jit
def window_of_union(position, frame, H, W, scale, row, column, ELLIPSE: tl.constexpr):
    """Of a rectangle or an ellipse f = e^exponent · fraction, 1 - f, and the derivatives of log f.

    The exponent is at most 0 and the fraction at least 1/4. 1 - f is a sum of positive terms, so that it does not
    cancel where f is near 1. Its lower limit lets a product of these be divided by one of its factors.
    """
    offsets = _offsets(position, frame, H, W, row, column)
    _, _, u_sigma, v_sigma = offsets
    if ELLIPSE:
        p = scale * (1.0 - u_sigma * u_sigma - v_sigma * v_sigma)
        e = tl.exp(-tl.abs(p))
        exponent = tl.minimum(p, 0.0)
        fraction = 1.0 / (1.0 + e)
        outside1 = tl.where(p < 0, 1.0, e) * fraction
        outside2 = outside1
        outside = outside1
    else:
        p = scale * (1.0 - u_sigma * u_sigma)
        q = scale * (1.0 - v_sigma * v_sigma)
        e_p = tl.exp(-tl.abs(p))
        e_q = tl.exp(-tl.abs(q))
        exponent = tl.minimum(p, 0.0) + tl.minimum(q, 0.0)
        fraction = 1.0 / ((1.0 + e_p) * (1.0 + e_q))
        outside1 = tl.where(p < 0, 1.0, e_p) * ((1.0 + e_q) * fraction)
        outside2 = tl.where(q < 0, 1.0, e_q) * ((1.0 + e_p) * fraction)
        outside = outside1 + (1.0 - outside1) * outside2
    slopes = _slopes(frame, offsets, outside1, outside2, scale, row, column)
    return exponent, fraction, tl.maximum(outside, 1e-30), slopes[0], slopes[1], slopes[2], slopes[3], slopes[4]


@triton.jit
def columns(a, b, c, d, e, f, g):
    """Seven vectors as the columns of a matrix (BLOCK_P, 8), zeros in the last: one reduction sums all of them."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, tl.zeros_like(a)))
    return tl.reshape(tl.join(even, odd), (a.shape[0], 8))


@triton.jit
def gradient(sums, slope_sums, HW, RESCALE: tl.constexpr):
    """dβ (8,) from Σ G f (∂z - mean), with Σ G f in column 5, and Σ f (∂z - mean).

    The last sum is zero up to rounding. A large mean of G, Σ G f / HW, multiplies this rounding error in the first sum;
    it is subtracted.
    """
    if RESCALE:
        mean = tl.sum(tl.where(tl.arange(0, 8) == 5, sums, 0.0)) / HW
        sums = sums - mean * slope_sums
    return sums
