// Compatibility pooling on CUDA: which kernels a pass launches.

#include "cuda/pool_finish.cuh"
#include "cuda/pool_many.h"
#include "cuda/pool_slices.cuh"
#include "cuda/pool_walk.cuh"
#include "pool_operators.h"

namespace attnkern {
namespace {

template <typename T, typename Pass>
void launch_walk(const Queue& queue, const PoolPlan& plan, const Pass& pass, const Tensor& local) {
  const auto launch = [&](auto kernel) {
    queue.launch(kernel, plan.shape.images * plan.splits, plan.threads,
                 Workspace<Wide<T>>::bytes(plan, Pass::kBackward), plan, pass, data<T>(local));
  };
  if (plan.shape.channels_inner)
    launch(pool_walk<T, ColumnTile<T>, Pass>);
  else if (plan.lanes == kGroup)
    launch(pool_walk<T, RowTile<T, kGroup>, Pass>);
  else
    launch(pool_walk<T, RowTile<T, kGroup / 2>, Pass>);
}

// `vector` is the vector of the scores; without one they are zero.
template <typename T, typename Pass>
void launch_slices(const Queue& queue, const Shape& shape, const Pass& pass, Tensor local,
                   const std::optional<Query>& vector) {
  const Slice slice(shape, T{});
  make_aligned(local, slice.width * sizeof(T));
  Wide<T>* partial = nullptr;
  Tensor scratch = empty<Wide<T>>(local, {vector.has_value() ? slice.blocks() * (shape.positions + 1) : 0});
  if (vector.has_value()) {
    partial = mutable_data<Wide<T>>(scratch);
    const Wide<T>* pooled = nullptr;
    if constexpr (Pass::kBackward)
      pooled = pass.pooled;
    queue.launch(slice_scores<T>, slice.blocks(), kSliceThreads, SliceTile<T>::bytes(), slice, *vector, pooled,
                 data<T>(local), partial);
  }
  queue.launch(pool_slice<T, Pass>, slice.blocks(), kSliceThreads, SliceTile<T>::bytes(), slice, pass, data<T>(local),
               partial);
}

template <typename T>
void forward(Tensor local, const Tensor& query, const std::optional<Tensor>& mask, const Tensor& pooled,
             const Tensor& attention, const Tensor& scores, const Tensor& pooled_wide) {
  using A = Wide<T>;
  if (is_many(query, mask))
    return forward_many<T>(local, query, mask, pooled, attention, scores, pooled_wide);
  const Queue queue(local);
  const Shape shape(local);
  const int64_t n = shape.images, c = shape.channels;
  Forward<T> pass{{query, shares_query(query)}, mutable_data<A>(scores), nullptr, nullptr, mutable_data<T>(pooled),
                  std::is_same_v<T, A> ? nullptr : mutable_data<A>(pooled_wide), mutable_data<A>(attention)};
  if (!PoolPlan::fits<T>(shape))
    return launch_slices<T>(queue, shape, pass, local, pass.query);
  const PoolPlan plan(shape, T{});
  make_aligned(local, plan.width * sizeof(T));
  const int64_t blocks = plan.splits == 1 ? 0 : n * plan.splits;
  Tensor scratch = empty<A>(local, {blocks * (c + 2)});
  pass.sums = mutable_data<A>(scratch);
  pass.moments = pass.sums + blocks * c;
  launch_walk<T>(queue, plan, pass, local);
  const RowSums rows(c, plan.splits);
  const int64_t finishing = std::max(rows.blocks(), ceil_div(shape.positions, 4 * RowSums::kThreads));
  queue.launch(pool_finish<T>, plan.splits > 1 ? n * finishing : 0, RowSums::kThreads, 0, shape, plan.splits, pass,
               rows, finishing);
}

template <typename T>
void backward(const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_attention,
              const std::optional<Tensor>& grad_scores, Tensor local, const Tensor& query,
              const std::optional<Tensor>& mask, const Tensor& attention, const Tensor& pooled_wide, T* grad_local,
              const Tensor& grad_query) {
  using A = Wide<T>;
  if (is_many(query, mask))
    return backward_many<T>(grad_pooled, grad_attention, grad_scores, local, query, mask, attention, pooled_wide,
                            grad_local, grad_query);
  const Queue queue(local);
  const Shape shape(local);
  const int64_t n = shape.images, c = shape.channels;
  if (n == 0 || c == 0) {
    Tensor none = grad_query;
    torch::stable::zero_(none);
    return;
  }
  const bool shared_query = shares_query(query);
  Backward<T> pass{data<T>(grad_pooled),
                   data<A>(grad_attention),
                   data<A>(grad_scores),
                   {query, shared_query},
                   data<A>(attention),
                   data<A>(pooled_wide),
                   grad_local,
                   nullptr,
                   false,
                   grad_query};
  const bool fits = PoolPlan::fits<T>(shape);
  const PoolPlan plan(shape, T{});
  const int64_t splits = fits ? plan.splits : 1;
  pass.direct = splits == 1 && (!shared_query || n == 1);
  Tensor sums = empty<A>(local, {pass.direct ? 0 : n * splits * c});
  pass.sums = mutable_data<A>(sums);
  if (fits) {
    make_aligned(local, plan.width * sizeof(T));
    launch_walk<T>(queue, plan, pass, local);
  } else {
    std::optional<Query> vector;
    if (grad_pooled.has_value())
      vector = Query{*grad_pooled, false};
    launch_slices<T>(queue, shape, pass, local, vector);
  }
  if (pass.direct)
    return;
  const int64_t groups = shared_query ? 1 : n, count = n * splits / groups;
  const RowSums rows(c, count);
  queue.launch(add_rows<A>, groups * rows.blocks(), RowSums::kThreads, 0, data<A>(sums), groups, count, rows,
               MutableCompanion(grad_query));
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("pool_fwd", TORCH_BOX(&pool_fwd));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

} // namespace attnkern
