// Frozen linear layers with adapters, by packed tiles and by ATen: what lora_linear.cpp and
// lora_mlp.cpp are made of. The letters are those of AGENTS.md; i numbers projections of one input.
//
// The adapter is not a second product over y: its rank extends the inner dimension. Packed rows
// are [x | scale_0 s_0 | scale_1 s_1 | ...], packed columns [weight_i | b_i], and one accumulator
// runs over D and then over R_i. Backward likewise: rows [dy_0 | dy_1 | ... | ds], columns
// [weight_0^T | weight_1^T | ... | a^T]; with dropout the adapter's part first, so that its mask can
// be applied before the rest is added.
//
// Where packing does not pay (few rows) or the library's products are the faster ones, they go to
// ATen instead, with the adapter added to its result in place.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

#include "matrix.h"

namespace perl_kernels::cpu {

constexpr int64_t PACKED_BYTES = int64_t{8} << 20;  // of rows at once

// ATen's operators inside ours are neither recorded nor cast again.
struct PlainOperators {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset};
};

// Whether ATen's products are the faster ones. For a few rows, always: nothing is packed. Its
// float32 products come from MKL, which uses AVX-512 on Intel's processors alone; its bfloat16
// products are slow without instructions for them, faster than ours with AMX, and with AVX-512 as
// long as there are too few rows to pay for packing the weight.
bool better_by_aten(const at::Tensor& x);

// Projections of one input. The tensors are the caller's.
struct Projections {
  at::TensorList weight;  // (O_i, D)
  at::TensorList bias;    // (O_i,), or no bias at all
  at::TensorList a;       // (R_i, D)
  at::TensorList b;       // (O_i, R_i)
  at::ArrayRef<double> scale;
  std::vector<int64_t> r;  // where each one's ranks start among all
  at::Tensor a_all;        // (R, D)

  Projections(
      at::TensorList weight, at::TensorList bias, at::TensorList a, at::TensorList b,
      at::ArrayRef<double> scale);
  int64_t count() const { return static_cast<int64_t>(weight.size()); }
  int64_t rank() const { return r.back(); }
  int64_t rank(int64_t i) const { return r[i + 1] - r[i]; }
  at::Tensor part(const at::Tensor& s, int64_t i) const;  // the columns of s that are s_i
};

// ------------------------------------------------------------------------------------------------
// By ATen
// ------------------------------------------------------------------------------------------------

// dropout(x) a^T
at::Tensor s_by_aten(const at::Tensor& x, const Projections& p, const Dropout& dropout);
// y = x weight_i^T + bias_i + scale_i s_i b_i^T
void y_by_aten(
    const at::Tensor& x, const at::Tensor& s, const Projections& p, int64_t i, at::Tensor& y);
// ds_i = scale_i dy_i b_i
void ds_by_aten(at::TensorList dy, const Projections& p, at::Tensor& ds);
// dx = sum of dy_i weight_i + dropout'(ds a)
void dx_by_aten(
    at::TensorList dy, const at::Tensor& ds, const Projections& p, const Dropout& dropout,
    at::Tensor& dx);

// Zeros dropped elements of x, whose rows are contiguous; without the gain.
void drop_in_place(at::Tensor& x, const Dropout& dropout);

// ------------------------------------------------------------------------------------------------
// Gradients of the adapters
// ------------------------------------------------------------------------------------------------

// da_i = ds_i^T dropout(x) ; db_i = scale_i dy_i^T s_i. Each in its parameter's dtype.
std::vector<at::Tensor> gradients_of_a(
    const at::Tensor& ds, const at::Tensor& x, const Projections& p, const Dropout& dropout);
std::vector<at::Tensor> gradients_of_b(
    at::TensorList dy, const at::Tensor& s, const Projections& p);

// sums (R, D) += left (N, R)^T right (N, D), in float32
void add_transposed_product(const at::Tensor& left, const at::Tensor& right, at::Tensor& sums);

// ------------------------------------------------------------------------------------------------
// By tiles: how the work is cut
// ------------------------------------------------------------------------------------------------

struct Tile {
  int64_t item, first, count;  // which projection; which of its columns
};

// Even tiles of `size` columns, no wider than `most`.
void add_tiles(int64_t item, int64_t size, int64_t most, std::vector<Tile>& tiles);

// Rows of a group in even blocks. Panels of packed rows follow each other through all blocks.
struct Blocks {
  const int64_t rows, size, count;

  explicit Blocks(int64_t rows)
      : rows(rows), size(even_share(rows, TILE_ROWS, kernels().row_panel)),
        count(ceil_div(rows, size)) {}
  int64_t rows_of(int64_t block) const { return std::min(size, rows - block * size); }

  // Calls work(first row, rows) for stretches of at most `size` rows that begin at a panel.
  template <class Work>
  void stretches(const Work& work) const {
    const int64_t panel = kernels().row_panel;
    at::parallel_for(0, ceil_div(rows, panel), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * panel; row < std::min(end * panel, rows); row += size) {
        work(row, std::min({size, end * panel - row, rows - row}));
      }
    });
  }

  // Calls work(begin, end) on runs of (tile, block) items, numbered tile * count + block.
  template <class Work>
  void items(const std::vector<Tile>& tiles, const Work& work) const {
    std::vector<int64_t> weights;
    for (const Tile& tile : tiles) {
      for (int64_t block = 0; block < count; ++block) {
        weights.push_back(
            round_up(tile.count, kernels().column_panel) *
            round_up(rows_of(block), kernels().row_panel));
      }
    }
    parallel_by_weight(weights, work);
  }
};

// Calls work(tiles) on the even tiles of each thread's own share of `size` columns.
template <class Work>
void parallel_by_columns(int64_t size, int64_t most, const Work& work) {
  const int64_t panel = kernels().column_panel, panels = ceil_div(size, panel);
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = panels * begin / threads * panel;
    std::vector<Tile> tiles;
    add_tiles(0, std::min(panels * end / threads * panel, size) - first, most, tiles);
    for (Tile& tile : tiles) tile.first += first;
    if (!tiles.empty()) work(tiles);
  });
}

// ------------------------------------------------------------------------------------------------
// By tiles: packed operands
// ------------------------------------------------------------------------------------------------

// What the panels of one call hold: float32, or pairs of bfloat16 in the place of floats where the
// processor multiplies those and the tensors can be read in pairs.
struct Panels {
  const bool pairs;

  // `operands` are the wide tensors.
  explicit Panels(std::initializer_list<at::TensorList> operands);

  // Floats that `k` inner elements take in a panel.
  int64_t length(int64_t k) const { return pairs ? ceil_div(k, 2) : k; }
  Matrix view(const at::Tensor& t) const { return pairs ? pairs_of(Matrix(t)) : Matrix(t); }
  // A small tensor as `view` can read it: where it has an odd column more, that is 0.
  at::Tensor readable(const at::Tensor& t) const;

  // Columns first .. first + count of w (K, columns) as a right operand.
  void pack_columns(
      const at::Tensor& w, int64_t first, int64_t count, float* to, int64_t panel_stride) const;
  // A tile of floats, `ld` between its rows, as inner elements of packed rows.
  void pack_tile(
      const float* tile, int64_t ld, int64_t rows, int64_t count, float* to,
      int64_t panel_stride) const;
  void multiply(
      const float* rows, int64_t row_panels, int64_t row_panel_stride, const float* columns,
      int64_t column_panels, int64_t column_panel_stride, int64_t length, float* c, int64_t ldc,
      bool add) const;
};

// Projections as panels are packed from them.
struct Operands {
  const Projections& p;
  const Panels panels;
  const at::Tensor a;               // (R, D)
  const std::vector<at::Tensor> b;  // (O_i, R_i)
  // Where s_i starts among the floats of a row's adapter part, and dy_i among those of its wide
  // part; then the length of all.
  std::vector<int64_t> s, dy;

  Operands(const Projections& p, const Panels& panels);
  int64_t x_length() const { return panels.length(p.weight[0].size(1)); }
  int64_t ds_length() const { return panels.length(p.rank()); }
};

// The packed rows of a group: `wide` floats, then `narrow` ones of the adapters.
class PackedRows {
 public:
  const int64_t wide, narrow;

  PackedRows(int64_t rows, int64_t wide, int64_t narrow)
      : wide(wide), narrow(narrow), buffer_(rows * (wide + narrow)) {}
  // From inner k of the panel that begins with `row`.
  float* at(int64_t row, int64_t k = 0) {
    return buffer_.data() + row * (wide + narrow) + k * kernels().row_panel;
  }
  int64_t stride() const { return (wide + narrow) * kernels().row_panel; }

 private:
  Buffer buffer_;
};

// Packed right operands, each named by what it makes of packed rows. Tiles of results are float32
// with TILE_COLUMNS between rows; `first` and `count` are rows of a group, first at a panel.

// s = x a^T of all projections
class ColumnsOfS {
 public:
  explicit ColumnsOfS(const Operands& o);
  // From packed x, or dropped x without the gain, into `s` from row `row` on; and scale_i s_i are
  // packed into rows.
  void multiply(
      const float* x, int64_t x_stride, float gain, int64_t first, int64_t count,
      PackedRows& rows, at::Tensor& s, int64_t row) const;

 private:
  const Operands& o_;
  const int64_t room_;
  Buffer packed_;
};

// Some columns of y_i = [x | scale_i s_i] [weight_i | b_i]^T + bias_i
class ColumnsOfY {
 public:
  ColumnsOfY(const Operands& o, int64_t most);
  void pack(int64_t i, int64_t first, int64_t count);
  void multiply(PackedRows& rows, int64_t first, int64_t count, float* tile);

 private:
  const Operands& o_;
  int64_t i_ = 0, columns_ = 0, stride_ = 0;
  Buffer packed_, bias_;
};

// ds_i = scale_i dy_i b_i
class ColumnsOfDs {
 public:
  explicit ColumnsOfDs(const Operands& o);
  // From packed dy, into ds (float32) from row `row` on; times the gain they are packed into rows.
  void multiply(
      float gain, int64_t first, int64_t count, PackedRows& rows, at::Tensor& ds,
      int64_t row) const;

 private:
  const Operands& o_;
  std::vector<Buffer> packed_;
};

// Some columns of dx = sum of dy_i weight_i + dropout'(ds a)
class ColumnsOfDx {
 public:
  ColumnsOfDx(const Operands& o, const Dropout& dropout, int64_t most);
  void pack(int64_t first, int64_t count);
  // row: the mask's row of `first`
  void multiply(PackedRows& rows, int64_t first, int64_t count, int64_t row, float* tile);

 private:
  const Operands& o_;
  const Dropout& dropout_;
  int64_t first_ = 0, columns_ = 0;
  Buffer packed_;
};

// The rows of a group, from row `row` on, packed: [x | scale s] with s = dropout(x) a^T, which is
// stored too; [dy | ds] with ds = scale dy b, likewise.
void pack_x(
    const Operands& o, const at::Tensor& x, const Dropout& dropout, const ColumnsOfS& columns,
    const Blocks& blocks, int64_t row, PackedRows& rows, at::Tensor& s);
void pack_dy(
    const Operands& o, at::TensorList dy, const Dropout& dropout, const ColumnsOfDs& columns,
    const Blocks& blocks, int64_t row, PackedRows& rows, at::Tensor& ds);

// [x | scale s] from an s that is there.
void pack_x_again(
    const Operands& o, const at::Tensor& x, const at::Tensor& s, const Blocks& blocks, int64_t row,
    PackedRows& rows);

// From them, these rows of y, or of dx.
void write_y(
    const Operands& o, PackedRows& rows, const Blocks& blocks, int64_t row,
    std::vector<at::Tensor>& y);
void write_dx(
    const Operands& o, const Dropout& dropout, PackedRows& rows, const Blocks& blocks,
    int64_t row, at::Tensor& dx);

}  // namespace perl_kernels::cpu
