// Maps of one rectangle per image. Forward: the statistics of each image's softmax (in the same launch if the map is
// small), then the features times the map. Backward: the gradient of the features and sums per tile, which are added in
// order.
#pragma once

#include "cuda/window.cuh"

#include <limits>

namespace attnkern {

// An image's frame and coordinates, computed once per block because sine, cosine and divisions are expensive.
template <typename A> struct Plane {
  Frame<A> frame;
  Axis<A> rows, columns;

  ATTNKERN_DEVICE Window<A> window(const Windows& windows, int64_t position) const {
    const int64_t row = divide(position, windows.width);
    return window_at<Outline::rectangle>(frame, rows.at(row), columns.at(position - row * windows.width));
  }
};

template <typename A> ATTNKERN_DEVICE const Plane<A>& shared_plane(const Windows& windows, int64_t image) {
  Plane<A>& plane = shared<Plane<A>>();
  if (threadIdx.x == 0) {
    plane.frame = windows.frame<A>(image);
    plane.rows = make_axis<A>(windows.height), plane.columns = make_axis<A>(windows.width);
  }
  __syncthreads();
  return plane;
}

// Statistics of a softmax: the largest exponent, Σ f relative to it, and with kSlopes (for the backward pass)
// Σ f ∂z/∂β relative to it.
template <typename A, bool kSlopes> struct Statistics {
  static constexpr int kSums = kSlopes ? 1 + kParameters : 1;
  A max, sum[kSums];

  // The maximum is finite, so that the difference of two maxima is not NaN.
  static ATTNKERN_DEVICE Statistics of_nothing() { return {std::numeric_limits<A>::lowest(), {}}; }
  // Adds `weight` times the sums relative to another maximum.
  ATTNKERN_DEVICE void add(A other_max, A weight, const A* sums) {
    const A larger = Max()(max, other_max), own_weight = exponential(max - larger);
    weight *= exponential(other_max - larger);
    max = larger;
#pragma unroll
    for (int k = 0; k < kSums; ++k)
      sum[k] = own_weight * sum[k] + weight * sums[k];
  }
  ATTNKERN_DEVICE void add(const Frame<A>& frame, const Window<A>& window) {
    A sums[1 + kParameters] = {A(1)}, slope[kParameters];
    if constexpr (kSlopes) {
      window_slopes(frame, window, slope);
#pragma unroll
      for (int k = 0; k < kParameters; ++k)
        sums[1 + k] = slope[k];
    }
    add(window.exponent, window.fraction, sums);
  }
  // Over `lanes` neighbouring lanes.
  ATTNKERN_DEVICE void reduce(int lanes) {
    const A largest = warp_reduce<Max>(max, lanes), weight = exponential(max - largest);
    max = largest;
#pragma unroll
    for (int k = 0; k < kSums; ++k)
      sum[k] = warp_reduce(weight * sum[k], lanes);
  }
  // In the form that the backward pass reads, with means in place of sums.
  ATTNKERN_DEVICE void store_means(A* to) const {
    to[0] = max;
    to[1] = sum[0];
#pragma unroll
    for (int k = 1; k < kSums; ++k)
      to[1 + k] = sum[k] / sum[0];
  }
};

// The statistics of `count` positions from `begin` on, computed by the whole block.
template <bool kSlopes, typename A>
ATTNKERN_DEVICE Statistics<A, kSlopes> block_statistics(const Windows& windows, const Plane<A>& plane, int64_t begin,
                                                        int count) {
  struct Warps {
    Statistics<A, kSlopes> of[kWarps];
  };
  Warps& warps = shared<Warps>();
  auto own = Statistics<A, kSlopes>::of_nothing();
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads)
    own.add(plane.frame, plane.window(windows, begin + i));
  own.reduce(kWarp);
  if (threadIdx.x % kWarp == 0)
    warps.of[threadIdx.x / kWarp] = own;
  __syncthreads();
  own = warps.of[threadIdx.x % kWarps];
  own.reduce(kWarps);
  return own;
}

// The statistics of an image from those of its chunks. Every warp computes them.
template <bool kSlopes, typename A>
ATTNKERN_DEVICE Statistics<A, kSlopes> image_statistics(const Windows& windows, const Statistics<A, true>* chunks) {
  auto own = Statistics<A, kSlopes>::of_nothing();
  for (int64_t i = threadIdx.x % kWarp; i < windows.chunks(); i += kWarp)
    own.add(chunks[i].max, A(1), chunks[i].sum);
  own.reduce(kWarp);
  return own;
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    window_statistics_kernel(Windows windows, Statistics<A, true>* chunks, int64_t items) {
  const int64_t item = block_index();
  if (item >= items)
    return;
  const int64_t image = divide(item, windows.chunks()), begin = (item - image * windows.chunks()) * windows.chunk();
  const Plane<A>& plane = shared_plane<A>(windows, image);
  const int count = static_cast<int>(std::min(windows.positions() - begin, windows.chunk()));
  const auto statistics = block_statistics<true>(windows, plane, begin, count);
  if (threadIdx.x == 0)
    chunks[item] = statistics;
}

// The map at a tile's columns, f = factor · e^-max · window. Columns that the tile owns are also written to `map`.
template <typename T>
ATTNKERN_DEVICE void fill_map(const Windows& windows, const Plane<Wide<T>>& plane, const Tiling& tiling,
                              const Tile& tile, Wide<T> max, Wide<T> factor, Wide<T>* map) {
  using A = Wide<T>;
  A* values = shared<MapTile<T>>().of;
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t position = tile.position(tiling, i);
    const Window<A> window = plane.window(windows, position);
    values[i] = factor * window.fraction * exponential(window.exponent - max);
    if (map != nullptr && tile.owns(tiling, i))
      map[tile.image * windows.positions() + position] = values[i];
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    window_forward_kernel(const T* x, Windows windows, const Statistics<Wide<T>, true>* chunks, bool residual,
                          T* output, Wide<T>* map, Wide<T>* stats, Tiling tiling) {
  using A = Wide<T>;
  if (block_index() >= tiling.shape.images * tiling.tiles())
    return;
  const Tile tile(tiling, block_index());
  Walk<T, 1> walk(tiling, tile, {x});
  const Plane<A>& plane = shared_plane<A>(windows, tile.image);
  const int positions = static_cast<int>(windows.positions()); // used if there is one launch
  chunks += tile.image * windows.chunks();
  A max = 0, factor = 1;
  if (windows.rescale) {
    const auto statistics = windows.one_launch() ? block_statistics<false>(windows, plane, 0, positions)
                                                 : image_statistics<false>(windows, chunks);
    max = statistics.max, factor = windows.positions() / statistics.sum[0];
  }
  fill_map<T>(windows, plane, tiling, tile, max, factor, map);
  modulate(tiling, walk, residual ? A(1) : A(0), output);
  if (!windows.rescale || tile.in_image + 1 < tiling.tiles())
    return;
  // One tile per image computes the statistics for the backward pass; the others do not need the slopes.
  const auto statistics = windows.one_launch() ? block_statistics<true>(windows, plane, 0, positions)
                                               : image_statistics<true>(windows, chunks);
  if (threadIdx.x == 0)
    statistics.store_means(stats + tile.image * stats_of(1));
}

// Writes a tile's sums to `partial`, or the gradient to `grad_rectangle` if the image is a single tile.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    window_backward_kernel(const T* grad_output, const Wide<T>* grad_map, const T* x, Windows windows,
                           const Wide<T>* stats, bool residual, T* grad_x, Wide<T>* partial,
                           MutableCompanion grad_rectangle, Tiling tiling) {
  using A = Wide<T>;
  struct Warps {
    A of[kWarps][kSums];
  };
  if (block_index() >= tiling.shape.images * tiling.tiles())
    return;
  const Tile tile(tiling, block_index());
  Walk<T, 2> walk(tiling, tile, {grad_output, x});
  const Plane<A>& plane = shared_plane<A>(windows, tile.image);
  const A* stat = stats + tile.image * stats_of(1);
  const A max = windows.rescale ? stat[0] : A(0), factor = windows.rescale ? windows.positions() / stat[1] : A(1);
  fill_map<T>(windows, plane, tiling, tile, max, factor, nullptr);
  const A *values = shared<MapTile<T>>().of, *sums = shared<SumTile<T>>().of;
  modulate_backward(tiling, tile, walk, residual ? A(1) : A(0), grad_x);
  A sum[kSums] = {}, mean[kParameters];
#pragma unroll
  for (int k = 0; k < kParameters; ++k)
    mean[k] = windows.rescale ? stat[2 + k] : A(0);
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t position = tile.position(tiling, i);
    const bool owned = tile.owns(tiling, i);
    A map_grad = sums[i]; // G
    if (grad_map != nullptr && owned)
      map_grad += grad_map[tile.image * windows.positions() + position];
    A slope[kParameters];
    window_slopes(plane.frame, plane.window(windows, position), slope);
    const A weight = map_grad * values[i], own_value = owned ? values[i] : A(0);
    sum[kParameters] += weight;
#pragma unroll
    for (int k = 0; k < kParameters; ++k) {
      sum[k] += weight * (slope[k] - mean[k]);
      sum[kParameters + 1 + k] += own_value * (slope[k] - mean[k]);
    }
  }
  Warps& warps = shared<Warps>();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sum[k] = warp_reduce(sum[k]);
    if (threadIdx.x % kWarp == 0)
      warps.of[threadIdx.x / kWarp][k] = sum[k];
  }
  __syncthreads();
  const auto total = [&](int k) {
    A all = warps.of[0][k];
    for (int warp = 1; warp < kWarps; ++warp)
      all += warps.of[warp][k];
    return all;
  };
  const int k = threadIdx.x;
  if (tiling.tiles() > 1 && k < kSums)
    partial[block_index() * kSums + k] = total(k);
  else if (tiling.tiles() == 1 && k < kParameters)
    grad_rectangle.store(tile.image * kParameters + k, rectangle_gradient(total, windows, k));
}

} // namespace attnkern
