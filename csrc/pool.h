// Scalar mathematics of softmax compatibility pooling; formulas in attnkern/pool.py.
#pragma once

#include "elementary.h"

namespace attnkern {

// exp(score - max), which is 0 for a score of -Inf even if the maximum is -Inf too (as before the first score).
template <typename T> ATTNKERN_INLINE T softmax_weight(T score, T max) {
  return score == T(-INFINITY) && max == T(-INFINITY) ? T(0) : exponential(score - max);
}

// Gradient of a score: a(s - Δ) + dscore, with s = ⟨ℓ, dg⟩ + da and Δ = ⟨dg, pooled⟩ + Σ a·da.
template <typename T> ATTNKERN_INLINE T score_grad(T attention, T s, T delta, T grad_score) {
  return attention * (s - delta) + grad_score;
}

} // namespace attnkern
