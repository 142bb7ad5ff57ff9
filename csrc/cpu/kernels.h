// The inner loops of the CPU kernels, as a table of functions that exists once per instruction set.
//
// `kernels_impl.h` is the one source of all of them; `kernels_default.cpp`, `kernels_avx2.cpp` and
// `kernels_avx512.cpp` compile it with other vector widths, and `kernels()` picks at run time.
// Letters: N tokens, D inputs, O outputs, R rank, V vocabulary, H hidden size, K inner dimension.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PERL_KERNELS_X86
#endif

namespace perl_kernels::cpu {

enum class Dtype : int { float32, bfloat16, float16 };
enum class Activation : int { silu, gelu_tanh };

// Incoming gradients and saved statistics of one row, for `gradient`.
struct GradientRow {
  float peak, log_sum, entropy, gap;
  float d_log_prob, d_entropy, d_kl;
};

struct Kernels {
  const char* name;

  // Widths of the packed operands of `multiply`: rows in panels [K][row_panel], columns in panels
  // [K][column_panel].
  int64_t row_panel, column_panel;

  // c (row_panels * row_panel, column_panels * column_panel) = or += rows * columns^T over k.
  // Sums run over k in one fixed order, whatever the other sizes: a row's result does not depend
  // on the rows beside it, nor on the number of threads.
  void (*multiply)(
      const float* rows, int64_t row_panels, int64_t row_panel_stride,
      const float* columns, int64_t column_panels, int64_t column_panel_stride,
      int64_t k, float* c, int64_t ldc, bool add);

  // The same for bfloat16, a pair of consecutive k in the place of each float; sums are float32.
  // Null where the processor has no instruction for it.
  void (*multiply_pairs)(
      const float* rows, int64_t row_panels, int64_t row_panel_stride,
      const float* columns, int64_t column_panels, int64_t column_panel_stride,
      int64_t k, float* c, int64_t ldc, bool add);

  // c (k, n) += panel (row_panel, k)^T right (row_panel, n) for one panel of packed rows; right and
  // c have room for n rounded up to column_panel.
  void (*outer)(
      const float* panel, int64_t k, const float* right, int64_t ld_right, int64_t n, float* c,
      int64_t ldc);

  // to[k][width] = transpose of from[width][ld], for k < n.
  void (*interleave)(const float* from, int64_t ld, int64_t width, int64_t n, float* to);

  // to[i] = the pair (even[i], odd[i])
  void (*zip)(const uint16_t* even, const uint16_t* odd, int64_t n, float* to);

  // to[i] = from[i * stride], and back (contiguous, rounded to nearest even).
  void (*to_float)(const void* from, Dtype dtype, int64_t stride, int64_t n, float* to);
  void (*from_float)(const float* from, int64_t n, Dtype dtype, void* to);

  // values[i] += addend[i]
  void (*accumulate)(const float* addend, int64_t n, float* values);

  // sum of a[i] b[i]
  double (*dot)(const float* a, const float* b, int64_t n);
  // out[i] = alpha a[i] w[i], and alpha a[i] + beta b[i]; out may be an operand
  void (*weight)(float alpha, const float* a, const float* w, int64_t n, float* out);
  void (*combine)(
      float alpha, const float* a, float beta, const float* b, int64_t n, float* out);

  // out[i][j] = or += sum over k < n of left[i][k] right[j][k], for i < rows and j < count; out has
  // room for count rounded up to 16. The right rows are read as they lie, once for every four left
  // ones; left is float32, or bfloat16 like right.
  void (*dots)(
      const void* left, Dtype left_dtype, int64_t left_stride, int64_t rows, const void* right,
      Dtype dtype, int64_t right_stride, int64_t count, int64_t n, float* out, int64_t ld_out,
      bool add);

  // The same for at most column_panel left rows, packed: a panel [n][column_panel].
  void (*spread)(
      const float* left, int64_t rows, const void* right, Dtype dtype, int64_t right_stride,
      int64_t count, int64_t n, float* out, int64_t ld_out, bool add);

  // Zero the elements of row[column .. column + n) whose random number is below threshold; values
  // points at `column`, a multiple of 8. The numbers are those of perl_kernels/_dropout.py.
  void (*drop)(
      void* values, Dtype dtype, int64_t n, uint64_t seed, uint16_t threshold, int64_t row,
      int64_t column);

  // The rows below hold n valid floats in room for n rounded up to 16.

  // h = act(gate) up; h may be gate.
  void (*gated)(const float* gate, const float* up, int64_t n, Activation activation, float* h);

  // In place, from dh: gate becomes dgate, up becomes dup and dh becomes h.
  void (*gated_gradient)(float* gate, float* up, float* dh, int64_t n, Activation activation);

  // z = (raw + bias) / temperature in place, or with a softcap tanh((raw + bias) / softcap), from
  // which both the logit and its slope are exact; bias may be null. The room after n becomes -inf.
  // A logit is z * unit, unit = softcap / temperature or 1. Returns the largest logit.
  float (*transform)(float* z, const float* bias, int64_t n, float temperature, float softcap);

  // sums = {sum e^(z-m), sum e^(z-m) (z-m)} of the logits
  void (*fold)(const float* z, int64_t n, float m, float unit, double* sums);

  // sums = {as above, sum e^(zq-mq), sum e^(z-m) (z-zq)}
  void (*fold_pair)(
      const float* z, const float* zq, int64_t n, float m, float mq, float unit, double* sums);

  // sums as in fold; z becomes e^(z-m) dz / d raw, the room after n 0.
  void (*weigh)(
      float* z, int64_t n, float m, float temperature, float softcap, double* sums);

  // sums as in fold_pair, but sum e^(z-m) (z - zq - centre) for the last; z becomes e^(z-m) dz / d raw
  // and zq that times z - zq - centre, the room after n 0.
  void (*weigh_pair)(
      float* z, float* zq, int64_t n, float m, float mq, float centre, float temperature,
      float softcap, double* sums);

  // z becomes d loss / d raw of its row; target is the index of the row's class or -1. zq may be
  // null when d_kl is 0. The room after n becomes 0.
  void (*gradient)(
      float* z, const float* zq, int64_t n, int64_t target, const GradientRow& row,
      float temperature, float softcap);
};

extern const Kernels kernels_default;
#ifdef PERL_KERNELS_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

// The widest table that this processor runs, no wider than PERL_KERNELS_CPU_CAPABILITY
// (default, avx2, avx512 or avx512_bf16) when that is set.
const Kernels& kernels();

// AVX-512 on a processor where torch's own float32 products use AVX2.
bool beats_library_in_float32();

// AMX: oneDNN's brgemm multiplies bfloat16 panels.
bool has_bfloat16_tiles();

}  // namespace perl_kernels::cpu
