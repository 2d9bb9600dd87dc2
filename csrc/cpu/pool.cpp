// Softmax compatibility pooling on the CPU. An image is divided into tiles of positions that fit into the L2 cache, so
// that scores and weighted sums read the features from memory once. Tiles are combined in order.

#include "cpu/common.h"
#include "pool_operators.h"

#include <memory>

namespace attnkern {

// Images divided into tiles of positions. The length depends on the channels only, so that sums do not depend on N.
struct Tiles {
  Shape shape;
  int64_t length, per_image;

  explicit Tiles(const Tensor& local) : shape(local) {
    const int64_t channels = std::max<int64_t>(1, shape.channels);
    length = std::min(shape.positions, std::max<int64_t>(16, 131072 / channels / 16 * 16)); // 512 KB of float32
    per_image = (shape.positions + length - 1) / length;
  }
  int64_t length_of(int64_t tile) const { return std::min(length, shape.positions - tile % per_image * length); }
  int64_t first_of(int64_t tile) const { return tile % per_image * length; }
  int64_t count() const { return shape.images * per_image; }
};

// The positions of an image that take part; null if all do.
struct Mask {
  const bool* first;
  int64_t stride; // 0 if the batch shares it

  const bool* at(int64_t image, int64_t position) const {
    return first == nullptr ? nullptr : first + image * stride + position;
  }
};

// Whether features are converted tile by tile, because more than one block of vectors (cpu/products.h) reads them.
template <typename T> bool widens(int64_t queries) { return !std::is_same_v<T, Wide<T>> && queries > 4; }

// The queries of each image, which the batch may share: (N, C), (C,), (N, M, C) or (1, M, C).
template <typename A> struct Queries {
  Widened<A> values;
  int64_t count, stride;

  explicit Queries(const Tensor& query)
      : values(query), count(query.dim() == 3 ? query.size(1) : 1), stride(count * query.size(query.dim() - 1)) {
    if (query.dim() == 1 || (query.dim() == 3 && query.size(0) == 1))
      stride = 0;
  }
  const A* at(int64_t image) const { return values.begin() + image * stride; }
};

} // namespace attnkern

#define ATTNKERN_KERNELS "cpu/pool_kernels.h"
#include "cpu/foreach_isa.h"

namespace attnkern {
namespace {

Mask mask_of(const std::optional<Tensor>& mask) {
  if (!mask.has_value())
    return {nullptr, 0};
  return {static_cast<const bool*>(mask->data_ptr()), mask->size(0) <= 1 ? 0 : mask->numel() / mask->size(0)};
}

template <typename T>
void forward(Tensor local, const Tensor& query, const std::optional<Tensor>& mask, const Tensor& pooled,
             const Tensor& attention, const Tensor& scores, const Tensor& pooled_wide) {
  using A = Wide<T>;
  ATTNKERN_BY_ISA(pool_forward<T>, Tiles(local), data<T>(local), Queries<A>(query), mask_of(mask),
                  mutable_data<T>(pooled), mutable_data<A>(attention), mutable_data<A>(scores),
                  std::is_same_v<T, A> ? nullptr : mutable_data<A>(pooled_wide));
}

template <typename T>
void backward(const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_attention,
              const std::optional<Tensor>& grad_scores, Tensor local, const Tensor& query,
              const std::optional<Tensor>& mask, const Tensor& attention, const Tensor& pooled_wide, T* grad_local,
              const Tensor& grad_query) {
  using A = Wide<T>;
  const Tiles tiles(local);
  const Queries<A> queries(query);
  const std::vector<A> zeros(grad_pooled.has_value() ? 0 : pooled_wide.numel());
  std::optional<Widened<A>> grad;
  if (grad_pooled.has_value())
    grad.emplace(*grad_pooled);
  Narrowed<A> query_grad(grad_query);
  const bool shared = queries.stride == 0;
  std::vector<A> per_image(shared ? pooled_wide.numel() : 0);
  ATTNKERN_BY_ISA(pool_backward<T>, tiles, grad ? grad->begin() : zeros.data(), data<A>(grad_attention),
                  data<A>(grad_scores), data<T>(local), queries, mask_of(mask), data<A>(attention),
                  data<A>(pooled_wide), grad_local, shared ? per_image.data() : query_grad.data());
  if (shared) { // summed over the batch in order
    const int64_t size = query.numel();
    std::fill_n(query_grad.data(), size, A(0));
    for (size_t i = 0; i < per_image.size(); ++i)
      query_grad.data()[i % size] += per_image[i];
  }
  query_grad.finish();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("pool_fwd", TORCH_BOX(&pool_fwd));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

} // namespace attnkern
