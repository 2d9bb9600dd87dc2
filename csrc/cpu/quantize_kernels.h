// The kernels of nearest-anchor quantization. Included once per instruction set by foreach_isa.h, after the types of
// quantize.cpp.

#include "cpu/modulate.h"

namespace attnkern::ATTNKERN_ISA {

constexpr int64_t kBlock = 256; // elements whose thresholds are counted together

// rank[i] = number of thresholds that are not above element i; 0 for NaN.
template <typename A> void count_thresholds(const std::vector<A>& thresholds, const A* a, int64_t count, int32_t* rank) {
  if (thresholds.size() > 64) {
    for (int64_t i = 0; i < count; ++i)
      rank[i] = a[i] == a[i] ? std::upper_bound(thresholds.begin(), thresholds.end(), a[i]) - thresholds.begin() : 0;
    return;
  }
  std::fill_n(rank, count, 0);
  for (const A threshold : thresholds)
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      rank[i] += a[i] >= threshold;
}

// `wide_values` receives the values before rounding to T, unless it is null.
template <typename T, typename A>
Sums<A> quantize(const Anchors<A>& anchors, const T* a, int64_t count, T* values, int64_t* indices, A* wide_values) {
  // This depends on the number of anchors only: sums are computed per chunk and then added in order.
  const int64_t chunk = std::max<int64_t>(2048, 16 * anchors.count), chunks = (count + chunk - 1) / chunk;
  std::vector<Sums<A>> sums(chunks, Sums<A>(anchors.count));
  parallel(chunks, chunk * 8, [&](int64_t c) {
    Sums<A>& sum = sums[c];
    A element[kBlock], value[kBlock];
    int32_t rank[kBlock];
    const int64_t last = std::min(count, (c + 1) * chunk);
    for (int64_t first = c * chunk; first < last; first += kBlock) {
      const int64_t length = std::min(kBlock, last - first);
#pragma omp simd
      for (int64_t i = 0; i < length; ++i)
        element[i] = static_cast<A>(widen(a[first + i]));
      count_thresholds(anchors.thresholds, element, length, rank);
      double loss = 0; // per block, so that the rounding error does not grow with the chunk
      for (int64_t i = 0; i < length; ++i) {
        const bool is_nan = element[i] != element[i], counted = !is_nan && !anchors.poisoned;
        const int64_t index = counted ? anchors.index[rank[i]] : 0;
        const A difference = counted ? anchors.value[rank[i]] - element[i] : A(NAN);
        value[i] = counted ? anchors.value[rank[i]] : A(NAN);
        indices[first + i] = index;
        loss += difference * difference;
        sum.residuals[index] += difference;
        sum.counts[index] += counted;
      }
      sum.loss += loss;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i)
        values[first + i] = narrow<T>(static_cast<Wide<T>>(value[i]));
      if (wide_values != nullptr)
        std::copy_n(value, length, wide_values + first);
    }
  });
  Sums<A> total(anchors.count);
  for (const Sums<A>& sum : sums)
    total.add(sum);
  return total;
}

// The gradient of a: that of the values plus that of the commitment loss. `map_grad` is the gradient that reaches
// the map through the features; it is null if there are no features.
template <typename T, typename A>
void quantize_backward(const T* a, const Widened<A>& anchors, const int64_t* indices, int64_t count,
                       const T* grad_values, const A* map_grad, A grad_loss, A divisor, T* grad_a) {
  bool poisoned = false;
  for (const A anchor : anchors)
    poisoned |= anchor != anchor;
  parallel((count + kBlock - 1) / kBlock, 4 * kBlock, [&](int64_t block) {
    for (int64_t i = block * kBlock; i < std::min(count, (block + 1) * kBlock); ++i) {
      A grad = grad_values == nullptr ? A(0) : static_cast<A>(widen(grad_values[i]));
      if (map_grad != nullptr)
        grad += map_grad[i];
      if (grad_loss != A(0)) {
        const A value = poisoned ? A(NAN) : anchors[kept_within(indices[i], anchors.size())];
        grad += commitment_grad(static_cast<A>(widen(a[i])), value, grad_loss, divisor);
      }
      grad_a[i] = narrow<T>(static_cast<Wide<T>>(grad));
    }
  });
}

// The gradient of the map, Σ_c dy·x.
template <typename T>
std::vector<Wide<T>> map_gradient(const Shape& shape, const T* dy, const T* x, const Wide<T>* map, bool residual,
                                  T* dx) {
  std::vector<Wide<T>> partial(shape.images * shape.positions * partial_sums(shape));
  modulate_backward(shape, dy, x, map, residual, dx, partial.data());
  if (partial_sums(shape) == 1)
    return partial;
  std::vector<Wide<T>> sum(shape.images * shape.positions);
  parallel(shape.images, shape.positions, [&](int64_t image) {
    const auto of_image = add_partials<Wide<T>>(shape, partial.data(), image, nullptr);
    std::copy(of_image.begin(), of_image.end(), sum.begin() + image * shape.positions);
  });
  return sum;
}

} // namespace attnkern::ATTNKERN_ISA
