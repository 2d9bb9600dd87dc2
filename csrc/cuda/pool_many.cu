// Pooling with many queries, or with a mask, on CUDA: which kernels a pass launches.

#include "cuda/pool_many.h"

#include "cuda/pool_many_finish.cuh"

namespace attnkern {
namespace {

// Launches pool_many(), after many_scores() where the plan needs it.
template <typename T, typename Pass>
void launch_many(const Queue& queue, const ManyPlan& plan, const Pass& pass, const Tensor& local) {
  const auto launch = [&](auto inner) {
    constexpr bool kInner = decltype(inner)::value;
    if (plan.scored && pass.has_vectors)
      queue.launch(many_scores<T, kInner, Pass>, plan.score_blocks(), plan.threads(), plan.bytes<T>(true), plan, pass,
                   data<T>(local));
    queue.launch(pool_many<T, kInner, Pass>, plan.blocks(), plan.threads(), plan.bytes<T>(!plan.scored), plan, pass,
                 data<T>(local));
  };
  if (plan.shape.channels_inner)
    launch(std::true_type());
  else
    launch(std::false_type());
}

} // namespace

template <typename T>
void forward_many(Tensor local, const Tensor& query, const std::optional<Tensor>& mask, const Tensor& pooled,
                  const Tensor& attention, const Tensor& scores, const Tensor& pooled_wide) {
  using A = Wide<T>;
  const Queue queue(local);
  const ManyPlan plan(Shape(local), query, mask, queue.shared_memory(), T{});
  make_aligned(local, plan.width * sizeof(T));
  const Shape rows(plan.rows(), plan.shape.channels, plan.shape.positions);
  Tensor scratch = empty<A>(local, {rows.images * plan.splits * (rows.channels + 2)});
  A* sums = mutable_data<A>(scratch);
  A* moments = sums + rows.images * plan.splits * rows.channels;
  const ManyForward<T> pass{query, plan.shared_query, true, mutable_data<A>(scores), sums, moments};
  launch_many<T>(queue, plan, pass, local);
  const MaskedForward<T> outputs{{{query, plan.shared_query}, pass.scores, sums, moments, mutable_data<T>(pooled),
                                  std::is_same_v<T, A> ? nullptr : mutable_data<A>(pooled_wide),
                                  mutable_data<A>(attention)},
                                 plan.mask,
                                 plan.queries};
  const RowSums sum(rows.channels, plan.splits);
  const int64_t finishing = std::max(sum.blocks(), ceil_div(rows.positions, 4 * RowSums::kThreads));
  queue.launch(pool_finish<T, MaskedForward<T>>, rows.images * finishing, RowSums::kThreads, 0, rows, plan.splits,
               outputs, sum, finishing);
}

template <typename T>
void backward_many(const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& grad_attention,
                   const std::optional<Tensor>& grad_scores, Tensor local, const Tensor& query,
                   const std::optional<Tensor>& mask, const Tensor& attention, const Tensor& pooled_wide, T* grad_local,
                   const Tensor& grad_query) {
  using A = Wide<T>;
  const Queue queue(local);
  const ManyPlan plan(Shape(local), query, mask, queue.shared_memory(), T{});
  const Shape rows(plan.rows(), plan.shape.channels, plan.shape.positions);
  if (rows.images * rows.channels == 0) {
    Tensor none = grad_query;
    torch::stable::zero_(none);
  }
  if (rows.channels == 0)
    return;
  make_aligned(local, plan.width * sizeof(T));
  const int64_t of_maps = rows.images * rows.positions, of_sums = rows.images * plan.splits * rows.channels;
  const bool scored = plan.scored && grad_pooled.has_value();
  Tensor scratch = empty<A>(local, {of_sums + (scored ? 2 : 1) * of_maps + rows.images});
  A* sums = mutable_data<A>(scratch);
  A *weights = sums + of_sums, *deltas = weights + of_maps, *scores = deltas + rows.images;
  const Backward<T> of_rows{data<T>(grad_pooled),
                            data<A>(grad_attention),
                            data<A>(grad_scores),
                            {query, plan.shared_query},
                            data<A>(attention),
                            data<A>(pooled_wide),
                            nullptr,
                            nullptr,
                            false,
                            grad_query};
  queue.launch(many_deltas<T>, rows.images, kDeltaThreads, 0, rows, of_rows, plan.mask, plan.queries, deltas);
  const ManyBackward<T> pass{grad_pooled, false, grad_pooled.has_value(), scores, sums, of_rows.grad_attention,
                             of_rows.grad_scores, of_rows.attention, deltas, weights};
  launch_many<T>(queue, plan, pass, local);
  const int64_t groups = plan.shared_query ? plan.queries : rows.images;
  const int64_t count = groups == 0 ? 0 : rows.images * plan.splits / groups;
  const RowSums sum(rows.channels, count);
  if (rows.images > 0)
    queue.launch(add_rows<A>, groups * sum.blocks(), RowSums::kThreads, 0, static_cast<const A*>(sums), groups, count,
                 sum, MutableCompanion(grad_query));
  if (grad_local == nullptr)
    return;
  const bool clears = mask.has_value() && !grad_scores.has_value();
  const ManyOuter<T> outer{plan, of_rows.grad_pooled, query, of_rows.attention, weights, clears, grad_local};
  const auto kernel = plan.shape.channels_inner ? many_grad_local<T, true> : many_grad_local<T, false>;
  queue.launch(kernel, outer.blocks(), kOuterWarps * kWarp, 0, outer);
}

#define ATTNKERN_MANY(T)                                                                                               \
  template void forward_many<T>(Tensor, const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&,     \
                                const Tensor&, const Tensor&);                                                         \
  template void backward_many<T>(const std::optional<Tensor>&, const std::optional<Tensor>&,                           \
                                 const std::optional<Tensor>&, Tensor, const Tensor&, const std::optional<Tensor>&,    \
                                 const Tensor&, const Tensor&, T*, const Tensor&);
ATTNKERN_MANY(float)
ATTNKERN_MANY(double)
ATTNKERN_MANY(Half)
ATTNKERN_MANY(BFloat16)

} // namespace attnkern
