// The window's maps, their gradients, and features times a map backward. Included once per instruction set by
// foreach_isa.h, after the types of window.cpp.

#include "cpu/modulate.h"

namespace attnkern::ATTNKERN_ISA {

// Positions that are summed in single precision; these sums are added in double precision.
constexpr int64_t kBlock = 512;

// The maps, and with rescale the statistics for the backward pass.
template <typename A> void window_maps(const Windows<A>& windows, A* map, A* stats) {
  const int64_t positions = windows.positions();
  parallel(windows.images(), 16 * positions, [&](int64_t image) {
    const Frame<A> frame = windows.frame(image);
    const A *rows = windows.rows.data(), *columns = windows.columns.data();
    A* to = map + image * positions;
    if (!windows.rescale) {
#pragma omp simd
      for (int64_t i = 0; i < positions; ++i)
        to[i] = exponential(log_window(frame, rows[i], columns[i]));
      return;
    }
    std::vector<A> slopes(kParameters * positions);
    A *d0 = slopes.data(), *d1 = d0 + positions, *d2 = d1 + positions, *d3 = d2 + positions, *d4 = d3 + positions;
#pragma omp simd
    for (int64_t i = 0; i < positions; ++i) {
      A slope[kParameters];
      to[i] = log_window(frame, rows[i], columns[i], slope);
      d0[i] = slope[0], d1[i] = slope[1], d2[i] = slope[2], d3[i] = slope[3], d4[i] = slope[4];
    }
    A max = to[0];
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < positions; ++i)
      max = to[i] > max ? to[i] : max;
    double total = 0, mean[kParameters] = {};
    for (int64_t begin = 0; begin < positions; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, positions);
      A sum = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : sum, s0, s1, s2, s3, s4)
      for (int64_t i = begin; i < end; ++i) {
        const A weight = exponential(to[i] - max);
        to[i] = weight;
        sum += weight;
        s0 += weight * d0[i], s1 += weight * d1[i], s2 += weight * d2[i], s3 += weight * d3[i], s4 += weight * d4[i];
      }
      total += sum;
      mean[0] += s0, mean[1] += s1, mean[2] += s2, mean[3] += s3, mean[4] += s4;
    }
    const A factor = static_cast<A>(positions / total);
#pragma omp simd
    for (int64_t i = 0; i < positions; ++i)
      to[i] *= factor;
    A* stat = stats + image * kStats;
    stat[0] = max;
    stat[1] = static_cast<A>(total);
    for (int k = 0; k < kParameters; ++k)
      stat[2 + k] = static_cast<A>(mean[k] / total);
  });
}

// The maps, recomputed from the statistics of the forward pass.
template <typename A> void window_maps_again(const Windows<A>& windows, const A* stats, A* map) {
  const int64_t positions = windows.positions();
  parallel(windows.images(), 16 * positions, [&](int64_t image) {
    const Frame<A> frame = windows.frame(image);
    const A *rows = windows.rows.data(), *columns = windows.columns.data();
    const A max = windows.rescale ? stats[image * kStats] : A(0);
    const A factor = windows.rescale ? positions / stats[image * kStats + 1] : A(1);
    A* to = map + image * positions;
#pragma omp simd
    for (int64_t i = 0; i < positions; ++i)
      to[i] = factor * exponential(log_window(frame, rows[i], columns[i]) - max);
  });
}

// dβ = Σ G·f·∂z, or with rescale HW·Σ (G - Σ π G)·π·(∂z - Σ π ∂z): both are centred, so that neither a large
// mean of G nor the steep slopes of a thin window cause cancellation.
// gather(image) is the image's G.
template <typename A, typename Gather>
void window_gradients(const Windows<A>& windows, const A* stats, const Gather& gather, A* gradients) {
  const int64_t positions = windows.positions();
  parallel(windows.images(), 16 * positions, [&](int64_t image) {
    const Frame<A> frame = windows.frame(image);
    const A *rows = windows.rows.data(), *columns = windows.columns.data();
    const A* stat = stats + image * kStats;
    const A max = windows.rescale ? stat[0] : A(0);
    const A factor = windows.rescale ? positions / stat[1] : A(1);
    const A m0 = windows.rescale ? stat[2] : A(0), m1 = windows.rescale ? stat[3] : A(0);
    const A m2 = windows.rescale ? stat[4] : A(0), m3 = windows.rescale ? stat[5] : A(0);
    const A m4 = windows.rescale ? stat[6] : A(0);
    const auto gathered = gather(image);
    const A* g = &gathered[0];
    A centre = 0; // Σ π G
    if (windows.rescale) {
      double mean = 0;
      for (int64_t begin = 0; begin < positions; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, positions);
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < end; ++i)
          sum += g[i] * exponential(log_window(frame, rows[i], columns[i]) - max);
        mean += sum;
      }
      centre = static_cast<A>(mean / stat[1]);
    }
    double total[kParameters] = {};
    for (int64_t begin = 0; begin < positions; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, positions);
      A s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4)
      for (int64_t i = begin; i < end; ++i) {
        A slope[kParameters];
        const A weight = (g[i] - centre) * (factor * exponential(log_window(frame, rows[i], columns[i], slope) - max));
        s0 += weight * (slope[0] - m0), s1 += weight * (slope[1] - m1), s2 += weight * (slope[2] - m2);
        s3 += weight * (slope[3] - m3), s4 += weight * (slope[4] - m4);
      }
      total[0] += s0, total[1] += s1, total[2] += s2, total[3] += s3, total[4] += s4;
    }
    for (int k = 0; k < kParameters; ++k)
      gradients[image * kParameters + k] = static_cast<A>(total[k]);
  });
}

template <typename A> void window_map_gradients(const Windows<A>& windows, const A* stats, const A* g, A* gradients) {
  window_gradients(windows, stats, [&](int64_t image) { return g + image * windows.positions(); }, gradients);
}

template <typename T>
void window_backward(const Windows<Wide<T>>& windows, const Shape& shape, const T* dy, const Wide<T>* grad_map,
                     const T* x, const Wide<T>* stats, bool residual, T* dx, Wide<T>* gradients) {
  using A = Wide<T>;
  std::vector<A> map(shape.images * shape.positions), partial(map.size() * partial_sums(shape));
  window_maps_again(windows, stats, map.data());
  modulate_backward(shape, dy, x, map.data(), residual, dx, partial.data());
  window_gradients(
      windows, stats, [&](int64_t image) { return add_partials(shape, partial.data(), image, grad_map); }, gradients);
}

} // namespace attnkern::ATTNKERN_ISA
