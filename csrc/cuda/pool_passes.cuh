// The forward and the backward pass of pooling. Both compute a score ⟨ℓ, vector⟩ for each position, turn it into a
// weight (softmax forward, its gradient backward), and sum the weighted features: the pooled features, or the query's
// gradient.
#pragma once

#include "cuda/packed.cuh"
#include "pool.h"

namespace attnkern {

// A query for each image, or one for all.
struct Query {
  Companion values; // (N, C) or (C,)
  bool shared;

  template <typename A> ATTNKERN_DEVICE A load(const Shape& shape, int64_t image, int64_t c) const {
    return values.load<A>(shared ? c : image * shape.channels + c);
  }
};

// Scores are ⟨ℓ, query⟩, and weights exp(score - max), relative to the largest score so far.
template <typename T> struct Forward {
  using A = Wide<T>;
  static constexpr bool kBackward = false, kMasked = false;
  Query query;
  A *scores;      // (N, positions)
  A *sums;        // (N, splits, C): Σ exp(score - max)·ℓ
  A *moments;     // (N, splits, 2): max, Σ exp(score - max)
  T *pooled;      // (N, C)
  A *pooled_wide; // (N, C), or null where it is pooled itself
  A *attention;   // (N, positions)

  // The vector that scores are computed with.
  ATTNKERN_DEVICE A score_vector(const Shape& shape, int64_t image, int64_t c) const {
    return query.load<A>(shape, image, c);
  }
  ATTNKERN_DEVICE void store_pooled(int64_t at, A value) const {
    pooled[at] = narrow<T>(value);
    if (pooled_wide != nullptr)
      pooled_wide[at] = value;
  }
};

// Scores are s = ⟨ℓ, dg⟩ + da, and weights dc = a(s - Δ) + dscore.
template <typename T> struct Backward {
  using A = Wide<T>;
  static constexpr bool kBackward = true;
  const T* grad_pooled;    // (N, C) or null
  const A *grad_attention; // (N, positions) or null
  const A *grad_scores;    // (N, positions) or null
  Query query;
  const A *attention;      // (N, positions)
  const A *pooled;         // (N, C)
  T *grad_local;           // like local, or null
  A *sums;                 // (N, splits, C): Σ dc·ℓ
  bool direct;             // whether a block writes the gradient of a query itself
  MutableCompanion grad_query;

  ATTNKERN_DEVICE A score_vector(const Shape& shape, int64_t image, int64_t c) const {
    return grad_pooled == nullptr ? A(0) : widen(grad_pooled[image * shape.channels + c]);
  }
  // Δ = ⟨dg, pooled⟩ + Σ a·da; called by the whole block.
  ATTNKERN_DEVICE A delta(const Shape& shape, int64_t image) const {
    A total[1] = {};
    if (grad_pooled != nullptr)
      for (int64_t c = threadIdx.x; c < shape.channels; c += blockDim.x)
        total[0] = std::fma(score_vector(shape, image, c), pooled[image * shape.channels + c], total[0]);
    block_reduce(total);
    return attention_delta(shape, image, total[0]);
  }
  // The same with ⟨dg, pooled⟩ given.
  ATTNKERN_DEVICE A attention_delta(const Shape& shape, int64_t image, A delta) const {
    if (grad_attention == nullptr)
      return delta;
    A total[1] = {};
    for (int64_t p = image * shape.positions + threadIdx.x; p < (image + 1) * shape.positions; p += blockDim.x)
      total[0] = std::fma(attention[p], grad_attention[p], total[0]);
    block_reduce(total);
    return delta + total[0];
  }
};

// What the backward pass reads for a position, before its score is known.
template <typename A> struct Position {
  A attention, grad_attention, grad_score;

  template <typename T>
  ATTNKERN_DEVICE static Position load(const Backward<T>& pass, int64_t p) {
    return {pass.attention[p], pass.grad_attention == nullptr ? A(0) : pass.grad_attention[p],
            pass.grad_scores == nullptr ? A(0) : pass.grad_scores[p]};
  }
  ATTNKERN_DEVICE A weight(A dot, A delta) const {
    return score_grad(attention, dot + grad_attention, delta, grad_score);
  }
};

} // namespace attnkern
