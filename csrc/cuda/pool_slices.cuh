// Pooling where an image has more channels than a block keeps: its channels are cut into slices, a block each. One launch
// adds the slices' parts of the scores, the next one adds these up and forms the weighted sums. It reads the features a
// second time, from the cache where the map is small, as after ResNet's last layer (2048 x 7x7).
//
// A warp has some channels, its lanes neighbouring positions, so rows of any length are read without gaps.
#pragma once

#include "cuda/pool_passes.cuh"

namespace attnkern {

constexpr int kSliceThreads = 256, kSliceWarps = kSliceThreads / kWarp;
constexpr int kWarpChannels = 16;                          // of a warp
constexpr int kSlice = kSliceWarps * kWarpChannels;        // channels of a block
template <typename T> constexpr int kPerLane = sizeof(T) == 8 ? 1 : 2; // positions of a lane at a time
template <typename T> constexpr int kStep = kPerLane<T> * kWarp;

// What a block works on.
struct Slice {
  Shape shape;
  int64_t channel_stride, position_stride;

  explicit Slice(const Shape& shape)
      : shape(shape), channel_stride(shape.channels_inner ? 1 : shape.positions),
        position_stride(shape.channels_inner ? shape.channels : 1) {}
  ATTNKERN_INLINE int64_t slices() const { return ceil_div(shape.channels, kSlice); }
  ATTNKERN_INLINE int64_t blocks() const { return shape.images * slices(); }
};

// This thread's channels and positions of a slice.
template <typename T> struct SlicePart {
  const Slice& slice;
  int64_t image, index; // of the slice
  int64_t channel;      // the warp's first
  int channels;         // of them that exist
  int lane;

  ATTNKERN_DEVICE explicit SlicePart(const Slice& slice)
      : slice(slice), image(divide(block_index(), slice.slices())), index(block_index() - image * slice.slices()),
        channel(index * kSlice + threadIdx.x / kWarp * kWarpChannels), lane(threadIdx.x % kWarp) {
    channels = static_cast<int>(std::min<int64_t>(kWarpChannels, slice.shape.channels - channel));
  }
  // Offset of the warp's first channel at a position.
  ATTNKERN_DEVICE int64_t offset(int64_t position) const {
    return image * slice.shape.image_size() + channel * slice.channel_stride + position * slice.position_stride;
  }
  ATTNKERN_DEVICE void load(const T* from, int64_t position, Wide<T> (&to)[kWarpChannels]) const {
    from += offset(position);
    const int existing = position < slice.shape.positions ? channels : 0;
#pragma unroll
    for (int i = 0; i < kWarpChannels; ++i, from += slice.channel_stride)
      to[i] = i < existing ? widen(*from) : Wide<T>(0);
  }
};

// Each slice's part of the scores, (N, slices, positions): with the query, or in the backward pass with dg.
template <typename T>
__global__ void __launch_bounds__(kSliceThreads)
    slice_scores(Slice slice, Query vector, const T* __restrict__ local, Wide<T>* partial) {
  using A = Wide<T>;
  struct Sums {
    A vector[kSlice], of[kSliceWarps][kStep<T>];
  };
  if (block_index() >= slice.blocks())
    return;
  const SlicePart<T> part(slice);
  Sums& sums = shared<Sums>();
  const int64_t positions = slice.shape.positions, last = slice.shape.channels - part.index * kSlice;
  if (threadIdx.x < kSlice)
    sums.vector[threadIdx.x] =
        threadIdx.x < last ? vector.load<A>(slice.shape, part.image, part.index * kSlice + threadIdx.x) : A(0);
  const int warp = threadIdx.x / kWarp;
  for (int64_t first = 0; first < positions; first += kStep<T>) {
    A values[kPerLane<T>][kWarpChannels];
#pragma unroll
    for (int k = 0; k < kPerLane<T>; ++k)
      part.load(local, first + k * kWarp + part.lane, values[k]);
    __syncthreads(); // the vector is there, the sums before have been read
#pragma unroll
    for (int k = 0; k < kPerLane<T>; ++k) {
      A sum = 0;
#pragma unroll
      for (int i = 0; i < kWarpChannels; ++i)
        sum = std::fma(sums.vector[warp * kWarpChannels + i], values[k][i], sum);
      sums.of[warp][k * kWarp + part.lane] = sum;
    }
    __syncthreads();
    const int64_t position = first + threadIdx.x;
    if (threadIdx.x < kStep<T> && position < positions) {
      A sum = 0;
#pragma unroll
      for (int w = 0; w < kSliceWarps; ++w)
        sum += sums.of[w][threadIdx.x];
      partial[block_index() * positions + position] = sum;
    }
  }
}

// The weighted sums of a slice, and in the backward pass the gradient of its features. `partial` is null where all
// scores are zero.
template <typename T, typename Pass>
__global__ void __launch_bounds__(kSliceThreads, 2)
    pool_slice(Slice slice, Pass pass, const T* __restrict__ local, const Wide<T>* __restrict__ partial) {
  using A = Wide<T>;
  struct Panel { // of as many positions as there are threads
    A weight[kSliceThreads], attention[kSliceThreads];
    A vector[kSlice], query[kSlice];
  };
  if (block_index() >= slice.blocks())
    return;
  const Shape& shape = slice.shape;
  const SlicePart<T> part(slice);
  Panel& panel = shared<Panel>();
  const int64_t positions = shape.positions, of_image = part.image * positions, slices = slice.slices();
  const auto score = [&](int64_t p) {
    A sum = 0;
    if (partial != nullptr)
#pragma unroll 4
      for (int64_t s = 0; s < slices; ++s)
        sum += partial[(part.image * slices + s) * positions + p];
    return sum;
  };
  A highest[1] = {-INFINITY}, total[1] = {}, delta = 0;
  if constexpr (Pass::kBackward) {
    delta = pass.delta(shape, part.image);
  } else {
    for (int64_t p = threadIdx.x; p < positions; p += kSliceThreads)
      highest[0] = Max()(highest[0], score(p));
    block_reduce<Max>(highest);
    for (int64_t p = threadIdx.x; p < positions; p += kSliceThreads)
      total[0] += softmax_weight(score(p), highest[0]);
    block_reduce(total);
  }
  if constexpr (Pass::kBackward)
    if (const int64_t c = part.index * kSlice + threadIdx.x; threadIdx.x < kSlice && c < shape.channels) {
      panel.vector[threadIdx.x] = pass.score_vector(shape, part.image, c);
      panel.query[threadIdx.x] = pass.query.template load<A>(shape, part.image, c);
    }
  const int own = threadIdx.x / kWarp * kWarpChannels; // the warp's first channel of the slice
  A sums[kWarpChannels] = {};
  for (int64_t begin = 0; begin < positions; begin += kSliceThreads) {
    const int64_t p = begin + threadIdx.x;
    A weight = 0, attention = 0;
    if (p < positions) {
      if constexpr (Pass::kBackward) {
        const auto position = Position<A>::load(pass, of_image + p);
        attention = position.attention;
        weight = position.weight(score(p), delta);
      } else {
        const A found = score(p);
        attention = softmax_weight(found, highest[0]) / total[0];
        weight = softmax_weight(found, highest[0]);
        if (part.index == 0) {
          pass.scores[of_image + p] = found;
          pass.attention[of_image + p] = attention;
        }
      }
    }
    __syncthreads(); // the panel before has been read
    panel.weight[threadIdx.x] = weight;
    panel.attention[threadIdx.x] = attention;
    __syncthreads();
    for (int64_t first = begin; first < std::min(positions, begin + kSliceThreads); first += kStep<T>) {
      A values[kPerLane<T>][kWarpChannels];
#pragma unroll
      for (int k = 0; k < kPerLane<T>; ++k)
        part.load(local, first + k * kWarp + part.lane, values[k]);
#pragma unroll
      for (int k = 0; k < kPerLane<T>; ++k) {
        const int64_t position = first + k * kWarp + part.lane;
        const A w = panel.weight[position - begin], a = panel.attention[position - begin];
#pragma unroll
        for (int i = 0; i < kWarpChannels; ++i)
          sums[i] = std::fma(w, values[k][i], sums[i]);
        if constexpr (Pass::kBackward)
          if (pass.grad_local != nullptr && position < positions) {
            T* to = pass.grad_local + part.offset(position);
#pragma unroll
            for (int i = 0; i < kWarpChannels; ++i, to += slice.channel_stride)
              if (i < part.channels)
                *to = narrow<T>(std::fma(a, panel.vector[own + i], w * panel.query[own + i]));
          }
      }
    }
  }
  const int first = scatter_sums<kWarpChannels, kWarp, 1>(sums);
  const int64_t c = part.channel + first;
  if (part.lane % (kWarp / kWarpChannels) != 0 || c >= shape.channels)
    return;
  if constexpr (!Pass::kBackward)
    pass.store_pooled(part.image * shape.channels + c, sums[0] / total[0]);
  else if (pass.direct)
    pass.grad_query.store(part.image * shape.channels + c, sums[0]);
  else
    pass.sums[part.image * shape.channels + c] = sums[0];
}

} // namespace attnkern
