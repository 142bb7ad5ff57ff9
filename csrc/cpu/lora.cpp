#include "lora.h"

#include <ATen/Functions.h>

#include <cstring>

namespace perl_kernels::cpu {

using at::Tensor;
using at::TensorList;

bool better_by_aten(const Tensor& x) {
  if (x.size(0) < 4) return true;
  if (x.scalar_type() == at::kFloat) return !beats_library_in_float32();
  if (x.scalar_type() != at::kBFloat16) return false;
  return has_bfloat16_tiles() || (kernels().multiply_pairs != nullptr && x.size(0) <= 256);
}

Projections::Projections(
    TensorList weight, TensorList bias, TensorList a, TensorList b, at::ArrayRef<double> scale)
    : weight(weight), bias(bias), a(a), b(b), scale(scale), r({0}),
      a_all(a.size() == 1 ? a[0] : at::cat(a)) {
  for (const Tensor& t : a) r.push_back(r.back() + t.size(0));
}

Tensor Projections::part(const Tensor& s, int64_t i) const { return s.slice(1, r[i], r[i + 1]); }

std::vector<Tensor> gradients_of_a(
    const Tensor& ds, const Tensor& x, const Projections& p, const Dropout& dropout) {
  Tensor all = at::empty({p.rank(), x.size(1)}, p.a_all.options());
  transposed_product(Matrix(ds), Matrix(x).dropped(dropout), dropout.gain(), all);
  if (p.count() == 1) return {all};
  std::vector<Tensor> da;
  for (int64_t i = 0; i < p.count(); ++i) {
    da.push_back(
        all.slice(0, p.r[i], p.r[i + 1]).to(p.a[i].scalar_type(), false, /*copy=*/true));
  }
  return da;
}

std::vector<Tensor> gradients_of_b(TensorList dy, const Tensor& s, const Projections& p) {
  std::vector<Tensor> db;
  for (int64_t i = 0; i < p.count(); ++i) {
    // db_i^T = scale_i s_i^T dy_i
    Tensor transposed = at::empty({p.rank(i), p.weight[i].size(0)}, p.b[i].options());
    transposed_product(
        Matrix(p.part(s, i)), Matrix(dy[i]), static_cast<float>(p.scale[i]), transposed);
    db.push_back(transposed.t().contiguous());
  }
  return db;
}

// ------------------------------------------------------------------------------------------------
// By ATen
// ------------------------------------------------------------------------------------------------

namespace {

// Row `row` of x with dropped elements 0 and the others times `gain`, in x's dtype.
void drop_row(const Matrix& x, const Dropout& dropout, int64_t row, float gain, char* to) {
  const Kernels& table = kernels();
  if (x.column_stride == 1 && gain == 1.0f) {
    std::memcpy(to, x.at(row, 0), x.columns * x.element_size());
  } else {
    Buffer floats(x.columns);
    table.to_float(x.at(row, 0), x.dtype, x.column_stride, x.columns, floats.data());
    for (int64_t i = 0; i < x.columns; ++i) floats.data()[i] *= gain;
    table.from_float(floats.data(), x.columns, x.dtype, to);
  }
  dropout.apply(to, x.dtype, x.columns, row, 0);
}

char* row_of(Tensor& out, int64_t row) {
  return static_cast<char*>(out.mutable_data_ptr()) + row * out.stride(0) * out.element_size();
}

}  // namespace

Tensor dropped(const Tensor& x, const Dropout& dropout) {
  Tensor out = at::empty(x.sizes(), x.options());
  const Matrix view(x);
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      drop_row(view, dropout, n, dropout.gain(), row_of(out, n));
    }
  });
  return out;
}

namespace {

// c += alpha left right. A BLAS may start each sum from what is there already, so in float32 long
// ones start anew; in 16 bits that would round once more.
void add_product(Tensor& c, const Tensor& left, const Tensor& right, double alpha) {
  constexpr int64_t SHORT = 64;
  if (c.scalar_type() == at::kFloat && left.size(1) > SHORT) {
    c.add_(at::mm(left, right), alpha);
  } else {
    c.addmm_(left, right, 1, alpha);
  }
}

}  // namespace

Tensor s_by_aten(const Tensor& x, const Projections& p, const Dropout& dropout) {
  const Tensor input = dropout.active() ? dropped(x, dropout) : x;
  return at::mm(input, p.a_all.to(x.scalar_type()).t());
}

void y_by_aten(const Tensor& x, const Tensor& s, const Projections& p, int64_t i, Tensor& y) {
  const Tensor s_i = p.part(s, i), b = p.b[i].to(x.scalar_type()).t();
  if (x.scalar_type() != at::kFloat) {
    // In 16 bits sums are longer than results anyway, and the short product is the cheaper one to
    // write first and read again.
    at::addmm_out(y, p.bias.empty() ? y : p.bias[i], s_i, b, p.bias.empty() ? 0 : 1, p.scale[i]);
    y.addmm_(x, p.weight[i].t());
    return;
  }
  // Short sums are added to long ones: a BLAS may start a sum from what is there already.
  if (p.bias.empty()) {
    at::mm_out(y, x, p.weight[i].t());
  } else {
    at::addmm_out(y, p.bias[i], x, p.weight[i].t());
  }
  add_product(y, s_i, b, p.scale[i]);
}

void ds_by_aten(TensorList dy, const Projections& p, Tensor& ds) {
  for (int64_t i = 0; i < p.count(); ++i) {
    Tensor ds_i = p.part(ds, i);
    at::addmm_out(ds_i, ds_i, dy[i], p.b[i].to(ds.scalar_type()), 0, p.scale[i]);
  }
}

void dx_by_aten(
    TensorList dy, const Tensor& ds, const Projections& p, const Dropout& dropout, Tensor& dx) {
  at::mm_out(dx, dy[0], p.weight[0]);
  for (int64_t i = 1; i < p.count(); ++i) add_product(dx, dy[i], p.weight[i], 1.0);
  const Tensor a = p.a_all.to(dx.scalar_type());
  if (dropout.active()) {
    dx.add_(dropped(at::mm(ds, a), dropout));
  } else {
    add_product(dx, ds, a, 1.0);
  }
}

// ------------------------------------------------------------------------------------------------
// By tiles
// ------------------------------------------------------------------------------------------------

void add_tiles(int64_t item, int64_t size, int64_t most, std::vector<Tile>& tiles) {
  const int64_t width = even_share(size, most, kernels().column_panel);
  for (int64_t j = 0; j < size; j += width) {
    tiles.push_back({item, j, std::min(width, size - j)});
  }
}

namespace {

bool can_pair(TensorList operands) {
  return std::all_of(
      operands.begin(), operands.end(), [](const Tensor& t) { return paired(Matrix(t)); });
}

}  // namespace

Wide::Wide(std::initializer_list<TensorList> operands)
    : pairs(
          kernels().multiply_pairs != nullptr &&
          std::all_of(operands.begin(), operands.end(), can_pair)) {}

void Wide::pack_columns(
    const Tensor& w, int64_t first, int64_t count, float* to, int64_t panel_stride) const {
  const int64_t width = kernels().column_panel;
  if (pairs) {
    pack_pairs_of_rows(Matrix(w), first, count, 0, w.size(0), width, to, panel_stride);
  } else {
    pack(Matrix(w).t(), first, count, 0, w.size(0), width, to, panel_stride);
  }
}

void Wide::multiply(
    const float* rows, int64_t row_panels, int64_t row_panel_stride, const float* columns,
    int64_t column_panels, int64_t column_panel_stride, int64_t length, float* c, int64_t ldc,
    bool add) const {
  const Kernels& table = kernels();
  (pairs ? table.multiply_pairs : table.multiply)(
      rows, row_panels, row_panel_stride, columns, column_panels, column_panel_stride, length, c,
      ldc, add);
}

std::vector<int64_t> starts_of(const Wide& wide, const Projections& p) {
  std::vector<int64_t> starts = {0};
  for (const Tensor& w : p.weight) starts.push_back(starts.back() + wide.length(w.size(0)));
  return starts;
}

ColumnsOfS::ColumnsOfS(const Wide& wide, const Projections& p)
    : wide_(wide), rank_(p.rank()), room_(round_up(rank_, kernels().column_panel)),
      length_(wide.length(p.weight[0].size(1))), packed_(room_ * length_) {
  const int64_t width = kernels().column_panel;
  const Tensor a = wide.pairs ? p.a_all.to(at::kBFloat16).contiguous() : p.a_all;
  pack(wide.view(a), 0, rank_, 0, length_, width, packed_.data(), length_ * width);
}

void ColumnsOfS::multiply(
    const float* x, int64_t x_stride, float gain, int64_t first, int64_t count, PackedRows& rows,
    Tensor& s, int64_t row) const {
  const Kernels& table = kernels();
  Buffer tile(TILE_ROWS * room_);
  wide_.multiply(
      x, ceil_div(count, table.row_panel), x_stride, packed_.data(), room_ / table.column_panel,
      length_ * table.column_panel, length_, tile.data(), room_, false);
  for (int64_t i = 0; i < count * room_; ++i) tile.data()[i] *= gain;
  store_tile(tile.data(), room_, count, rank_, s, row, 0);
  pack(
      Matrix(tile.data(), count, rank_, room_), 0, count, 0, rank_, table.row_panel,
      rows.at(first, rows.length), rows.stride());
}

ColumnsOfY::ColumnsOfY(const Wide& wide, const Projections& p, int64_t most)
    : wide_(wide), p_(p),
      packed_(most * (wide.length(p.weight[0].size(1)) + p.rank())), bias_(most) {}

void ColumnsOfY::pack(int64_t i, int64_t first, int64_t count) {
  const int64_t width = kernels().column_panel, length = wide_.length(p_.weight[i].size(1));
  i_ = i;
  columns_ = count;
  stride_ = (length + p_.rank(i)) * width;
  cpu::pack(
      wide_.view(p_.weight[i]), first, count, 0, length, width, packed_.data(), stride_);
  cpu::pack(
      Matrix(p_.b[i]).scaled(static_cast<float>(p_.scale[i])), first, count, 0, p_.rank(i), width,
      packed_.data() + length * width, stride_);
  if (!p_.bias.empty()) vector_to_float(p_.bias[i], first, count, bias_.data());
}

void ColumnsOfY::multiply(PackedRows& rows, int64_t first, int64_t count, float* tile) {
  const Kernels& table = kernels();
  const int64_t row_panels = ceil_div(count, table.row_panel);
  const int64_t column_panels = ceil_div(columns_, table.column_panel);
  wide_.multiply(
      rows.at(first), row_panels, rows.stride(), packed_.data(), column_panels, stride_,
      rows.length, tile, TILE_COLUMNS, false);
  table.multiply(
      rows.at(first, rows.length + p_.r[i_]), row_panels, rows.stride(),
      packed_.data() + rows.length * table.column_panel, column_panels, stride_, p_.rank(i_), tile,
      TILE_COLUMNS, true);
  if (p_.bias.empty()) return;
  for (int64_t n = 0; n < count; ++n) {
    table.accumulate(bias_.data(), columns_, tile + n * TILE_COLUMNS);
  }
}

ColumnsOfDs::ColumnsOfDs(const Wide& wide, const Projections& p) : wide_(wide), p_(p) {
  const int64_t width = kernels().column_panel;
  for (int64_t i = 0; i < p.count(); ++i) {
    const int64_t length = wide.length(p.weight[i].size(0));
    packed_.emplace_back(round_up(p.rank(i), width) * length);
    const Tensor b = wide.pairs ? p.b[i].to(at::kBFloat16).contiguous() : p.b[i];
    wide.pack_columns(b, 0, p.rank(i), packed_.back().data(), length * width);
  }
}

void ColumnsOfDs::multiply(
    int64_t first, int64_t count, PackedRows& rows, Tensor& ds, int64_t row) const {
  const Kernels& table = kernels();
  int64_t start = 0;
  for (int64_t i = 0; i < p_.count(); ++i) {
    const int64_t length = wide_.length(p_.weight[i].size(0));
    const int64_t room = round_up(p_.rank(i), table.column_panel);
    Buffer tile(TILE_ROWS * room);
    wide_.multiply(
        rows.at(first, start), ceil_div(count, table.row_panel), rows.stride(), packed_[i].data(),
        room / table.column_panel, length * table.column_panel, length, tile.data(), room, false);
    const float factor = static_cast<float>(p_.scale[i]);
    for (int64_t j = 0; j < count * room; ++j) tile.data()[j] *= factor;
    store_tile(tile.data(), room, count, p_.rank(i), ds, row, p_.r[i]);
    start += length;
  }
  pack(
      Matrix(ds), row, count, 0, p_.rank(), table.row_panel, rows.at(first, rows.length),
      rows.stride());
}

ColumnsOfDx::ColumnsOfDx(
    const Wide& wide, const Projections& p, const Dropout& dropout, int64_t most)
    : wide_(wide), p_(p), dropout_(dropout),
      packed_(most * (starts_of(wide, p).back() + p.rank())) {}

void ColumnsOfDx::pack(int64_t first, int64_t count) {
  const int64_t width = kernels().column_panel;
  const std::vector<int64_t> starts = starts_of(wide_, p_);
  const int64_t stride = (starts.back() + p_.rank()) * width;
  first_ = first;
  columns_ = count;
  for (int64_t i = 0; i < p_.count(); ++i) {
    wide_.pack_columns(p_.weight[i], first, count, packed_.data() + starts[i] * width, stride);
  }
  cpu::pack(
      Matrix(p_.a_all).t().scaled(dropout_.gain()), first, count, 0, p_.rank(), width,
      packed_.data() + starts.back() * width, stride);
}

void ColumnsOfDx::multiply(
    PackedRows& rows, int64_t first, int64_t count, int64_t row, float* tile) {
  const Kernels& table = kernels();
  const int64_t row_panels = ceil_div(count, table.row_panel);
  const int64_t column_panels = ceil_div(columns_, table.column_panel);
  const int64_t stride = (rows.length + rows.rank) * table.column_panel;
  table.multiply(
      rows.at(first, rows.length), row_panels, rows.stride(),
      packed_.data() + rows.length * table.column_panel, column_panels, stride, rows.rank, tile,
      TILE_COLUMNS, false);
  if (dropout_.active()) {
    for (int64_t n = 0; n < count; ++n) {
      dropout_.apply(
          tile + n * TILE_COLUMNS, Dtype::float32, columns_, row + n, first_);
    }
  }
  wide_.multiply(
      rows.at(first), row_panels, rows.stride(), packed_.data(), column_panels, stride,
      rows.length, tile, TILE_COLUMNS, true);
}

namespace {

// Rows first .. first + count of x with dropped elements 0.
Tensor drop_rows(const Tensor& x, const Dropout& dropout, int64_t first, int64_t count) {
  const Matrix view(x);
  Tensor out = at::empty({count, view.columns}, x.options());
  for (int64_t n = 0; n < count; ++n) drop_row(view, dropout, first + n, 1.0f, row_of(out, n));
  return out;
}

}  // namespace

void pack_x(
    const Wide& wide, const Tensor& x, const Dropout& dropout, const ColumnsOfS& columns,
    const Blocks& blocks, int64_t row, PackedRows& rows, Tensor& s) {
  const int64_t L = rows.length, panel = kernels().row_panel;
  blocks.stretches([&](int64_t first, int64_t count) {
    const int64_t from = row + first;
    pack(wide.view(x), from, count, 0, L, panel, rows.at(first), rows.stride());
    if (!dropout.active()) {
      columns.multiply(rows.at(first), rows.stride(), 1.0f, first, count, rows, s, from);
      return;
    }
    const Tensor dropped_rows = drop_rows(x, dropout, from, count);
    Buffer input(TILE_ROWS * L);
    pack(wide.view(dropped_rows), 0, count, 0, L, panel, input.data(), L * panel);
    columns.multiply(input.data(), L * panel, dropout.gain(), first, count, rows, s, from);
  });
}

void pack_dy(
    const Wide& wide, TensorList dy, const ColumnsOfDs& columns, const Blocks& blocks,
    int64_t row, PackedRows& rows, Tensor& ds) {
  blocks.stretches([&](int64_t first, int64_t count) {
    int64_t start = 0;
    for (const Tensor& dy_i : dy) {
      const int64_t length = wide.length(dy_i.size(1));
      pack(
          wide.view(dy_i), row + first, count, 0, length, kernels().row_panel,
          rows.at(first, start), rows.stride());
      start += length;
    }
    columns.multiply(first, count, rows, ds, row + first);
  });
}

void write_y(
    const Wide& wide, const Projections& p, PackedRows& rows, const Blocks& blocks, int64_t row,
    std::vector<Tensor>& y) {
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < p.count(); ++i) add_tiles(i, y[i].size(1), TILE_COLUMNS, tiles);
  blocks.items(tiles, [&](int64_t begin, int64_t end) {
    ColumnsOfY columns(wide, p, TILE_COLUMNS);
    Buffer tile(TILE_ROWS * TILE_COLUMNS);
    int64_t packed_tile = -1;
    for (int64_t item = begin; item < end; ++item) {
      const auto [i, column, count] = tiles[item / blocks.count];
      if (packed_tile != item / blocks.count) {
        packed_tile = item / blocks.count;
        columns.pack(i, column, count);
      }
      const int64_t first = item % blocks.count * blocks.size;
      const int64_t n = blocks.rows_of(item % blocks.count);
      columns.multiply(rows, first, n, tile.data());
      store_tile(tile.data(), TILE_COLUMNS, n, count, y[i], row + first, column);
    }
  });
}

void write_dx(
    const Wide& wide, const Projections& p, const Dropout& dropout, PackedRows& rows,
    const Blocks& blocks, int64_t row, Tensor& dx) {
  std::vector<Tile> tiles;
  add_tiles(0, dx.size(1), TILE_COLUMNS, tiles);
  blocks.items(tiles, [&](int64_t begin, int64_t end) {
    ColumnsOfDx columns(wide, p, dropout, TILE_COLUMNS);
    Buffer tile(TILE_ROWS * TILE_COLUMNS);
    int64_t packed_tile = -1;
    for (int64_t item = begin; item < end; ++item) {
      const auto [_, column, count] = tiles[item / blocks.count];
      if (packed_tile != item / blocks.count) {
        packed_tile = item / blocks.count;
        columns.pack(column, count);
      }
      const int64_t first = item % blocks.count * blocks.size;
      const int64_t n = blocks.rows_of(item % blocks.count);
      columns.multiply(rows, first, n, row + first, tile.data());
      store_tile(tile.data(), TILE_COLUMNS, n, count, dx, row + first, column);
    }
  });
}

}  // namespace perl_kernels::cpu
