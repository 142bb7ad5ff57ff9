// lora_linear in the dispatcher, without a step through Python: a layer's call and its backward
// would otherwise cost more than a small layer's arithmetic.
//
// The autograd formula is that of perl_kernels/lora_linear/op.py, for every device. On the CPU the
// op runs the compiled kernel; where `use_backend` or the dtype asks for something else, the body
// in Python, `lora_linear_python`.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>

namespace perl_kernels {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

using Forward = std::tuple<std::vector<Tensor>, Tensor>(
    const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
    at::ArrayRef<double> scale, double dropout_p, const OptionalTensor& seed);
using Backward = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>(
    TensorList dy, const Tensor& x, TensorList weight, TensorList a, TensorList b,
    at::ArrayRef<double> scale, double dropout_p, const OptionalTensor& seed, const Tensor& s,
    bool need_dx, bool need_dab);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// ------------------------------------------------------------------------------------------------
// Backends
// ------------------------------------------------------------------------------------------------

std::atomic<bool> kernels_wanted{true};

bool runs_compiled(const Tensor& x) {
  const auto dtype = x.scalar_type();
  return kernels_wanted.load(std::memory_order_relaxed) &&
      (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

std::tuple<std::vector<Tensor>, Tensor> forward_on_cpu(
    const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
    at::ArrayRef<double> scale, double dropout_p, const OptionalTensor& seed) {
  static const auto compiled = op<Forward>("perl_kernels::lora_linear_cpu");
  static const auto python = op<Forward>("perl_kernels::lora_linear_python");
  return (runs_compiled(x) ? compiled : python)
      .call(x, weight, bias, a, b, scale, dropout_p, seed);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward_on_cpu(
    TensorList dy, const Tensor& x, TensorList weight, TensorList a, TensorList b,
    at::ArrayRef<double> scale, double dropout_p, const OptionalTensor& seed, const Tensor& s,
    bool need_dx, bool need_dab) {
  static const auto compiled = op<Backward>("perl_kernels::lora_linear_backward_cpu");
  static const auto python = op<Backward>("perl_kernels::lora_linear_backward_python");
  return (runs_compiled(x) ? compiled : python)
      .call(dy, x, weight, a, b, scale, dropout_p, seed, s, need_dx, need_dab);
}

// ------------------------------------------------------------------------------------------------
// Autograd
// ------------------------------------------------------------------------------------------------

std::tuple<std::vector<Tensor>, Tensor> forward_below(
    const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
    at::ArrayRef<double> scale, double dropout_p, const OptionalTensor& seed) {
  static const auto lora_linear = op<Forward>("perl_kernels::lora_linear");
  const at::AutoDispatchBelowADInplaceOrView below;
  return lora_linear.call(x, weight, bias, a, b, scale, dropout_p, seed);
}

struct LoRALinear : torch::autograd::Function<LoRALinear> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, TensorList weight, TensorList bias, TensorList a,
      TensorList b, at::ArrayRef<double> scale, double dropout_p, const OptionalTensor& seed) {
    auto [outputs, s] = forward_below(x, weight, bias, a, b, scale, dropout_p, seed);
    variable_list saved = {x, s, seed.value_or(Tensor())};
    for (const TensorList list : {weight, a, b}) saved.insert(saved.end(), list.begin(), list.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = !bias.empty();
    ctx->mark_non_differentiable({s});
    outputs.push_back(s);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    static const auto lora_linear_backward = op<Backward>("perl_kernels::lora_linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const TensorList tensors(saved);
    const size_t n = gradients.size() - 1;
    const TensorList dy = TensorList(gradients).slice(0, n);
    const OptionalTensor seed = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    // inputs in order: x, weight, bias, a, b
    const size_t bias_at = 1 + n, a_at = bias_at + (has_bias ? n : 0), b_at = a_at + n;
    const bool need_x = ctx->needs_input_grad(0);
    const bool need_ab = ctx->needs_input_grad({{a_at, b_at + n}});
    const auto [dx, da, db] = lora_linear_backward.call(
        dy, saved[0], tensors.slice(3, n), tensors.slice(3 + n, n), tensors.slice(3 + 2 * n, n),
        ctx->saved_data["scale"].toDoubleVector(), ctx->saved_data["dropout_p"].toDouble(), seed,
        saved[1], need_x, need_ab);
    variable_list found(b_at + n + 3);  // the numbers and the seed have none
    if (need_x) found[0] = dx;
    for (size_t i = 0; i < n; ++i) {
      if (has_bias && ctx->needs_input_grad(bias_at + i)) found[bias_at + i] = dy[i].sum(0);
      if (need_ab) {
        found[a_at + i] = da[i];
        found[b_at + i] = db[i];
      }
    }
    return found;
  }
};

bool any_requires_grad(TensorList tensors) {
  return std::any_of(
      tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
}

std::tuple<std::vector<Tensor>, Tensor> forward_with_autograd(
    const Tensor& x, TensorList weight, TensorList bias, TensorList a, TensorList b,
    at::ArrayRef<double> scale, double dropout_p, const OptionalTensor& seed) {
  const bool learns = c10::GradMode::is_enabled() &&
      (x.requires_grad() || any_requires_grad(bias) || any_requires_grad(a) ||
       any_requires_grad(b));
  if (!learns) return forward_below(x, weight, bias, a, b, scale, dropout_p, seed);
  variable_list y = LoRALinear::apply(x, weight, bias, a, b, scale, dropout_p, seed);
  Tensor s = y.back();
  y.pop_back();
  return {std::move(y), s};
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("lora_linear", forward_on_cpu);
  m.impl("lora_linear_backward", backward_on_cpu);
}

TORCH_LIBRARY_IMPL(perl_kernels, Autograd, m) {
  m.impl("lora_linear", forward_with_autograd);
}

TORCH_LIBRARY_IMPL(perl_kernels, CatchAll, m) {
  m.impl("use_compiled_on_cpu", [](bool wanted) { kernels_wanted = wanted; });
}

}  // namespace perl_kernels
