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

// Four vectors of a thread are on their way at a time: what it takes to keep the memory busy.
template <int kInputs> constexpr int kAhead = 4 / kInputs;

// Calls use(j, column, values, offset, whole, valid) for this thread's vectors of a tile with channels innermost, some
// columns (the j-th) at a time, and done(j, column) after each; every thread of a warp does that, to the tile's end.
template <bool kWhole, typename T, int kInputs, typename Use, typename Done>
ATTNKERN_DEVICE void for_positions(const Tiling& tiling, const Tile& tile, const T* const (&inputs)[kInputs],
                                   const Use& use, const Done& done) {
  const int lane = threadIdx.x % tiling.lanes, group = threadIdx.x / tiling.lanes;
  const int64_t channels = tiling.shape.channels;
  for (int first = 0; first < tile.width; first += kAhead<kInputs> * tiling.groups) {
    for (int64_t c = lane * kVector<T>; c < channels; c += tiling.lanes * kVector<T>) {
      const int64_t valid = kWhole ? int64_t(kVector<T>) : channels - c;
      int64_t offset[kAhead<kInputs>];
      Wide<T> values[kAhead<kInputs>][kInputs][kVector<T>];
#pragma unroll
      for (int j = 0; j < kAhead<kInputs>; ++j) { // behind the last column it is read again: cheaper than a branch
        offset[j] = (tile.column + std::min(first + j * tiling.groups + group, tile.width - 1)) * channels + c;
#pragma unroll
        for (int k = 0; k < kInputs; ++k)
          load_vector(inputs[k] + offset[j], kWhole, valid, values[j][k]);
      }
#pragma unroll
      for (int j = 0; j < kAhead<kInputs>; ++j)
        if (const int column = first + j * tiling.groups + group; column < tile.width)
          use(j, column, values[j], offset[j], kWhole, valid);
    }
#pragma unroll
    for (int j = 0; j < kAhead<kInputs>; ++j)
      done(j, first + j * tiling.groups + group);
  }
}

// Calls use(values, offset, whole, valid) for this thread's vectors of a tile with positions innermost, rows ascending.
template <typename T, int kInputs, typename Use>
ATTNKERN_DEVICE void for_rows(const Tiling& tiling, const Tile& tile, const T* const (&inputs)[kInputs],
                              const Use& use) {
  const int64_t start = tile.column + threadIdx.x % tiling.lanes * kVector<T>, size = tiling.shape.image_size();
  const int64_t last = std::min(tiling.rows, tile.row + tiling.rows_per_tile), step = tiling.groups;
  // Only an image's last row can be cut short.
  const bool all_whole = start + kVector<T> + (tiling.rows - 1) * tiling.columns <= size;
  const int64_t whole = !tiling.aligned ? 0 : all_whole ? last : std::min(last, tiling.rows - 1);
  Wide<T> values[kAhead<kInputs>][kInputs][kVector<T>];
  int64_t row = tile.row + threadIdx.x / tiling.lanes;
  for (; row + (kAhead<kInputs> - 1) * step < whole; row += kAhead<kInputs> * step) {
#pragma unroll
    for (int j = 0; j < kAhead<kInputs>; ++j)
#pragma unroll
      for (int k = 0; k < kInputs; ++k)
        load_vector(inputs[k] + (row + j * step) * tiling.columns + start, true, kVector<T>, values[j][k]);
#pragma unroll
    for (int j = 0; j < kAhead<kInputs>; ++j)
      use(values[j], (row + j * step) * tiling.columns + start, true, int64_t(kVector<T>));
  }
#pragma unroll 1
  for (; row < last; row += step) {
    const int64_t offset = row * tiling.columns + start;
    const int64_t valid = std::min<int64_t>(kVector<T>, std::min(tiling.columns - start, size - offset));
#pragma unroll
    for (int k = 0; k < kInputs; ++k)
      load_vector(inputs[k] + offset, row < whole, valid, values[0][k]);
    use(values[0], offset, row < whole, valid);
  }
}

// This thread's factors in a tile with positions innermost; false where it has no columns.
template <typename T>
ATTNKERN_DEVICE bool row_factors(const Tiling& tiling, const Tile& tile, Wide<T> one, Wide<T> (&factor)[kVector<T>]) {
  const Wide<T>* map = shared<MapTile<T>>().of;
  const int column = threadIdx.x % tiling.lanes * kVector<T>;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    factor[i] = column + i < tile.width ? map[column + i] + one : Wide<T>(0);
  return static_cast<int>(threadIdx.x) < tiling.groups * tiling.lanes && column < tile.width;
}

// y = (map + one)·x.
template <typename T>
ATTNKERN_DEVICE void modulate(const Tiling& tiling, const Tile& tile, const T* __restrict__ x, Wide<T> one,
                              T* __restrict__ y) {
  using A = Wide<T>;
  const T* const inputs[] = {x + tile.image * tiling.shape.image_size()};
  y += tile.image * tiling.shape.image_size();
  if (tiling.shape.channels_inner) {
    const A* map = shared<MapTile<T>>().of;
    const auto use = [&](int, int column, A(&values)[1][kVector<T>], int64_t offset, bool whole, int64_t valid) {
      const A factor = map[column] + one;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        values[0][i] *= factor;
      store_vector(values[0], y + offset, whole, valid);
    };
    const auto done = [](int, int) {};
    tiling.aligned ? for_positions<true>(tiling, tile, inputs, use, done)
                   : for_positions<false>(tiling, tile, inputs, use, done);
    return;
  }
  A factor[kVector<T>];
  if (row_factors<T>(tiling, tile, one, factor))
    for_rows(tiling, tile, inputs, [&](A(&values)[1][kVector<T>], int64_t offset, bool whole, int64_t valid) {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        values[0][i] *= factor[i];
      store_vector(values[0], y + offset, whole, valid);
    });
}

// dx = (map + one)·dy, unless dx is null, and the sums Σ dy·x of the tile's columns, ready for the block to read.
template <typename T>
ATTNKERN_DEVICE void modulate_backward(const Tiling& tiling, const Tile& tile, const T* __restrict__ dy,
                                       const T* __restrict__ x, Wide<T> one, T* __restrict__ dx) {
  using A = Wide<T>;
  A* sums = shared<SumTile<T>>().of;
  const int64_t image = tile.image * tiling.shape.image_size();
  const T* const inputs[] = {dy + image, x + image};
  const bool needed = dx != nullptr;
  if (needed)
    dx += image;
  if (tiling.shape.channels_inner) {
    const A* map = shared<MapTile<T>>().of;
    A sum[kAhead<2>] = {};
    const auto use = [&](int j, int column, A(&values)[2][kVector<T>], int64_t offset, bool whole, int64_t valid) {
      const A factor = map[column] + one;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        sum[j] += values[0][i] * values[1][i], values[0][i] *= factor;
      if (needed)
        store_vector(values[0], dx + offset, whole, valid);
    };
    const auto done = [&](int j, int column) {
      const A total = warp_reduce(sum[j], tiling.lanes);
      sum[j] = 0;
      if (column < tile.width && threadIdx.x % tiling.lanes == 0)
        sums[column] = total;
    };
    tiling.aligned ? for_positions<true>(tiling, tile, inputs, use, done)
                   : for_positions<false>(tiling, tile, inputs, use, done);
    __syncthreads();
    return;
  }
  A factor[kVector<T>], sum[kVector<T>] = {};
  if (row_factors<T>(tiling, tile, one, factor))
    for_rows(tiling, tile, inputs, [&](A(&values)[2][kVector<T>], int64_t offset, bool whole, int64_t valid) {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        sum[i] += values[0][i] * values[1][i], values[0][i] *= factor[i];
      if (needed)
        store_vector(values[0], dx + offset, whole, valid);
    });
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
