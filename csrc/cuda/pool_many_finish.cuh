// What follows pool_many(): the outputs of each query from those of its splits, and the gradient of the features.
#pragma once

#include "cuda/pool_finish.cuh"
#include "cuda/pool_many.cuh"

namespace attnkern {

// For pool_finish(), whose images are the queries of all images.
template <typename T> struct MaskedForward : Forward<T> {
  static constexpr bool kMasked = true;
  Mask mask;
  int64_t queries;

  ATTNKERN_DEVICE bool keeps(int64_t row, int64_t position) const {
    return mask.first == nullptr || mask.keeps(divide(row, queries), position);
  }
  // Called by the whole block.
  ATTNKERN_DEVICE bool keeps_any(const Shape& shape, int64_t row) const {
    bool any = false;
    for (int64_t p = threadIdx.x; p < shape.positions; p += blockDim.x)
      any = any || keeps(row, p);
    return __syncthreads_or(any);
  }
};

constexpr int kDeltaThreads = 128;

// Δ of each query, whose number is the image. The attention of masked positions has no gradient, whatever is stored.
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    many_deltas(Shape shape, Backward<T> pass, Mask mask, int64_t queries, Wide<T>* deltas) {
  const int64_t row = block_index();
  if (row >= shape.images)
    return;
  Wide<T> total[1] = {};
  if (pass.grad_attention != nullptr)
    for (int64_t p = threadIdx.x; p < shape.positions; p += blockDim.x) {
      const int64_t at = row * shape.positions + p;
      if (mask.keeps(divide(row, queries), p))
        total[0] = std::fma(pass.attention[at], pass.grad_attention[at], total[0]);
    }
  block_reduce(total);
  pass.grad_attention = nullptr;
  const Wide<T> delta = pass.delta(shape, row) + total[0];
  if (threadIdx.x == 0)
    deltas[row] = delta;
}

// dℓ = Σ a·dg + Σ dc·q over the queries. The product's rows are positions if channels are innermost, and channels
// otherwise. A warp computes 32 rows and 32 columns; its factors come from the caches.
constexpr int kOuterWarps = 8, kOuterRows = 32, kOuterColumns = 32;

template <typename T> struct ManyOuter {
  using A = Wide<T>;
  ManyPlan plan;
  const T* grad_pooled;           // (N, M, C) or null
  Companion query;                // (N or 1, M, C)
  const A *attention, *weights;   // (N, M, positions): a and dc
  bool clears;                    // whether the gradient is zero at masked positions
  T* grad_local;

  ATTNKERN_INLINE int64_t position_blocks() const {
    return ceil_div(plan.shape.positions, plan.shape.channels_inner ? kOuterRows : kOuterColumns);
  }
  ATTNKERN_INLINE int64_t channel_blocks() const {
    return ceil_div(plan.shape.channels, kOuterWarps * (plan.shape.channels_inner ? kOuterColumns : kOuterRows));
  }
  ATTNKERN_INLINE int64_t blocks() const { return plan.shape.images * position_blocks() * channel_blocks(); }
};

template <typename T, bool kInner>
__global__ void __launch_bounds__(kOuterWarps* kWarp) many_grad_local(ManyOuter<T> pass) {
  using A = Wide<T>;
  const ManyPlan& plan = pass.plan;
  const Shape& shape = plan.shape;
  const int64_t block = block_index(), rest = divide(block, pass.channel_blocks());
  const int64_t image = divide(rest, pass.position_blocks());
  if (image >= shape.images)
    return;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t position = (rest - image * pass.position_blocks()) * (kInner ? kOuterRows : kOuterColumns);
  const int64_t channel = ((block - rest * pass.channel_blocks()) * kOuterWarps + threadIdx.x / kWarp) *
                          (kInner ? kOuterColumns : kOuterRows);
  const int64_t row = kInner ? position : channel, rows = kInner ? shape.positions : shape.channels;
  const int64_t column = kInner ? channel : position, columns = kInner ? shape.channels : shape.positions;
  if (channel >= shape.channels)
    return;
  A d[2][4][4] = {};
  // Adds the products of maps and vectors, of which these are the rows of the image's first query.
  const int64_t first = image * plan.queries;
  const auto add = [&](auto whole, const Numbers<A>& maps, const auto& vectors, int64_t first_vector) {
    constexpr bool kWholeMap = sizeof(A) == 8, kWholeVector = decltype(whole)::value;
    const auto one = [&](int64_t m, int64_t i) {
      if (m >= plan.queries || i >= rows)
        return A(0);
      if constexpr (kInner)
        return maps.template load<A>((first + m) * rows + i);
      else
        return vectors.template load<A>((first_vector + m) * rows + i);
    };
    const auto four = [&](int64_t m, int64_t i, A(&to)[4]) {
      const int64_t exist = m < plan.queries ? columns - i : 0;
      if constexpr (kInner)
        vectors.load_run((first_vector + m) * columns + i, exist, to);
      else
        maps.load_run((first + m) * columns + i, exist, to);
    };
#pragma unroll 1
    for (int64_t m = t; m < plan.queries + t; m += 8) {
      using B = Factor<A, 2, kInner ? kWholeVector : kWholeMap>;
      A upper[4], lower[4];
      four(m, column + g * 4, upper);
      four(m + 4, column + g * 4, lower);
      B b[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        b[n] = B({upper[n], lower[n]});
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t i = row + r * 16 + g;
        const Factor<A, 4, kInner ? kWholeMap : kWholeVector> a(
            {one(m, i), one(m, i + 8), one(m + 4, i), one(m + 4, i + 8)});
#pragma unroll
        for (int n = 0; n < 4; ++n)
          add_product(d[r][n], a, b[n]);
      }
    }
  };
  add(std::bool_constant<sizeof(A) == 8>(), Numbers<A>{pass.weights}, pass.query, plan.shared_query ? 0 : first);
  if (pass.grad_pooled != nullptr)
    add(std::bool_constant<kIsFactor<T>>(), Numbers<A>{pass.attention}, Numbers<T>{pass.grad_pooled}, first);

  // A lane has eight neighbouring columns of four rows.
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t i = row + r * 8 + g, j = column + t * 8;
    A values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const bool cleared = pass.clears && !plan.mask.keeps(image, kInner ? i : j + k);
      values[k] = cleared ? A(0) : d[r / 2][k % 4][r % 2 * 2 + k / 4];
    }
    if (i >= rows || j >= columns)
      continue;
    T* to = pass.grad_local + image * shape.image_size() + i * columns + j;
    with_width<T>(plan.width, [&](auto width) {
      constexpr int V = kVector<T>;
#pragma unroll
      for (int k = 0; k < 8; k += V) {
        A some[V];
#pragma unroll
        for (int v = 0; v < V; ++v)
          some[v] = values[k + v];
        store_packed<width(), 1>(pack<T>(some), to + k, j + k < columns, static_cast<int>(columns - j - k));
      }
    });
  }
}

} // namespace attnkern
