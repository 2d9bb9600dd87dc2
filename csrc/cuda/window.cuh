// What the kernels of one rectangle and of unions of windows share.
#pragma once

#include "cuda/modulate.cuh"
#include "window_operators.h"

namespace attnkern {

constexpr int kChunk = 1024; // positions per block for the statistics; twice as many for large maps
constexpr int kWarps = kThreads / kWarp;

// The windows as kernels take them.
struct Windows {
  Companion rectangle; // (N, count, 5)
  int64_t count, height, width;
  double scale;
  bool rescale, aspect, ellipse;

  explicit Windows(const Rectangles& given)
      : rectangle(given.rectangle), count(given.count()), height(given.height), width(given.width), scale(given.scale),
        rescale(given.rescale), aspect(given.aspect), ellipse(given.ellipse) {}
  ATTNKERN_INLINE int64_t positions() const { return height * width; }
  ATTNKERN_INLINE bool large() const { return positions() >= 8 * kChunk; }
  ATTNKERN_INLINE int64_t chunk() const { return large() ? 2 * kChunk : kChunk; }
  ATTNKERN_INLINE int64_t chunks() const { return ceil_div(ceil_div(positions(), kChunk), large() ? 2 : 1); }
  ATTNKERN_INLINE int64_t blocks() const { return ceil_div(positions(), kThreads); } // with a thread per position
  // On small maps every tile computes the statistics itself, which saves a launch.
  ATTNKERN_INLINE bool one_launch() const { return !rescale || positions() <= kChunk; }

  // The frame of a window, counted over all images.
  template <typename A> ATTNKERN_DEVICE Frame<A> frame(int64_t window) const {
    A parameters[kParameters];
#pragma unroll
    for (int k = 0; k < kParameters; ++k)
      parameters[k] = rectangle.load<A>(window * kParameters + k);
    return make_frame(parameters, height, width, static_cast<A>(scale), aspect);
  }
};

// dβ = Σ G·f·∂z, or with rescale HW·Σ (G - Σ π G)·π·(∂z - Σ π ∂z): both factors are centred, so that neither a large
// mean of G nor the steep slopes of a thin window cause cancellation. Σ π·(∂z - Σ π ∂z), which Σ π G multiplies, is
// zero up to rounding; computing it removes that rounding error.
constexpr int kSums = 2 * kParameters + 1; // Σ G·f·(∂z - mean), Σ G·f, Σ f·(∂z - mean)

// The k-th component of an image's gradient; sum(i) is its i-th sum.
template <typename Sum>
ATTNKERN_DEVICE auto rectangle_gradient(const Sum& sum, const Windows& windows, int k) {
  auto gradient = sum(k);
  if (windows.rescale)
    gradient -= sum(kParameters) / windows.positions() * sum(kParameters + 1 + k);
  return gradient;
}

// One warp per image adds its tiles' sums.
template <typename A>
__global__ void __launch_bounds__(kWarp)
    window_rectangle_kernel(const A* partial, Windows windows, MutableCompanion grad_rectangle, int64_t images,
                            int64_t tiles) {
  const int64_t image = block_index();
  if (image >= images)
    return;
  double sum[kSums] = {};
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kWarp)
#pragma unroll
    for (int k = 0; k < kSums; ++k)
      sum[k] += partial[(image * tiles + tile) * kSums + k];
#pragma unroll
  for (int k = 0; k < kSums; ++k)
    sum[k] = warp_reduce(sum[k]);
  const auto total = [&](int k) { return sum[k]; };
  if (threadIdx.x == 0)
#pragma unroll
    for (int k = 0; k < kParameters; ++k)
      grad_rectangle.store(image * kParameters + k, static_cast<A>(rectangle_gradient(total, windows, k)));
}

} // namespace attnkern
