// Pooling for images with more channels than a block can hold. The channels are divided into slices of one block each.
// The first launch computes each slice's part of the scores; the second one adds the parts and computes the weighted
// sums. It reads the features again, from the L2 cache if the map is small, as after ResNet's last layer (2048 x 7x7).
//
// A block copies its features to shared memory. The channels of a slice are contiguous, so they are read and written in
// whole vectors even if a row has an odd length.
#pragma once

#include "cuda/pool_passes.cuh"

namespace attnkern {

constexpr int kSliceThreads = 256, kSliceWarps = kSliceThreads / kWarp;
constexpr int kWarpChannels = 16;                                      // of a warp
constexpr int kSlice = kSliceWarps * kWarpChannels;                    // channels of a block
template <typename T> constexpr int kPerLane = sizeof(T) == 8 ? 1 : 2; // positions of a lane
template <typename T> constexpr int kStep = kPerLane<T> * kWarp;       // positions of a block at a time

struct Slice {
  Shape shape;
  int width; // elements of an access

  template <typename T> Slice(const Shape& shape, T) : shape(shape) {
    // Whole rows of positions are contiguous; parts of rows are not.
    width = widest_piece<T>(shape.channels_inner          ? shape.channels
                            : shape.positions <= kStep<T> ? shape.image_size()
                                                          : shape.positions);
  }
  ATTNKERN_INLINE int64_t slices() const { return ceil_div(shape.channels, kSlice); }
  ATTNKERN_INLINE int64_t blocks() const { return shape.images * slices(); }
};

// A block's features at some positions, in shared memory.
template <typename T> struct SliceTile {
  static constexpr int V = kVector<T>, kFetched = kSlice * kStep<T> / V / kSliceThreads;
  static constexpr int kPitch = kSlice + V; // with channels innermost, so that positions start in eight different banks

  const Slice& slice;
  int64_t image, index; // of the slice
  int channels;         // of the slice
  int count = 0;        // positions
  int rows = 0, length = 0, pitch = 0; // contiguous rows, their length, and their stride in shared memory
  int64_t offset = 0, stride = 0;      // of the first row, and their stride in global memory
  T* memory;
  uint4 fetched[kFetched];

  static size_t bytes() { return sizeof(T) * std::max(kSlice * kStep<T>, kStep<T> * kPitch); }

  ATTNKERN_DEVICE explicit SliceTile(const Slice& slice)
      : slice(slice), image(divide(block_index(), slice.slices())), index(block_index() - image * slice.slices()),
        channels(static_cast<int>(std::min<int64_t>(kSlice, slice.shape.channels - index * kSlice))),
        memory(dynamic_shared<T>()) {}

  // The features of a position at a warp's channels, the first `existing` of them.
  struct Column {
    T* first;
    int stride, existing;

    ATTNKERN_DEVICE Wide<T> operator[](int i) const { return i < existing ? widen(first[i * stride]) : Wide<T>(0); }
  };
  ATTNKERN_DEVICE Column column(int channel, int position) const {
    const int left = channels - channel, existing = left < kWarpChannels ? left : kWarpChannels;
    return slice.shape.channels_inner ? Column{memory + position * kPitch + channel, 1, existing}
                                      : Column{memory + channel * count + position, count, existing};
  }

  // Starts to load positions from `first` on, if in whole vectors; fill() completes it. The caller needs a barrier
  // after fill().
  ATTNKERN_DEVICE void fetch(const T* local, int64_t first) {
    const Shape& shape = slice.shape;
    const int64_t channel = index * kSlice;
    count = static_cast<int>(std::min<int64_t>(kStep<T>, shape.positions - first));
    offset = image * shape.image_size();
    if (shape.channels_inner) {
      offset += first * shape.channels + channel;
      rows = count, length = channels, pitch = kPitch, stride = shape.channels;
    } else if (count == shape.positions) {
      offset += channel * shape.positions;
      rows = 1, length = channels * count, pitch = 0, stride = 0;
    } else {
      offset += channel * shape.positions + first;
      rows = channels, length = count, pitch = count, stride = shape.positions;
    }
    if (slice.width == V)
      load<V>(local, 0, fetched);
  }
  ATTNKERN_DEVICE void fill(const T* local) {
    with_width<T>(slice.width, [&](auto width) {
      constexpr int kWidth = width();
      if constexpr (kWidth == V) {
        store<V>(fetched, 0, memory);
      } else {
        Piece<T, kWidth> some[kFetched];
#pragma unroll 1
        for (int i = 0; i < V / kWidth * kFetched; i += kFetched) {
          load<kWidth>(local, i, some);
          store<kWidth>(some, i, memory);
        }
      }
    });
  }
  ATTNKERN_DEVICE void write(T* to) const {
    with_width<T>(slice.width, [&](auto width) {
      constexpr int kWidth = width();
#pragma unroll 1
      for (int i = 0; i < V / kWidth * kFetched; i += kFetched)
        for_pieces<kWidth>(i, [&](int, int64_t there, int here) {
          piece_at<kWidth>(to + offset + there) = piece_at<kWidth>(memory + here);
        });
    });
  }

private:
  // Calls use(i, there, here) for kFetched of this thread's pieces that exist, with their offsets in global memory
  // (relative to `offset`) and in shared memory.
  template <int kWidth, typename Use> ATTNKERN_DEVICE void for_pieces(int first, const Use& use) const {
    const int of_row = length / kWidth, begin = first * kSliceThreads + threadIdx.x;
    if (rows == 1) {
#pragma unroll
      for (int i = 0; i < kFetched; ++i)
        if (const int piece = begin + i * kSliceThreads; piece < of_row)
          use(i, piece * kWidth, piece * kWidth);
    } else {
#pragma unroll
      for (int i = 0; i < kFetched; ++i)
        if (const int piece = begin + i * kSliceThreads; piece < rows * of_row) {
          const int row = piece / of_row, at = (piece - row * of_row) * kWidth;
          use(i, row * stride + at, row * pitch + at);
        }
    }
  }
  template <int kWidth>
  ATTNKERN_DEVICE void load(const T* local, int first, Piece<T, kWidth> (&to)[kFetched]) const {
    for_pieces<kWidth>(first, [&](int i, int64_t there, int) {
      to[i] = piece_at<kWidth>(local + offset + there);
    });
  }
  template <int kWidth>
  ATTNKERN_DEVICE void store(const Piece<T, kWidth> (&from)[kFetched], int first, T* to) const {
    for_pieces<kWidth>(first, [&](int i, int64_t, int here) {
      piece_at<kWidth>(to + here) = from[i];
    });
  }
};

// Each slice's part of the scores, (N, slices, positions + 1). In the backward pass the last column is the slice's part
// of ⟨dg, pooled⟩; in the forward pass `pooled` is null.
template <typename T>
__global__ void __launch_bounds__(kSliceThreads)
    slice_scores(Slice slice, Query vector, const Wide<T>* pooled, const T* __restrict__ local, Wide<T>* partial) {
  using A = Wide<T>;
  struct Sums {
    A vector[kSlice], of[kSliceWarps][kStep<T>];
  };
  if (block_index() >= slice.blocks())
    return;
  SliceTile<T> tile(slice);
  Sums& sums = shared<Sums>();
  const int64_t positions = slice.shape.positions;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own = warp * kWarpChannels;
  A of_pooled[1] = {};
#pragma unroll 1
  for (int64_t first = 0; first < positions; first += kStep<T>) {
    tile.fetch(local, first);
    if (first == 0 && threadIdx.x < kSlice) {
      const int64_t c = tile.index * kSlice + threadIdx.x;
      const bool exists = threadIdx.x < tile.channels;
      const A entry = exists ? vector.load<A>(slice.shape, tile.image, c) : A(0);
      sums.vector[threadIdx.x] = entry;
      if (exists && pooled != nullptr)
        of_pooled[0] = entry * pooled[tile.image * slice.shape.channels + c];
    }
    tile.fill(local);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPerLane<T>; ++k)
      if (const int position = k * kWarp + lane; position < tile.count) {
        const auto column = tile.column(own, position);
        A sum = 0;
#pragma unroll
        for (int i = 0; i < kWarpChannels; ++i)
          sum = std::fma(sums.vector[own + i], column[i], sum);
        sums.of[warp][position] = sum;
      }
    __syncthreads();
    if (threadIdx.x < tile.count) {
      A sum = 0;
#pragma unroll
      for (int w = 0; w < kSliceWarps; ++w)
        sum += sums.of[w][threadIdx.x];
      partial[block_index() * (positions + 1) + first + threadIdx.x] = sum;
    }
  }
  if (pooled == nullptr)
    return;
  block_reduce(of_pooled);
  if (threadIdx.x == 0)
    partial[block_index() * (positions + 1) + positions] = of_pooled[0];
}

// The weighted sums of a slice, and in the backward pass the gradient of its features. If `partial` is null, all scores
// are zero.
template <typename T, typename Pass>
__global__ void __launch_bounds__(kSliceThreads, sizeof(T) == 8 ? 1 : 2) // two would spill double's registers
    pool_slice(Slice slice, Pass pass, const T* __restrict__ local, const Wide<T>* __restrict__ partial) {
  using A = Wide<T>;
  struct Memory {
    A weight[kStep<T>], attention[kStep<T>];
    A vector[kSlice], query[kSlice];
  };
  if (block_index() >= slice.blocks())
    return;
  const Shape& shape = slice.shape;
  SliceTile<T> tile(slice);
  Memory& memory = shared<Memory>();
  const int64_t positions = shape.positions, of_image = tile.image * positions, slices = slice.slices();
  const auto score = [&](int64_t p) {
    A sum = 0;
    if (partial != nullptr)
#pragma unroll 4
      for (int64_t s = 0; s < slices; ++s)
        sum += partial[(tile.image * slices + s) * (positions + 1) + p];
    return sum;
  };
  const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * kWarpChannels;
  A highest[1] = {-INFINITY}, total[1] = {}, delta = 0, sums[kWarpChannels] = {};
#pragma unroll 1
  for (int64_t first = 0; first < positions; first += kStep<T>) {
    tile.fetch(local, first);
    const int64_t p = first + threadIdx.x;
    const A found = threadIdx.x < kStep<T> && p < positions ? score(p) : A(0);
    if (first == 0) {
      if constexpr (Pass::kBackward) {
        if (threadIdx.x < tile.channels) {
          const int64_t c = tile.index * kSlice + threadIdx.x;
          memory.vector[threadIdx.x] = pass.score_vector(shape, tile.image, c);
          memory.query[threadIdx.x] = pass.query.template load<A>(shape, tile.image, c);
        }
        delta = pass.attention_delta(shape, tile.image, score(positions));
      } else { // the softmax over the whole image
        for (int64_t q = threadIdx.x; q < positions; q += kSliceThreads)
          highest[0] = Max()(highest[0], q < kStep<T> ? found : score(q));
        block_reduce<Max>(highest);
        for (int64_t q = threadIdx.x; q < positions; q += kSliceThreads)
          total[0] += softmax_weight(q < kStep<T> ? found : score(q), highest[0]);
        block_reduce(total);
      }
    }
    if (threadIdx.x < kStep<T> && p < positions) {
      if constexpr (Pass::kBackward) {
        const auto position = Position<A>::load(pass, of_image + p);
        memory.attention[threadIdx.x] = position.attention;
        memory.weight[threadIdx.x] = position.weight(found, delta);
      } else {
        const A weight = softmax_weight(found, highest[0]);
        memory.weight[threadIdx.x] = weight;
        if (tile.index == 0) {
          pass.scores[of_image + p] = found;
          pass.attention[of_image + p] = weight / total[0];
        }
      }
    }
    tile.fill(local);
    __syncthreads();
#pragma unroll 1 // registers
    for (int k = 0; k < kPerLane<T>; ++k)
      if (const int position = k * kWarp + lane; position < tile.count) {
        const auto column = tile.column(own, position);
        const A weight = memory.weight[position];
#pragma unroll
        for (int i = 0; i < kWarpChannels; ++i)
          sums[i] = std::fma(weight, column[i], sums[i]);
        if constexpr (Pass::kBackward) {
          const A attention = memory.attention[position];
#pragma unroll
          for (int i = 0; i < kWarpChannels; ++i)
            if (i < column.existing)
              column.first[i * column.stride] =
                  narrow<T>(std::fma(attention, memory.vector[own + i], weight * memory.query[own + i]));
        }
      }
    __syncthreads();
    if constexpr (Pass::kBackward)
      if (pass.grad_local != nullptr) {
        tile.write(pass.grad_local);
        __syncthreads();
      }
  }
  const int channel = own + scatter_sums<kWarpChannels, kWarp, 1>(sums);
  if (lane % (kWarp / kWarpChannels) != 0 || channel >= tile.channels)
    return;
  const int64_t c = tile.image * shape.channels + tile.index * kSlice + channel;
  if constexpr (!Pass::kBackward)
    pass.store_pooled(c, sums[0] / total[0]);
  else if (pass.direct)
    pass.grad_query.store(c, sums[0]);
  else
    pass.sums[c] = sums[0];
}

} // namespace attnkern
