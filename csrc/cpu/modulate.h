// Features times a map, forward and backward: what window_attention and anchor_attention have in common.
// Included once per instruction set.

#include "cpu/simd.h"

namespace attnkern::ATTNKERN_ISA {

// Channels of one row of work where positions are innermost: several short rows are taken as one long one against a
// repeated map, so that a 7x7 map fills vectors as well as a large one.
inline int64_t channels_per_row(const Shape& shape) {
  return std::clamp<int64_t>((256 + shape.positions - 1) / shape.positions, 1, std::max<int64_t>(1, shape.channels));
}

// Rows of one work item. From the shape of an image only: sums over channels are formed per item and then in order.
inline int64_t rows_per_item(const Shape& shape) {
  return std::max<int64_t>(1, 65536 / (channels_per_row(shape) * shape.positions));
}

inline int64_t items_per_image(const Shape& shape) {
  const int64_t channels = channels_per_row(shape) * rows_per_item(shape);
  return shape.channels_inner ? 1 : (shape.channels + channels - 1) / channels;
}

// Runs row(item, offset, length) for each long row of an item; begin(item, image) before, end(item, image) after.
template <typename Begin, typename Row, typename End>
void for_rows(const Shape& shape, const Begin& begin, const Row& row, const End& end) {
  const int64_t items = items_per_image(shape), channels_row = channels_per_row(shape);
  const int64_t channels_item = channels_row * rows_per_item(shape);
  parallel(shape.images * items, channels_item * shape.positions, [&](int64_t item) {
    const int64_t image = item / items, first = item % items * channels_item;
    const int64_t last = std::min(shape.channels, first + channels_item);
    auto state = begin(image, channels_row);
    for (int64_t c = first; c < last; c += channels_row)
      row(state, (image * shape.channels + c) * shape.positions,
          std::min(channels_row, last - c) * shape.positions);
    end(state, item, channels_row);
  });
}

// The map of an image plus the residual's 1, `times` over.
template <typename A>
std::vector<A> repeated_factor(const A* map, int64_t positions, A residual, int64_t times) {
  std::vector<A> factor(positions * times);
  for (int64_t k = 0; k < times; ++k)
    for (int64_t p = 0; p < positions; ++p)
      factor[k * positions + p] = map[p] + residual;
  return factor;
}

// y = (map + residual)·x.
template <typename T> void modulate(const Shape& shape, const T* x, const Wide<T>* map, bool residual, T* y) {
  using A = Wide<T>;
  const A one = residual ? A(1) : A(0);
  const bool stream = shape.streams<T>();
  if (shape.channels_inner) {
    parallel(shape.images * shape.positions, shape.channels, [&](int64_t i) {
      const A factor = map[i] + one;
      const T* from = x + i * shape.channels;
      T* to = y + i * shape.channels;
      write_lanes(shape.channels, to, stream, [=](int64_t c) { return narrow<T>(factor * widen(from[c])); });
    });
    return;
  }
  for_rows(
      shape,
      [&](int64_t image, int64_t times) {
        return repeated_factor(map + image * shape.positions, shape.positions, one, times);
      },
      [&](const std::vector<A>& state, int64_t offset, int64_t length) {
        const A* factor = state.data();
        const T* from = x + offset;
        T* to = y + offset;
        write_lanes(length, to, stream, [=](int64_t i) { return narrow<T>(factor[i] * widen(from[i])); });
      },
      [](const auto&, int64_t, int64_t) {});
}

// dx = (map + residual)·dy, unless dx is null, and G = Σ_c dy·x as one partial sum (positions) per item: (N, items,
// positions), to be added in order.
template <typename T>
void modulate_backward(const Shape& shape, const T* dy, const T* x, const Wide<T>* map, bool residual, T* dx,
                       Wide<T>* partial) {
  using A = Wide<T>;
  const A one = residual ? A(1) : A(0);
  const bool stream = shape.streams<T>();
  if (shape.channels_inner) {
    parallel(shape.images * shape.positions, shape.channels, [&](int64_t i) {
      const A factor = map[i] + one;
      const T *grad = dy + i * shape.channels, *from = x + i * shape.channels;
      partial[i] = sum_lanes<A>(shape.channels, [=](int64_t c) { return widen(grad[c]) * widen(from[c]); });
      if (dx == nullptr)
        return;
      T* to = dx + i * shape.channels;
      write_lanes(shape.channels, to, stream, [=](int64_t c) { return narrow<T>(factor * widen(grad[c])); });
    });
    return;
  }
  struct State {
    std::vector<A> factor, sum;
  };
  for_rows(
      shape,
      [&](int64_t image, int64_t times) {
        return State{repeated_factor(map + image * shape.positions, shape.positions, one, times),
                     std::vector<A>(shape.positions * times)};
      },
      [&](State& state, int64_t offset, int64_t length) {
        const A* factor = state.factor.data();
        A* sum = state.sum.data();
        const T *grad = dy + offset, *from = x + offset;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i)
          sum[i] += widen(grad[i]) * widen(from[i]);
        if (dx != nullptr)
          write_lanes(length, dx + offset, stream, [=](int64_t i) { return narrow<T>(factor[i] * widen(grad[i])); });
      },
      [&](const State& state, int64_t item, int64_t times) {
        for (int64_t p = 0; p < shape.positions; ++p) {
          A sum = state.sum[p];
          for (int64_t k = 1; k < times; ++k)
            sum += state.sum[k * shape.positions + p];
          partial[item * shape.positions + p] = sum;
        }
      });
}

// G of one image: its items' partial sums in order, plus the gradient that reached the map itself.
template <typename A>
std::vector<A> add_partials(const Shape& shape, const A* partial, int64_t image, const A* grad_map) {
  const int64_t items = items_per_image(shape);
  std::vector<A> sum(shape.positions);
  if (grad_map != nullptr)
    std::copy_n(grad_map + image * shape.positions, shape.positions, sum.begin());
  for (int64_t item = 0; item < items; ++item)
    for (int64_t p = 0; p < shape.positions; ++p)
      sum[p] += partial[(image * items + item) * shape.positions + p];
  return sum;
}

} // namespace attnkern::ATTNKERN_ISA
