// Prints what the scalar mathematics of csrc computes for fixed arguments, a name and a number to a line, so that
// processors can be compared: tests/native/test_aarch64.py.

#include <cstdio>
#include <initializer_list>

#include "cpu/common.h"
#include "pool.h"
#include "quantize.h"
#include "window.h"

using namespace attnkern;

namespace {

void print(const char* type, const char* name, double value) { std::printf("%s%s %a\n", type, name, value); }
void print_exact(const char* name, double value) { print("exact ", name, value); }

template <typename T> constexpr const char* kType = sizeof(T) == 4 ? "float32 " : "float64 ";

template <typename T> void elementary() {
  for (int i = -1000; i <= 1000; ++i) {
    const T x = T(i) / T(9);
    T exponent, fraction, complement;
    split_sigmoid(x, exponent, fraction, complement);
    print(kType<T>, "exponential", exponential(x));
    print(kType<T>, "sigmoid exponent", exponent);
    print(kType<T>, "sigmoid fraction", fraction);
    print(kType<T>, "sigmoid complement", complement);
    print(kType<T>, "log1p_unit", log1p_unit(T(i + 1000) / T(2000)));
    print(kType<T>, "softmax_weight", softmax_weight(x, T(112)));
  }
}

template <Outline kOutline, typename T> void windows() {
  for (bool aspect : {false, true})
    for (int k = 0; k < 40; ++k) {
      const T first[kParameters] = {T(k) / 40, T(40 - k) / 40, T(k + 1) / 50, T(-0.3), T(k - 20) / 12};
      const T second[kParameters] = {T(40 - k) / 50, T(k) / 30, T(0.2), T(41 - k) / 60, T(k) / 9};
      const Frame<T> frames[] = {make_frame(first, 7, 11, T(6), aspect), make_frame(second, 7, 11, T(6), aspect)};
      for (int row = 0; row < 7; ++row)
        for (int column = 0; column < 11; ++column) {
          const T t1 = coordinate<T>(row, 7), t2 = coordinate<T>(column, 11);
          Union<T> sum;
          sum.exponent = T(0);
          for (const Frame<T>& frame : frames) {
            T slope[kParameters];
            print(kType<T>, "window", slopes_at<kOutline>(frame, t1, t2, T(0), slope));
            for (T each : slope)
              print(kType<T>, "slope", each);
            sum = with_window<kOutline>(frame, t1, t2, sum);
          }
          print(kType<T>, "union", sum.fraction);
          print(kType<T>, "outside", sum.outside);
        }
    }
}

// What has one right answer; the names say so.
void exact() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    print_exact("widen half", widen(Half{static_cast<uint16_t>(bits)}));
    print_exact("widen bfloat16", widen(BFloat16{static_cast<uint16_t>(bits)}));
  }
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 65521) {
    const float x = bit_cast<float>(static_cast<uint32_t>(bits));
    print_exact("narrow half", narrow<Half>(x).bits);
    print_exact("narrow bfloat16", narrow<BFloat16>(x).bits);
    if (x == x)
      for (bool first : {false, true}) {
        const double between = threshold(x, x + std::fabs(double(x)) * 0x1.234567p-20 + 0x1p-149, first);
        print_exact("threshold", between);
        print_exact("round_up", round_up<float>(between));
      }
  }
  for (int64_t length : {1, 2, 3, 1000})
    for (int64_t i = 0; i < length; ++i)
      print_exact("coordinate", coordinate<float>(i, length));
}

} // namespace

int main() {
  elementary<float>();
  elementary<double>();
  windows<Outline::rectangle, float>();
  windows<Outline::rectangle, double>();
  windows<Outline::ellipse, float>();
  windows<Outline::ellipse, double>();
  exact();
}
