// Tensors of the stable ABI, for the host code of both devices: access, allocation, layouts, and dispatch by dtype.
// Include this after the device's storage types Half and BFloat16 are defined.
#pragma once

#include <dlfcn.h>
#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

namespace attnkern {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <typename T> constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, double>)
    return ScalarType::Double;
  else if constexpr (std::is_same_v<T, float>)
    return ScalarType::Float;
  else if constexpr (std::is_same_v<T, BFloat16>)
    return ScalarType::BFloat16;
  else if constexpr (std::is_same_v<T, Half>)
    return ScalarType::Half;
  else if constexpr (std::is_same_v<T, int32_t>)
    return ScalarType::Int;
  else
    return ScalarType::Long;
}

template <typename T> const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <typename T> const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}
template <typename T> T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

// Repeats an allocation that failed, now through PyTorch's C++ functions, so that PyTorch raises its own exception. A
// function of the stable ABI returns only an error code, and an exception thrown here would not be a
// torch.OutOfMemoryError in Python. The C++ functions are not part of the stable ABI, so they are looked up by name.
inline AtenTensorHandle empty_strided_or_throw(Sizes sizes, Sizes strides, ScalarType type, int32_t device_type,
                                               int32_t device_index) {
  struct Device { // has the layout of c10::Device
    DeviceType type;
    int8_t index;
  };
  struct AtTensor { // has the layout of at::Tensor, and is returned in memory because moving it is not trivial
    void* implementation;
    AtTensor(AtTensor&& from) : implementation(from.implementation) {}
  };
  using Cpu = AtTensor(Sizes, Sizes, ScalarType, bool pinned);
  using Cuda = AtTensor(Sizes, Sizes, ScalarType, std::optional<Device>);
  const Device device{static_cast<DeviceType>(device_type), static_cast<int8_t>(device_index)};
  AtTensor* tensor = nullptr;
  if (device.type == DeviceType::CPU) {
    if (void* found = dlsym(RTLD_DEFAULT, "_ZN2at6detail17empty_strided_cpuEN3c108ArrayRefIlEES3_NS1_10ScalarTypeEb"))
      tensor = new AtTensor(reinterpret_cast<Cpu*>(found)(sizes, strides, type, false));
  } else if (void* found = dlsym(RTLD_DEFAULT, "_ZN2at6detail18empty_strided_cudaEN3c108ArrayRefIlEES3_NS1_10"
                                               "ScalarTypeESt8optionalINS1_6DeviceEE")) {
    tensor = new AtTensor(reinterpret_cast<Cuda*>(found)(sizes, strides, type, device));
  }
  STD_TORCH_CHECK(tensor != nullptr, "attnkern: PyTorch could not allocate a tensor");
  return reinterpret_cast<AtenTensorHandle>(tensor);
}

// Whether large new tensors ask for huge pages: if the operating system's policy leaves this to the program ("madvise")
// and the environment variable ATTNKERN_HUGE_PAGES is not 0. Both are read once.
inline bool asks_for_huge_pages() {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const bool asks = [] {
    const char* chosen = std::getenv("ATTNKERN_HUGE_PAGES");
    if (chosen != nullptr && std::strcmp(chosen, "0") == 0)
      return false;
    const int file = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY | O_CLOEXEC);
    if (file < 0)
      return false;
    char policy[64] = {};
    const bool madvise = read(file, policy, sizeof(policy) - 1) > 0 && std::strstr(policy, "[madvise]") != nullptr;
    close(file);
    return madvise;
  }();
  return asks;
#else
  return false;
#endif
}

// Asks for huge pages for a new CPU tensor, before anything is written to it. glibc maps each large block anew, and the
// page faults of 4 KiB pages take longer than the kernel that fills the tensor. Pages that the block shares with others
// are not touched. If the request fails, nothing changes.
inline void ask_for_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kSmallest = 4 << 20; // bytes
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (bytes < kSmallest || !asks_for_huge_pages())
    return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), page = sysconf(_SC_PAGESIZE);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An uninitialised tensor on the device of `like`. This calls the allocator directly: an operator's call through the
// dispatcher takes longer than a kernel on a small map.
inline Tensor empty_strided(const Tensor& like, Sizes sizes, Sizes strides, ScalarType type) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code, device_type, device_index, &handle) !=
      TORCH_SUCCESS)
    handle = empty_strided_or_throw(sizes, strides, type, device_type, device_index);
  Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu())
    ask_for_huge_pages(tensor);
  return tensor;
}

// The strides of a dense tensor whose dimensions are given from the innermost to the outermost.
constexpr int64_t kMostDimensions = 64;
struct Strides {
  int64_t of[kMostDimensions], next = 1;

  void outwards(Sizes sizes, int64_t dimension) {
    of[dimension] = next;
    next *= sizes[dimension] > 1 ? sizes[dimension] : 1;
  }
};

// Contiguous.
inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType type) {
  const int64_t dim = sizes.size();
  STD_TORCH_CHECK(dim <= kMostDimensions, "attnkern: at most 64 dimensions");
  Strides strides;
  for (int64_t i = dim - 1; i >= 0; --i)
    strides.outwards(sizes, i);
  return empty_strided(like, sizes, {strides.of, sizes.size()}, type);
}
template <typename T> Tensor empty(const Tensor& like, Sizes sizes) { return empty(like, sizes, scalar_type<T>()); }
template <typename T> Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty<T>(like, Sizes(sizes.begin(), sizes.size()));
}

// An uninitialised tensor with the shape and the layout of `like`, which is dense.
inline Tensor empty_like(const Tensor& like, ScalarType type) {
  return empty_strided(like, like.sizes(), like.strides(), type);
}
inline Tensor empty_same(const Tensor& like) { return empty_like(like, like.scalar_type()); }
template <typename T> Tensor empty_like(const Tensor& like) { return empty_like(like, scalar_type<T>()); }

// The shape of features, (N, C, positions), with positions or channels innermost.
struct Shape {
  int64_t images, channels, positions;
  bool channels_inner = false;

  Shape(int64_t images, int64_t channels, int64_t positions)
      : images(images), channels(channels), positions(positions) {}
  explicit Shape(const Tensor& x)
      : images(x.size(0)), channels(x.size(1)), positions(1), channels_inner(!x.is_contiguous()) {
    for (int64_t i = 2; i < x.dim(); ++i)
      positions *= x.size(i);
  }
  ATTNKERN_INLINE int64_t image_size() const { return channels * positions; }
};

// The gradient of features: like the features, or (0,) if it is not needed.
template <typename T> Tensor features_grad(const Tensor& x, bool needed) {
  return needed ? empty_same(x) : empty<T>(x, {0});
}

// --- layouts: kernels take features with positions or with channels innermost, and all other tensors contiguous. Other
// layouts are copied. attnkern/_layout.py does the same for kernels that are written in Python. ---

// Whether a tensor (N, C, ...) of three or four dimensions is dense with channels innermost, and not also contiguous.
inline bool channels_innermost(const Tensor& x) {
  const int64_t dim = x.dim();
  if (x.is_contiguous() || (dim != 3 && dim != 4))
    return false;
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t stride = 1;
  const auto follows = [&](int64_t i) {
    const bool ok = sizes[i] == 1 || strides[i] == stride;
    stride *= sizes[i];
    return ok;
  };
  return follows(1) && follows(dim - 1) && (dim == 3 || follows(2)) && follows(0);
}

inline Tensor copied(Tensor to, const Tensor& from) { return torch::stable::copy_(to, from); }

inline Tensor with_channels_innermost(const Tensor& x) {
  const auto sizes = x.sizes();
  Strides strides;
  strides.outwards(sizes, 1);
  for (int64_t i = x.dim() - 1; i > 1; --i)
    strides.outwards(sizes, i);
  strides.outwards(sizes, 0);
  return copied(empty_strided(x, sizes, {strides.of, sizes.size()}, x.scalar_type()), x);
}

inline void make_contiguous(Tensor& tensor) {
  if (!tensor.is_contiguous())
    tensor = copied(empty(tensor, tensor.sizes(), tensor.scalar_type()), tensor);
}
inline void make_contiguous(std::optional<Tensor>& tensor) {
  if (tensor.has_value())
    make_contiguous(*tensor);
}
template <typename... Tensors> void make_contiguous(Tensors&... tensors) { (make_contiguous(tensors), ...); }

inline void make_dense(Tensor& x) {
  if (x.is_contiguous() || channels_innermost(x))
    return;
  const bool innermost = (x.dim() == 3 || x.dim() == 4) && x.stride(1) == 1;
  if (innermost)
    x = with_channels_innermost(x);
  else
    make_contiguous(x);
}

// Brings a tensor into the layout of `x`, which is dense.
inline void make_dense_like(const Tensor& x, Tensor& tensor) {
  if (!channels_innermost(x))
    make_contiguous(tensor);
  else if (!channels_innermost(tensor))
    tensor = with_channels_innermost(tensor);
}
inline void make_dense_like(const Tensor& x, std::optional<Tensor>& tensor) {
  if (tensor.has_value())
    make_dense_like(x, *tensor);
}

// Calls body(T{}) with the storage type of a dtype.
template <typename Body> auto dispatch(ScalarType type, const Body& body) {
  switch (type) {
  case ScalarType::Float:
    return body(float{});
  case ScalarType::Double:
    return body(double{});
  case ScalarType::BFloat16:
    return body(BFloat16{});
  case ScalarType::Half:
    return body(Half{});
  default:
    STD_TORCH_CHECK(false, "attnkern: features must be float32, float64, bfloat16 or float16");
    return body(float{});
  }
}

// Calls body(A{}) with the accumulation type of a dtype.
template <typename Body> auto dispatch_wide(ScalarType type, const Body& body) {
  return type == ScalarType::Double ? body(double{}) : body(float{});
}

} // namespace attnkern
