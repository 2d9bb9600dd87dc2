// Features times a map, forward and backward, by tiles of one image: what window and anchor attention have in common.
//
// A column is what shares a number of the map. With channels innermost it is a position. With positions innermost,
// `span` channels are taken as one row, so that rows start at whole vectors however odd the map (8 x 7x7 in bfloat16),
// and a column is an element of such a row. A tile is some columns of some rows (with channels innermost: of all).
#pragma once

#include "cuda/packed.cuh"

#include <numeric>

namespace attnkern {

constexpr int kThreads = 256;        // of every block here
constexpr int kTileElements = 32768; // of the features, at most; what a tile's map costs is spread over them
constexpr int kMaxLanes = 64;        // along a row: many rows share a column's number of the map
constexpr int kMaxColumns = 512;     // of a tile
template <typename T> constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3; // of a multiprocessor at once, by registers

struct Tiling {
  Shape shape;
  int64_t columns = 0, rows = 1; // of an image
  int64_t column_tiles = 1, row_tiles = 1;
  int64_t rows_per_tile = 1;
  int width = 1;  // columns of a tile
  int groups = 1; // of threads, each with rows (channels innermost: columns) of its own
  int lanes = 1;  // threads of a group
  int passes = 1; // of a group over a row (channels innermost: column)
  int64_t stride; // from a thread's last vector of a row (channels innermost: column) to its first one of the next
  bool aligned;   // every vector may be read and written at once; no result depends on it

  template <typename T, typename... Pointers> static Tiling of(const Shape& shape, const Pointers*... features) {
    static_assert(kMaxLanes * kVector<T> <= kMaxColumns, "a tile's columns have room");
    Tiling tiling(shape, kVector<T>);
    const int64_t length = shape.channels_inner ? shape.channels : shape.image_size(); // that follow each other
    tiling.aligned = length % kVector<T> == 0 && (... && is_aligned(features));
    return tiling;
  }
  ATTNKERN_INLINE int64_t tiles() const { return column_tiles * row_tiles; }
  // Whether a tile has all channels of its positions.
  ATTNKERN_INLINE bool complete() const {
    return row_tiles == 1 && (column_tiles == 1 || columns == shape.positions);
  }

private:
  // From the shape of an image, the layout and the vector's length only.
  Tiling(const Shape& features, int vector) : shape(features) {
    const int64_t channels = std::max<int64_t>(1, shape.channels), size = channels * shape.positions;
    // An image of a few tiles has smaller ones, so that a batch of them keeps a whole device busy.
    const int64_t elements = size > kTileElements && size < 8 * kTileElements ? kTileElements / 2 : kTileElements;
    if (shape.channels_inner) {
      columns = shape.positions;
      const int64_t vectors = ceil_div(channels, vector);
      while (lanes < kWarp && lanes < vectors)
        lanes *= 2;
      while (lanes > 4 && 8 * ceil_div(vectors, lanes) * lanes > 9 * vectors) // too many would have nothing to do
        lanes /= 2;
      passes = static_cast<int>(ceil_div(vectors, lanes));
      groups = kThreads / lanes;
      const int64_t each = std::max<int64_t>(1, (elements / channels + groups / 2) / groups); // columns of a group
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
  int64_t image, in_image; // which
  int64_t column, row;     // the first of it
  int width;

  ATTNKERN_DEVICE Tile(const Tiling& tiling, int64_t index)
      : image(divide(index, tiling.tiles())), in_image(index - image * tiling.tiles()) {
    const int64_t row_tile = divide(in_image, tiling.column_tiles);
    column = (in_image - row_tile * tiling.column_tiles) * tiling.width;
    row = row_tile * tiling.rows_per_tile;
    width = static_cast<int>(std::min<int64_t>(tiling.width, tiling.columns - column));
  }

  // Position of the tile's i-th column: a row has at most a few channels.
  ATTNKERN_DEVICE int64_t position(const Tiling& tiling, int i) const {
    int64_t position = column + i;
    while (position >= tiling.shape.positions)
      position -= tiling.shape.positions;
    return position;
  }
  // Exactly one tile has each position so.
  ATTNKERN_DEVICE bool owns(const Tiling& tiling, int i) const {
    return row == 0 && column + i < tiling.shape.positions;
  }
};

// The map at a tile's columns; whoever fills it waits for the block afterwards.
template <typename T> struct MapTile {
  Wide<T> of[kMaxColumns];
};
// Σ dy·x over a tile's rows, at its columns; with positions innermost first one row of them for each group.
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

// What a thread does of a tile: some vectors of each of its items, which are rows, or columns with channels innermost.
// Making it asks for the first vectors, so that they come while the block makes the map; from then on kDepth of them
// are on their way: what it takes to keep the memory busy.
template <typename T, int kInputs> class Walk {
  static constexpr int kLength = kVector<T>;
  static constexpr int kDepth = 4 / kInputs;

  struct Cursor { // at a vector
    int64_t offset;
    int item, pass;
  };

  const Tiling& tiling_;
  const Tile& tile_;
  const T* inputs_[kInputs];
  int64_t offset_;    // of the first vector
  int group_;         // this thread has the items group_, group_ + groups, ... of the tile
  int end_ = 0;       // of the items
  int whole_ = 0;     // of them, end of those made of whole aligned vectors
  int passes_;        // vectors of an item, which may be one fewer than another thread's
  Packed<T> ahead_[kDepth][kInputs] = {};
  Cursor next_;       // to be asked for

  // With channels innermost all threads of a warp go on until the last one is done.
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
        // Only an image's last row can be cut short.
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

  // Calls use(item, values, offset, whole, valid) for each vector, items ascending, and done(item) after an item: with
  // channels innermost (kInner) every thread of a warp does that, equally often.
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

// This thread's factors in a tile with positions innermost.
template <typename T>
ATTNKERN_DEVICE void row_factors(const Tiling& tiling, Wide<T> one, Wide<T> (&factor)[kVector<T>]) {
  const Wide<T>* map = shared<MapTile<T>>().of + threadIdx.x % tiling.lanes * kVector<T>;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    factor[i] = map[i] + one;
}

// y = (map + one)·x, the features of the walk.
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

// dx = (map + one)·dy, unless dx is null, and the sums Σ dy·x of the tile's columns, ready for the block to read. The
// walk's features are dy and x.
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
  for (int i = threadIdx.x; i < tile.width; i += kThreads) { // a column's groups are read and written by one thread
    A total = sums[i];
    for (int g = 1; g < tiling.groups; ++g)
      total += sums[g * tiling.width + i];
    sums[i] = total;
  }
  __syncthreads();
}

} // namespace attnkern
