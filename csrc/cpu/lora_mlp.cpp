// y = down(act(gate(x)) up(x)), every projection a frozen linear layer with an adapter; and its
// gradients. F is the width between. How the products are made stands in lora.h.
//
// Nothing of size (N, F) is made but gate and up where the caller keeps them. Rows go through in
// groups: forward, a tile of gate and the same tile of up become a tile of h while they are float32
// in the cache, and h is packed right away as rows of the down projection. Backward, a tile of dh
// meets its tiles of gate and up, kept or multiplied again, and leaves as packed rows of
// [dgate | dup]; what the adapters' gradients want from these tiles is added up before they go.
// Sums over rows belong to columns, so a thread has columns of its own there. Few rows meet the
// weights as they lie (few_rows.h), and are one group.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <string_view>

#include "few_rows.h"
#include "lora.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using at::TensorList;

// Of what a group of rows needs at once; a library packs the weights anew for each group.
constexpr int64_t GROUP_BYTES = int64_t{16} << 20, LIBRARY_GROUP_BYTES = int64_t{64} << 20;

struct Block {
  const Projections in, down;  // gate and up ; down
  const Activation activation;
  const Dropout drop_x, drop_h;

  Block(
      TensorList weight, TensorList bias, TensorList a, TensorList b, at::ArrayRef<double> scale,
      std::string_view activation, double dropout_p, const std::optional<Tensor>& seed_x,
      const std::optional<Tensor>& seed_h)
      : in(weight.slice(0, 2), bias.empty() ? bias : bias.slice(0, 2), a.slice(0, 2),
           b.slice(0, 2), scale.slice(0, 2)),
        down(weight.slice(2, 1), bias.empty() ? bias : bias.slice(2, 1), a.slice(2, 1),
             b.slice(2, 1), scale.slice(2, 1)),
        activation(activation == "silu" ? Activation::silu : Activation::gelu_tanh),
        drop_x(dropout_p, seed_x), drop_h(dropout_p, seed_h) {}
  int64_t features() const { return in.weight[0].size(0); }  // F
};

// What forward makes and backward reads.
struct Kept {
  Tensor s, s_down;
  std::vector<Tensor> gate_up;  // or nothing
};

// Of gate, up and down: sums over the rows of a group are added to these, float32.
struct Gradients {
  Tensor ds, ds_down;              // (N, R), of every row
  Tensor da_down;                  // ds_down^T dropout(h), without the gain
  std::vector<Tensor> db, dbias;   // of gate and up: s^T dgate, without the scale; sum of dgate

  Gradients(const Block& block, const Tensor& x, at::ScalarType ds_type)
      : ds(at::empty({x.size(0), block.in.rank()}, x.options().dtype(ds_type))),
        ds_down(at::empty({x.size(0), block.down.rank()}, x.options().dtype(ds_type))) {
    const auto options = x.options().dtype(at::kFloat);
    da_down = at::zeros({block.down.rank(), block.features()}, options);
    for (int64_t i = 0; i < 2; ++i) {
      db.push_back(at::zeros({block.in.rank(i), block.features()}, options));
      dbias.push_back(at::zeros({block.features()}, options));
    }
  }
};

struct Needs {
  const bool dx, dab, dbias;
};

// ------------------------------------------------------------------------------------------------
// By rows
// ------------------------------------------------------------------------------------------------

void forward_by_rows(const Tensor& x, const Block& block, Kept& kept, Tensor& y) {
  const int64_t N = x.size(0), F = block.features();
  Tensor h = at::empty({N, F}, x.options());
  const ProjectedRows in(x, block.in, block.drop_x, kept.s);
  parallel_by_few_columns(F, 2 * x.numel(), [&](int64_t first, int64_t count) {
    Buffer gate(N * FEW_COLUMNS), up(N * FEW_COLUMNS);
    in.columns(0, first, count, gate.data());
    in.columns(1, first, count, up.data());
    if (!kept.gate_up.empty()) {
      store_tile(gate.data(), FEW_COLUMNS, N, count, kept.gate_up[0], 0, first);
      store_tile(up.data(), FEW_COLUMNS, N, count, kept.gate_up[1], 0, first);
    }
    for (int64_t n = 0; n < N; ++n) {
      float* row = gate.data() + n * FEW_COLUMNS;
      kernels().gated(row, up.data() + n * FEW_COLUMNS, count, block.activation, row);
    }
    store_tile(gate.data(), FEW_COLUMNS, N, count, h, 0, first);
  });
  const ProjectedRows down(h, block.down, block.drop_h, kept.s_down);
  parallel_by_few_columns(y.size(1), h.numel(), [&](int64_t first, int64_t count) {
    Buffer tile(N * FEW_COLUMNS);
    down.columns(0, first, count, tile.data());
    store_tile(tile.data(), FEW_COLUMNS, N, count, y, 0, first);
  });
}

// ------------------------------------------------------------------------------------------------
// By ATen
// ------------------------------------------------------------------------------------------------

// Reads a row of each of `from` as floats, works on them, and rounds them to a row of each of `to`.
template <class Work>
void each_row(
    const std::vector<Tensor>& from, std::vector<Tensor> to, const Work& work) {
  const int64_t n = from[0].size(0), count = from[0].size(1), room = round_up(count, 16);
  at::parallel_for(0, n, 4, [&](int64_t begin, int64_t end) {
    Buffer buffer(from.size() * room);
    std::vector<float*> rows;
    for (size_t i = 0; i < from.size(); ++i) rows.push_back(buffer.data() + i * room);
    for (int64_t row = begin; row < end; ++row) {
      for (size_t i = 0; i < from.size(); ++i) {
        const Matrix view(from[i]);
        kernels().to_float(view.at(row, 0), view.dtype, view.column_stride, count, rows[i]);
      }
      work(rows, count);
      for (size_t i = 0; i < to.size(); ++i) store_tile(rows[i], room, 1, count, to[i], row, 0);
    }
  });
}

void forward_by_aten(const Tensor& x, const Block& block, Kept& kept, Tensor& y) {
  const int64_t N = x.size(0), F = block.features();
  const bool keeps = !kept.gate_up.empty();
  const int64_t at_once = rows_at_once(N, 3 * F * x.element_size(), LIBRARY_GROUP_BYTES);
  for (int64_t group = 0; group < N; group += at_once) {
    const int64_t n = std::min(at_once, N - group);
    auto rows = [&](const Tensor& t) { return t.slice(0, group, group + n); };
    const Tensor s = s_by_aten(rows(x), block.in, block.drop_x.from(group));
    rows(kept.s).copy_(s);
    Tensor gate_up[2];
    for (int64_t i = 0; i < 2; ++i) {
      gate_up[i] = keeps ? rows(kept.gate_up[i]) : at::empty({n, F}, x.options());
      y_by_aten(rows(x), s, block.in, i, gate_up[i]);
    }
    const Tensor h = keeps ? at::empty({n, F}, x.options()) : gate_up[0];
    each_row({gate_up[0], gate_up[1]}, {h}, [&](const auto& row, int64_t count) {
      kernels().gated(row[0], row[1], count, block.activation, row[0]);
    });
    const Tensor s_down = s_by_aten(h, block.down, block.drop_h.from(group));
    rows(kept.s_down).copy_(s_down);
    Tensor y_rows = rows(y);
    y_by_aten(h, s_down, block.down, 0, y_rows);
  }
}

void backward_by_aten(
    const Tensor& dy, const Tensor& x, const Block& block, const Kept& kept, const Needs& needs,
    Gradients& g, Tensor& dx) {
  const int64_t N = x.size(0), F = block.features();
  const int64_t at_once = rows_at_once(N, 4 * F * x.element_size(), LIBRARY_GROUP_BYTES);
  for (int64_t group = 0; group < N; group += at_once) {
    const int64_t n = std::min(at_once, N - group);
    auto rows = [&](const Tensor& t) { return t.slice(0, group, group + n); };
    const Dropout drop_h = block.drop_h.from(group);
    Tensor ds_down = rows(g.ds_down), h = at::empty({n, F}, x.options());
    ds_by_aten({rows(dy)}, block.down, ds_down);
    dx_by_aten({rows(dy)}, ds_down, block.down, drop_h, h);  // dh, from which h is made in place
    std::vector<Tensor> gate_up, d;
    for (int64_t i = 0; i < 2; ++i) {
      d.push_back(at::empty({n, F}, x.options()));
      if (kept.gate_up.empty()) y_by_aten(rows(x), rows(kept.s), block.in, i, d[i]);
      gate_up.push_back(kept.gate_up.empty() ? d[i] : rows(kept.gate_up[i]));
    }
    each_row(
        {gate_up[0], gate_up[1], h}, {d[0], d[1], h}, [&](const auto& row, int64_t count) {
          kernels().gated_gradient(row[0], row[1], row[2], count, block.activation);
        });
    if (needs.dab) {
      drop_in_place(h, drop_h);
      add_transposed_product(ds_down, h, g.da_down);
      for (int64_t i = 0; i < 2; ++i) {
        add_transposed_product(block.in.part(rows(kept.s), i), d[i], g.db[i]);
      }
    }
    if (needs.dbias) {
      for (int64_t i = 0; i < 2; ++i) g.dbias[i].add_(at::sum(d[i], 0, false, at::kFloat));
    }
    Tensor ds = rows(g.ds);
    ds_by_aten(d, block.in, ds);
    if (needs.dx) {
      Tensor dx_rows = rows(dx);
      dx_by_aten(d, ds, block.in, block.drop_x.from(group), dx_rows);
    }
  }
}

// ------------------------------------------------------------------------------------------------
// By tiles
// ------------------------------------------------------------------------------------------------

// A float tile of one thread, TILE_COLUMNS between its rows; and the same rounded, where panels
// hold pairs of bfloat16.
class TileOut {
 public:
  explicit TileOut(const Panels& panels)
      : panels_(panels), floats_(TILE_ROWS * TILE_COLUMNS),
        rounded_(panels.pairs ? TILE_ROWS * TILE_COLUMNS / 2 : 0) {}
  float* row(int64_t n) { return floats_.data() + n * TILE_COLUMNS; }

  // Says that `n` rows of `count` columns are done.
  void finish(int64_t n, int64_t count) {
    n_ = n;
    count_ = count;
    if (!panels_.pairs) return;
    for (int64_t i = 0; i < n; ++i) {
      kernels().from_float(row(i), count, Dtype::bfloat16, rounded(i));
    }
  }

  // As inner elements of packed rows.
  void pack_rows(float* to, int64_t stride) {
    const Matrix view = panels_.pairs
        ? Matrix(rounded_.data(), n_, TILE_COLUMNS / 2, TILE_COLUMNS / 2)
        : Matrix(floats_.data(), n_, TILE_COLUMNS, TILE_COLUMNS);
    pack(view, 0, n_, 0, panels_.length(count_), kernels().row_panel, to, stride);
  }

  // sums (R, F), from column `column` on, += left^T tile.
  void add_to(const float* left, int64_t left_stride, int64_t column, Tensor& sums) {
    const Kernels& table = kernels();
    const int64_t R = sums.size(0), room = round_up(R, table.row_panel);
    const int64_t width = round_up(count_, table.column_panel);
    Buffer part(room * width);
    if (panels_.pairs) {
      const int64_t pairs = ceil_div(n_, 2), stride = pairs * table.column_panel;
      Buffer right(width * pairs);
      pack_pairs_of_rows(
          Matrix(rounded(0), n_, TILE_COLUMNS), 0, count_, 0, n_, table.column_panel,
          right.data(), stride);
      table.multiply_pairs(
          left, room / table.row_panel, left_stride, right.data(), width / table.column_panel,
          stride, pairs, part.data(), width, false);
    } else {
      // rows up to the end of a panel count with a left operand of 0
      std::fill(row(n_), row(round_up(n_, table.row_panel)), 0.0f);
      std::fill(part.data(), part.data() + R * width, 0.0f);
      for (int64_t n = 0; n < n_; n += table.row_panel, left += left_stride) {
        table.outer(left, R, row(n), TILE_COLUMNS, count_, part.data(), width);
      }
    }
    float* to = sums.mutable_data_ptr<float>() + column;
    for (int64_t r = 0; r < R; ++r) {
      table.accumulate(part.data() + r * width, count_, to + r * sums.size(1));
    }
  }

  // sums (F,) likewise += the sum of the tile's rows, a few at a time: short sums round less.
  void add_rows_to(int64_t column, Tensor& sums) {
    constexpr int64_t FEW = 12;
    Buffer part(count_), few(count_);
    std::fill(part.data(), part.data() + count_, 0.0f);
    for (int64_t first = 0; first < n_; first += FEW) {
      std::fill(few.data(), few.data() + count_, 0.0f);
      for (int64_t n = first; n < std::min(first + FEW, n_); ++n) {
        kernels().accumulate(row(n), count_, few.data());
      }
      kernels().accumulate(few.data(), count_, part.data());
    }
    kernels().accumulate(part.data(), count_, sums.mutable_data_ptr<float>() + column);
  }

 private:
  at::BFloat16* rounded(int64_t n) {
    return reinterpret_cast<at::BFloat16*>(rounded_.data()) + n * TILE_COLUMNS;
  }

  const Panels& panels_;
  int64_t n_ = 0, count_ = 0;
  Buffer floats_, rounded_;
};

// A thin (n, R) of a group, packed as the left operand of sums over its rows.
class Left {
 public:
  Left(const Panels& panels, int64_t rows, int64_t columns)
      : pairs_(panels.pairs), columns_(columns),
        packed_(
            pairs_ ? length_of_left_pairs(rows, columns)
                   : round_up(rows, kernels().row_panel) * columns) {}

  void pack(const Tensor& thin) {
    const int64_t n = thin.size(0), panel = kernels().row_panel;
    stride_ = pairs_ ? ceil_div(n, 2) * panel : columns_ * panel;
    if (pairs_) return pack_left_pairs(Matrix(thin), packed_.data());
    cpu::pack(Matrix(thin), 0, n, 0, columns_, panel, packed_.data(), stride_);
  }

  // From row `first` on, which begins a panel.
  const float* at(int64_t first) const {
    return packed_.data() + (pairs_ ? first / 2 * kernels().row_panel : first * columns_);
  }
  int64_t stride() const { return stride_; }

 private:
  const bool pairs_;
  const int64_t columns_;
  int64_t stride_ = 0;
  Buffer packed_;
};

void forward_by_tiles(const Tensor& x, const Block& block, Kept& kept, Tensor& y) {
  const Kernels& table = kernels();
  const int64_t N = x.size(0), F = block.features();
  const Panels panels({x, block.in.weight, block.down.weight});
  const Operands in(block.in, panels), down(block.down, panels);
  const bool drops = block.drop_h.active();
  const ColumnsOfS columns_of_s(in), columns_of_s_down(down);
  std::vector<Tile> tiles;
  add_tiles(0, F, TILE_COLUMNS, tiles);
  std::vector<Tensor> outputs = {y};

  const int64_t L_h = down.x_length();
  const int64_t floats = in.x_length() + in.s.back() + L_h * (drops ? 2 : 1) + down.s.back();
  const int64_t at_once = rows_at_once(N, floats * sizeof(float), GROUP_BYTES);
  PackedRows x_rows(at_once, in.x_length(), in.s.back()), h_rows(at_once, L_h, down.s.back());
  PackedRows dropped_rows(drops ? at_once : 0, L_h, 0);
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));
    pack_x(in, x, block.drop_x, columns_of_s, blocks, group, x_rows, kept.s);

    blocks.items(tiles, [&](int64_t begin, int64_t end) {
      ColumnsOfY gate_columns(in, TILE_COLUMNS), up_columns(in, TILE_COLUMNS);
      Buffer gate(TILE_ROWS * TILE_COLUMNS), up(TILE_ROWS * TILE_COLUMNS);
      TileOut h(panels);
      int64_t packed_tile = -1;
      for (int64_t item = begin; item < end; ++item) {
        const auto [_, column, count] = tiles[item / blocks.count];
        if (packed_tile != item / blocks.count) {
          packed_tile = item / blocks.count;
          gate_columns.pack(0, column, count);
          up_columns.pack(1, column, count);
        }
        const int64_t first = item % blocks.count * blocks.size, row = group + first;
        const int64_t n = blocks.rows_of(item % blocks.count);
        gate_columns.multiply(x_rows, first, n, gate.data());
        up_columns.multiply(x_rows, first, n, up.data());
        if (!kept.gate_up.empty()) {
          store_tile(gate.data(), TILE_COLUMNS, n, count, kept.gate_up[0], row, column);
          store_tile(up.data(), TILE_COLUMNS, n, count, kept.gate_up[1], row, column);
        }
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = i * TILE_COLUMNS;
          table.gated(gate.data() + at, up.data() + at, count, block.activation, h.row(i));
        }
        const int64_t k = panels.length(column);
        h.finish(n, count);
        h.pack_rows(h_rows.at(first, k), h_rows.stride());
        if (!drops) continue;
        for (int64_t i = 0; i < n; ++i) {
          block.drop_h.apply(h.row(i), Dtype::float32, count, row + i, column);
        }
        h.finish(n, count);
        h.pack_rows(dropped_rows.at(first, k), dropped_rows.stride());
      }
    });

    PackedRows& input = drops ? dropped_rows : h_rows;
    blocks.stretches([&](int64_t first, int64_t count) {
      columns_of_s_down.multiply(
          input.at(first), input.stride(), block.drop_h.gain(), first, count, h_rows, kept.s_down,
          group + first);
    });
    write_y(down, h_rows, blocks, group, outputs);
  }
}

// Rows of t as a tile of floats.
void load_tile(const Matrix& t, int64_t row, int64_t n, int64_t column, int64_t count, TileOut& to) {
  for (int64_t i = 0; i < n; ++i) {
    kernels().to_float(t.at(row + i, column), t.dtype, 1, count, to.row(i));
  }
}

void backward_by_tiles(
    const Tensor& dy, const Tensor& x, const Block& block, const Kept& kept, const Needs& needs,
    Gradients& g, Tensor& dx) {
  const Kernels& table = kernels();
  const int64_t N = x.size(0), F = block.features();
  const bool recomputes = kept.gate_up.empty();
  const Panels panels({dy, x, block.in.weight, block.down.weight});
  const Operands in(block.in, panels), down(block.down, panels);
  const ColumnsOfDs columns_of_ds(in), columns_of_ds_down(down);

  const int64_t L_dy = down.dy.back(), L_x = recomputes ? in.x_length() + in.s.back() : 0;
  const int64_t floats = L_dy + down.ds_length() + L_x + in.dy.back() + in.ds_length();
  const int64_t at_once = rows_at_once(N, floats * sizeof(float), GROUP_BYTES);
  PackedRows dy_rows(at_once, L_dy, down.ds_length());
  PackedRows x_rows(recomputes ? at_once : 0, in.x_length(), in.s.back());
  PackedRows d_rows(at_once, in.dy.back(), in.ds_length());  // [dgate | dup | ds]
  Left ds_down(panels, at_once, block.down.rank());
  Left s[2] = {{panels, at_once, block.in.rank(0)}, {panels, at_once, block.in.rank(1)}};
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));
    auto rows = [&](const Tensor& t) { return t.slice(0, group, group + blocks.rows); };
    pack_dy(down, {dy}, block.drop_h, columns_of_ds_down, blocks, group, dy_rows, g.ds_down);
    if (recomputes) pack_x_again(in, x, kept.s, blocks, group, x_rows);
    if (needs.dab) {
      ds_down.pack(rows(g.ds_down));
      for (int64_t i = 0; i < 2; ++i) s[i].pack(block.in.part(rows(kept.s), i));
    }

    parallel_by_columns(F, TILE_COLUMNS, [&](const std::vector<Tile>& tiles) {
      ColumnsOfDx dh_columns(down, block.drop_h, TILE_COLUMNS);
      const int64_t again = recomputes ? TILE_COLUMNS : 0;
      ColumnsOfY gate_columns(in, again), up_columns(in, again);
      TileOut d[2] = {TileOut(panels), TileOut(panels)}, h(panels);
      for (const auto [_, column, count] : tiles) {
        dh_columns.pack(column, count);
        if (recomputes) {
          gate_columns.pack(0, column, count);
          up_columns.pack(1, column, count);
        }
        for (int64_t first = 0; first < blocks.rows; first += blocks.size) {
          const int64_t n = std::min(blocks.size, blocks.rows - first), row = group + first;
          dh_columns.multiply(dy_rows, first, n, row, h.row(0));
          if (recomputes) {
            gate_columns.multiply(x_rows, first, n, d[0].row(0));
            up_columns.multiply(x_rows, first, n, d[1].row(0));
          } else {
            load_tile(Matrix(kept.gate_up[0]), row, n, column, count, d[0]);
            load_tile(Matrix(kept.gate_up[1]), row, n, column, count, d[1]);
          }
          for (int64_t i = 0; i < n; ++i) {
            table.gated_gradient(d[0].row(i), d[1].row(i), h.row(i), count, block.activation);
          }
          for (int64_t i = 0; i < 2; ++i) {
            d[i].finish(n, count);
            d[i].pack_rows(
                d_rows.at(first, in.dy[i] + panels.length(column)), d_rows.stride());
            if (needs.dab) d[i].add_to(s[i].at(first), s[i].stride(), column, g.db[i]);
            if (needs.dbias) d[i].add_rows_to(column, g.dbias[i]);
          }
          if (!needs.dab) continue;
          for (int64_t i = 0; block.drop_h.active() && i < n; ++i) {
            block.drop_h.apply(h.row(i), Dtype::float32, count, row + i, column);
          }
          h.finish(n, count);
          h.add_to(ds_down.at(first), ds_down.stride(), column, g.da_down);
        }
      }
    });

    blocks.stretches([&](int64_t first, int64_t count) {
      columns_of_ds.multiply(block.drop_x.gain(), first, count, d_rows, g.ds, group + first);
    });
    if (needs.dx) write_dx(in, block.drop_x, d_rows, blocks, group, dx);
  }
}

// ------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lora_mlp(
    const Tensor& x,     // (N, D)
    TensorList weight,   // (F, D), (F, D), (O, F): of gate, up and down, as the next ones
    TensorList bias,     // or no bias at all
    TensorList a,
    TensorList b,
    at::ArrayRef<double> scale,
    std::string_view activation,
    double dropout_p,
    const std::optional<Tensor>& seed_x,
    const std::optional<Tensor>& seed_h,
    bool keep_gate_up) {
  const PlainOperators plain;
  const Block block(weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h);
  const int64_t N = x.size(0);
  auto empty = [&](int64_t columns) { return at::empty({N, columns}, x.options()); };
  Tensor y = empty(weight[2].size(0));
  Kept kept{empty(block.in.rank()), empty(block.down.rank()), {}};
  if (keep_gate_up) kept.gate_up = {empty(block.features()), empty(block.features())};
  auto* forward = better_by_rows(x, block.in) && better_by_rows(x, block.down) ? forward_by_rows
      : better_by_aten(x)                                                      ? forward_by_aten
                                                                               : forward_by_tiles;
  forward(x, block, kept, y);
  return {y, kept.s, kept.s_down, kept.gate_up};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
lora_mlp_backward(
    const Tensor& dy,    // (N, O)
    const Tensor& x,     // (N, D)
    TensorList weight,
    TensorList bias,
    TensorList a,
    TensorList b,
    at::ArrayRef<double> scale,
    std::string_view activation,
    double dropout_p,
    const std::optional<Tensor>& seed_x,
    const std::optional<Tensor>& seed_h,
    const Tensor& s,       // (N, R_gate + R_up)
    const Tensor& s_down,  // (N, R_down)
    TensorList gate_up,    // (N, F) twice, or nothing: then they are computed again
    bool need_dx,
    bool need_dab,
    bool need_dbias) {
  const PlainOperators plain;
  const Block block(weight, bias, a, b, scale, activation, dropout_p, seed_x, seed_h);
  const bool by_aten = better_by_aten(x);
  Tensor dx = at::empty(need_dx ? x.sizes() : at::IntArrayRef{0}, x.options());
  Gradients g(block, x, by_aten ? x.scalar_type() : at::kFloat);
  (by_aten ? backward_by_aten : backward_by_tiles)(
      dy, x, block, {s, s_down, gate_up.vec()}, {need_dx, need_dab, need_dbias}, g, dx);

  std::vector<Tensor> da, db, dbias;
  if (need_dab) {
    da = gradients_of_a(g.ds, x, block.in, block.drop_x);
    da.push_back(g.da_down.mul_(block.drop_h.gain()).to(a[2].scalar_type()));
    for (int64_t i = 0; i < 2; ++i) {
      db.push_back(g.db[i].mul_(scale[i]).t().to(b[i].scalar_type()).contiguous());
    }
    db.push_back(gradients_of_b({dy}, s_down, block.down)[0]);
  }
  if (need_dbias) {
    for (const Tensor& sum : g.dbias) dbias.push_back(sum.to(x.scalar_type()));
    dbias.push_back(at::sum(dy, 0));
  }
  return {dx, da, db, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("lora_mlp_cpu", lora_mlp);
  m.impl("lora_mlp_backward_cpu", lora_mlp_backward);
}

}  // namespace perl_kernels::cpu
