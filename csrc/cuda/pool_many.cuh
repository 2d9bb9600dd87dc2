// Pooling with many queries, or with a mask. A block owns a group of 16 queries, a split of an image's positions and a
// slice of its channels, and walks over its split one tile of positions at a time. The tile lies in shared memory. Two
// products on the tensor cores read it: scores = vectors · features and sums = weights · features, where the vectors
// are the queries and the weights come from the softmax; in the backward pass, the vectors are the gradients of the
// pooled features and the weights those of the scores.
//
// A warp owns the same channels in both products. It copies them to shared memory itself, keeps its sums in registers,
// and meets the other warps only to add up the scores.
//
// If the vectors and a tile of all channels fit into shared memory, a slice is all channels, and the features are read
// once. Otherwise many_scores() computes the scores first, and the second read of the features finds a small map in the
// L2 cache. Tiles and the order of sums depend on C, M, the positions, the dtype, the layout and the GPU, never on the
// batch.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/pool_passes.cuh"

namespace attnkern {

constexpr int kQueries = 16;   // of a block: the rows of a product
constexpr int kUnit = 32;      // channels that a warp takes together
constexpr int kUsualWarps = 8; // of a block, so that two blocks fit into a multiprocessor
// The most warps of a block, and units of a warp. The sums of a unit take 16 registers, twice as many for double.
template <typename T> constexpr int kManyWarps = sizeof(T) == 8 ? kUsualWarps : 2 * kUsualWarps;
template <typename T> constexpr int kUnits = sizeof(T) == 8 ? 2 : 3;
template <bool kInner> constexpr int kManyTile = kInner ? 16 : 32; // positions of a tile
constexpr int kMostManySplits = 64;                                // of an image
// Tiles of a split, which loads the vectors and writes sums for each query; fewer if the image has few tiles.
constexpr int kManyTiles = 4;

// Which positions take part: all without a mask.
struct Mask {
  const bool* first = nullptr;
  int64_t stride = 0; // 0 if the batch shares it

  explicit Mask(const std::optional<Tensor>& mask) {
    if (mask.has_value()) {
      first = static_cast<const bool*>(mask->const_data_ptr());
      stride = mask->size(0) > 1 ? mask->numel() / mask->size(0) : 0;
    }
  }
  ATTNKERN_DEVICE const bool* at(int64_t image, int64_t position) const {
    return first == nullptr ? nullptr : first + image * stride + position;
  }
  ATTNKERN_DEVICE bool keeps(int64_t image, int64_t position) const {
    return first == nullptr || *at(image, position);
  }
};

// How blocks divide the images, and warps a block.
struct ManyPlan {
  Shape shape;
  int64_t queries;
  Mask mask;
  bool shared_query; // whether all images have the same queries
  bool scored;       // whether many_scores() has computed the scores
  int tile, warps;
  int units;      // of a warp
  int width;      // elements per access
  int stages = 1; // tiles in shared memory: 2 if the next one is loaded while one is used
  int64_t groups, slices, splits, tiles_per_split;

  template <typename T>
  ManyPlan(const Shape& features, const Tensor& query, const std::optional<Tensor>& given, size_t shared_memory, T)
      : shape(features), queries(query.dim() == 3 ? query.size(1) : 1), mask(given) {
    shared_query = query.dim() == 1 || (query.dim() == 3 && query.size(0) == 1);
    tile = shape.channels_inner ? kManyTile<true> : kManyTile<false>;
    width = widest_piece<T>(shape.channels_inner ? shape.channels : shape.positions);
    groups = ceil_div(queries, kQueries);
    const int64_t of_image = std::max<int64_t>(1, ceil_div(shape.channels, kUnit));
    const auto divide_units = [&](int64_t count, int64_t most_warps) {
      units = static_cast<int>(ceil_div(count, most_warps));
      warps = static_cast<int>(ceil_div(count, units));
    };
    divide_units(of_image, of_image <= kUsualWarps * kUnits<T> ? kUsualWarps : kManyWarps<T>);
    scored = units > kUnits<T> || bytes<T>(true) > shared_memory;
    if (scored)
      divide_units(std::min<int64_t>(of_image, kUsualWarps), kUsualWarps);
    slices = scored ? ceil_div(shape.channels, channels()) : 1;
    const size_t resident = shared_memory / bytes<T>(true);
    stages = 2;
    if (shared_memory / bytes<T>(true) < std::min<size_t>(resident, 2)) // a second block is worth more
      stages = 1;
    const int64_t tiles = std::max<int64_t>(1, ceil_div(shape.positions, tile));
    tiles_per_split = std::max(std::min<int64_t>(ceil_div(tiles, kManyTiles), kManyTiles),
                               ceil_div(tiles, kMostManySplits));
    splits = ceil_div(tiles, tiles_per_split);
  }
  ATTNKERN_INLINE int threads() const { return warps * kWarp; }
  ATTNKERN_INLINE int channels() const { return warps * units * kUnit; } // of a slice
  // The queries of a group and the channels of a slice that exist.
  ATTNKERN_DEVICE int queries_from(int64_t first) const {
    return static_cast<int>(std::min<int64_t>(kQueries, queries - first));
  }
  ATTNKERN_DEVICE int channels_from(int64_t first) const {
    return static_cast<int>(std::min<int64_t>(channels(), shape.channels - first));
  }
  ATTNKERN_INLINE int partial_pitch() const { return tile + 8; }         // rows start in different banks
  ATTNKERN_INLINE int64_t rows() const { return shape.images * queries; }
  ATTNKERN_INLINE int64_t blocks() const { return shape.images * splits * groups * slices; }
  ATTNKERN_INLINE int64_t score_blocks() const {
    return shape.images * ceil_div(shape.positions, tile) * groups;
  }
  // Shared memory, with or without what the scores need.
  template <typename T> size_t bytes(bool scores) const {
    const size_t of_scores = scores ? channels() + warps * partial_pitch() : 0;
    return sizeof(Wide<T>) * kQueries * (of_scores + 2 * tile + 4) + sizeof(T) * stages * tile * channels();
  }
};

// What a block of pool_many() owns; `query` and `channel` are the first ones. Blocks that read the same features are
// neighbours.
struct ManyPlace {
  int64_t image, split, query, channel;

  ManyPlace() = default;
  ATTNKERN_DEVICE ManyPlace(const ManyPlan& plan, int64_t block) {
    const int64_t slices = divide(block, plan.slices), groups = divide(slices, plan.groups);
    channel = (block - slices * plan.slices) * plan.channels();
    query = (slices - groups * plan.groups) * kQueries;
    image = divide(groups, plan.splits);
    split = groups - image * plan.splits;
  }
};

// A factor a of mma() with 16 rows lies in shared memory as the lanes need it: for each step of 8 columns a vector of
// four elements for each lane. If the other factor comes in quads along k, a lane has the quad of the columns 4t, which
// belong to two steps; otherwise columns lie as in mma(). Vectors are exchanged within a step, so that those which a
// warp writes together lie in different banks.
ATTNKERN_DEVICE int vector_place(int step, int lane) {
  return (step * kWarp + (lane ^ (step / 2 % 2 + step / 4 % 2 * 4))) * 4;
}
template <bool kQuads> ATTNKERN_DEVICE int factor_place(int row, int k) {
  const int step = kQuads ? k / 16 * 2 + k / 2 % 2 : k / 8;
  const int t = kQuads ? k / 4 % 4 : k % 4;
  const int right = kQuads ? k % 2 : k / 4 % 2;
  return vector_place(step, row % 8 * 4 + t) + row / 8 + 2 * right;
}
template <typename A> ATTNKERN_DEVICE void load_factor(const A* from, int step, A (&to)[4]) {
  const Vectors<A> vector(from + vector_place(step, threadIdx.x % kWarp));
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[i] = vector[i];
}

// What the kernels read for a block of queries.
template <typename T> struct ManyForward {
  using A = Wide<T>;
  static constexpr bool kBackward = false;
  Companion vectors;    // (N or 1, M, C): the queries
  bool shared_vectors;
  bool has_vectors;     // always
  A* scores;            // (N, M, positions)
  A* sums;              // (N, M, splits, C): Σ exp(score - max)·ℓ
  A* moments;           // (N, M, splits, 2): max, Σ exp(score - max)

  ATTNKERN_DEVICE bool clears() const { return true; }
};

template <typename T> struct ManyBackward {
  using A = Wide<T>;
  static constexpr bool kBackward = true;
  Companion vectors; // (N, M, C): the gradient of the pooled features, or null
  bool shared_vectors;
  bool has_vectors;
  A* scores;               // (N, M, positions): ⟨ℓ, dg⟩ where many_scores() has computed them
  A* sums;                 // (N, M, splits, C), or (M, N, splits, C) for shared queries: Σ dc·ℓ
  const A *grad_attention; // (N, M, positions) or null
  const A *grad_scores;    // (N, M, positions) or null
  const A *attention;      // (N, M, positions)
  const A *deltas;         // (N, M)
  A *weights;              // (N, M, positions): dc

  ATTNKERN_DEVICE bool clears() const { return grad_scores == nullptr; }
};

// A warp's channels of a tile, in shared memory with those of the other warps. The rows are positions if channels are
// innermost, and channels otherwise.
template <typename T, bool kInner> struct ManyTile {
  using A = Wide<T>;
  static constexpr int kPositions = kManyTile<kInner>, kColumns = kPositions / 8;
  static constexpr bool kWhole = kIsFactor<T>;

  const ManyPlan& plan;
  T* memory; // of the tile in use
  const int lane, g, t, first; // first: the warp's first channel within the slice
  const int pitch;

  ATTNKERN_DEVICE ManyTile(const ManyPlan& plan, T* memory)
      : plan(plan), memory(memory), lane(threadIdx.x % kWarp), g(lane / 4), t(lane % 4),
        first(threadIdx.x / kWarp * plan.units * kUnit), pitch(kInner ? plan.channels() : kPositions) {}

  // Groups of four quads are exchanged within rows, so that the accesses of neighbouring lanes to different rows lie in
  // different banks.
  ATTNKERN_DEVICE T* at(int row, int column) const {
    const bool wide = kInner && plan.warps * plan.units % 2 == 0;
    return memory + row * pitch + (column ^ (wide ? row % 4 : row / 2 % 2) * 16);
  }
  ATTNKERN_DEVICE Quad<T> quad(int row, int column) const { return load_quad(at(row, column)); }

  // Copies the warp's channels; those that do not exist and positions from `count` on become zeros. `channels` exist
  // from the slice's first one on, at `from`.
  ATTNKERN_DEVICE void load(const T* from, int channels, int count) const {
    with_width<T>(plan.width, [&](auto width) {
      constexpr int kWidth = width(), kLanes = kUnit / kWidth, kRows = kWarp / kLanes;
      const int piece = lane % kLanes * kWidth;
      const int above = lane / kLanes, end = first + plan.units * kUnit;
      const int64_t stride = kInner ? plan.shape.channels : plan.shape.positions;
      if constexpr (kInner) {
        from += above * stride;
#pragma unroll 1
        for (int row = above; row < kPositions; row += kRows, from += kRows * stride)
#pragma unroll 1
          for (int c = first + piece; c < end; c += kUnit)
            copy_piece<kWidth>(at(row, c), from + c, row < count && c < channels);
      } else {
        from += (first + above) * stride + piece;
#pragma unroll 1
        for (int c = first + above; c < end; c += kRows, from += kRows * stride)
          copy_piece<kWidth>(at(c, piece), from, piece < count && c < channels);
      }
    });
  }
  // Sets the warp's channels at a position to zero.
  ATTNKERN_DEVICE void clear(int position) const {
    for (int c = first + lane; c < first + plan.units * kUnit; c += kWarp)
      *(kInner ? at(position, c) : at(c, position)) = narrow<T>(A(0));
  }

  // Adds the warp's part of the scores of 16 vectors.
  ATTNKERN_DEVICE void score(const A* vectors, A (&d)[kColumns][4]) const {
    const int begin = first / 8, end = begin + plan.units * (kUnit / 8);
    if constexpr (kInner) {
#pragma unroll 1
      for (int step = begin; step < end; step += 2) {
        A a[2][4];
        load_factor(vectors, step, a[0]);
        load_factor(vectors, step + 1, a[1]);
        const Factor<A, 4, sizeof(A) == 8> even(a[0]), odd(a[1]);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const Quad<T> q = quad(n * 8 + g, step * 8 + t * 4);
          multiply(d[n], even, Factor<A, 2, kWhole>({q[0], q[1]}));
          multiply(d[n], odd, Factor<A, 2, kWhole>({q[2], q[3]}));
        }
      }
    } else {
#pragma unroll 1
      for (int step = begin; step < end; ++step) {
        A a[4];
        load_factor(vectors, step, a);
        const Factor<A, 4, sizeof(A) == 8> factor(a);
        const Quad<T> upper = quad(step * 8 + t, g * 4), lower = quad(step * 8 + t + 4, g * 4);
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          multiply(d[n], factor, Factor<A, 2, kWhole>({upper[n], lower[n]}));
      }
    }
  }
  // The position of column 2t + odd of the n-th part of the scores.
  ATTNKERN_DEVICE int position(int n, int odd) const { return kInner ? n * 8 + 2 * t + odd : (2 * t + odd) * 4 + n; }

  // The sums of the features of a unit with 16 weights each.
  ATTNKERN_DEVICE void sum(const A* high, const A* low, int unit, A (&d)[4][4]) const {
    constexpr int kSteps = kPositions / 8;
    const int channel = first + unit * kUnit;
    const auto weights = [&](int step) {
      Factor<A, 4, sizeof(A) == 8> factor;
      load_factor(high, step, factor.high);
      if constexpr (sizeof(A) != 8)
        load_factor(low, step, factor.low);
      return factor;
    };
    if constexpr (kInner) {
#pragma unroll 1 // registers
      for (int step = 0; step < kSteps; ++step) {
        const auto factor = weights(step);
        const Quad<T> upper = quad(step * 8 + t, channel + g * 4), lower = quad(step * 8 + t + 4, channel + g * 4);
#pragma unroll
        for (int n = 0; n < 4; ++n)
          multiply(d[n], factor, Factor<A, 2, kWhole>({upper[n], lower[n]}));
      }
    } else {
#pragma unroll 1 // registers
      for (int step = 0; step < kSteps; step += 2) {
        const auto even = weights(step), odd = weights(step + 1);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const Quad<T> q = quad(channel + n * 8 + g, step * 8 + t * 4);
          multiply(d[n], even, Factor<A, 2, kWhole>({q[0], q[1]}));
          multiply(d[n], odd, Factor<A, 2, kWhole>({q[2], q[3]}));
        }
      }
    }
  }
  // The channel, within the slice, of column 2t + odd of the n-th part of a unit's sums.
  ATTNKERN_DEVICE int channel(int unit, int n, int odd) const {
    return first + unit * kUnit + (kInner ? (2 * t + odd) * 4 + n : n * 8 + 2 * t + odd);
  }
};

// A block's shared memory.
template <typename T> struct ManyMemory {
  using A = Wide<T>;
  A* vectors;            // (16, channels) as factors
  A* partial;            // (warps, 16, tile): parts of the scores
  A *high, *low;         // (16, tile): weights as factors
  A *max, *sum, *shrink; // (16): the online softmax
  A* delta;              // (16), in the backward pass
  T* tiles;              // (stages, tile, channels)

  ATTNKERN_DEVICE ManyMemory(const ManyPlan& plan, bool scores) {
    vectors = dynamic_shared<A>();
    partial = vectors + (scores ? kQueries * plan.channels() : 0);
    high = partial + (scores ? plan.warps * kQueries * plan.partial_pitch() : 0);
    low = high + kQueries * plan.tile;
    max = low + kQueries * plan.tile;
    sum = max + kQueries, shrink = sum + kQueries, delta = shrink + kQueries;
    tiles = reinterpret_cast<T*>(delta + kQueries);
  }
  // Copies the vectors of a group at the slice's channels, with zeros for what does not exist. A thread takes eight
  // channels of the rows m and m + 8, which are four vectors of factors.
  template <bool kInner, typename Pass>
  ATTNKERN_DEVICE void load_vectors(const ManyPlan& plan, const Pass& pass, const ManyPlace& place) const {
    const auto& [image, split, query, channel] = place;
    const int eighths = plan.channels() / 8;
    for (int i = threadIdx.x; i < eighths * 8; i += blockDim.x) {
      const int m = i / eighths, c = i % eighths * 8;
      A values[2][8];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int64_t row = pass.shared_vectors ? query + m + upper * 8 : image * plan.queries + query + m + upper * 8;
        const int64_t left = query + m + upper * 8 < plan.queries ? plan.shape.channels - channel - c : 0;
        pass.vectors.load_run(row * plan.shape.channels + channel + c, left, values[upper]);
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int k = kInner ? v * 2 : v, next = kInner ? k + 1 : k + 4; // of the vector's elements
        A vector[4] = {values[0][k], values[1][k], values[0][next], values[1][next]};
        store_vector4(vector, vectors + factor_place<kInner>(m, c + k));
      }
    }
  }
  // Writes a warp's part of the scores.
  template <bool kInner>
  ATTNKERN_DEVICE void write_partial(const ManyPlan& plan, const ManyTile<T, kInner>& tile,
                                     const A (&d)[ManyTile<T, kInner>::kColumns][4]) const {
    A* to = partial + threadIdx.x / kWarp * kQueries * plan.partial_pitch();
#pragma unroll
    for (int n = 0; n < ManyTile<T, kInner>::kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[(tile.g + i / 2 * 8) * plan.partial_pitch() + tile.position(n, i % 2)] = d[n][i];
  }
  ATTNKERN_DEVICE A read_partial(const ManyPlan& plan, int m, int p) const {
    A score = 0;
    for (int w = 0; w < plan.warps; ++w)
      score += partial[(w * kQueries + m) * plan.partial_pitch() + p];
    return score;
  }
};

// The scores of a tile of positions, from all channels, for features that do not fit into a block.
template <typename T, bool kInner, typename Pass>
__global__ void __launch_bounds__(kUsualWarps * kWarp)
    many_scores(ManyPlan plan, Pass pass, const T* __restrict__ local) {
  using A = Wide<T>;
  constexpr int kTile = kManyTile<kInner>;
  const Shape& shape = plan.shape;
  const int64_t tiles = ceil_div(shape.positions, kTile), block = block_index(), rest = divide(block, plan.groups);
  const int64_t image = divide(rest, tiles), query = (block - rest * plan.groups) * kQueries;
  const int64_t position = (rest - image * tiles) * kTile;
  if (image >= shape.images)
    return;
  const int count = static_cast<int>(std::min<int64_t>(kTile, shape.positions - position));
  const ManyMemory<T> memory(plan, true);
  const ManyTile<T, kInner> tile(plan, memory.tiles);
  A d[ManyTile<T, kInner>::kColumns][4] = {};
  ManyPlace place;
  place.image = image, place.query = query;
  for (int64_t channel = 0; channel < shape.channels; channel += plan.channels()) {
    const int64_t offset = kInner ? position * shape.channels + channel : channel * shape.positions + position;
    __syncthreads(); // the vectors have been read
    tile.load(local + image * shape.image_size() + offset, plan.channels_from(channel), count);
    commit_copies();
    place.channel = channel;
    memory.template load_vectors<kInner>(plan, pass, place);
    wait_for_copies<0>();
    __syncthreads();
    tile.score(memory.vectors, d);
  }
  memory.write_partial(plan, tile, d);
  __syncthreads();
  for (int i = threadIdx.x; i < kQueries * kTile; i += blockDim.x)
    if (const int m = i / kTile, p = i % kTile; p < count && query + m < plan.queries)
      pass.scores[(image * plan.queries + query + m) * shape.positions + position + p] = memory.read_partial(plan, m, p);
}

// Writes a block's sums, and in the forward pass what the softmax of the whole image needs.
template <typename T, bool kInner, typename Pass, typename A>
ATTNKERN_DEVICE void write_sums(const ManyPlan& plan, const Pass& pass, const ManyMemory<T>& memory,
                                const ManyTile<T, kInner>& tile, const A (&sums)[kUnits<T>][4][4],
                                const ManyPlace& place) {
  const int64_t row = place.image * plan.queries + place.query;
  const int existing = plan.queries_from(place.query), channels = plan.channels_from(place.channel);
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int m = tile.g + upper * 8;
    const bool batch_first = !Pass::kBackward || !plan.shared_query;
    const int64_t of = batch_first ? row + m : (place.query + m) * plan.shape.images + place.image;
    A* to = pass.sums + (of * plan.splits + place.split) * plan.shape.channels + place.channel;
#pragma unroll
    for (int u = 0; u < kUnits<T>; ++u)
      if (u < plan.units && m < existing)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const A values[4] = {sums[u][0][upper * 2 + odd], sums[u][1][upper * 2 + odd], sums[u][2][upper * 2 + odd],
                               sums[u][3][upper * 2 + odd]};
          if (kInner && plan.shape.channels % 4 == 0) { // four neighbours
            if (const int c = tile.channel(u, 0, odd); c < channels)
              store_vector4(values, to + c);
          } else {
#pragma unroll
            for (int n = 0; n < 4; ++n)
              if (const int c = tile.channel(u, n, odd); c < channels)
                to[c] = values[n];
          }
        }
  }
  if constexpr (!Pass::kBackward)
    if (threadIdx.x < existing && place.channel == 0) {
      A* moments = pass.moments + 2 * ((row + threadIdx.x) * plan.splits + place.split);
      moments[0] = memory.max[threadIdx.x];
      moments[1] = memory.sum[threadIdx.x];
    }
}

template <typename T, bool kInner, typename Pass>
__global__ void __launch_bounds__(kManyWarps<T>* kWarp, 1)
    pool_many(ManyPlan plan, Pass pass, const T* __restrict__ local) {
  using A = Wide<T>;
  constexpr int kTile = kManyTile<kInner>;
  const Shape& shape = plan.shape;
  const ManyPlace place(plan, block_index());
  if (place.image >= shape.images)
    return;
  const ManyMemory<T> memory(plan, !plan.scored);
  ManyTile<T, kInner> tile(plan, memory.tiles);
  const bool scores_here = !plan.scored && pass.has_vectors, writes = place.channel == 0;
  const int existing = plan.queries_from(place.query), channels = plan.channels_from(place.channel);
  const int64_t row = place.image * plan.queries + place.query, begin = place.split * plan.tiles_per_split * kTile;
  int left = static_cast<int>(std::min(shape.positions - begin, plan.tiles_per_split * kTile)); // positions
  const T* from = local + place.image * shape.image_size() +
                  (kInner ? begin * shape.channels + place.channel : place.channel * shape.positions + begin);
  int64_t first = row * shape.positions + begin; // of the first query's map
  const bool* mask = plan.mask.at(place.image, begin);
  if (threadIdx.x < kQueries) {
    memory.max[threadIdx.x] = -INFINITY;
    memory.sum[threadIdx.x] = 0;
    memory.shrink[threadIdx.x] = 1;
    if constexpr (Pass::kBackward)
      memory.delta[threadIdx.x] = threadIdx.x < existing ? pass.deltas[row + threadIdx.x] : A(0);
  }
  // Starts to copy the next tile, of which `count` positions exist.
  const auto load = [&](int count) {
    if (count > 0)
      tile.load(from, channels, count);
    commit_copies();
    from += kInner ? kTile * shape.channels : kTile;
  };
  load(left);
  if (scores_here)
    memory.template load_vectors<kInner>(plan, pass, place);
  __syncthreads();
  A sums[kUnits<T>][4][4] = {};
#pragma unroll 1
  for (; left > 0; left -= kTile, first += kTile) {
    T* const other = plan.stages == 1 || tile.memory != memory.tiles ? memory.tiles : tile.memory + kTile * plan.channels();
    if (plan.stages == 2) {
      T* const current = tile.memory;
      tile.memory = other;
      load(left - kTile);
      tile.memory = current;
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncwarp();
    if (scores_here) {
      A d[ManyTile<T, kInner>::kColumns][4] = {};
      tile.score(memory.vectors, d);
      memory.write_partial(plan, tile, d);
      __syncthreads();
    }
    // A thread has one query and one position at a time; the threads of a query are neighbours within a warp.
#pragma unroll 1
    for (int i = threadIdx.x; i < kQueries * kTile; i += blockDim.x) {
      const int m = i / kTile, p = i % kTile;
      const bool exists = p < left && m < existing, kept = exists && (mask == nullptr || mask[p]);
      const int64_t at = first + m * shape.positions + p;
      A score = 0, weight = 0;
      if (scores_here)
        score = memory.read_partial(plan, m, p);
      else if (pass.has_vectors && exists)
        score = pass.scores[at];
      if constexpr (!Pass::kBackward) {
        if (scores_here && exists)
          pass.scores[at] = score;
        const A max = memory.max[m];
        const A highest = Max()(max, warp_reduce<Max>(kept ? score : -A(INFINITY), kTile));
        weight = kept ? softmax_weight(score, highest) : A(0);
        const A total = warp_reduce(weight, kTile), shrink = softmax_weight(max, highest);
        if (p == 0) {
          memory.sum[m] = std::fma(memory.sum[m], shrink, total);
          memory.max[m] = highest;
          memory.shrink[m] = shrink;
        }
      } else if (exists) {
        const A direct = pass.grad_scores == nullptr ? A(0) : pass.grad_scores[at];
        const A more = pass.grad_attention == nullptr ? A(0) : pass.grad_attention[at];
        weight = kept ? score_grad(pass.attention[at], score + more, memory.delta[m], direct) : direct;
        if (writes)
          pass.weights[at] = weight;
      }
      A high, low;
      split_factor(weight, high, low);
      memory.high[factor_place<!kInner>(m, p)] = high;
      memory.low[factor_place<!kInner>(m, p)] = low;
    }
    // What stands at a masked position must not reach the sums, not even multiplied by zero. In the backward pass it
    // does if the scores have a gradient.
    if (mask != nullptr) {
      if (pass.clears())
        for (int p = 0; p < kTile && p < left; ++p)
          if (!mask[p])
            tile.clear(p);
      mask += kTile;
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kUnits<T>; ++u)
      if (u < plan.units) {
        A d[4][4] = {};
        tile.sum(memory.high, memory.low, u, d);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const A shrink = Pass::kBackward ? A(1) : memory.shrink[tile.g + i / 2 * 8];
#pragma unroll
          for (int n = 0; n < 4; ++n)
            sums[u][n][i] = std::fma(sums[u][n][i], shrink, d[n][i]);
        }
      }
    __syncwarp(); // the warp has read its part of the tile
    tile.memory = other;
    if (plan.stages == 1)
      load(left - kTile);
    if (!scores_here)
      __syncthreads(); // all warps have read the weights
  }
  // The place is computed again, so that the loop does not keep it in registers.
  write_sums(plan, pass, memory, tile, sums, ManyPlace(plan, forgotten(block_index())));
}

} // namespace attnkern
