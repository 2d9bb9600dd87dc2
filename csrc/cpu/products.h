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

template <int R, int V, typename T>
ATTNKERN_INLINE void outer_block(const Outer<Wide<T>>& f, int64_t r, int64_t i, T* out, int64_t stride) {
  using A = Wide<T>;
  constexpr int W = kWidth<A>;
  A sum[R][V][W] = {};
  for (int64_t k = 0; k < f.left1.count; ++k) {
    const A *left1 = f.left1.at(k) + r, *right1 = f.right1.at(k) + i;
    const A *left2 = f.left2.at(k) + r, *right2 = f.right2.at(k) + i;
#pragma GCC unroll 4
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
#pragma omp simd
        for (int l = 0; l < W; ++l)
          sum[q][v][l] += left1[q] * right1[v * W + l] + left2[q] * right2[v * W + l];
  }
#pragma GCC unroll 4
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma omp simd
      for (int l = 0; l < W; ++l)
        out[(r + q) * stride + i + v * W + l] = narrow<T>(sum[q][v][l]);
}

template <typename T> void outers(const Matrix<T>& m, const Outer<Wide<T>>& f, T* out) {
  using A = Wide<T>;
  constexpr int W = kWidth<A>;
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
  const auto rows = [&](int64_t r, auto count) {
    int64_t i = 0;
    for (; i + kSide * W <= m.columns; i += kSide * W)
      outer_block<count, kSide>(f, r, i, out, m.stride);
    for (; i + W <= m.columns; i += W)
      outer_block<count, 1>(f, r, i, out, m.stride);
    if (i < m.columns)
      outer_block<count, 1>(f, r, m.columns - W, out, m.stride);
  };
  int64_t r = 0;
  for (; r + kSide <= m.rows; r += kSide)
    rows(r, std::integral_constant<int, kSide>());
  for (; r < m.rows; ++r)
    rows(r, std::integral_constant<int, 1>());
}

} // namespace attnkern::ATTNKERN_ISA
