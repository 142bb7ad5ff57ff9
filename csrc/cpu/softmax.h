// The state of one row of logits while tiles of its columns are folded in, any number at a time.
// The letters and formulas are those of perl_kernels/_softmax.py; sums across tiles are double.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "matrix.h"

namespace perl_kernels::cpu {

// What transformed logits are multiplied by: see Kernels::transform.
inline float logit_unit(float temperature, float softcap) {
  return softcap > 0.0f ? softcap / temperature : 1.0f;
}

struct RowState {
  double m = std::numeric_limits<float>::lowest(), l = 0, u = 0, t = 0;
  double mq = std::numeric_limits<float>::lowest(), lq = 0, d = 0, tq = 0;

  // Add n raw logits (and the reference's, or null), which are overwritten; both have room for n
  // rounded up to 16. target is the index of the row's class among them, or outside 0 .. n.
  void fold(
      float* z, float* zq, const float* bias, int64_t n, int64_t target, float temperature,
      float softcap) {
    const Kernels& table = kernels();
    const bool inside = target >= 0 && target < n;
    const float unit = logit_unit(temperature, softcap);
    double sums[4] = {0, 0, 0, 0};
    const float most = table.transform(z, bias, n, temperature, softcap);
    const float most_q =
        zq == nullptr ? 0.0f : table.transform(zq, bias, n, temperature, softcap);
    move_to(std::max(m, double{most}), zq == nullptr ? mq : std::max(mq, double{most_q}));
    if (zq != nullptr) {
      table.fold_pair(
          z, zq, n, static_cast<float>(m), static_cast<float>(mq), unit, sums);
      if (inside) tq = zq[target] * unit;
    } else {
      table.fold(z, n, static_cast<float>(m), unit, sums);
    }
    if (inside) t = z[target] * unit;
    l += sums[0];
    u += sums[1];
    lq += sums[2];
    d += sums[3];
  }

  // Add the columns of another state; its target is not looked at.
  void merge(RowState other) {
    const double most = std::max(m, other.m), most_q = std::max(mq, other.mq);
    move_to(most, most_q);
    other.move_to(most, most_q);
    l += other.l;
    u += other.u;
    lq += other.lq;
    d += other.d;
  }

  // Make every sum relative to new maxima.
  void move_to(double most, double most_q) {
    if (most == m && most_q == mq) return;
    const double up = m - most, shrink = std::exp(up);
    u = (u + l * up) * shrink;
    d *= shrink;
    l *= shrink;
    lq *= std::exp(mq - most_q);
    m = most;
    mq = most_q;
  }
};

using StatsTuple = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Each (N,) float32; what was not asked for is empty.
struct Stats {
  at::Tensor log_prob, peak, log_sum, entropy, ref_log_prob, gap, kl;

  Stats(const at::Tensor& like, int64_t rows, bool has_target, bool has_ref);
  // Row `row` of every output from its state; all 0 when the row is not counted.
  void write(int64_t row, const RowState& state, bool counted);
  StatsTuple tuple() const { return {log_prob, peak, log_sum, entropy, ref_log_prob, gap, kl}; }
};

// The targets of the rows, and which rows count.
class Targets {
 public:
  Targets(const std::optional<at::Tensor>& target, int64_t ignore_index);
  bool counted(int64_t row) const { return !present() || (*this)[row] != ignore_index_; }
  // The class of a row, or -1 for none.
  int64_t operator[](int64_t row) const { return present() ? data_[row] : -1; }

 private:
  bool present() const { return data_ != nullptr; }
  at::Tensor holder_;
  const int64_t* data_ = nullptr;
  int64_t ignore_index_;
};

// Saved statistics and incoming gradients, by row.
class GradientRows {
 public:
  GradientRows(
      const at::Tensor& peak, const at::Tensor& log_sum, const at::Tensor& entropy,
      const at::Tensor& gap, const std::optional<at::Tensor>& d_log_prob,
      const std::optional<at::Tensor>& d_entropy, const std::optional<at::Tensor>& d_kl);
  GradientRow operator[](int64_t row) const;
  bool has_kl() const { return columns_[6] != nullptr; }

 private:
  at::Tensor holders_[7];
  const float* columns_[7] = {};  // in the order of GradientRow; null: 0
};

}  // namespace perl_kernels::cpu
