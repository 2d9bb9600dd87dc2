// What the CPU kernels share: storage types, the shape of features, allocation and dispatch by dtype.
#pragma once

#include "config.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "elementary.h"

namespace attnkern {

// --- storage types; arithmetic happens in Wide<T> ---

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Branch-free, so that loops over half-precision features vectorise.
ATTNKERN_INLINE double widen(double x) { return x; }
ATTNKERN_INLINE float widen(float x) { return x; }
ATTNKERN_INLINE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
ATTNKERN_INLINE float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // Multiplying by 2^112 rebiases the exponent and normalises denormals. The largest exponent means Inf or NaN.
  const uint32_t rebiased = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(rebiased | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even.
template <typename T> ATTNKERN_INLINE T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // The last bit of 0.5 is the spacing of the denormals: adding 0.5 rounds to that spacing.
    const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? denormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    return {static_cast<uint16_t>(sign | (magnitude < 0x47800000u ? std::min(finite, 0x7c00u) : infinite))};
  } else {
    return x;
  }
}

} // namespace attnkern

#include "tensors.h"

namespace attnkern {

// --- features ---

// Whether features are too large to stay in the caches until they are read again.
template <typename T> bool streams(const Shape& shape) {
  return shape.images * shape.image_size() * static_cast<int64_t>(sizeof(T)) >= int64_t(32) << 20;
}

// --- parallelism ---

// Calls body(i) for i in [0, count), on several threads if the work is large enough; an item costs about as much as
// `cost` elements. The results do not depend on the number of threads.
template <typename Body> void parallel(int64_t count, int64_t cost, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cost));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i);
#if defined(ATTNKERN_X86)
    _mm_sfence(); // makes streamed stores (simd.h) visible before the caller continues
#endif
  });
}

// --- companions: small tensors beside the features, in any dtype ---

// A tensor's elements as A; not copied if they are of type A already.
template <typename A> class Widened {
  std::vector<A> copy_;
  const A* data_;
  int64_t size_;

public:
  explicit Widened(const Tensor& tensor) : data_(data<A>(tensor)), size_(tensor.numel()) {
    if (tensor.scalar_type() == scalar_type<A>())
      return;
    copy_.resize(size_);
    dispatch(tensor.scalar_type(), [&](auto t) {
      const auto* from = attnkern::data<decltype(t)>(tensor);
      for (int64_t i = 0; i < size_; ++i)
        copy_[i] = static_cast<A>(widen(from[i]));
    });
    data_ = copy_.data();
  }
  Widened(const Widened&) = delete; // it may hold a pointer to its own storage

  const A* begin() const { return data_; }
  const A* end() const { return data_ + size_; }
  int64_t size() const { return size_; }
  A operator[](int64_t i) const { return data_[i]; }
};

// The elements of a contiguous tensor as A, to be written. finish() converts them to the tensor's dtype.
template <typename A> class Narrowed {
  const Tensor& tensor_;
  std::vector<A> wide_;

public:
  explicit Narrowed(const Tensor& tensor)
      : tensor_(tensor), wide_(tensor.scalar_type() == scalar_type<A>() ? 0 : tensor.numel()) {}

  A* data() { return wide_.empty() ? mutable_data<A>(tensor_) : wide_.data(); }
  void finish() {
    if (wide_.empty())
      return;
    dispatch(tensor_.scalar_type(), [&](auto t) {
      using T = decltype(t);
      std::transform(wide_.begin(), wide_.end(), mutable_data<T>(tensor_),
                     [](A value) { return narrow<T>(static_cast<Wide<T>>(value)); });
    });
  }
};

} // namespace attnkern
