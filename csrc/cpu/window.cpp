// The rotated sigmoid window on the CPU. Maps are computed per image, and features are multiplied row by row
// (modulate.h).

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

#define ATTNKERN_KERNELS "cpu/window_kernels.h"
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
