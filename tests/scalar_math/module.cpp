// The scalar mathematics of csrc as a Python module over numpy arrays, for tests/native/test_scalar_math.py; a submodule
// for each precision.

#include <algorithm>
#include <limits>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "pool.h"
#include "quantize.h"
#include "window.h"

namespace py = pybind11;
using namespace attnkern;

namespace {

template <typename T> struct SplitSigmoid {
  T exponent, fraction, complement;
};

template <typename T> SplitSigmoid<T> split(T p) {
  SplitSigmoid<T> parts;
  split_sigmoid(p, parts.exponent, parts.fraction, parts.complement);
  return parts;
}

template <typename T> using Array = py::array_t<T, py::array::c_style>;

// Calls use(frames, row, column, i) for each of (N, K, 5) rectangles with (N, 2) coordinates.
template <typename T, typename Use>
void for_points(const Array<T>& rectangles, const Array<T>& points, int64_t height, int64_t width, T scale, bool aspect,
                const Use& use) {
  auto in = rectangles.template unchecked<3>();
  auto at = points.template unchecked<2>();
  for (py::ssize_t i = 0; i < in.shape(0); ++i) {
    std::vector<Frame<T>> frames;
    for (py::ssize_t k = 0; k < in.shape(1); ++k) {
      T rectangle[kParameters];
      for (int parameter = 0; parameter < kParameters; ++parameter)
        rectangle[parameter] = in(i, k, parameter);
      frames.push_back(make_frame(rectangle, height, width, scale, aspect));
    }
    use(frames, at(i, 0), at(i, 1), i);
  }
}

// (N, 1, 5) rectangles -> (N, 8): exponent, fraction, 1 - f, and the derivatives of log f.
template <Outline kOutline, typename T>
Array<T> windows(const Array<T>& rectangles, const Array<T>& points, int64_t height, int64_t width, T scale,
                 bool aspect) {
  Array<T> result({rectangles.shape(0), py::ssize_t(3 + kParameters)});
  auto out = result.template mutable_unchecked<2>();
  for_points(rectangles, points, height, width, scale, aspect,
             [&](const std::vector<Frame<T>>& frames, T t1, T t2, py::ssize_t i) {
               const Window<T> window = window_at<kOutline>(frames[0], t1, t2);
               T slope[kParameters];
               slopes_at<kOutline>(frames[0], t1, t2, T(0), slope);
               out(i, 0) = window.exponent;
               out(i, 1) = window.fraction;
               out(i, 2) = complement<kOutline>(window);
               for (int k = 0; k < kParameters; ++k)
                 out(i, 3 + k) = slope[k];
             });
  return result;
}

// (N, K, 5) rectangles -> (N, 3 + 5K): exponent, fraction, 1 - f of the unions, and the derivatives of log f.
template <Outline kOutline, typename T>
Array<T> unions(const Array<T>& rectangles, const Array<T>& points, int64_t height, int64_t width, T scale,
                bool aspect) {
  Array<T> result({rectangles.shape(0), py::ssize_t(3 + kParameters * rectangles.shape(1))});
  auto out = result.template mutable_unchecked<2>();
  for_points(rectangles, points, height, width, scale, aspect,
             [&](const std::vector<Frame<T>>& frames, T t1, T t2, py::ssize_t i) {
               Union<T> sum;
               sum.exponent = -std::numeric_limits<T>::infinity();
               for (const Frame<T>& frame : frames)
                 sum.exponent = std::max(sum.exponent, exponent_bound<kOutline>(frame, t1, t2));
               for (const Frame<T>& frame : frames)
                 sum = with_window<kOutline>(frame, t1, t2, sum);
               out(i, 0) = sum.exponent;
               out(i, 1) = sum.fraction;
               out(i, 2) = sum.outside;
               py::ssize_t to = 3;
               for (const Frame<T>& frame : frames) {
                 T slope[kParameters];
                 slopes_at<kOutline>(frame, t1, t2, sum, slope);
                 for (T each : slope)
                   out(i, to++) = each;
               }
             });
  return result;
}

template <typename T> void define(py::module_& module) {
  module.def("exponential", py::vectorize([](T x) { return exponential(x); }));
  module.def("log1p_unit", py::vectorize([](T y) { return log1p_unit(y); }));
  module.def("sigmoid_exponent", py::vectorize([](T p) { return split(p).exponent; }));
  module.def("sigmoid_fraction", py::vectorize([](T p) { return split(p).fraction; }));
  module.def("sigmoid_complement", py::vectorize([](T p) { return split(p).complement; }));
  module.def("coordinate", [](int64_t i, int64_t length) { return coordinate<T>(i, length); });
  module.def("windows_of_rectangles", &windows<Outline::rectangle, T>);
  module.def("windows_of_ellipses", &windows<Outline::ellipse, T>);
  module.def("unions_of_rectangles", &unions<Outline::rectangle, T>);
  module.def("unions_of_ellipses", &unions<Outline::ellipse, T>);
  module.def("round_up", py::vectorize([](double threshold) { return round_up<T>(threshold); }));
  module.def("commitment_grad", py::vectorize([](T a, T value, T grad, T divisor) {
               return commitment_grad(a, value, grad, divisor);
             }));
  module.def("softmax_weight", py::vectorize([](T score, T max) { return softmax_weight(score, max); }));
  module.def("score_grad", py::vectorize([](T attention, T s, T delta, T grad_score) {
               return score_grad(attention, s, delta, grad_score);
             }));
}

} // namespace

PYBIND11_MODULE(scalar_math, module) {
  py::module_ single = module.def_submodule("float32"), wide = module.def_submodule("float64");
  define<float>(single);
  define<double>(wide);
  module.def("threshold", py::vectorize([](double lo, double hi, bool hi_first) { return threshold(lo, hi, hi_first); }));
}
