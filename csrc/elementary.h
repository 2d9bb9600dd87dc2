// Elementary functions for host and device, float and double.
//
// The host's float versions are branch-free polynomials, so that the compiler vectorises loops over them. They do not
// need -ffast-math, and they propagate NaN. The device uses CUDA's own functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ATTNKERN_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and the linker would keep a single out-of-line
// copy, compiled for any one of the sets.
#define ATTNKERN_INLINE inline __attribute__((always_inline))
#endif

namespace attnkern {

template <typename To, typename From> ATTNKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

ATTNKERN_INLINE double exponential(double x) { return std::exp(x); }

// e^x with an error of 1 ulp: 0 below -104, infinity above 88.8.
ATTNKERN_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x); // NaN passes
  // n = round(x / log 2), taken from the low bits after adding 1.5·2²³. There is no conversion, so NaN is safe.
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float series = 1.0f / 5040.0f;
  series = series * r + 1.0f / 720.0f;
  series = series * r + 1.0f / 120.0f;
  series = series * r + 1.0f / 24.0f;
  series = series * r + 1.0f / 6.0f;
  series = series * r + 0.5f;
  series = (series * r) * r + r + 1.0f;
  // 2ⁿ is multiplied as two factors, so that denormal results are correct.
  const int32_t exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(12582912.0f);
  const int32_t half = exponent >> 1;
  const float low = bit_cast<float>(static_cast<uint32_t>(half + 127) << 23);
  const float high = bit_cast<float>(static_cast<uint32_t>(exponent - half + 127) << 23);
  return series * low * high;
#endif
}

ATTNKERN_INLINE double log1p_unit(double y) { return std::log1p(y); }

// log(1 + y) = 2·atanh(y / (2 + y)) for y in [0, 1], with a relative error of about 1 ulp.
ATTNKERN_INLINE float log1p_unit(float y) {
#if defined(__CUDA_ARCH__)
  return log1pf(y);
#else
  const float s = y / (2.0f + y);
  const float t = s * s; // at most 1/9
  float series = 1.0f / 15.0f;
  series = series * t + 1.0f / 13.0f;
  series = series * t + 1.0f / 11.0f;
  series = series * t + 1.0f / 9.0f;
  series = series * t + 1.0f / 7.0f;
  series = series * t + 1.0f / 5.0f;
  series = series * t + 1.0f / 3.0f;
  return 2.0f * (s + s * t * series);
#endif
}

// 1/x with an error of 1 ulp, for x whose reciprocal is a normal number.
ATTNKERN_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / x;
#endif
}

template <typename T> ATTNKERN_INLINE void sine_cosine(T x, T& sine, T& cosine) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float))
    sincosf(x, &sine, &cosine); // half the cost of two calls
  else
    sincos(x, &sine, &cosine);
#else
  cosine = std::cos(x);
  sine = std::sin(x);
#endif
}

} // namespace attnkern
