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
  int64_t count() const { return shape.images * per_image; }
};

// The query of an image: its own, or the one shared by the batch.
template <typename A> const A* query_of(const Widened<A>& query, int64_t image, int64_t channels) {
  return query.begin() + (query.size() > channels ? image * channels : 0);
}

} // namespace attnkern

#define ATTNKERN_KERNELS "cpu/pool_kernels.h"
#include "cpu/foreach_isa.h"

namespace attnkern {
namespace {

template <typename T>
void forward(Tensor local, const Tensor& query, const Tensor& pooled, const Tensor& attention, const Tensor& scores,
             const Tensor& pooled_wide) {
  using A = Wide<T>;
  ATTNKERN_BY_ISA(pool_forward<T>, Tiles(local), data<T>(local), Widened<A>(query), mutable_data<T>(pooled),
                  mutable_data<A>(attention), mutable_data<A>(scores),
                  std::is_same_v<T, A> ? nullptr : mutable_data<A>(pooled_wide));
}

template <typename T>
void backward(const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_attention,
              const std::optional<Tensor>& grad_scores, Tensor local, const Tensor& query, const Tensor& attention,
              const Tensor& pooled_wide, T* grad_local, const Tensor& grad_query) {
  using A = Wide<T>;
  const Tiles tiles(local);
  const int64_t images = tiles.shape.images, channels = tiles.shape.channels;
  const std::vector<A> zeros(grad_pooled.has_value() ? 0 : images * channels);
  std::optional<Widened<A>> grad;
  if (grad_pooled.has_value())
    grad.emplace(*grad_pooled);
  Narrowed<A> query_grad(grad_query);
  const bool shared = query.dim() == 1;
  std::vector<A> per_image(shared ? images * channels : 0);
  ATTNKERN_BY_ISA(pool_backward<T>, tiles, grad ? grad->begin() : zeros.data(), data<A>(grad_attention),
                  data<A>(grad_scores), data<T>(local), Widened<A>(query), data<A>(attention), data<A>(pooled_wide),
                  grad_local, shared ? per_image.data() : query_grad.data());
  if (shared) { // summed over the batch in order
    std::fill_n(query_grad.data(), channels, A(0));
    for (size_t i = 0; i < per_image.size(); ++i)
      query_grad.data()[i % channels] += per_image[i];
  }
  query_grad.finish();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("pool_fwd", TORCH_BOX(&pool_fwd));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

} // namespace attnkern
