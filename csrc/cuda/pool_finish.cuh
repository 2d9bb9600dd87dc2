// Sums that follow the walk or the slices: an image's outputs from its splits, and the query's gradient from those of
// splits and images. Rows are added in a fixed order.
#pragma once

#include "cuda/pool_walk.cuh"

namespace attnkern {

// How blocks of 256 threads sum rows of channels: one thread per channel for few rows, eight for many.
struct RowSums {
  static constexpr int kThreads = 256;
  int64_t channels;
  int threads; // per channel

  RowSums(int64_t channels, int64_t rows) : channels(channels), threads(rows > 16 ? 8 : 1) {}
  ATTNKERN_INLINE int width() const { return kThreads / threads; } // channels of a block
  ATTNKERN_INLINE int64_t blocks() const { return channels > 0 ? (channels + width() - 1) / width() : 1; }

  // Folds term(sum, element, row) over the rows at channel c of a matrix (rows, channels). Called by the whole block;
  // the first thread of each channel gets the result.
  template <typename A, typename Term>
  ATTNKERN_DEVICE A sum(const A* from, int64_t c, int64_t rows, const Term& term) const {
    constexpr int kRun = 32; // rows summed on their own, so that the error of many rows grows more slowly
    struct Threads {
      A of[kThreads];
    };
    A* sums = shared<Threads>().of;
    A sum = 0;
    int64_t row = threadIdx.x / width();
    from += row * channels + c;
    while (c < channels && row < rows) {
      A run = 0;
#pragma unroll 8
      for (int i = 0; i < kRun && row < rows; ++i, row += threads, from += threads * channels)
        run = term(run, *from, row);
      sum += run;
    }
    if (threads == 1)
      return sum;
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int i = 1; i < threads && threadIdx.x < width(); ++i)
      sum += sums[i * width() + threadIdx.x];
    return sum;
  }
};

// Computes an image's outputs from its splits. The first blocks of an image sum the channels; all write some positions.
template <typename T, typename Pass = Forward<T>>
__global__ void __launch_bounds__(RowSums::kThreads)
    pool_finish(Shape shape, int64_t splits, Pass pass, RowSums rows, int64_t blocks) {
  using A = Wide<T>;
  struct Factors { // that bring the splits' sums to the image's largest score
    A of[kMostSplits];
  };
  static_assert(kMostSplits <= 2 * kWarp, "a lane has two splits");
  const int64_t image = divide(block_index(), blocks), block = block_index() - image * blocks;
  if (image >= shape.images)
    return;
  A* factors = shared<Factors>().of;
  const A* moments = pass.moments + 2 * image * splits;
  const int lane = threadIdx.x % kWarp, other = lane + kWarp;
  const A max = lane < splits ? moments[2 * lane] : -A(INFINITY);
  const A other_max = other < splits ? moments[2 * other] : -A(INFINITY);
  const A sum = lane < splits ? moments[2 * lane + 1] : A(0);
  const A other_sum = other < splits ? moments[2 * other + 1] : A(0);
  const A highest = warp_reduce<Max>(Max()(max, other_max));
  const A factor = lane < splits ? softmax_weight(max, highest) : A(0);
  const A other_factor = other < splits ? softmax_weight(other_max, highest) : A(0);
  A total = warp_reduce(sum * factor + other_sum * other_factor);
  if constexpr (Pass::kMasked)
    if (total == 0 && !pass.keeps_any(shape, image))
      total = INFINITY; // divides sums that are zero
  const auto kept = [&](int64_t p) {
    if constexpr (Pass::kMasked)
      return pass.keeps(image, p);
    else
      return true;
  };
  for (int64_t p = block * RowSums::kThreads + threadIdx.x; p < shape.positions; p += blocks * RowSums::kThreads)
    pass.attention[image * shape.positions + p] =
        kept(p) ? softmax_weight(pass.scores[image * shape.positions + p], highest) / total : A(0);
  if (block >= rows.blocks())
    return;
  if (threadIdx.x < kWarp)
    factors[lane] = factor, factors[other] = other_factor;
  __syncthreads();
  const int64_t c = block * rows.width() + threadIdx.x % rows.width();
  const A value = rows.sum(pass.sums + image * splits * shape.channels, c, splits, [&](A sum, A element, int64_t split) {
    return std::fma(element, factors[split], sum);
  });
  if (threadIdx.x < rows.width() && c < shape.channels)
    pass.store_pooled(image * shape.channels + c, value / total);
}

// Σ over the rows of each group of (groups, rows, C).
template <typename A>
__global__ void __launch_bounds__(RowSums::kThreads)
    add_rows(const A* from, int64_t groups, int64_t count, RowSums rows, MutableCompanion to) {
  const int64_t group = divide(block_index(), rows.blocks()), block = block_index() - group * rows.blocks();
  if (group >= groups)
    return;
  const int64_t c = block * rows.width() + threadIdx.x % rows.width();
  const A value = rows.sum(from + group * count * rows.channels, c, count,
                           [](A sum, A element, int64_t) { return sum + element; });
  if (threadIdx.x < rows.width() && c < rows.channels)
    to.store(group * rows.channels + c, value);
}

} // namespace attnkern
