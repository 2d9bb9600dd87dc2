// The kernels of compatibility pooling. Included once per instruction set by foreach_isa.h, after the types of pool.cpp.

#include "cpu/simd.h"

namespace attnkern::ATTNKERN_ISA {

// The features of a tile as a matrix in memory: rows are channels, or positions if channels are innermost.
template <typename T> struct Matrix {
  const T* first;
  int64_t rows, columns, stride;

  const T* row(int64_t r) const { return first + r * stride; }
};

template <typename T> Matrix<T> tile_of(const Tiles& tiles, const T* local, int64_t tile) {
  const Shape& shape = tiles.shape;
  const int64_t image = tile / tiles.per_image, first = tile % tiles.per_image * tiles.length;
  const int64_t positions = tiles.length_of(tile);
  const T* from = local + image * shape.image_size();
  if (shape.channels_inner)
    return {from + first * shape.channels, positions, shape.channels, shape.channels};
  return {from + first, shape.channels, positions, shape.positions};
}

// out[r] = Σ_i m[r, i]·weight[i], four rows at a time.
template <typename T> void times_vector(const Matrix<T>& m, const Wide<T>* weight, Wide<T>* out) {
  using A = Wide<T>;
  const int64_t columns = m.columns, whole = columns < kLanes ? 0 : columns & -kLanes;
  // The last vector of a row overlaps the one before it; elements that have been counted get weight 0.
  A last[kLanes] = {};
  if (whole > 0)
    std::copy(weight + whole, weight + columns, last + kLanes - (columns - whole));
  int64_t r = 0;
  for (; whole > 0 && r + 4 <= m.rows; r += 4) {
    const T *m0 = m.row(r), *m1 = m.row(r + 1), *m2 = m.row(r + 2), *m3 = m.row(r + 3);
    A lane[4][kLanes] = {};
    for (int64_t first = 0; first < whole; first += kLanes)
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        const A w = weight[first + i];
        lane[0][i] += w * widen(m0[first + i]), lane[1][i] += w * widen(m1[first + i]);
        lane[2][i] += w * widen(m2[first + i]), lane[3][i] += w * widen(m3[first + i]);
      }
    if (whole < columns) {
      const int64_t first = columns - kLanes;
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        lane[0][i] += last[i] * widen(m0[first + i]), lane[1][i] += last[i] * widen(m1[first + i]);
        lane[2][i] += last[i] * widen(m2[first + i]), lane[3][i] += last[i] * widen(m3[first + i]);
      }
    }
    sums_of(lane, out + r);
  }
  for (; r < m.rows; ++r) {
    const T* row = m.row(r);
    out[r] = sum_lanes<A>(columns, [=](int64_t i) { return weight[i] * widen(row[i]); });
  }
}

// out[i] = Σ_r weight[r]·m[r, i] for r in [r, end), four rows at a time.
template <typename T>
void vector_times(const Wide<T>* weight, const Matrix<T>& m, int64_t r, int64_t end, Wide<T>* out) {
  using A = Wide<T>;
  const int64_t columns = m.columns, whole = columns < kLanes ? 0 : columns & -kLanes;
  const int64_t first = columns - kLanes; // of the last vector, which overlaps the one before it
  std::fill_n(out, columns, A(0));
  A last[kLanes] = {};
  for (; whole > 0 && r + 4 <= end; r += 4) {
    const T *m0 = m.row(r), *m1 = m.row(r + 1), *m2 = m.row(r + 2), *m3 = m.row(r + 3);
    const A w0 = weight[r], w1 = weight[r + 1], w2 = weight[r + 2], w3 = weight[r + 3];
#pragma omp simd
    for (int64_t i = 0; i < whole; ++i)
      out[i] += (w0 * widen(m0[i]) + w1 * widen(m1[i])) + (w2 * widen(m2[i]) + w3 * widen(m3[i]));
    if (whole < columns)
#pragma omp simd
      for (int i = 0; i < kLanes; ++i)
        last[i] += (w0 * widen(m0[first + i]) + w1 * widen(m1[first + i])) +
                   (w2 * widen(m2[first + i]) + w3 * widen(m3[first + i]));
  }
  for (int64_t i = whole; whole > 0 && i < columns; ++i)
    out[i] = last[i - first];
  for (; r < end; ++r) {
    const T* row = m.row(r);
    const A w = weight[r];
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i)
      out[i] += w * widen(row[i]);
  }
}

// Over all rows, block by block: the rounding error grows with the rows per block plus the number of blocks, not with
// the number of rows.
template <typename T> void vector_times(const Wide<T>* weight, const Matrix<T>& m, Wide<T>* out) {
  constexpr int64_t kRows = 128;
  vector_times(weight, m, 0, std::min(kRows, m.rows), out);
  std::vector<Wide<T>> block(m.rows > kRows ? m.columns : 0);
  for (int64_t begin = kRows; begin < m.rows; begin += kRows) {
    vector_times(weight, m, begin, std::min(begin + kRows, m.rows), block.data());
#pragma omp simd
    for (int64_t i = 0; i < m.columns; ++i)
      out[i] += block[i];
  }
}

// Outer products, as below, for rows of kVectors vectors (such as a 7x7 map): the right-hand sides stay in registers.
template <int kVectors, typename T>
void outer_products_few(const Matrix<T>& m, const Wide<T>* left1, const Wide<T>* right1, const Wide<T>* left2,
                        const Wide<T>* right2, T* out) {
  using A = Wide<T>;
  int64_t at[kVectors]; // of each vector; the last one overlaps the one before it
  A first[kVectors][kLanes], second[kVectors][kLanes];
  for (int v = 0; v < kVectors; ++v) {
    at[v] = std::min<int64_t>(v * kLanes, m.columns - kLanes);
    std::copy_n(right1 + at[v], kLanes, first[v]);
    std::copy_n(right2 + at[v], kLanes, second[v]);
  }
  for (int64_t r = 0; r < m.rows; ++r) {
    const A a = left1[r], b = left2[r];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + r * m.stride + at[v];
#pragma omp simd
      for (int i = 0; i < kLanes; ++i)
        to[i] = narrow<T>(a * first[v][i] + b * second[v][i]);
    }
  }
}

// out = left1 ⊗ right1 + left2 ⊗ right2, in the layout of m.
template <typename T>
void outer_products(const Matrix<T>& m, const Wide<T>* left1, const Wide<T>* right1, const Wide<T>* left2,
                    const Wide<T>* right2, bool stream, T* out) {
  if (!stream && m.columns >= kLanes)
    switch ((m.columns + kLanes - 1) / kLanes) {
    case 1:
      return outer_products_few<1>(m, left1, right1, left2, right2, out);
    case 2:
      return outer_products_few<2>(m, left1, right1, left2, right2, out);
    case 3:
      return outer_products_few<3>(m, left1, right1, left2, right2, out);
    case 4:
      return outer_products_few<4>(m, left1, right1, left2, right2, out);
    }
  for (int64_t r = 0; r < m.rows; ++r) {
    const Wide<T> a = left1[r], b = left2[r];
    write_lanes(m.columns, out + r * m.stride, stream,
                [=](int64_t i) { return narrow<T>(a * right1[i] + b * right2[i]); });
  }
}

// A tile's scores ⟨ℓ, vector⟩, and the sum of its features with a weight per position.
template <typename T> void dot_channels(const Tiles& tiles, const Matrix<T>& m, const Wide<T>* weight, Wide<T>* out) {
  tiles.shape.channels_inner ? times_vector(m, weight, out) : vector_times(weight, m, out);
}
template <typename T> void sum_positions(const Tiles& tiles, const Matrix<T>& m, const Wide<T>* weight, Wide<T>* out) {
  tiles.shape.channels_inner ? vector_times(weight, m, out) : times_vector(m, weight, out);
}

template <typename T>
void pool_forward(const Tiles& tiles, const T* local, const Widened<Wide<T>>& query, T* pooled,
                  Wide<T>* attention, Wide<T>* scores, Wide<T>* pooled_wide) {
  using A = Wide<T>;
  const int64_t channels = tiles.shape.channels, positions = tiles.shape.positions;
  std::vector<A> maxima(tiles.count()), totals(tiles.count());
  const auto sums = std::make_unique_for_overwrite<A[]>(tiles.count() * channels);
  parallel(tiles.count(), tiles.length * channels, [&](int64_t tile) {
    const Matrix<T> m = tile_of(tiles, local, tile);
    const int64_t length = tiles.length_of(tile);
    const int64_t image = tile / tiles.per_image;
    A* score = scores + image * positions + tile % tiles.per_image * tiles.length;
    dot_channels(tiles, m, query_of(query, image, channels), score);
    A max = score[0];
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < length; ++i)
      max = score[i] > max ? score[i] : max;
    std::vector<A> weight(length);
    for_lanes(length, [&](int64_t i) { weight[i] = softmax_weight(score[i], max); });
    maxima[tile] = max;
    totals[tile] = sum_lanes<A>(length, [&](int64_t i) { return weight[i]; });
    sum_positions(tiles, m, weight.data(), &sums[tile * channels]);
  });
  parallel(tiles.shape.images, positions + tiles.per_image * channels, [&](int64_t image) {
    const int64_t first = image * tiles.per_image;
    const A max = *std::max_element(&maxima[first], &maxima[first] + tiles.per_image);
    A* sum = &sums[first * channels]; // of the first tile, then of all tiles
    A total = 0;
    for (int64_t tile = first; tile < first + tiles.per_image; ++tile) {
      const A weight = softmax_weight(maxima[tile], max);
      const A* more = &sums[tile * channels];
      total += weight * totals[tile];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        sum[c] = weight * more[c] + (tile == first ? A(0) : sum[c]);
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

// dq per image, (N, C), and the gradient of the features unless it is null.
template <typename T>
void pool_backward(const Tiles& tiles, const Wide<T>* grad_pooled, const Wide<T>* grad_attention,
                   const Wide<T>* grad_scores, const T* local, const Widened<Wide<T>>& query,
                   const Wide<T>* attention, const Wide<T>* pooled, T* grad_local, Wide<T>* grad_query) {
  using A = Wide<T>;
  const int64_t channels = tiles.shape.channels, positions = tiles.shape.positions;
  std::vector<A> deltas(tiles.shape.images);
  const bool whole = tiles.per_image == 1;
  const auto buffer = std::make_unique_for_overwrite<A[]>(whole ? 0 : tiles.count() * channels);
  A* sums = whole ? grad_query : buffer.get();
  parallel(tiles.shape.images, positions + channels, [&](int64_t image) {
    const int64_t channel = image * channels, position = image * positions;
    deltas[image] = sum_lanes<A>(channels, [&](int64_t c) { return grad_pooled[channel + c] * pooled[channel + c]; });
    if (grad_attention != nullptr)
      deltas[image] +=
          sum_lanes<A>(positions, [&](int64_t i) { return attention[position + i] * grad_attention[position + i]; });
  });
  parallel(tiles.count(), 2 * tiles.length * channels, [&](int64_t tile) {
    const Matrix<T> m = tile_of(tiles, local, tile);
    const int64_t length = tiles.length_of(tile);
    const int64_t image = tile / tiles.per_image;
    const int64_t first = image * positions + tile % tiles.per_image * tiles.length;
    const A *weight = attention + first, *grad = &grad_pooled[image * channels];
    const A* query_image = query_of(query, image, channels);
    std::vector<A> grad_score(length);
    dot_channels(tiles, m, grad, grad_score.data());
    for (int64_t i = 0; i < length; ++i) {
      const A s = grad_score[i] + (grad_attention == nullptr ? A(0) : grad_attention[first + i]);
      grad_score[i] =
          score_grad(weight[i], s, deltas[image], grad_scores == nullptr ? A(0) : grad_scores[first + i]);
    }
    sum_positions(tiles, m, grad_score.data(), &sums[tile * channels]);
    if (grad_local == nullptr)
      return;
    T* out = grad_local + (m.first - local);
    const bool stream = streams<T>(tiles.shape);
    if (tiles.shape.channels_inner)
      outer_products(m, weight, grad, grad_score.data(), query_image, stream, out);
    else
      outer_products(m, grad, weight, query_image, grad_score.data(), stream, out);
  });
  if (whole)
    return;
  parallel(tiles.shape.images, tiles.per_image * channels, [&](int64_t image) {
    A* sum = grad_query + image * channels;
    std::fill_n(sum, channels, A(0));
    for (int64_t tile = image * tiles.per_image; tile < (image + 1) * tiles.per_image; ++tile)
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        sum[c] += sums[tile * channels + c];
  });
}

} // namespace attnkern::ATTNKERN_ISA
