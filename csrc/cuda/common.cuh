// What the CUDA kernels share: storage types, companions, vectors, reductions in a fixed order, and launches.
//
// tests/cuda_on_host runs these sources on a CPU (ATTNKERN_ON_HOST). Kernels therefore use shared<S>() and
// dynamic_shared<T>() instead of __shared__ variables: the emulation fills that memory with NaN before each block.
#pragma once

#include "config.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>

#if defined(ATTNKERN_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "elementary.h"

#define ATTNKERN_DEVICE __device__ __forceinline__

// The last lines of each source: ATTNKERN_LIBRARY_IMPL(m) { m.impl("name", TORCH_BOX(&function)); }
#if defined(ATTNKERN_ON_HOST)
#define ATTNKERN_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(attnkern_host, CPU, m)
#else
#define ATTNKERN_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(attnkern, CUDA, m)
#endif

namespace attnkern {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- storage types; arithmetic happens in Wide<T> ---

using Half = __half;
using BFloat16 = __nv_bfloat16;

template <typename T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

ATTNKERN_DEVICE double widen(double x) { return x; }
ATTNKERN_DEVICE float widen(float x) { return x; }
ATTNKERN_DEVICE float widen(Half x) { return __half2float(x); }
ATTNKERN_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <typename T> ATTNKERN_DEVICE T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, Half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// Two numbers as the two halves of a word, the first one in the lower half.
template <typename T> ATTNKERN_DEVICE uint32_t narrow_pair(float first, float second) {
#if defined(ATTNKERN_ON_HOST)
  return bit_cast<uint16_t>(narrow<T>(first)) | static_cast<uint32_t>(bit_cast<uint16_t>(narrow<T>(second))) << 16;
#else
  if constexpr (std::is_same_v<T, Half>)
    return bit_cast<uint32_t>(__floats2half2_rn(first, second));
  else
    return bit_cast<uint32_t>(__floats2bfloat162_rn(first, second));
#endif
}

} // namespace attnkern

#include "tensors.h"

namespace attnkern {

// Numbers of a type that is known.
template <typename T> struct Numbers {
  const T* pointer;

  template <typename A> ATTNKERN_DEVICE A load(int64_t i) const { return static_cast<A>(widen(pointer[i])); }
  // Loads K neighbours, of which the first `exist` are there; the others become zeros.
  template <typename A, int K> ATTNKERN_DEVICE void load_run(int64_t i, int64_t exist, A (&to)[K]) const {
    constexpr int kBytes = std::min<int>(16, K * sizeof(T)), kWidth = kBytes / sizeof(T);
    struct alignas(kBytes) Piece {
      T of[kWidth];
    };
    const T* from = pointer + i;
    const bool whole = exist >= K && reinterpret_cast<uintptr_t>(from) % kBytes == 0;
#pragma unroll
    for (int k = 0; k < K; k += kWidth)
      if (whole) {
        const Piece piece = *reinterpret_cast<const Piece*>(from + k);
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          to[k + j] = static_cast<A>(widen(piece.of[j]));
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          to[k + j] = k + j < exist ? static_cast<A>(widen(from[k + j])) : A(0);
      }
  }
};

// A small tensor beside the features (rectangle, anchors, query, a, a scalar). Its dtype is a run-time value, so that
// kernels are not compiled for every pair of dtypes. The pointer is null if there is no tensor.
struct Companion {
  const void* pointer = nullptr;
  ScalarType type = ScalarType::Float;

  Companion(const Tensor& tensor) : pointer(tensor.const_data_ptr()), type(tensor.scalar_type()) {}
  Companion(const std::optional<Tensor>& tensor) {
    if (tensor.has_value())
      *this = Companion(*tensor);
  }
  template <typename A> ATTNKERN_DEVICE A load(int64_t i) const {
    switch (type) {
    case ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(pointer)[i]);
    case ScalarType::Half:
      return static_cast<A>(widen(static_cast<const Half*>(pointer)[i]));
    case ScalarType::BFloat16:
      return static_cast<A>(widen(static_cast<const BFloat16*>(pointer)[i]));
    default:
      return static_cast<A>(static_cast<const float*>(pointer)[i]);
    }
  }
  template <typename A, int K> ATTNKERN_DEVICE void load_run(int64_t i, int64_t exist, A (&to)[K]) const {
    switch (type) {
    case ScalarType::Double:
      return Numbers<double>{static_cast<const double*>(pointer)}.load_run(i, exist, to);
    case ScalarType::Half:
      return Numbers<Half>{static_cast<const Half*>(pointer)}.load_run(i, exist, to);
    case ScalarType::BFloat16:
      return Numbers<BFloat16>{static_cast<const BFloat16*>(pointer)}.load_run(i, exist, to);
    default:
      return Numbers<float>{static_cast<const float*>(pointer)}.load_run(i, exist, to);
    }
  }
};

struct MutableCompanion {
  void* pointer;
  ScalarType type;

  MutableCompanion(const Tensor& tensor) : pointer(tensor.mutable_data_ptr()), type(tensor.scalar_type()) {}
  template <typename A> ATTNKERN_DEVICE void store(int64_t i, A value) const {
    switch (type) {
    case ScalarType::Double:
      static_cast<double*>(pointer)[i] = value;
      break;
    case ScalarType::Half:
      static_cast<Half*>(pointer)[i] = narrow<Half>(static_cast<float>(value));
      break;
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(pointer)[i] = narrow<BFloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(pointer)[i] = static_cast<float>(value);
    }
  }
};

// --- vectors of 16 bytes ---

template <typename T> constexpr int kVector = 16 / sizeof(T);

ATTNKERN_INLINE bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Loads or stores the first `valid` elements of a vector one by one; the others are loaded as zeros.
template <typename T> ATTNKERN_DEVICE void load_vector(const T* from, int64_t valid, Wide<T> (&to)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    to[i] = i < valid ? widen(from[i]) : Wide<T>(0);
}
template <typename T> ATTNKERN_DEVICE void store_vector(const Wide<T> (&from)[kVector<T>], T* to, int64_t valid) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (i < valid)
      to[i] = narrow<T>(from[i]);
}

// --- shared memory ---

#if !defined(ATTNKERN_ON_HOST)
// The block's only S in shared memory, uninitialised. Every call with the same type returns the same object.
template <typename S> ATTNKERN_DEVICE S& shared() {
  __shared__ S memory;
  return memory;
}

// The shared memory whose size the launch specifies.
template <typename T> ATTNKERN_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char attnkern_dynamic_shared[];
  return reinterpret_cast<T*>(attnkern_dynamic_shared);
}
#endif

// --- reductions: the order depends on the block's size only, and every thread gets the result ---

struct Sum {
  template <typename A> ATTNKERN_DEVICE A operator()(A a, A b) const { return a + b; }
};
struct Max { // propagates NaN
  template <typename A> ATTNKERN_DEVICE A operator()(A a, A b) const { return a != a || a > b ? a : b; }
};

// Over groups of `lanes` neighbouring lanes, a power of two.
template <typename Op = Sum, typename A> ATTNKERN_DEVICE A warp_reduce(A value, int lanes = kWarp, Op op = {}) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Reduces K numbers per thread over the block, whose threads must form whole warps. It takes two barriers.
template <typename Op = Sum, int K, typename A> ATTNKERN_DEVICE void block_reduce(A (&values)[K], Op op = {}) {
  struct Warps {
    A of[kWarp][K];
  };
  Warps& warps = shared<Warps>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < K; ++k)
    values[k] = warp_reduce(values[k], kWarp, op);
  __syncthreads(); // the readers of an earlier reduction are done
  if (lane == 0)
    for (int k = 0; k < K; ++k)
      warps.of[warp][k] = values[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    values[k] = warps.of[0][k];
    for (int w = 1; w < count; ++w)
      values[k] = op(values[k], warps.of[w][k]);
  }
}

// --- launches ---

// Quotient of non-negative numbers, in 32 bits if possible: a 64-bit division takes dozens of instructions.
ATTNKERN_DEVICE int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}
ATTNKERN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(ATTNKERN_ON_HOST)
constexpr int64_t kGridWidth = cuda_on_host::kGridWidth;
#else
constexpr int64_t kGridWidth = (int64_t(1) << 31) - 1;
#endif

// A grid with at least `items` blocks, in two dimensions if one is too small. block_index() numbers the blocks; a
// kernel returns if the number is not below `items`.
inline dim3 grid_of(int64_t items) {
  const int64_t rows = ceil_div(items, kGridWidth);
  return dim3(static_cast<unsigned>(rows > 1 ? kGridWidth : items), static_cast<unsigned>(rows));
}
ATTNKERN_DEVICE int64_t block_index() { return blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x; }

constexpr size_t kUsualSharedMemory = 48 << 10; // of a block that does not ask for more

#if defined(ATTNKERN_ON_HOST)
// Runs kernels under the emulation.
struct Queue {
  explicit Queue(const Tensor&) {}
  size_t shared_memory() const { return cuda_on_host::shared_memory(); }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t items, int threads, size_t shared_bytes,
              Arguments&&... arguments) const {
    if (items > 0 && cuda_on_host::record_file() != nullptr)
      cuda_on_host::record(kernel, items, threads, shared_bytes, 1, arguments...);
    else if (items > 0)
      cuda_on_host::run(grid_of(items), dim3(threads), shared_bytes, [&] { kernel(arguments...); });
  }
};
#else
// The current stream of a tensor's device. The device is the current one during the lifetime of this object.
class Queue {
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;

public:
  explicit Queue(const Tensor& like) : guard_(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }
  // The most shared memory that a block can have.
  size_t shared_memory() const {
    int device, bytes;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
  }

  // Launches one block of `threads` (whole warps) per item, and nothing if there are no items.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t items, int threads, size_t shared_bytes,
              Arguments&&... arguments) const {
    if (items == 0)
      return;
    if (shared_bytes > kUsualSharedMemory)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
    kernel<<<grid_of(items), threads, shared_bytes, stream()>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};
#endif

} // namespace attnkern
