#include "matrix.h"

#include <c10/core/impl/alloc_cpu.h>

#include <cstring>
#include <limits>
#include <map>

namespace perl_kernels::cpu {

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_TYPE(
          false, "tensor is ", tensor.scalar_type(),
          "; the compiled kernels want float32, bfloat16 or float16");
  }
}

Matrix::Matrix(const at::Tensor& tensor)
    : data(static_cast<const char*>(tensor.const_data_ptr())), dtype(dtype_of(tensor)),
      rows(tensor.size(0)), columns(tensor.size(1)), row_stride(tensor.stride(0)),
      column_stride(tensor.stride(1)) {
  TORCH_CHECK_VALUE(tensor.is_cpu(), "tensor is on ", tensor.device(), "; wanted cpu");
}

bool paired(const Matrix& m) {
  return m.dtype == Dtype::bfloat16 && m.column_stride == 1 && m.columns % 2 == 0 &&
      m.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(m.data) % 4 == 0;
}

Matrix pairs_of(const Matrix& m) {
  return Matrix(reinterpret_cast<const float*>(m.data), m.rows, m.columns / 2, m.row_stride / 2);
}

Matrix Matrix::t() const {
  Matrix other = *this;
  std::swap(other.rows, other.columns);
  std::swap(other.row_stride, other.column_stride);
  other.transposed = !transposed;
  return other;
}

Matrix Matrix::scaled(float factor) const {
  Matrix other = *this;
  other.scale *= factor;
  return other;
}

Matrix Matrix::dropped(const Dropout& mask) const {
  Matrix other = *this;
  if (mask.active()) other.dropout = &mask;
  return other;
}

namespace {

constexpr int64_t STRIP = 256;      // floats of one row converted at a time
constexpr int64_t WIDEST_PANEL = 32;

// Ask for `bytes` of a row that is soon to be read: rows of a tile are a page apart, where the
// processor does not look ahead.
void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

constexpr int64_t ROWS_AHEAD = 12;

// n elements of m from (p, k), going along k (or along p), as floats.
void load_strip(const Matrix& m, int64_t p, int64_t k, bool along_k, int64_t n, float* to) {
  const Kernels& table = kernels();
  table.to_float(m.at(p, k), m.dtype, along_k ? m.column_stride : m.row_stride, n, to);
  if (m.scale != 1.0f) {
    for (int64_t i = 0; i < n; ++i) to[i] *= m.scale;
  }
  if (m.dropout != nullptr) {
    const int64_t row = m.transposed ? k : p, column = m.transposed ? p : k;
    m.dropout->apply(to, Dtype::float32, n, row, column);
  }
}

void pack_along_k(
    const Matrix& m, int64_t p, int64_t p_count, int64_t k, int64_t k_count, int64_t width,
    float* to, int64_t panel_stride) {
  const Kernels& table = kernels();
  constexpr int64_t LD = STRIP + 16;  // so that rows do not fall on the same cache sets
  alignas(64) float strips[WIDEST_PANEL * LD];
  const bool plain = m.dtype == Dtype::float32 && m.column_stride == 1 && m.scale == 1.0f &&
      m.dropout == nullptr;
  for (int64_t first = 0; first < p_count; first += width, to += panel_stride) {
    const int64_t present = std::min(width, p_count - first);
    if (plain && present == width) {
      const float* from = reinterpret_cast<const float*>(m.at(p + first, k));
      for (int64_t i = 0; i < std::min(width, p_count - first - width); ++i) {
        prefetch(from + (width + i) * m.row_stride, 4 * k_count);  // the next panel
      }
      table.interleave(from, m.row_stride, width, k_count, to);
      continue;
    }
    std::fill(strips + present * LD, strips + width * LD, 0.0f);
    for (int64_t step = 0; step < k_count; step += STRIP) {
      const int64_t n = std::min(STRIP, k_count - step);
      for (int64_t i = 0; i < present; ++i) {
        load_strip(m, p + first + i, k + step, true, n, strips + i * LD);
      }
      table.interleave(strips, LD, width, n, to + step * width);
    }
  }
}

template <int64_t WIDTH>
void pack_along_p(
    const Matrix& m, int64_t p, int64_t p_count, int64_t k, int64_t k_count, float* to,
    int64_t panel_stride) {
  constexpr int64_t STRIP_PANELS = STRIP / WIDTH;
  alignas(64) float strip[STRIP];
  const bool plain = m.dtype == Dtype::float32 && m.row_stride == 1 && m.scale == 1.0f &&
      m.dropout == nullptr;
  for (int64_t step = 0; step < k_count; ++step) {
    if (m.row_stride == 1 && step + ROWS_AHEAD < k_count) {
      prefetch(m.at(p, k + step + ROWS_AHEAD), p_count * m.element_size());
    }
    for (int64_t first = 0; first < p_count; first += STRIP_PANELS * WIDTH) {
      const int64_t present = std::min(STRIP_PANELS * WIDTH, p_count - first);
      const int64_t panels = ceil_div(present, WIDTH);
      const float* from = strip;
      if (plain && present % WIDTH == 0) {
        from = reinterpret_cast<const float*>(m.at(p + first, k + step));
      } else {
        load_strip(m, p + first, k + step, false, present, strip);
        std::fill(strip + present, strip + panels * WIDTH, 0.0f);
      }
      float* panel = to + (first / WIDTH) * panel_stride + step * WIDTH;
      for (int64_t i = 0; i < panels; ++i, panel += panel_stride) {
        std::memcpy(panel, from + i * WIDTH, WIDTH * sizeof(float));
      }
    }
  }
}

}  // namespace

namespace {

// Under AddressSanitizer every scratch block is its own, and full of NaN.
#ifdef __SANITIZE_ADDRESS__
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif

// Blocks that one thread gave back, by size.
struct Kept {
  std::multimap<int64_t, void*> blocks;
  int64_t bytes = 0;

  ~Kept() {
    for (const auto& block : blocks) c10::free_cpu(block.second);
  }

  // A block of at least `wanted` bytes and no more than twice that, or null.
  void* take(int64_t wanted, int64_t* size) {
    const auto found = blocks.lower_bound(wanted);
    if (found == blocks.end() || found->first > 2 * wanted) return nullptr;
    void* block = found->second;
    *size = found->first;
    bytes -= found->first;
    blocks.erase(found);
    return block;
  }

  bool keep(void* block, int64_t size) {
    if (SANITIZED || bytes + size > Buffer::KEPT_BYTES) return false;
    bytes += size;
    blocks.emplace(size, block);
    return true;
  }
};

thread_local Kept kept;

}  // namespace

Buffer::Buffer(int64_t floats) {
  if (floats <= 0) return;
  bytes_ = floats * static_cast<int64_t>(sizeof(float));
  void* block = kept.take(bytes_, &bytes_);
  data_ = static_cast<float*>(block != nullptr ? block : c10::alloc_cpu(bytes_));
  if (SANITIZED) std::fill(data_, data_ + floats, std::numeric_limits<float>::quiet_NaN());
}

Buffer::Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
  other.data_ = nullptr;
}

Buffer::~Buffer() {
  if (data_ != nullptr && !kept.keep(data_, bytes_)) c10::free_cpu(data_);
}

void pack_pairs_of_rows(
    const Matrix& m, int64_t p, int64_t p_count, int64_t k, int64_t k_count, int64_t width,
    float* to, int64_t panel_stride) {
  const Kernels& table = kernels();
  const std::vector<uint16_t> zeros(width);
  for (int64_t step = 0; step < k_count; step += 2) {
    for (int64_t i = step + ROWS_AHEAD; i < std::min(step + ROWS_AHEAD + 2, k_count); ++i) {
      prefetch(m.at(k + i, p), 2 * p_count);
    }
    for (int64_t first = 0; first < p_count; first += width) {
      const int64_t n = std::min(width, p_count - first);
      auto row = [&](int64_t i) {
        return i < k_count ? reinterpret_cast<const uint16_t*>(m.at(k + i, p + first))
                           : zeros.data();
      };
      float* panel = to + first / width * panel_stride + step / 2 * width;
      table.zip(row(step), row(step + 1), n, panel);
      std::fill(panel + n, panel + width, 0.0f);
    }
  }
}

void pack(
    const Matrix& m, int64_t p, int64_t p_count, int64_t k, int64_t k_count, int64_t width,
    float* to, int64_t panel_stride) {
  // Strips go along contiguous memory, but along the mask's rows where there is a mask.
  const bool along_k =
      m.dropout != nullptr ? !m.transposed : m.column_stride == 1 || m.row_stride != 1;
  if (along_k) return pack_along_k(m, p, p_count, k, k_count, width, to, panel_stride);
  // every width of a table as a constant, so that copying a panel's row is a few moves
  auto* along_p = width == 6 ? pack_along_p<6> : width == 8 ? pack_along_p<8>
      : width == 12 ? pack_along_p<12> : width == 16 ? pack_along_p<16> : pack_along_p<32>;
  along_p(m, p, p_count, k, k_count, to, panel_stride);
}

int64_t length_of_left_pairs(int64_t rows, int64_t columns) {
  return round_up(columns, kernels().row_panel) * ceil_div(rows, 2);
}

void pack_left_pairs(const Matrix& small, float* to) {
  const Kernels& table = kernels();
  const int64_t N = small.rows, R = small.columns;
  Buffer rounded(ceil_div(N * R, 2));
  at::BFloat16* rows = reinterpret_cast<at::BFloat16*>(rounded.data());
  at::parallel_for(0, N, 256, [&](int64_t begin, int64_t end) {
    Buffer row(R);
    for (int64_t n = begin; n < end; ++n) {
      table.to_float(small.at(n, 0), small.dtype, small.column_stride, R, row.data());
      table.from_float(row.data(), R, Dtype::bfloat16, rows + n * R);
    }
  });
  pack_pairs_of_rows(
      Matrix(rows, N, R), 0, R, 0, N, table.row_panel, to, ceil_div(N, 2) * table.row_panel);
}

namespace {

// The same where big is bfloat16, contiguous in columns, and the processor multiplies pairs of it.
void transposed_product_of_pairs(
    const Matrix& small, const Matrix& big, float alpha, at::Tensor& out) {
  constexpr int64_t ROWS_AT_ONCE = 240;
  const Kernels& table = kernels();
  const int64_t N = small.rows, R = small.columns, C = big.columns;
  const int64_t tile_columns =
      even_share(ceil_div(C, at::get_num_threads()), TILE_COLUMNS, table.column_panel);
  const int64_t row_panels = ceil_div(R, table.row_panel);

  Buffer packed(length_of_left_pairs(N, R));
  pack_left_pairs(small, packed.data());
  const int64_t left_stride = ceil_div(N, 2) * table.row_panel;

  at::parallel_for(0, ceil_div(C, tile_columns), 1, [&](int64_t begin, int64_t end) {
    Buffer columns_packed(tile_columns * ROWS_AT_ONCE / 2);
    Buffer sum(row_panels * table.row_panel * tile_columns);
    Buffer kept(big.dropout != nullptr ? ROWS_AT_ONCE * tile_columns / 2 : 0);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * tile_columns, columns = std::min(tile_columns, C - column);
      for (int64_t first = 0; first < N; first += ROWS_AT_ONCE) {
        const int64_t count = std::min(ROWS_AT_ONCE, N - first);
        const int64_t stride = ceil_div(count, 2) * table.column_panel;
        Matrix right = big;
        int64_t p = column, k = first;
        if (big.dropout != nullptr) {
          at::BFloat16* to = reinterpret_cast<at::BFloat16*>(kept.data());
          for (int64_t i = 0; i < count; ++i) {
            std::memcpy(to + i * columns, big.at(first + i, column), 2 * columns);
            big.dropout->apply(to + i * columns, Dtype::bfloat16, columns, first + i, column);
          }
          right = Matrix(to, count, columns);
          p = k = 0;
        }
        pack_pairs_of_rows(
            right, p, columns, k, count, table.column_panel, columns_packed.data(), stride);
        table.multiply_pairs(
            packed.data() + first / 2 * table.row_panel, row_panels, left_stride,
            columns_packed.data(), ceil_div(columns, table.column_panel), stride,
            ceil_div(count, 2), sum.data(), tile_columns, first > 0);
      }
      for (int64_t i = 0; i < R * tile_columns; ++i) sum.data()[i] *= alpha;
      store_tile(sum.data(), tile_columns, R, columns, out, 0, column);
    }
  });
}

}  // namespace

void transposed_product(const Matrix& small, const Matrix& big, float alpha, at::Tensor& out) {
  if (kernels().multiply_pairs != nullptr && big.dtype == Dtype::bfloat16 &&
      big.column_stride == 1 && small.rows > 0) {
    return transposed_product_of_pairs(small, big, alpha, out);
  }
  constexpr int64_t ROWS_PER_SUM = 120;
  const Kernels& table = kernels();
  const int64_t N = small.rows, R = small.columns, C = big.columns, width = table.row_panel;
  // tiles of at most 256 columns, and as many for each thread
  const int64_t threads = at::get_num_threads();
  const int64_t C_TILE = even_share(ceil_div(C, threads), 256, table.column_panel);
  Buffer packed(round_up(N, width) * R);
  at::parallel_for(0, ceil_div(N, width), 64, [&](int64_t begin, int64_t end) {
    const int64_t row = begin * width;
    pack(
        small, row, std::min(end * width, N) - row, 0, R, width, packed.data() + row * R,
        R * width);
  });
  const bool plain = big.dtype == Dtype::float32 && big.column_stride == 1 &&
      big.scale == 1.0f && big.dropout == nullptr;
  at::parallel_for(0, ceil_div(C, C_TILE), 1, [&](int64_t begin, int64_t end) {
    Buffer sum(R * C_TILE), part(R * C_TILE), strips(width * C_TILE);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile * C_TILE, columns = std::min(C_TILE, C - column);
      std::fill(sum.data(), sum.data() + R * C_TILE, 0.0f);
      // sums of sums, as in Kernels::multiply
      for (int64_t first = 0; first < N; first += ROWS_PER_SUM) {
        std::fill(part.data(), part.data() + R * C_TILE, 0.0f);
        for (int64_t row = first; row < std::min(first + ROWS_PER_SUM, N); row += width) {
          const float* right = reinterpret_cast<const float*>(big.at(row, column));
          int64_t ld = big.row_stride;
          if (!plain || row + width > N || columns < C_TILE) {
            right = strips.data();
            ld = C_TILE;
            std::fill(strips.data(), strips.data() + width * C_TILE, 0.0f);
            for (int64_t i = 0; i < std::min(width, N - row); ++i) {
              if (row + i + ROWS_AHEAD < N) {
                prefetch(big.at(row + i + ROWS_AHEAD, column), columns * big.element_size());
              }
              load_strip(big, row + i, column, true, columns, strips.data() + i * C_TILE);
            }
          }
          table.outer(packed.data() + row * R, R, right, ld, columns, part.data(), C_TILE);
        }
        table.accumulate(part.data(), R * C_TILE, sum.data());
      }
      for (int64_t i = 0; i < R * C_TILE; ++i) sum.data()[i] *= alpha;
      store_tile(sum.data(), C_TILE, R, columns, out, 0, column);
    }
  });
}

void store_tile(
    const float* c, int64_t ldc, int64_t rows, int64_t columns, at::Tensor& out, int64_t row,
    int64_t column) {
  const Kernels& table = kernels();
  const Dtype dtype = dtype_of(out);
  const int64_t size = dtype == Dtype::float32 ? 4 : 2, stride = out.stride(0);
  char* to = static_cast<char*>(out.mutable_data_ptr()) + (row * stride + column) * size;
  for (int64_t i = 0; i < rows; ++i, to += stride * size) {
    table.from_float(c + i * ldc, columns, dtype, to);
  }
}

void vector_to_float(const at::Tensor& vector, int64_t first, int64_t count, float* to) {
  const Matrix row(vector.unsqueeze(0));
  kernels().to_float(row.at(0, first), row.dtype, row.column_stride, count, to);
}

int64_t rows_at_once(int64_t rows, int64_t bytes_per_row, int64_t max_bytes) {
  const int64_t most = std::max(TILE_ROWS, max_bytes / std::max<int64_t>(bytes_per_row, 1));
  const int64_t shares = ceil_div(rows, most);
  return round_up(ceil_div(rows, std::max<int64_t>(shares, 1)), TILE_ROWS);
}

}  // namespace perl_kernels::cpu
