// The kernels of anchor attention, which multiply features by the map in tiles, and the gradients of the elements and
// of the anchors.
#pragma once

#include "cuda/quantize_elements.cuh"

namespace attnkern {

// The map of a tile from the indices of its elements: the anchors' values, NaN if the element or any anchor is NaN.
template <typename T>
ATTNKERN_DEVICE void fill_map(const Tiling& tiling, const Tile& tile, const Companion& a, const Companion& anchors,
                              int anchor_count, const int64_t* indices) {
  using A = Wide<T>;
  A* map = shared<MapTile<T>>().of;
  const bool poisoned = any_nan(anchors, anchor_count);
  for (int i = threadIdx.x; i < tile.width; i += kThreads) {
    const int64_t at = tile.image * tiling.shape.positions + tile.position(tiling, i);
    const A element = a.load<A>(at);
    const bool is_nan = poisoned || element != element;
    map[i] = is_nan ? A(NAN) : anchors.load<A>(kept_within(indices[at], anchor_count));
  }
  __syncthreads();
}

// Which blocks quantize the elements in the forward pass.
enum class Quantizing {
  before, // those of an earlier launch: there are too many anchors for every tile to sort
  beside, // one more block of the same launch, if there are few elements; the tiles only look up their values
  within, // the tiles: each writes the outputs that it owns, and the next launch adds the sums
};

// The map of a tile from the anchors. If `within`, the elements that the tile owns are quantized.
template <typename T>
ATTNKERN_DEVICE void look_up_map(const Quantization<Wide<T>>& q, bool within, const Tiling& tiling, const Tile& tile) {
  using A = Wide<T>;
  A* map = shared<MapTile<T>>().of;
  const int64_t remaining = tiling.shape.positions - tile.column;
  const bool owns = within && tile.row == 0 && remaining > 0;
  const int owned = owns ? static_cast<int>(std::min<int64_t>(remaining, tile.width)) : 0;
  const auto place = [&](int i) { return tile.image * tiling.shape.positions + tile.position(tiling, i); };
  const auto element_at = [&](int i) { return i < tile.width ? q.a.template load<A>(place(i)) : A(0); };
  A next = element_at(threadIdx.x); // loaded while the table is filled
  Quantizer<A> quantizer(q, dynamic_shared<char>());
  for (int first = 0; first < tile.width; first += kThreads) {
    const int i = first + threadIdx.x;
    const A element = next;
    next = element_at(i + kThreads);
    A value = 0;
    int index;
    if (first < owned)
      value = quantizer.take(place(std::min(i, tile.width - 1)), element, i < owned);
    if (i >= owned)
      value = quantizer.value(element, index);
    if (i < tile.width)
      map[i] = value;
  }
  if (owned > 0)
    quantizer.finish(tile.image * ceil_div(tiling.shape.positions, tiling.width) + tile.in_image);
  else
    __syncthreads();
}

// Features times the map. Blocks after the tiles quantize the elements (beside) or add the sums of quantize_kernel
// (before).
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    anchor_forward_kernel(const T* x, Quantization<Wide<T>> q, Quantizing quantizing, bool residual, T* output,
                          Tiling tiling) {
  const int64_t tiles = tiling.shape.images * tiling.tiles(), extra = block_index() - tiles;
  if (extra >= 0) {
    if (quantizing == Quantizing::before)
      add_blocks(q, extra);
    else if (quantizing == Quantizing::beside && extra == 0)
      quantize_chunk(q, 0, dynamic_shared<char>());
    return;
  }
  const Tile tile(tiling, block_index());
  Walk<T, 1> walk(tiling, tile, {x});
  if (quantizing == Quantizing::before)
    fill_map<T>(tiling, tile, q.a, q.anchors, q.anchor_count, q.indices);
  else
    look_up_map<T>(q, quantizing == Quantizing::within, tiling, tile);
  modulate(tiling, walk, Wide<T>(residual), output);
}

// The gradients of a and of the anchors.
template <typename A> struct Gradients {
  Companion grad_values, grad_anchor_loss, grad_commitment_loss, a, anchors;
  int anchor_count;
  int64_t count;
  const int64_t* indices;
  const A* residuals;
  A divisor;
  MutableCompanion grad_a, grad_anchors;

  ATTNKERN_DEVICE A grad_loss() const {
    return grad_commitment_loss.pointer == nullptr ? A(0) : grad_commitment_loss.load<A>(0);
  }
  // Writes the gradient of an element: that of the map, of the values and of the commitment loss.
  ATTNKERN_DEVICE void write_element(int64_t i, A grad_map, A grad_loss, bool poisoned) const {
    A grad = grad_map;
    if (grad_values.pointer != nullptr)
      grad += grad_values.load<A>(i);
    if (grad_loss != A(0)) {
      const A value = poisoned ? A(NAN) : anchors.load<A>(kept_within(indices[i], anchor_count));
      grad += commitment_grad(a.load<A>(i), value, grad_loss, divisor);
    }
    grad_a.store(i, grad);
  }
  ATTNKERN_DEVICE void write_anchors(int64_t block) const {
    const int64_t k = block * kThreads + threadIdx.x;
    if (k < anchor_count)
      grad_anchors.store(k, grad_anchor_loss.pointer == nullptr
                                ? A(0)
                                : A(2) * (grad_anchor_loss.load<A>(0) / divisor) * residuals[k]);
  }
  int64_t anchor_blocks() const { return ceil_div(anchor_count, kThreads); }
};

// The gradient of the features, and Σ dy·x. If tiles have all channels of their positions, they also compute the
// gradients of a, and blocks after the tiles compute those of the anchors. Otherwise the sums go to `grad_map`.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    anchor_backward_kernel(const T* grad_output, const T* x, Gradients<Wide<T>> gradients, bool residual, T* grad_x,
                           Wide<T>* grad_map, Tiling tiling) {
  using A = Wide<T>;
  const int64_t extra = block_index() - tiling.shape.images * tiling.tiles();
  if (extra >= 0) {
    gradients.write_anchors(extra);
    return;
  }
  const Tile tile(tiling, block_index());
  Walk<T, 2> walk(tiling, tile, {grad_output, x});
  const Companion &a = gradients.a, &anchors = gradients.anchors;
  fill_map<T>(tiling, tile, a, anchors, gradients.anchor_count, gradients.indices);
  modulate_backward(tiling, tile, walk, Wide<T>(residual), grad_x);
  const A* sums = shared<SumTile<T>>().of;
  if (tiling.complete()) {
    const A grad_loss = gradients.grad_loss();
    const bool poisoned = grad_loss != A(0) && any_nan(anchors, gradients.anchor_count);
    const int64_t positions = tiling.shape.positions, first = tile.image * positions + tile.column;
    for (int i = threadIdx.x; i < std::min<int64_t>(tile.width, positions); i += kThreads) {
      A sum = 0;
      for (int64_t column = i; column < tile.width; column += positions)
        sum += sums[column];
      gradients.write_element(first + i, sum, grad_loss, poisoned);
    }
    return;
  }
  store_sums<T>(tiling, tile, grad_map);
}

// The gradients of a, one per thread; the blocks after these compute the gradients of the anchors.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    quantize_backward_kernel(Gradients<A> gradients, GradMap<A> grad_map, int64_t blocks) {
  const int64_t block = block_index();
  if (block >= blocks) {
    gradients.write_anchors(block - blocks);
    return;
  }
  const A grad_loss = gradients.grad_loss();
  const bool poisoned = grad_loss != A(0) && any_nan(gradients.anchors, gradients.anchor_count);
  if (const int64_t i = block * kThreads + threadIdx.x; i < gradients.count)
    gradients.write_element(i, grad_map.pointer == nullptr ? A(0) : grad_map.at(i), grad_loss, poisoned);
}

} // namespace attnkern
