// Scalar mathematics of the rotated sigmoid window; formulas in attnkern/window.py.
//
// f = Λ(p)·Λ(q) with p = s(1 - (u/σ₁)²), q = s(1 - (v/σ₂)²) and (u, v) the offset from the centre, rotated.
#pragma once

#include "elementary.h"

namespace attnkern {

constexpr double kSigmaFloor = 1e-6; // |σ| is floored here, with zero gradient below
constexpr int kParameters = 5;       // centre row, centre column, half height, half width, angle
// The largest exponent, Σ f relative to it, and Σ π ∂log f/∂β for the parameters of all windows.
constexpr ATTNKERN_INLINE int64_t stats_of(int64_t windows) { return 2 + kParameters * windows; }

// Pixel centres of an axis: from 0 to 1 with corners aligned; 0.5 for an axis of length 1.
template <typename T> ATTNKERN_INLINE T coordinate(int64_t i, int64_t length) {
  return length == 1 ? T(0.5) : T(i) / T(length - 1);
}

// The same numbers, bit for bit, without a division for each pixel.
template <typename T> struct Axis {
  T begin, last, inverse; // coordinate of the first pixel, index of the last, and 1 / last

  // The error of a quotient can be computed exactly; one correction with it gives the correctly rounded quotient
  // (Markstein).
  ATTNKERN_INLINE T at(int64_t i) const {
    const T quotient = T(i) * inverse;
    return begin + std::fma(std::fma(-quotient, last, T(i)), inverse, quotient);
  }
};

template <typename T> ATTNKERN_INLINE Axis<T> make_axis(int64_t length) {
  const T last = length == 1 ? T(1) : T(length - 1);
  return {length == 1 ? T(0.5) : T(0), last, T(1) / last};
}

// One image's rectangle in the form in which it is evaluated.
template <typename T> struct Frame {
  T mu1, mu2, cosine, sine;
  T inverse1, inverse2;         // 1/σ, floored
  T row, column;                // aspect factors of the offsets
  T scale;
  T sigma1_free, sigma2_free;   // 1 where |σ| is at or above its floor, else 0
};

template <typename T>
ATTNKERN_INLINE Frame<T> make_frame(const T (&rectangle)[kParameters], int64_t height, int64_t width, T scale,
                                    bool aspect) {
  Frame<T> frame;
  frame.mu1 = rectangle[0];
  frame.mu2 = rectangle[1];
  const bool floored1 = std::fabs(rectangle[2]) < T(kSigmaFloor), floored2 = std::fabs(rectangle[3]) < T(kSigmaFloor);
  frame.inverse1 = T(1) / (floored1 ? T(kSigmaFloor) : rectangle[2]);
  frame.inverse2 = T(1) / (floored2 ? T(kSigmaFloor) : rectangle[3]);
  frame.sigma1_free = floored1 ? T(0) : T(1);
  frame.sigma2_free = floored2 ? T(0) : T(1);
  sine_cosine(rectangle[4], frame.sine, frame.cosine);
  const int64_t longest = (height > width ? height : width) - 1;
  frame.row = aspect && longest > 0 ? T(height - 1) / T(longest) : T(1);
  frame.column = aspect && longest > 0 ? T(width - 1) / T(longest) : T(1);
  frame.scale = scale;
  return frame;
}

// A point's coordinates along the rectangle's axes, from its centre: u, v, and u/σ₁, v/σ₂.
template <typename T> struct Offset {
  T u, v, u_sigma, v_sigma;
};

template <typename T> ATTNKERN_INLINE Offset<T> offset_at(const Frame<T>& frame, T t1, T t2) {
  const T d1 = (t1 - frame.mu1) * frame.row, d2 = (t2 - frame.mu2) * frame.column;
  const T u = frame.cosine * d1 + frame.sine * d2, v = frame.cosine * d2 - frame.sine * d1;
  return {u, v, u * frame.inverse1, v * frame.inverse2};
}

// Λ(p) = e^exponent · fraction, and Λ(-p) = 1 - Λ(p). This avoids a logarithm. The exponent is at most 0 and the
// fraction at least 1/2, so a softmax over the exponents alone neither overflows nor underflows to all zeros.
ATTNKERN_INLINE void split_sigmoid(float p, float& exponent, float& fraction, float& complement) {
  const float e = exponential(-std::fabs(p));
  exponent = p < 0.0f ? p : 0.0f;
  fraction = reciprocal(1.0f + e);
#if defined(__CUDA_ARCH__)
  complement = (p < 0.0f ? 1.0f : e) * fraction;
#else // GCC would make a branch of it, and not vectorise the loop
  const uint32_t negative = 0u - (bit_cast<uint32_t>(p) >> 31);
  complement = bit_cast<float>((bit_cast<uint32_t>(1.0f) & negative) | (bit_cast<uint32_t>(e) & ~negative)) * fraction;
#endif
}
// In float64 time does not matter; a logarithm gives the rounding of the other backends.
ATTNKERN_INLINE void split_sigmoid(double p, double& exponent, double& fraction, double& complement) {
  const double e = exponential(-std::fabs(p));
  exponent = (p < 0.0 ? p : 0.0) - log1p_unit(e);
  fraction = 1.0;
  complement = (p < 0.0 ? 1.0 : e) / (1.0 + e);
}

// The shape of the windows: Λ(p)·Λ(q), or Λ(s(1 - (u/σ₁)² - (v/σ₂)²)).
enum class Outline { rectangle, ellipse };

// The window at a point: f = e^exponent · fraction.
template <typename T> struct Window {
  Offset<T> at;
  T exponent, fraction;
  T outside1, outside2; // Λ(-p), Λ(-q); of an ellipse both are 1 - f
};

template <Outline kOutline, typename T> ATTNKERN_INLINE Window<T> window_at(const Frame<T>& frame, T t1, T t2) {
  Window<T> window;
  window.at = offset_at(frame, t1, t2);
  const T squared1 = window.at.u_sigma * window.at.u_sigma, squared2 = window.at.v_sigma * window.at.v_sigma;
  if constexpr (kOutline == Outline::ellipse) {
    split_sigmoid(frame.scale * (T(1) - squared1 - squared2), window.exponent, window.fraction, window.outside1);
    window.outside2 = window.outside1;
  } else {
    T exponent, fraction;
    split_sigmoid(frame.scale * (T(1) - squared1), exponent, fraction, window.outside1);
    split_sigmoid(frame.scale * (T(1) - squared2), window.exponent, window.fraction, window.outside2);
    window.exponent = exponent + window.exponent;
    window.fraction = fraction * window.fraction;
  }
  return window;
}

// A bound of its exponent that is near it, without exponentials.
template <Outline kOutline, typename T> ATTNKERN_INLINE T exponent_bound(const Frame<T>& frame, T t1, T t2) {
  const Offset<T> at = offset_at(frame, t1, t2);
  const T squared1 = at.u_sigma * at.u_sigma, squared2 = at.v_sigma * at.v_sigma;
  const T p = frame.scale * (T(1) - squared1 - (kOutline == Outline::ellipse ? squared2 : T(0)));
  const T q = kOutline == Outline::ellipse ? T(0) : frame.scale * (T(1) - squared2);
  return (p < T(0) ? p : T(0)) + (q < T(0) ? q : T(0));
}

// 1 - f as a sum of positive terms, because the difference would cancel where f is near 1. The lower limit lets a
// product of these be divided by one of its factors.
template <Outline kOutline, typename T> ATTNKERN_INLINE T complement(const Window<T>& window) {
  T outside = window.outside1;
  if constexpr (kOutline == Outline::rectangle)
    outside += (T(1) - window.outside1) * window.outside2;
  return outside > T(1e-30) ? outside : T(1e-30);
}

// The derivatives of log f with respect to the five parameters.
template <typename T>
ATTNKERN_INLINE void window_slopes(const Frame<T>& frame, const Window<T>& window, T (&slope)[kParameters]) {
  const Offset<T>& at = window.at;
  const T by_u = T(-2) * frame.scale * window.outside1 * at.u_sigma * frame.inverse1; // ∂log f/∂u
  const T by_v = T(-2) * frame.scale * window.outside2 * at.v_sigma * frame.inverse2; // ∂log f/∂v
  slope[0] = -frame.row * (frame.cosine * by_u - frame.sine * by_v);
  slope[1] = -frame.column * (frame.sine * by_u + frame.cosine * by_v);
  slope[2] = -frame.sigma1_free * by_u * at.u_sigma;
  slope[3] = -frame.sigma2_free * by_v * at.v_sigma;
  slope[4] = by_u * at.v - by_v * at.u;
}

// The union of windows at a point, f = 1 - Π (1 - f_k) = Σ_k f_k Π_{j<k} (1 - f_j) = e^exponent · fraction. No term is
// negative, so that nothing cancels, however small the windows are.
template <typename T> struct Union {
  T exponent;     // a bound of the windows' exponents that is near the largest
  T fraction = 0;
  T outside = 1;  // Π (1 - f_k)

  template <Outline kOutline> ATTNKERN_INLINE void add(const Window<T>& window) {
    fraction += outside * window.fraction * exponential(window.exponent - exponent);
    outside *= complement<kOutline>(window);
  }
  // ∂log f/∂log f_k = f_k/f · Π_{j≠k} (1 - f_j)
  template <Outline kOutline> ATTNKERN_INLINE T share(const Window<T>& window) const {
    const T relative = window.fraction * exponential(window.exponent - exponent);
    return relative * outside / (fraction * complement<kOutline>(window));
  }
};

template <Outline kOutline, typename T>
ATTNKERN_INLINE Union<T> with_window(const Frame<T>& frame, T t1, T t2, Union<T> sum) {
  sum.template add<kOutline>(window_at<kOutline>(frame, t1, t2));
  return sum;
}

// The derivatives of log f with respect to the parameters of one window: alone, where f · e^-max is returned, or in a
// union.
template <Outline kOutline, typename T>
ATTNKERN_INLINE T slopes_at(const Frame<T>& frame, T t1, T t2, T max, T (&slope)[kParameters]) {
  const Window<T> window = window_at<kOutline>(frame, t1, t2);
  window_slopes(frame, window, slope);
  return window.fraction * exponential(window.exponent - max);
}
template <Outline kOutline, typename T>
ATTNKERN_INLINE void slopes_at(const Frame<T>& frame, T t1, T t2, Union<T> sum, T (&slope)[kParameters]) {
  const Window<T> window = window_at<kOutline>(frame, t1, t2);
  const T share = sum.template share<kOutline>(window);
  window_slopes(frame, window, slope);
  for (int k = 0; k < kParameters; ++k)
    slope[k] *= share;
}

} // namespace attnkern
