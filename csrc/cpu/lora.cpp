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

// out = x with dropped elements 0 and the others times `gain`
void drop_rows(const Tensor& x, const Dropout& dropout, float gain, Tensor& out) {
  const Matrix view(x);
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) drop_row(view, dropout, n, gain, row_of(out, n));
  });
}

// c += alpha left right. A BLAS may start each sum from what is there already, so in float32 long
// ones start anew; in 16 bits that would round once more.
void add_product(Tensor& c, const Tensor& left, const Tensor& right, double alpha) {
  constexpr int64_t SHORT = 64;
  if (left.size(1) == 0) return;  // an adapter of rank 0; ATen would multiply c by 1
  if (c.scalar_type() == at::kFloat && left.size(1) > SHORT) {
    c.add_(at::mm(left, right), alpha);
  } else {
    c.addmm_(left, right, 1, alpha);
  }
}

// Calls work(first row, rows, scratch) for groups of the rows of x (N, D); scratch
// (rows, D) is of its dtype and stays in the second cache.
template <class Work>
void in_groups(const Tensor& x, const Work& work) {
  constexpr int64_t SCRATCH_BYTES = int64_t{1} << 20;
  const int64_t N = x.size(0), D = x.size(1), row_bytes = D * x.element_size();
  const int64_t most = std::min(N, rows_at_once(N, row_bytes, SCRATCH_BYTES));
  Buffer room(ceil_div(most * row_bytes, static_cast<int64_t>(sizeof(float))));
  for (int64_t first = 0; first < N; first += most) {
    const int64_t count = std::min(most, N - first);
    work(first, count, at::from_blob(room.data(), {count, D}, x.options()));
  }
}

}  // namespace

void drop_in_place(Tensor& x, const Dropout& dropout) {
  if (!dropout.active()) return;
  at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      dropout.apply(row_of(x, n), dtype_of(x), x.size(1), n, 0);
    }
  });
}

Tensor s_by_aten(const Tensor& x, const Projections& p, const Dropout& dropout) {
  const Tensor a = p.a_all.to(x.scalar_type()).t();
  if (!dropout.active()) return at::mm(x, a);
  Tensor s = at::empty({x.size(0), p.rank()}, x.options());
  in_groups(x, [&](int64_t first, int64_t count, Tensor input) {
    drop_rows(x.slice(0, first, first + count), dropout.from(first), dropout.gain(), input);
    Tensor rows = s.slice(0, first, first + count);
    at::mm_out(rows, input, a);
  });
  return s;
}

void y_by_aten(const Tensor& x, const Tensor& s, const Projections& p, int64_t i, Tensor& y) {
  const Tensor s_i = p.part(s, i), b = p.b[i].to(x.scalar_type()).t();
  if (x.scalar_type() != at::kFloat && p.rank(i) > 0) {
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
  if (!dropout.active()) return add_product(dx, ds, a, 1.0);
  in_groups(dx, [&](int64_t first, int64_t count, Tensor term) {
    at::addmm_out(term, term, ds.slice(0, first, first + count), a, 0, dropout.gain());
    drop_in_place(term, dropout.from(first));
    dx.slice(0, first, first + count).add_(term);
  });
}

// ------------------------------------------------------------------------------------------------
// Gradients of the adapters
// ------------------------------------------------------------------------------------------------

namespace {

// In 16 bits a library's product rounds, or sums, worse than these kernels.
bool thin_by_aten(const Tensor& x) {
  return x.scalar_type() == at::kFloat && better_by_aten(x);
}

// out (R, D) = gain ds^T of x with dropped elements 0
void product_for_a(const Tensor& ds, const Tensor& x, const Dropout& dropout, Tensor& out) {
  if (!thin_by_aten(x)) {
    return transposed_product(Matrix(ds), Matrix(x).dropped(dropout), dropout.gain(), out);
  }
  if (!dropout.active()) {
    at::mm_out(out, ds.t(), x);
    return;
  }
  out.zero_();
  in_groups(x, [&](int64_t first, int64_t count, Tensor input) {
    drop_rows(x.slice(0, first, first + count), dropout.from(first), dropout.gain(), input);
    out.addmm_(ds.slice(0, first, first + count).t(), input);
  });
}

}  // namespace

void add_transposed_product(const Tensor& left, const Tensor& right, Tensor& sums) {
  if (thin_by_aten(right)) {
    sums.addmm_(left.t(), right);
    return;
  }
  Tensor part = at::empty_like(sums);
  transposed_product(Matrix(left), Matrix(right), 1.0f, part);
  sums.add_(part);
}

std::vector<Tensor> gradients_of_a(
    const Tensor& ds, const Tensor& x, const Projections& p, const Dropout& dropout) {
  Tensor all = at::empty({p.rank(), x.size(1)}, p.a_all.options());
  product_for_a(ds, x, dropout, all);
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
    if (thin_by_aten(dy[i])) {
      at::addmm_out(transposed, transposed, p.part(s, i).t(), dy[i], 0, p.scale[i]);
    } else {
      transposed_product(
          Matrix(p.part(s, i)), Matrix(dy[i]), static_cast<float>(p.scale[i]), transposed);
    }
    db.push_back(transposed.t().contiguous());
  }
  return db;
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

Panels::Panels(std::initializer_list<TensorList> operands)
    : pairs(
          kernels().multiply_pairs != nullptr &&
          std::all_of(operands.begin(), operands.end(), can_pair)) {}

Tensor Panels::readable(const Tensor& t) const {
  if (!pairs) return t;
  const Tensor rounded = t.to(at::kBFloat16);
  if (paired(Matrix(rounded))) return rounded;
  Tensor even = at::zeros({t.size(0), round_up(t.size(1), 2)}, rounded.options());
  even.slice(1, 0, t.size(1)).copy_(rounded);
  return even;
}

void Panels::pack_columns(
    const Tensor& w, int64_t first, int64_t count, float* to, int64_t panel_stride) const {
  const int64_t width = kernels().column_panel;
  if (pairs) {
    pack_pairs_of_rows(Matrix(w), first, count, 0, w.size(0), width, to, panel_stride);
  } else {
    pack(Matrix(w).t(), first, count, 0, w.size(0), width, to, panel_stride);
  }
}

void Panels::pack_tile(
    const float* tile, int64_t ld, int64_t rows, int64_t count, float* to,
    int64_t panel_stride) const {
  const int64_t panel = kernels().row_panel, k = length(count);
  if (!pairs) {
    return pack(Matrix(tile, rows, count, ld), 0, rows, 0, count, panel, to, panel_stride);
  }
  Buffer rounded(rows * k);
  at::BFloat16* row = reinterpret_cast<at::BFloat16*>(rounded.data());
  for (int64_t n = 0; n < rows; ++n, row += 2 * k) {
    kernels().from_float(tile + n * ld, count, Dtype::bfloat16, row);
    if (count % 2 == 1) row[count] = 0;
  }
  pack(Matrix(rounded.data(), rows, k, k), 0, rows, 0, k, panel, to, panel_stride);
}

void Panels::multiply(
    const float* rows, int64_t row_panels, int64_t row_panel_stride, const float* columns,
    int64_t column_panels, int64_t column_panel_stride, int64_t length, float* c, int64_t ldc,
    bool add) const {
  const Kernels& table = kernels();
  (pairs ? table.multiply_pairs : table.multiply)(
      rows, row_panels, row_panel_stride, columns, column_panels, column_panel_stride, length, c,
      ldc, add);
}

namespace {

std::vector<Tensor> all_readable(TensorList tensors, const Panels& panels) {
  std::vector<Tensor> found;
  for (const Tensor& t : tensors) found.push_back(panels.readable(t));
  return found;
}

}  // namespace

Operands::Operands(const Projections& p, const Panels& panels)
    : p(p), panels(panels), a(panels.readable(p.a_all)), b(all_readable(p.b, panels)), s({0}),
      dy({0}) {
  for (int64_t i = 0; i < p.count(); ++i) {
    s.push_back(s.back() + panels.length(p.rank(i)));
    dy.push_back(dy.back() + panels.length(p.weight[i].size(0)));
  }
}

namespace {

// Packs scale_i s_i behind x; s is overwritten.
void pack_scaled(
    const Operands& o, float* s, int64_t ld, int64_t first, int64_t count, PackedRows& rows) {
  for (int64_t i = 0; i < o.p.count(); ++i) {
    const float scale = static_cast<float>(o.p.scale[i]);
    float* s_i = s + o.p.r[i];
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t r = 0; r < o.p.rank(i); ++r) s_i[n * ld + r] *= scale;
    }
    o.panels.pack_tile(
        s_i, ld, count, o.p.rank(i), rows.at(first, rows.wide + o.s[i]), rows.stride());
  }
}

}  // namespace

ColumnsOfS::ColumnsOfS(const Operands& o)
    : o_(o), room_(round_up(o.p.rank(), kernels().column_panel)), packed_(room_ * o.x_length()) {
  const int64_t width = kernels().column_panel, k = o.x_length();
  pack(o.panels.view(o.a), 0, o.p.rank(), 0, k, width, packed_.data(), k * width);
}

void ColumnsOfS::multiply(
    const float* x, int64_t x_stride, float gain, int64_t first, int64_t count, PackedRows& rows,
    Tensor& s, int64_t row) const {
  const Kernels& table = kernels();
  const int64_t k = o_.x_length();
  Buffer tile(TILE_ROWS * room_);
  o_.panels.multiply(
      x, ceil_div(count, table.row_panel), x_stride, packed_.data(), room_ / table.column_panel,
      k * table.column_panel, k, tile.data(), room_, false);
  for (int64_t i = 0; i < count * room_; ++i) tile.data()[i] *= gain;
  store_tile(tile.data(), room_, count, o_.p.rank(), s, row, 0);
  pack_scaled(o_, tile.data(), room_, first, count, rows);
}

ColumnsOfY::ColumnsOfY(const Operands& o, int64_t most)
    : o_(o), packed_(most * (o.x_length() + o.s.back())), bias_(most) {}

void ColumnsOfY::pack(int64_t i, int64_t first, int64_t count) {
  const int64_t width = kernels().column_panel;
  const int64_t wide = o_.x_length(), narrow = o_.panels.length(o_.p.rank(i));
  i_ = i;
  columns_ = count;
  stride_ = (wide + narrow) * width;
  cpu::pack(
      o_.panels.view(o_.p.weight[i]), first, count, 0, wide, width, packed_.data(), stride_);
  cpu::pack(
      o_.panels.view(o_.b[i]), first, count, 0, narrow, width, packed_.data() + wide * width,
      stride_);
  if (!o_.p.bias.empty()) vector_to_float(o_.p.bias[i], first, count, bias_.data());
}

void ColumnsOfY::multiply(PackedRows& rows, int64_t first, int64_t count, float* tile) {
  const Kernels& table = kernels();
  const int64_t row_panels = ceil_div(count, table.row_panel);
  const int64_t column_panels = ceil_div(columns_, table.column_panel);
  const int64_t narrow = o_.s[i_ + 1] - o_.s[i_];
  auto product = [&](int64_t from, int64_t column, int64_t k, bool add) {
    o_.panels.multiply(
        rows.at(first, from), row_panels, rows.stride(),
        packed_.data() + column * table.column_panel, column_panels, stride_, k, tile,
        TILE_COLUMNS, add);
  };
  if (o_.panels.pairs && i_ == 0) {  // s_0 lies behind x; in float32 two sums round less than one
    product(0, 0, rows.wide + narrow, false);
  } else {
    product(0, 0, rows.wide, false);
    product(rows.wide + o_.s[i_], rows.wide, narrow, true);
  }
  if (o_.p.bias.empty()) return;
  for (int64_t n = 0; n < count; ++n) {
    table.accumulate(bias_.data(), columns_, tile + n * TILE_COLUMNS);
  }
}

ColumnsOfDs::ColumnsOfDs(const Operands& o) : o_(o) {
  const int64_t width = kernels().column_panel;
  for (int64_t i = 0; i < o.p.count(); ++i) {
    const int64_t k = o.dy[i + 1] - o.dy[i];
    packed_.emplace_back(round_up(o.p.rank(i), width) * k);
    o.panels.pack_columns(o.b[i], 0, o.p.rank(i), packed_.back().data(), k * width);
  }
}

void ColumnsOfDs::multiply(
    float gain, int64_t first, int64_t count, PackedRows& rows, Tensor& ds, int64_t row) const {
  const Kernels& table = kernels();
  const int64_t R = o_.p.rank();
  Buffer all(count * R);
  for (int64_t i = 0; i < o_.p.count(); ++i) {
    const int64_t k = o_.dy[i + 1] - o_.dy[i], R_i = o_.p.rank(i);
    const int64_t room = round_up(R_i, table.column_panel);
    Buffer tile(TILE_ROWS * room);
    o_.panels.multiply(
        rows.at(first, o_.dy[i]), ceil_div(count, table.row_panel), rows.stride(),
        packed_[i].data(), room / table.column_panel, k * table.column_panel, k, tile.data(), room,
        false);
    const float scale = static_cast<float>(o_.p.scale[i]);
    for (int64_t n = 0; n < count; ++n) {
      const float* from = tile.data() + n * room;
      float* to = all.data() + n * R + o_.p.r[i];
      for (int64_t r = 0; r < R_i; ++r) to[r] = scale * from[r];
    }
  }
  store_tile(all.data(), R, count, R, ds, row, 0);
  for (int64_t i = 0; i < count * R; ++i) all.data()[i] *= gain;
  o_.panels.pack_tile(all.data(), R, count, R, rows.at(first, rows.wide), rows.stride());
}

ColumnsOfDx::ColumnsOfDx(const Operands& o, const Dropout& dropout, int64_t most)
    : o_(o), dropout_(dropout), packed_(most * (o.dy.back() + o.ds_length())) {}

void ColumnsOfDx::pack(int64_t first, int64_t count) {
  const int64_t width = kernels().column_panel;
  const int64_t stride = (o_.dy.back() + o_.ds_length()) * width;
  first_ = first;
  columns_ = count;
  for (int64_t i = 0; i < o_.p.count(); ++i) {
    o_.panels.pack_columns(
        o_.p.weight[i], first, count, packed_.data() + o_.dy[i] * width, stride);
  }
  o_.panels.pack_columns(o_.a, first, count, packed_.data() + o_.dy.back() * width, stride);
}

void ColumnsOfDx::multiply(
    PackedRows& rows, int64_t first, int64_t count, int64_t row, float* tile) {
  const Kernels& table = kernels();
  auto product = [&](int64_t from, int64_t k, bool add) {
    o_.panels.multiply(
        rows.at(first, from), ceil_div(count, table.row_panel), rows.stride(),
        packed_.data() + from * table.column_panel, ceil_div(columns_, table.column_panel),
        (rows.wide + rows.narrow) * table.column_panel, k, tile, TILE_COLUMNS, add);
  };
  if (o_.panels.pairs && !dropout_.active()) return product(0, rows.wide + rows.narrow, false);
  product(rows.wide, rows.narrow, false);
  for (int64_t n = 0; dropout_.active() && n < count; ++n) {
    dropout_.apply(tile + n * TILE_COLUMNS, Dtype::float32, columns_, row + n, first_);
  }
  product(0, rows.wide, true);
}

void pack_x(
    const Operands& o, const Tensor& x, const Dropout& dropout, const ColumnsOfS& columns,
    const Blocks& blocks, int64_t row, PackedRows& rows, Tensor& s) {
  const int64_t k = rows.wide, panel = kernels().row_panel;
  blocks.stretches([&](int64_t first, int64_t count) {
    const int64_t from = row + first;
    pack(o.panels.view(x), from, count, 0, k, panel, rows.at(first), rows.stride());
    if (!dropout.active()) {
      columns.multiply(rows.at(first), rows.stride(), 1.0f, first, count, rows, s, from);
      return;
    }
    Tensor dropped_rows = at::empty({count, x.size(1)}, x.options());
    drop_rows(x.slice(0, from, from + count), dropout.from(from), 1.0f, dropped_rows);
    Buffer input(TILE_ROWS * k);
    pack(o.panels.view(dropped_rows), 0, count, 0, k, panel, input.data(), k * panel);
    columns.multiply(input.data(), k * panel, dropout.gain(), first, count, rows, s, from);
  });
}

void pack_x_again(
    const Operands& o, const Tensor& x, const Tensor& s, const Blocks& blocks, int64_t row,
    PackedRows& rows) {
  const int64_t R = o.p.rank();
  const Matrix from(s);
  blocks.stretches([&](int64_t first, int64_t count) {
    pack(
        o.panels.view(x), row + first, count, 0, rows.wide, kernels().row_panel, rows.at(first),
        rows.stride());
    Buffer floats(count * R);
    for (int64_t n = 0; n < count; ++n) {
      kernels().to_float(
          from.at(row + first + n, 0), from.dtype, from.column_stride, R, floats.data() + n * R);
    }
    pack_scaled(o, floats.data(), R, first, count, rows);
  });
}

void pack_dy(
    const Operands& o, TensorList dy, const Dropout& dropout, const ColumnsOfDs& columns,
    const Blocks& blocks, int64_t row, PackedRows& rows, Tensor& ds) {
  blocks.stretches([&](int64_t first, int64_t count) {
    for (size_t i = 0; i < dy.size(); ++i) {
      pack(
          o.panels.view(dy[i]), row + first, count, 0, o.dy[i + 1] - o.dy[i], kernels().row_panel,
          rows.at(first, o.dy[i]), rows.stride());
    }
    columns.multiply(dropout.gain(), first, count, rows, ds, row + first);
  });
}

void write_y(
    const Operands& o, PackedRows& rows, const Blocks& blocks, int64_t row,
    std::vector<Tensor>& y) {
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < o.p.count(); ++i) add_tiles(i, y[i].size(1), TILE_COLUMNS, tiles);
  blocks.items(tiles, [&](int64_t begin, int64_t end) {
    ColumnsOfY columns(o, TILE_COLUMNS);
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
    const Operands& o, const Dropout& dropout, PackedRows& rows, const Blocks& blocks,
    int64_t row, Tensor& dx) {
  std::vector<Tile> tiles;
  add_tiles(0, dx.size(1), TILE_COLUMNS, tiles);
  blocks.items(tiles, [&](int64_t begin, int64_t end) {
    ColumnsOfDx columns(o, dropout, TILE_COLUMNS);
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
