// Statistics of rows of logits that exist, and their gradient: one pass each, in strips of a row
// that stay in the first cache.
#include <torch/library.h>

#include "softmax.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t STRIP = 2048;  // columns at a time

struct Strip {
  alignas(64) float z[STRIP];

  float* load(const Matrix& logits, int64_t row, int64_t first, int64_t n) {
    kernels().to_float(logits.at(row, first), logits.dtype, logits.column_stride, n, z);
    return z;
  }
};

StatsTuple logits_stats(
    const Tensor& logits,              // (N, V)
    const OptionalTensor& target,      // (N,)
    const OptionalTensor& ref_logits,  // (N, V)
    double temperature, double softcap, int64_t ignore_index) {
  const Matrix p(logits), q(ref_logits.value_or(logits));
  const bool has_ref = ref_logits.has_value();
  const Targets targets(target, ignore_index);
  Stats out(logits, p.rows, target.has_value(), has_ref);
  at::parallel_for(0, p.rows, 1, [&](int64_t begin, int64_t end) {
    Strip z, zq;
    for (int64_t row = begin; row < end; ++row) {
      RowState state;
      for (int64_t first = 0; first < p.columns; first += STRIP) {
        const int64_t n = std::min(STRIP, p.columns - first);
        state.fold(
            z.load(p, row, first, n), has_ref ? zq.load(q, row, first, n) : nullptr, nullptr, n,
            targets[row] - first, static_cast<float>(temperature), static_cast<float>(softcap));
      }
      out.write(row, state, targets.counted(row));
    }
  });
  return out.tuple();
}

Tensor logits_grad(
    const Tensor& logits,              // (N, V)
    const OptionalTensor& target,      // (N,)
    const OptionalTensor& ref_logits,  // (N, V)
    const Tensor& peak, const Tensor& log_sum, const Tensor& entropy, const Tensor& gap,
    const OptionalTensor& d_log_prob, const OptionalTensor& d_entropy, const OptionalTensor& d_kl,
    double temperature, double softcap, int64_t ignore_index) {
  const Kernels& table = kernels();
  const Matrix p(logits), q(ref_logits.value_or(logits));
  const Targets targets(target, ignore_index);
  const GradientRows incoming(peak, log_sum, entropy, gap, d_log_prob, d_entropy, d_kl);
  const float t = static_cast<float>(temperature), cap = static_cast<float>(softcap);
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  at::parallel_for(0, p.rows, 1, [&](int64_t begin, int64_t end) {
    Strip z, zq;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < p.columns; first += STRIP) {
        const int64_t n = std::min(STRIP, p.columns - first);
        if (targets.counted(row)) {
          z.load(p, row, first, n);
          table.transform(z.z, nullptr, n, t, cap);
          if (incoming.has_kl()) table.transform(zq.load(q, row, first, n), nullptr, n, t, cap);
          const int64_t column = targets[row] - first;
          table.gradient(
              z.z, incoming.has_kl() ? zq.z : nullptr, n,
              column >= 0 && column < n ? column : -1, incoming[row], t, cap);
        } else {
          std::fill(z.z, z.z + n, 0.0f);
        }
        store_tile(z.z, STRIP, 1, n, dlogits, row, first);
      }
    }
  });
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("logits_stats_cpu", logits_stats);
  m.impl("logits_grad_cpu", logits_grad);
}

}  // namespace perl_kernels::cpu
