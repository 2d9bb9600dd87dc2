// Scalar mathematics of nearest-anchor quantization; the rule stands in attnkern/quantize.py.
//
// Sorted anchors lo < hi are parted by a threshold: the smallest number that prefers hi. It is the midpoint in exact
// arithmetic where hi wins the tie there, else the next number above it.
#pragma once

#include "elementary.h"

namespace attnkern {

// The smallest double that prefers hi to lo, lo < hi; hi_first says that hi has the lower original index.
ATTNKERN_INLINE double threshold(double lo, double hi, bool hi_first) {
  const double infinity = double(INFINITY);
  // Both of a sum that overflows are so large that halving them is exact; of others the sum is halved instead, because
  // half of a denormal may round.
  const bool overflows = std::fabs(lo) < infinity && std::fabs(hi) < infinity && std::fabs(lo + hi) == infinity;
  if (overflows) lo *= 0.5, hi *= 0.5;
  const double sum = lo + hi;
  if (sum != sum) // opposite infinities: every finite number is as far from one as from the other
    return hi_first ? std::nextafter(-infinity, infinity) : infinity;
  const double tail = sum - lo;
  const double error = (lo - (sum - tail)) + (hi - tail); // sum + error is exact (Knuth)
  const double midpoint = overflows ? sum : 0.5 * sum;
  const double doubled = overflows ? sum : midpoint + midpoint;
  // Where half the sum is no double, what it was rounded to is above or below it, and no tie.
  const bool prefers_hi = doubled != sum ? doubled > sum : error < 0 || (error == 0 && hi_first);
  return prefers_hi ? midpoint : std::nextafter(midpoint, infinity);
}

// The smallest T that is not below the threshold: a number of type T prefers hi exactly when it is not below this.
template <typename T> ATTNKERN_INLINE T round_up(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) < threshold ? std::nextafter(rounded, static_cast<T>(INFINITY)) : rounded;
}

// An index of `count` anchors. A result can be written to behind PyTorch's back (.data, NumPy): nothing beside the
// anchors is read for it.
ATTNKERN_INLINE int64_t kept_within(int64_t index, int64_t count) { return index >= 0 && index < count ? index : 0; }

// Gradient of an element: what comes through its value, and its share of the commitment loss ‖a - sg[v]‖².
template <typename T> ATTNKERN_INLINE T commitment_grad(T a, T value, T grad_loss, T divisor) {
  return T(2) * (a - value) * (grad_loss / divisor);
}

} // namespace attnkern
