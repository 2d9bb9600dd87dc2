// Nearest-anchor quantization on CUDA. A block sorts the anchors in shared memory and finds an element's anchor by the
// thresholds between them. Lanes of a warp with the same anchor are summed in a tree and added to the warp's bins. The
// bins are added in order, and a second launch adds the sums of several blocks in order. With features, the tiles that
// multiply them by the map also quantize its elements.

#include "cuda/modulate.cuh"
#include "quantize.h"

namespace attnkern {
namespace {

constexpr int kWarps = kThreads / kWarp;

// Up to this many anchors are sorted and binned in shared memory, more of them in global memory.
template <typename A> constexpr int kShared = 2048 / sizeof(A);
constexpr int64_t kTileAnchors = 128; // up to this many, every tile of features sorts them
constexpr int64_t kMostOwners = 4096; // most tiles whose sums the next launch adds

// --- sorted anchors ---

// The anchors in ascending order, with thresholds[i] between the i-th and the next one. Equal anchors have the index of
// the first of them.
template <typename A> struct Table {
  A *values, *thresholds;
  int* indices; // of the original anchor

  static ATTNKERN_INLINE int64_t bytes(int slots) { return slots * (2 * sizeof(A) + sizeof(int)); }
  ATTNKERN_DEVICE Table(char* memory, int slots)
      : values(reinterpret_cast<A*>(memory)), thresholds(values + slots),
        indices(reinterpret_cast<int*>(thresholds + slots)) {}

  // Fills the table, by the whole block. Returns true, and leaves the table unusable, if an anchor is NaN. An anchor's
  // rank is the number of anchors before it.
  ATTNKERN_DEVICE bool fill(const Companion& anchors, int count) const {
    A* given = thresholds; // in the original order, until they are sorted
    bool nan = false;
    for (int k = threadIdx.x; k < count; k += kThreads) {
      given[k] = anchors.load<A>(k);
      nan |= given[k] != given[k];
    }
    if (__syncthreads_or(nan))
      return true;
    int bits = 5; // 2^bits threads count for one anchor
    while (bits > 0 && count > kThreads >> bits)
      --bits;
    const int parts = 1 << bits, part = threadIdx.x & (parts - 1);
    for (int first = 0; first < count; first += kThreads >> bits) {
      const int k = first + (threadIdx.x >> bits);
      const A anchor = k < count ? given[k] : A(0);
      int before = 0;
      for (int other = part; other < count; other += parts)
        before += given[other] < anchor || (given[other] == anchor && other < k);
      before = warp_reduce(before, parts);
      if (k < count && part == 0)
        values[before] = anchor, indices[before] = k;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < count; k += kThreads) {
      const A anchor = values[k];
      int first = k;
      while (first > 0 && values[first - 1] == anchor)
        --first;
      // Between equal anchors any threshold is correct.
      thresholds[k] = k + 1 == count             ? A(INFINITY)
                      : values[k + 1] == anchor ? anchor
                                                : round_up<A>(threshold(anchor, values[k + 1],
                                                                        indices[k + 1] < indices[first]));
      if (first != k) { // no other thread reads this index, and values are only compared
        indices[k] = indices[first];
        if (anchor == A(0)) // +0 and -0 are equal
          values[k] = values[first];
      }
    }
    __syncthreads();
    return false;
  }
  // Number of thresholds that are not above an element; 0 for NaN.
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

  static ATTNKERN_INLINE int64_t bytes(int slots) { return kWarps * slots * (sizeof(A) + sizeof(int)); }
  ATTNKERN_DEVICE Bins(char* memory, int slots)
      : residuals(reinterpret_cast<A*>(memory)), counts(reinterpret_cast<int*>(residuals + kWarps * slots)) {}
};

// Adds the values of lanes with the same key, in a tree over their ranks among these lanes. The lowest of them gets the
// sum, and the number of lanes is returned to it; the others get 0.
template <typename A> ATTNKERN_DEVICE int add_alike(int key, A& value) {
  const unsigned alike = __match_any_sync(kAllLanes, key), below = (1u << threadIdx.x % kWarp) - 1;
  unsigned place = __popc(alike & below), behind = alike & ~below & ~(below + 1);
#pragma unroll
  for (int lanes = kWarp; lanes > 1; lanes /= 2) { // at most this many are left
    const int next = __ffs(behind) - 1;
    const A other = __shfl_sync(kAllLanes, value, std::max(next, 0));
    if (next >= 0)
      value += other;
    behind &= ~__ballot_sync(kAllLanes, place & 1); // these have been added to another lane
    place /= 2;
  }
  return (alike & below) == 0 ? __popc(alike) : 0;
}

// The sums of each block, (anchors, blocks) and (blocks), which are added in order.
template <typename A> struct Partial {
  A *residuals, *loss;
  int* counts;
};

ATTNKERN_DEVICE bool any_nan(const Companion& anchors, int count) {
  bool found = false;
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const double anchor = anchors.load<double>(k);
    found |= anchor != anchor;
  }
  return __syncthreads_or(found) != 0;
}

// Where a block's table and bins are: in shared memory, or in global scratch memory.
template <typename A> struct Scratch {
  char* memory = nullptr; // null for shared memory
  int slots;              // for anchors; even, so that arrays behind integers stay aligned

  explicit Scratch(int64_t anchors) : slots(static_cast<int>(ceil_div(anchors, 2) * 2)) {}
  ATTNKERN_INLINE int64_t bytes() const { return Table<A>::bytes(slots) + Bins<A>::bytes(slots); }
  bool fits_shared() const { return slots <= kShared<A>; }
};

// Inputs and outputs of quantization. Block element / chunk of `blocks` processes an element.
template <typename A> struct Quantization {
  Companion a, anchors;
  int anchor_count;
  int64_t count, chunk, blocks;
  Scratch<A> scratch;
  MutableCompanion values;
  int64_t* indices;
  A *anchor_loss, *commitment_loss;
  A divisor; // of the losses
  int64_t* counts;
  A* residuals;
  Partial<A> partial; // if there are several blocks

  ATTNKERN_DEVICE void write_losses(A sum) const { *anchor_loss = *commitment_loss = sum / divisor; }
};

// Adds the blocks' sums of one anchor, or of the loss for the index after the last anchor; by a whole block.
template <typename A> ATTNKERN_DEVICE void add_blocks(const Quantization<A>& q, int64_t anchor) {
  if (anchor > q.anchor_count || q.blocks == 1) // nothing to do, or the block's sums are the results already
    return;
  const bool is_loss = anchor == q.anchor_count;
  const A* sums = is_loss ? q.partial.loss : q.partial.residuals + anchor * q.blocks;
  double sum[1] = {};
  int64_t number[1] = {};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < q.blocks; i += kThreads) {
    sum[0] += sums[i];
    number[0] += is_loss ? 0 : q.partial.counts[anchor * q.blocks + i];
  }
  block_reduce(sum);
  block_reduce(number);
  if (threadIdx.x != 0)
    return;
  if (is_loss)
    q.write_losses(static_cast<A>(sum[0]));
  else
    q.residuals[anchor] = static_cast<A>(sum[0]), q.counts[anchor] = number[0];
}

// A block's table and the bins of its warps. The whole block constructs and uses it.
template <typename A> class Quantizer {
  const Quantization<A>& q_;
  const Table<A> table_;
  const Bins<A> bins_;
  const bool poisoned_; // whether an anchor is NaN
  A loss_ = 0;

  ATTNKERN_DEVICE int bin(int k, int warp) const { return warp * q_.scratch.slots + k; }

public:
  ATTNKERN_DEVICE Quantizer(const Quantization<A>& q, char* memory)
      : q_(q), table_(memory, q.scratch.slots), bins_(memory + Table<A>::bytes(q.scratch.slots), q.scratch.slots),
        poisoned_(table_.fill(q.anchors, q.anchor_count)) {
    for (int k = threadIdx.x % kWarp; k < q.anchor_count; k += kWarp) {
      const int own = bin(k, threadIdx.x / kWarp);
      bins_.residuals[own] = 0, bins_.counts[own] = 0;
    }
    __syncwarp(); // lanes of the warp share its bins
  }
  // The value of an element, and the index of its anchor, -1 if the element or an anchor is NaN.
  ATTNKERN_DEVICE A value(A element, int& index) const {
    index = -1;
    if (poisoned_ || element != element)
      return A(NAN);
    const int rank = table_.rank(element, q_.anchor_count);
    index = table_.indices[rank];
    return table_.values[rank];
  }
  // Quantizes the i-th element if it is `valid`; called by whole warps.
  ATTNKERN_DEVICE A take(int64_t i, A element, bool valid) {
    int index = -1;
    A quantized = 0, difference = 0;
    if (valid) {
      quantized = value(element, index);
      difference = quantized - element;
      q_.values.store(i, quantized);
      q_.indices[i] = index < 0 ? 0 : index;
      loss_ += difference * difference;
    }
    const bool spoilt = __ballot_sync(kAllLanes, valid && index < 0) != 0; // a NaN spoils anchor 0
    const int lanes = add_alike(index, difference), warp = threadIdx.x / kWarp;
    if (index >= 0 && lanes > 0)
      bins_.residuals[bin(index, warp)] += difference, bins_.counts[bin(index, warp)] += lanes;
    __syncwarp();
    if (spoilt && threadIdx.x % kWarp == 0)
      bins_.residuals[bin(0, warp)] = NAN;
    __syncwarp();
    return quantized;
  }
  // Writes the block's sums: to the outputs if it is the only block, else as those of block `block`.
  ATTNKERN_DEVICE void finish(int64_t block) {
    struct Losses { // per warp
      A of[kWarps];
    };
    Losses& losses = shared<Losses>();
    loss_ = warp_reduce(loss_);
    if (threadIdx.x % kWarp == 0)
      losses.of[threadIdx.x / kWarp] = loss_;
    __syncthreads();
    const bool only = q_.blocks == 1;
    for (int k = threadIdx.x; k <= q_.anchor_count; k += kThreads) {
      const bool is_loss = k == q_.anchor_count;
      A sum = 0;
      int number = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        sum += is_loss ? losses.of[warp] : bins_.residuals[bin(k, warp)];
        number += is_loss ? 0 : bins_.counts[bin(k, warp)];
      }
      if (is_loss && only)
        q_.write_losses(sum);
      else if (is_loss)
        q_.partial.loss[block] = sum;
      else if (only)
        q_.residuals[k] = sum, q_.counts[k] = number;
      else
        q_.partial.residuals[k * q_.blocks + block] = sum, q_.partial.counts[k * q_.blocks + block] = number;
    }
  }
};

// Quantizes a block's chunk of the elements.
template <typename A> ATTNKERN_DEVICE void quantize_chunk(const Quantization<A>& q, int64_t block, char* memory) {
  const int64_t last = std::min(q.count, (block + 1) * q.chunk);
  const auto element_at = [&](int64_t i) { return i < last ? q.a.template load<A>(i) : A(0); };
  A next = element_at(block * q.chunk + threadIdx.x); // loaded while the table is filled
  Quantizer<A> quantizer(q, memory);
  for (int64_t first = block * q.chunk; first < last; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const A element = next;
    next = element_at(i + kThreads);
    quantizer.take(i, element, i < last);
  }
  quantizer.finish(block);
}

template <typename A> __global__ void __launch_bounds__(kThreads) quantize_kernel(Quantization<A> q) {
  const int64_t block = block_index();
  if (block >= q.blocks)
    return;
  if (q.scratch.memory == nullptr) // two calls, so that the compiler knows the kind of memory
    quantize_chunk(q, block, dynamic_shared<char>());
  else
    quantize_chunk(q, block, q.scratch.memory + block * q.scratch.bytes());
}

template <typename A> __global__ void __launch_bounds__(kThreads) add_blocks_kernel(Quantization<A> q) {
  add_blocks(q, block_index());
}

// The map of a tile from the indices of its elements: the anchors' values, NaN if the element or any anchor is NaN.
template <typename T>
ATTNKERN_DEVICE void fill_map(const Tiling& tiling, const Tile& tile, const Companion& a, const Companion& anchors,
                              int anchor_count, const int64_t* indices) {
  using A = Wide<T>;
  A* map = shared<MapTile<T>>().of;
  const bool poisoned = any_nan(anchors, anchor_count);
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t at = tile.image * tiling.shape.positions + tile.position(tiling, i);
    const A element = a.load<A>(at);
    const bool lost = poisoned || element != element;
    map[i] = lost ? A(NAN) : anchors.load<A>(kept_within(indices[at], anchor_count));
  }
  __syncthreads();
}

// Which blocks quantize the elements in the forward pass.
enum class Quantizing {
  before, // those of an earlier launch: there are too many anchors for every tile to sort
  beside, // one more block of the same launch, if there are few elements; the tiles only look up their values
  within, // the tiles: each writes the outputs that it owns, and the next launch adds the sums
};

// The map of a tile from the anchors. If `within`, the elements that the tile owns are quantized.
template <typename T>
ATTNKERN_DEVICE void look_up_map(const Quantization<Wide<T>>& q, bool within, const Tiling& tiling, const Tile& tile) {
  using A = Wide<T>;
  A* map = shared<MapTile<T>>().of;
  const int64_t beyond = tiling.shape.positions - tile.column;
  const int owned = within && tile.row == 0 && beyond > 0 ? static_cast<int>(std::min<int64_t>(beyond, tile.width)) : 0;
  const auto place = [&](int i) { return tile.image * tiling.shape.positions + tile.position(tiling, i); };
  const auto element_at = [&](int i) { return i < tile.width ? q.a.template load<A>(place(i)) : A(0); };
  A next = element_at(threadIdx.x); // loaded while the table is filled
  Quantizer<A> quantizer(q, dynamic_shared<char>());
  for (int first = 0; first < tile.width; first += kThreads) {
    const int i = first + threadIdx.x;
    const A element = next;
    next = element_at(i + kThreads);
    A value = 0;
    int index;
    if (first < owned)
      value = quantizer.take(place(std::min(i, tile.width - 1)), element, i < owned);
    if (i >= owned)
      value = quantizer.value(element, index);
    if (i < tile.width)
      map[i] = value;
  }
  if (owned > 0)
    quantizer.finish(tile.image * ceil_div(tiling.shape.positions, tiling.width) + tile.in_image);
  else
    __syncthreads();
}

// Features times the map. Blocks after the tiles quantize the elements (beside) or add the sums of quantize_kernel
// (before).
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    anchor_forward_kernel(const T* x, Quantization<Wide<T>> q, Quantizing quantizing, bool residual, T* output,
                          Tiling tiling) {
  const int64_t tiles = tiling.shape.images * tiling.tiles(), behind = block_index() - tiles;
  if (behind >= 0) {
    if (quantizing == Quantizing::before)
      add_blocks(q, behind);
    else if (quantizing == Quantizing::beside && behind == 0)
      quantize_chunk(q, 0, dynamic_shared<char>());
    return;
  }
  const Tile tile(tiling, block_index());
  Walk<T, 1> walk(tiling, tile, {x});
  if (quantizing == Quantizing::before)
    fill_map<T>(tiling, tile, q.a, q.anchors, q.anchor_count, q.indices);
  else
    look_up_map<T>(q, quantizing == Quantizing::within, tiling, tile);
  modulate(tiling, walk, Wide<T>(residual), output);
}

// The gradients of a and of the anchors.
template <typename A> struct Gradients {
  Companion grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors;
  int anchor_count;
  int64_t count;
  const int64_t* indices;
  const A* residuals;
  A divisor;
  MutableCompanion grad_a, grad_anchors;

  ATTNKERN_DEVICE A grad_loss() const {
    return grad_commitment_loss.pointer == nullptr ? A(0) : grad_commitment_loss.load<A>(0);
  }
  // Writes the gradient of an element: that of the map, of the values and of the commitment loss.
  ATTNKERN_DEVICE void write_element(int64_t i, A grad_map, A grad_loss, bool poisoned) const {
    A grad = grad_map;
    if (grad_values.pointer != nullptr)
      grad += grad_values.load<A>(i);
    if (grad_loss != A(0)) {
      const A value = poisoned ? A(NAN) : anchors.load<A>(kept_within(indices[i], anchor_count));
      grad += commitment_grad(a.load<A>(i), value, grad_loss, divisor);
    }
    grad_a.store(i, grad);
  }
  ATTNKERN_DEVICE void write_anchors(int64_t block) const {
    const int64_t k = block * kThreads + threadIdx.x;
    if (k < anchor_count)
      grad_anchors.store(k, grad_anchor_loss.pointer == nullptr
                                ? A(0)
                                : A(2) * (grad_anchor_loss.load<A>(0) / divisor) * residuals[k]);
  }
  int64_t anchor_blocks() const { return ceil_div(anchor_count, kThreads); }
};

// Partial sums of the gradient of the map, (N, row tiles, columns); null if there are no features.
template <typename A> struct GradMap {
  const A* pointer = nullptr;
  int64_t row_tiles = 0, columns = 0, positions = 1;

  ATTNKERN_DEVICE A at(int64_t element) const {
    const int64_t image = divide(element, positions), position = element - image * positions;
    A sum = 0;
#pragma unroll 4
    for (int64_t tile = image * row_tiles; tile < (image + 1) * row_tiles; ++tile)
      for (int64_t column = position; column < columns; column += positions)
        sum += pointer[tile * columns + column];
    return sum;
  }
};

// The gradient of the features, and Σ dy·x. If tiles have all channels of their positions, they also compute the
// gradients of a, and blocks after the tiles compute those of the anchors. Otherwise the sums go to `grad_map`.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    anchor_backward_kernel(const T* grad_output, const T* x, Gradients<Wide<T>> gradients, bool residual, T* grad_x,
                           Wide<T>* grad_map, Tiling tiling) {
  using A = Wide<T>;
  const int64_t behind = block_index() - tiling.shape.images * tiling.tiles();
  if (behind >= 0) {
    gradients.write_anchors(behind);
    return;
  }
  const Tile tile(tiling, block_index());
  Walk<T, 2> walk(tiling, tile, {grad_output, x});
  const Companion &a = gradients.a, &anchors = gradients.anchors;
  fill_map<T>(tiling, tile, a, anchors, gradients.anchor_count, gradients.indices);
  modulate_backward(tiling, tile, walk, Wide<T>(residual), grad_x);
  const A* sums = shared<SumTile<T>>().of;
  if (tiling.complete()) {
    const A grad_loss = gradients.grad_loss();
    const bool poisoned = grad_loss != A(0) && any_nan(anchors, gradients.anchor_count);
    const int64_t positions = tiling.shape.positions, first = tile.image * positions + tile.column;
    for (int i = threadIdx.x; i < std::min<int64_t>(tile.width, positions); i += kThreads) {
      A sum = 0;
      for (int64_t column = i; column < tile.width; column += positions)
        sum += sums[column];
      gradients.write_element(first + i, sum, grad_loss, poisoned);
    }
    return;
  }
  const int64_t row_tile = divide(tile.in_image, tiling.column_tiles);
  A* to = grad_map + (tile.image * tiling.row_tiles + row_tile) * tiling.columns;
  for (int i = threadIdx.x; i < tile.width; i += kThreads)
    to[tile.column + i] = sums[i];
}

// The gradients of a, one per thread; the blocks after these compute the gradients of the anchors.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    quantize_backward_kernel(Gradients<A> gradients, GradMap<A> grad_map, int64_t blocks) {
  const int64_t block = block_index();
  if (block >= blocks) {
    gradients.write_anchors(block - blocks);
    return;
  }
  const A grad_loss = gradients.grad_loss();
  const bool poisoned = grad_loss != A(0) && any_nan(gradients.anchors, gradients.anchor_count);
  if (const int64_t i = block * kThreads + threadIdx.x; i < gradients.count)
    gradients.write_element(i, grad_map.pointer == nullptr ? A(0) : grad_map.at(i), grad_loss, poisoned);
}

// --- launches ---

// Elements per block. One block quantizes a few elements alone, which saves a launch. Otherwise a thread has one
// element, or more if there are many anchors to sort or if the sums of more than 1024 blocks would have to be added.
constexpr int64_t kFewElements = 8 * kThreads;
int64_t chunk_size(int64_t count, int64_t anchors) {
  if (count <= kFewElements)
    return kFewElements;
  return kThreads * std::max({int64_t(1), ceil_div(count, 1024 * kThreads), ceil_div(4 * anchors, kThreads)});
}

// The outputs and the scratch memory of quantization in `blocks` blocks; by default chunk_size() determines how many.
template <typename A> struct Quantized {
  Tensor values, indices, anchor_loss, commitment_loss, counts, residuals;
  Tensor sums, numbers, tables;
  Quantization<A> q;

  Quantized(const Tensor& a, const Tensor& anchors, int64_t divisor, int64_t blocks = 0)
      : values(empty_same(a)), indices(empty_like<int64_t>(a)), anchor_loss(empty<A>(a, {})),
        commitment_loss(empty<A>(a, {})), counts(empty_like<int64_t>(anchors)), residuals(empty_like<A>(anchors)),
        q(make(a, anchors, divisor, blocks)) {}
  size_t shared_bytes() const { return q.scratch.fits_shared() ? q.scratch.bytes() : 0; }

private:
  Quantization<A> make(const Tensor& a, const Tensor& anchors, int64_t divisor, int64_t blocks) {
    const int64_t count = a.numel(), anchor_count = anchors.numel(), chunk = chunk_size(count, anchor_count);
    if (blocks == 0)
      blocks = std::max<int64_t>(1, ceil_div(count, chunk));
    const int64_t shared_by = blocks == 1 ? 0 : blocks;
    sums = empty<A>(a, {(anchor_count + 1) * shared_by});
    numbers = empty<int32_t>(a, {anchor_count * shared_by});
    A* residual_sums = mutable_data<A>(sums);
    const Partial<A> partial{residual_sums, residual_sums + anchor_count * blocks, mutable_data<int32_t>(numbers)};
    Scratch<A> scratch(anchor_count);
    if (!scratch.fits_shared()) {
      tables = empty<int64_t>(a, {blocks * scratch.bytes() / 8});
      scratch.memory = reinterpret_cast<char*>(mutable_data<int64_t>(tables));
    }
    return {a, anchors, static_cast<int>(anchor_count), count, chunk, blocks, scratch, values,
            mutable_data<int64_t>(indices), mutable_data<A>(anchor_loss), mutable_data<A>(commitment_loss),
            static_cast<A>(divisor), mutable_data<int64_t>(counts), mutable_data<A>(residuals), partial};
  }
};

template <typename A>
Gradients<A> make_gradients(const std::optional<Tensor>& grad_values, const std::optional<Tensor>& grad_anchor_loss,
                            const std::optional<Tensor>& grad_commitment_loss, const Tensor& a, const Tensor& anchors,
                            const Tensor& indices, const Tensor& residuals, int64_t divisor, const Tensor& grad_a,
                            const Tensor& grad_anchors) {
  return {grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, static_cast<int>(anchors.numel()), a.numel(),
          data<int64_t>(indices), data<A>(residuals), static_cast<A>(divisor), grad_a, grad_anchors};
}

template <typename A> void launch_backward(const Queue& queue, const Gradients<A>& gradients, const GradMap<A>& map) {
  const int64_t blocks = ceil_div(gradients.count, kThreads);
  queue.launch(quantize_backward_kernel<A>, blocks + gradients.anchor_blocks(), kThreads, 0, gradients, map, blocks);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_fwd(Tensor a, Tensor anchors, int64_t divisor) {
  make_dense(a);
  make_contiguous(anchors);
  return dispatch_wide(a.scalar_type(), [&](auto wide) {
    using A = decltype(wide);
    const Queue queue(a);
    const Quantized<A> out(a, anchors, divisor);
    queue.launch(quantize_kernel<A>, out.q.blocks, kThreads, out.shared_bytes(), out.q);
    queue.launch(add_blocks_kernel<A>, out.q.blocks == 1 ? 0 : anchors.numel() + 1, kThreads, 0, out.q);
    return std::tuple(out.values, out.indices, out.anchor_loss, out.commitment_loss, out.counts, out.residuals);
  });
}

std::tuple<Tensor, Tensor> quantize_bwd(std::optional<Tensor> grad_values, std::optional<Tensor> grad_anchor_loss,
                                        std::optional<Tensor> grad_commitment_loss, Tensor a, Tensor anchors,
                                        Tensor indices, Tensor residuals, int64_t divisor) {
  make_dense(a);
  make_dense_like(a, grad_values);
  make_dense_like(a, indices);
  make_contiguous(grad_anchor_loss, grad_commitment_loss, anchors, residuals);
  return dispatch_wide(residuals.scalar_type(), [&](auto wide) {
    using A = decltype(wide);
    Tensor grad_a = empty_same(a), grad_anchors = empty_same(anchors);
    launch_backward(Queue(a),
                    make_gradients<A>(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices,
                                      residuals, divisor, grad_a, grad_anchors),
                    GradMap<A>());
    return std::tuple(grad_a, grad_anchors);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> anchor_fwd(Tensor x, Tensor a, Tensor anchors,
                                                                              bool residual, int64_t divisor) {
  make_dense(x);
  make_contiguous(a, anchors);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Queue queue(x);
    Tensor output = empty_same(x);
    const auto tiling = Tiling::of<T>(Shape(x), data<T>(x), data<T>(output));
    const int64_t owners = tiling.shape.images * ceil_div(tiling.shape.positions, tiling.width);
    const auto quantizing = anchors.numel() > kTileAnchors    ? Quantizing::before
                            : a.numel() <= kFewElements       ? Quantizing::beside
                            : owners <= kMostOwners           ? Quantizing::within
                                                              : Quantizing::before;
    const bool before = quantizing == Quantizing::before, within = quantizing == Quantizing::within;
    const Quantized<A> out(a, anchors, divisor, within ? owners : 0);
    const int64_t adding = out.q.blocks == 1 ? 0 : anchors.numel() + 1;
    queue.launch(quantize_kernel<A>, before ? out.q.blocks : 0, kThreads, out.shared_bytes(), out.q);
    queue.launch(anchor_forward_kernel<T>,
                 tiling.shape.images * tiling.tiles() + (before ? adding : quantizing == Quantizing::beside), kThreads,
                 before ? 0 : out.shared_bytes(), data<T>(x), out.q, quantizing, residual, mutable_data<T>(output),
                 tiling);
    queue.launch(add_blocks_kernel<A>, within ? adding : 0, kThreads, 0, out.q);
    return std::tuple(output, out.values, out.indices, out.anchor_loss, out.commitment_loss, out.counts,
                      out.residuals);
  });
}

std::tuple<Tensor, Tensor, Tensor> anchor_bwd(Tensor grad_output, std::optional<Tensor> grad_values,
                                              std::optional<Tensor> grad_anchor_loss,
                                              std::optional<Tensor> grad_commitment_loss, Tensor x, Tensor a,
                                              Tensor anchors, Tensor indices, Tensor residuals, bool residual,
                                              int64_t divisor, bool need_grad_x) {
  make_dense(x);
  make_dense_like(x, grad_output);
  make_contiguous(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices, residuals);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Queue queue(x);
    Tensor grad_x = features_grad<T>(x, need_grad_x);
    Tensor grad_a = empty_same(a), grad_anchors = empty_same(anchors);
    T* to = need_grad_x ? mutable_data<T>(grad_x) : nullptr;
    const auto tiling = Tiling::of<T>(Shape(x), data<T>(grad_output), data<T>(x), to);
    const auto gradients = make_gradients<A>(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices,
                                             residuals, divisor, grad_a, grad_anchors);
    const bool one_launch = tiling.complete();
    const Tensor sums = empty<A>(x, {one_launch ? 0 : tiling.shape.images * tiling.row_tiles * tiling.columns});
    queue.launch(anchor_backward_kernel<T>,
                 tiling.shape.images * tiling.tiles() + (one_launch ? gradients.anchor_blocks() : 0), kThreads, 0,
                 data<T>(grad_output), data<T>(x), gradients, residual, to, mutable_data<A>(sums), tiling);
    if (!one_launch)
      launch_backward(queue, gradients,
                      GradMap<A>{data<A>(sums), tiling.row_tiles, tiling.columns, tiling.shape.positions});
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
