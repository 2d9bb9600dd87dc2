// The forward pass of compatibility pooling on CUDA.

#include "cuda/pool_launch.cuh"

namespace attnkern {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_fwd(Tensor local, Tensor query) {
  make_dense(local);
  make_contiguous(query);
  const Queue queue(local);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Shape shape(local);
    const int64_t n = shape.images, c = shape.channels;
    Tensor pooled = empty<T>(local, {n, c});
    Tensor attention = local.dim() == 4 ? empty<A>(local, {n, local.size(2), local.size(3)})
                                        : empty<A>(local, {n, local.size(2)});
    Tensor scores = empty_like<A>(attention);
    Tensor pooled_wide = std::is_same_v<T, A> ? empty<A>(local, {0}) : empty<A>(local, {n, c});
    Forward<T> pass{{query, query.dim() == 1}, mutable_data<A>(scores), nullptr, nullptr, mutable_data<T>(pooled),
                    std::is_same_v<T, A> ? nullptr : mutable_data<A>(pooled_wide), mutable_data<A>(attention)};
    if (!Walk::fits<T>(shape)) {
      launch_slices<T>(queue, Slice(shape), pass, local, pass.query);
      return std::tuple(pooled, attention, scores, pooled_wide);
    }
    const Walk walk(shape, t);
    make_aligned(local, walk.width * sizeof(T));
    const int64_t blocks = walk.splits == 1 ? 0 : n * walk.splits;
    Tensor scratch = empty<A>(local, {blocks * (c + 2)});
    pass.sums = mutable_data<A>(scratch);
    pass.moments = pass.sums + blocks * c;
    launch_walk<T>(queue, walk, pass, local);
    queue.launch(pool_finish<T>, walk.splits > 1 ? n * finish_slices(shape) : 0, kFinishThreads, 0, shape, walk.splits,
                 pass);
    return std::tuple(pooled, attention, scores, pooled_wide);
  });
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) { m.impl("pool_fwd", TORCH_BOX(&pool_fwd)); }

} // namespace attnkern
