// The thin products of lora_linear on torch's stable ABI; the kernels are in lora_linear.cuh.
//
// lora_linear_shrink_cuda   s = drop(x) a^T
// lora_linear_ds_db_cuda    ds = scale * dy b ; db = scale * dy^T s
//
// float16 and bfloat16 only: perl_kernels/lora_linear/triton.py has the rule.

#include <optional>

#include "device.cuh"
#include "tensor.cuh"

#include "lora_linear.cuh"  // after the device that it asks

namespace perl_kernels {
namespace {

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return Matrix<T>(t.data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1));
}

template <typename Run>
void for_16_bits(const Tensor& tensor, Run run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "wanted float16 or bfloat16");
  }
}

Tensor lora_linear_shrink_cuda(Tensor x, Tensor a, double dropout_p, std::optional<Tensor> seed) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Device device(x, "lora_linear");
  Tensor s = torch::stable::new_empty(x, {x.size(0), a.size(0)});
  const bool drops = dropout_p > 0.0;
  const Dropout dropout{
      drops ? static_cast<const int64_t*>(seed->data_ptr()) : nullptr,
      static_cast<uint32_t>(dropout_p * 65536.0),
      drops ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 1.f};
  for_16_bits(x, [&](auto element) {
    using T = decltype(element);
    shrink(device, matrix<T>(x), matrix<T>(a), dropout, static_cast<T*>(s.data_ptr()));
  });
  return s;
}

void lora_linear_ds_db_cuda(Tensor dy, Tensor b, Tensor s, double scale, Tensor ds,
                            std::optional<Tensor> db) {
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  Device device(dy, "lora_linear");
  for_16_bits(dy, [&](auto element) {
    using T = decltype(element);
    auto run = [&](auto of_db) {
      using DB = decltype(of_db);
      ds_db(device, matrix<T>(dy), matrix<T>(b), matrix<T>(s), static_cast<float>(scale),
            static_cast<T*>(ds.data_ptr()), ds.stride(0),
            db ? static_cast<DB*>(db->data_ptr()) : nullptr);
    };
    if (db && db->scalar_type() == ScalarType::Float) return run(float{});
    run(T{});
  });
}

}  // namespace
}  // namespace perl_kernels

STABLE_TORCH_LIBRARY_IMPL(perl_kernels, CUDA, m) {
  m.impl("lora_linear_shrink_cuda", TORCH_BOX(&perl_kernels::lora_linear_shrink_cuda));
  m.impl("lora_linear_ds_db_cuda", TORCH_BOX(&perl_kernels::lora_linear_ds_db_cuda));
}
