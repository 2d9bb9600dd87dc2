// Maps that are ellipses or unions of windows. K windows are expensive to evaluate at a position, so a launch of its own
// does it once, and the launch of the features reads the result. Forward: log f and the statistics of its softmax, then
// the features times the map. Backward: log f again, then the gradients of the features and of the map, then the sums
// for the windows' parameters.
#pragma once

#include "cuda/window.cuh"

namespace attnkern {

constexpr int kFrames = 32; // windows whose frames are in shared memory at a time

// The union of an image's windows at this thread's position. All threads of a block share the image.
template <typename A, Outline kOutline> class Point {
  struct Frames {
    Frame<A> of[kFrames];
  };
  const Windows& windows_;
  int64_t image_;
  A row_, column_;

public:
  int64_t position; // within the image; the last block has positions that do not exist
  Union<A> sum;

  ATTNKERN_DEVICE Point(const Windows& windows, int64_t item)
      : windows_(windows), image_(divide(item, windows.blocks())),
        position((item - image_ * windows.blocks()) * kThreads + threadIdx.x) {
    const int64_t row = divide(position, windows.width);
    row_ = make_axis<A>(windows.height).at(row);
    column_ = make_axis<A>(windows.width).at(position - row * windows.width);
    sum.exponent = -INFINITY;
    for_windows([&](int64_t, const Frame<A>& frame) {
      sum.exponent = Max()(sum.exponent, exponent_bound<kOutline>(frame, row_, column_));
    });
    for_windows([&](int64_t, const Frame<A>& frame) { sum = with_window<kOutline>(frame, row_, column_, sum); });
  }
  // log f, of which the map is computed. Rounding must not make f larger than 1.
  ATTNKERN_DEVICE A log() const {
    const A log = sum.exponent + std::log(sum.fraction);
    return log > A(0) ? A(0) : log;
  }
  ATTNKERN_DEVICE bool exists() const { return position < windows_.positions(); }
  ATTNKERN_DEVICE int64_t image() const { return image_; }
  ATTNKERN_DEVICE int64_t element() const { return image_ * windows_.positions() + position; }

  // Calls use(window, slope) for the windows of the image with the derivatives of log f. Called by the whole block.
  template <typename Use> ATTNKERN_DEVICE void for_slopes(const Use& use) const {
    for_windows([&](int64_t k, const Frame<A>& frame) {
      A slope[kParameters];
      slopes_at<kOutline>(frame, row_, column_, sum, slope);
      use(k, slope);
    });
  }

private:
  template <typename Use> ATTNKERN_DEVICE void for_windows(const Use& use) const {
    Frames& frames = shared<Frames>();
    for (int64_t first = 0; first < windows_.count; first += kFrames) {
      const int count = static_cast<int>(std::min<int64_t>(kFrames, windows_.count - first));
      __syncthreads(); // the frames before them have been used
      for (int i = threadIdx.x; i < count; i += kThreads)
        frames.of[i] = windows_.frame<A>(image_ * windows_.count + first + i);
      __syncthreads();
      for (int i = 0; i < count; ++i)
        use(first + i, frames.of[i]);
    }
  }
};

constexpr int kRow = 2 + kParameters; // the statistics of a block for a window: max, Σ f, Σ f ∂log f/∂β

// log f; and unless `rows` is null, the statistics of each block for each window, (N, count, blocks, kRow).
template <typename A, Outline kOutline>
__global__ void __launch_bounds__(kThreads) windows_values_kernel(Windows windows, A* logs, A* rows, int64_t items) {
  if (block_index() >= items)
    return;
  const Point<A, kOutline> point(windows, block_index());
  const A log = point.log();
  if (point.exists())
    logs[point.element()] = log;
  if (rows == nullptr)
    return;
  A max[1] = {point.exists() ? log : -A(INFINITY)};
  block_reduce<Max>(max);
  const A f = point.exists() ? exponential(log - max[0]) : A(0);
  const int64_t block = block_index() - point.image() * windows.blocks();
  point.for_slopes([&](int64_t k, const A(&slope)[kParameters]) {
    A sums[1 + kParameters] = {f};
#pragma unroll
    for (int i = 0; i < kParameters; ++i)
      sums[1 + i] = point.exists() ? f * slope[i] : A(0);
    block_reduce(sums);
    A* to = rows + ((point.image() * windows.count + k) * windows.blocks() + block) * kRow;
    if (threadIdx.x == 0) {
      to[0] = max[0];
#pragma unroll
      for (int i = 0; i <= kParameters; ++i)
        to[1 + i] = sums[i];
    }
  });
}

// The map of a tile from log f.
template <typename T>
ATTNKERN_DEVICE void fill_from_logs(const Windows& windows, const Wide<T>* logs, const Tiling& tiling, const Tile& tile,
                                    Wide<T> max, Wide<T> factor, Wide<T>* map) {
  using A = Wide<T>;
  A* values = shared<MapTile<T>>().of;
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t element = tile.image * windows.positions() + tile.position(tiling, i);
    values[i] = factor * exponential(logs[element] - max);
    if (map != nullptr && tile.owns(tiling, i))
      map[element] = values[i];
  }
  __syncthreads();
}

// The features times the map. One tile of each image writes the statistics for the backward pass.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    windows_forward_kernel(const T* x, Windows windows, const Wide<T>* logs, const Wide<T>* rows, bool residual,
                           T* output, Wide<T>* map, Wide<T>* stats, Tiling tiling) {
  using A = Wide<T>;
  if (block_index() >= tiling.shape.images * tiling.tiles())
    return;
  const Tile tile(tiling, block_index());
  Walk<T, 1> walk(tiling, tile, {x});
  const int64_t blocks = windows.blocks();
  A max[1] = {0}, total[1] = {};
  if (windows.rescale) {
    rows += tile.image * windows.count * blocks * kRow;
    max[0] = -INFINITY;
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads)
      max[0] = Max()(max[0], rows[i * kRow]);
    block_reduce<Max>(max);
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads)
      total[0] += rows[i * kRow + 1] * exponential(rows[i * kRow] - max[0]);
    block_reduce(total);
  }
  const A factor = windows.rescale ? windows.positions() / total[0] : A(1);
  fill_from_logs<T>(windows, logs, tiling, tile, max[0], factor, map);
  modulate(tiling, walk, residual ? A(1) : A(0), output);
  if (!windows.rescale || tile.in_image + 1 < tiling.tiles())
    return;
  stats += tile.image * stats_of(windows.count);
  if (threadIdx.x == 0)
    stats[0] = max[0], stats[1] = total[0];
  for (int64_t i = threadIdx.x; i < windows.count * kParameters; i += kThreads) {
    const int64_t k = i / kParameters;
    const A* row = rows + k * blocks * kRow;
    A sum = 0;
    for (int64_t block = 0; block < blocks; ++block, row += kRow)
      sum += row[2 + i - k * kParameters] * exponential(row[0] - max[0]);
    stats[2 + i] = sum / total[0];
  }
}

// The gradient of the features, and that of the map as sums over tiles.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    windows_backward_kernel(const T* grad_output, const T* x, Windows windows, const Wide<T>* logs,
                            const Wide<T>* stats, bool residual, T* grad_x, Wide<T>* grad_map, Tiling tiling) {
  using A = Wide<T>;
  if (block_index() >= tiling.shape.images * tiling.tiles())
    return;
  const Tile tile(tiling, block_index());
  Walk<T, 2> walk(tiling, tile, {grad_output, x});
  stats += tile.image * stats_of(windows.count);
  const A max = windows.rescale ? stats[0] : A(0), factor = windows.rescale ? windows.positions() / stats[1] : A(1);
  fill_from_logs<T>(windows, logs, tiling, tile, max, factor, nullptr);
  modulate_backward(tiling, tile, walk, residual ? A(1) : A(0), grad_x);
  store_sums<T>(tiling, tile, grad_map);
}

// The sums of a block for each window, (N, count, blocks, kSums).
template <typename A, Outline kOutline>
__global__ void __launch_bounds__(kThreads)
    windows_slopes_kernel(Windows windows, GradMap<A> sums, const A* grad_map, const A* stats, A* partial,
                          int64_t items) {
  if (block_index() >= items)
    return;
  const Point<A, kOutline> point(windows, block_index());
  stats += point.image() * stats_of(windows.count);
  A f = 0, map_grad = 0; // f and G
  if (point.exists()) {
    const A max = windows.rescale ? stats[0] : A(0), factor = windows.rescale ? windows.positions() / stats[1] : A(1);
    f = factor * exponential(point.log() - max);
    if (sums.pointer != nullptr)
      map_grad = sums.at(point.element());
    if (grad_map != nullptr)
      map_grad += grad_map[point.element()];
  }
  const int64_t block = block_index() - point.image() * windows.blocks();
  point.for_slopes([&](int64_t k, const A(&slope)[kParameters]) {
    A sum[kSums] = {};
    if (point.exists()) {
      sum[kParameters] = map_grad * f;
#pragma unroll
      for (int i = 0; i < kParameters; ++i) {
        const A centred = slope[i] - (windows.rescale ? stats[2 + k * kParameters + i] : A(0));
        sum[i] = map_grad * f * centred;
        sum[kParameters + 1 + i] = f * centred;
      }
    }
    block_reduce(sum);
    A* to = partial + ((point.image() * windows.count + k) * windows.blocks() + block) * kSums;
    if (threadIdx.x == 0)
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        to[i] = sum[i];
  });
}

} // namespace attnkern
