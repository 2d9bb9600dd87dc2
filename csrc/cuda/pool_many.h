// The passes of pooling with an axis of queries, or with a mask; the arguments are those of forward() and backward() in
// pool_operators.h. csrc/cuda/pool_many.cu defines them.
#pragma once

#include "cuda/common.cuh"

namespace attnkern {

// Whether pooling takes these kernels: with several queries per image, with none, or with a mask.
inline bool is_many(const Tensor& query, const std::optional<Tensor>& mask) {
  return mask.has_value() || (query.dim() == 3 && query.size(1) != 1);
}
// Whether all images have the same queries, (C,) or (1, M, C).
inline bool shares_query(const Tensor& query) { return query.dim() == 1 || (query.dim() == 3 && query.size(0) == 1); }

template <typename T>
void forward_many(Tensor local, const Tensor& query, const std::optional<Tensor>& mask, const Tensor& pooled,
                  const Tensor& attention, const Tensor& scores, const Tensor& pooled_wide);

template <typename T>
void backward_many(const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_attention,
                   const std::optional<Tensor>& grad_scores, Tensor local, const Tensor& query,
                   const std::optional<Tensor>& mask, const Tensor& attention, const Tensor& pooled_wide, T* grad_local,
                   const Tensor& grad_query);

// Copies features whose address does not allow accesses of so many bytes. This is rare, and narrower accesses would
// change the order of the sums.
inline void make_aligned(Tensor& local, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(local.const_data_ptr()) % bytes == 0)
    return;
  Tensor copy = empty_same(local);
  torch::stable::copy_(copy, local);
  local = copy;
}

} // namespace attnkern
