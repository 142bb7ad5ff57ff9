// The plain cases of pk.lora_linear and pk.lora_mlp, called from Python in one step: `torch.ops` reads
// every list through boxed values, and checking the arguments in Python costs as much again. For one
// token that would be longer than the layer's arithmetic.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace perl_kernels {
namespace {

using at::Tensor;
using at::TensorList;

// The tensors that `given` is, one or a list or tuple of them; none where it is anything else.
std::vector<Tensor> tensors_of(PyObject* given) {
  if (THPVariable_CheckExact(given)) return {THPVariable_Unpack(given)};
  std::vector<Tensor> found;
  if (!PyList_CheckExact(given) && !PyTuple_CheckExact(given)) return found;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(given); ++i) {
    PyObject* one = PySequence_Fast_GET_ITEM(given, i);
    if (!THPVariable_CheckExact(one)) return {};
    found.push_back(THPVariable_Unpack(one));
  }
  return found;
}

// One number for all of `count`, or a list or tuple of them; likewise.
std::vector<double> numbers_of(PyObject* given, size_t count) {
  if (PyFloat_CheckExact(given)) return std::vector<double>(count, PyFloat_AS_DOUBLE(given));
  std::vector<double> found;
  if (!PyList_CheckExact(given) && !PyTuple_CheckExact(given)) return found;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(given); ++i) {
    PyObject* one = PySequence_Fast_GET_ITEM(given, i);
    if (!PyFloat_CheckExact(one)) return {};
    found.push_back(PyFloat_AS_DOUBLE(one));
  }
  return found;
}

bool is_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
      dtype == at::kDouble;
}

// Whether Python's checks (perl_kernels/_arguments.py) would leave this projection of `features`
// of that type as it is.
bool fits(
    at::ScalarType dtype, int64_t features, const Tensor& weight, const Tensor* bias,
    const Tensor& a, const Tensor& b) {
  auto of_adapter = [&](const Tensor& t) {
    return t.dim() == 2 && t.device().is_cpu() &&
        (t.scalar_type() == dtype || (t.scalar_type() == at::kFloat && dtype != at::kDouble));
  };
  return of_adapter(a) && of_adapter(b) && weight.dim() == 2 && weight.device().is_cpu() &&
      weight.scalar_type() == dtype && !weight.requires_grad() && a.size(0) > 0 &&
      weight.size(0) == b.size(0) && a.size(0) == b.size(1) &&
      features == weight.size(1) && features == a.size(1) &&
      (bias == nullptr || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                           bias->scalar_type() == dtype && bias->device().is_cpu()));
}

// Whether x is nothing but a tensor, and nobody listens or casts.
bool is_plain(PyObject* x) {
  return THPVariable_CheckExact(x) && !at::impl::torch_function_mode_enabled() &&
      !at::autocast::is_autocast_enabled(at::kCPU);
}

// y, a tensor or a tuple of them, or None where the arguments want checking or casting first.
PyObject* lora_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  using Forward = std::tuple<std::vector<Tensor>, Tensor>(
      const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
      at::ArrayRef<double> scale, double dropout_p, const std::optional<Tensor>& seed);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("perl_kernels::lora_linear", "")
                             .typed<Forward>();
  TORCH_CHECK_TYPE(count == 6, "wanted x, weight, a, b, bias, scale");
  if (!is_plain(arguments[0])) Py_RETURN_NONE;
  const Tensor x = THPVariable_Unpack(arguments[0]);
  const auto weight = tensors_of(arguments[1]), a = tensors_of(arguments[2]),
             b = tensors_of(arguments[3]);
  const bool with_bias = arguments[4] != Py_None;
  const auto bias = with_bias ? tensors_of(arguments[4]) : std::vector<Tensor>();
  const size_t n = weight.size();
  const auto scale = numbers_of(arguments[5], n);
  bool fine = n > 0 && a.size() == n && b.size() == n && scale.size() == n &&
      bias.size() == (with_bias ? n : 0) && x.device().is_cpu() && x.dim() > 0 &&
      is_float(x.scalar_type());
  for (size_t i = 0; fine && i < n; ++i) {
    fine = fits(
        x.scalar_type(), x.size(-1), weight[i], with_bias ? &bias[i] : nullptr, a[i], b[i]);
  }
  if (!fine) Py_RETURN_NONE;
  std::vector<Tensor> y;
  {
    const pybind11::gil_scoped_release no_gil;
    const bool flat = x.dim() == 2;
    y = std::get<0>(op.call(
        flat ? x : x.reshape({-1, x.size(-1)}), weight, bias, a, b, scale, 0.0, std::nullopt));
    for (Tensor& one : y) {
      if (flat) break;
      auto sizes = x.sizes().vec();
      sizes.back() = one.size(1);
      one = one.view(sizes);
    }
  }
  if (THPVariable_CheckExact(arguments[1])) return THPVariable_Wrap(y[0]);
  PyObject* found = PyTuple_New(static_cast<Py_ssize_t>(n));
  for (size_t i = 0; i < n; ++i) PyTuple_SET_ITEM(found, i, THPVariable_Wrap(y[i]));
  return found;
  END_HANDLE_TH_ERRORS
}

// y of three projections (weight, a, b, bias, scale) without gradient, or None likewise.
PyObject* lora_mlp(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  using Forward = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>(
      const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
      at::ArrayRef<double> scale, std::string_view activation, double dropout_p,
      const std::optional<Tensor>& seed_x, const std::optional<Tensor>& seed_h, bool keep_gate_up);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("perl_kernels::lora_mlp_cpu", "")
                             .typed<Forward>();
  TORCH_CHECK_TYPE(count == 5, "wanted x, gate, up, down, activation");
  if (!is_plain(arguments[0])) Py_RETURN_NONE;
  const Tensor x = THPVariable_Unpack(arguments[0]);
  std::vector<Tensor> weight, a, b, bias;
  std::vector<double> scale;
  for (int64_t i = 1; i <= 3; ++i) {
    if (!PyTuple_Check(arguments[i]) || PyTuple_GET_SIZE(arguments[i]) != 5) Py_RETURN_NONE;
    const auto given = [&](int64_t at) { return PyTuple_GET_ITEM(arguments[i], at); };
    int64_t at = 0;
    for (auto* list : {&weight, &a, &b, &bias}) {
      PyObject* tensor = given(at++);
      if (THPVariable_Check(tensor)) list->push_back(THPVariable_Unpack(tensor));
    }
    if (PyFloat_CheckExact(given(at))) scale.push_back(PyFloat_AS_DOUBLE(given(at)));
  }
  const bool with_bias = !bias.empty();
  bool fine = weight.size() == 3 && a.size() == 3 && b.size() == 3 && scale.size() == 3 &&
      bias.size() == (with_bias ? 3 : 0) && x.dim() > 0 && is_float(x.scalar_type());
  for (size_t i = 0; fine && i < 3; ++i) {
    fine = fits(
        x.scalar_type(), i < 2 ? x.size(-1) : weight[0].size(0), weight[i],
        with_bias ? &bias[i] : nullptr, a[i], b[i]);
  }
  if (!fine || weight[0].size(0) != weight[1].size(0)) Py_RETURN_NONE;
  const char* activation = PyUnicode_AsUTF8(arguments[4]);
  if (activation == nullptr) throw python_error();
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    auto sizes = x.sizes().vec();
    sizes.back() = weight[2].size(0);
    y = std::get<0>(op.call(
                        x.reshape({-1, x.size(-1)}), weight, bias, a, b, scale, activation, 0.0,
                        std::nullopt, std::nullopt, false))
            .view(sizes);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"lora_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lora_linear)),
     METH_FASTCALL, "y, or None where the arguments want checking or casting first"},
    {"lora_mlp", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lora_mlp)),
     METH_FASTCALL, "y, or None where the arguments want checking or casting first"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, functions};

}  // namespace
}  // namespace perl_kernels

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&perl_kernels::module); }
