// Features times a map, forward and backward, by tiles of one image: what window and anchor attention have in common.
//
// A column is what shares a number of the map. With channels innermost it is a position. With positions innermost,
// `span` channels are taken as one row, so that rows start at whole vectors however odd the map (8 x 7x7 in bfloat16),
// and a column is an element of such a row. A tile is some columns of some rows (with channels innermost: of all).
#pragma once

#include "cuda/common.cuh"

#include <numeric>

namespace attnkern {

constexpr int kThreads = 256;               // of every block here
constexpr int kTileElements = 16384;        // of the features; what a tile's share of the map costs is spread over it
template <typename T> constexpr int kColumns = kThreads * kVector<T>; // of a tile, at most

struct Tiling {
  Shape shape;
  int64_t columns = 0, rows = 1; // of an image
  int64_t column_tiles = 1, row_tiles = 1;
  int64_t rows_per_tile = 1;
  int width = 1;  // columns of a tile
  int groups = 1; // of threads, each with rows (channels innermost: columns) of its own
  int lanes = 1;  // threads of a group
  bool aligned;   // every vector may be read and written at once; no result depends on it

  template <typename T, typename... Pointers> static Tiling of(const Shape& shape, const Pointers*... features) {
    Tiling tiling(shape, kVector<T>);
    const int64_t length = shape.channels_inner ? shape.channels : shape.image_size(); // that follow each other
    tiling.aligned = length % kVector<T> == 0 && (... && is_aligned(features));
    return tiling;
  }
  ATTNKERN_INLINE int64_t tiles() const { return column_tiles * row_tiles; }

private:
  // From the shape of an image, the layout and the vector's length only.
  Tiling(const Shape& features, int vector) : shape(features) {
    const int64_t channels = std::max<int64_t>(1, shape.channels);
    if (shape.channels_inner) {
      columns = shape.positions;
      while (lanes < kWarp && lanes * vector < channels)
        lanes *= 2;
      groups = kThreads / lanes;
      const int64_t wanted = std::clamp<int64_t>(kTileElements / channels, groups, kThreads * vector);
      column_tiles = ceil_div(columns, wanted);
      width = static_cast<int>(ceil_div(columns, column_tiles));
      return;
    }
    const int64_t span = std::min<int64_t>(vector / std::gcd<int64_t>(vector, shape.positions), channels);
    columns = span * shape.positions;
    rows = ceil_div(shape.channels, span);
    const int64_t vectors = ceil_div(columns, vector);
    column_tiles = ceil_div(vectors, kThreads);
    lanes = static_cast<int>(ceil_div(vectors, column_tiles));
    groups = kThreads / lanes;
    width = lanes * vector;
    rows_per_tile = ceil_div(kTileElements / width, groups) * groups;
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
  Wide<T> of[kColumns<T>];
};
// Σ dy·x over a tile's rows, at its columns.
template <typename T> struct SumTile {
  Wide<T> of[kColumns<T>];
};

// Calls body(offset in the image, whole, valid) for this thread's vectors of one column, rows ascending. `whole` and
// `valid` are constants in the fast loop, so that it has no branches and loads run ahead.
template <typename T, typename Body>
ATTNKERN_DEVICE void for_rows(const Tiling& tiling, const Tile& tile, int group, int column,
                              const Body& body) {
  const int64_t last = std::min(tiling.rows, tile.row + tiling.rows_per_tile), step = tiling.groups;
  const int64_t start = tile.column + column;
  int64_t row = tile.row + group;
  if (tiling.aligned) {
    // Only an image's last row can be cut short.
    const int64_t fast = start + kVector<T> + (tiling.rows - 1) * tiling.columns <= tiling.shape.image_size()
                             ? last
                             : std::min(last, tiling.rows - 1);
#pragma unroll 4
    for (; row < fast; row += step)
      body(row * tiling.columns + start, true, int64_t(kVector<T>));
  }
  for (; row < last; row += step) {
    const int64_t offset = row * tiling.columns + start;
    body(offset, false, std::min(int64_t(kVector<T>), std::min(tiling.columns - start, tiling.shape.image_size() - offset)));
  }
}

// y = (map + one)·x.
template <typename T>
ATTNKERN_DEVICE void modulate(const Tiling& tiling, const Tile& tile, const T* __restrict__ x, Wide<T> one,
                              T* __restrict__ y) {
  using A = Wide<T>;
  const A* map = shared<MapTile<T>>().of;
  x += tile.image * tiling.shape.image_size();
  y += tile.image * tiling.shape.image_size();
  const int lane = threadIdx.x % tiling.lanes, group = threadIdx.x / tiling.lanes;
  const auto scale = [&](int64_t offset, const A(&factor)[kVector<T>], bool whole, int64_t valid) {
    A value[kVector<T>];
    load_vector(x + offset, whole, valid, value);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      value[i] *= factor[i];
    store_vector(value, y + offset, whole, valid);
  };
  A factor[kVector<T>];
  if (tiling.shape.channels_inner) {
    const int64_t channels = tiling.shape.channels;
    for (int column = group; column < tile.width; column += tiling.groups) {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        factor[i] = map[column] + one;
#pragma unroll 4
      for (int64_t c = lane * kVector<T>; c < channels; c += tiling.lanes * kVector<T>)
        scale((tile.column + column) * channels + c, factor, tiling.aligned, channels - c);
    }
    return;
  }
  const int column = lane * kVector<T>;
  if (group >= tiling.groups || column >= tile.width)
    return;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    factor[i] = column + i < tile.width ? map[column + i] + one : A(0);
  for_rows<T>(tiling, tile, group, column,
              [&](int64_t offset, bool whole, int64_t valid) { scale(offset, factor, whole, valid); });
}

// dx = (map + one)·dy, unless dx is null, and the sums Σ dy·x of the tile's columns, ready for the block to read.
template <typename T>
ATTNKERN_DEVICE void modulate_backward(const Tiling& tiling, const Tile& tile, const T* __restrict__ dy,
                                       const T* __restrict__ x, Wide<T> one, T* __restrict__ dx) {
  using A = Wide<T>;
  const A* map = shared<MapTile<T>>().of;
  A* sums = shared<SumTile<T>>().of;
  const int64_t image = tile.image * tiling.shape.image_size();
  dy += image;
  x += image;
  const bool needed = dx != nullptr;
  if (needed)
    dx += image;
  const int lane = threadIdx.x % tiling.lanes, group = threadIdx.x / tiling.lanes;
  // sum[i] += dy·x; dx = factor·dy.
  const auto accumulate = [&](int64_t offset, const A(&factor)[kVector<T>], A(&sum)[kVector<T>], bool whole,
                              int64_t valid) {
    A grad[kVector<T>], value[kVector<T>];
    load_vector(dy + offset, whole, valid, grad);
    load_vector(x + offset, whole, valid, value);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      sum[i] += grad[i] * value[i], grad[i] *= factor[i];
    if (needed)
      store_vector(grad, dx + offset, whole, valid);
  };
  A factor[kVector<T>];
  if (tiling.shape.channels_inner) {
    const int64_t channels = tiling.shape.channels;
    for (int first = 0; first < tile.width; first += tiling.groups) { // whole warps, for the shuffles
      const int column = first + group;
      A sum[kVector<T>] = {};
      if (column < tile.width) {
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i)
          factor[i] = map[column] + one;
#pragma unroll 4
        for (int64_t c = lane * kVector<T>; c < channels; c += tiling.lanes * kVector<T>)
          accumulate((tile.column + column) * channels + c, factor, sum, tiling.aligned, channels - c);
      }
#pragma unroll
      for (int i = 1; i < kVector<T>; ++i)
        sum[0] += sum[i];
      sum[0] = warp_reduce(sum[0], tiling.lanes);
      if (column < tile.width && lane == 0)
        sums[column] = sum[0];
    }
    __syncthreads();
    return;
  }
  const int column = lane * kVector<T>;
  if (group < tiling.groups) {
    A sum[kVector<T>] = {};
    if (column < tile.width) {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        factor[i] = column + i < tile.width ? map[column + i] + one : A(0);
      for_rows<T>(tiling, tile, group, column, [&](int64_t offset, bool whole, int64_t valid) {
        accumulate(offset, factor, sum, whole, valid);
      });
    }
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      sums[threadIdx.x * kVector<T> + i] = sum[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile.width; i += kThreads) { // a column's groups are read and written by one thread
    A sum = sums[i];
    for (int g = 1; g < tiling.groups; ++g)
      sum += sums[g * tiling.width + i];
    sums[i] = sum;
  }
  __syncthreads();
}

} // namespace attnkern
