// The rotated sigmoid window on CUDA. Forward: statistics of an image's softmax, in the same launch where the map is
// small, then its features times the map. Backward: the gradient of the features, and sums per tile, added in order.

#include "cuda/modulate.cuh"
#include "window.h"

// Marks this library as built for these schemas; one for another version is refused before it is loaded.
extern "C" __attribute__((used, visibility("default"))) const char attnkern_schema[] =
    "attnkern-schema:" ATTNKERN_SCHEMA_HASH;

namespace attnkern {
namespace {

constexpr int kChunk = 1024;                  // positions that one block takes statistics of
constexpr int kPerThread = kChunk / kThreads; // of them

// A batch of rectangles on one grid.
struct Windows {
  Companion rectangle; // (N, 5)
  int64_t height, width;
  double scale;
  bool rescale, aspect;

  ATTNKERN_INLINE int64_t positions() const { return height * width; }
  ATTNKERN_INLINE int64_t chunks() const { return ceil_div(positions(), kChunk); }
  // Small maps need no launch of their own for the statistics: every tile takes them again.
  ATTNKERN_INLINE bool one_launch() const { return !rescale || chunks() == 1; }
};

// The frame of an image, made once for the block: sine and cosine are long.
template <typename A> ATTNKERN_DEVICE const Frame<A>& shared_frame(const Windows& windows, int64_t image) {
  Frame<A>& frame = shared<Frame<A>>();
  if (threadIdx.x == 0) {
    A rectangle[kParameters];
    for (int k = 0; k < kParameters; ++k)
      rectangle[k] = windows.rectangle.load<A>(image * kParameters + k);
    frame = make_frame(rectangle, windows.height, windows.width, static_cast<A>(windows.scale), windows.aspect);
  }
  __syncthreads();
  return frame;
}

// z at a position, and its slopes.
template <typename A>
ATTNKERN_DEVICE A log_window_at(const Windows& windows, const Frame<A>& frame, int64_t position,
                                A (&slope)[kParameters]) {
  const int64_t row = divide(position, windows.width);
  const int64_t column = position - row * windows.width;
  return log_window(frame, coordinate<A>(row, windows.height), coordinate<A>(column, windows.width), slope);
}
template <typename A> ATTNKERN_DEVICE A log_window_at(const Windows& windows, const Frame<A>& frame, int64_t position) {
  A slope[kParameters];
  return log_window_at(windows, frame, position, slope);
}

// What a softmax is made of: max z, Σ exp(z - max z), and Σ exp(z - max z) ∂z/∂β.
template <typename A> struct Statistics {
  A max, sum[1 + kParameters];

  ATTNKERN_DEVICE void load(const A* from) {
    max = from[0];
    for (int k = 0; k <= kParameters; ++k)
      sum[k] = from[1 + k];
  }
  ATTNKERN_DEVICE void store(A* to) const {
    to[0] = max;
    for (int k = 0; k <= kParameters; ++k)
      to[1 + k] = sum[k];
  }
  // As the backward pass wants them: means.
  ATTNKERN_DEVICE void store_means(A* to) const {
    to[0] = max;
    to[1] = sum[0];
    for (int k = 1; k <= kParameters; ++k)
      to[1 + k] = sum[k] / sum[0];
  }
};

// Over a chunk of positions, by the whole block.
template <typename A>
ATTNKERN_DEVICE Statistics<A> chunk_statistics(const Windows& windows, const Frame<A>& frame, int64_t chunk) {
  A z[kPerThread], slope[kPerThread][kParameters], max[1] = {-A(INFINITY)};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t position = chunk * kChunk + i * kThreads + threadIdx.x;
    if (position < windows.positions()) {
      z[i] = log_window_at(windows, frame, position, slope[i]);
      max[0] = Max()(max[0], z[i]);
    }
  }
  block_reduce<Max>(max);
  Statistics<A> statistics{max[0], {}};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t position = chunk * kChunk + i * kThreads + threadIdx.x;
    if (position < windows.positions()) {
      const A weight = exponential(z[i] - max[0]);
      statistics.sum[0] += weight;
#pragma unroll
      for (int k = 0; k < kParameters; ++k)
        statistics.sum[1 + k] += weight * slope[i][k];
    }
  }
  block_reduce(statistics.sum);
  return statistics;
}

// Of an image, from those of its chunks.
template <typename A> ATTNKERN_DEVICE Statistics<A> combined(const Windows& windows, const A* chunks) {
  A max[1] = {-A(INFINITY)};
  for (int64_t i = threadIdx.x; i < windows.chunks(); i += kThreads)
    max[0] = Max()(max[0], chunks[i * kStats]);
  block_reduce<Max>(max);
  Statistics<A> total{max[0], {}}, chunk;
  for (int64_t i = threadIdx.x; i < windows.chunks(); i += kThreads) {
    chunk.load(chunks + i * kStats);
    const A weight = exponential(chunk.max - max[0]);
    for (int k = 0; k <= kParameters; ++k)
      total.sum[k] += weight * chunk.sum[k];
  }
  block_reduce(total.sum);
  return total;
}

template <typename A>
__global__ void __launch_bounds__(kThreads) window_statistics_kernel(Windows windows, A* chunks, int64_t items) {
  const int64_t item = block_index();
  if (item >= items)
    return;
  const int64_t image = divide(item, windows.chunks());
  const Frame<A>& frame = shared_frame<A>(windows, image);
  const Statistics<A> statistics = chunk_statistics(windows, frame, item - image * windows.chunks());
  if (threadIdx.x == 0)
    statistics.store(chunks + item * kStats);
}

// f = factor·exp(z - max), the map at a position.
template <typename A> struct Exponent {
  A max = 0, factor = 1;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    window_forward_kernel(const T* x, Windows windows, const Wide<T>* chunks, bool residual, T* output, Wide<T>* map,
                          Wide<T>* stats, Tiling tiling) {
  using A = Wide<T>;
  if (block_index() >= tiling.shape.images * tiling.tiles())
    return;
  const Tile tile(tiling, block_index());
  const Frame<A>& frame = shared_frame<A>(windows, tile.image);
  Exponent<A> exponent;
  if (windows.rescale) {
    const Statistics<A> statistics = windows.one_launch()
                                         ? chunk_statistics(windows, frame, 0)
                                         : combined(windows, chunks + tile.image * windows.chunks() * kStats);
    exponent = {statistics.max, windows.positions() / statistics.sum[0]};
    if (tile.in_image == 0 && threadIdx.x == 0)
      statistics.store_means(stats + tile.image * kStats);
  }
  A* values = shared<MapTile<T>>().of;
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t position = tile.position(tiling, i);
    const A value = exponent.factor * exponential(log_window_at(windows, frame, position) - exponent.max);
    values[i] = value;
    if (tile.owns(tiling, i))
      map[tile.image * windows.positions() + position] = value;
  }
  __syncthreads();
  modulate(tiling, tile, x, residual ? A(1) : A(0), output);
}

// dβ = Σ G·f·∂z, or with rescale HW·Σ (G - Σ π G)·π·(∂z - Σ π ∂z): centred twice, so that neither a large mean of G nor
// the steep slopes of a thin window cost digits. What Σ π G multiplies is zero but for rounding; that rounding goes.
constexpr int kSums = 2 * kParameters + 1; // Σ G·f·(∂z - mean) of the tiles, Σ G·f, and once an image Σ f·(∂z - mean)

template <typename S, typename A>
ATTNKERN_DEVICE void store_gradients(const S (&sum)[kSums], const Windows& windows, int64_t image,
                                     MutableCompanion grad_rectangle) {
  const S mean = windows.rescale ? sum[kParameters] / windows.positions() : S(0);
#pragma unroll
  for (int k = 0; k < kParameters; ++k) {
    const S noise = windows.rescale ? mean * sum[kParameters + 1 + k] : S(0);
    grad_rectangle.store(image * kParameters + k, static_cast<A>(sum[k] - noise));
  }
}

// One tile's sums go to `partial`; where an image is one tile, `grad_rectangle` gets what they come to at once.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    window_backward_kernel(const T* grad_output, const Wide<T>* grad_map, const T* x, Windows windows,
                           const Wide<T>* stats, bool residual, T* grad_x, Wide<T>* partial,
                           MutableCompanion grad_rectangle, Tiling tiling) {
  using A = Wide<T>;
  if (block_index() >= tiling.shape.images * tiling.tiles())
    return;
  const Tile tile(tiling, block_index());
  const Frame<A>& frame = shared_frame<A>(windows, tile.image);
  Exponent<A> exponent;
  A mean[kParameters] = {};
  if (windows.rescale) {
    const A* stat = stats + tile.image * kStats;
    exponent = {stat[0], windows.positions() / stat[1]};
    for (int k = 0; k < kParameters; ++k)
      mean[k] = stat[2 + k];
  }
  A *values = shared<MapTile<T>>().of, *sums = shared<SumTile<T>>().of;
  for (int i = threadIdx.x; i < tile.width; i += kThreads)
    values[i] = exponent.factor *
                exponential(log_window_at(windows, frame, tile.position(tiling, i)) - exponent.max);
  __syncthreads();
  modulate_backward(tiling, tile, grad_output, x, residual ? A(1) : A(0), grad_x);
  A sum[kSums] = {};
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t position = tile.position(tiling, i);
    const bool owned = tile.owns(tiling, i);
    A reached = sums[i]; // G
    if (grad_map != nullptr && owned)
      reached += grad_map[tile.image * windows.positions() + position];
    A slope[kParameters];
    log_window_at(windows, frame, position, slope);
    const A weight = reached * values[i], once = owned ? values[i] : A(0);
    sum[kParameters] += weight;
#pragma unroll
    for (int k = 0; k < kParameters; ++k) {
      sum[k] += weight * (slope[k] - mean[k]);
      sum[kParameters + 1 + k] += once * (slope[k] - mean[k]);
    }
  }
  block_reduce(sum);
  if (threadIdx.x != 0)
    return;
  if (tiling.tiles() == 1)
    store_gradients<A, A>(sum, windows, tile.image, grad_rectangle);
  else
    for (int k = 0; k < kSums; ++k)
      partial[block_index() * kSums + k] = sum[k];
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
  if (threadIdx.x == 0)
    store_gradients<double, A>(sum, windows, image, grad_rectangle);
}

// --- launches; the map alone is the map of features that have no channels ---

template <typename T>
void forward(const Tensor& like, const Windows& windows, const Shape& shape, const T* x, bool residual, T* output,
             const Tensor& map, const Tensor& stats) {
  using A = Wide<T>;
  const Queue queue(like);
  const auto tiling = Tiling::of<T>(shape, x, output);
  const int64_t items = windows.one_launch() ? 0 : shape.images * windows.chunks();
  const Tensor chunks = empty<A>(like, {items * kStats});
  queue.launch(window_statistics_kernel<A>, items, kThreads, 0, windows, mutable_data<A>(chunks), items);
  queue.launch(window_forward_kernel<T>, shape.images * tiling.tiles(), kThreads, 0, x, windows, data<A>(chunks),
               residual, output, mutable_data<A>(map), mutable_data<A>(stats), tiling);
}

template <typename T>
void backward(const Tensor& like, const Windows& windows, const Shape& shape, const T* grad_output,
              const Wide<T>* grad_map, const T* x, const Tensor& stats, bool residual, T* grad_x,
              const Tensor& grad_rectangle) {
  using A = Wide<T>;
  const Queue queue(like);
  const auto tiling = Tiling::of<T>(shape, grad_output, x, grad_x);
  const int64_t items = shape.images * tiling.tiles(), shares = tiling.tiles() == 1 ? 0 : items;
  const Tensor partial = empty<A>(like, {shares * kSums});
  queue.launch(window_backward_kernel<T>, items, kThreads, 0, grad_output, grad_map, x, windows, data<A>(stats),
               residual, grad_x, mutable_data<A>(partial), MutableCompanion(grad_rectangle), tiling);
  queue.launch(window_rectangle_kernel<A>, shares == 0 ? 0 : shape.images, kWarp, 0, data<A>(partial), windows,
               MutableCompanion(grad_rectangle), shape.images, tiling.tiles());
}

std::tuple<Tensor, Tensor> window_map_fwd(Tensor rectangle, int64_t height, int64_t width, double scale, bool rescale,
                                          bool aspect) {
  make_contiguous(rectangle);
  return dispatch_wide(rectangle.scalar_type(), [&](auto a) {
    using A = decltype(a);
    const int64_t images = rectangle.size(0);
    Tensor map = empty<A>(rectangle, {images, height, width});
    Tensor stats = empty<A>(rectangle, {images, rescale ? kStats : 0});
    forward<A>(rectangle, {rectangle, height, width, scale, rescale, aspect}, Shape(images, 0, height * width), nullptr,
               false, nullptr, map, stats);
    return std::tuple(map, stats);
  });
}

Tensor window_map_bwd(Tensor grad_map, Tensor rectangle, Tensor stats, double scale, bool rescale, bool aspect) {
  make_contiguous(grad_map, rectangle, stats);
  return dispatch_wide(grad_map.scalar_type(), [&](auto a) {
    using A = decltype(a);
    const int64_t height = grad_map.size(1), width = grad_map.size(2);
    Tensor grad_rectangle = empty_same(rectangle);
    backward<A>(rectangle, {rectangle, height, width, scale, rescale, aspect},
                Shape(rectangle.size(0), 0, height * width), nullptr, data<A>(grad_map), nullptr, stats, false, nullptr,
                grad_rectangle);
    return grad_rectangle;
  });
}

std::tuple<Tensor, Tensor, Tensor> window_fwd(Tensor x, Tensor rectangle, double scale, bool rescale, bool residual,
                                              bool aspect) {
  make_dense(x);
  make_contiguous(rectangle);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    Tensor output = empty_same(x);
    Tensor map = empty<A>(x, {x.size(0), x.size(2), x.size(3)});
    Tensor stats = empty<A>(x, {x.size(0), rescale ? kStats : 0});
    forward<T>(x, {rectangle, x.size(2), x.size(3), scale, rescale, aspect}, Shape(x), data<T>(x), residual,
               mutable_data<T>(output), map, stats);
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
    Tensor grad_x = features_grad<T>(x, need_grad_x), grad_rectangle = empty_same(rectangle);
    backward<T>(x, {rectangle, x.size(2), x.size(3), scale, rescale, aspect}, Shape(x), data<T>(grad_output),
                data<Wide<T>>(grad_map), data<T>(x), stats, residual, need_grad_x ? mutable_data<T>(grad_x) : nullptr,
                grad_rectangle);
    return std::tuple(grad_x, grad_rectangle);
  });
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("window_map_fwd", TORCH_BOX(&window_map_fwd));
  m.impl("window_map_bwd", TORCH_BOX(&window_map_bwd));
  m.impl("window_fwd", TORCH_BOX(&window_fwd));
  m.impl("window_bwd", TORCH_BOX(&window_bwd));
}

} // namespace attnkern
