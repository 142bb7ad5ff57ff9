// y = x r (offset + weight), r = 1 / sqrt(mean(x^2) + eps), each row by itself; and its gradient.
// A row is read once and stays in the first cache as floats.
#include <torch/library.h>

#include <cmath>

#include "matrix.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;

// Calls work(first row, row behind the last) in runs of some thousand elements.
template <class Work>
void for_rows(const Matrix& x, const Work& work) {
  at::parallel_for(0, x.rows, std::max<int64_t>(1, 16384 / x.columns), work);
}

Buffer shifted(const Tensor& weight, double offset) {
  const int64_t D = weight.size(0);
  Buffer w(D);
  vector_to_float(weight, 0, D, w.data());
  for (int64_t i = 0; i < D; ++i) w.data()[i] += static_cast<float>(offset);
  return w;
}

void load_row(const Matrix& m, int64_t row, float* to) {
  kernels().to_float(m.at(row, 0), m.dtype, m.column_stride, m.columns, to);
}

float inverse_root(const float* x, int64_t n, double eps) {
  return static_cast<float>(1.0 / std::sqrt(kernels().dot(x, x, n) / static_cast<double>(n) + eps));
}

Tensor rms_norm(
    const Tensor& x,       // (N, D)
    const Tensor& weight,  // (D,)
    double eps, double offset, bool rounds_first) {
  const Kernels& table = kernels();
  const Matrix from(x);
  const int64_t D = from.columns;
  const bool rounds = rounds_first && from.dtype != Dtype::float32;
  const Buffer w = shifted(weight, offset);
  Tensor y = at::empty(x.sizes(), x.options());
  for_rows(from, [&](int64_t begin, int64_t end) {
    Buffer row(D), rounded(rounds ? ceil_div(D, 2) : 0);
    for (int64_t n = begin; n < end; ++n) {
      load_row(from, n, row.data());
      const float r = inverse_root(row.data(), D, eps);
      if (rounds) {
        table.combine(r, row.data(), 0.0f, row.data(), D, row.data());
        table.from_float(row.data(), D, from.dtype, rounded.data());
        table.to_float(rounded.data(), from.dtype, 1, D, row.data());
      }
      table.weight(rounds ? 1.0f : r, row.data(), w.data(), D, row.data());
      store_tile(row.data(), D, 1, D, y, n, 0);
    }
  });
  return y;
}

// dn = w dy ; dx = r dn - x r^3 mean(dn x)
Tensor rms_norm_backward(
    const Tensor& dy,      // (N, D)
    const Tensor& x,       // (N, D)
    const Tensor& weight,  // (D,)
    double eps, double offset) {
  const Kernels& table = kernels();
  const Matrix from(x), incoming(dy);
  const int64_t D = from.columns;
  const Buffer w = shifted(weight, offset);
  Tensor dx = at::empty(x.sizes(), x.options());
  for_rows(from, [&](int64_t begin, int64_t end) {
    Buffer row(D), dn(D);
    for (int64_t n = begin; n < end; ++n) {
      load_row(from, n, row.data());
      load_row(incoming, n, dn.data());
      table.weight(1.0f, dn.data(), w.data(), D, dn.data());
      const double r = inverse_root(row.data(), D, eps);
      const double mean = table.dot(dn.data(), row.data(), D) / static_cast<double>(D);
      table.combine(
          static_cast<float>(r), dn.data(), static_cast<float>(-r * r * r * mean), row.data(), D,
          row.data());
      store_tile(row.data(), D, 1, D, dx, n, 0);
    }
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("rms_norm_cpu", rms_norm);
  m.impl("rms_norm_backward_cpu", rms_norm_backward);
}

}  // namespace perl_kernels::cpu
