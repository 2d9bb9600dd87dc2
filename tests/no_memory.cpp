// Memory that ends when a test says so: takes the place of PyTorch's allocation functions, which it calls until then.
// Loaded before PyTorch, into the namespace of the process.

#include <dlfcn.h>

#include <utility>

#include <ATen/core/TensorBase.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Tensors that what is built for the stable ABI may still make; negative: all. The next one fails, and so does the
// second attempt at it, with the exception of a GPU's allocator.
extern "C" int tensors_left;
int tensors_left = -1;
static bool failed = false;

template <typename Function> static Function* original(Function*, const char* name) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<Function*>(dlsym(torch, name));
}

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* made) {
  failed = tensors_left == 0;
  if (failed)
    return AOTI_TORCH_FAILURE;
  if (tensors_left > 0)
    --tensors_left;
  return original(&aoti_torch_empty_strided, "aoti_torch_empty_strided")(dim, sizes, strides, dtype, device_type,
                                                                          device_index, made);
}

namespace at::detail {

TensorBase empty_strided_cpu(IntArrayRef sizes, IntArrayRef strides, ScalarType type, bool pinned) {
  TORCH_CHECK_WITH(OutOfMemoryError, !std::exchange(failed, false), "CUDA out of memory. Tried to allocate ", sizes);
  return original(&static_cast<TensorBase (&)(IntArrayRef, IntArrayRef, ScalarType, bool)>(empty_strided_cpu),
                  "_ZN2at6detail17empty_strided_cpuEN3c108ArrayRefIlEES3_NS1_10ScalarTypeEb")(sizes, strides, type,
                                                                                               pinned);
}

} // namespace at::detail
