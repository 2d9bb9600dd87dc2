// Products of a matrix in memory, such as a tile of features, with a few vectors. Blocks of the result stay in registers
// while they are summed up. Included once per instruction set.

#include "cpu/simd.h"

namespace attnkern::ATTNKERN_ISA {

template <typename A> constexpr int kWidth = ATTNKERN_VECTOR_BYTES / sizeof(A); // elements of a register
constexpr int kSide = ATTNKERN_VECTOR_REGISTERS >= 32 ? 4 : 2;                 // registers per vector of a block
constexpr int kVectors = 4;                                                    // vectors of a block

template <typename T> struct Matrix {
  const T* first;
  int64_t rows, columns, stride;

  const T* row(int64_t r) const { return first + r * stride; }
};

// Vectors of the same length; vector k begins at first + k·stride.
template <typename A> struct Vectors {
  A* first;
  int64_t count, stride;

  A* at(int64_t k) const { return first + k * stride; }
};

template <typename A> Vectors<const A> constant(Vectors<A> v) { return {v.first, v.count, v.stride}; }

// --- one vector ---

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

// --- several vectors ---

// Calls body(k, size) for blocks of at most kVectors of `count` vectors. The size is a constant.
template <typename Body> ATTNKERN_INLINE void for_blocks(int64_t count, const Body& body) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4)
    body(k, std::integral_constant<int, 4>());
  if (count - k == 3)
    body(k, std::integral_constant<int, 3>());
  if (count - k == 2)
    body(k, std::integral_constant<int, 2>());
  if (count - k == 1)
    body(k, std::integral_constant<int, 1>());
}

// out[r] = Σ_l lane[r][l].
template <int R, int W, typename A> ATTNKERN_INLINE void sum_registers(const A (&lane)[R][W], A* out) {
  constexpr int kHalf = W / 2;
  A half[R][kHalf];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma omp simd
    for (int l = 0; l < kHalf; ++l)
      half[r][l] = lane[r][l] + lane[r][l + kHalf];
  if constexpr (kHalf > 4)
    sum_registers(half, out);
  else
#pragma omp simd
    for (int r = 0; r < R; ++r) {
      A sum = half[r][0];
#pragma GCC unroll 4
      for (int l = 1; l < kHalf; ++l)
        sum += half[r][l];
      out[r] = sum;
    }
}

// --- out[k][r] = Σ_i m[r, i]·weight[k][i] ---

// For K vectors and R rows. The last register of a row overlaps the one before it: `last` holds its weights, which are 0
// for elements that have been counted.
template <int K, int R, typename T, typename A>
ATTNKERN_INLINE void dot_rows(const Matrix<T>& m, int64_t r, const A* weight, int64_t stride, const A* last, A* out,
                              int64_t out_stride) {
  constexpr int W = kWidth<A>;
  A sum[K][R][W] = {};
  const int64_t whole = m.columns & -W;
  for (int64_t i = 0; i < whole; i += W)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q)
#pragma omp simd
        for (int l = 0; l < W; ++l)
          sum[k][q][l] += weight[k * stride + i + l] * widen(m.row(r + q)[i + l]);
  if (whole < m.columns)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int q = 0; q < R; ++q)
#pragma omp simd
        for (int l = 0; l < W; ++l)
          sum[k][q][l] += last[k * W + l] * widen(m.row(r + q)[m.columns - W + l]);
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k)
    sum_registers(sum[k], out + k * out_stride + r);
}

template <typename T> void dots(const Matrix<T>& m, Vectors<const Wide<T>> weight, Vectors<Wide<T>> out) {
  using A = Wide<T>;
  constexpr int W = kWidth<A>;
  if (weight.count == 1)
    return times_vector(m, weight.first, out.first);
  if (m.columns < W) {
    for (int64_t k = 0; k < weight.count; ++k)
      for (int64_t r = 0; r < m.rows; ++r) {
        A sum = 0;
        for (int64_t i = 0; i < m.columns; ++i)
          sum += weight.at(k)[i] * widen(m.row(r)[i]);
        out.at(k)[r] = sum;
      }
    return;
  }
  const int64_t whole = m.columns & -W;
  std::vector<A> last(weight.count * W);
  for (int64_t k = 0; k < weight.count; ++k)
    std::copy(weight.at(k) + whole, weight.at(k) + m.columns, &last[(k + 1) * W] - (m.columns - whole));
  // Rows that stay in the first-level cache while all vectors are multiplied.
  const int64_t panel = std::max<int64_t>(kSide, 4096 / m.columns & -kSide);
  for (int64_t first = 0; first < m.rows; first += panel)
    for_blocks(weight.count, [&](int64_t k, auto size) {
      const int64_t end = std::min(m.rows, first + panel);
      int64_t r = first;
      for (; r + kSide <= end; r += kSide)
        dot_rows<size, kSide>(m, r, weight.at(k), weight.stride, &last[k * W], out.at(k), out.stride);
      for (; r < end; ++r)
        dot_rows<size, 1>(m, r, weight.at(k), weight.stride, &last[k * W], out.at(k), out.stride);
    });
}

// --- out[k][i] = Σ_r weight[k][r]·m[r, i] ---

// For K vectors, V registers from column i, and the rows in [r, end), added to out unless r is 0. The first `known`
// columns are left as they are.
template <int K, int V, typename T, typename A>
ATTNKERN_INLINE void sum_rows(const Matrix<T>& m, int64_t i, int64_t r, int64_t end, const A* weight, int64_t stride,
                              int known, A* out, int64_t out_stride) {
  constexpr int W = kWidth<A>;
  A sum[K][V][W] = {};
  for (int64_t row = r; row < end; ++row)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
#pragma omp simd
        for (int l = 0; l < W; ++l)
          sum[k][v][l] += weight[k * stride + row] * widen(m.row(row)[i + v * W + l]);
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* to = out + k * out_stride + i + v * W;
      if (r == 0)
#pragma omp simd
        for (int l = 0; l < W; ++l)
          to[l] = sum[k][v][l];
      else
        for (int l = known; l < W; ++l)
          to[l] += sum[k][v][l];
    }
}

// Block of rows by block: the rounding error grows with the rows of a block plus the number of blocks, not with the
// number of rows.
template <typename T> void sums(const Matrix<T>& m, Vectors<const Wide<T>> weight, Vectors<Wide<T>> out) {
  using A = Wide<T>;
  constexpr int W = kWidth<A>;
  constexpr int64_t kRows = 128;
  if (weight.count == 1)
    return vector_times(weight.first, m, out.first);
  if (m.columns < W) {
    for (int64_t k = 0; k < weight.count; ++k)
      for (int64_t i = 0; i < m.columns; ++i) {
        A total = 0;
        for (int64_t first = 0; first < m.rows; first += kRows) {
          A sum = 0;
          for (int64_t r = first; r < std::min(m.rows, first + kRows); ++r)
            sum += weight.at(k)[r] * widen(m.row(r)[i]);
          total += sum;
        }
        out.at(k)[i] = total;
      }
    return;
  }
  if (m.rows == 0)
    for (int64_t k = 0; k < out.count; ++k)
      std::fill_n(out.at(k), m.columns, A(0));
  for (int64_t r = 0; r < m.rows; r += kRows) {
    const int64_t end = std::min(m.rows, r + kRows);
    const auto columns = [&](int64_t i, auto registers, int known) {
      for_blocks(weight.count, [&](int64_t k, auto size) {
        sum_rows<size, registers>(m, i, r, end, weight.at(k), weight.stride, known, out.at(k), out.stride);
      });
    };
    int64_t i = 0;
    for (; i + kSide * W <= m.columns; i += kSide * W)
      columns(i, std::integral_constant<int, kSide>(), 0);
    for (; i + W <= m.columns; i += W)
      columns(i, std::integral_constant<int, 1>(), 0);
    if (i < m.columns)
      columns(m.columns - W, std::integral_constant<int, 1>(), static_cast<int>(W - (m.columns - i)));
  }
}

// --- out[r, i] = Σ_k left1[k][r]·right1[k][i] + left2[k][r]·right2[k][i], in the layout of m ---

template <typename A> struct Outer {
  Vectors<const A> left1, right1, left2, right2;
};

template <int V, typename T>
ATTNKERN_INLINE void outer_block(const Outer<Wide<T>>& f, int64_t r, int64_t i, T* out, int64_t stride) {
  using A = Wide<T>;
  constexpr int W = kWidth<A>;
  A sum[V][W] = {};
  for (int64_t k = 0; k < f.left1.count; ++k) {
    const A left1 = f.left1.at(k)[r], *right1 = f.right1.at(k) + i;
    const A left2 = f.left2.at(k)[r], *right2 = f.right2.at(k) + i;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma omp simd
      for (int l = 0; l < W; ++l)
        sum[v][l] += left1 * right1[v * W + l] + left2 * right2[v * W + l];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
#pragma omp simd
    for (int l = 0; l < W; ++l)
      out[r * stride + i + v * W + l] = narrow<T>(sum[v][l]);
}

template <typename T> void outers(const Matrix<T>& m, const Outer<Wide<T>>& f, bool stream, T* out) {
  using A = Wide<T>;
  constexpr int W = kWidth<A>;
  if (f.left1.count == 1)
    return outer_products(m, f.left1.first, f.right1.first, f.left2.first, f.right2.first, stream, out);
  if (m.columns < W) {
    for (int64_t r = 0; r < m.rows; ++r)
      for (int64_t i = 0; i < m.columns; ++i) {
        A sum = 0;
        for (int64_t k = 0; k < f.left1.count; ++k)
          sum += f.left1.at(k)[r] * f.right1.at(k)[i] + f.left2.at(k)[r] * f.right2.at(k)[i];
        out[r * m.stride + i] = narrow<T>(sum);
      }
    return;
  }
  const auto rows = [&](int64_t r) {
    int64_t i = 0;
    for (; i + kSide * W <= m.columns; i += kSide * W)
      outer_block<kSide>(f, r, i, out, m.stride);
    for (; i + W <= m.columns; i += W)
      outer_block<1>(f, r, i, out, m.stride);
    if (i < m.columns)
      outer_block<1>(f, r, m.columns - W, out, m.stride);
  };
  // One row at a time: writing several rows side by side takes up to twice as long.
  for (int64_t r = 0; r < m.rows; ++r)
    rows(r);
}

} // namespace attnkern::ATTNKERN_ISA
