// Nearest-anchor quantization on CUDA. A block sorts the anchors in shared memory and finds each of its elements by the
// thresholds between them; every warp keeps bins of its own, each bin written by one lane only, and all are added in
// order. With features, the same launch that multiplies them by the map adds the blocks' bins.

#include "cuda/modulate.cuh"
#include "quantize.h"

namespace attnkern {
namespace {

constexpr int kWarps = kThreads / kWarp;

// Up to this many anchors are sorted per block and binned in shared memory; more of them once, in global memory.
template <typename A> constexpr int kShared = 2048 / sizeof(A);

// --- anchors in ascending order, equal ones as the first of them; thresholds[i] parts the i-th from the next ---

template <typename A> struct Table {
  A *values, *thresholds;
  int* indices; // of the original anchor

  static ATTNKERN_INLINE int64_t bytes(int64_t slots) { return slots * (2 * sizeof(A) + sizeof(int)); }
  ATTNKERN_DEVICE Table(char* memory, int64_t slots)
      : values(reinterpret_cast<A*>(memory)), thresholds(values + slots),
        indices(reinterpret_cast<int*>(thresholds + slots)) {}

  // Place of each anchor: how many stand before it. NaN has no place, and a table with NaN is not looked at.
  ATTNKERN_DEVICE void sort(const Companion& anchors, int count, int first, int step) {
    for (int k = first; k < count; k += step) {
      const A anchor = anchors.load<A>(k);
      int rank = 0, lowest = k;
      for (int other = 0; other < count; ++other) {
        const A value = anchors.load<A>(other);
        rank += value < anchor || (value == anchor && other < k);
        lowest = value == anchor && other < lowest ? other : lowest;
      }
      values[rank] = anchors.load<A>(lowest);
      indices[rank] = lowest;
    }
  }
  ATTNKERN_DEVICE void part(int count, int first, int step) {
    for (int i = first; i < count - 1; i += step)
      thresholds[i] = round_up<A>(threshold(values[i], values[i + 1], indices[i + 1] < indices[i]));
  }
  // Number of thresholds that an element reaches; 0 for NaN.
  ATTNKERN_DEVICE int rank(A element, int count) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (element >= thresholds[middle])
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// Σ (v - a) and number of elements per anchor, one row per warp.
template <typename A> struct Bins {
  A* residuals;
  int* counts;

  static ATTNKERN_INLINE int64_t bytes(int64_t slots) { return kWarps * slots * (sizeof(A) + sizeof(int)); }
  ATTNKERN_DEVICE Bins(char* memory, int64_t slots)
      : residuals(reinterpret_cast<A*>(memory)), counts(reinterpret_cast<int*>(residuals + kWarps * slots)) {}
};

// Sums of blocks, (anchors, blocks) and (blocks), to be added in order.
template <typename A> struct Partial {
  A *residuals, *loss;
  int* counts;
  int64_t blocks;
};

ATTNKERN_DEVICE bool any_nan(const Companion& anchors, int count) {
  bool found = false;
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const double anchor = anchors.load<double>(k);
    found |= anchor != anchor;
  }
  return __syncthreads_or(found) != 0;
}

__global__ void __launch_bounds__(kThreads)
    sort_anchors_kernel(Companion anchors, int count, char* table, int64_t slots, bool wide, bool part) {
  const int first = block_index() * kThreads + threadIdx.x, step = gridDim.x * kThreads;
  const auto run = [&](auto table) { part ? table.part(count, first, step) : table.sort(anchors, count, first, step); };
  wide ? run(Table<double>(table, slots)) : run(Table<float>(table, slots));
}

// `memory` holds the table and then each block's bins, unless they fit into shared memory: then it is null.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(Companion a, Companion anchors, char* memory, MutableCompanion values, int64_t* indices,
                    Partial<A> partial, int64_t count, int64_t chunk, int anchor_count, int64_t slots) {
  struct Found { // of a warp's elements, for the owners of the bins
    int index[kThreads];
    A difference[kThreads];
  };
  const int64_t block = block_index();
  if (block >= partial.blocks)
    return;
  const bool in_shared = memory == nullptr, poisoned = any_nan(anchors, anchor_count);
  if (in_shared)
    memory = dynamic_shared<char>();
  Table<A> table(memory, slots);
  const Bins<A> bins(memory + Table<A>::bytes(slots) + (in_shared ? 0 : block * Bins<A>::bytes(slots)), slots);
  if (in_shared) {
    table.sort(anchors, anchor_count, threadIdx.x, kThreads);
    __syncthreads();
    table.part(anchor_count, threadIdx.x, kThreads);
    __syncthreads();
  }
  const int lane = threadIdx.x % kWarp, first_of_warp = threadIdx.x - lane;
  A* residuals = bins.residuals + threadIdx.x / kWarp * slots;
  int* counts = bins.counts + threadIdx.x / kWarp * slots;
  for (int k = lane; k < anchor_count; k += kWarp)
    residuals[k] = 0, counts[k] = 0;
  Found& found = shared<Found>();
  A loss[1] = {};
  bool saw_nan = false;
  const int64_t last = std::min(count, (block + 1) * chunk);
  for (int64_t first = block * chunk; first < last; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    int index = -1;
    A difference = 0;
    if (i < last) {
      const A element = a.load<A>(i);
      A value = NAN;
      if (element == element && !poisoned) {
        const int rank = table.rank(element, anchor_count);
        value = table.values[rank];
        index = table.indices[rank];
      }
      difference = value - element;
      saw_nan |= index < 0;
      values.store(i, value);
      indices[i] = index < 0 ? 0 : index;
      loss[0] += difference * difference;
    }
    found.index[threadIdx.x] = index;
    found.difference[threadIdx.x] = difference;
    __syncwarp();
    for (int of = first_of_warp; of < first_of_warp + kWarp; ++of) {
      const int chosen = found.index[of];
      if (chosen >= 0 && chosen % kWarp == lane)
        residuals[chosen] += found.difference[of], ++counts[chosen];
    }
    __syncwarp();
  }
  block_reduce(loss);
  const bool spoilt = __syncthreads_or(saw_nan) != 0; // by an element of no anchor: its index is 0
  if (threadIdx.x == 0)
    partial.loss[block] = loss[0];
  for (int k = threadIdx.x; k < anchor_count; k += kThreads) {
    A residual = k == 0 && spoilt ? A(NAN) : A(0);
    int number = 0;
    for (int warp = 0; warp < kWarps; ++warp)
      residual += bins.residuals[warp * slots + k], number += bins.counts[warp * slots + k];
    partial.residuals[k * partial.blocks + block] = residual;
    partial.counts[k * partial.blocks + block] = number;
  }
}

// The blocks' sums of one anchor, or after the last anchor of the loss, by a whole block.
template <typename A>
ATTNKERN_DEVICE void add_blocks(const Partial<A>& partial, int64_t anchor, int anchor_count, A* loss, int64_t* counts,
                                A* residuals) {
  double sum[1] = {};
  int64_t number[1] = {};
  const A* from = anchor < anchor_count ? partial.residuals + anchor * partial.blocks : partial.loss;
  for (int64_t block = threadIdx.x; block < partial.blocks; block += kThreads) {
    sum[0] += from[block];
    if (anchor < anchor_count)
      number[0] += partial.counts[anchor * partial.blocks + block];
  }
  block_reduce(sum);
  block_reduce(number);
  if (threadIdx.x != 0)
    return;
  if (anchor < anchor_count)
    residuals[anchor] = static_cast<A>(sum[0]), counts[anchor] = number[0];
  else
    *loss = static_cast<A>(sum[0]);
}

// The map of a tile: the anchors' values, NaN where the element or any anchor is.
template <typename T>
ATTNKERN_DEVICE void fill_map(const Tiling& tiling, const Tile& tile, const Companion& a, const Companion& anchors,
                              const int64_t* indices, int anchor_count) {
  using A = Wide<T>;
  A* map = shared<MapTile<T>>().of;
  const bool poisoned = any_nan(anchors, anchor_count);
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t at = tile.image * tiling.shape.positions + tile.position(tiling, i);
    const A element = a.load<A>(at);
    map[i] = poisoned || element != element ? A(NAN) : anchors.load<A>(indices[at]);
  }
  __syncthreads();
}

// Features times the map; the blocks behind the tiles add the sums of quantize_kernel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    anchor_forward_kernel(const T* x, Companion a, Companion anchors, const int64_t* indices, bool residual, T* output,
                          Partial<Wide<T>> partial, Wide<T>* loss, int64_t* counts, Wide<T>* residuals, Tiling tiling,
                          int anchor_count) {
  const int64_t tiles = tiling.shape.images * tiling.tiles();
  if (block_index() >= tiles) {
    if (block_index() - tiles <= anchor_count)
      add_blocks(partial, block_index() - tiles, anchor_count, loss, counts, residuals);
    return;
  }
  const Tile tile(tiling, block_index());
  fill_map<T>(tiling, tile, a, anchors, indices, anchor_count);
  modulate(tiling, tile, x, Wide<T>(residual), output);
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    add_blocks_kernel(Partial<A> partial, A* loss, int64_t* counts, A* residuals, int anchor_count) {
  if (block_index() <= anchor_count)
    add_blocks(partial, block_index(), anchor_count, loss, counts, residuals);
}

// The gradient of the features, and Σ dy·x of each tile: (N, row tiles, columns).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    anchor_backward_kernel(const T* grad_output, const T* x, Companion a, Companion anchors, const int64_t* indices,
                           bool residual, T* grad_x, Wide<T>* grad_map, Tiling tiling, int anchor_count) {
  if (block_index() >= tiling.shape.images * tiling.tiles())
    return;
  const Tile tile(tiling, block_index());
  fill_map<T>(tiling, tile, a, anchors, indices, anchor_count);
  modulate_backward(tiling, tile, grad_output, x, Wide<T>(residual), grad_x);
  const Wide<T>* sums = shared<SumTile<T>>().of;
  const int64_t row_tile = divide(tile.in_image, tiling.column_tiles);
  Wide<T>* to = grad_map + (tile.image * tiling.row_tiles + row_tile) * tiling.columns;
  for (int i = threadIdx.x; i < tile.width; i += kThreads)
    to[tile.column + i] = sums[i];
}

// What of the gradient of the map lies where; null where there were no features.
template <typename A> struct GradMap {
  const A* pointer = nullptr;
  int64_t row_tiles = 0, columns = 0, positions = 1;

  ATTNKERN_DEVICE A at(int64_t element) const {
    const int64_t image = divide(element, positions), position = element - image * positions;
    A sum = 0;
    for (int64_t tile = image * row_tiles; tile < (image + 1) * row_tiles; ++tile)
      for (int64_t column = position; column < columns; column += positions)
        sum += pointer[tile * columns + column];
    return sum;
  }
};

// grad_a = what came through the values, and the commitment loss's share; the blocks behind the elements make
// grad_anchors.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    quantize_backward_kernel(Companion grad_values, Companion grad_anchor_loss, Companion grad_commitment_loss,
                             GradMap<A> grad_map, Companion a, Companion anchors, const int64_t* indices,
                             const A* residuals, A divisor, MutableCompanion grad_a, MutableCompanion grad_anchors,
                             int64_t count, int64_t chunk, int64_t blocks, int anchor_count) {
  const int64_t block = block_index();
  if (block >= blocks) {
    const int64_t k = (block - blocks) * kThreads + threadIdx.x;
    if (k < anchor_count)
      grad_anchors.store(k, grad_anchor_loss.pointer == nullptr
                                ? A(0)
                                : A(2) * (grad_anchor_loss.load<A>(0) / divisor) * residuals[k]);
    return;
  }
  const A grad_loss = grad_commitment_loss.pointer == nullptr ? A(0) : grad_commitment_loss.load<A>(0);
  const bool poisoned = grad_loss != A(0) && any_nan(anchors, anchor_count);
  const int64_t last = std::min(count, (block + 1) * chunk);
  for (int64_t i = block * chunk + threadIdx.x; i < last; i += kThreads) {
    A grad = grad_values.pointer == nullptr ? A(0) : grad_values.load<A>(i);
    if (grad_map.pointer != nullptr)
      grad += grad_map.at(i);
    if (grad_loss != A(0)) {
      const A value = poisoned ? A(NAN) : anchors.load<A>(indices[i]);
      grad += commitment_grad(a.load<A>(i), value, grad_loss, divisor);
    }
    grad_a.store(i, grad);
  }
}

// --- launches ---

// Elements of one block: enough to pay for the anchors' sorting, and at most 1024 blocks' sums to add.
int64_t chunk_size(int64_t count, int64_t anchors) {
  return kThreads * std::max({int64_t(4), ceil_div(count, 1024 * kThreads), ceil_div(16 * anchors, kThreads)});
}

// The outputs of quantization, and the sums of its blocks, which the caller's next launch adds.
template <typename A> struct Quantized {
  Tensor values, indices, loss, counts, residuals;
  Tensor wide_scratch, int_scratch;
  Partial<A> partial;

  Quantized(const Queue& queue, const Tensor& a, const Tensor& anchors)
      : values(torch::stable::empty_like(a)), indices(empty_like<int64_t>(a)), loss(empty<A>(a, {})),
        counts(empty_like<int64_t>(anchors)), residuals(empty_like<A>(anchors)) {
    const int64_t count = a.numel(), anchor_count = anchors.numel();
    const int64_t chunk = chunk_size(count, anchor_count), blocks = ceil_div(count, chunk);
    wide_scratch = empty<A>(a, {(anchor_count + 1) * blocks});
    int_scratch = empty<int32_t>(a, {anchor_count * blocks});
    A* sums = mutable_data<A>(wide_scratch);
    partial = {sums, sums + anchor_count * blocks, mutable_data<int32_t>(int_scratch), blocks};

    const int64_t slots = ceil_div(anchor_count, 2) * 2; // doubles stay aligned behind integers
    const bool in_shared = anchor_count <= kShared<A>;
    const Tensor memory =
        empty<int32_t>(a, {in_shared ? 0 : (Table<A>::bytes(slots) + blocks * Bins<A>::bytes(slots)) / 4});
    char* bytes = in_shared ? nullptr : reinterpret_cast<char*>(mutable_data<int32_t>(memory));
    if (!in_shared && blocks > 0)
      for (const bool part : {false, true})
        queue.launch(sort_anchors_kernel, std::min<int64_t>(ceil_div(anchor_count, kThreads), 65535), kThreads, 0,
                     anchors, static_cast<int>(anchor_count), bytes, slots, sizeof(A) == 8, part);
    queue.launch(quantize_kernel<A>, blocks, kThreads,
                 in_shared ? Table<A>::bytes(slots) + Bins<A>::bytes(slots) : 0, a, anchors, bytes, values,
                 mutable_data<int64_t>(indices), partial, count, chunk, static_cast<int>(anchor_count), slots);
  }
};

template <typename A>
std::tuple<Tensor, Tensor> gradients(const Queue& queue, const std::optional<Tensor>& grad_values,
                                     const std::optional<Tensor>& grad_anchor_loss,
                                     const std::optional<Tensor>& grad_commitment_loss, const GradMap<A>& grad_map,
                                     const Tensor& a, const Tensor& anchors, const Tensor& indices,
                                     const Tensor& residuals, int64_t divisor) {
  Tensor grad_a = torch::stable::empty_like(a), grad_anchors = torch::stable::empty_like(anchors);
  const int64_t count = a.numel(), anchor_count = anchors.numel();
  const int64_t chunk = chunk_size(count, anchor_count), blocks = ceil_div(count, chunk);
  queue.launch(quantize_backward_kernel<A>, blocks + ceil_div(anchor_count, kThreads), kThreads, 0, grad_values,
               grad_anchor_loss, grad_commitment_loss, grad_map, a, anchors, data<int64_t>(indices), data<A>(residuals),
               static_cast<A>(divisor), grad_a, grad_anchors, count, chunk, blocks, static_cast<int>(anchor_count));
  return {grad_a, grad_anchors};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_fwd(Tensor a, Tensor anchors) {
  return dispatch_wide(a.scalar_type(), [&](auto wide) {
    using A = decltype(wide);
    const Queue queue(a);
    const Quantized<A> q(queue, a, anchors);
    queue.launch(add_blocks_kernel<A>, anchors.numel() + 1, kThreads, 0, q.partial, mutable_data<A>(q.loss),
                 mutable_data<int64_t>(q.counts), mutable_data<A>(q.residuals), static_cast<int>(anchors.numel()));
    return std::tuple(q.values, q.indices, q.loss, q.counts, q.residuals);
  });
}

std::tuple<Tensor, Tensor> quantize_bwd(std::optional<Tensor> grad_values, std::optional<Tensor> grad_anchor_loss,
                                        std::optional<Tensor> grad_commitment_loss, Tensor a, Tensor anchors,
                                        Tensor indices, Tensor residuals, int64_t divisor) {
  return dispatch_wide(residuals.scalar_type(), [&](auto wide) {
    return gradients(Queue(a), grad_values, grad_anchor_loss, grad_commitment_loss, GradMap<decltype(wide)>(), a,
                     anchors, indices, residuals, divisor);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> anchor_fwd(Tensor x, Tensor a, Tensor anchors,
                                                                      bool residual) {
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Queue queue(x);
    const Quantized<A> q(queue, a, anchors);
    Tensor output = torch::stable::empty_like(x);
    const auto tiling = Tiling::of<T>(Shape(x), data<T>(x), data<T>(output));
    queue.launch(anchor_forward_kernel<T>, tiling.shape.images * tiling.tiles() + anchors.numel() + 1, kThreads, 0,
                 data<T>(x), a, anchors, data<int64_t>(q.indices), residual, mutable_data<T>(output), q.partial,
                 mutable_data<A>(q.loss), mutable_data<int64_t>(q.counts), mutable_data<A>(q.residuals), tiling,
                 static_cast<int>(anchors.numel()));
    return std::tuple(output, q.values, q.indices, q.loss, q.counts, q.residuals);
  });
}

std::tuple<Tensor, Tensor, Tensor> anchor_bwd(Tensor grad_output, std::optional<Tensor> grad_values,
                                              std::optional<Tensor> grad_anchor_loss,
                                              std::optional<Tensor> grad_commitment_loss, Tensor x, Tensor a,
                                              Tensor anchors, Tensor indices, Tensor residuals, bool residual,
                                              int64_t divisor, bool need_grad_x) {
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Queue queue(x);
    Tensor grad_x = features_grad<T>(x, need_grad_x);
    T* to = need_grad_x ? mutable_data<T>(grad_x) : nullptr;
    const auto tiling = Tiling::of<T>(Shape(x), data<T>(grad_output), data<T>(x), to);
    const Tensor sums = empty<A>(x, {tiling.shape.images * tiling.row_tiles * tiling.columns});
    queue.launch(anchor_backward_kernel<T>, tiling.shape.images * tiling.tiles(), kThreads, 0, data<T>(grad_output),
                 data<T>(x), a, anchors, data<int64_t>(indices), residual, to, mutable_data<A>(sums), tiling,
                 static_cast<int>(anchors.numel()));
    const GradMap<A> grad_map{data<A>(sums), tiling.row_tiles, tiling.columns, tiling.shape.positions};
    const auto [grad_a, grad_anchors] = gradients(queue, grad_values, grad_anchor_loss, grad_commitment_loss, grad_map,
                                                  a, anchors, indices, residuals, divisor);
    return std::tuple(grad_x, grad_a, grad_anchors);
  });
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("quantize_fwd", TORCH_BOX(&quantize_fwd));
  m.impl("quantize_bwd", TORCH_BOX(&quantize_bwd));
  m.impl("anchor_fwd", TORCH_BOX(&anchor_fwd));
  m.impl("anchor_bwd", TORCH_BOX(&anchor_bwd));
}

} // namespace attnkern
