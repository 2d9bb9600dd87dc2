// Pooling that reads the features once. A block walks over its split of an image one tile of positions at a time and
// keeps all channels of the tile in registers. The threads write partial scores to shared memory; every warp adds them
// up and computes the weights of the tile's positions; then each thread adds its weighted features to its own sums.
//
// Tiles and the order of sums depend on C, the positions, the dtype and the layout, never on the batch.
#pragma once

#include "cuda/pool_passes.cuh"

namespace attnkern {

constexpr int kMostThreads = 512;    // per block, so that each thread has 128 registers
constexpr int kMostSplits = 64;      // per image
constexpr int kFewestSplits = 4;     // per image of more than kOneBlock elements: tiles are halved to reach it
constexpr int64_t kOneBlock = 32768; // an image of at most this many elements is one split
constexpr int kSplitThreads = 256;   // a smaller block gets several tiles, to spread the cost of its start and its sums
constexpr int kGroup = 8;            // neighbouring threads that share a row of memory
// Vectors that a thread keeps of a tile, and the most positions of a tile per lane.
template <typename T> constexpr int kKept = sizeof(T) == 8 ? 8 : 16;
template <typename T> constexpr int kPositions = std::max(1, kVector<T> / 4);

// How blocks divide the images, and threads a block.
struct PoolPlan {
  Shape shape;
  int threads;        // per block
  int tile;           // positions
  int lanes = kGroup; // threads that share a row of positions (positions innermost)
  int parts;          // partial scores per position
  int sets = 1;       // groups of threads that hold different positions (channels innermost)
  int channels;       // that the threads of a block can hold, at least C
  int width;          // elements per access
  int64_t splits, tiles_per_split;

  // Whether a block can hold all channels. With four threads per row it holds twice as many, but reads rows in shorter
  // pieces, and a map of at most 64 positions gives only one or two blocks; slices of channels give more.
  template <typename T> static bool fits(const Shape& shape) {
    if (shape.channels_inner)
      return shape.channels <= kMostThreads * kVector<T>;
    const int64_t most = kMostThreads / kGroup * kKept<T>;
    return shape.channels <= most || (shape.channels <= 2 * most && shape.positions > 64);
  }

  // The second argument only names the type of the features.
  template <typename T> PoolPlan(const Shape& features, T) : shape(features) {
    constexpr int kMost = kMostThreads / kGroup;
    const int64_t wanted = std::max<int64_t>(1, shape.channels);
    if (shape.channels_inner) {
      width = widest_piece<T>(shape.channels);
      parts = static_cast<int>(ceil_div(wanted, kGroup * kVector<T>));
      sets = kWarp * kPositions<T> / kKept<T>;
      while (sets > 1 && sets * parts > kMost)
        sets /= 2;
    } else {
      width = widest_piece<T>(shape.positions);
      lanes = ceil_div(wanted, kKept<T>) <= kMost ? kGroup : kGroup / 2;
    }
    const bool one = shape.image_size() <= kOneBlock;
    shape_block<T>();
    while (!one && ceil_div(shape.positions, tile) < kFewestSplits && halve())
      shape_block<T>();
    const int64_t tiles = std::max<int64_t>(1, ceil_div(shape.positions, tile));
    const int64_t several = std::clamp(kSplitThreads / threads, 1, 4);
    tiles_per_split = one ? tiles : std::max(std::min(tiles, several), ceil_div(tiles, kMostSplits));
    splits = ceil_div(tiles, tiles_per_split);
  }

private:
  template <typename T> void shape_block() {
    if (shape.channels_inner) {
      threads = static_cast<int>(ceil_div(sets * parts * kGroup, kWarp)) * kWarp;
      tile = sets * kKept<T>;
      channels = parts * kGroup * kVector<T>;
    } else {
      const int64_t rows = ceil_div(std::max<int64_t>(1, shape.channels), kKept<T>);
      threads = static_cast<int>(ceil_div(rows * lanes, kWarp)) * kWarp;
      tile = lanes * kVector<T>;
      parts = threads / kWarp;
      channels = threads / lanes * kKept<T>;
    }
  }
  bool halve() {
    int& divided = shape.channels_inner ? sets : lanes;
    if (divided == (shape.channels_inner ? 1 : kGroup / 2))
      return false;
    divided /= 2;
    return true;
  }
};

// A block's shared memory.
template <typename A> struct Workspace {
  A *score_vector, *query; // (channels): the vector of the scores; in the backward pass also the query
  A* partial;              // (2, parts, tile): partial scores of alternating tiles, so that a tile needs one barrier
  A *weight, *attention;   // (tile), for each warp; attention only in the backward pass

  static size_t bytes(const PoolPlan& plan, bool backward) {
    const size_t vectors = plan.channels, tile = plan.tile;
    return sizeof(A) * ((1 + backward) * (vectors + plan.threads / kWarp * tile) + 2 * plan.parts * tile);
  }
  ATTNKERN_DEVICE Workspace(const PoolPlan& plan, bool backward) {
    score_vector = dynamic_shared<A>();
    query = score_vector + plan.channels;
    partial = query + (backward ? plan.channels : 0);
    weight = partial + 2 * plan.parts * plan.tile + threadIdx.x / kWarp * ((1 + backward) * plan.tile);
    attention = weight + plan.tile;
  }
};

// A thread's part of a tile with positions innermost: one vector of positions for each of kKept consecutive channels.
// kLanes neighbouring threads hold the rows of these channels.
template <typename T, int kLanes> struct RowTile {
  using A = Wide<T>;
  static constexpr int V = kVector<T>, K = kKept<T>, kSums = K / kLanes, kRows = kWarp / kLanes;

  const PoolPlan& plan;
  const int lane, column, channel; // column: the first position within the tile; channel: the first channel
  int64_t offset = 0;              // of the first element
  int valid = 0;                   // existing positions from the first one on
  int channels = 0;                // existing channels from the first one on; 0 if no position exists
  Packed<T> kept[K];
  A sums[kSums] = {};

  ATTNKERN_DEVICE explicit RowTile(const PoolPlan& plan)
      : plan(plan), lane(threadIdx.x % kLanes), column(lane * plan.width),
        channel(threadIdx.x / kLanes * K) {}

  ATTNKERN_DEVICE void load(const T* local, int64_t image, int64_t position, int count) {
    const int64_t positions = plan.shape.positions;
    offset = image * plan.shape.image_size() + channel * positions + position + column;
    valid = count - column;
    channels = valid > 0 ? static_cast<int>(plan.shape.channels) - channel : 0;
    with_width<T>(plan.width, [&](auto width) {
      const T* from = local + offset;
#pragma unroll
      for (int i = 0; i < K; ++i, from += positions) {
        forget(from);
        kept[i] = load_packed<width(), kLanes>(from, i < channels, valid);
      }
    });
  }
  ATTNKERN_DEVICE void score(const A* score_vector, A* partial) const {
    const Vectors<A> vector(score_vector + channel);
    A dot[V] = {};
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k)
        dot[k] = std::fma(vector[i], kept[i][k], dot[k]);
    const int first = scatter_sums<V, kRows, kLanes>(dot);
    if (V < kRows && threadIdx.x / kLanes % (kRows / std::min(V, kRows)) != 0)
      return; // another lane holds the same sums
#pragma unroll
    for (int k = 0; k < std::max(1, V / kRows); ++k)
      partial[threadIdx.x / kWarp * plan.tile + column + element_offset<kLanes>(first + k, plan.width)] = dot[k];
  }
  // Multiplies the sums by `shrink` and adds the tile.
  ATTNKERN_DEVICE void add(const Workspace<A>& memory, A shrink) {
#pragma unroll
    for (int i = 0; i < K; ++i)
      forget(kept[i]);
    A weight[V], sum[K] = {};
#pragma unroll
    for (int k = 0; k < V; ++k)
      weight[k] = memory.weight[column + element_offset<kLanes>(k, plan.width)];
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k)
        sum[i] = std::fma(weight[k], kept[i][k], sum[i]);
    scatter_sums<K, kLanes, 1>(sum);
#pragma unroll
    for (int j = 0; j < kSums; ++j)
      sums[j] = std::fma(sums[j], shrink, sum[j]);
  }
  // dℓ = a·dg + dc·q.
  ATTNKERN_DEVICE void store_gradient(const Workspace<A>& memory, T* grad_local) const {
    const Vectors<A> grad_pooled(memory.score_vector + channel), query(memory.query + channel);
    A weight[V], attention[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      weight[k] = memory.weight[column + element_offset<kLanes>(k, plan.width)];
      attention[k] = memory.attention[column + element_offset<kLanes>(k, plan.width)];
    }
    T* to = grad_local + offset;
#pragma unroll
    for (int i = 0; i < K; ++i, to += plan.shape.positions) {
      A grad[V];
#pragma unroll
      for (int k = 0; k < V; ++k)
        grad[k] = std::fma(attention[k], grad_pooled[i], weight[k] * query[i]);
      forget(to);
      with_width<T>(plan.width, [&](auto width) {
        store_packed<width(), kLanes>(pack<T>(grad), to, i < channels, valid);
      });
    }
  }
  // The block's sums by channel.
  ATTNKERN_DEVICE void collect(A* to) const {
#pragma unroll
    for (int j = 0; j < kSums; ++j)
      to[channel + lane * kSums + j] = sums[j];
  }
};

// A thread's part of a tile with channels innermost: one vector of channels for each of kKept consecutive positions.
// A group of kGroup threads holds neighbouring vectors, a set of `parts` groups all channels, and `sets` sets the tile.
template <typename T> struct ColumnTile {
  using A = Wide<T>;
  static constexpr int V = kVector<T>, K = kKept<T>, kDots = K / kGroup;

  const PoolPlan& plan;
  int set, part, row, channel; // row: the first position within the tile; channel: the first channel
  int64_t offset = 0;          // of the first element
  int valid = 0;               // existing channels from the first one on
  int rows = 0;                // existing positions from the first one on; 0 if no channel exists
  Packed<T> kept[K];
  A sums[V] = {};

  ATTNKERN_DEVICE explicit ColumnTile(const PoolPlan& plan) : plan(plan) {
    const int group = threadIdx.x / kGroup;
    set = group / plan.parts;
    part = group - set * plan.parts;
    row = (set < plan.sets ? set : 0) * K;
    channel = (part * kGroup + threadIdx.x % kGroup) * V;
  }
  ATTNKERN_DEVICE void load(const T* local, int64_t image, int64_t position, int count) {
    const int64_t channels = plan.shape.channels;
    offset = image * plan.shape.image_size() + (position + row) * channels + channel;
    valid = static_cast<int>(channels) - channel;
    rows = valid > 0 && set < plan.sets ? count - row : 0;
    with_width<T>(plan.width, [&](auto width) {
      const T* from = local + offset;
#pragma unroll
      for (int i = 0; i < K; ++i, from += channels) {
        forget(from);
        kept[i] = load_packed<width(), 1>(from, i < rows, valid);
      }
    });
  }
  ATTNKERN_DEVICE void score(const A* score_vector, A* partial) const {
    const Vectors<A> vector(score_vector + channel);
    A dot[K] = {};
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k)
        dot[i] = std::fma(vector[k], kept[i][k], dot[i]);
    const int first = scatter_sums<K, kGroup, 1>(dot);
    if (set < plan.sets)
#pragma unroll
      for (int i = 0; i < kDots; ++i)
        partial[part * plan.tile + row + first + i] = dot[i];
  }
  ATTNKERN_DEVICE void add(const Workspace<A>& memory, A shrink) {
#pragma unroll
    for (int i = 0; i < K; ++i)
      forget(kept[i]);
    const Vectors<A> weight(memory.weight + row);
#pragma unroll
    for (int k = 0; k < V; ++k)
      sums[k] *= shrink;
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int k = 0; k < V; ++k)
        sums[k] = std::fma(weight[i], kept[i][k], sums[k]);
  }
  ATTNKERN_DEVICE void store_gradient(const Workspace<A>& memory, T* grad_local) const {
    const Vectors<A> grad_pooled(memory.score_vector + channel), query(memory.query + channel);
    const Vectors<A> weight(memory.weight + row), attention(memory.attention + row);
    T* to = grad_local + offset;
#pragma unroll
    for (int i = 0; i < K; ++i, to += plan.shape.channels) {
      A grad[V];
#pragma unroll
      for (int k = 0; k < V; ++k)
        grad[k] = std::fma(attention[i], grad_pooled[k], weight[i] * query[k]);
      forget(to);
      with_width<T>(plan.width, [&](auto width) { store_packed<width(), 1>(pack<T>(grad), to, i < rows, valid); });
    }
  }
  ATTNKERN_DEVICE void collect(A* to) const {
    for (int s = 0; s < plan.sets; ++s) {
      if (set == s)
#pragma unroll
        for (int k = 0; k < V; ++k)
          to[channel + k] = s == 0 ? sums[k] : to[channel + k] + sums[k];
      __syncthreads();
    }
  }
};

template <typename T, typename Tile, typename Pass>
__global__ void __launch_bounds__(kMostThreads, 1) pool_walk(PoolPlan plan, Pass pass, const T* __restrict__ local) {
  using A = Wide<T>;
  constexpr int S = kPositions<T>;
  const Shape& shape = plan.shape;
  const int64_t block = block_index(), image = divide(block, plan.splits);
  if (image >= shape.images)
    return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Workspace<A> memory(plan, Pass::kBackward);
  const int64_t span = plan.tiles_per_split * plan.tile, begin = (block - image * plan.splits) * span;
  const int64_t end = std::min(shape.positions, begin + span);
  A* partial = memory.partial;
  A max = -INFINITY, sum = 0, delta = 0;
  Tile tile(plan);
#pragma unroll 1
  for (int64_t position = begin; position < end; position += plan.tile) {
    const int count = static_cast<int>(std::min<int64_t>(plan.tile, end - position));
    const int64_t p = image * shape.positions + position + lane;
    tile.load(local, image, position, count);
    if (position == begin) { // while the first tile is being loaded
      for (int c = threadIdx.x; c < plan.channels; c += plan.threads) {
        memory.score_vector[c] = c < shape.channels ? pass.score_vector(shape, image, c) : A(0);
        if constexpr (Pass::kBackward)
          memory.query[c] = c < shape.channels ? pass.query.template load<A>(shape, image, c) : A(0);
      }
      if constexpr (Pass::kBackward)
        delta = pass.delta(shape, image);
      __syncthreads();
    }
    Position<A> given[S] = {};
    if constexpr (Pass::kBackward)
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (lane + s * kWarp < count)
          given[s] = Position<A>::load(pass, p + s * kWarp);
    tile.score(memory.score_vector, partial);
    __syncthreads();

    A dot[S] = {}, shrink = 1;
#pragma unroll
    for (int s = 0; s < S; ++s)
      if (lane + s * kWarp < plan.tile)
        for (int part = 0; part < plan.parts; ++part)
          dot[s] += partial[part * plan.tile + lane + s * kWarp];
    if constexpr (!Pass::kBackward) {
      A highest = max, total = 0;
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (lane + s * kWarp < count) {
          highest = Max()(highest, dot[s]);
          if (warp == 0)
            pass.scores[p + s * kWarp] = dot[s];
        }
      highest = warp_reduce<Max>(highest);
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (lane + s * kWarp < plan.tile) {
          const A weight = lane + s * kWarp < count ? softmax_weight(dot[s], highest) : A(0);
          memory.weight[lane + s * kWarp] = weight;
          total += weight;
        }
      shrink = softmax_weight(max, highest);
      sum = std::fma(sum, shrink, warp_reduce(total));
      max = highest;
    } else {
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (lane + s * kWarp < plan.tile) {
          const A score = pass.grad_pooled == nullptr ? A(0) : dot[s]; // not 0 times Inf
          memory.weight[lane + s * kWarp] = lane + s * kWarp < count ? given[s].weight(score, delta) : A(0);
          memory.attention[lane + s * kWarp] = given[s].attention;
        }
    }
    __syncwarp();
    tile.add(memory, shrink);
    if constexpr (Pass::kBackward)
      if (pass.grad_local != nullptr)
        tile.store_gradient(memory, pass.grad_local);
    partial = partial == memory.partial ? partial + plan.parts * plan.tile : memory.partial;
  }

  __syncthreads(); // the vectors in shared memory have been read
  A* sums = memory.score_vector;
  tile.collect(sums);
  __syncthreads();
  const bool only = plan.splits == 1;
  for (int c = threadIdx.x; c < shape.channels; c += plan.threads) {
    if constexpr (Pass::kBackward) {
      if (pass.direct)
        pass.grad_query.store(image * shape.channels + c, sums[c]);
      else
        pass.sums[block * shape.channels + c] = sums[c];
    } else if (only) {
      pass.store_pooled(image * shape.channels + c, sums[c] / sum);
    } else {
      pass.sums[block * shape.channels + c] = sums[c];
    }
  }
  if constexpr (!Pass::kBackward) {
    if (only) {
      for (int64_t p = image * shape.positions + threadIdx.x; p < (image + 1) * shape.positions; p += plan.threads)
        pass.attention[p] = softmax_weight(pass.scores[p], max) / sum;
    } else if (threadIdx.x == 0) {
      pass.moments[2 * block] = max;
      pass.moments[2 * block + 1] = sum;
    }
  }
}

} // namespace attnkern
