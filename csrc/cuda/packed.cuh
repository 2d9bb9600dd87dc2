// Vectors of 16 bytes that a thread keeps in registers in their stored type, their loads and stores, and sums over
// lanes.
#pragma once

#include "cuda/common.cuh"

namespace attnkern {

// The i-th of some elements in consecutive words.
template <typename T> ATTNKERN_DEVICE Wide<T> element(const uint32_t* words, int i) {
  if constexpr (sizeof(T) == 8)
    return bit_cast<T>(words[2 * i] | static_cast<uint64_t>(words[2 * i + 1]) << 32);
  else if constexpr (sizeof(T) == 4)
    return bit_cast<T>(words[i]);
  else if constexpr (std::is_same_v<T, BFloat16>) // the upper half of a float, in one instruction
    return bit_cast<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  else
    return widen(bit_cast<T>(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)));
}

// kVector<T> elements.
template <typename T> struct alignas(16) Packed {
  uint32_t words[4];

  ATTNKERN_DEVICE Wide<T> operator[](int i) const { return element<T>(words, i); }
};

// Numbers in shared memory that are read 16 bytes at a time.
template <typename A> struct Vectors {
  const Packed<A>* of;
  ATTNKERN_DEVICE explicit Vectors(const A* from) : of(reinterpret_cast<const Packed<A>*>(from)) {}
  ATTNKERN_DEVICE A operator[](int i) const { return of[i / kVector<A>][i % kVector<A>]; }
};

template <typename T> ATTNKERN_DEVICE Packed<T> pack(const Wide<T> (&values)[kVector<T>]) {
  Packed<T> packed;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    if constexpr (sizeof(T) == 8)
      packed.words[word] = static_cast<uint32_t>(bit_cast<uint64_t>(values[word / 2]) >> word % 2 * 32);
    else if constexpr (sizeof(T) == 4)
      packed.words[word] = bit_cast<uint32_t>(values[word]);
    else
      packed.words[word] = narrow_pair<T>(values[2 * word], values[2 * word + 1]);
  }
  return packed;
}

// Hides how a value was computed from the compiler. Otherwise it keeps unpacked features from one use of a vector to
// the next, and computes the addresses of many accesses in advance, which takes the registers that the vectors need.
template <typename T> ATTNKERN_DEVICE void forget(Packed<T>& packed) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int word = 0; word < 4; ++word)
    asm volatile("" : "+r"(packed.words[word]));
#endif
}
// The pointer must point to global memory, which the compiler could not infer afterwards.
template <typename T> ATTNKERN_DEVICE void forget(T*& global) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(global));
  __builtin_assume(__isGlobal(global));
#endif
}

// A number that the compiler computes again instead of keeping it.
ATTNKERN_DEVICE int64_t forgotten(int64_t number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(number));
#endif
  return number;
}

// kWidth elements as one access. nvcc does not merge accesses to narrower members under a predicate.
template <int kBytes> struct PieceOf;
template <> struct PieceOf<2> { using type = uint16_t; };
template <> struct PieceOf<4> { using type = uint32_t; };
template <> struct PieceOf<8> { using type = uint2; };
template <> struct PieceOf<16> { using type = uint4; };
template <typename T, int kWidth> using Piece = typename PieceOf<kWidth * sizeof(T)>::type;

// The piece at an address, which must be a multiple of the piece's size: otherwise a GPU raises an error, and so does
// the emulation.
template <int kWidth, typename T> ATTNKERN_DEVICE auto& piece_at(T* address) {
  using Element = std::remove_const_t<T>;
  using P = std::conditional_t<std::is_const_v<T>, const Piece<Element, kWidth>, Piece<Element, kWidth>>;
#if defined(ATTNKERN_ON_HOST)
  if (reinterpret_cast<uintptr_t>(address) % sizeof(P) != 0)
    cuda_on_host::fail("a vector at a misaligned address");
#endif
  return *reinterpret_cast<P*>(address);
}

// Offset of a vector's i-th element from its first one. kLanes threads read a row together in pieces of `width`
// elements; the pieces of the other threads lie in between, so that the threads together read contiguous memory at any
// width.
template <int kLanes> ATTNKERN_DEVICE constexpr int element_offset(int i, int width) {
  return (i & -width) * kLanes + (i & (width - 1));
}

// Loads or stores a vector in pieces of kWidth elements, if it exists. Only the elements at offsets below `valid`
// exist, a positive multiple of kWidth; the others are loaded as zeros.
template <int kWidth, int kLanes, typename T>
ATTNKERN_DEVICE Packed<T> load_packed(const T* from, bool exists, int valid) {
  union {
    Packed<T> packed;
    Piece<T, kWidth> pieces[kVector<T> / kWidth];
  } both = {};
#pragma unroll
  for (int i = 0; i < kVector<T>; i += kWidth)
    if (const int offset = element_offset<kLanes>(i, kWidth); exists && (i == 0 || offset < valid))
      both.pieces[i / kWidth] = piece_at<kWidth>(from + offset);
  return both.packed;
}
template <int kWidth, int kLanes, typename T>
ATTNKERN_DEVICE void store_packed(const Packed<T>& packed, T* to, bool exists, int valid) {
  union {
    Packed<T> packed;
    Piece<T, kWidth> pieces[kVector<T> / kWidth];
  } both = {packed};
#pragma unroll
  for (int i = 0; i < kVector<T>; i += kWidth)
    if (const int offset = element_offset<kLanes>(i, kWidth); exists && (i == 0 || offset < valid))
      piece_at<kWidth>(to + offset) = both.pieces[i / kWidth];
}

// The widest piece that divides a row of a given length: a vector, half a vector in half precision (14x14), or an
// element.
template <typename T> int widest_piece(int64_t row) {
  constexpr int V = kVector<T>;
  return row % V == 0 ? V : V == 8 && row % 4 == 0 ? 4 : 1;
}
// Calls body with that width as a constant.
template <typename T, typename Body> ATTNKERN_DEVICE void with_width(int width, const Body& body) {
  constexpr int V = kVector<T>;
  if (width == V)
    body(std::integral_constant<int, V>{});
  else if (V == 8 && width == 4)
    body(std::integral_constant<int, V == 8 ? 4 : 1>{});
  else
    body(std::integral_constant<int, 1>{});
}

// Sums the first kLeft numbers of each lane over kCount lanes that are kStride apart. Each lane keeps max(1, kLeft /
// kCount) of the sums at the start of `values`; returns the index of the first of them. Each step exchanges half of the
// remaining numbers, so all steps together take about kLeft shuffles.
template <int kLeft, int kCount, int kStride, int K, typename A>
ATTNKERN_DEVICE int scatter_sums(A (&values)[K], int first = 0) {
  if constexpr (kCount == 1) {
    return first;
  } else if constexpr (kLeft == 1) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], kCount / 2 * kStride);
    return scatter_sums<1, kCount / 2, kStride>(values, first);
  } else {
    const bool upper = threadIdx.x / kStride % kCount >= kCount / 2;
#pragma unroll
    for (int k = 0; k < kLeft / 2; ++k) {
      const A given = upper ? values[k] : values[k + kLeft / 2];
      const A kept = upper ? values[k + kLeft / 2] : values[k];
      values[k] = kept + __shfl_xor_sync(kAllLanes, given, kCount / 2 * kStride);
    }
    return scatter_sums<kLeft / 2, kCount / 2, kStride>(values, first + (upper ? kLeft / 2 : 0));
  }
}

} // namespace attnkern
