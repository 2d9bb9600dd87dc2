// The scalar mathematics of csrc as a Python module over numpy arrays, for tests/native/test_scalar_math.py. A function has
// the name of its C++ original; arrays of float64 and float32 choose the precision.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "pool.h"
#include "quantize.h"
#include "window.h"

namespace py = pybind11;
using namespace attnkern;

namespace {

// (N, 5) rectangles, (N, 2) coordinates -> (N, 6): z and its derivatives.
template <typename T>
py::array_t<T> log_windows(const py::array_t<T, py::array::c_style>& rectangles,
                           const py::array_t<T, py::array::c_style>& points, int64_t height, int64_t width, T scale,
                           bool aspect) {
  const py::ssize_t count = rectangles.shape(0);
  py::array_t<T> result({count, py::ssize_t(1 + kParameters)});
  auto out = result.template mutable_unchecked<2>();
  auto in = rectangles.template unchecked<2>();
  auto at = points.template unchecked<2>();
  for (py::ssize_t i = 0; i < count; ++i) {
    T rectangle[kParameters], slope[kParameters];
    for (int k = 0; k < kParameters; ++k)
      rectangle[k] = in(i, k);
    const Frame<T> frame = make_frame(rectangle, height, width, scale, aspect);
    out(i, 0) = log_window(frame, at(i, 0), at(i, 1), slope);
    for (int k = 0; k < kParameters; ++k)
      out(i, 1 + k) = slope[k];
  }
  return result;
}

template <typename T> void define(py::module_& module) {
  module.def("exponential", py::vectorize([](T x) { return exponential(x); }));
  module.def("log1p_unit", py::vectorize([](T y) { return log1p_unit(y); }));
  module.def("log_sigmoid", py::vectorize([](T p) {
               T complement;
               return log_sigmoid(p, complement);
             }));
  module.def("complement", py::vectorize([](T p) {
               T complement;
               log_sigmoid(p, complement);
               return complement;
             }));
  module.def("coordinate", [](int64_t i, int64_t length) { return coordinate<T>(i, length); });
  module.def("log_windows", &log_windows<T>);
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
