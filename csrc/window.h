// Scalar mathematics of the rotated sigmoid window; formulas in attnkern/window.py.
//
// z = log Λ(p) + log Λ(q) with p = s(1 - (u/σ₁)²), q = s(1 - (v/σ₂)²) and (u, v) the offset from the centre, rotated.
#pragma once

#include "elementary.h"

namespace attnkern {

constexpr double kSigmaFloor = 1e-6; // |σ| is floored here, with zero gradient below
constexpr int kParameters = 5;       // centre row, centre column, half height, half width, angle
constexpr int kStats = 2 + kParameters; // max z, Σ exp(z - max z), Σ π ∂z/∂β

// Pixel centres of an axis: from 0 to 1 with corners aligned; 0.5 for an axis of length 1.
template <typename T> ATTNKERN_INLINE T coordinate(int64_t i, int64_t length) {
  return length == 1 ? T(0.5) : T(i) / T(length - 1);
}

// One image's rectangle, ready to be evaluated.
template <typename T> struct Frame {
  T mu1, mu2, cosine, sine;
  T inverse1, inverse2;         // 1/σ, floored
  T row, column;                // aspect factors of the offsets
  T scale;
  T moves1, moves2;             // 1 where σ is above its floor, else 0
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
  frame.moves1 = floored1 ? T(0) : T(1);
  frame.moves2 = floored2 ? T(0) : T(1);
  frame.cosine = std::cos(rectangle[4]);
  frame.sine = std::sin(rectangle[4]);
  const int64_t longest = (height > width ? height : width) - 1;
  frame.row = aspect && longest > 0 ? T(height - 1) / T(longest) : T(1);
  frame.column = aspect && longest > 0 ? T(width - 1) / T(longest) : T(1);
  frame.scale = scale;
  return frame;
}

// log Λ(p), and Λ(-p) = 1 - Λ(p), its derivative.
template <typename T> ATTNKERN_INLINE T log_sigmoid(T p, T& complement) {
  const T e = exponential(-std::fabs(p));
  complement = (p < T(0) ? T(1) : e) / (T(1) + e);
  return (p < T(0) ? p : T(0)) - log1p_unit(e);
}

// z at the coordinates (t1, t2), and its derivatives by the five parameters.
template <typename T>
ATTNKERN_INLINE T log_window(const Frame<T>& frame, T t1, T t2, T (&slope)[kParameters]) {
  const T d1 = (t1 - frame.mu1) * frame.row, d2 = (t2 - frame.mu2) * frame.column;
  const T u = frame.cosine * d1 + frame.sine * d2, v = frame.cosine * d2 - frame.sine * d1;
  const T u_sigma = u * frame.inverse1, v_sigma = v * frame.inverse2;
  T outside1, outside2;
  const T z = log_sigmoid(frame.scale * (T(1) - u_sigma * u_sigma), outside1) +
              log_sigmoid(frame.scale * (T(1) - v_sigma * v_sigma), outside2);
  const T by_u = T(-2) * frame.scale * outside1 * u_sigma * frame.inverse1; // ∂z/∂u
  const T by_v = T(-2) * frame.scale * outside2 * v_sigma * frame.inverse2; // ∂z/∂v
  slope[0] = -frame.row * (frame.cosine * by_u - frame.sine * by_v);
  slope[1] = -frame.column * (frame.sine * by_u + frame.cosine * by_v);
  slope[2] = -frame.moves1 * by_u * u_sigma;
  slope[3] = -frame.moves2 * by_v * v_sigma;
  slope[4] = by_u * v - by_v * u;
  return z;
}

template <typename T> ATTNKERN_INLINE T log_window(const Frame<T>& frame, T t1, T t2) {
  T slope[kParameters];
  return log_window(frame, t1, t2, slope);
}

} // namespace attnkern
