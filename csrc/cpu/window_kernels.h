// The windows' maps, their gradients, and features times a map backward. Included once per instruction set by
// foreach_isa.h, after the types of window.cpp.

#include "cpu/modulate.h"

namespace attnkern::ATTNKERN_ISA {

// Positions that are summed in single precision; these sums are added in double precision.
constexpr int64_t kBlock = 512;

// Calls body(outline, one) with the outline, and whether an image has one window, as constants.
template <typename A, typename Body> void specialised(const Windows<A>& windows, const Body& body) {
  using Rectangle = std::integral_constant<Outline, Outline::rectangle>;
  using Ellipse = std::integral_constant<Outline, Outline::ellipse>;
  const auto outlined = [&](auto outline) {
    windows.count == 1 ? body(outline, std::true_type{}) : body(outline, std::false_type{});
  };
  windows.ellipse ? outlined(Ellipse{}) : outlined(Rectangle{});
}

// The unions of the windows at positions; not used where an image has one window.
template <typename A> struct Unions {
  std::vector<A> exponent, fraction, outside;

  explicit Unions(int64_t positions) : exponent(positions), fraction(positions), outside(positions) {}
};

// The windows of an image at the positions of a block. Loops read copies on the stack, so that the compiler knows that
// their stores do not change them.
template <Outline kOutline, bool kOne, typename A> struct Block {
  const std::vector<Frame<A>>& frames;
  const A *rows, *columns;
  int64_t length;
  A *exponent, *fraction, *outside; // of the unions

  // `at` is the block's first position in the unions.
  Block(const Windows<A>& windows, const std::vector<Frame<A>>& frames, Unions<A>& unions, int64_t begin, int64_t at)
      : frames(frames), rows(windows.rows.data() + begin), columns(windows.columns.data() + begin),
        length(std::min(kBlock, windows.positions() - begin)), exponent(unions.exponent.data() + at),
        fraction(unions.fraction.data() + at), outside(unions.outside.data() + at) {}

  // Computes the unions, which all others need.
  void unite() const {
    if constexpr (kOne)
      return;
    const int64_t count = length;
    const A *row = rows, *column = columns;
    A *exponents = exponent, *fractions = fraction, *outsides = outside;
    std::fill_n(exponents, count, -std::numeric_limits<A>::infinity());
    std::fill_n(fractions, count, A(0));
    std::fill_n(outsides, count, A(1));
    for (const Frame<A>& each : frames) {
      const Frame<A> frame = each;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A bound = exponent_bound<kOutline>(frame, row[i], column[i]);
        exponents[i] = bound > exponents[i] ? bound : exponents[i];
      }
    }
    for (const Frame<A>& each : frames) {
      const Frame<A> frame = each;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const auto sum = with_window<kOutline>(frame, row[i], column[i], {exponents[i], fractions[i], outsides[i]});
        fractions[i] = sum.fraction, outsides[i] = sum.outside;
      }
    }
  }
  // The largest exponent, or `max` if that is larger.
  A largest(A max) const {
    const int64_t count = length;
    if constexpr (kOne) {
      const Frame<A> frame = frames[0];
      const A *row = rows, *column = columns;
#pragma omp simd reduction(max : max)
      for (int64_t i = 0; i < count; ++i) {
        const A found = exponent_bound<kOutline>(frame, row[i], column[i]);
        max = found > max ? found : max;
      }
    } else {
      const A* exponents = exponent;
#pragma omp simd reduction(max : max)
      for (int64_t i = 0; i < count; ++i)
        max = exponents[i] > max ? exponents[i] : max;
    }
    return max;
  }
  // to[i] = factor · f · e^-max
  void values(A factor, A max, A* to) const {
    const int64_t count = length;
    if constexpr (kOne) {
      const Frame<A> frame = frames[0];
      const A *row = rows, *column = columns;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const Window<A> window = window_at<kOutline>(frame, row[i], column[i]);
        to[i] = factor * window.fraction * exponential(window.exponent - max);
      }
    } else {
      const A *exponents = exponent, *fractions = fraction;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        to[i] = factor * fractions[i] * exponential(exponents[i] - max);
    }
  }
  // to[i] = f, at most 1 in spite of rounding
  void plain(A* to) const {
    values(A(1), A(0), to);
    const int64_t count = length;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      to[i] = to[i] > A(1) ? A(1) : to[i];
  }
  // ∂log f/∂β at the i-th position, for the parameters of all windows.
  void slopes(int64_t i, A* to) const {
    for (const Frame<A>& frame : frames) {
      A slope[kParameters];
      if constexpr (kOne)
        slopes_at<kOutline>(frame, rows[i], columns[i], A(0), slope);
      else
        slopes_at<kOutline>(frame, rows[i], columns[i], {exponent[i], fraction[i], outside[i]}, slope);
      to = std::copy_n(slope, kParameters, to);
    }
  }
  // Adds Σ weight[i]·(∂log f/∂β - centre) to `total`, for the parameters of all windows.
  void add_slopes(const A* weight, const A* centre, double* total) const {
    const int64_t count = length;
    const A *row = rows, *column = columns;
    const A *exponents = exponent, *fractions = fraction, *outsides = outside;
    for (const Frame<A>& each : frames) {
      const Frame<A> frame = each;
      const A c0 = centre[0], c1 = centre[1], c2 = centre[2], c3 = centre[3], c4 = centre[4];
      A s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4)
      for (int64_t i = 0; i < count; ++i) {
        A slope[kParameters];
        if constexpr (kOne)
          slopes_at<kOutline>(frame, row[i], column[i], A(0), slope);
        else
          slopes_at<kOutline>(frame, row[i], column[i], {exponents[i], fractions[i], outsides[i]}, slope);
        s0 += weight[i] * (slope[0] - c0), s1 += weight[i] * (slope[1] - c1), s2 += weight[i] * (slope[2] - c2);
        s3 += weight[i] * (slope[3] - c3), s4 += weight[i] * (slope[4] - c4);
      }
      total[0] += s0, total[1] += s1, total[2] += s2, total[3] += s3, total[4] += s4;
      centre += kParameters, total += kParameters;
    }
  }
};

// Calls use(block, begin) for the blocks of an image, whose unions begin at `at`.
template <Outline kOutline, bool kOne, typename A, typename Use>
void for_blocks(const Windows<A>& windows, const std::vector<Frame<A>>& frames, Unions<A>& unions, int64_t at,
                const Use& use) {
  for (int64_t begin = 0; begin < windows.positions(); begin += kBlock)
    use(Block<kOutline, kOne, A>(windows, frames, unions, begin, at + begin), begin);
}

// The maps, and with rescale the statistics for the backward pass. The means among these are not needed here.
template <typename A> void window_maps(const Windows<A>& windows, A* map, A* stats) {
  const int64_t positions = windows.positions();
  specialised(windows, [&](auto outline, auto one) {
    parallel(windows.images(), 16 * positions * windows.count, [&](int64_t image) {
      const auto frames = windows.frames(image);
      A* to = map + image * positions;
      Unions<A> unions(one() ? 0 : positions);
      const auto blocks = [&](const auto& use) { for_blocks<outline(), one()>(windows, frames, unions, 0, use); };
      A max = -std::numeric_limits<A>::infinity();
      blocks([&](const auto& block, int64_t begin) {
        block.unite();
        if (windows.rescale)
          max = block.largest(max);
        else
          block.plain(to + begin);
      });
      if (!windows.rescale)
        return;
      double total = 0;
      blocks([&](const auto& block, int64_t begin) {
        block.values(A(1), max, to + begin);
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < block.length; ++i)
          sum += to[begin + i];
        total += sum;
      });
      const A factor = static_cast<A>(positions / total);
#pragma omp simd
      for (int64_t i = 0; i < positions; ++i)
        to[i] *= factor;
      A* stat = stats + image * stats_of(windows.count);
      std::fill_n(stat, stats_of(windows.count), A(0));
      stat[0] = max;
      stat[1] = static_cast<A>(total);
    });
  });
}

// The maps, recomputed from the statistics of the forward pass, and the unions of all images.
template <typename A> Unions<A> window_maps_again(const Windows<A>& windows, const A* stats, A* map) {
  const int64_t positions = windows.positions();
  Unions<A> unions(windows.count == 1 ? 0 : windows.images() * positions);
  specialised(windows, [&](auto outline, auto one) {
    parallel(windows.images(), 16 * positions * windows.count, [&](int64_t image) {
      const auto frames = windows.frames(image);
      const A* stat = stats + image * stats_of(windows.count);
      A* to = map + image * positions;
      const int64_t at = one() ? 0 : image * positions;
      for_blocks<outline(), one()>(windows, frames, unions, at, [&](const auto& block, int64_t begin) {
        block.unite();
        if (windows.rescale)
          block.values(positions / stat[1], stat[0], to + begin);
        else
          block.plain(to + begin);
      });
    });
  });
  return unions;
}

// The first position of the largest number; 0 if all are NaN.
template <typename A> int64_t place_of_largest(const A* f, int64_t positions) {
  A max = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < positions; ++i)
    max = f[i] > max ? f[i] : max;
  const int64_t place = std::find(f, f + positions, max) - f;
  return place < positions ? place : 0;
}

// dβ = Σ G·f·∂log f, or with rescale HW·Σ (G - Σ π G)·π·(∂log f - c) for any c: both are centred, so that neither a
// large mean of G nor the steep slopes of a thin window cause cancellation. c are the slopes where f is largest.
// gather(image) is the image's G.
template <typename A, typename Gather>
void window_gradients(const Windows<A>& windows, Unions<A>& unions, const A* map, const Gather& gather, A* gradients) {
  const int64_t positions = windows.positions(), parameters = windows.count * kParameters;
  specialised(windows, [&](auto outline, auto one) {
    parallel(windows.images(), 16 * positions * windows.count, [&](int64_t image) {
      const auto gathered = gather(image);
      const A *g = &gathered[0], *f = map + image * positions;
      A centre = 0; // Σ π G
      if (windows.rescale) {
        // The second sum removes the rounding error of the first, which steep slopes would multiply.
        for (int times = 0; times < 2; ++times) {
          double total = 0;
          for (int64_t begin = 0; begin < positions; begin += kBlock) {
            const int64_t end = std::min(begin + kBlock, positions);
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < end; ++i)
              sum += (g[i] - centre) * f[i];
            total += sum;
          }
          centre += static_cast<A>(total / positions);
        }
      }
      const auto frames = windows.frames(image);
      const int64_t at = one() ? 0 : image * positions;
      std::vector<A> slopes(parameters);
      if (windows.rescale) {
        const int64_t place = place_of_largest(f, positions);
        Block<outline(), one(), A>(windows, frames, unions, place, at + place).slopes(0, slopes.data());
      }
      std::vector<double> total(parameters);
      for_blocks<outline(), one()>(windows, frames, unions, at, [&](const auto& block, int64_t begin) {
        A weight[kBlock];
#pragma omp simd
        for (int64_t i = 0; i < block.length; ++i)
          weight[i] = (g[begin + i] - centre) * f[begin + i];
        block.add_slopes(weight, slopes.data(), total.data());
      });
      for (int64_t k = 0; k < parameters; ++k)
        gradients[image * parameters + k] = static_cast<A>(total[k]);
    });
  });
}

template <typename A> void window_map_gradients(const Windows<A>& windows, const A* stats, const A* g, A* gradients) {
  const int64_t positions = windows.positions();
  std::vector<A> map(windows.images() * positions);
  auto unions = window_maps_again(windows, stats, map.data());
  window_gradients(windows, unions, map.data(), [&](int64_t image) { return g + image * positions; }, gradients);
}

template <typename T>
void window_backward(const Windows<Wide<T>>& windows, const Shape& shape, const T* dy, const Wide<T>* grad_map,
                     const T* x, const Wide<T>* stats, bool residual, T* dx, Wide<T>* gradients) {
  using A = Wide<T>;
  std::vector<A> map(shape.images * shape.positions), partial(map.size() * partial_sums(shape));
  auto unions = window_maps_again(windows, stats, map.data());
  modulate_backward(shape, dy, x, map.data(), residual, dx, partial.data());
  window_gradients(
      windows, unions, map.data(), [&](int64_t image) { return add_partials(shape, partial.data(), image, grad_map); },
      gradients);
}

} // namespace attnkern::ATTNKERN_ISA
