// Scalar mathematics of nearest-anchor quantization; the rule stands in attnkern/quantize.py.
//
// Sorted anchors lo < hi are parted by a threshold: the smallest number that prefers hi. It is the midpoint in exact
// arithmetic where hi wins the tie there, else the next number above it.
#pragma once

#include "elementary.h"

namespace attnkern {

// The smallest double that prefers hi to lo, lo < hi; hi_first says that hi has the lower original index.
ATTNKERN_INLINE double threshold(double lo, double hi, bool hi_first) {
  const double half_lo = 0.5 * lo, half_hi = 0.5 * hi;
  const double midpoint = half_lo + half_hi;
  if (midpoint != midpoint) // opposite infinities: every finite number is as far from one as from the other
    return hi_first ? std::nextafter(-double(INFINITY), double(INFINITY)) : double(INFINITY);
  const double tail = midpoint - half_lo;
  const double error = (half_lo - (midpoint - tail)) + (half_hi - tail); // midpoint + error is exact (Knuth)
  return error < 0 || (error == 0 && hi_first) ? midpoint : std::nextafter(midpoint, double(INFINITY));
}

// The smallest T that is not below the threshold: a number of type T prefers hi exactly when it is not below this.
template <typename T> ATTNKERN_INLINE T round_up(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) < threshold ? std::nextafter(rounded, static_cast<T>(INFINITY)) : rounded;
}

// Gradient of an element: what comes through its value, and its share of the commitment loss ‖a - sg[v]‖².
template <typename T> ATTNKERN_INLINE T commitment_grad(T a, T value, T grad_loss, T divisor) {
  return T(2) * (a - value) * (grad_loss / divisor);
}

} // namespace attnkern
