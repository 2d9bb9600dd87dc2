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

constexpr int kQueries = 16;        // of a block: the rows of a product
constexpr int kUnit = 32;           // channels that a warp takes together
constexpr int kManyWarps = 16;      // the most per block
constexpr int kUsualWarps = 8;      // two such blocks fit into a multiprocessor
constexpr int kMostManySplits = 64; // per image
constexpr int kFewestManySplits = 4;
constexpr int kManyTiles = 4; // of a split, to spread the cost of loading the vectors and of adding up the splits
// Units of a warp; their sums take 16 registers each per lane, twice as many for double.
template <typename T> constexpr int kUnits = sizeof(T) == 8 ? 1 : 3;
// Positions of a tile.
template <bool kInner> constexpr int kManyTile = kInner ? 16 : 32;

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
  ATTNKERN_DEVICE bool keeps(int64_t image, int64_t position) const {
    return first == nullptr || first[image * stride + position];
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
  int units; // of a warp
  int width; // elements per access
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
    divide_units(of_image, of_image <= kUsualWarps * kUnits<T> ? kUsualWarps : kManyWarps);
    scored = units > kUnits<T> || bytes<T>(true) > shared_memory;
    if (scored)
      divide_units(std::min<int64_t>(of_image, kUsualWarps * std::min(2, kUnits<T>)), kUsualWarps);
    slices = scored ? ceil_div(shape.channels, channels()) : 1;
    const int64_t tiles = std::max<int64_t>(1, ceil_div(shape.positions, tile));
    tiles_per_split = std::max(std::clamp<int64_t>(ceil_div(tiles, kFewestManySplits), 1, kManyTiles),
                               ceil_div(tiles, kMostManySplits));
    splits = ceil_div(tiles, tiles_per_split);
  }
  ATTNKERN_INLINE int threads() const { return warps * kWarp; }
  ATTNKERN_INLINE int channels() const { return warps * units * kUnit; } // of a slice
  ATTNKERN_INLINE int partial_pitch() const { return tile + 8; }         // rows start in different banks
  ATTNKERN_INLINE int64_t rows() const { return shape.images * queries; }
  ATTNKERN_INLINE int64_t blocks() const { return shape.images * splits * groups * slices; }
  ATTNKERN_INLINE int64_t score_blocks() const {
    return shape.images * ceil_div(shape.positions, tile) * groups;
  }
  // Shared memory, with or without what the scores need.
  template <typename T> size_t bytes(bool scores) const {
    const size_t of_scores = scores ? channels() + warps * partial_pitch() : 0;
    return sizeof(Wide<T>) * kQueries * (of_scores + 2 * tile + 4) + sizeof(T) * tile * channels();
  }
  // The row of the vector of a query.
  ATTNKERN_DEVICE int64_t vector_row(int64_t image, int64_t query, bool shared) const {
    return shared ? query : image * queries + query;
  }
};

// Where the element (row, k) of a factor a of mma() with 16 rows lies, so that a lane loads its four elements of a step
// of 8 columns together. If the other factor comes in quads along k, a lane has the quad of the columns 4t, and they
// belong to two steps; otherwise columns lie as in mma().
template <bool kQuads> ATTNKERN_DEVICE int factor_place(int row, int k) {
  const int step = kQuads ? k / 16 * 2 + k / 2 % 2 : k / 8;
  const int t = kQuads ? k / 4 % 4 : k % 4;
  const int right = kQuads ? k % 2 : k / 4 % 2;
  return (step * kWarp + row % 8 * 4 + t) * 4 + row / 8 + 2 * right;
}
template <typename A> ATTNKERN_DEVICE void load_factor(const A* from, int step, A (&to)[4]) {
  const Vectors<A> vector(from + (step * kWarp + threadIdx.x % kWarp) * 4);
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
};

// A warp's channels of a tile, in shared memory with those of the other warps. The rows are positions if channels are
// innermost, and channels otherwise.
template <typename T, bool kInner> struct ManyTile {
  using A = Wide<T>;
  static constexpr int kPositions = kManyTile<kInner>, kColumns = kPositions / 8;
  static constexpr bool kWhole = kIsFactor<T>;

  const ManyPlan& plan;
  T* memory;
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
  ATTNKERN_DEVICE void load(const T* from, int64_t channels, int count) const {
    with_width<T>(plan.width, [&](auto width) {
      constexpr int kWidth = width(), kLanes = kUnit / kWidth, kRows = kWarp / kLanes;
      const int piece = lane % kLanes * kWidth;
      if constexpr (kInner) {
        for (int row = lane / kLanes; row < kPositions; row += kRows)
          for (int c = first + piece, u = 0; u < plan.units; ++u, c += kUnit) {
            const bool exists = row < count && c < channels;
            copy_piece<kWidth>(at(row, c), from + (exists ? row * plan.shape.channels + c : 0), exists);
          }
      } else {
        for (int row = lane / kLanes, c = first + row; row < plan.units * kUnit; row += kRows, c += kRows) {
          const bool exists = piece < count && c < channels;
          copy_piece<kWidth>(at(c, piece), from + (exists ? c * plan.shape.positions + piece : 0), exists);
        }
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
#pragma unroll 2
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
#pragma unroll 2
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
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      const auto even = weights(step), odd = weights(step + 1);
      if constexpr (kInner) {
        const int row = step * 8 + t;
        const Quad<T> q[4] = {quad(row, channel + g * 4), quad(row + 4, channel + g * 4),
                              quad(row + 8, channel + g * 4), quad(row + 12, channel + g * 4)};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          multiply(d[n], even, Factor<A, 2, kWhole>({q[0][n], q[1][n]}));
          multiply(d[n], odd, Factor<A, 2, kWhole>({q[2][n], q[3][n]}));
        }
      } else {
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
  A *vectors;               // (16, channels) as factors
  A *partial;               // (warps, 16, tile): parts of the scores
  A *high, *low;            // (16, tile): weights as factors
  A *max, *sum, *shrink;    // (16): the online softmax
  A *delta;                 // (16), in the backward pass
  T* tile;

  ATTNKERN_DEVICE ManyMemory(const ManyPlan& plan, bool scores) {
    vectors = dynamic_shared<A>();
    partial = vectors + (scores ? kQueries * plan.channels() : 0);
    high = partial + (scores ? plan.warps * kQueries * plan.partial_pitch() : 0);
    low = high + kQueries * plan.tile;
    max = low + kQueries * plan.tile;
    sum = max + kQueries, shrink = sum + kQueries, delta = shrink + kQueries;
    tile = reinterpret_cast<T*>(delta + kQueries);
  }
  // Copies the vectors of a group at the slice's channels, with zeros for what does not exist.
  template <bool kInner, typename Pass>
  ATTNKERN_DEVICE void load_vectors(const ManyPlan& plan, const Pass& pass, int64_t image, int64_t query,
                                    int64_t channel) const {
    const int channels = plan.channels();
    for (int m = 0; m < kQueries; ++m) {
      const int64_t row = plan.vector_row(image, query + m, pass.shared_vectors) * plan.shape.channels + channel;
      for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        const bool exists = query + m < plan.queries && channel + c < plan.shape.channels;
        vectors[factor_place<kInner>(m, c)] = exists ? pass.vectors.template load<A>(row + c) : A(0);
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
  const ManyTile<T, kInner> tile(plan, memory.tile);
  A d[ManyTile<T, kInner>::kColumns][4] = {};
  for (int64_t channel = 0; channel < shape.channels; channel += plan.channels()) {
    const int64_t offset = kInner ? position * shape.channels + channel : channel * shape.positions + position;
    __syncthreads(); // the vectors have been read
    tile.load(local + image * shape.image_size() + offset, shape.channels - channel, count);
    memory.template load_vectors<kInner>(plan, pass, image, query, channel);
    wait_for_copies();
    __syncthreads();
    tile.score(memory.vectors, d);
  }
  memory.write_partial(plan, tile, d);
  __syncthreads();
  for (int i = threadIdx.x; i < kQueries * kTile; i += blockDim.x)
    if (const int m = i / kTile, p = i % kTile; p < count && query + m < plan.queries)
      pass.scores[(image * plan.queries + query + m) * shape.positions + position + p] = memory.read_partial(plan, m, p);
}

template <typename T, bool kInner, typename Pass>
__global__ void __launch_bounds__(kManyWarps* kWarp, 1)
    pool_many(ManyPlan plan, Pass pass, const T* __restrict__ local) {
  using A = Wide<T>;
  constexpr int kTile = kManyTile<kInner>;
  const Shape& shape = plan.shape;
  // Blocks that read the same features are neighbours.
  const int64_t block = block_index(), slices = divide(block, plan.slices), groups = divide(slices, plan.groups);
  const int64_t channel = (block - slices * plan.slices) * plan.channels();
  const int64_t query = (slices - groups * plan.groups) * kQueries;
  const int64_t image = divide(groups, plan.splits), split = groups - image * plan.splits;
  if (image >= shape.images)
    return;
  const bool scores_here = !plan.scored && pass.has_vectors;
  const ManyMemory<T> memory(plan, !plan.scored);
  const ManyTile<T, kInner> tile(plan, memory.tile);
  const int64_t span = plan.tiles_per_split * kTile, begin = split * span;
  const int64_t end = std::min(shape.positions, begin + span), row = image * plan.queries + query;
  const int existing = static_cast<int>(std::min<int64_t>(kQueries, plan.queries - query));
  A sums[kUnits<T>][4][4] = {};
  if (threadIdx.x < kQueries) {
    memory.max[threadIdx.x] = -INFINITY;
    memory.sum[threadIdx.x] = 0;
    memory.shrink[threadIdx.x] = 1;
    if constexpr (Pass::kBackward)
      memory.delta[threadIdx.x] = threadIdx.x < existing ? pass.deltas[row + threadIdx.x] : A(0);
  }
  const auto load = [&](int64_t position) {
    const int64_t offset = kInner ? position * shape.channels + channel : channel * shape.positions + position;
    tile.load(local + image * shape.image_size() + offset, shape.channels - channel,
              static_cast<int>(std::min<int64_t>(kTile, end - position)));
  };
  load(begin);
  if (scores_here)
    memory.template load_vectors<kInner>(plan, pass, image, query, channel);
  __syncthreads();
#pragma unroll 1
  for (int64_t position = begin; position < end; position += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, end - position));
    wait_for_copies();
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
      const bool exists = p < count && m < existing, kept = exists && plan.mask.keeps(image, position + p);
      const int64_t at = (row + m) * shape.positions + position + p;
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
        if (channel == 0)
          pass.weights[at] = weight;
      }
      A high, low;
      split_factor(weight, high, low);
      memory.high[factor_place<!kInner>(m, p)] = high;
      memory.low[factor_place<!kInner>(m, p)] = low;
    }
    // What stands at a masked position must not reach the sums, not even multiplied by zero. In the backward pass it
    // does if the scores have a gradient.
    bool clears = plan.mask.first != nullptr;
    if constexpr (Pass::kBackward)
      clears = clears && pass.grad_scores == nullptr;
    if (clears)
      for (int p = 0; p < count; ++p)
        if (!plan.mask.keeps(image, position + p))
          tile.clear(p);
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
    if (position + kTile < end)
      load(position + kTile);
    if (!scores_here)
      __syncthreads(); // all warps have read the weights
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = tile.g + i / 2 * 8;
    const bool batch_first = !Pass::kBackward || !plan.shared_query;
    const int64_t of = batch_first ? row + m : (query + m) * shape.images + image;
    A* to = pass.sums + (of * plan.splits + split) * shape.channels + channel;
#pragma unroll
    for (int u = 0; u < kUnits<T>; ++u)
#pragma unroll
      for (int n = 0; n < 4; ++n)
        if (const int c = tile.channel(u, n, i % 2); u < plan.units && m < existing && channel + c < shape.channels)
          to[c] = sums[u][n][i];
  }
  if constexpr (!Pass::kBackward)
    if (threadIdx.x < existing && channel == 0) {
      A* moments = pass.moments + 2 * ((row + threadIdx.x) * plan.splits + split);
      moments[0] = memory.max[threadIdx.x];
      moments[1] = memory.sum[threadIdx.x];
    }
}

} // namespace attnkern
