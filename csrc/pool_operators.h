// The operators of pooling for both devices: layouts, outputs and dispatch by dtype. A device includes this after
// tensors.h, defines forward() and backward(), and registers the operators.
#pragma once

#include "pool.h"
#include "tensors.h"

namespace attnkern {
namespace {

// Writes pooled, attention and scores, and to `pooled_wide` the pooled features before rounding, which are empty where
// the features' dtype does not round.
template <typename T>
void forward(Tensor local, const Tensor& query, const std::optional<Tensor>& mask, const Tensor& pooled,
             const Tensor& attention, const Tensor& scores, const Tensor& pooled_wide);

// The gradients of the query, and of the features unless grad_local is null.
template <typename T>
void backward(const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_attention,
              const std::optional<Tensor>& grad_scores, Tensor local, const Tensor& query,
              const std::optional<Tensor>& mask, const Tensor& attention, const Tensor& pooled_wide, T* grad_local,
              const Tensor& grad_query);

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_fwd(Tensor local, Tensor query, std::optional<Tensor> mask) {
  make_dense(local);
  make_contiguous(query, mask);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    // (N, C) and (N, positions...), with the number of queries after N if the query has that axis.
    std::vector<int64_t> vectors{local.size(0)}, maps{local.size(0)};
    if (query.dim() == 3) {
      vectors.push_back(query.size(1));
      maps.push_back(query.size(1));
    }
    vectors.push_back(local.size(1));
    for (int64_t i = 2; i < local.dim(); ++i)
      maps.push_back(local.size(i));
    Tensor pooled = empty<T>(local, {vectors.data(), vectors.size()});
    Tensor attention = empty<A>(local, {maps.data(), maps.size()});
    Tensor scores = empty_same(attention);
    Tensor pooled_wide = std::is_same_v<T, A> ? empty<A>(local, {0}) : empty_like<A>(pooled);
    forward<T>(local, query, mask, pooled, attention, scores, pooled_wide);
    return std::tuple(pooled, attention, scores, pooled_wide);
  });
}

std::tuple<Tensor, Tensor> pool_bwd(std::optional<Tensor> grad_pooled, std::optional<Tensor> grad_attention,
                                    std::optional<Tensor> grad_scores, Tensor local, Tensor query,
                                    std::optional<Tensor> mask, Tensor attention, Tensor pooled_wide,
                                    bool need_grad_local) {
  make_dense(local);
  make_contiguous(grad_pooled, grad_attention, grad_scores, query, mask, attention, pooled_wide);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Tensor grad_local = features_grad<T>(local, need_grad_local), grad_query = empty_same(query);
    backward<T>(grad_pooled, grad_attention, grad_scores, local, query, mask, attention, pooled_wide,
                need_grad_local ? mutable_data<T>(grad_local) : nullptr, grad_query);
    return std::tuple(grad_local, grad_query);
  });
}

} // namespace
} // namespace attnkern
