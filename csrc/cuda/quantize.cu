// Nearest-anchor quantization on CUDA: which kernels a pass launches.

#include "cuda/quantize_features.cuh"
#include "quantize_operators.h"

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

// A quantization in `blocks` blocks, and its scratch memory; by default chunk_size() determines how many.
template <typename A> struct Launch {
  Tensor sums, numbers, tables;
  Quantization<A> q;

  Launch(const Tensor& a, const Tensor& anchors, int64_t divisor, const Quantized<A>& out, int64_t blocks = 0)
      : q(make(a, anchors, divisor, out, blocks)) {}
  size_t shared_bytes() const { return q.scratch.fits_shared() ? q.scratch.bytes() : 0; }
  // How many blocks add the sums of the others.
  int64_t adding() const { return q.blocks == 1 ? 0 : q.anchor_count + 1; }

private:
  Quantization<A> make(const Tensor& a, const Tensor& anchors, int64_t divisor, const Quantized<A>& out,
                       int64_t blocks) {
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
    return {a, anchors, static_cast<int>(anchor_count), count, chunk, blocks, scratch, out.values,
            mutable_data<int64_t>(out.indices), mutable_data<A>(out.anchor_loss), mutable_data<A>(out.commitment_loss),
            static_cast<A>(divisor), mutable_data<int64_t>(out.counts), mutable_data<A>(out.residuals), partial};
  }
};

template <typename A> Gradients<A> kernel_arguments(const QuantizedGradients& g) {
  return {g.grad_values, g.grad_anchor_loss, g.grad_commitment_loss, g.a, g.anchors,
          static_cast<int>(g.anchors.numel()), g.a.numel(), data<int64_t>(g.indices), data<A>(g.residuals),
          static_cast<A>(g.divisor), g.grad_a, g.grad_anchors};
}

template <typename A> void launch_backward(const Queue& queue, const Gradients<A>& gradients, const GradMap<A>& map) {
  const int64_t blocks = ceil_div(gradients.count, kThreads);
  queue.launch(quantize_backward_kernel<A>, blocks + gradients.anchor_blocks(), kThreads, 0, gradients, map, blocks);
}

template <typename A>
void forward(const Tensor& a, const Tensor& anchors, int64_t divisor, const Quantized<A>& quantized) {
  const Queue queue(a);
  const Launch<A> launch(a, anchors, divisor, quantized);
  queue.launch(quantize_kernel<A>, launch.q.blocks, kThreads, launch.shared_bytes(), launch.q);
  queue.launch(add_blocks_kernel<A>, launch.adding(), kThreads, 0, launch.q);
}

template <typename A> void backward(const QuantizedGradients& gradients) {
  launch_backward(Queue(gradients.a), kernel_arguments<A>(gradients), GradMap<A>());
}

template <typename T>
void forward_features(const Tensor& x, const Tensor& a, const Tensor& anchors, bool residual, int64_t divisor,
                      const Tensor& output, const Quantized<Wide<T>>& quantized) {
  using A = Wide<T>;
  const Queue queue(x);
  const auto tiling = Tiling::of<T>(Shape(x), data<T>(x), data<T>(output));
  const int64_t tiles = tiling.shape.images * tiling.tiles();
  const int64_t owners = tiling.shape.images * ceil_div(tiling.shape.positions, tiling.width);
  const auto quantizing = anchors.numel() > kTileAnchors    ? Quantizing::before
                          : a.numel() <= kFewElements       ? Quantizing::beside
                          : owners <= kMostOwners           ? Quantizing::within
                                                            : Quantizing::before;
  const bool before = quantizing == Quantizing::before, within = quantizing == Quantizing::within;
  const Launch<A> launch(a, anchors, divisor, quantized, within ? owners : 0);
  queue.launch(quantize_kernel<A>, before ? launch.q.blocks : 0, kThreads, launch.shared_bytes(), launch.q);
  queue.launch(anchor_forward_kernel<T>, tiles + (before ? launch.adding() : quantizing == Quantizing::beside),
               kThreads, before ? 0 : launch.shared_bytes(), data<T>(x), launch.q, quantizing, residual,
               mutable_data<T>(output), tiling);
  queue.launch(add_blocks_kernel<A>, within ? launch.adding() : 0, kThreads, 0, launch.q);
}

template <typename T>
void backward_features(const Tensor& grad_output, const Tensor& x, bool residual, const QuantizedGradients& given,
                       T* grad_x) {
  using A = Wide<T>;
  const Queue queue(x);
  const auto tiling = Tiling::of<T>(Shape(x), data<T>(grad_output), data<T>(x), grad_x);
  const int64_t tiles = tiling.shape.images * tiling.tiles();
  const auto gradients = kernel_arguments<A>(given);
  const bool one_launch = tiling.complete();
  const Tensor sums = empty<A>(x, {one_launch ? 0 : tiling.shape.images * tiling.row_tiles * tiling.columns});
  queue.launch(anchor_backward_kernel<T>, tiles + (one_launch ? gradients.anchor_blocks() : 0), kThreads, 0,
               data<T>(grad_output), data<T>(x), gradients, residual, grad_x, mutable_data<A>(sums), tiling);
  if (!one_launch)
    launch_backward(queue, gradients,
                    GradMap<A>{data<A>(sums), tiling.row_tiles, tiling.columns, tiling.shape.positions});
}

} // namespace

ATTNKERN_LIBRARY_IMPL(m) {
  m.impl("quantize_fwd", TORCH_BOX(&quantize_fwd));
  m.impl("quantize_bwd", TORCH_BOX(&quantize_bwd));
  m.impl("anchor_fwd", TORCH_BOX(&anchor_fwd));
  m.impl("anchor_bwd", TORCH_BOX(&anchor_bwd));
}

} // namespace attnkern
