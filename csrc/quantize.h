// Scalar mathematics of nearest-anchor quantization; formulas in attnkern/quantize.py.
//
// Between two sorted anchors lo < hi lies a threshold: the smallest number whose nearest anchor is hi. It is their
// exact midpoint if hi wins the tie there, otherwise the next number above the midpoint.
#pragma once

#include "elementary.h"

namespace attnkern {

// The smallest double that is nearer to hi than to lo < hi. On a tie, the anchor with the lower original index wins;
// hi_first says that this is hi.
ATTNKERN_INLINE double threshold(double lo, double hi, bool hi_first) {
  const double infinity = double(INFINITY);
  // If the sum overflows, both anchors are so large that halving them first is exact. Otherwise the sum is halved,
  // because halving a denormal may round.
  const bool overflows = std::fabs(lo) < infinity && std::fabs(hi) < infinity && std::fabs(lo + hi) == infinity;
  if (overflows) lo *= 0.5, hi *= 0.5;
  const double sum = lo + hi;
  if (sum != sum) // opposite infinities: every finite number is equally far from both
    return hi_first ? std::nextafter(-infinity, infinity) : infinity;
  const double tail = sum - lo;
  const double error = (lo - (sum - tail)) + (hi - tail); // sum + error is exact (Knuth)
  const double midpoint = overflows ? sum : 0.5 * sum;
  const double doubled = overflows ? sum : midpoint + midpoint;
  // If half the sum is not a double, the rounded midpoint lies above or below the exact one, and there is no tie.
  const bool prefers_hi = doubled != sum ? doubled > sum : error < 0 || (error == 0 && hi_first);
  return prefers_hi ? midpoint : std::nextafter(midpoint, infinity);
}

// The smallest T that is not below the threshold. A number of type T has hi as its nearest anchor if and only if it is
// not below this.
template <typename T> ATTNKERN_INLINE T round_up(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) < threshold ? std::nextafter(rounded, static_cast<T>(INFINITY)) : rounded;
}

// An index within `count` anchors. Users can overwrite the saved indices without PyTorch noticing (.data, NumPy); this
// prevents reads outside the anchors.
ATTNKERN_INLINE int64_t kept_within(int64_t index, int64_t count) { return index >= 0 && index < count ? index : 0; }

// The commitment loss's gradient with respect to an element, d/da (a - sg[v])² / divisor.
template <typename T> ATTNKERN_INLINE T commitment_grad(T a, T value, T grad_loss, T divisor) {
  return T(2) * (a - value) * (grad_loss / divisor);
}

} // namespace attnkern
