// Nearest-anchor quantization on CUDA: which kernels a pass launches.

#include "cuda/quantize_features.cuh"

namespace attnkern {
namespace {

constexpr int64_t kTileAnchors = 128; // up to this many, every tile of features sorts them
constexpr int64_t kMostOwners = 4096; // most tiles whose sums the next launch adds

// Elements per block. One block quantizes a few elements alone, which saves a launch. Otherwise a thread has one
// element, or more if there are many anchors to sort or if the sums of more than 1024 blocks would have to be added.
constexpr int64_t kFewElements = 8 * kThreads;
int64_t chunk_size(int64_t count, int64_t anchors) {
  if (count <= kFewElements)
    return kFewElements;
  return kThreads * std::max({int64_t(1), ceil_div(count, 1024 * kThreads), ceil_div(4 * anchors, kThreads)});
}

// The outputs and the scratch memory of quantization in `blocks` blocks; by default chunk_size() determines how many.
template <typename A> struct Quantized {
  Tensor values, indices, anchor_loss, commitment_loss, counts, residuals;
  Tensor sums, numbers, tables;
  Quantization<A> q;

  Quantized(const Tensor& a, const Tensor& anchors, int64_t divisor, int64_t blocks = 0)
      : values(empty_same(a)), indices(empty_like<int64_t>(a)), anchor_loss(empty<A>(a, {})),
        commitment_loss(empty<A>(a, {})), counts(empty_like<int64_t>(anchors)), residuals(empty_like<A>(anchors)),
        q(make(a, anchors, divisor, blocks)) {}
  size_t shared_bytes() const { return q.scratch.fits_shared() ? q.scratch.bytes() : 0; }

private:
  Quantization<A> make(const Tensor& a, const Tensor& anchors, int64_t divisor, int64_t blocks) {
    const int64_t count = a.numel(), anchor_count = anchors.numel(), chunk = chunk_size(count, anchor_count);
    if (blocks == 0)
      blocks = std::max<int64_t>(1, ceil_div(count, chunk));
    const int64_t shared_by = blocks == 1 ? 0 : blocks;
    sums = empty<A>(a, {(anchor_count + 1) * shared_by});
    numbers = empty<int32_t>(a, {anchor_count * shared_by});
    A* residual_sums = mutable_data<A>(sums);
    const Partial<A> partial{residual_sums, residual_sums + anchor_count * blocks, mutable_data<int32_t>(numbers)};
    Scratch<A> scratch(anchor_count);
    if (!scratch.fits_shared()) {
      tables = empty<int64_t>(a, {blocks * scratch.bytes() / 8});
      scratch.memory = reinterpret_cast<char*>(mutable_data<int64_t>(tables));
    }
    return {a, anchors, static_cast<int>(anchor_count), count, chunk, blocks, scratch, values,
            mutable_data<int64_t>(indices), mutable_data<A>(anchor_loss), mutable_data<A>(commitment_loss),
            static_cast<A>(divisor), mutable_data<int64_t>(counts), mutable_data<A>(residuals), partial};
  }
};

template <typename A>
Gradients<A> make_gradients(const std::optional<Tensor>& grad_values, const std::optional<Tensor>& grad_anchor_loss,
                            const std::optional<Tensor>& grad_commitment_loss, const Tensor& a, const Tensor& anchors,
                            const Tensor& indices, const Tensor& residuals, int64_t divisor, const Tensor& grad_a,
                            const Tensor& grad_anchors) {
  return {grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, static_cast<int>(anchors.numel()), a.numel(),
          data<int64_t>(indices), data<A>(residuals), static_cast<A>(divisor), grad_a, grad_anchors};
}

template <typename A> void launch_backward(const Queue& queue, const Gradients<A>& gradients, const GradMap<A>& map) {
  const int64_t blocks = ceil_div(gradients.count, kThreads);
  queue.launch(quantize_backward_kernel<A>, blocks + gradients.anchor_blocks(), kThreads, 0, gradients, map, blocks);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_fwd(Tensor a, Tensor anchors, int64_t divisor) {
  make_dense(a);
  make_contiguous(anchors);
  return dispatch_wide(a.scalar_type(), [&](auto wide) {
    using A = decltype(wide);
    const Queue queue(a);
    const Quantized<A> out(a, anchors, divisor);
    queue.launch(quantize_kernel<A>, out.q.blocks, kThreads, out.shared_bytes(), out.q);
    queue.launch(add_blocks_kernel<A>, out.q.blocks == 1 ? 0 : anchors.numel() + 1, kThreads, 0, out.q);
    return std::tuple(out.values, out.indices, out.anchor_loss, out.commitment_loss, out.counts, out.residuals);
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
    using A = decltype(wide);
    Tensor grad_a = empty_same(a), grad_anchors = empty_same(anchors);
    launch_backward(Queue(a),
                    make_gradients<A>(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices,
                                      residuals, divisor, grad_a, grad_anchors),
                    GradMap<A>());
    return std::tuple(grad_a, grad_anchors);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> anchor_fwd(Tensor x, Tensor a, Tensor anchors,
                                                                              bool residual, int64_t divisor) {
  make_dense(x);
  make_contiguous(a, anchors);
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = Wide<T>;
    const Queue queue(x);
    Tensor output = empty_same(x);
    const auto tiling = Tiling::of<T>(Shape(x), data<T>(x), data<T>(output));
    const int64_t owners = tiling.shape.images * ceil_div(tiling.shape.positions, tiling.width);
    const auto quantizing = anchors.numel() > kTileAnchors    ? Quantizing::before
                            : a.numel() <= kFewElements       ? Quantizing::beside
                            : owners <= kMostOwners           ? Quantizing::within
                                                              : Quantizing::before;
    const bool before = quantizing == Quantizing::before, within = quantizing == Quantizing::within;
    const Quantized<A> out(a, anchors, divisor, within ? owners : 0);
    const int64_t adding = out.q.blocks == 1 ? 0 : anchors.numel() + 1;
    queue.launch(quantize_kernel<A>, before ? out.q.blocks : 0, kThreads, out.shared_bytes(), out.q);
    queue.launch(anchor_forward_kernel<T>,
                 tiling.shape.images * tiling.tiles() + (before ? adding : quantizing == Quantizing::beside), kThreads,
                 before ? 0 : out.shared_bytes(), data<T>(x), out.q, quantizing, residual, mutable_data<T>(output),
                 tiling);
    queue.launch(add_blocks_kernel<A>, within ? adding : 0, kThreads, 0, out.q);
    return std::tuple(output, out.values, out.indices, out.anchor_loss, out.commitment_loss, out.counts,
                      out.residuals);
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
    const Queue queue(x);
    Tensor grad_x = features_grad<T>(x, need_grad_x);
    Tensor grad_a = empty_same(a), grad_anchors = empty_same(anchors);
    T* to = need_grad_x ? mutable_data<T>(grad_x) : nullptr;
    const auto tiling = Tiling::of<T>(Shape(x), data<T>(grad_output), data<T>(x), to);
    const auto gradients = make_gradients<A>(grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors, indices,
                                             residuals, divisor, grad_a, grad_anchors);
    const bool one_launch = tiling.complete();
    const Tensor sums = empty<A>(x, {one_launch ? 0 : tiling.shape.images * tiling.row_tiles * tiling.columns});
    queue.launch(anchor_backward_kernel<T>,
                 tiling.shape.images * tiling.tiles() + (one_launch ? gradients.anchor_blocks() : 0), kThreads, 0,
                 data<T>(grad_output), data<T>(x), gradients, residual, to, mutable_data<A>(sums), tiling);
    if (!one_launch)
      launch_backward(queue, gradients,
                      GradMap<A>{data<A>(sums), tiling.row_tiles, tiling.columns, tiling.shape.positions});
    return std::tuple(grad_x, grad_a, grad_anchors);
  });
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("quantize_fwd", TORCH_BOX(&quantize_fwd));
  m.impl("quantize_bwd", TORCH_BOX(&quantize_bwd));
  m.impl("anchor_fwd", TORCH_BOX(&anchor_fwd));
  m.impl("anchor_bwd", TORCH_BOX(&anchor_bwd));
}

} // namespace attnkern
