// A block of pooling with many queries (cuda/pool_many.cuh): how blocks divide the work, and a warp's part of a tile of
// features in shared memory with the products that read it.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/pool_many.h"

namespace attnkern {

constexpr int kQueries = 16;   // of a block: the rows of a product
constexpr int kUnit = 32;      // channels that a warp takes together
constexpr int kUsualWarps = 8; // of a block, so that two blocks fit into a multiprocessor
// The most warps of a block, and units of a warp. The sums of a unit take 16 registers, twice as many for double.
template <typename T> constexpr int kManyWarps = sizeof(T) == 8 ? kUsualWarps : 2 * kUsualWarps;
template <typename T> constexpr int kUnits = sizeof(T) == 8 ? 2 : 3;
template <bool kInner> constexpr int kManyTile = kInner ? 16 : 32; // positions of a tile
// Tiles of a split: few, so that an image occupies several multiprocessors, but more than one, because each split loads
// the vectors and writes sums for each query.
constexpr int kTilesOfSplit = 4, kMostManySplits = 64;

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
    shared_query = shares_query(query);
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
    for (int most = kUsualWarps; scored && (most == kUsualWarps || bytes<T>(true) > shared_memory); most /= 2)
      divide_units(std::min<int64_t>(of_image, most), most);
    slices = scored ? ceil_div(shape.channels, channels()) : 1;
    // A second block on the multiprocessor is worth more than a second stage.
    const size_t resident = std::min<size_t>(2, shared_memory / bytes<T>(true));
    stages = 2;
    if (shared_memory / bytes<T>(true) < resident)
      stages = 1;
    const int64_t tiles = std::max<int64_t>(1, ceil_div(shape.positions, tile));
    tiles_per_split = std::max<int64_t>(kTilesOfSplit, ceil_div(tiles, kMostManySplits));
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
  ATTNKERN_INLINE int partial_pitch() const { return tile + 8; } // rows start in different banks
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

// A warp's channels of a tile, in shared memory with those of the other warps. The rows are positions if channels are
// innermost, and channels otherwise.
template <typename T, bool kInner> struct ManyTile {
  using A = Wide<T>;
  static constexpr int kPositions = kManyTile<kInner>, kColumns = kPositions / 8;
  static constexpr bool kWhole = kIsFactor<T>;

  const ManyPlan& plan;
  T* memory; // the tile in use
  const int lane, g, t, first, pitch; // first: the warp's first channel within the slice

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
    const auto vector = [&](int step) {
      A a[4];
      load_factor(vectors, step, a);
      return Factor<A, 4, sizeof(A) == 8>(a);
    };
    if constexpr (kInner) {
#pragma unroll 1
      for (int step = begin; step < end; step += 2) {
        const auto even = vector(step), odd = vector(step + 1);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const Quad<T> q = quad(n * 8 + g, step * 8 + t * 4);
          add_product(d[n], even, Factor<A, 2, kWhole>({q[0], q[1]}));
          add_product(d[n], odd, Factor<A, 2, kWhole>({q[2], q[3]}));
        }
      }
    } else {
#pragma unroll 1
      for (int step = begin; step < end; ++step) {
        const auto factor = vector(step);
        const Quad<T> upper = quad(step * 8 + t, g * 4), lower = quad(step * 8 + t + 4, g * 4);
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          add_product(d[n], factor, Factor<A, 2, kWhole>({upper[n], lower[n]}));
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

} // namespace attnkern
