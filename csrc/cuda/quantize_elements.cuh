// Nearest-anchor quantization of elements, by whole blocks. A block sorts the anchors in shared memory and finds an
// element's anchor by the thresholds between them. Lanes of a warp with the same anchor are summed in a tree and added
// to the warp's bins. The bins are added in order, and a second launch adds the sums of several blocks in order.
#pragma once

#include "cuda/modulate.cuh"
#include "quantize.h"

namespace attnkern {

constexpr int kWarps = kThreads / kWarp;

// Up to this many anchors are sorted and binned in shared memory, more of them in global memory.
template <typename A> constexpr int kShared = 2048 / sizeof(A);

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
  unsigned rank = __popc(alike & below), later = alike & ~below & ~(below + 1);
#pragma unroll
  for (int lanes = kWarp; lanes > 1; lanes /= 2) { // at most this many are left
    const int next = __ffs(later) - 1;
    const A other = __shfl_sync(kAllLanes, value, std::max(next, 0));
    if (next >= 0)
      value += other;
    later &= ~__ballot_sync(kAllLanes, rank & 1); // these have been added to another lane
    rank /= 2;
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
  int slots;              // for anchors; even, so that the arrays after the integers stay aligned

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
    const bool nan_found = __ballot_sync(kAllLanes, valid && index < 0) != 0; // makes the sum of anchor 0 NaN
    const int lanes = add_alike(index, difference), warp = threadIdx.x / kWarp;
    if (index >= 0 && lanes > 0)
      bins_.residuals[bin(index, warp)] += difference, bins_.counts[bin(index, warp)] += lanes;
    __syncwarp();
    if (nan_found && threadIdx.x % kWarp == 0)
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

} // namespace attnkern
