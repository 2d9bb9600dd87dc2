// The backward pass of compatibility pooling on CUDA.

#include "cuda/pool_launch.cuh"

namespace attnkern {
namespace {

// Σ over the rows of each group of (groups, rows, C), in an order that follows from the number of rows.
template <typename A>
__global__ void __launch_bounds__(256)
    add_rows(const A* from, int64_t groups, int64_t rows, int64_t channels, MutableCompanion to) {
  struct Lanes {
    A of[256];
  };
  const int64_t tiles = ceil_div(channels, kWarp), group = block_index() / tiles;
  if (group >= groups)
    return;
  const int64_t c = block_index() % tiles * kWarp + threadIdx.x % kWarp;
  A sum = 0;
  if (c < channels)
#pragma unroll 4
    for (int64_t row = threadIdx.x / kWarp; row < rows; row += blockDim.x / kWarp)
      sum += from[(group * rows + row) * channels + c];
  A* lanes = shared<Lanes>().of;
  lanes[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp || c >= channels)
    return;
  for (int i = kWarp + threadIdx.x; i < blockDim.x; i += kWarp)
    sum += lanes[i];
  to.store(group * channels + c, sum);
}

std::tuple<Tensor, Tensor> pool_bwd(std::optional<Tensor> grad_pooled, std::optional<Tensor> grad_attention,
                                    std::optional<Tensor> grad_scores, Tensor local, Tensor query, Tensor attention,
                                    Tensor pooled_wide, bool need_grad_local) {
  make_dense(local);
  make_contiguous(grad_pooled, grad_attention, grad_scores, query, attention, pooled_wide);
  const Queue queue(local);
  return dispatch(local.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Shape shape(local);
    const int64_t n = shape.images, c = shape.channels;
    Tensor grad_local = features_grad<T>(local, need_grad_local);
    Tensor grad_query = empty_same(query);
    if (n == 0 || c == 0)
      return std::tuple(grad_local, torch::stable::zero_(grad_query));
    const bool shared_query = query.dim() == 1;
    Backward<T> pass{data<T>(grad_pooled),
                     data<A>(grad_attention),
                     data<A>(grad_scores),
                     {query, shared_query},
                     data<A>(attention),
                     data<A>(pooled_wide),
                     need_grad_local ? mutable_data<T>(grad_local) : nullptr,
                     nullptr,
                     false,
                     grad_query};
    const bool fits = Walk::fits<T>(shape);
    const Walk walk(shape, t);
    const int64_t splits = fits ? walk.splits : 1;
    pass.direct = splits == 1 && (!shared_query || n == 1);
    Tensor sums = empty<A>(local, {pass.direct ? 0 : n * splits * c});
    pass.sums = mutable_data<A>(sums);
    if (fits) {
      make_aligned(local, walk.width * sizeof(T));
      launch_walk<T>(queue, walk, pass, local);
    } else {
      std::optional<Query> vector;
      if (grad_pooled.has_value())
        vector = Query{*grad_pooled, false};
      launch_slices<T>(queue, Slice(shape), pass, local, vector);
    }
    if (!pass.direct) {
      const int64_t groups = shared_query ? 1 : n, rows = n * splits / groups;
      queue.launch(add_rows<A>, groups * ceil_div(c, kWarp), 256, 0, data<A>(sums), groups, rows, c,
                   MutableCompanion(grad_query));
    }
    return std::tuple(grad_local, grad_query);
  });
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) { m.impl("pool_bwd", TORCH_BOX(&pool_bwd)); }

} // namespace attnkern
