// The rotated sigmoid window on the CPU. Maps are computed per image, and features are multiplied row by row
// (modulate.h).

#if defined(ATTNKERN_ISA) // ------------------------------------------------- kernels, once per instruction set

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

#else // ----------------------------------------------------------------------------------------- the operators

#include "cpu/common.h"
#include "window.h"

// The marker of the schemas that this library was built for; attnkern/_ops.py checks it before loading the library.
extern "C" __attribute__((used, visibility("default"))) const char attnkern_schema[] =
    "attnkern-schema:" ATTNKERN_SCHEMA_HASH;

namespace attnkern {

// A batch of rectangles on one grid.
template <typename A> struct Windows {
  Widened<A> rectangles; // (N, 5)
  int64_t height, width;
  A scale;
  bool rescale, aspect;
  std::vector<A> rows, columns; // coordinates of each position

  Windows(const Tensor& rectangle, int64_t height, int64_t width, double scale, bool rescale, bool aspect)
      : rectangles(rectangle), height(height), width(width), scale(static_cast<A>(scale)),
        rescale(rescale), aspect(aspect) {
    if (images() == 0) return;
    rows.resize(height * width), columns.resize(height * width);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) {
        rows[i * width + j] = coordinate<A>(i, height);
        columns[i * width + j] = coordinate<A>(j, width);
      }
  }
  int64_t images() const { return rectangles.size() / kParameters; }
  int64_t positions() const { return height * width; }
  Frame<A> frame(int64_t image) const {
    A rectangle[kParameters];
    std::copy_n(rectangles.begin() + image * kParameters, kParameters, rectangle);
    return make_frame(rectangle, height, width, scale, aspect);
  }
};

} // namespace attnkern

#define ATTNKERN_KERNELS "cpu/window.cpp"
#include "cpu/foreach_isa.h"

namespace attnkern {
namespace {

std::tuple<Tensor, Tensor> window_map_fwd(Tensor rectangle, int64_t height, int64_t width, double scale, bool rescale,
                                          bool aspect) {
  make_contiguous(rectangle);
  return dispatch_wide(rectangle.scalar_type(), [&](auto a) {
    using A = decltype(a);
    const Windows<A> windows(rectangle, height, width, scale, rescale, aspect);
    Tensor map = empty<A>(rectangle, {windows.images(), height, width});
    Tensor stats = empty<A>(rectangle, {windows.images(), rescale ? kStats : 0});
    ATTNKERN_BY_ISA(window_maps<A>, windows, mutable_data<A>(map), mutable_data<A>(stats));
    return std::tuple(map, stats);
  });
}

Tensor window_map_bwd(Tensor grad_map, Tensor rectangle, Tensor stats, double scale, bool rescale, bool aspect) {
  make_contiguous(grad_map, rectangle, stats);
  return dispatch_wide(grad_map.scalar_type(), [&](auto a) {
    using A = decltype(a);
    const Windows<A> windows(rectangle, grad_map.size(1), grad_map.size(2), scale, rescale, aspect);
    Narrowed<A> gradients(rectangle);
    ATTNKERN_BY_ISA(window_map_gradients<A>, windows, data<A>(stats), data<A>(grad_map), gradients.data());
    return gradients.tensor();
  });
}

std::tuple<Tensor, Tensor, Tensor> window_fwd(Tensor x, Tensor rectangle, double scale, bool rescale, bool residual,
                                              bool aspect) {
  make_dense(x);
  make_contiguous(rectangle);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Windows<A> windows(rectangle, x.size(2), x.size(3), scale, rescale, aspect);
    Tensor output = empty_same(x);
    Tensor map = empty<A>(x, {windows.images(), windows.height, windows.width});
    Tensor stats = empty<A>(x, {windows.images(), rescale ? kStats : 0});
    ATTNKERN_BY_ISA(window_maps<A>, windows, mutable_data<A>(map), mutable_data<A>(stats));
    ATTNKERN_BY_ISA(modulate<T>, Shape(x), data<T>(x), data<A>(map), residual, mutable_data<T>(output));
    return std::tuple(output, map, stats);
  });
}

std::tuple<Tensor, Tensor> window_bwd(Tensor grad_output, std::optional<Tensor> grad_map, Tensor x, Tensor rectangle,
                                      Tensor stats, double scale, bool rescale, bool residual, bool aspect,
                                      bool need_grad_x) {
  make_dense(x);
  make_dense_like(x, grad_output);
  make_contiguous(grad_map, rectangle, stats);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Windows<A> windows(rectangle, x.size(2), x.size(3), scale, rescale, aspect);
    Tensor grad_x = features_grad<T>(x, need_grad_x);
    Narrowed<A> gradients(rectangle);
    ATTNKERN_BY_ISA(window_backward<T>, windows, Shape(x), data<T>(grad_output), data<A>(grad_map), data<T>(x),
                    data<A>(stats), residual, need_grad_x ? mutable_data<T>(grad_x) : nullptr, gradients.data());
    return std::tuple(grad_x, gradients.tensor());
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("window_map_fwd", TORCH_BOX(&window_map_fwd));
  m.impl("window_map_bwd", TORCH_BOX(&window_map_bwd));
  m.impl("window_fwd", TORCH_BOX(&window_fwd));
  m.impl("window_bwd", TORCH_BOX(&window_bwd));
}

} // namespace attnkern

#endif
