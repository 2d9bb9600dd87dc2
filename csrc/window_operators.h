// The window's operators for both devices: layouts, outputs and dispatch by dtype. A device includes this after
// tensors.h, defines forward() and backward(), and registers the operators.
#pragma once

#include "tensors.h"
#include "window.h"

// The marker of the schemas that the library was built for; attnkern/_ops.py checks it before loading the library. One
// source of each library has it.
extern "C" __attribute__((used, visibility("default"))) const char attnkern_schema[] =
    "attnkern-schema:" ATTNKERN_SCHEMA_HASH;

namespace attnkern {
namespace {

// A batch of windows on one grid.
struct Rectangles {
  const Tensor& rectangle; // (N, 5), or (N, K, 5): K windows whose union is the map
  int64_t height, width;
  double scale;
  bool rescale, aspect, ellipse;

  int64_t count() const { return rectangle.dim() == 3 ? rectangle.size(1) : 1; }
  int64_t stats() const { return rescale ? stats_of(count()) : 0; } // numbers per image
};

// The map, its statistics for the backward pass with rescale, and the features times the map. The map alone is the map
// of features that have no channels.
template <typename T>
void forward(const Rectangles& rectangles, const Shape& shape, const T* x, bool residual, T* output, const Tensor& map,
             const Tensor& stats);

// The gradients of the rectangles, and of the features unless grad_x is null.
template <typename T>
void backward(const Rectangles& rectangles, const Shape& shape, const T* grad_output, const Wide<T>* grad_map,
              const T* x, const Tensor& stats, bool residual, T* grad_x, const Tensor& grad_rectangle);

std::tuple<Tensor, Tensor> window_map_fwd(Tensor rectangle, int64_t height, int64_t width, double scale, bool rescale,
                                          bool aspect, bool ellipse) {
  make_contiguous(rectangle);
  return dispatch_wide(rectangle.scalar_type(), [&](auto a) {
    using A = decltype(a);
    const int64_t images = rectangle.size(0);
    const Rectangles rectangles{rectangle, height, width, scale, rescale, aspect, ellipse};
    Tensor map = empty<A>(rectangle, {images, height, width});
    Tensor stats = empty<A>(rectangle, {images, rectangles.stats()});
    forward<A>(rectangles, Shape(images, 0, height * width), nullptr, false, nullptr, map, stats);
    return std::tuple(map, stats);
  });
}

Tensor window_map_bwd(Tensor grad_map, Tensor rectangle, Tensor stats, double scale, bool rescale, bool aspect,
                      bool ellipse) {
  make_contiguous(grad_map, rectangle, stats);
  return dispatch_wide(grad_map.scalar_type(), [&](auto a) {
    using A = decltype(a);
    const int64_t height = grad_map.size(1), width = grad_map.size(2);
    Tensor grad_rectangle = empty_same(rectangle);
    const Rectangles rectangles{rectangle, height, width, scale, rescale, aspect, ellipse};
    backward<A>(rectangles, Shape(rectangle.size(0), 0, height * width), nullptr, data<A>(grad_map), nullptr, stats,
                false, nullptr, grad_rectangle);
    return grad_rectangle;
  });
}

std::tuple<Tensor, Tensor, Tensor> window_fwd(Tensor x, Tensor rectangle, double scale, bool rescale, bool residual,
                                              bool aspect, bool ellipse) {
  make_dense(x);
  make_contiguous(rectangle);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const int64_t images = x.size(0), height = x.size(2), width = x.size(3);
    const Rectangles rectangles{rectangle, height, width, scale, rescale, aspect, ellipse};
    Tensor output = empty_same(x);
    Tensor map = empty<A>(x, {images, height, width});
    Tensor stats = empty<A>(x, {images, rectangles.stats()});
    forward<T>(rectangles, Shape(x), data<T>(x), residual, mutable_data<T>(output), map, stats);
    return std::tuple(output, map, stats);
  });
}

std::tuple<Tensor, Tensor> window_bwd(Tensor grad_output, std::optional<Tensor> grad_map, Tensor x, Tensor rectangle,
                                      Tensor stats, double scale, bool rescale, bool residual, bool aspect,
                                      bool ellipse, bool need_grad_x) {
  make_dense(x);
  make_dense_like(x, grad_output);
  make_contiguous(grad_map, rectangle, stats);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Tensor grad_x = features_grad<T>(x, need_grad_x), grad_rectangle = empty_same(rectangle);
    backward<T>({rectangle, x.size(2), x.size(3), scale, rescale, aspect, ellipse}, Shape(x), data<T>(grad_output),
                data<Wide<T>>(grad_map), data<T>(x), stats, residual, need_grad_x ? mutable_data<T>(grad_x) : nullptr,
                grad_rectangle);
    return std::tuple(grad_x, grad_rectangle);
  });
}

} // namespace
} // namespace attnkern
