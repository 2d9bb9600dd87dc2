// Softmax compatibility pooling on a GPU, local features read once: a block takes tiles of positions with all their
// channels, keeps a tile in registers (what does not fit is read again, from the caches), forms the scores, and with
// their softmax weights the weighted sum, relative to the largest score so far. The backward pass is the same walk
// with other weights: s = ⟨ℓ, dg⟩ gives dc, and Σ dc·ℓ the query's gradient.
//
// Tiles and the order of sums follow from C, the positions, the dtype and the layout, never from the batch.

#include "cuda/common.cuh"
#include "pool.h"

namespace attnkern {
namespace {

constexpr int kThreads = 256;
constexpr int kKept = 16, kKeptInner = 8; // vectors of a tile that a thread keeps: with channels innermost
constexpr int kTile = 512;              // positions of a tile, at most
constexpr int64_t kMostSplits = 64;     // blocks of an image
constexpr int64_t kOneBlock = 32768;    // an image of at most as many elements, or a map of at most
constexpr int64_t kOneBlockMap = 64;    // as many positions, is one block's work
template <typename T> constexpr int kCached = std::max(64 * kKept, kThreads * kVector<T>); // channels

inline int power_of_two(int64_t at_least) {
  int power = 1;
  while (power < at_least)
    power *= 2;
  return power;
}

struct Tiling {
  Shape shape;
  int vectors, rows; // threads of a block along the innermost dimension, and along the other one
  int tile;          // positions
  int64_t splits, tiles_per_split;

  Tiling(const Shape& features, int vector) : shape(features) {
    if (shape.channels_inner) {
      vectors = std::min(kThreads, power_of_two(ceil_div(shape.channels, vector)));
      rows = kThreads / vectors;
      tile = std::min(kTile, kKeptInner * rows);
    } else {
      // As few along a row as let a block keep all channels; at least 64 bytes, at most a warp.
      const int fewest = kThreads / std::min(kThreads, power_of_two(ceil_div(shape.channels, kKept)));
      vectors = std::clamp(std::min(fewest, power_of_two(ceil_div(shape.positions, vector))), 4, kWarp);
      rows = kThreads / vectors;
      tile = vectors * vector;
    }
    const int64_t tiles = ceil_div(shape.positions, tile);
    const bool one = shape.positions <= kOneBlockMap || shape.image_size() <= kOneBlock;
    tiles_per_split = one ? tiles : ceil_div(tiles, kMostSplits);
    splits = ceil_div(tiles, tiles_per_split);
  }
};

// 16 bytes of features as they came from memory: what a thread keeps of a tile.
template <typename T> struct Packed {
  uint32_t words[4];

  ATTNKERN_DEVICE Wide<T> operator[](int lane) const {
    if constexpr (sizeof(T) == 8)
      return bit_cast<T>(words[2 * lane] | static_cast<uint64_t>(words[2 * lane + 1]) << 32);
    else if constexpr (sizeof(T) == 4)
      return bit_cast<T>(words[lane]);
    else
      return widen(bit_cast<T>(static_cast<uint16_t>(words[lane / 2] >> lane % 2 * 16)));
  }
};

// Makes the compiler forget what it derived from a number: what is kept from one use of a tile to the next (unpacked
// features, addresses) fills the registers that the tile itself needs, and is cheap to derive again.
template <typename I> ATTNKERN_DEVICE void forget(I& number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
}
template <typename T> ATTNKERN_DEVICE void forget(Packed<T>& packed) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    forget(packed.words[i]);
}

// Reads and writes kWidth elements at a time, of which `valid` exist; zeros stand for the others.
// They are read as words: lanes of half precision would be moved one by one, each through a register of its own.
template <typename T, int kWidth> struct alignas(kWidth * sizeof(T)) Part {
  T lane[kWidth];
};
template <int kBytes> struct alignas(kBytes) Words {
  std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t> of[kBytes % 4 == 0 ? kBytes / 4 : 1];
};
template <int kWidth, typename T> ATTNKERN_DEVICE Packed<T> load_parts(const T* from, int64_t valid) {
  union {
    Packed<T> packed;
    Words<kWidth * sizeof(T)> parts[kVector<T> / kWidth];
  } both = {};
#pragma unroll
  for (int i = 0; i < kVector<T> / kWidth; ++i)
    if (i * kWidth < valid)
      both.parts[i] = reinterpret_cast<const Words<kWidth * sizeof(T)>*>(from)[i];
  return both.packed;
}
template <int kWidth, typename T>
ATTNKERN_DEVICE void store_parts(const Wide<T> (&values)[kVector<T>], T* to, int64_t valid) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += kWidth)
    if (i < valid) {
      Part<T, kWidth> part;
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        part.lane[k] = narrow<T>(values[i + k]);
      *reinterpret_cast<Part<T, kWidth>*>(to + i) = part;
    }
}

// Sums over neighbouring lanes, several on their way at once.
template <int K, typename A> ATTNKERN_DEVICE void reduce_each(A (&values)[K], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int k = 0; k < K; ++k)
      values[k] += __shfl_xor_sync(kAllLanes, values[k], offset);
}

template <typename T> struct Memory {
  Wide<T> sums[kThreads * kVector<T>]; // of threads, to be added in order
  Wide<T> weight[kTile], share[kTile]; // per position of the tile: of the weighted sum; backward also attention
  Wide<T> first[kCached<T>], second[kCached<T>]; // per channel: what scores are formed with; backward also the query
};

// One split's walk: the forward pass.
template <typename T> struct Forward {
  using A = Wide<T>;
  static constexpr bool kWrites = false;
  Companion query; // (N, C) or (C,)
  bool shared_query;
  A *scores;       // (N, positions)
  A *sums;         // (N, splits, C): Σ exp(score - max)·ℓ
  A *moments;      // (N, splits, 2): max, Σ exp(score - max)
  T *pooled;       // (N, C)
  A *pooled_wide;  // (N, C), or null where it is pooled itself
  A *attention;    // (N, positions)
  A max = -INFINITY, sum = 0, shrink = 0;

  ATTNKERN_DEVICE A first(const Tiling& tiling, int64_t image, int64_t c) const {
    return query.load<A>(shared_query ? c : image * tiling.shape.channels + c);
  }
  ATTNKERN_DEVICE A second(const Tiling&, int64_t, int64_t) const { return 0; }
  ATTNKERN_DEVICE void begin(const Tiling&, int64_t) {}

  // From the dot products of a tile to the weights of its positions.
  template <typename Dot>
  ATTNKERN_DEVICE void weigh(const Tiling& tiling, int64_t image, int64_t position, int count, const Dot& dot) {
    A* weight = shared<Memory<T>>().weight;
    A highest[1] = {max}, total[1] = {};
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const A score = dot(i);
      scores[image * tiling.shape.positions + position + i] = weight[i] = score;
      highest[0] = Max()(highest[0], score);
    }
    block_reduce<Max>(highest);
    for (int i = threadIdx.x; i < count; i += kThreads)
      total[0] += weight[i] = softmax_weight(weight[i], highest[0]);
    block_reduce(total);
    shrink = softmax_weight(max, highest[0]);
    max = highest[0];
    sum = std::fma(sum, shrink, total[0]);
  }
  // Adds a tile's share of channel c; always the same thread does.
  ATTNKERN_DEVICE void add(const Tiling& tiling, int64_t c, bool fresh, A value) const {
    A& to = sums[block_index() * tiling.shape.channels + c];
    to = fresh ? value : std::fma(to, shrink, value);
  }
  ATTNKERN_DEVICE void end(const Tiling& tiling, int64_t image) const {
    if (threadIdx.x == 0) {
      moments[2 * block_index()] = max;
      moments[2 * block_index() + 1] = sum;
    }
    __syncthreads();
    if (tiling.splits == 1)
      finish(tiling, image, 0, 1);
  }
  // An image's outputs from its splits; this block is one of `slices` that share the work.
  ATTNKERN_DEVICE void finish(const Tiling& tiling, int64_t image, int64_t slice, int64_t slices) const;
};

// The factors that bring the splits' sums to the image's largest score.
template <typename A> struct Factors {
  A of[kMostSplits];
};

template <typename T>
ATTNKERN_DEVICE void Forward<T>::finish(const Tiling& tiling, int64_t image, int64_t slice, int64_t slices) const {
  const Shape& shape = tiling.shape;
  const int split = threadIdx.x;
  const A* moment = moments + 2 * (image * tiling.splits + split);
  A highest[1] = {split < tiling.splits ? moment[0] : -A(INFINITY)}, total[1] = {};
  block_reduce<Max>(highest);
  A* factors = shared<Factors<A>>().of;
  if (split < tiling.splits) {
    factors[split] = softmax_weight(moment[0], highest[0]);
    total[0] = moment[1] * factors[split];
  }
  block_reduce(total); // its barriers make the factors visible
  const int64_t start = slice * kThreads + threadIdx.x, step = slices * kThreads;
  for (int64_t c = start; c < shape.channels; c += step) {
    A value = 0;
    for (int64_t s = 0; s < tiling.splits; ++s)
      value = std::fma(sums[(image * tiling.splits + s) * shape.channels + c], factors[s], value);
    value /= total[0];
    pooled[image * shape.channels + c] = narrow<T>(value);
    if (pooled_wide != nullptr)
      pooled_wide[image * shape.channels + c] = value;
  }
  for (int64_t p = start; p < shape.positions; p += step)
    attention[image * shape.positions + p] =
        softmax_weight(scores[image * shape.positions + p], highest[0]) / total[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pool_finish(Tiling tiling, Forward<T> forward, int64_t slices) {
  const int64_t image = block_index() / slices;
  if (image < tiling.shape.images)
    forward.finish(tiling, image, block_index() % slices, slices);
}

// One split's walk: the backward pass.
template <typename T> struct Backward {
  using A = Wide<T>;
  static constexpr bool kWrites = true;
  const T* grad_pooled;    // (N, C) or null
  const A *grad_attention; // (N, positions) or null
  const A *grad_scores;    // (N, positions) or null
  Companion query;         // (N, C) or (C,)
  bool shared_query;
  const A *attention;      // (N, positions)
  const A *pooled;         // (N, C)
  T *grad_local;           // like local, or null
  A *sums;                 // (N, splits, C): Σ dc·ℓ
  bool direct;             // one block's sums are a query's gradient
  MutableCompanion grad_query;
  A delta = 0;             // ⟨dg, pooled⟩ + Σ a·da

  ATTNKERN_DEVICE A first(const Tiling& tiling, int64_t image, int64_t c) const {
    return grad_pooled == nullptr ? A(0) : widen(grad_pooled[image * tiling.shape.channels + c]);
  }
  ATTNKERN_DEVICE A second(const Tiling& tiling, int64_t image, int64_t c) const {
    return query.load<A>(shared_query ? c : image * tiling.shape.channels + c);
  }
  ATTNKERN_DEVICE void begin(const Tiling& tiling, int64_t image) {
    const Shape& shape = tiling.shape;
    A total[1] = {};
    if (grad_pooled != nullptr)
      for (int64_t c = threadIdx.x; c < shape.channels; c += kThreads)
        total[0] = std::fma(first(tiling, image, c), pooled[image * shape.channels + c], total[0]);
    if (grad_attention != nullptr)
      for (int64_t p = image * shape.positions + threadIdx.x; p < (image + 1) * shape.positions; p += kThreads)
        total[0] = std::fma(attention[p], grad_attention[p], total[0]);
    block_reduce(total);
    delta = total[0];
  }

  template <typename Dot>
  ATTNKERN_DEVICE void weigh(const Tiling& tiling, int64_t image, int64_t position, int count, const Dot& dot) const {
    Memory<T>& memory = shared<Memory<T>>();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int64_t p = image * tiling.shape.positions + position + i;
      const A s = dot(i) + (grad_attention == nullptr ? A(0) : grad_attention[p]);
      memory.share[i] = attention[p];
      memory.weight[i] = score_grad(attention[p], s, delta, grad_scores == nullptr ? A(0) : grad_scores[p]);
    }
  }
  ATTNKERN_DEVICE void add(const Tiling& tiling, int64_t c, bool fresh, A value) const {
    A& to = sums[block_index() * tiling.shape.channels + c];
    to = fresh ? value : to + value;
  }
  ATTNKERN_DEVICE void end(const Tiling& tiling, int64_t image) const {
    if (!direct)
      return;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < tiling.shape.channels; c += kThreads)
      grad_query.store(image * tiling.shape.channels + c, sums[image * tiling.shape.channels + c]);
  }
};

// What scores are formed with, and the query in the backward pass: 0 behind the last channel.
template <typename T, typename Pass>
ATTNKERN_DEVICE Wide<T> first_of(const Tiling& tiling, const Pass& pass, int64_t image, int64_t c) {
  if (c < kCached<T>)
    return shared<Memory<T>>().first[c];
  return c < tiling.shape.channels ? pass.first(tiling, image, c) : Wide<T>(0);
}
template <typename T, typename Pass>
ATTNKERN_DEVICE Wide<T> second_of(const Tiling& tiling, const Pass& pass, int64_t image, int64_t c) {
  if (c < kCached<T>)
    return shared<Memory<T>>().second[c];
  return c < tiling.shape.channels ? pass.second(tiling, image, c) : Wide<T>(0);
}

// The walk where positions are innermost. A thread has one vector of positions, of every rows-th channel.
template <typename T, int kWidth, typename Pass>
ATTNKERN_DEVICE void walk_tile(const Tiling& tiling, Pass& pass, const T* local, int64_t image, int64_t position,
                               bool fresh, std::false_type) {
  using A = Wide<T>;
  constexpr int V = kVector<T>;
  const int64_t channels = tiling.shape.channels, positions = tiling.shape.positions;
  const int x = threadIdx.x % tiling.vectors, rows = tiling.rows;
  int y = threadIdx.x / tiling.vectors;
  const int count = static_cast<int>(std::min<int64_t>(tiling.tile, positions - position)), valid = count - x * V;
  const int64_t offset = image * tiling.shape.image_size() + position + x * V;
  Memory<T>& memory = shared<Memory<T>>();

  Packed<T> kept[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t c = y + i * rows;
    kept[i] = load_parts<kWidth>(local + offset + c * positions, c < channels ? valid : 0);
  }
  forget(y);
  A by_position[V] = {};
  const auto add_scores = [&](const Packed<T>& vector, A weight) {
#pragma unroll
    for (int k = 0; k < V; ++k)
      by_position[k] = std::fma(weight, vector[k], by_position[k]);
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    add_scores(kept[i], memory.first[y + i * rows]);
  for (int64_t c = y + kKept * rows; c < channels; c += rows)
    add_scores(load_parts<kWidth>(local + offset + c * positions, valid), first_of<T>(tiling, pass, image, c));
#pragma unroll
  for (int k = 0; k < V; ++k)
    memory.sums[threadIdx.x * V + k] = by_position[k];
  __syncthreads();
  pass.weigh(tiling, image, position, count, [&](int i) {
    A score = 0;
    for (int row = 0; row < rows; ++row)
      score += memory.sums[row * tiling.tile + i];
    return score;
  });
  __syncthreads();

  forget(y);
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    forget(kept[i]);
  A weight[V], share[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    weight[k] = k < valid ? memory.weight[x * V + k] : A(0);
    share[k] = Pass::kWrites && k < valid ? memory.share[x * V + k] : A(0);
  }
  const auto weigh = [&](const Packed<T>& vector) {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < V; ++k)
      sum = std::fma(weight[k], vector[k], sum);
    return sum;
  };
  const auto deliver = [&](int64_t c, A sum) {
    if (c >= channels)
      return;
    if (x == 0)
      pass.add(tiling, c, fresh, sum);
    if constexpr (Pass::kWrites)
      if (pass.grad_local != nullptr) {
        const A first = first_of<T>(tiling, pass, image, c), second = second_of<T>(tiling, pass, image, c);
        A grad[V];
#pragma unroll
        for (int k = 0; k < V; ++k)
          grad[k] = std::fma(share[k], first, weight[k] * second);
        store_parts<kWidth>(grad, pass.grad_local + offset + c * positions, valid);
      }
  };
  constexpr int kGroup = 4;
#pragma unroll
  for (int i = 0; i < kKept; i += kGroup) {
    A sums[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
      sums[g] = weigh(kept[i + g]);
    reduce_each(sums, tiling.vectors);
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
      deliver(y + (i + g) * rows, sums[g]);
  }
  for (int64_t begin = kKept * rows; begin < channels; begin += rows) { // equally often in every lane
    const int64_t c = begin + y;
    const Packed<T> vector = load_parts<kWidth>(local + offset + c * positions, c < channels ? valid : 0);
    A sum[1] = {weigh(vector)};
    reduce_each(sum, tiling.vectors);
    deliver(c, sum[0]);
  }
}

// The walk where channels are innermost. A thread has vectors of channels, of every rows-th position.
template <typename T, int kWidth, typename Pass>
ATTNKERN_DEVICE void walk_tile(const Tiling& tiling, Pass& pass, const T* local, int64_t image, int64_t position,
                               bool fresh, std::true_type) {
  using A = Wide<T>;
  constexpr int V = kVector<T>;
  const int64_t channels = tiling.shape.channels, width = tiling.vectors * V;
  const int x = threadIdx.x % tiling.vectors, rows = tiling.rows;
  int y = threadIdx.x / tiling.vectors;
  const int count = static_cast<int>(std::min<int64_t>(tiling.tile, tiling.shape.positions - position));
  const int64_t offset = image * tiling.shape.image_size() + position * channels;
  Memory<T>& memory = shared<Memory<T>>();

  Packed<T> kept[kKeptInner];
#pragma unroll
  for (int i = 0; i < kKeptInner; ++i) {
    const int row = y + i * rows;
    kept[i] = load_parts<kWidth>(local + offset + row * channels + x * V, row < count ? channels - x * V : 0);
  }
  // The vector of this thread's i-th position at channel c, one of those from `begin` on.
  const auto vector_at = [&](int i, int64_t begin, int64_t c) {
    const int row = y + i * rows;
    return begin == 0 ? kept[i]
                      : load_parts<kWidth>(local + offset + row * channels + c, row < count ? channels - c : 0);
  };
  forget(y);
  A by_position[kKeptInner] = {};
#pragma unroll 1
  for (int64_t begin = 0; begin < channels; begin += width) {
    const int64_t c = begin + x * V;
    A first[V];
#pragma unroll
    for (int k = 0; k < V; ++k)
      first[k] = first_of<T>(tiling, pass, image, c + k);
#pragma unroll
    for (int i = 0; i < kKeptInner; ++i) {
      const Packed<T> vector = vector_at(i, begin, c);
#pragma unroll
      for (int k = 0; k < V; ++k)
        by_position[i] = std::fma(first[k], vector[k], by_position[i]);
    }
  }
  forget(y);
  const int lanes = tiling.vectors < kWarp ? tiling.vectors : kWarp, parts = tiling.vectors / lanes;
  reduce_each(by_position, lanes);
#pragma unroll
  for (int i = 0; i < kKeptInner; ++i)
    if (x % lanes == 0 && y + i * rows < count)
      memory.sums[(y + i * rows) * parts + x / lanes] = by_position[i];
  __syncthreads();
  pass.weigh(tiling, image, position, count, [&](int i) {
    A score = 0;
    for (int part = 0; part < parts; ++part)
      score += memory.sums[i * parts + part];
    return score;
  });

  forget(y);
#pragma unroll
  for (int i = 0; i < kKeptInner; ++i)
    forget(kept[i]);
#pragma unroll 1
  for (int64_t begin = 0; begin < channels; begin += width) {
    __syncthreads(); // the sums have been read, the weights are written
    const int64_t c = begin + x * V;
    A first[V], second[V], by_channel[V] = {};
#pragma unroll
    for (int k = 0; k < V; ++k) {
      first[k] = Pass::kWrites ? first_of<T>(tiling, pass, image, c + k) : A(0);
      second[k] = Pass::kWrites ? second_of<T>(tiling, pass, image, c + k) : A(0);
    }
#pragma unroll
    for (int i = 0; i < kKeptInner; ++i) {
      const int row = y + i * rows;
      if (row >= count)
        continue;
      const Packed<T> vector = vector_at(i, begin, c);
      const A weight = memory.weight[row];
#pragma unroll
      for (int k = 0; k < V; ++k)
        by_channel[k] = std::fma(weight, vector[k], by_channel[k]);
      if constexpr (Pass::kWrites)
        if (pass.grad_local != nullptr) {
          A grad[V];
#pragma unroll
          for (int k = 0; k < V; ++k)
            grad[k] = std::fma(memory.share[row], first[k], weight * second[k]);
          store_parts<kWidth>(grad, pass.grad_local + offset + row * channels + c, channels - c);
        }
    }
#pragma unroll
    for (int k = 0; k < V; ++k)
      memory.sums[threadIdx.x * V + k] = by_channel[k];
    __syncthreads();
    for (int i = threadIdx.x; i < width && begin + i < channels; i += kThreads) {
      A sum = 0;
      for (int row = 0; row < rows; ++row)
        sum += memory.sums[row * width + i];
      pass.add(tiling, begin + i, fresh, sum);
    }
  }
}

// Two blocks on a multiprocessor, one loading while the other adds; double's exponentials take too many registers.
template <typename T, int kWidth, bool kChannelsInner, typename Pass>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
pool_kernel(Tiling tiling, Pass pass, const T* __restrict__ local) {
  const int64_t image = block_index() / tiling.splits, split = block_index() % tiling.splits;
  if (image >= tiling.shape.images)
    return;
  Memory<T>& memory = shared<Memory<T>>();
  for (int c = threadIdx.x; c < kCached<T>; c += kThreads) {
    memory.first[c] = c < tiling.shape.channels ? pass.first(tiling, image, c) : Wide<T>(0);
    memory.second[c] = c < tiling.shape.channels ? pass.second(tiling, image, c) : Wide<T>(0);
  }
  pass.begin(tiling, image);
  const int64_t span = tiling.tiles_per_split * tiling.tile, begin = split * span;
  for (int64_t position = begin; position < std::min(tiling.shape.positions, begin + span); position += tiling.tile) {
    __syncthreads();
    walk_tile<T, kWidth>(tiling, pass, local, image, position, position == begin,
                         std::bool_constant<kChannelsInner>{});
  }
  pass.end(tiling, image);
}

// Σ over the rows of each group of (groups, rows, C), in an order that follows from the number of rows.
template <typename A>
__global__ void __launch_bounds__(kThreads)
add_rows(const A* from, int64_t groups, int64_t rows, int64_t channels, MutableCompanion to) {
  struct Lanes {
    A of[kThreads];
  };
  const int64_t tiles = ceil_div(channels, kWarp), group = block_index() / tiles;
  if (group >= groups)
    return;
  const int64_t c = block_index() % tiles * kWarp + threadIdx.x % kWarp;
  A sum = 0;
  if (c < channels)
#pragma unroll 4
    for (int64_t row = threadIdx.x / kWarp; row < rows; row += kThreads / kWarp)
      sum += from[(group * rows + row) * channels + c];
  A* lanes = shared<Lanes>().of;
  lanes[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp || c >= channels)
    return;
  for (int i = kWarp + threadIdx.x; i < kThreads; i += kWarp)
    sum += lanes[i];
  to.store(group * channels + c, sum);
}

// --- operators ---

// Launches the walk for the layout and the widest accesses that rows and addresses allow.
template <typename T, typename Pass>
void launch_pool(const Queue& queue, const Tiling& tiling, const Pass& pass, const T* local, const T* grad_local) {
  const Shape& shape = tiling.shape;
  const auto allows = [&](int width) {
    const auto aligned = [&](const T* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (width * sizeof(T)) == 0;
    };
    return (shape.channels_inner ? shape.channels : shape.positions) % width == 0 && aligned(local) &&
           aligned(grad_local);
  };
  const auto launch = [&](auto width, auto inner) {
    queue.launch(pool_kernel<T, width(), inner(), Pass>, shape.images * tiling.splits, kThreads, 0, tiling, pass,
                 local);
  };
  constexpr int V = kVector<T>;
  using Whole = std::integral_constant<int, V>;
  using Half = std::integral_constant<int, V / 2>;
  using Single = std::integral_constant<int, 1>;
  if (shape.channels_inner) {
    allows(V) ? launch(Whole{}, std::true_type{}) : launch(Single{}, std::true_type{});
  } else if (allows(V)) {
    launch(Whole{}, std::false_type{});
  } else {
    if constexpr (V == 8) // 14x14 in half precision
      if (allows(V / 2))
        return launch(Half{}, std::false_type{});
    launch(Single{}, std::false_type{});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_fwd(Tensor local, Tensor query) {
  make_dense(local);
  make_contiguous(query);
  const Queue queue(local);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Shape shape(local);
    const Tiling tiling(shape, kVector<T>);
    const int64_t n = shape.images, c = shape.channels, blocks = n * tiling.splits;
    Tensor pooled = empty<T>(local, {n, c});
    Tensor attention = local.dim() == 4 ? empty<A>(local, {n, local.size(2), local.size(3)})
                                        : empty<A>(local, {n, local.size(2)});
    Tensor scores = empty_like<A>(attention);
    Tensor pooled_wide = std::is_same_v<T, A> ? empty<A>(local, {0}) : empty<A>(local, {n, c});
    Tensor scratch = empty<A>(local, {blocks * (c + 2)});
    A* sums = mutable_data<A>(scratch);
    const Forward<T> forward{query, query.dim() == 1, mutable_data<A>(scores), sums, sums + blocks * c,
                             mutable_data<T>(pooled), std::is_same_v<T, A> ? nullptr : mutable_data<A>(pooled_wide),
                             mutable_data<A>(attention)};
    launch_pool<T>(queue, tiling, forward, data<T>(local), nullptr);
    if (tiling.splits > 1) {
      const int64_t slices = ceil_div(std::max(c, shape.positions), 4 * kThreads);
      queue.launch(pool_finish<T>, n * slices, kThreads, 0, tiling, forward, slices);
    }
    return std::tuple(pooled, attention, scores, pooled_wide);
  });
}

std::tuple<Tensor, Tensor> pool_bwd(std::optional<Tensor> grad_pooled, std::optional<Tensor> grad_attention,
                                    std::optional<Tensor> grad_scores, Tensor local, Tensor query, Tensor attention,
                                    Tensor pooled_wide, bool need_grad_local) {
  make_dense(local);
  make_contiguous(grad_pooled, grad_attention, grad_scores, query, attention, pooled_wide);
  const Queue queue(local);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Shape shape(local);
    const Tiling tiling(shape, kVector<T>);
    Tensor grad_local = features_grad<T>(local, need_grad_local);
    Tensor grad_query = empty_same(query);
    if (shape.images == 0 || shape.channels == 0)
      return std::tuple(grad_local, torch::stable::zero_(grad_query));
    const bool shared_query = query.dim() == 1, direct = tiling.splits == 1 && (!shared_query || shape.images == 1);
    Tensor scratch = empty<A>(local, {shape.images, tiling.splits, shape.channels});
    const Backward<T> backward{data<T>(grad_pooled), data<A>(grad_attention), data<A>(grad_scores), query,
                               shared_query, data<A>(attention), data<A>(pooled_wide),
                               need_grad_local ? mutable_data<T>(grad_local) : nullptr, mutable_data<A>(scratch),
                               direct, grad_query};
    launch_pool<T>(queue, tiling, backward, data<T>(local), backward.grad_local);
    if (!direct) {
      const int64_t groups = shared_query ? 1 : shape.images, rows = shape.images * tiling.splits / groups;
      queue.launch(add_rows<A>, groups * ceil_div(shape.channels, kWarp), kThreads, 0, data<A>(scratch), groups, rows,
                   shape.channels, MutableCompanion(grad_query));
    }
    return std::tuple(grad_local, grad_query);
  });
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("pool_fwd", TORCH_BOX(&pool_fwd));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

} // namespace attnkern
