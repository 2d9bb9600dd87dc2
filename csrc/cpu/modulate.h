// Features times a map, forward and backward: the part that window_attention and anchor_attention share.
// Included once per instruction set.

#include "cpu/simd.h"

namespace attnkern::ATTNKERN_ISA {

// How features with positions innermost are divided into work items. This depends on the shape of an image only,
// because sums over channels are computed per item and then added in order.
struct Items {
  int64_t times;    // channels of one row. Short rows are joined into a long one and the map is repeated, so that a
                    // 7x7 map fills vectors as well as a large one
  int64_t length;   // positions of a row. A large map is split, so that an item's part of it stays in the cache
  int64_t tiles;    // of an image's positions
  int64_t channels; // of an item
  int64_t blocks;   // of an image's channels

  explicit Items(const Shape& shape) {
    constexpr int64_t kElements = 65536, kShortest = 256, kLongest = 4096;
    const int64_t all = std::max<int64_t>(1, shape.channels);
    times = std::clamp<int64_t>((kShortest + shape.positions - 1) / shape.positions, 1, all);
    length = shape.positions <= kLongest ? shape.positions : kLongest / 2;
    tiles = (shape.positions + length - 1) / length;
    channels = times * std::max<int64_t>(1, kElements / (times * length));
    blocks = (shape.channels + channels - 1) / channels;
  }
};

// Number of partial sums over channels per position.
inline int64_t partial_sums(const Shape& shape) { return shape.channels_inner ? 1 : Items(shape).blocks; }

// An item: some channels of an image at some positions.
struct Item {
  int64_t image, block, first, length; // positions
};

// Calls state = begin(item), row(state, offset, length) for each joined row, and end(state, item) for each item.
template <typename Begin, typename Row, typename End>
void for_rows(const Shape& shape, const Items& items, const Begin& begin, const Row& row, const End& end) {
  const int64_t per_image = items.blocks * items.tiles;
  parallel(shape.images * per_image, items.channels * items.length, [&](int64_t i) {
    const int64_t tile = i % items.tiles, first = tile * items.length;
    const Item item{i / per_image, i / items.tiles % items.blocks, first,
                    std::min(items.length, shape.positions - first)};
    const int64_t last = std::min(shape.channels, (item.block + 1) * items.channels);
    auto state = begin(item);
    for (int64_t c = item.block * items.channels; c < last; c += items.times)
      row(state, (item.image * shape.channels + c) * shape.positions + first,
          std::min(items.times, last - c) * item.length);
    end(state, item);
  });
}

// An item's part of the map, plus 1 for the residual, repeated for each channel of a row.
template <typename A>
std::vector<A> repeated_factor(const Shape& shape, const Items& items, const Item& item, const A* map, A residual) {
  std::vector<A> factor(item.length * items.times);
  const A* from = map + item.image * shape.positions + item.first;
  for (int64_t k = 0; k < items.times; ++k)
    for (int64_t p = 0; p < item.length; ++p)
      factor[k * item.length + p] = from[p] + residual;
  return factor;
}

// y = (map + residual)·x.
template <typename T> void modulate(const Shape& shape, const T* x, const Wide<T>* map, bool residual, T* y) {
  using A = Wide<T>;
  const A one = residual ? A(1) : A(0);
  const bool stream = streams<T>(shape);
  if (shape.channels_inner) {
    parallel(shape.images * shape.positions, shape.channels, [&](int64_t i) {
      const A factor = map[i] + one;
      const T* from = x + i * shape.channels;
      T* to = y + i * shape.channels;
      write_lanes(shape.channels, to, stream, [=](int64_t c) { return narrow<T>(factor * widen(from[c])); });
    });
    return;
  }
  const Items items(shape);
  for_rows(
      shape, items, [&](const Item& item) { return repeated_factor(shape, items, item, map, one); },
      [&](const std::vector<A>& state, int64_t offset, int64_t length) {
        const A* factor = state.data();
        const T* from = x + offset;
        T* to = y + offset;
        write_lanes(length, to, stream, [=](int64_t i) { return narrow<T>(factor[i] * widen(from[i])); });
      },
      [](const auto&, const Item&) {});
}

// dx = (map + residual)·dy, unless dx is null, and G = Σ_c dy·x as partial sums, (N, partial_sums, positions), to be
// added in order.
template <typename T>
void modulate_backward(const Shape& shape, const T* dy, const T* x, const Wide<T>* map, bool residual, T* dx,
                       Wide<T>* partial) {
  using A = Wide<T>;
  const A one = residual ? A(1) : A(0);
  const bool stream = streams<T>(shape);
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
  const Items items(shape);
  for_rows(
      shape, items,
      [&](const Item& item) {
        return State{repeated_factor(shape, items, item, map, one), std::vector<A>(item.length * items.times)};
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
      [&](const State& state, const Item& item) {
        A* to = partial + (item.image * items.blocks + item.block) * shape.positions + item.first;
        for (int64_t p = 0; p < item.length; ++p) {
          A sum = state.sum[p];
          for (int64_t k = 1; k < items.times; ++k)
            sum += state.sum[k * item.length + p];
          to[p] = sum;
        }
      });
}

// G of one image: its partial sums in order, plus the gradient of the map output.
template <typename A>
std::vector<A> add_partials(const Shape& shape, const A* partial, int64_t image, const A* grad_map) {
  const int64_t parts = partial_sums(shape);
  std::vector<A> sum(shape.positions);
  if (grad_map != nullptr)
    std::copy_n(grad_map + image * shape.positions, shape.positions, sum.begin());
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t p = 0; p < shape.positions; ++p)
      sum[p] += partial[(image * parts + part) * shape.positions + p];
  return sum;
}

} // namespace attnkern::ATTNKERN_ISA
