// Nearest-anchor quantization on the CPU. The distinct anchors are sorted once; an element's anchor follows from the
// number of thresholds that are not above it. Each chunk of elements has its own bins, which are added in order.

#include "cpu/common.h"
#include "quantize.h"

#include <numeric>

namespace attnkern {

// Distinct anchors in ascending order, the thresholds between them, and the lowest original index of each.
template <typename A> struct Anchors {
  int64_t count; // of the original anchors
  bool poisoned = false;
  std::vector<A> value, thresholds;
  std::vector<int64_t> index;

  explicit Anchors(const Widened<A>& anchors) : count(anchors.size()) {
    for (const A anchor : anchors)
      poisoned |= anchor != anchor;
    if (poisoned) // NaN has no order, and none is needed
      return;
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return anchors[i] < anchors[j]; });
    for (const int64_t k : order)
      if (value.empty() || value.back() < anchors[k]) {
        if (!value.empty())
          thresholds.push_back(round_up<A>(threshold(value.back(), anchors[k], k < index.back())));
        value.push_back(anchors[k]);
        index.push_back(k);
      }
  }
};

template <typename A> struct Sums {
  double loss = 0;
  std::vector<A> residuals;
  std::vector<int64_t> counts;

  explicit Sums(int64_t anchors) : residuals(anchors), counts(anchors) {}
  void add(const Sums& other) {
    loss += other.loss;
    for (size_t k = 0; k < counts.size(); ++k) {
      residuals[k] += other.residuals[k];
      counts[k] += other.counts[k];
    }
  }
};

} // namespace attnkern

#define ATTNKERN_KERNELS "cpu/quantize_kernels.h"
#include "cpu/foreach_isa.h"

namespace attnkern {
namespace {

template <typename A> struct Quantized {
  Tensor values, indices, anchor_loss, commitment_loss, counts, residuals;
  const A* wide_values;   // the values before rounding
  std::vector<A> storage; // of wide_values if `values` are rounded
};

template <typename A>
Quantized<A> quantized(const Tensor& a, const Tensor& anchors, int64_t divisor, bool keep_wide) {
  Quantized<A> q{empty_same(a),   empty_like<int64_t>(a),        empty<A>(a, {}),
                 empty<A>(a, {}), empty_like<int64_t>(anchors), empty_like<A>(anchors),
                 nullptr,         {}};
  const Anchors<A> table{Widened<A>(anchors)};
  dispatch(a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, A>)
      q.wide_values = data<A>(q.values);
    else if (keep_wide)
      q.wide_values = (q.storage.resize(a.numel()), q.storage.data());
    const Sums<A> sums = ATTNKERN_BY_ISA(quantize, table, data<T>(a), a.numel(), mutable_data<T>(q.values),
                                         mutable_data<int64_t>(q.indices), q.storage.data());
    *mutable_data<A>(q.anchor_loss) = *mutable_data<A>(q.commitment_loss) = static_cast<A>(sums.loss / divisor);
    std::copy(sums.counts.begin(), sums.counts.end(), mutable_data<int64_t>(q.counts));
    std::copy(sums.residuals.begin(), sums.residuals.end(), mutable_data<A>(q.residuals));
  });
  return q;
}

template <typename A> A scalar(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? Widened<A>(*tensor)[0] : A(0);
}

// The gradients of a and of the anchors; `through` as above.
template <typename A>
std::tuple<Tensor, Tensor> gradients(const std::optional<Tensor>& grad_values,
                                     const std::optional<Tensor>& grad_anchor_loss,
                                     const std::optional<Tensor>& grad_commitment_loss, const Tensor& a,
                                     const Tensor& anchors, const Tensor& indices, const Tensor& residuals,
                                     int64_t divisor, const A* through) {
  Tensor grad_a = empty_same(a);
  dispatch(a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    ATTNKERN_BY_ISA(quantize_backward, data<T>(a), Widened<A>(anchors), data<int64_t>(indices), a.numel(),
                    data<T>(grad_values), through, scalar<A>(grad_commitment_loss), static_cast<A>(divisor),
                    mutable_data<T>(grad_a));
  });
  const A per_residual = A(2) * (scalar<A>(grad_anchor_loss) / static_cast<A>(divisor));
  Narrowed<A> grad_anchors(anchors);
  for (int64_t k = 0; k < anchors.numel(); ++k)
    grad_anchors.data()[k] = grad_anchor_loss.has_value() ? per_residual * data<A>(residuals)[k] : A(0);
  return {grad_a, grad_anchors.tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_fwd(Tensor a, Tensor anchors, int64_t divisor) {
  make_dense(a);
  make_contiguous(anchors);
  return dispatch_wide(a.scalar_type(), [&](auto wide) {
    const auto q = quantized<decltype(wide)>(a, anchors, divisor, false);
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
    return gradients<decltype(wide)>(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices,
                                     residuals, divisor, nullptr);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> anchor_fwd(Tensor x, Tensor a, Tensor anchors,
                                                                              bool residual, int64_t divisor) {
  make_dense(x);
  make_contiguous(a, anchors);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Tensor output = empty_same(x);
    const auto q = quantized<Wide<T>>(a, anchors, divisor, true);
    ATTNKERN_BY_ISA(modulate<T>, Shape(x), data<T>(x), q.wide_values, residual, mutable_data<T>(output));
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
    using A = Wide<T>;
    // Recompute the map: the anchors' values, NaN if the element or any anchor is NaN.
    const Widened<A> values(anchors), elements(a);
    const bool poisoned = std::any_of(values.begin(), values.end(), [](A value) { return value != value; });
    std::vector<A> map(elements.size());
    for (size_t i = 0; i < map.size(); ++i)
      map[i] = poisoned || elements[i] != elements[i] ? A(NAN)
                                                      : values[kept_within(data<int64_t>(indices)[i], values.size())];
    Tensor grad_x = features_grad<T>(x, need_grad_x);
    const std::vector<A> through =
        ATTNKERN_BY_ISA(map_gradient<T>, Shape(x), data<T>(grad_output), data<T>(x), map.data(), residual,
                        need_grad_x ? mutable_data<T>(grad_x) : nullptr);
    const auto [grad_a, grad_anchors] = gradients<A>(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors,
                                                     indices, residuals, divisor, through.data());
    return std::tuple(grad_x, grad_a, grad_anchors);
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("quantize_fwd", TORCH_BOX(&quantize_fwd));
  m.impl("quantize_bwd", TORCH_BOX(&quantize_bwd));
  m.impl("anchor_fwd", TORCH_BOX(&anchor_fwd));
  m.impl("anchor_bwd", TORCH_BOX(&anchor_bwd));
}

} // namespace attnkern
