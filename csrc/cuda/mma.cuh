// Products of small matrices by a warp. float uses the tensor cores in TF32, with factors split into two parts, so that
// the products are as exact as those of float32. double, and GPUs without TF32, use the ordinary units.
#pragma once

#include "cuda/packed.cuh"

namespace attnkern {

// d += a·b of matrices a (16, 8), b (8, 8) and d (16, 8), which the lanes of a warp hold together. With g = lane / 4
// and t = lane % 4, a lane has
//   a at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b at (t, g), (t + 4, g)
//   d at (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename A> ATTNKERN_DEVICE void mma_by_shuffles(A (&d)[4], const A (&a)[4], const A (&b)[2]) {
  const int lane = threadIdx.x % kWarp, row = lane & ~3, column = lane % 4 * 8;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const A upper = __shfl_sync(kAllLanes, a[k / 4 * 2], row + k % 4);
    const A lower = __shfl_sync(kAllLanes, a[k / 4 * 2 + 1], row + k % 4);
    const A left = __shfl_sync(kAllLanes, b[k / 4], column + k % 4);
    const A right = __shfl_sync(kAllLanes, b[k / 4], column + 4 + k % 4);
    d[0] = std::fma(upper, left, d[0]);
    d[1] = std::fma(upper, right, d[1]);
    d[2] = std::fma(lower, left, d[2]);
    d[3] = std::fma(lower, right, d[3]);
  }
}
ATTNKERN_DEVICE void mma(double (&d)[4], const double (&a)[4], const double (&b)[2]) { mma_by_shuffles(d, a, b); }

// The elements of a and b must be TF32 numbers: float with the last 13 bits zero.
ATTNKERN_DEVICE void mma(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(ATTNKERN_ON_HOST)
  cuda_on_host::mma_tf32(d, a, b);
#elif __CUDA_ARCH__ >= 800
  const auto bits = [](float x) { return bit_cast<uint32_t>(x); };
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b[0])), "r"(bits(b[1])));
#else
  mma_by_shuffles(d, a, b);
#endif
}

// The nearest TF32 number.
ATTNKERN_DEVICE float round_to_tf32(float x) {
#if defined(ATTNKERN_ON_HOST)
  return cuda_on_host::round_to_tf32(x);
#elif __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bit_cast<float>(bits);
#else
  return x;
#endif
}

// x as a sum of two TF32 numbers, up to an error of two units in the last place. The first one is cut off and not
// rounded, so that no finite number becomes Inf. The second one has the sign of x and is zero only if x is, so that
// products with Inf have the same sign, and none of them is 0·Inf. If the remainder is zero, x·2⁻⁴⁰ takes its place, which
// is below the rounding of x.
ATTNKERN_DEVICE void split_factor(float x, float& high, float& low) {
  high = bit_cast<float>(bit_cast<uint32_t>(x) & 0xffffe000u);
  const float rest = x - high; // NaN if x is Inf
  low = round_to_tf32(std::fabs(rest) > 0 ? rest : x * 0x1p-40f);
}
ATTNKERN_DEVICE void split_factor(double x, double& high, double& low) { high = x, low = 0; }

// Whether every number of a type is a factor of mma() as it is.
template <typename T> constexpr bool kIsFactor = !std::is_same_v<T, float>;

// Factors of mma(); the low parts do not exist where the high ones are the numbers.
template <typename A, int N, bool kWhole> struct Factor {
  A high[N], low[N];

  Factor() = default;
  ATTNKERN_DEVICE explicit Factor(const A (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if constexpr (kWhole)
        high[i] = values[i];
      else
        split_factor(values[i], high[i], low[i]);
  }
};

// d += a·b. Leaves out the product of the low parts, which is below the rounding of float.
template <typename A, bool kWholeA, bool kWholeB>
ATTNKERN_DEVICE void multiply(A (&d)[4], const Factor<A, 4, kWholeA>& a, const Factor<A, 2, kWholeB>& b) {
  if constexpr (!kWholeA)
    mma(d, a.low, b.high);
  if constexpr (!kWholeB)
    mma(d, a.high, b.low);
  mma(d, a.high, b.high);
}

// The same for a long sum. Tensor cores round sums towards zero, so this adds the product as the ordinary units do.
template <typename A, bool kWholeA, bool kWholeB>
ATTNKERN_DEVICE void add_product(A (&d)[4], const Factor<A, 4, kWholeA>& a, const Factor<A, 2, kWholeB>& b) {
  A product[4] = {};
  multiply(product, a, b);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    d[i] += product[i];
}

// Four neighbouring elements.
template <typename T> struct Quad {
  uint32_t words[sizeof(T)];

  ATTNKERN_DEVICE Wide<T> operator[](int i) const { return element<T>(words, i); }
};
template <typename T> ATTNKERN_DEVICE Quad<T> load_quad(const T* from) {
  constexpr int kWidth = std::min(4, kVector<T>);
  union {
    Quad<T> quad;
    Piece<T, kWidth> pieces[4 / kWidth];
  } both;
#pragma unroll
  for (int i = 0; i < 4 / kWidth; ++i)
    both.pieces[i] = piece_at<kWidth>(from + i * kWidth);
  return both.quad;
}

// Starts to copy kWidth elements from global to shared memory, or zeros if they do not exist. commit_copies() ends
// a group of a thread's copies, and wait_for_copies<n>() waits for all of its groups but the last n.
template <int kWidth, typename T> ATTNKERN_DEVICE void copy_piece(T* to, const T* from, bool exists) {
#if defined(ATTNKERN_ON_HOST)
  piece_at<kWidth>(to), piece_at<kWidth>(exists ? from : to); // must be aligned
  cuda_on_host::copy_async(to, from, kWidth * sizeof(T), exists);
#else
#if __CUDA_ARCH__ >= 800
  constexpr int kBytes = kWidth * sizeof(T);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = exists ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else if constexpr (kBytes >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  else
#endif
    piece_at<kWidth>(to) = exists ? piece_at<kWidth>(from) : Piece<T, kWidth>{};
#endif
}
ATTNKERN_DEVICE void commit_copies() {
#if defined(ATTNKERN_ON_HOST)
  cuda_on_host::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kLeft> ATTNKERN_DEVICE void wait_for_copies() {
#if defined(ATTNKERN_ON_HOST)
  cuda_on_host::wait_for_copies(kLeft);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Hides from the compiler that memory holds what it held before.
ATTNKERN_DEVICE void forget_memory() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// Four neighbouring numbers at an aligned address.
template <typename A> ATTNKERN_DEVICE void store_vector4(const A (&from)[4], A* to) {
#pragma unroll
  for (int i = 0; i < 4; i += kVector<A>) {
    A some[kVector<A>];
#pragma unroll
    for (int k = 0; k < kVector<A>; ++k)
      some[k] = from[i + k];
    const Packed<A> packed = pack<A>(some);
    store_packed<kVector<A>, 1>(packed, to + i, true, kVector<A>);
  }
}

} // namespace attnkern
