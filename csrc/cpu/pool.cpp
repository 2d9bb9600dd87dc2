// Softmax compatibility pooling on the CPU. An image is divided into tiles of positions that fit into the L2 cache, so
// that scores and weighted sums read the features from memory once. Tiles are combined in order.

#include "cpu/common.h"
#include "pool.h"

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

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_fwd(Tensor local, Tensor query) {
  make_dense(local);
  make_contiguous(query);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    constexpr bool rounds = !std::is_same_v<T, A>;
    const Tiles tiles(local);
    std::vector<int64_t> sizes{local.size(0)};
    for (int64_t i = 2; i < local.dim(); ++i)
      sizes.push_back(local.size(i));
    Tensor pooled = empty<T>(local, {local.size(0), local.size(1)});
    Tensor attention = empty<A>(local, {sizes.data(), sizes.size()});
    Tensor scores = empty_same(attention);
    Tensor pooled_wide = rounds ? empty_like<A>(pooled) : empty<A>(local, {0});
    ATTNKERN_BY_ISA(pool_forward<T>, tiles, data<T>(local), Widened<A>(query), mutable_data<T>(pooled),
                    mutable_data<A>(attention), mutable_data<A>(scores),
                    rounds ? mutable_data<A>(pooled_wide) : nullptr);
    return std::tuple(pooled, attention, scores, pooled_wide);
  });
}

std::tuple<Tensor, Tensor> pool_bwd(std::optional<Tensor> grad_pooled, std::optional<Tensor> grad_attention,
                                    std::optional<Tensor> grad_scores, Tensor local, Tensor query, Tensor attention,
                                    Tensor pooled_wide, bool need_grad_local) {
  make_dense(local);
  make_contiguous(grad_pooled, grad_attention, grad_scores, query, attention, pooled_wide);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Tiles tiles(local);
    const int64_t channels = local.size(1);
    Tensor grad_local = features_grad<T>(local, need_grad_local);
    const std::vector<A> zeros(grad_pooled.has_value() ? 0 : local.size(0) * channels);
    std::optional<Widened<A>> grad;
    if (grad_pooled.has_value())
      grad.emplace(*grad_pooled);
    Narrowed<A> grad_query(query);
    const bool shared = query.dim() == 1;
    std::vector<A> per_image(shared ? local.size(0) * channels : 0);
    ATTNKERN_BY_ISA(pool_backward<T>, tiles, grad ? grad->begin() : zeros.data(), data<A>(grad_attention),
                    data<A>(grad_scores), data<T>(local), Widened<A>(query), data<A>(attention), data<A>(pooled_wide),
                    need_grad_local ? mutable_data<T>(grad_local) : nullptr,
                    shared ? per_image.data() : grad_query.data());
    if (shared) { // summed over the batch in order
      std::fill_n(grad_query.data(), channels, A(0));
      for (size_t i = 0; i < per_image.size(); ++i)
        grad_query.data()[i % channels] += per_image[i];
    }
    return std::tuple(grad_local, grad_query.tensor());
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(attnkern, CPU, m) {
  m.impl("pool_fwd", TORCH_BOX(&pool_fwd));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

} // namespace attnkern
