#include "softmax.h"

namespace perl_kernels::cpu {

Stats::Stats(const at::Tensor& like, int64_t rows, bool has_target, bool has_ref) {
  auto column = [&](bool wanted) {
    return at::empty({wanted ? rows : 0}, like.options().dtype(at::kFloat));
  };
  log_prob = column(has_target);
  peak = column(true);
  log_sum = column(true);
  entropy = column(true);
  ref_log_prob = column(has_target && has_ref);
  gap = column(has_ref);
  kl = column(has_ref);
}

void Stats::write(int64_t row, const RowState& state, bool counted) {
  auto put = [&](at::Tensor& column, double value) {
    if (row < column.size(0)) {
      column.mutable_data_ptr<float>()[row] = counted ? static_cast<float>(value) : 0.0f;
    }
  };
  const auto& [m, l, u, t, mq, lq, d, tq] = state;
  const double log_l = std::log(l), log_lq = std::log(lq);
  put(log_prob, t - m - log_l);
  put(peak, m);
  put(log_sum, log_l);
  put(entropy, log_l - u / l);
  put(ref_log_prob, tq - mq - log_lq);
  put(gap, d / l);
  put(kl, d / l - (m - mq) - (log_l - log_lq));
}

Targets::Targets(const std::optional<at::Tensor>& target, int64_t ignore_index)
    : ignore_index_(ignore_index) {
  if (!target.has_value()) return;
  holder_ = target->contiguous();
  data_ = holder_.const_data_ptr<int64_t>();
}

GradientRows::GradientRows(
    const at::Tensor& peak, const at::Tensor& log_sum, const at::Tensor& entropy,
    const at::Tensor& gap, const std::optional<at::Tensor>& d_log_prob,
    const std::optional<at::Tensor>& d_entropy, const std::optional<at::Tensor>& d_kl)
    : holders_{peak, log_sum, entropy, gap,
               d_log_prob.value_or(at::Tensor()), d_entropy.value_or(at::Tensor()),
               d_kl.value_or(at::Tensor())} {
  for (int i = 0; i < 7; ++i) {
    if (!holders_[i].defined() || holders_[i].numel() == 0) continue;
    holders_[i] = holders_[i].to(at::kFloat).contiguous();
    columns_[i] = holders_[i].const_data_ptr<float>();
  }
}

GradientRow GradientRows::operator[](int64_t row) const {
  auto value = [&](int i) { return columns_[i] == nullptr ? 0.0f : columns_[i][row]; };
  return {value(0), value(1), value(2), value(3), value(4), value(5), value(6)};
}

}  // namespace perl_kernels::cpu
