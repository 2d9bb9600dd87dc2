// A block's sum, correct and with planted faults that the emulation must detect.
#include "cuda/common.cuh"

namespace attnkern {
namespace {

enum Fault { kNone, kMissingBarrier, kRace, kEarlyReturn, kPartialShuffle };

struct Slots {
  float of[256];
};

__global__ void faulty_sum_kernel(const float* x, float* sum, int fault) {
  Slots& slots = shared<Slots>();
  const int thread = threadIdx.x;
  slots.of[fault == kRace ? thread / 2 : thread] = x[thread]; // two writers to a slot
  if (fault == kEarlyReturn && thread == 5)
    return;
  if (fault == kPartialShuffle && thread == 5)
    warp_reduce(x[thread]);
  if (fault != kMissingBarrier)
    __syncthreads();
  if (thread == blockDim.x / 2) {
    float total = 0;
    for (int i = 0; i < int(blockDim.x) / (fault == kRace ? 2 : 1); ++i)
      total += slots.of[i];
    *sum = total;
  }
}

Tensor faulty_sum(Tensor x, int64_t fault) {
  Tensor sum = empty<float>(x, {});
  Queue(x).launch(faulty_sum_kernel, 1, static_cast<int>(x.numel()), 0, data<float>(x), mutable_data<float>(sum),
                  static_cast<int>(fault));
  return sum;
}

int64_t launches(Tensor) { return cuda_on_host::launches; }

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("faulty_sum", TORCH_BOX(&faulty_sum));
  m.impl("launches", TORCH_BOX(&launches));
}

} // namespace attnkern
