// Softmax compatibility pooling on the CPU. An image is cut into tiles of positions that stay in the L2 cache, so that
// scores and weighted sums read the locals from memory once; tiles are combined in order.

#if defined(ATTNKERN_ISA) // ------------------------------------------------- kernels, once per instruction set

namespace attnkern::ATTNKERN_ISA {

// The locals of a tile: pointer to the first, and the strides of channels and positions.
template <typename T> struct Locals {
  const T* first;
  int64_t channels, positions, channel_stride, position_stride;
};

template <typename T> Locals<T> locals_of(const Tiles& tiles, const T* local, int64_t tile) {
  const Shape& shape = tiles.shape;
  const int64_t image = tile / tiles.per_image, first = tile % tiles.per_image * tiles.length;
  const int64_t channel_stride = shape.channels_inner ? 1 : shape.positions;
  const int64_t position_stride = shape.channels_inner ? shape.channels : 1;
  return {local + image * shape.image_size() + first * position_stride, shape.channels,
          std::min(tiles.length, shape.positions - first), channel_stride, position_stride};
}

// out[i] = Σ_c ⟨ℓ_i, weight⟩ over channels.
template <typename T> void dot_channels(const Locals<T>& local, const Wide<T>* weight, Wide<T>* out) {
  using A = Wide<T>;
  if (local.channel_stride == 1) {
    for (int64_t i = 0; i < local.positions; ++i) {
      const T* from = local.first + i * local.position_stride;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < local.channels; ++c)
        sum += widen(from[c]) * weight[c];
      out[i] = sum;
    }
    return;
  }
  std::fill_n(out, local.positions, A(0));
  int64_t c = 0;
  for (; c + 4 <= local.channels; c += 4) { // four channels per pass over the sums
    const T* l0 = local.first + c * local.channel_stride;
    const T *l1 = l0 + local.channel_stride, *l2 = l1 + local.channel_stride, *l3 = l2 + local.channel_stride;
    const A w0 = weight[c], w1 = weight[c + 1], w2 = weight[c + 2], w3 = weight[c + 3];
#pragma omp simd
    for (int64_t i = 0; i < local.positions; ++i)
      out[i] += (w0 * widen(l0[i]) + w1 * widen(l1[i])) + (w2 * widen(l2[i]) + w3 * widen(l3[i]));
  }
  for (; c < local.channels; ++c) {
    const T* from = local.first + c * local.channel_stride;
#pragma omp simd
    for (int64_t i = 0; i < local.positions; ++i)
      out[i] += weight[c] * widen(from[i]);
  }
}

// out[c] = Σ_i weight_i·ℓ_i over the positions of the tile.
template <typename T> void sum_positions(const Locals<T>& local, const Wide<T>* weight, Wide<T>* out) {
  using A = Wide<T>;
  if (local.channel_stride == 1) {
    std::fill_n(out, local.channels, A(0));
    int64_t i = 0;
    for (; i + 4 <= local.positions; i += 4) { // four positions per pass over the sums
      const T* l0 = local.first + i * local.position_stride;
      const T *l1 = l0 + local.position_stride, *l2 = l1 + local.position_stride, *l3 = l2 + local.position_stride;
      const A w0 = weight[i], w1 = weight[i + 1], w2 = weight[i + 2], w3 = weight[i + 3];
#pragma omp simd
      for (int64_t c = 0; c < local.channels; ++c)
        out[c] += (w0 * widen(l0[c]) + w1 * widen(l1[c])) + (w2 * widen(l2[c]) + w3 * widen(l3[c]));
    }
    for (; i < local.positions; ++i) {
      const T* from = local.first + i * local.position_stride;
#pragma omp simd
      for (int64_t c = 0; c < local.channels; ++c)
        out[c] += weight[i] * widen(from[c]);
    }
    return;
  }
  for (int64_t c = 0; c < local.channels; ++c) {
    const T* from = local.first + c * local.channel_stride;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < local.positions; ++i)
      sum += weight[i] * widen(from[i]);
    out[c] = sum;
  }
}

// out = attention ⊗ grad_pooled + grad_score ⊗ query.
template <typename T>
void write_gradient(const Locals<T>& local, const Wide<T>* attention, const Wide<T>* grad_pooled,
                    const Wide<T>* grad_score, const Wide<T>* query, T* out) {
  using A = Wide<T>;
  if (local.channel_stride == 1) {
    for (int64_t i = 0; i < local.positions; ++i) {
      const A a = attention[i], s = grad_score[i];
      T* to = out + i * local.position_stride;
#pragma omp simd
      for (int64_t c = 0; c < local.channels; ++c)
        to[c] = narrow<T>(a * grad_pooled[c] + s * query[c]);
    }
    return;
  }
  for (int64_t c = 0; c < local.channels; ++c) {
    const A g = grad_pooled[c], q = query[c];
    T* to = out + c * local.channel_stride;
#pragma omp simd
    for (int64_t i = 0; i < local.positions; ++i)
      to[i] = narrow<T>(attention[i] * g + grad_score[i] * q);
  }
}

template <typename T>
void pool_forward(const Tiles& tiles, const T* local, const std::vector<Wide<T>>& query, T* pooled,
                  Wide<T>* attention, Wide<T>* scores, Wide<T>* pooled_wide) {
  using A = Wide<T>;
  const int64_t channels = tiles.shape.channels, positions = tiles.shape.positions;
  std::vector<A> maxima(tiles.count()), totals(tiles.count()), sums(tiles.count() * channels);
  parallel(tiles.count(), tiles.length * channels, [&](int64_t tile) {
    const Locals<T> locals = locals_of(tiles, local, tile);
    const int64_t image = tile / tiles.per_image;
    A* score = scores + image * positions + tile % tiles.per_image * tiles.length;
    dot_channels(locals, query_of(query, image, channels), score);
    A max = score[0];
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < locals.positions; ++i)
      max = score[i] > max ? score[i] : max;
    std::vector<A> weight(locals.positions);
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < locals.positions; ++i) {
      weight[i] = softmax_weight(score[i], max);
      total += weight[i];
    }
    maxima[tile] = max;
    totals[tile] = total;
    sum_positions(locals, weight.data(), &sums[tile * channels]);
  });
  parallel(tiles.shape.images, positions + tiles.per_image * channels, [&](int64_t image) {
    const int64_t first = image * tiles.per_image;
    const A max = *std::max_element(&maxima[first], &maxima[first] + tiles.per_image);
    std::vector<A> sum(channels);
    A total = 0;
    for (int64_t tile = first; tile < first + tiles.per_image; ++tile) {
      const A weight = softmax_weight(maxima[tile], max);
      total += weight * totals[tile];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        sum[c] += weight * sums[tile * channels + c];
    }
    const A inverse = A(1) / total;
#pragma omp simd
    for (int64_t i = image * positions; i < (image + 1) * positions; ++i)
      attention[i] = exponential(scores[i] - max) * inverse;
    for (int64_t c = 0; c < channels; ++c) {
      const A value = sum[c] * inverse;
      pooled[image * channels + c] = narrow<T>(value);
      if (pooled_wide != nullptr)
        pooled_wide[image * channels + c] = value;
    }
  });
}

// Returns dq per image, (N, C).
template <typename T>
std::vector<Wide<T>> pool_backward(const Tiles& tiles, const std::vector<Wide<T>>& grad_pooled,
                                   const Wide<T>* grad_attention, const Wide<T>* grad_scores, const T* local,
                                   const std::vector<Wide<T>>& query, const Wide<T>* attention,
                                   const Wide<T>* pooled, T* grad_local) {
  using A = Wide<T>;
  const int64_t channels = tiles.shape.channels, positions = tiles.shape.positions;
  std::vector<A> deltas(tiles.shape.images), sums(tiles.count() * channels);
  parallel(tiles.shape.images, positions + channels, [&](int64_t image) {
    A delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int64_t c = image * channels; c < (image + 1) * channels; ++c)
      delta += grad_pooled[c] * pooled[c];
    if (grad_attention != nullptr)
#pragma omp simd reduction(+ : delta)
      for (int64_t i = image * positions; i < (image + 1) * positions; ++i)
        delta += attention[i] * grad_attention[i];
    deltas[image] = delta;
  });
  parallel(tiles.count(), 2 * tiles.length * channels, [&](int64_t tile) {
    const Locals<T> locals = locals_of(tiles, local, tile);
    const int64_t image = tile / tiles.per_image;
    const int64_t first = image * positions + tile % tiles.per_image * tiles.length;
    const A *weight = attention + first, *grad = &grad_pooled[image * channels];
    const A* query_image = query_of(query, image, channels);
    std::vector<A> grad_score(locals.positions);
    dot_channels(locals, grad, grad_score.data());
    for (int64_t i = 0; i < locals.positions; ++i) {
      const A s = grad_score[i] + (grad_attention == nullptr ? A(0) : grad_attention[first + i]);
      grad_score[i] =
          score_grad(weight[i], s, deltas[image], grad_scores == nullptr ? A(0) : grad_scores[first + i]);
    }
    sum_positions(locals, grad_score.data(), &sums[tile * channels]);
    if (grad_local != nullptr)
      write_gradient(locals, weight, grad, grad_score.data(), query_image, grad_local + (locals.first - local));
  });
  std::vector<A> grad_query(tiles.shape.images * channels);
  for (int64_t tile = 0; tile < tiles.count(); ++tile)
    for (int64_t c = 0; c < channels; ++c)
      grad_query[tile / tiles.per_image * channels + c] += sums[tile * channels + c];
  return grad_query;
}

} // namespace attnkern::ATTNKERN_ISA

#else // ----------------------------------------------------------------------------------------- the operators

#include "cpu/common.h"
#include "pool.h"

namespace attnkern {

// Images cut into tiles of positions. The length follows from the channels only, so that sums do not depend on N.
struct Tiles {
  Shape shape;
  int64_t length, per_image;

  explicit Tiles(const Tensor& local) : shape(local) {
    const int64_t channels = std::max<int64_t>(1, shape.channels);
    length = std::min(shape.positions, std::max<int64_t>(16, 65536 / channels / 16 * 16)); // 256 KB of float32
    per_image = (shape.positions + length - 1) / length;
  }
  int64_t count() const { return shape.images * per_image; }
};

// The query of an image: its own, or the one that the batch shares.
template <typename A> const A* query_of(const std::vector<A>& query, int64_t image, int64_t channels) {
  return query.data() + (static_cast<int64_t>(query.size()) > channels ? image * channels : 0);
}

} // namespace attnkern

#define ATTNKERN_KERNELS "cpu/pool.cpp"
#include "cpu/foreach_isa.h"

namespace attnkern {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_fwd(Tensor local, Tensor query) {
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    constexpr bool rounds = !std::is_same_v<T, A>;
    const Tiles tiles(local);
    std::vector<int64_t> sizes{local.size(0)};
    for (int64_t i = 2; i < local.dim(); ++i)
      sizes.push_back(local.size(i));
    Tensor pooled = empty<T>(local, {local.size(0), local.size(1)});
    Tensor attention = torch::stable::new_empty(local, {sizes.data(), sizes.size()}, scalar_type<A>());
    Tensor scores = torch::stable::empty_like(attention);
    Tensor pooled_wide = rounds ? empty_like<A>(pooled) : empty<A>(local, {0});
    ATTNKERN_BY_ISA(pool_forward<T>, tiles, data<T>(local), widened<A>(query), mutable_data<T>(pooled),
                    mutable_data<A>(attention), mutable_data<A>(scores),
                    rounds ? mutable_data<A>(pooled_wide) : nullptr);
    return std::tuple(pooled, attention, scores, pooled_wide);
  });
}

std::tuple<Tensor, Tensor> pool_bwd(std::optional<Tensor> grad_pooled, std::optional<Tensor> grad_attention,
                                    std::optional<Tensor> grad_scores, Tensor local, Tensor query, Tensor attention,
                                    Tensor pooled_wide, bool need_grad_local) {
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Tiles tiles(local);
    const int64_t channels = local.size(1);
    Tensor grad_local = features_grad<T>(local, need_grad_local);
    const std::vector<A> grad =
        grad_pooled.has_value() ? widened<A>(*grad_pooled) : std::vector<A>(local.size(0) * channels);
    std::vector<A> grad_query = ATTNKERN_BY_ISA(
        pool_backward<T>, tiles, grad, data<A>(grad_attention), data<A>(grad_scores), data<T>(local),
        widened<A>(query), data<A>(attention), data<A>(pooled_wide), need_grad_local ? mutable_data<T>(grad_local) : nullptr);
    if (query.dim() == 1) { // shared: summed over the batch in order
      std::vector<A> sum(channels);
      for (size_t i = 0; i < grad_query.size(); ++i)
        sum[i % channels] += grad_query[i];
      grad_query = std::move(sum);
    }
    return std::tuple(grad_local, narrowed(query, grad_query));
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("pool_fwd", TORCH_BOX(&pool_fwd));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

} // namespace attnkern

#endif
