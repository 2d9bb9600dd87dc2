// The rotated sigmoid window on the CPU. Maps are computed per image, and features are multiplied row by row
// (modulate.h).

#include "cpu/common.h"
#include "window_operators.h"

namespace attnkern {

// The rectangles and coordinates in the form in which they are evaluated.
template <typename A> struct Windows {
  Widened<A> rectangles; // (N, count, 5)
  int64_t count;         // windows per image
  int64_t height, width;
  A scale;
  bool rescale, aspect, ellipse;
  std::vector<A> rows, columns; // coordinates of each position

  explicit Windows(const Rectangles& given)
      : rectangles(given.rectangle), count(given.count()), height(given.height), width(given.width),
        scale(static_cast<A>(given.scale)), rescale(given.rescale), aspect(given.aspect), ellipse(given.ellipse) {
    if (images() == 0) return;
    rows.resize(height * width), columns.resize(height * width);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) {
        rows[i * width + j] = coordinate<A>(i, height);
        columns[i * width + j] = coordinate<A>(j, width);
      }
  }
  int64_t images() const { return rectangles.size() / (count * kParameters); }
  int64_t positions() const { return height * width; }
  std::vector<Frame<A>> frames(int64_t image) const {
    std::vector<Frame<A>> frames(count);
    for (int64_t k = 0; k < count; ++k) {
      A rectangle[kParameters];
      std::copy_n(rectangles.begin() + (image * count + k) * kParameters, kParameters, rectangle);
      frames[k] = make_frame(rectangle, height, width, scale, aspect);
    }
    return frames;
  }
};

} // namespace attnkern

#define ATTNKERN_KERNELS "cpu/window_kernels.h"
#include "cpu/foreach_isa.h"

namespace attnkern {
namespace {

template <typename T>
void forward(const Rectangles& rectangles, const Shape& shape, const T* x, bool residual, T* output, const Tensor& map,
             const Tensor& stats) {
  using A = Wide<T>;
  const Windows<A> windows(rectangles);
  ATTNKERN_BY_ISA(window_maps<A>, windows, mutable_data<A>(map), mutable_data<A>(stats));
  if (shape.channels > 0)
    ATTNKERN_BY_ISA(modulate<T>, shape, x, data<A>(map), residual, output);
}

template <typename T>
void backward(const Rectangles& rectangles, const Shape& shape, const T* grad_output, const Wide<T>* grad_map,
              const T* x, const Tensor& stats, bool residual, T* grad_x, const Tensor& grad_rectangle) {
  using A = Wide<T>;
  const Windows<A> windows(rectangles);
  Narrowed<A> gradients(grad_rectangle);
  if (shape.channels == 0 && grad_map != nullptr) // without features the map need not be computed again
    ATTNKERN_BY_ISA(window_map_gradients<A>, windows, data<A>(stats), grad_map, gradients.data());
  else
    ATTNKERN_BY_ISA(window_backward<T>, windows, shape, grad_output, grad_map, x, data<A>(stats), residual, grad_x,
                    gradients.data());
  gradients.finish();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("window_map_fwd", TORCH_BOX(&window_map_fwd));
  m.impl("window_map_bwd", TORCH_BOX(&window_map_bwd));
  m.impl("window_fwd", TORCH_BOX(&window_fwd));
  m.impl("window_bwd", TORCH_BOX(&window_bwd));
}

} // namespace attnkern
