// The source of every table in kernels.h. The including file sets the compiler's target first and
// defines PERL_TABLE (the table's name), PERL_NAME (what users read) and PERL_LANES (floats per
// vector). Only headers without inline code may be included from here: a function compiled for
// AVX-512 that the linker also gives to baseline code would crash on older processors.
#include "kernels.h"

#ifdef PERL_BFLOAT16
#include <immintrin.h>  // every function in it is inlined always
#endif

namespace perl_kernels::cpu {
namespace {

#define PERL_INLINE inline __attribute__((always_inline))

constexpr int64_t W = PERL_LANES;
constexpr int64_t ROW_PANEL = W == 16 ? 12 : 6;  // 2 * ROW_PANEL accumulators fill the registers
constexpr int64_t COLUMN_PANEL = 2 * W;
// A panel of columns stays in the first cache; and a sum of sums of 128 rounds less than one sum.
// Blocks of pairs are even, and up to a quarter longer: a rank behind a power of two makes no new
// one, and there the rounding of the operands rules.
constexpr int64_t K_BLOCK = 128;
constexpr float LOWEST = -3.402823466e38f;
constexpr float INFINITE = __builtin_inff();

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef float FloatsInMemory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t WordInMemory __attribute__((aligned(4), may_alias));
typedef uint16_t HalvesInMemory __attribute__((vector_size(2 * W), aligned(2), may_alias));

PERL_INLINE Floats load(const float* p) { return *reinterpret_cast<const FloatsInMemory*>(p); }
PERL_INLINE void store(float* p, Floats v) { *reinterpret_cast<FloatsInMemory*>(p) = v; }
// minus zero is the identity for every float, so this is one broadcast
PERL_INLINE Floats all(float value) { return value - Floats{}; }
PERL_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

PERL_INLINE Words widen(Halves h) { return __builtin_convertvector(h, Words); }
PERL_INLINE Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }

typedef float HalfFloats __attribute__((vector_size(2 * W)));
typedef float HalfFloatsInMemory __attribute__((vector_size(2 * W), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(4 * W)));
typedef long long SignedLongs __attribute__((vector_size(4 * W)));

#if PERL_LANES == 4
constexpr Ints LANES = {0, 1, 2, 3};
constexpr SignedLongs DOUBLE_LANES = {0, 1};
#elif PERL_LANES == 8
constexpr Ints LANES = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr SignedLongs DOUBLE_LANES = {0, 1, 2, 3};
#else
constexpr Ints LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr SignedLongs DOUBLE_LANES = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

PERL_INLINE HalfFloats load_half(const float* p) {
  return *reinterpret_cast<const HalfFloatsInMemory*>(p);
}

// Sum and largest of a vector's elements, by halves.
PERL_INLINE double sum_of(Floats v) {
  float lanes[W];  // its own memory: v itself stays in a register
  store(lanes, v);
  Doubles sum = __builtin_convertvector(load_half(lanes), Doubles) +
      __builtin_convertvector(load_half(lanes + W / 2), Doubles);
#pragma GCC unroll 3
  for (int64_t n = W / 4; n > 0; n /= 2) {
    sum += __builtin_shuffle(sum, (DOUBLE_LANES + n) & (W / 2 - 1));
  }
  return sum[0];
}

PERL_INLINE float largest_of(Floats v) {
#pragma GCC unroll 4
  for (int64_t n = W / 2; n > 0; n /= 2) {
    v = larger(__builtin_shuffle(v, (LANES + static_cast<int32_t>(n)) & (int32_t{W} - 1)), v);
  }
  return v[0];
}

// ------------------------------------------------------------------------------------------------
// Matrix product of packed operands
// ------------------------------------------------------------------------------------------------

// sums += row (one value everywhere) * column, of floats or of pairs of bfloat16.
template <bool PAIRS>
PERL_INLINE Floats add_product(Floats sum, const float* row, Floats column) {
#ifdef PERL_BFLOAT16
  if constexpr (PAIRS) {
    const Words pair = *reinterpret_cast<const WordInMemory*>(row) + Words{};
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)column);
  }
#endif
  return sum + all(*row) * column;
}

template <bool PAIRS>
PERL_INLINE void multiply_panel(
    const float* rows, const float* next_rows, const float* columns, int64_t k, float* c,
    int64_t ldc, bool add) {
  Floats sums[ROW_PANEL][2];
#pragma GCC unroll 12
  for (int64_t i = 0; i < ROW_PANEL; ++i) {
    sums[i][0] = sums[i][1] = Floats{};
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + W, 1);
  }
  for (int64_t step = 0; step < k; ++step) {
    __builtin_prefetch(next_rows + step * ROW_PANEL);
    const Floats left = load(columns), right = load(columns + W);
#pragma GCC unroll 12
    for (int64_t i = 0; i < ROW_PANEL; ++i) {
      sums[i][0] = add_product<PAIRS>(sums[i][0], rows + i, left);
      sums[i][1] = add_product<PAIRS>(sums[i][1], rows + i, right);
    }
    rows += ROW_PANEL;
    columns += COLUMN_PANEL;
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < ROW_PANEL; ++i) {
    float* to = c + i * ldc;
    if (add) {
      sums[i][0] += load(to);
      sums[i][1] += load(to + W);
    }
    store(to, sums[i][0]);
    store(to + W, sums[i][1]);
  }
}

template <bool PAIRS>
void multiply(
    const float* rows, int64_t row_panels, int64_t row_panel_stride,
    const float* columns, int64_t column_panels, int64_t column_panel_stride,
    int64_t k, float* c, int64_t ldc, bool add) {
  int64_t block = K_BLOCK;
  if (PAIRS) {
    const int64_t blocks = (k + K_BLOCK - 1 - K_BLOCK / 4) / K_BLOCK;
    block = blocks > 1 ? (k + blocks - 1) / blocks : k;
  }
  int64_t first = 0;
  do {
    const int64_t length = k - first < block ? k - first : block;
    for (int64_t j = 0; j < column_panels; ++j) {
      for (int64_t i = 0; i < row_panels; ++i) {
        multiply_panel<PAIRS>(
            rows + i * row_panel_stride + first * ROW_PANEL,
            rows + (i + 1 < row_panels ? i + 1 : 0) * row_panel_stride + first * ROW_PANEL,
            columns + j * column_panel_stride + first * COLUMN_PANEL, length,
            c + i * ROW_PANEL * ldc + j * COLUMN_PANEL, ldc, add || first > 0);
      }
    }
    first += length;
  } while (first < k);
}

void outer(
    const float* panel, int64_t k, const float* right, int64_t ld_right, int64_t n, float* c,
    int64_t ldc) {
  for (int64_t j = 0; j < n; j += COLUMN_PANEL, right += COLUMN_PANEL, c += COLUMN_PANEL) {
    Floats block[ROW_PANEL][2];
#pragma GCC unroll 12
    for (int64_t i = 0; i < ROW_PANEL; ++i) {
      block[i][0] = load(right + i * ld_right);
      block[i][1] = load(right + i * ld_right + W);
    }
    const float* row = panel;
    float* to = c;
    for (int64_t step = 0; step < k; ++step, row += ROW_PANEL, to += ldc) {
      Floats left_sum = {}, right_sum = {};
#pragma GCC unroll 12
      for (int64_t i = 0; i < ROW_PANEL; ++i) {
        left_sum += all(row[i]) * block[i][0];
        right_sum += all(row[i]) * block[i][1];
      }
      store(to, load(to) + left_sum);
      store(to + W, load(to + W) + right_sum);
    }
  }
}

#if PERL_LANES == 4
constexpr Ints LOW_HALVES = {0, 4, 1, 5}, HIGH_HALVES = {2, 6, 3, 7};
#elif PERL_LANES == 8
constexpr Ints LOW_HALVES = {0, 8, 1, 9, 2, 10, 3, 11}, HIGH_HALVES = {4, 12, 5, 13, 6, 14, 7, 15};
#else
constexpr Ints LOW_HALVES = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
constexpr Ints HIGH_HALVES = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif

// W vectors become their transpose in log2(W) rounds of interleaving vectors i and i + W / 2.
PERL_INLINE void transpose(Floats* v) {
#pragma GCC unroll 4
  for (int64_t round = 1; round < W; round *= 2) {
    Floats out[W];
#pragma GCC unroll 16
    for (int64_t i = 0; i < W / 2; ++i) {
      out[2 * i] = __builtin_shuffle(v[i], v[i + W / 2], LOW_HALVES);
      out[2 * i + 1] = __builtin_shuffle(v[i], v[i + W / 2], HIGH_HALVES);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i) v[i] = out[i];
  }
}

template <int64_t WIDTH>
PERL_INLINE void interleave_width(const float* from, int64_t ld, int64_t n, float* to) {
  int64_t k = 0;
  // Where WIDTH is no multiple of W, a vector's store runs over into the next step, which is
  // written later: so the last group of rows goes first and the last steps go one by one.
  for (; k + W < n; k += W) {
#pragma GCC unroll 8
    for (int64_t first = (WIDTH - 1) / W * W; first >= 0; first -= W) {
      Floats v[W];
#pragma GCC unroll 16
      for (int64_t j = 0; j < W; ++j) {
        v[j] = first + j < WIDTH ? load(from + (first + j) * ld + k) : Floats{};
      }
      transpose(v);
#pragma GCC unroll 16
      for (int64_t j = 0; j < W; ++j) store(to + (k + j) * WIDTH + first, v[j]);
    }
  }
  for (; k < n; ++k) {
    for (int64_t j = 0; j < WIDTH; ++j) to[k * WIDTH + j] = from[j * ld + k];
  }
}

void interleave(const float* from, int64_t ld, int64_t width, int64_t n, float* to) {
  if (width == ROW_PANEL) {
    interleave_width<ROW_PANEL>(from, ld, n, to);
  } else {
    interleave_width<COLUMN_PANEL>(from, ld, n, to);
  }
}

void zip(const uint16_t* even, const uint16_t* odd, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Halves low = *reinterpret_cast<const HalvesInMemory*>(even + i);
    const Halves high = *reinterpret_cast<const HalvesInMemory*>(odd + i);
    store(to + i, (Floats)(widen(low) | (widen(high) << 16)));
  }
  for (; i < n; ++i) {
    *reinterpret_cast<WordInMemory*>(to + i) = even[i] | (uint32_t{odd[i]} << 16);
  }
}

// ------------------------------------------------------------------------------------------------
// Conversions: bfloat16 is the upper half of a float32; float16 is rebiased by powers of two
// ------------------------------------------------------------------------------------------------

PERL_INLINE Floats from_bfloat16(Halves h) { return (Floats)(widen(h) << 16); }

PERL_INLINE Halves to_bfloat16(Floats v) {
#ifdef PERL_BFLOAT16
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#endif
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return narrow(v != v ? (Words{} + 0x7FC0) : rounded);
}

PERL_INLINE Floats from_float16(Halves h) {
  const Words bits = widen(h);
  const Words magnitude = (bits & 0x7FFF) << 13;
  const Floats scaled = (Floats)magnitude * 0x1p112f;
  const Words special = magnitude | 0x7F800000;  // infinite or NaN
  const Words value = (bits & 0x7C00) == 0x7C00 ? special : (Words)scaled;
  return (Floats)(value | ((bits & 0x8000) << 16));
}

PERL_INLINE Halves to_float16(Floats v) {
  const Words bits = (Words)v;
  const Words magnitude = bits & 0x7FFFFFFF;
  const Words normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // below 2^-14 a float addition rounds at the right bit: one unit of 0.5 is 2^-24
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3F000000;
  Words value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x47800000 ? (Words{} + 0x7C00) : value;
  value = magnitude > 0x7F800000 ? (Words{} + 0x7E00) : value;
  return narrow(value | ((bits >> 16) & 0x8000));
}

PERL_INLINE Floats float_of(Dtype dtype, Halves h) {
  return dtype == Dtype::bfloat16 ? from_bfloat16(h) : from_float16(h);
}

void to_float(const void* from, Dtype dtype, int64_t stride, int64_t n, float* to) {
  if (dtype == Dtype::float32) {
    const float* values = static_cast<const float*>(from);
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = values[i];
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = values[i * stride];
    }
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; stride == 1 && i + W <= n; i += W) {
    const Halves h = *reinterpret_cast<const HalvesInMemory*>(halves + i);
    store(to + i, float_of(dtype, h));
  }
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    Halves h = {};
    for (int64_t j = 0; j < count; ++j) h[j] = halves[(i + j) * stride];
    const Floats v = float_of(dtype, h);
    for (int64_t j = 0; j < count; ++j) to[i + j] = v[j];
  }
}

void from_float(const float* from, int64_t n, Dtype dtype, void* to) {
  if (dtype == Dtype::float32) {
    float* values = static_cast<float*>(to);
    for (int64_t i = 0; i < n; ++i) values[i] = from[i];
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Floats v = load(from + i);
    const Halves h = dtype == Dtype::bfloat16 ? to_bfloat16(v) : to_float16(v);
    *reinterpret_cast<HalvesInMemory*>(halves + i) = h;
  }
  if (i < n) {
    Floats v = {};
    for (int64_t j = i; j < n; ++j) v[j - i] = from[j];
    const Halves h = dtype == Dtype::bfloat16 ? to_bfloat16(v) : to_float16(v);
    for (int64_t j = i; j < n; ++j) halves[j] = h[j - i];
  }
}

void accumulate(const float* addend, int64_t n, float* values) {
  for (int64_t i = 0; i < n; ++i) values[i] += addend[i];
}

// Four sums, so that one does not wait for itself.
double dot(const float* a, const float* b, int64_t n) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) sums[j] += load(a + i + j * W) * load(b + i + j * W);
  }
  for (; i + W <= n; i += W) sums[0] += load(a + i) * load(b + i);
  double sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

void weight(float alpha, const float* a, const float* w, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, alpha * load(a + i) * load(w + i));
  for (; i < n; ++i) out[i] = alpha * a[i] * w[i];
}

void combine(float alpha, const float* a, float beta, const float* b, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, alpha * load(a + i) + beta * load(b + i));
  for (; i < n; ++i) out[i] = alpha * a[i] + beta * b[i];
}

// ------------------------------------------------------------------------------------------------
// Inner products of rows as they lie in memory
// ------------------------------------------------------------------------------------------------

template <Dtype DTYPE>
PERL_INLINE Floats load_as(const void* from, int64_t i) {
  if (DTYPE == Dtype::float32) return load(static_cast<const float*>(from) + i);
  return float_of(
      DTYPE, *reinterpret_cast<const HalvesInMemory*>(static_cast<const uint16_t*>(from) + i));
}

template <Dtype DTYPE>
constexpr int64_t SIZE_OF = DTYPE == Dtype::float32 ? 4 : 2;

// Floats of row[first .. n), zeros behind them.
template <Dtype DTYPE>
PERL_INLINE Floats load_rest(const void* row, int64_t first, int64_t n) {
  float rest[W] = {};
  to_float(static_cast<const char*>(row) + first * SIZE_OF<DTYPE>, DTYPE, 1, n - first, rest);
  return load(rest);
}

// W right rows at a time: four of them side by side, so that a vector of the left rows serves four
// products; then the partial sums of all W in one transposition. Two bfloat16 rows are multiplied
// as pairs where the processor can.
template <Dtype DTYPE, Dtype LEFT_DTYPE, int64_t LEFT>
void dots_of(
    const void* left, int64_t left_stride, const void* right, int64_t right_stride, int64_t count,
    int64_t n, float* out, int64_t ld_out, bool add) {
  constexpr int64_t SIDE = 4;
  const char *left_rows[LEFT], *right_rows[SIDE];
  for (int64_t i = 0; i < LEFT; ++i) {
    left_rows[i] = static_cast<const char*>(left) + i * left_stride * SIZE_OF<LEFT_DTYPE>;
  }
  for (int64_t first = 0; first < count; first += W) {
    Floats found[LEFT][W];
    for (int64_t group = 0; group < W; group += SIDE) {
      Floats sums[SIDE][LEFT] = {};
      for (int64_t j = 0; j < SIDE; ++j) {
        const int64_t row = first + group + j < count ? first + group + j : count - 1;
        right_rows[j] = static_cast<const char*>(right) + row * right_stride * SIZE_OF<DTYPE>;
      }
      int64_t k = 0;
#ifdef PERL_BFLOAT16
      for (; LEFT_DTYPE == Dtype::bfloat16 && k + 2 * W <= n; k += 2 * W) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < SIDE; ++j) {
          const Floats value = load(reinterpret_cast<const float*>(right_rows[j] + 2 * k));
#pragma GCC unroll 4
          for (int64_t i = 0; i < LEFT; ++i) {
            const Floats other = load(reinterpret_cast<const float*>(left_rows[i] + 2 * k));
            sums[j][i] = (Floats)_mm512_dpbf16_ps(
                (__m512)sums[j][i], (__m512bh)other, (__m512bh)value);
          }
        }
      }
#endif
      for (; k + W <= n; k += W) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < SIDE; ++j) {
          const Floats value = load_as<DTYPE>(right_rows[j], k);
#pragma GCC unroll 4
          for (int64_t i = 0; i < LEFT; ++i) {
            sums[j][i] += load_as<LEFT_DTYPE>(left_rows[i], k) * value;
          }
        }
      }
      for (int64_t j = 0; k < n && j < SIDE; ++j) {
        const Floats value = load_rest<DTYPE>(right_rows[j], k, n);
        for (int64_t i = 0; i < LEFT; ++i) {
          sums[j][i] += load_rest<LEFT_DTYPE>(left_rows[i], k, n) * value;
        }
      }
      for (int64_t j = 0; j < SIDE; ++j) {
        for (int64_t i = 0; i < LEFT; ++i) found[i][group + j] = sums[j][i];
      }
    }
    for (int64_t i = 0; i < LEFT; ++i) {
      transpose(found[i]);
      for (int64_t half = W / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) found[i][j] += found[i][j + half];
      }
      float* to = out + i * ld_out + first;
      store(to, add ? load(to) + found[i][0] : found[i][0]);
    }
  }
}

template <Dtype DTYPE, Dtype LEFT_DTYPE>
void dots_as(
    const void* left, int64_t left_stride, int64_t rows, const void* right, int64_t right_stride,
    int64_t count, int64_t n, float* out, int64_t ld_out, bool add) {
  constexpr decltype(&dots_of<DTYPE, LEFT_DTYPE, 1>) OF_ROWS[] = {
      dots_of<DTYPE, LEFT_DTYPE, 1>, dots_of<DTYPE, LEFT_DTYPE, 2>,
      dots_of<DTYPE, LEFT_DTYPE, 3>, dots_of<DTYPE, LEFT_DTYPE, 4>};
  constexpr int64_t MOST = W == 16 ? 4 : 2;  // as many as the registers hold
  for (int64_t i = 0; i < rows; i += MOST) {
    OF_ROWS[(rows - i < MOST ? rows - i : MOST) - 1](
        static_cast<const char*>(left) + i * left_stride * SIZE_OF<LEFT_DTYPE>, left_stride, right,
        right_stride, count, n, out + i * ld_out, ld_out, add);
  }
}

void dots(
    const void* left, Dtype left_dtype, int64_t left_stride, int64_t rows, const void* right,
    Dtype dtype, int64_t right_stride, int64_t count, int64_t n, float* out, int64_t ld_out,
    bool add) {
  auto* as = left_dtype == Dtype::bfloat16 ? dots_as<Dtype::bfloat16, Dtype::bfloat16>
      : dtype == Dtype::bfloat16           ? dots_as<Dtype::bfloat16, Dtype::float32>
      : dtype == Dtype::float16            ? dots_as<Dtype::float16, Dtype::float32>
                                           : dots_as<Dtype::float32, Dtype::float32>;
  as(left, left_stride, rows, right, right_stride, count, n, out, ld_out, add);
}

// W right rows at a time, copied as floats block by block. Each of their elements is spread over the
// lanes, one for each left row: no sum crosses them. The next block is on its way meanwhile: copying
// alone would wait for it.
void spread(
    const float* left, int64_t rows, const void* right, Dtype dtype, int64_t right_stride,
    int64_t count, int64_t n, float* out, int64_t ld_out, bool add) {
  constexpr int64_t STEP = K_BLOCK / W;  // columns to multiply for each of the next W rows
  const int64_t size = dtype == Dtype::float32 ? 4 : 2;
  const auto at = [&](int64_t row, int64_t column) {
    return static_cast<const char*>(right) + (row * right_stride + column) * size;
  };
  alignas(64) float block[W][K_BLOCK];
  for (int64_t first = 0; first < count; first += W) {
    Floats found[COLUMN_PANEL / W][W] = {};
    for (int64_t begin = 0; begin < n; begin += K_BLOCK) {
      const int64_t length = n - begin < K_BLOCK ? n - begin : K_BLOCK;
      for (int64_t j = 0; j < W; ++j) {
        const char* row = at(first + j < count ? first + j : count - 1, begin);
        if (dtype == Dtype::float32 && length == K_BLOCK) {  // calls of memcpy take twice as long
#pragma GCC unroll 32
          for (int64_t k = 0; k < K_BLOCK; k += W) {
            store(block[j] + k, load(reinterpret_cast<const float*>(row) + k));
          }
        } else {
          to_float(row, dtype, 1, length, block[j]);
        }
      }
      const char* next = begin + K_BLOCK < n ? at(first, begin + K_BLOCK) : at(first + W, 0);
      for (int64_t i = 0; i < rows; i += W) {
        Floats sums[W] = {};
        for (int64_t from = 0; from < length; from += STEP) {
          const int64_t to = length - from < STEP ? length : from + STEP;
          for (int64_t k = from; k < to; ++k) {
            // an address past the matrix does no harm
            if (i == 0) __builtin_prefetch(next + (k - from) * W * size, 0, 2);
            const Floats value = load(left + (begin + k) * COLUMN_PANEL + i);
#pragma GCC unroll 16
            for (int64_t j = 0; j < W; ++j) sums[j] += value * all(block[j][k]);
          }
          next += right_stride * size;
        }
        for (int64_t j = 0; j < W; ++j) found[i / W][j] += sums[j];
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (i % W == 0) transpose(found[i / W]);
      float* to = out + i * ld_out + first;
      store(to, add ? load(to) + found[i / W][i % W] : found[i / W][i % W]);
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Dropout: Philox-4x32-7 of counter (column / 8, row, 0, 0), 16 bits for each of 8 columns. A lane
// of 64 bits holds one word of one counter in its low half; what is left in the high half is never
// looked at.
// ------------------------------------------------------------------------------------------------

typedef uint16_t Numbers __attribute__((vector_size(4 * W)));
typedef int16_t Keeps __attribute__((vector_size(4 * W), may_alias));
typedef int16_t SignedHalves __attribute__((vector_size(2 * W), may_alias));
typedef uint64_t Longs __attribute__((vector_size(4 * W)));

// Low 32 bits of every lane times constant, in 64 bits.
PERL_INLINE Longs multiply_low_words(Longs x, uint64_t constant) {
#if !defined(PERL_KERNELS_X86)
  return (x & 0xFFFFFFFF) * constant;
#elif PERL_LANES == 16
  return (Longs)__builtin_ia32_pmuludq512_mask(
      (Ints)x, (Ints)(Longs{} + constant), (SignedLongs){}, 0xFF);
#elif PERL_LANES == 8
  return (Longs)__builtin_ia32_pmuludq256((Ints)x, (Ints)(Longs{} + constant));
#else
  return (Longs)__builtin_ia32_pmuludq128((Ints)x, (Ints)(Longs{} + constant));
#endif
}

#if PERL_LANES == 4
constexpr SignedLongs LOW_LONGS = {0, 2}, HIGH_LONGS = {1, 3};
#elif PERL_LANES == 8
constexpr SignedLongs LOW_LONGS = {0, 4, 1, 5}, HIGH_LONGS = {2, 6, 3, 7};
#else
constexpr SignedLongs LOW_LONGS = {0, 8, 1, 9, 2, 10, 3, 11};
constexpr SignedLongs HIGH_LONGS = {4, 12, 5, 13, 6, 14, 7, 15};
#endif

// keeps[i] = all bits set where element column + i of the row is kept, i < n; room for n rounded
// up to a multiple of 8 W.
PERL_INLINE void keep(
    int64_t n, uint64_t seed, uint16_t threshold, int64_t row, int64_t column, uint16_t* keeps) {
  constexpr int64_t LANES = W / 2, SETS = 2;  // two sets of counters hide the latency of products
  Longs counters;
  for (int64_t i = 0; i < LANES; ++i) counters[i] = i;
  for (int64_t first = 0; first < n; first += SETS * 4 * W) {
    Longs c0[SETS], c1[SETS], c2[SETS], c3[SETS];
    for (int64_t s = 0; s < SETS; ++s) {
      c0[s] = counters + static_cast<uint64_t>((column + first) / 8 + s * LANES);
      c1[s] = Longs{} + static_cast<uint32_t>(row);
      c2[s] = c3[s] = Longs{};
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
#pragma GCC unroll 2
      for (int64_t s = 0; s < SETS; ++s) {
        const Longs product0 = multiply_low_words(c0[s], 0xD2511F53);
        const Longs product1 = multiply_low_words(c2[s], 0xCD9E8D57);
        c0[s] = (product1 >> 32) ^ c1[s] ^ key0;
        c2[s] = (product0 >> 32) ^ c3[s] ^ key1;
        c1[s] = product1;
        c3[s] = product0;
      }
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    for (int64_t s = 0; s < SETS; ++s) {
      const Longs pairs0 = (c0[s] & 0xFFFFFFFF) | (c1[s] << 32);
      const Longs pairs1 = (c2[s] & 0xFFFFFFFF) | (c3[s] << 32);
      uint16_t* to = keeps + first + s * 4 * W;
      *reinterpret_cast<Keeps*>(to) =
          (Numbers)__builtin_shuffle(pairs0, pairs1, LOW_LONGS) >= threshold;
      *reinterpret_cast<Keeps*>(to + 2 * W) =
          (Numbers)__builtin_shuffle(pairs0, pairs1, HIGH_LONGS) >= threshold;
    }
  }
}

void drop(
    void* values, Dtype dtype, int64_t n, uint64_t seed, uint16_t threshold, int64_t row,
    int64_t column) {
  constexpr int64_t STEP = 1024;  // a multiple of what `keep` makes at once
  alignas(64) uint16_t keeps[STEP];
  for (int64_t first = 0; first < n; first += STEP) {
    const int64_t count = n - first < STEP ? n - first : STEP;
    keep(count, seed, threshold, row, column + first, keeps);
    if (dtype == Dtype::float32) {
      float* to = static_cast<float*>(values) + first;
      int64_t i = 0;
      for (; i + W <= count; i += W) {
        const SignedHalves kept = *reinterpret_cast<const SignedHalves*>(keeps + i);
        store(to + i, (Floats)((Ints)load(to + i) & __builtin_convertvector(kept, Ints)));
      }
      for (; i < count; ++i) to[i] = keeps[i] != 0 ? to[i] : 0.0f;
    } else {
      uint16_t* to = static_cast<uint16_t*>(values) + first;
      for (int64_t i = 0; i < count; ++i) to[i] &= keeps[i];
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Exponentials
// ------------------------------------------------------------------------------------------------

// e^x to about one rounding; 0 below -87.3, NaN for NaN, no more than e^88.
PERL_INLINE Floats exp(Floats x) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats bounded = x > 88.0f ? all(88.0f) : x;
  const Floats shifted = bounded * 1.44269504f + SHIFT;
  const Floats power = shifted - SHIFT;
  // log 2 in two parts, so that the remainder is exact
  const Floats r = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats scale = (Floats)(((Ints)shifted << 23) + (127 << 23));
  return x < -87.3f ? Floats{} : p * scale;
}

PERL_INLINE Floats tanh(Floats x) {
  const Floats magnitude = x < 0.0f ? -x : x;
  const Floats bounded = magnitude > 10.0f ? all(10.0f) : magnitude;
  const Floats far = 1.0f - 2.0f / (exp(bounded + bounded) + 1.0f);
  const Floats s = x * x;
  Floats p = all(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const Floats near = p * s * x + x;
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

// ------------------------------------------------------------------------------------------------
// Gated activations. Both are act(g) = g sigmoid(v): v = g, or with (1 + tanh(t)) / 2 = sigmoid(2 t)
// v = 2 sqrt(2 / pi) (g + 0.044715 g^3).
// ------------------------------------------------------------------------------------------------

constexpr float GELU_SLOPE = 1.5957691216f, GELU_CUBE = 0.044715f;

template <bool SILU>
PERL_INLINE Floats exp_of_minus_v(Floats g) {
  return exp(SILU ? -g : -GELU_SLOPE * (g + GELU_CUBE * (g * g * g)));
}

template <bool SILU>
void gated_row(const float* gate, const float* up, int64_t n, float* h) {
  for (int64_t i = 0; i < n; i += W) {
    const Floats g = load(gate + i);
    store(h + i, g / (1.0f + exp_of_minus_v<SILU>(g)) * load(up + i));
  }
}

void gated(const float* gate, const float* up, int64_t n, Activation activation, float* h) {
  (activation == Activation::silu ? gated_row<true> : gated_row<false>)(gate, up, n, h);
}

template <bool SILU>
void gated_gradient_row(float* gate, float* up, float* dh, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const Floats g = load(gate + i), u = load(up + i), d = load(dh + i);
    const Floats e = exp_of_minus_v<SILU>(g), act = g / (1.0f + e), sigmoid = 1.0f / (1.0f + e);
    // act' = sigmoid + act (1 - sigmoid) v', and 1 - sigmoid = e sigmoid
    const Floats dv = SILU ? all(1.0f) : GELU_SLOPE * (1.0f + 3.0f * GELU_CUBE * (g * g));
    const Floats slope = sigmoid + act * (e * sigmoid) * dv;
    store(gate + i, d * u * slope);
    store(up + i, d * act);
    store(dh + i, act * u);
  }
}

void gated_gradient(float* gate, float* up, float* dh, int64_t n, Activation activation) {
  (activation == Activation::silu ? gated_gradient_row<true>
                                  : gated_gradient_row<false>)(gate, up, dh, n);
}

// ------------------------------------------------------------------------------------------------
// Softmax rows
// ------------------------------------------------------------------------------------------------

PERL_INLINE float logit_unit(float temperature, float softcap) {
  return softcap > 0.0f ? softcap / temperature : 1.0f;
}

PERL_INLINE int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

float transform(float* z, const float* bias, int64_t n, float temperature, float softcap) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) z[i] += bias[i];
  }
  for (int64_t i = n; i < padded(n); ++i) z[i] = -INFINITE;
  if (softcap > 0.0f) {
    for (int64_t i = 0; i < n; i += W) store(z + i, tanh(load(z + i) / softcap));
    for (int64_t i = n; i < padded(n); ++i) z[i] = -INFINITE;
  } else if (temperature != 1.0f) {
    for (int64_t i = 0; i < n; i += W) store(z + i, load(z + i) / temperature);
  }
  Floats most = all(LOWEST);
  for (int64_t i = 0; i < n; i += W) most = larger(load(z + i), most);
  return largest_of(most) * logit_unit(temperature, softcap);
}

void fold(const float* z, int64_t n, float m, float unit, double* sums) {
  Floats l = {}, u = {};
  for (int64_t i = 0; i < n; i += W) {
    const Floats centred = load(z + i) * unit - m;
    const Floats e = exp(centred);
    l += e;
    u += e * (e > 0.0f ? centred : Floats{});  // a masked logit of -inf has no say
  }
  sums[0] = sum_of(l);
  sums[1] = sum_of(u);
}

void fold_pair(
    const float* z, const float* zq, int64_t n, float m, float mq, float unit, double* sums) {
  Floats l = {}, u = {}, lq = {}, d = {};
  for (int64_t i = 0; i < n; i += W) {
    const Floats kept = load(z + i), kept_q = load(zq + i), centred = kept * unit - m;
    const Floats e = exp(centred);
    l += e;
    u += e * (e > 0.0f ? centred : Floats{});
    lq += exp(kept_q * unit - mq);
    // the difference first: it is exactly 0 where the logits are alike
    d += e > 0.0f ? e * ((kept - kept_q) * unit) : e;
  }
  sums[0] = sum_of(l);
  sums[1] = sum_of(u);
  sums[2] = sum_of(lq);
  sums[3] = sum_of(d);
}

// d logit / d raw from what `transform` left: with a softcap, the tanh.
template <bool SOFTCAP>
PERL_INLINE Floats slope(Floats z, float temperature) {
  if (!SOFTCAP) return all(1.0f / temperature);
  return z > -INFINITE ? (1.0f - z * z) / temperature : Floats{};
}

template <bool SOFTCAP>
void weigh_row(
    float* z, int64_t n, float m, float temperature, float softcap, double* sums) {
  const float unit = logit_unit(temperature, softcap);
  Floats l = {}, u = {};
  for (int64_t i = 0; i < n; i += W) {
    const Floats kept = load(z + i), centred = kept * unit - m;
    const Floats e = exp(centred);
    l += e;
    u += e * (e > 0.0f ? centred : Floats{});
    store(z + i, e * slope<SOFTCAP>(kept, temperature));
  }
  sums[0] = sum_of(l);
  sums[1] = sum_of(u);
}

void weigh(float* z, int64_t n, float m, float temperature, float softcap, double* sums) {
  for (int64_t i = n; i < padded(n); ++i) z[i] = -INFINITE;
  (softcap > 0.0f ? weigh_row<true> : weigh_row<false>)(z, n, m, temperature, softcap, sums);
}

template <bool SOFTCAP>
void weigh_pair_row(
    float* z, float* zq, int64_t n, float m, float mq, float centre, float temperature,
    float softcap, double* sums) {
  const float unit = logit_unit(temperature, softcap);
  Floats l = {}, u = {}, lq = {}, d = {};
  for (int64_t i = 0; i < n; i += W) {
    const Floats kept = load(z + i), kept_q = load(zq + i), centred = kept * unit - m;
    const Floats e = exp(centred);
    const Floats weighed = e * slope<SOFTCAP>(kept, temperature);
    const Floats delta = e > 0.0f ? (kept - kept_q) * unit - centre : Floats{};
    l += e;
    u += e * (e > 0.0f ? centred : Floats{});
    lq += exp(kept_q * unit - mq);
    d += e * delta;
    store(z + i, weighed);
    store(zq + i, weighed * delta);
  }
  sums[0] = sum_of(l);
  sums[1] = sum_of(u);
  sums[2] = sum_of(lq);
  sums[3] = sum_of(d);
}

void weigh_pair(
    float* z, float* zq, int64_t n, float m, float mq, float centre, float temperature,
    float softcap, double* sums) {
  for (int64_t i = n; i < padded(n); ++i) z[i] = zq[i] = -INFINITE;
  (softcap > 0.0f ? weigh_pair_row<true> : weigh_pair_row<false>)(
      z, zq, n, m, mq, centre, temperature, softcap, sums);
}

// d_log_prob ([j = target] - p) - d_entropy p (log p + entropy) + d_kl p (z - zq - gap),
// in logits, times their slope
template <bool ENTROPY, bool KL, bool SOFTCAP>
void gradient_row(
    float* z, const float* zq, int64_t n, int64_t target, const GradientRow& row,
    float temperature, float softcap) {
  const float unit = logit_unit(temperature, softcap);
  for (int64_t i = 0; i < n; i += W) {
    const Floats kept = load(z + i), logit = kept * unit;
    Floats log_p = (logit - row.peak) - row.log_sum;
    const Floats p = exp(log_p);
    log_p = p > 0.0f ? log_p : Floats{};
    Floats weight = all(-row.d_log_prob);
    if (ENTROPY) weight -= row.d_entropy * (log_p + row.entropy);
    if (KL) weight += row.d_kl * (p > 0.0f ? (kept - load(zq + i)) * unit - row.gap : Floats{});
    Floats dz = p * weight;
    if (target >= i && target < i + W) dz[target - i] += row.d_log_prob;
    store(z + i, dz * slope<SOFTCAP>(kept, temperature));
  }
}

void gradient(
    float* z, const float* zq, int64_t n, int64_t target, const GradientRow& row,
    float temperature, float softcap) {
  for (int64_t i = n; i < padded(n); ++i) z[i] = -INFINITE;
  const bool entropy = row.d_entropy != 0.0f, kl = row.d_kl != 0.0f, capped = softcap > 0.0f;
  auto* run = entropy ? (kl ? (capped ? gradient_row<true, true, true>
                                      : gradient_row<true, true, false>)
                            : (capped ? gradient_row<true, false, true>
                                      : gradient_row<true, false, false>))
                      : (kl ? (capped ? gradient_row<false, true, true>
                                      : gradient_row<false, true, false>)
                            : (capped ? gradient_row<false, false, true>
                                      : gradient_row<false, false, false>));
  run(z, zq, n, target, row, temperature, softcap);
}

}  // namespace

#ifdef PERL_BFLOAT16
constexpr auto MULTIPLY_PAIRS = multiply<true>;
#else
constexpr decltype(Kernels::multiply) MULTIPLY_PAIRS = nullptr;
#endif

const Kernels PERL_TABLE = {
    PERL_NAME, ROW_PANEL, COLUMN_PANEL, multiply<false>, MULTIPLY_PAIRS, outer, interleave, zip,
    to_float, from_float, accumulate, dot, weight, combine, dots, spread, drop, gated,
    gated_gradient, transform, fold, fold_pair, weigh, weigh_pair, gradient,
};

}  // namespace perl_kernels::cpu
