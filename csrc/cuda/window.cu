// The rotated sigmoid windows on CUDA: which kernels a pass launches.

#include "cuda/window_many.cuh"
#include "cuda/window_single.cuh"

namespace attnkern {
namespace {

template <typename T>
void forward_single(const Rectangles& rectangles, const Shape& shape, const T* x, bool residual, T* output,
                    const Tensor& map, const Tensor& stats) {
  using A = Wide<T>;
  const Windows windows(rectangles);
  const Queue queue(map);
  const auto tiling = Tiling::of<T>(shape, x, output);
  const int64_t items = windows.one_launch() ? 0 : shape.images * windows.chunks();
  static_assert(sizeof(Statistics<A, true>) == stats_of(1) * sizeof(A), "statistics are numbers without padding");
  const Tensor scratch = empty<A>(map, {items * stats_of(1)});
  auto* chunks = reinterpret_cast<Statistics<A, true>*>(mutable_data<A>(scratch));
  queue.launch(window_statistics_kernel<A>, items, kThreads, 0, windows, chunks, items);
  queue.launch(window_forward_kernel<T>, shape.images * tiling.tiles(), kThreads, 0, x, windows, chunks, residual,
               output, mutable_data<A>(map), mutable_data<A>(stats), tiling);
}

template <typename T>
void backward_single(const Rectangles& rectangles, const Shape& shape, const T* grad_output, const Wide<T>* grad_map,
              const T* x, const Tensor& stats, bool residual, T* grad_x, const Tensor& grad_rectangle) {
  using A = Wide<T>;
  const Windows windows(rectangles);
  const Queue queue(stats);
  const auto tiling = Tiling::of<T>(shape, grad_output, x, grad_x);
  const int64_t items = shape.images * tiling.tiles(), partials = tiling.tiles() == 1 ? 0 : items;
  const Tensor partial = empty<A>(stats, {partials * kSums});
  queue.launch(window_backward_kernel<T>, items, kThreads, 0, grad_output, grad_map, x, windows, data<A>(stats),
               residual, grad_x, mutable_data<A>(partial), MutableCompanion(grad_rectangle), tiling);
  queue.launch(window_rectangle_kernel<A>, partials == 0 ? 0 : shape.images, kWarp, 0, data<A>(partial), windows,
               MutableCompanion(grad_rectangle), shape.images, tiling.tiles());
}

// Calls launch(outline) with the outline of the windows as a constant.
template <typename Launch> void with_outline(const Windows& windows, const Launch& launch) {
  if (windows.ellipse)
    launch(std::integral_constant<Outline, Outline::ellipse>());
  else
    launch(std::integral_constant<Outline, Outline::rectangle>());
}

template <typename T>
void forward(const Rectangles& rectangles, const Shape& shape, const T* x, bool residual, T* output, const Tensor& map,
             const Tensor& stats) {
  using A = Wide<T>;
  const Windows windows(rectangles);
  if (windows.count == 1 && !windows.ellipse)
    return forward_single<T>(rectangles, shape, x, residual, output, map, stats);
  const Queue queue(map);
  const auto tiling = Tiling::of<T>(shape, x, output);
  const int64_t items = shape.images * windows.blocks();
  const Tensor logs = empty_same(map);
  const Tensor rows = empty<A>(map, {windows.rescale ? items * windows.count * kRow : 0});
  with_outline(windows, [&](auto outline) {
    queue.launch(windows_values_kernel<A, outline()>, items, kThreads, 0, windows, mutable_data<A>(logs),
                 windows.rescale ? mutable_data<A>(rows) : nullptr, items);
  });
  queue.launch(windows_forward_kernel<T>, shape.images * tiling.tiles(), kThreads, 0, x, windows, data<A>(logs),
               data<A>(rows), residual, output, mutable_data<A>(map), mutable_data<A>(stats), tiling);
}

template <typename T>
void backward(const Rectangles& rectangles, const Shape& shape, const T* grad_output, const Wide<T>* grad_map,
              const T* x, const Tensor& stats, bool residual, T* grad_x, const Tensor& grad_rectangle) {
  using A = Wide<T>;
  const Windows windows(rectangles);
  if (windows.count == 1 && !windows.ellipse)
    return backward_single<T>(rectangles, shape, grad_output, grad_map, x, stats, residual, grad_x, grad_rectangle);
  const Queue queue(stats);
  const int64_t blocks = windows.blocks(), items = shape.images * blocks;
  GradMap<A> sums;
  Tensor scratch = empty<A>(stats, {0});
  if (grad_output != nullptr) {
    const auto tiling = Tiling::of<T>(shape, grad_output, x, grad_x);
    const Tensor logs = empty<A>(stats, {shape.images * shape.positions});
    scratch = empty<A>(stats, {shape.images * tiling.row_tiles * tiling.columns});
    with_outline(windows, [&](auto outline) {
      queue.launch(windows_values_kernel<A, outline()>, items, kThreads, 0, windows, mutable_data<A>(logs),
                   static_cast<A*>(nullptr), items);
    });
    queue.launch(windows_backward_kernel<T>, shape.images * tiling.tiles(), kThreads, 0, grad_output, x, windows,
                 data<A>(logs), data<A>(stats), residual, grad_x, mutable_data<A>(scratch), tiling);
    sums = GradMap<A>{data<A>(scratch), tiling.row_tiles, tiling.columns, shape.positions};
  }
  const Tensor partial = empty<A>(stats, {items * windows.count * kSums});
  with_outline(windows, [&](auto outline) {
    queue.launch(windows_slopes_kernel<A, outline()>, items, kThreads, 0, windows, sums, grad_map, data<A>(stats),
                 mutable_data<A>(partial), items);
  });
  const int64_t count = shape.images * windows.count;
  queue.launch(window_rectangle_kernel<A>, count, kWarp, 0, data<A>(partial), windows,
               MutableCompanion(grad_rectangle), count, blocks);
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("window_map_fwd", TORCH_BOX(&window_map_fwd));
  m.impl("window_map_bwd", TORCH_BOX(&window_map_bwd));
  m.impl("window_fwd", TORCH_BOX(&window_fwd));
  m.impl("window_bwd", TORCH_BOX(&window_bwd));
}

} // namespace attnkern
