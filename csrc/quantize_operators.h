// The operators of quantization for both devices: layouts, outputs and dispatch by dtype. A device includes this after
// tensors.h, defines the four functions declared below, and registers the operators.
#pragma once

#include "quantize.h"
#include "tensors.h"

namespace attnkern {
namespace {

// What quantization returns; `residuals` are Σ (v - a) per anchor, for the backward pass.
template <typename A> struct Quantized {
  Tensor values, indices, anchor_loss, commitment_loss, counts, residuals;

  Quantized(const Tensor& a, const Tensor& anchors)
      : values(empty_same(a)), indices(empty_like<int64_t>(a)), anchor_loss(empty<A>(a, {})),
        commitment_loss(empty<A>(a, {})), counts(empty_like<int64_t>(anchors)), residuals(empty_like<A>(anchors)) {}
};

// What the gradients of the elements and of the anchors are computed from, and these gradients.
struct QuantizedGradients {
  const std::optional<Tensor>&grad_values, &grad_anchor_loss, &grad_commitment_loss;
  const Tensor &a, &anchors, &indices, &residuals;
  int64_t divisor; // of the losses
  Tensor grad_a = empty_same(a), grad_anchors = empty_same(anchors);
};

// Quantizes elements.
template <typename A>
void forward(const Tensor& a, const Tensor& anchors, int64_t divisor, const Quantized<A>& quantized);
template <typename A> void backward(const QuantizedGradients& gradients);

// Quantizes the elements of a map, and multiplies the features x by it. Backward, grad_x may be null.
template <typename T>
void forward_features(const Tensor& x, const Tensor& a, const Tensor& anchors, bool residual, int64_t divisor,
                      const Tensor& output, const Quantized<Wide<T>>& quantized);
template <typename T>
void backward_features(const Tensor& grad_output, const Tensor& x, bool residual, const QuantizedGradients& gradients,
                       T* grad_x);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_fwd(Tensor a, Tensor anchors, int64_t divisor) {
  make_dense(a);
  make_contiguous(anchors);
  return dispatch_wide(a.scalar_type(), [&](auto wide) {
    using A = decltype(wide);
    const Quantized<A> q(a, anchors);
    forward<A>(a, anchors, divisor, q);
    return std::tuple(q.values, q.indices, q.anchor_loss, q.commitment_loss, q.counts, q.residuals);
  });
}

std::tuple<Tensor, Tensor> quantize_bwd(std::optional<Tensor> grad_values, std::optional<Tensor> grad_anchor_loss,
                                        std::optional<Tensor> grad_commitment_loss, Tensor a, Tensor anchors,
                                        Tensor indices, Tensor residuals, int64_t divisor) {
  make_dense(a);
  make_dense_like(a, grad_values);
  make_dense_like(a, indices);
  make_contiguous(grad_anchor_loss, grad_commitment_loss, anchors, residuals);
  return dispatch_wide(residuals.scalar_type(), [&](auto wide) {
    const QuantizedGradients gradients{grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices,
                                       residuals, divisor};
    backward<decltype(wide)>(gradients);
    return std::tuple(gradients.grad_a, gradients.grad_anchors);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> anchor_fwd(Tensor x, Tensor a, Tensor anchors,
                                                                              bool residual, int64_t divisor) {
  make_dense(x);
  make_contiguous(a, anchors);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Tensor output = empty_same(x);
    const Quantized<Wide<T>> q(a, anchors);
    forward_features<T>(x, a, anchors, residual, divisor, output, q);
    return std::tuple(output, q.values, q.indices, q.anchor_loss, q.commitment_loss, q.counts, q.residuals);
  });
}

std::tuple<Tensor, Tensor, Tensor> anchor_bwd(Tensor grad_output, std::optional<Tensor> grad_values,
                                              std::optional<Tensor> grad_anchor_loss,
                                              std::optional<Tensor> grad_commitment_loss, Tensor x, Tensor a,
                                              Tensor anchors, Tensor indices, Tensor residuals, bool residual,
                                              int64_t divisor, bool need_grad_x) {
  make_dense(x);
  make_dense_like(x, grad_output);
  make_contiguous(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices, residuals);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Tensor grad_x = features_grad<T>(x, need_grad_x);
    const QuantizedGradients gradients{grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices,
                                       residuals, divisor};
    backward_features<T>(grad_output, x, residual, gradients, need_grad_x ? mutable_data<T>(grad_x) : nullptr);
    return std::tuple(grad_x, gradients.grad_a, gradients.grad_anchors);
  });
}

} // namespace
} // namespace attnkern
