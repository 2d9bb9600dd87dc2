// Nearest-anchor quantization on the CPU. The distinct anchors are sorted once; an element's anchor follows from the
// number of thresholds that are not above it. Each chunk of elements has its own bins, which are added in order.

#include "cpu/common.h"
#include "quantize_operators.h"

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

// Quantizes elements. `keep_wide` is a buffer for the values as the map has them, before rounding to the elements'
// dtype. Returns the address of these values, which is null if they are rounded and there is no buffer.
template <typename A>
const A* quantize_elements(const Tensor& a, const Tensor& anchors, int64_t divisor, const Quantized<A>& q,
                           std::vector<A>* keep_wide) {
  const Anchors<A> table{Widened<A>(anchors)};
  return dispatch(a.scalar_type(), [&](auto t) -> const A* {
    using T = decltype(t);
    constexpr bool rounds = !std::is_same_v<T, A>;
    A* wide = nullptr;
    if (rounds && keep_wide != nullptr)
      wide = (keep_wide->resize(a.numel()), keep_wide->data());
    const Sums<A> sums = ATTNKERN_BY_ISA(quantize, table, data<T>(a), a.numel(), mutable_data<T>(q.values),
                                         mutable_data<int64_t>(q.indices), wide);
    *mutable_data<A>(q.anchor_loss) = *mutable_data<A>(q.commitment_loss) = static_cast<A>(sums.loss / divisor);
    std::copy(sums.counts.begin(), sums.counts.end(), mutable_data<int64_t>(q.counts));
    std::copy(sums.residuals.begin(), sums.residuals.end(), mutable_data<A>(q.residuals));
    return rounds ? wide : data<A>(q.values);
  });
}

template <typename A> A scalar(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? Widened<A>(*tensor)[0] : A(0);
}

// Writes the gradients of the elements and of the anchors; `map_grad` is the gradient that reaches the map through the
// features, null if there are no features.
template <typename A> void write_gradients(const QuantizedGradients& g, const A* map_grad) {
  const Tensor &a = g.a, &anchors = g.anchors;
  dispatch(a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    ATTNKERN_BY_ISA(quantize_backward, data<T>(a), Widened<A>(anchors), data<int64_t>(g.indices), a.numel(),
                    data<T>(g.grad_values), map_grad, scalar<A>(g.grad_commitment_loss), static_cast<A>(g.divisor),
                    mutable_data<T>(g.grad_a));
  });
  const A per_residual = A(2) * (scalar<A>(g.grad_anchor_loss) / static_cast<A>(g.divisor));
  Narrowed<A> grad_anchors(g.grad_anchors);
  for (int64_t k = 0; k < anchors.numel(); ++k)
    grad_anchors.data()[k] = g.grad_anchor_loss.has_value() ? per_residual * data<A>(g.residuals)[k] : A(0);
  grad_anchors.finish();
}

template <typename A>
void forward(const Tensor& a, const Tensor& anchors, int64_t divisor, const Quantized<A>& quantized) {
  quantize_elements<A>(a, anchors, divisor, quantized, nullptr);
}

template <typename A> void backward(const QuantizedGradients& gradients) { write_gradients<A>(gradients, nullptr); }

template <typename T>
void forward_features(const Tensor& x, const Tensor& a, const Tensor& anchors, bool residual, int64_t divisor,
                      const Tensor& output, const Quantized<Wide<T>>& quantized) {
  std::vector<Wide<T>> storage;
  const Wide<T>* map = quantize_elements<Wide<T>>(a, anchors, divisor, quantized, &storage);
  ATTNKERN_BY_ISA(modulate<T>, Shape(x), data<T>(x), map, residual, mutable_data<T>(output));
}

template <typename T>
void backward_features(const Tensor& grad_output, const Tensor& x, bool residual, const QuantizedGradients& gradients,
                       T* grad_x) {
  using A = Wide<T>;
  // The map is computed again: the anchors' values, NaN if the element or any anchor is NaN.
  const Widened<A> values(gradients.anchors), elements(gradients.a);
  const int64_t* indices = data<int64_t>(gradients.indices);
  const bool poisoned = std::any_of(values.begin(), values.end(), [](A value) { return value != value; });
  std::vector<A> map(elements.size());
  for (size_t i = 0; i < map.size(); ++i)
    map[i] = poisoned || elements[i] != elements[i] ? A(NAN) : values[kept_within(indices[i], values.size())];
  const std::vector<A> map_grad = ATTNKERN_BY_ISA(map_gradient<T>, Shape(x), data<T>(grad_output), data<T>(x),
                                                  map.data(), residual, grad_x);
  write_gradients<A>(gradients, map_grad.data());
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("quantize_fwd", TORCH_BOX(&quantize_fwd));
  m.impl("quantize_bwd", TORCH_BOX(&quantize_bwd));
  m.impl("anchor_fwd", TORCH_BOX(&anchor_fwd));
  m.impl("anchor_bwd", TORCH_BOX(&anchor_bwd));
}

} // namespace attnkern
