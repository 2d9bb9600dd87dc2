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

#include "cuda/pool_many_tile.cuh"

namespace attnkern {

// What the kernels read for a block of queries.
template <typename T> struct ManyForward {
  using A = Wide<T>;
  static constexpr bool kBackward = false;
  Companion vectors; // (N or 1, M, C): the queries
  bool shared_vectors;
  bool has_vectors; // always: every forward pass has queries
  A* scores;        // (N, M, positions)
  A* sums;          // (N, M, splits, C): Σ exp(score - max)·ℓ
  A* moments;       // (N, M, splits, 2): max, Σ exp(score - max)

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
  const A* grad_attention; // (N, M, positions) or null
  const A* grad_scores;    // (N, M, positions) or null
  const A* attention;      // (N, M, positions)
  const A* deltas;         // (N, M)
  A* weights;              // (N, M, positions): dc

  ATTNKERN_DEVICE bool clears() const { return grad_scores == nullptr; }
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
__global__ void __launch_bounds__(kUsualWarps* kWarp, 1)
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
    if (const int m = i / kTile, p = i % kTile; p < count && query + m < plan.queries) {
      const int64_t row = image * plan.queries + query + m;
      pass.scores[row * shape.positions + position + p] = memory.read_partial(plan, m, p);
    }
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
    const bool second = plan.stages == 2 && tile.memory == memory.tiles;
    T* const other = memory.tiles + (second ? kTile * plan.channels() : 0);
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
    // Features at masked positions must not enter the sums, not even times zero, which would be NaN for NaN and Inf. In
    // the backward pass they do enter if the scores have a gradient.
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
