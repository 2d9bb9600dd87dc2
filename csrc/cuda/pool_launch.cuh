// Which kernels a pass of pooling launches.
#pragma once

#include "cuda/pool_slices.cuh"
#include "cuda/pool_walk.cuh"

namespace attnkern {

// A copy of features whose accesses of so many bytes would be misaligned: seldom, and the only way by which every order
// of sums follows from the shape.
inline void make_aligned(Tensor& local, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(local.const_data_ptr()) % bytes == 0)
    return;
  Tensor copy = empty_same(local);
  torch::stable::copy_(copy, local);
  local = copy;
}

template <typename T, typename Pass>
void launch_walk(const Queue& queue, const Walk& walk, const Pass& pass, const Tensor& local) {
  const auto launch = [&](auto kernel) {
    queue.launch(kernel, walk.shape.images * walk.splits, walk.threads,
                 Workspace<Wide<T>>::bytes(walk, Pass::kBackward), walk, pass, data<T>(local));
  };
  if (walk.shape.channels_inner)
    launch(pool_walk<T, ColumnTile<T>, Pass>);
  else if (walk.lanes == kGroup)
    launch(pool_walk<T, RowTile<T, kGroup>, Pass>);
  else
    launch(pool_walk<T, RowTile<T, kGroup / 2>, Pass>);
}

// `vector` is what scores are formed with; without one they are zero.
template <typename T, typename Pass>
void launch_slices(const Queue& queue, const Slice& slice, const Pass& pass, const Tensor& local,
                   const std::optional<Query>& vector) {
  Wide<T>* partial = nullptr;
  Tensor scratch = empty<Wide<T>>(local, {vector.has_value() ? slice.blocks() * slice.shape.positions : 0});
  if (vector.has_value()) {
    partial = mutable_data<Wide<T>>(scratch);
    queue.launch(slice_scores<T>, slice.blocks(), kSliceThreads, 0, slice, *vector, data<T>(local), partial);
  }
  queue.launch(pool_slice<T, Pass>, slice.blocks(), kSliceThreads, 0, slice, pass, data<T>(local), partial);
}

} // namespace attnkern
