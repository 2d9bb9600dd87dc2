// Features times a map, forward and backward, in tiles of one image: the part that window and anchor attention share.
//
// A column is the set of an image's elements that are multiplied by the same value of the map. With channels innermost
// it is a position with all its channels. With positions innermost, `span` channels are joined to one row, so that rows
// start at whole vectors whatever the map (8 channels of 7x7 in bfloat16), and a column is one element of each row. A
// tile consists of some columns of some rows (of all rows with channels innermost).
#pragma once

#include "cuda/packed.cuh"

#include <numeric>

namespace attnkern {

constexpr int kThreads = 256;        // per block
constexpr int kTileElements = 32768; // per tile, at most; they share the cost of computing the tile's map
constexpr int kMaxLanes = 64;        // per row; fewer lanes leave more rows per value of the map
constexpr int kMaxColumns = 512;     // per tile
template <typename T> constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3; // per multiprocessor; this limits the registers

struct Tiling {
  Shape shape;
  int64_t columns = 0, rows = 1; // per image
  int64_t column_tiles = 1, row_tiles = 1;
  int64_t rows_per_tile = 1;
  int width = 1;  // columns per tile
  // A group of threads processes one item at a time: a row, or a column with channels innermost.
  int groups = 1; // per block
  int lanes = 1;  // threads per group
  int passes = 1; // vectors per thread and item
  int64_t stride; // from a thread's last vector of an item to its first vector of the next item
  bool aligned;   // whether all vectors allow 16-byte accesses; results do not depend on it

  template <typename T, typename... Pointers> static Tiling of(const Shape& shape, const Pointers*... features) {
    static_assert(kMaxLanes * kVector<T> <= kMaxColumns, "a tile's columns have room");
    Tiling tiling(shape, kVector<T>);
    const int64_t length = shape.channels_inner ? shape.channels : shape.image_size(); // contiguous elements
    tiling.aligned = length % kVector<T> == 0 && (... && is_aligned(features));
    return tiling;
  }
  ATTNKERN_INLINE int64_t tiles() const { return column_tiles * row_tiles; }
  // Whether a tile has all channels of its positions.
  ATTNKERN_INLINE bool complete() const {
    return row_tiles == 1 && (column_tiles == 1 || columns == shape.positions);
  }

private:
  // The tiling depends on the shape of an image, the layout and the vector length only, never on the batch.
  Tiling(const Shape& features, int vector) : shape(features) {
    const int64_t channels = std::max<int64_t>(1, shape.channels), size = channels * shape.positions;
    // Images of only a few tiles get smaller tiles, so that a batch of them fills the device.
    const int64_t elements = size > kTileElements && size < 8 * kTileElements ? kTileElements / 2 : kTileElements;
    if (shape.channels_inner) {
      columns = shape.positions;
      const int64_t vectors = ceil_div(channels, vector);
      while (lanes < kWarp && lanes < vectors)
        lanes *= 2;
      while (lanes > 4 && 8 * ceil_div(vectors, lanes) * lanes > 9 * vectors) // too many lanes would be idle
        lanes /= 2;
      passes = static_cast<int>(ceil_div(vectors, lanes));
      groups = kThreads / lanes;
      const int64_t each = std::max<int64_t>(1, (elements / channels + groups / 2) / groups); // columns per group
      column_tiles = ceil_div(columns, std::min<int64_t>(each * groups, kMaxColumns));
      if (size <= elements && columns <= kMaxColumns)
        column_tiles = 1;
      width = static_cast<int>(ceil_div(columns, column_tiles));
      stride = groups * channels - (passes - 1) * static_cast<int64_t>(lanes * vector);
      return;
    }
    const int64_t span = std::min<int64_t>(vector / std::gcd<int64_t>(vector, shape.positions), channels);
    columns = span * shape.positions;
    rows = ceil_div(shape.channels, span);
    const int64_t vectors = ceil_div(columns, vector);
    column_tiles = ceil_div(vectors, kMaxLanes);
    lanes = static_cast<int>(ceil_div(vectors, column_tiles));
    groups = kThreads / lanes;
    width = lanes * vector;
    stride = groups * columns;
    row_tiles = std::max<int64_t>(1, ceil_div(rows * width, elements));
    rows_per_tile = std::max<int64_t>(1, ceil_div(ceil_div(rows, row_tiles), groups)) * groups;
    row_tiles = std::max<int64_t>(1, ceil_div(rows, rows_per_tile));
  }
};

// A block's tile.
struct Tile {
  int64_t image, in_image; // the image, and the tile's index within it
  int64_t column, row;     // the first ones
  int width;

  ATTNKERN_DEVICE Tile(const Tiling& tiling, int64_t index)
      : image(divide(index, tiling.tiles())), in_image(index - image * tiling.tiles()) {
    const int64_t row_tile = divide(in_image, tiling.column_tiles);
    column = (in_image - row_tile * tiling.column_tiles) * tiling.width;
    row = row_tile * tiling.rows_per_tile;
    width = static_cast<int>(std::min<int64_t>(tiling.width, tiling.columns - column));
  }

  // Position of the tile's i-th column. The loop is short: a row has at most a few channels.
  ATTNKERN_DEVICE int64_t position(const Tiling& tiling, int i) const {
    int64_t position = column + i;
    while (position >= tiling.shape.positions)
      position -= tiling.shape.positions;
    return position;
  }
  // Whether this tile is the one that writes the outputs of that position; exactly one tile is.
  ATTNKERN_DEVICE bool owns(const Tiling& tiling, int i) const {
    return row == 0 && column + i < tiling.shape.positions;
  }
};

// The map at a tile's columns. The code that fills it ends with a barrier.
template <typename T> struct MapTile {
  Wide<T> of[kMaxColumns];
};
// Σ dy·x over a tile's rows for each of its columns; with positions innermost, first one row of sums per group.
template <typename T> struct SumTile {
  Wide<T> of[std::max(kMaxColumns, kThreads * kVector<T>)];
};

template <typename T>
ATTNKERN_DEVICE void store(const Wide<T> (&from)[kVector<T>], T* to, bool whole, int64_t valid) {
  if (whole)
    store_packed<kVector<T>, 1>(pack<T>(from), to, true, kVector<T>);
  else
    store_vector(from, to, valid);
}

// A thread's part of a tile: some vectors of each of its items, which are rows, or columns with channels innermost. The
// constructor starts to load the first vectors, which arrive while the block computes the map. From then on kDepth
// vectors are being loaded at any time, which is enough to saturate memory.
template <typename T, int kInputs> class Walk {
  static constexpr int kLength = kVector<T>;
  static constexpr int kDepth = 4 / kInputs;

  struct Cursor { // the position of a vector
    int64_t offset;
    int item, pass;
  };

  const Tiling& tiling_;
  const Tile& tile_;
  const T* inputs_[kInputs];
  int64_t offset_;    // of the first vector
  int group_;         // this thread processes the items group_, group_ + groups, ... of the tile
  int end_ = 0;       // of the items
  int whole_ = 0;     // end of the items that consist of whole aligned vectors
  int passes_;        // vectors per item, possibly one fewer than other threads have
  Packed<T> ahead_[kDepth][kInputs] = {};
  Cursor next_;       // the vector to load next

  // With channels innermost all threads of a warp iterate equally often.
  template <bool kInner> ATTNKERN_DEVICE int bound() const { return kInner ? end_ + group_ : end_; }
  ATTNKERN_DEVICE int64_t step() const { return tiling_.lanes * kLength; }
  template <bool kInner> ATTNKERN_DEVICE bool ends_item(const Cursor& at) const {
    return !kInner || at.pass + 1 == tiling_.passes;
  }
  template <bool kInner> ATTNKERN_DEVICE bool is_whole(const Cursor& at) const {
    return at.item < whole_ && (!kInner || at.pass < passes_);
  }
  template <bool kInner> ATTNKERN_DEVICE void advance(Cursor& at) const {
    if (ends_item<kInner>(at)) {
      at.offset += tiling_.stride;
      at.item += tiling_.groups;
      at.pass = 0;
    } else {
      at.offset += step();
      ++at.pass;
    }
  }
  template <bool kInner> ATTNKERN_DEVICE void load_next(int j) {
    if (is_whole<kInner>(next_))
#pragma unroll
      for (int k = 0; k < kInputs; ++k)
        ahead_[j][k] = load_packed<kLength, 1>(inputs_[k] + next_.offset, true, kLength);
    advance<kInner>(next_);
  }

public:
  ATTNKERN_DEVICE Walk(const Tiling& tiling, const Tile& tile, const T* const (&features)[kInputs])
      : tiling_(tiling), tile_(tile), group_(threadIdx.x / static_cast<unsigned>(tiling.lanes)) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k)
      inputs_[k] = features[k];
    const int lane = threadIdx.x - group_ * tiling.lanes;
    offset_ = tile.image * tiling.shape.image_size();
    if (tiling.shape.channels_inner) {
      const int64_t channels = tiling.shape.channels;
      offset_ += (tile.column + group_) * channels + lane * kLength;
      passes_ = tiling.passes - ((tiling.passes - 1) * step() + lane * kLength >= channels);
      end_ = tile.width;
      whole_ = tiling.aligned ? end_ : 0;
    } else {
      const int64_t row = tile.row + group_, column = tile.column + lane * kLength;
      offset_ += row * tiling.columns + column;
      passes_ = 1;
      if (group_ < tiling.groups && lane * kLength < tile.width) {
        const int64_t rows = std::min(tiling.rows - tile.row, tiling.rows_per_tile);
        end_ = static_cast<int>(rows);
        // Only the last row of an image can be incomplete.
        const bool cut = tile.row + rows == tiling.rows &&
                         column + kLength + (tiling.rows - 1) * tiling.columns > tiling.shape.image_size();
        whole_ = tiling.aligned ? end_ - cut : 0;
      }
    }
    next_ = {offset_, group_, 0};
#pragma unroll
    for (int j = 0; j < kDepth; ++j)
      tiling.shape.channels_inner ? load_next<true>(j) : load_next<false>(j);
  }

  // Calls use(item, values, offset, whole, valid) for each vector, items ascending, and done(item) after each item.
  // With channels innermost (kInner) all threads of a warp call done() equally often.
  template <bool kInner, typename Use, typename Done> ATTNKERN_DEVICE void for_each(const Use& use, const Done& done) {
    Wide<T> values[kInputs][kLength];
    for (Cursor at{offset_, group_, 0}; tiling_.aligned && at.item < bound<kInner>();)
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
#pragma unroll
        for (int k = 0; k < kInputs; ++k)
#pragma unroll
          for (int i = 0; i < kLength; ++i)
            values[k][i] = ahead_[j][k][i];
        if (is_whole<kInner>(at))
          use(at.item, values, at.offset, true, int64_t(kLength));
        load_next<kInner>(j);
        if (ends_item<kInner>(at))
          done(at.item);
        advance<kInner>(at);
      }
    if (whole_ == end_)
      return;
    const int lane = threadIdx.x - group_ * tiling_.lanes;
    const int64_t in_item = (kInner ? tiling_.shape.channels : tiling_.columns - tile_.column) - lane * kLength;
    const int64_t image_end = (tile_.image + 1) * tiling_.shape.image_size();
#pragma unroll 1
    for (Cursor at{offset_, group_, 0}; at.item < bound<kInner>(); advance<kInner>(at)) {
      if (tiling_.aligned && at.item < whole_)
        continue;
      const int64_t valid = std::min(in_item - at.pass * step(), image_end - at.offset);
      if (at.item < end_ && valid > 0) {
#pragma unroll
        for (int k = 0; k < kInputs; ++k)
          load_vector(inputs_[k] + at.offset, valid, values[k]);
        use(at.item, values, at.offset, false, valid);
      }
      if (ends_item<kInner>(at))
        done(at.item);
    }
  }
};

// The factors map + one of this thread's columns, with positions innermost.
template <typename T>
ATTNKERN_DEVICE void row_factors(const Tiling& tiling, Wide<T> one, Wide<T> (&factor)[kVector<T>]) {
  const Wide<T>* map = shared<MapTile<T>>().of + threadIdx.x % tiling.lanes * kVector<T>;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    factor[i] = map[i] + one;
}

// y = (map + one)·x, where x is the walk's input.
template <typename T>
ATTNKERN_DEVICE void modulate(const Tiling& tiling, Walk<T, 1>& walk, Wide<T> one, T* __restrict__ y) {
  using A = Wide<T>;
  const auto done = [](int) {};
  if (tiling.shape.channels_inner) {
    const A* map = shared<MapTile<T>>().of;
    const auto use = [&](int column, A(&values)[1][kVector<T>], int64_t offset, bool whole, int64_t valid) {
      const A factor = map[column] + one;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        values[0][i] *= factor;
      store(values[0], y + offset, whole, valid);
    };
    walk.template for_each<true>(use, done);
    return;
  }
  A factor[kVector<T>];
  row_factors<T>(tiling, one, factor);
  const auto use = [&](int, A(&values)[1][kVector<T>], int64_t offset, bool whole, int64_t valid) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      values[0][i] *= factor[i];
    store(values[0], y + offset, whole, valid);
  };
  walk.template for_each<false>(use, done);
}

// dx = (map + one)·dy, unless dx is null, and the sums Σ dy·x of the tile's columns in SumTile, followed by a barrier.
// The walk's inputs are dy and x.
template <typename T>
ATTNKERN_DEVICE void modulate_backward(const Tiling& tiling, const Tile& tile, Walk<T, 2>& walk, Wide<T> one,
                                       T* __restrict__ dx) {
  using A = Wide<T>;
  A* sums = shared<SumTile<T>>().of;
  const bool needed = dx != nullptr;
  if (tiling.shape.channels_inner) {
    const A* map = shared<MapTile<T>>().of;
    A sum = 0;
    const auto use = [&](int column, A(&values)[2][kVector<T>], int64_t offset, bool whole, int64_t valid) {
      const A factor = map[column] + one;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        sum += values[0][i] * values[1][i], values[0][i] *= factor;
      if (needed)
        store(values[0], dx + offset, whole, valid);
    };
    const auto done = [&](int column) {
      const A total = warp_reduce(sum, tiling.lanes);
      sum = 0;
      if (column < tile.width && threadIdx.x % tiling.lanes == 0)
        sums[column] = total;
    };
    walk.template for_each<true>(use, done);
    __syncthreads();
    return;
  }
  A factor[kVector<T>], sum[kVector<T>] = {};
  row_factors<T>(tiling, one, factor);
  const auto use = [&](int, A(&values)[2][kVector<T>], int64_t offset, bool whole, int64_t valid) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      sum[i] += values[0][i] * values[1][i], values[0][i] *= factor[i];
    if (needed)
      store(values[0], dx + offset, whole, valid);
  };
  walk.template for_each<false>(use, [](int) {});
  if (static_cast<int>(threadIdx.x) < tiling.groups * tiling.lanes)
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      sums[threadIdx.x * kVector<T> + i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < tile.width; i += kThreads) { // one thread reads and writes all sums of a column
    A total = sums[i];
    for (int g = 1; g < tiling.groups; ++g)
      total += sums[g * tiling.width + i];
    sums[i] = total;
  }
  __syncthreads();
}

// Stores the sums of a tile's columns in the form of GradMap.
template <typename T> ATTNKERN_DEVICE void store_sums(const Tiling& tiling, const Tile& tile, Wide<T>* grad_map) {
  const int64_t row_tile = divide(tile.in_image, tiling.column_tiles);
  Wide<T>* to = grad_map + (tile.image * tiling.row_tiles + row_tile) * tiling.columns + tile.column;
  for (int i = threadIdx.x; i < tile.width; i += kThreads)
    to[i] = shared<SumTile<T>>().of[i];
}

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

} // namespace attnkern
