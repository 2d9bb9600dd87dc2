// The kernels of compatibility pooling. Included once per instruction set by foreach_isa.h, after the types of
// pool.cpp.

#include "cpu/products.h"

namespace attnkern::ATTNKERN_ISA {

// The features of a tile as a matrix: rows are channels, or positions if channels are innermost.
template <typename T> Matrix<T> tile_of(const Tiles& tiles, const T* local, int64_t tile) {
  const Shape& shape = tiles.shape;
  const int64_t image = tile / tiles.per_image, first = tile % tiles.per_image * tiles.length;
  const int64_t positions = tiles.length_of(tile);
  const T* from = local + image * shape.image_size();
  if (shape.channels_inner)
    return {from + first * shape.channels, positions, shape.channels, shape.channels};
  return {from + first, shape.channels, positions, shape.positions};
}

// The features of a tile in the type of arithmetic, 0 at the positions that a mask leaves out.
template <typename T>
Matrix<Wide<T>> widened(const Tiles& tiles, const Matrix<T>& m, const bool* mask, std::vector<Wide<T>>& buffer) {
  buffer.resize(m.rows * m.columns);
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* from = m.row(r);
    Wide<T>* to = &buffer[r * m.columns];
    if (mask != nullptr && tiles.shape.channels_inner)
      for_lanes(m.columns, [&](int64_t i) { to[i] = mask[r] ? widen(from[i]) : Wide<T>(0); });
    else if (mask != nullptr)
      for_lanes(m.columns, [&](int64_t i) { to[i] = mask[i] ? widen(from[i]) : Wide<T>(0); });
    else
      for_lanes(m.columns, [&](int64_t i) { to[i] = widen(from[i]); });
  }
  return {buffer.data(), m.rows, m.columns, m.columns};
}

// A tile's scores ⟨ℓ, vector⟩ for each of some vectors, and sums of its features with weights per position.
template <typename T>
void dot_channels(const Tiles& tiles, const Matrix<T>& m, Vectors<const Wide<T>> vectors, Vectors<Wide<T>> out) {
  tiles.shape.channels_inner ? dots(m, vectors, out) : sums(m, vectors, out);
}
template <typename T>
void sum_positions(const Tiles& tiles, const Matrix<T>& m, Vectors<const Wide<T>> weights, Vectors<Wide<T>> out) {
  tiles.shape.channels_inner ? sums(m, weights, out) : dots(m, weights, out);
}

template <typename A> bool finite(const Vectors<const A>& vectors, int64_t length) {
  for (int64_t k = 0; k < vectors.count; ++k)
    if (!std::all_of(vectors.at(k), vectors.at(k) + length, [](A x) { return std::isfinite(x); }))
      return false;
  return true;
}

template <typename T>
void pool_forward(const Tiles& tiles, const T* local, const Queries<Wide<T>>& queries, const Mask& mask, T* pooled,
                  Wide<T>* attention, Wide<T>* scores, Wide<T>* pooled_wide) {
  using A = Wide<T>;
  const int64_t channels = tiles.shape.channels, positions = tiles.shape.positions, count = queries.count;
  A* wide = pooled_wide;
  if constexpr (std::is_same_v<T, A>)
    wide = pooled;
  std::vector<A> maxima(tiles.count() * count), totals(tiles.count() * count);
  // An image that is a single tile is summed in place.
  const bool whole = tiles.per_image == 1;
  const auto buffer = std::make_unique_for_overwrite<A[]>(whole ? 0 : tiles.count() * count * channels);
  A* sum = whole ? wide : buffer.get();
  parallel(tiles.count(), tiles.length * channels * count, [&](int64_t tile) {
    const Matrix<T> m = tile_of(tiles, local, tile);
    const int64_t length = tiles.length_of(tile), first = tiles.first_of(tile), image = tile / tiles.per_image;
    const bool* kept = mask.at(image, first);
    const Vectors<const A> query{queries.at(image), count, channels};
    const Vectors<A> score{scores + image * count * positions + first, count, positions};
    std::vector<A> features, weights(count * length);
    const Vectors<A> weight{weights.data(), count, length};
    const auto weigh = [&] {
      for (int64_t k = 0; k < count; ++k) {
        const A* s = score.at(k);
        A* w = weight.at(k);
        if (kept != nullptr)
          for_lanes(length, [&](int64_t i) { w[i] = kept[i] ? s[i] : A(-INFINITY); });
        const A* used = kept != nullptr ? w : s;
        A max = used[0];
#pragma omp simd reduction(max : max)
        for (int64_t i = 0; i < length; ++i)
          max = used[i] > max ? used[i] : max;
        if (kept != nullptr)
          for (int64_t i = 0; i < length; ++i)
            w[i] = kept[i] ? softmax_weight(s[i], max) : A(0);
        else
          for_lanes(length, [&](int64_t i) { w[i] = softmax_weight(s[i], max); });
        maxima[tile * count + k] = max;
        totals[tile * count + k] = sum_lanes<A>(length, [&](int64_t i) { return w[i]; });
      }
    };
    const Vectors<A> to{sum + tile * count * channels, count, channels};
    const auto pool = [&](const auto& values) {
      dot_channels(tiles, values, query, score);
      weigh();
      if (kept == nullptr)
        sum_positions(tiles, values, constant(weight), to);
      else // 0 times NaN would be NaN
        sum_positions(tiles, widened(tiles, m, kept, features), constant(weight), to);
    };
    widens<T>(count) ? pool(widened(tiles, m, nullptr, features)) : pool(m);
  });
  parallel(tiles.shape.images * count, positions + tiles.per_image * channels, [&](int64_t row) {
    const int64_t image = row / count, k = row % count, first = image * tiles.per_image;
    const auto of_tile = [&](int64_t tile) { return (first + tile) * count + k; };
    A max = maxima[of_tile(0)];
    for (int64_t tile = 1; tile < tiles.per_image; ++tile)
      max = std::max(max, maxima[of_tile(tile)]);
    A* total_sum = sum + of_tile(0) * channels; // of the first tile, then of all tiles
    A total = 0;
    for (int64_t tile = 0; tile < tiles.per_image; ++tile) {
      const A weight = softmax_weight(maxima[of_tile(tile)], max);
      const A* more = sum + of_tile(tile) * channels;
      total += weight * totals[of_tile(tile)];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        total_sum[c] = weight * more[c] + (tile == 0 ? A(0) : total_sum[c]);
    }
    const bool* kept = mask.at(image, 0);
    const bool empty = kept != nullptr && std::find(kept, kept + positions, true) == kept + positions;
    const A inverse = empty ? A(0) : A(1) / total;
    const A* score = scores + row * positions;
    A* to = attention + row * positions;
    if (kept == nullptr)
      for_lanes(positions, [&](int64_t i) { to[i] = exponential(score[i] - max) * inverse; });
    else
      for (int64_t i = 0; i < positions; ++i)
        to[i] = kept[i] ? exponential(score[i] - max) * inverse : A(0);
    for (int64_t c = 0; c < channels; ++c) {
      const A value = total_sum[c] * inverse;
      wide[row * channels + c] = value;
      if constexpr (!std::is_same_v<T, A>)
        pooled[row * channels + c] = narrow<T>(value);
    }
  });
}

// dq per image, (N, M, C), and the gradient of the features unless it is null.
template <typename T>
void pool_backward(const Tiles& tiles, const Wide<T>* grad_pooled, const Wide<T>* grad_attention,
                   const Wide<T>* grad_scores, const T* local, const Queries<Wide<T>>& queries, const Mask& mask,
                   const Wide<T>* attention, const Wide<T>* pooled, T* grad_local, Wide<T>* grad_query) {
  using A = Wide<T>;
  const int64_t channels = tiles.shape.channels, positions = tiles.shape.positions, count = queries.count;
  std::vector<A> deltas(tiles.shape.images * count);
  const bool whole = tiles.per_image == 1;
  const auto buffer = std::make_unique_for_overwrite<A[]>(whole ? 0 : tiles.count() * count * channels);
  A* sum = whole ? grad_query : buffer.get();
  parallel(tiles.shape.images * count, positions + channels, [&](int64_t row) {
    const A *grad = grad_pooled + row * channels, *value = pooled + row * channels;
    deltas[row] = sum_lanes<A>(channels, [&](int64_t c) { return grad[c] * value[c]; });
    if (grad_attention != nullptr) {
      const A *a = attention + row * positions, *more = grad_attention + row * positions;
      const bool* kept = mask.at(row / count, 0);
      deltas[row] += kept == nullptr
                         ? sum_lanes<A>(positions, [&](int64_t i) { return a[i] * more[i]; })
                         : sum_lanes<A>(positions, [&](int64_t i) { return kept[i] ? a[i] * more[i] : A(0); });
    }
  });
  parallel(tiles.count(), 2 * tiles.length * channels * count, [&](int64_t tile) {
    const Matrix<T> m = tile_of(tiles, local, tile);
    const int64_t length = tiles.length_of(tile), image = tile / tiles.per_image;
    const int64_t row = image * count, first = row * positions + tiles.first_of(tile);
    const bool* kept = mask.at(image, tiles.first_of(tile));
    const Vectors<const A> grad{grad_pooled + row * channels, count, channels};
    const Vectors<const A> query{queries.at(image), count, channels}, weight{attention + first, count, positions};
    std::vector<A> features, gradients(count * length);
    const Vectors<A> grad_score{gradients.data(), count, length};
    const auto differentiate = [&] {
      for (int64_t k = 0; k < count; ++k) {
        A* s = grad_score.at(k);
        const A* w = weight.at(k);
        const A *more = grad_attention == nullptr ? nullptr : grad_attention + first + k * positions,
                *last = grad_scores == nullptr ? nullptr : grad_scores + first + k * positions;
        const A delta = deltas[row + k];
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) {
          const A direct = last == nullptr ? A(0) : last[i];
          const A through = score_grad(w[i], s[i] + (more == nullptr ? A(0) : more[i]), delta, direct);
          s[i] = kept != nullptr && !kept[i] ? direct : through;
        }
      }
    };
    const Vectors<A> to{sum + tile * count * channels, count, channels};
    // A feature that is masked reaches the queries through the scores alone.
    const bool* used = grad_scores == nullptr ? kept : nullptr;
    const auto pull = [&](const auto& values) {
      dot_channels(tiles, values, grad, grad_score);
      differentiate();
      sum_positions(tiles, values, constant(grad_score), to);
    };
    widens<T>(count) || used != nullptr ? pull(widened(tiles, m, used, features)) : pull(m);
    if (grad_local == nullptr)
      return;
    T* out = grad_local + (m.first - local);
    const bool inner = tiles.shape.channels_inner;
    const Outer<A> factors = inner ? Outer<A>{weight, grad, constant(grad_score), query}
                                   : Outer<A>{grad, weight, query, constant(grad_score)};
    outers(m, factors, streams<T>(tiles.shape), out);
    // At masked positions the weights are 0, but 0 times NaN is NaN.
    if (kept == nullptr || (finite(grad, channels) && (grad_scores != nullptr || finite(query, channels))))
      return;
    for (int64_t r = 0; r < m.rows; ++r)
      for (int64_t i = 0; i < m.columns; ++i) {
        const int64_t position = inner ? r : i, channel = inner ? i : r;
        if (kept[position])
          continue;
        A value = 0;
        for (int64_t k = 0; grad_scores != nullptr && k < count; ++k)
          value += grad_score.at(k)[position] * query.at(k)[channel];
        out[r * m.stride + i] = narrow<T>(value);
      }
  });
  if (whole)
    return;
  parallel(tiles.shape.images * count, tiles.per_image * channels, [&](int64_t row) {
    A* to = grad_query + row * channels;
    std::fill_n(to, channels, A(0));
    for (int64_t tile = 0; tile < tiles.per_image; ++tile) {
      const A* more = sum + ((row / count * tiles.per_image + tile) * count + row % count) * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        to[c] += more[c];
    }
  });
}

} // namespace attnkern::ATTNKERN_ISA
