// The route "blocks" of the head on torch's stable ABI; the kernel is in head.cuh.
//
// head_rows_cuda   the statistics of rows of float32 logits, and dz over them
//
// perl_kernels/head/triton.py has the rule, and the products before and after.

#include <optional>

#include "device.cuh"
#include "tensor.cuh"

#include "head.cuh"  // after the device that it asks

namespace perl_kernels {
namespace {

using Maybe = std::optional<Tensor>;

void head_rows_cuda(Tensor logits, Maybe bias, Maybe target, Maybe log_prob, Tensor peak,
                    Tensor log_sum, Tensor entropy, Maybe ref_log_prob, Maybe gap, Maybe kl,
                    Maybe d_log_prob, Maybe d_kl, Tensor dz, double temperature, double softcap,
                    int64_t ignore_index) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Device device(logits, "head_rows");
  const int64_t rows = peak.size(0);
  const Transform transform{static_cast<float>(1.0 / temperature), static_cast<float>(softcap)};
  for_dtype(dz, [&](auto element) {
    using T = decltype(element);
    const HeadRows<T> of{
        static_cast<const float*>(logits.data_ptr()), rows, logits.size(1), logits.stride(0),
        pointer<T>(bias), pointer<int64_t>(target), ignore_index, transform,
        pointer<float>(log_prob), static_cast<float*>(peak.data_ptr()),
        static_cast<float*>(log_sum.data_ptr()), static_cast<float*>(entropy.data_ptr()),
        pointer<float>(ref_log_prob), pointer<float>(gap), pointer<float>(kl),
        pointer<float>(d_log_prob), pointer<float>(d_kl),
        dz.size(0) > 0 ? static_cast<T*>(dz.data_ptr()) : nullptr, dz.size(0) > rows, dz.stride(0)};
    head_rows(device, of, logits.size(0) > rows);
  });
}

}  // namespace
}  // namespace perl_kernels

STABLE_TORCH_LIBRARY_IMPL(perl_kernels, CUDA, m) {
  m.impl("head_rows_cuda", TORCH_BOX(&perl_kernels::head_rows_cuda));
}
