// y = down(act(gate(x)) up(x)), every projection a frozen linear layer with an adapter; and its
// gradients. F is the width between. How the products are made stands in lora.h.
//
// Nothing of size (N, F) is made but gate and up where the caller keeps them. Rows go through in
// groups: forward, a tile of gate and the same tile of up become a tile of h while they are float32
// in the cache, and h is packed right away as rows of the down projection. Backward, a tile of dh
// meets its tiles of gate and up, kept or multiplied again, and leaves as packed rows of
// [dgate | dup]; what the adapters' gradients want from these tiles is added up before they go.
// Sums over rows belong to columns, so a thread has columns of its own there.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <string_view>

#include "lora.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using at::TensorList;

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
  const int64_t at_once = rows_at_once(N, 3 * F * x.element_size(), PACKED_BYTES);
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
  const int64_t at_once = rows_at_once(N, 4 * F * x.element_size(), PACKED_BYTES);
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
      Tensor part = at::empty_like(g.da_down);
      transposed_product(Matrix(ds_down), Matrix(h).dropped(drop_h), 1.0f, part);
      g.da_down.add_(part);
      for (int64_t i = 0; i < 2; ++i) {
        part = at::empty_like(g.db[i]);
        transposed_product(Matrix(block.in.part(rows(kept.s), i)), Matrix(d[i]), 1.0f, part);
        g.db[i].add_(part);
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

// Float tiles of one thread; TILE_COLUMNS between their rows.
struct Tiles {
  Buffer gate{TILE_ROWS * TILE_COLUMNS}, up{TILE_ROWS * TILE_COLUMNS}, h{TILE_ROWS * TILE_COLUMNS};
  Buffer scratch{TILE_ROWS * TILE_COLUMNS};

  // Packs rows of a tile as a wide part of packed rows, rounded where that is in pairs.
  void pack_rows(
      const Wide& wide, const Buffer& tile, int64_t n, int64_t count, float* to, int64_t stride) {
    const Kernels& table = kernels();
    Matrix view(tile.data(), n, count, TILE_COLUMNS);
    if (wide.pairs) {
      for (int64_t row = 0; row < n; ++row) {
        table.from_float(
            tile.data() + row * TILE_COLUMNS, count, Dtype::bfloat16,
            scratch.data() + row * (TILE_COLUMNS / 2));
      }
      view = Matrix(scratch.data(), n, count / 2, TILE_COLUMNS / 2);
    }
    pack(view, 0, n, 0, view.columns, table.row_panel, to, stride);
  }

  // sums (R, F) from column `column` on += small^T tile, for packed rows of `small` at any panel.
  void add_product(
      const float* small, int64_t stride, const Buffer& tile, int64_t n, int64_t count,
      int64_t column, Tensor& sums) {
    const Kernels& table = kernels();
    const int64_t R = sums.size(0), F = sums.size(1);
    Buffer part(R * TILE_COLUMNS);
    std::fill(part.data(), part.data() + R * TILE_COLUMNS, 0.0f);
    for (int64_t row = 0; row < n; row += table.row_panel, small += stride) {
      table.outer(
          small, R, tile.data() + row * TILE_COLUMNS, TILE_COLUMNS, count, part.data(),
          TILE_COLUMNS);
    }
    float* to = sums.mutable_data_ptr<float>() + column;
    for (int64_t r = 0; r < R; ++r) {
      table.accumulate(part.data() + r * TILE_COLUMNS, count, to + r * F);
    }
  }

  // The same for a column of ones.
  void add_rows(const Buffer& tile, int64_t n, int64_t count, int64_t column, Tensor& sums) {
    const Kernels& table = kernels();
    float* part = scratch.data();
    std::fill(part, part + count, 0.0f);
    for (int64_t row = 0; row < n; ++row) {
      table.accumulate(tile.data() + row * TILE_COLUMNS, count, part);
    }
    table.accumulate(part, count, sums.mutable_data_ptr<float>() + column);
  }
};

void forward_by_tiles(const Tensor& x, const Block& block, Kept& kept, Tensor& y) {
  const Kernels& table = kernels();
  const int64_t N = x.size(0), F = block.features();
  const Wide wide({x, block.in.weight, block.down.weight});
  const int64_t L = wide.length(x.size(1)), L_h = wide.length(F);
  const bool drops = block.drop_h.active();
  const ColumnsOfS columns_of_s(wide, block.in), columns_of_s_down(wide, block.down);
  std::vector<Tile> tiles;
  add_tiles(0, F, TILE_COLUMNS, tiles);
  std::vector<Tensor> outputs = {y};

  const int64_t floats = L + block.in.rank() + L_h * (drops ? 2 : 1) + block.down.rank();
  const int64_t at_once = rows_at_once(N, floats * sizeof(float), PACKED_BYTES);
  PackedRows x_rows(at_once, L, block.in.rank()), h_rows(at_once, L_h, block.down.rank());
  PackedRows dropped_rows(drops ? at_once : 0, L_h, 0);
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));
    pack_x(wide, x, block.drop_x, columns_of_s, blocks, group, x_rows, kept.s);

    blocks.items(tiles, [&](int64_t begin, int64_t end) {
      ColumnsOfY gate(wide, block.in, TILE_COLUMNS), up(wide, block.in, TILE_COLUMNS);
      Tiles t;
      int64_t packed_tile = -1;
      for (int64_t item = begin; item < end; ++item) {
        const auto [_, column, count] = tiles[item / blocks.count];
        if (packed_tile != item / blocks.count) {
          packed_tile = item / blocks.count;
          gate.pack(0, column, count);
          up.pack(1, column, count);
        }
        const int64_t first = item % blocks.count * blocks.size;
        const int64_t n = blocks.rows_of(item % blocks.count);
        gate.multiply(x_rows, first, n, t.gate.data());
        up.multiply(x_rows, first, n, t.up.data());
        if (!kept.gate_up.empty()) {
          store_tile(
              t.gate.data(), TILE_COLUMNS, n, count, kept.gate_up[0], group + first, column);
          store_tile(t.up.data(), TILE_COLUMNS, n, count, kept.gate_up[1], group + first, column);
        }
        for (int64_t row = 0; row < n; ++row) {
          const int64_t at = row * TILE_COLUMNS;
          table.gated(
              t.gate.data() + at, t.up.data() + at, count, block.activation, t.h.data() + at);
        }
        const int64_t k = wide.length(column);
        t.pack_rows(wide, t.h, n, count, h_rows.at(first, k), h_rows.stride());
        if (!drops) continue;
        for (int64_t row = 0; row < n; ++row) {
          block.drop_h.apply(
              t.h.data() + row * TILE_COLUMNS, Dtype::float32, count, group + first + row, column);
        }
        t.pack_rows(wide, t.h, n, count, dropped_rows.at(first, k), dropped_rows.stride());
      }
    });

    PackedRows& input = drops ? dropped_rows : h_rows;
    blocks.stretches([&](int64_t first, int64_t count) {
      columns_of_s_down.multiply(
          input.at(first), input.stride(), block.drop_h.gain(), first, count, h_rows, kept.s_down,
          group + first);
    });
    write_y(wide, block.down, h_rows, blocks, group, outputs);
  }
}

// Rows of t as a tile of floats; rows after the last, up to the end of its panel, are 0.
void load_tile(
    const Tensor& t, int64_t row, int64_t n, int64_t column, int64_t count, Buffer& tile) {
  const Kernels& table = kernels();
  const Matrix view(t);
  for (int64_t i = 0; i < n; ++i) {
    table.to_float(
        view.at(row + i, column), view.dtype, 1, count, tile.data() + i * TILE_COLUMNS);
  }
  const int64_t end = round_up(n, table.row_panel) * TILE_COLUMNS;
  std::fill(tile.data() + n * TILE_COLUMNS, tile.data() + end, 0.0f);
}

void backward_by_tiles(
    const Tensor& dy, const Tensor& x, const Block& block, const Kept& kept, const Needs& needs,
    Gradients& g, Tensor& dx) {
  const Kernels& table = kernels();
  const int64_t N = x.size(0), F = block.features();
  const bool recomputes = kept.gate_up.empty();
  const Wide wide({dy, x, block.in.weight, block.down.weight});
  const ColumnsOfDs columns_of_ds_down(wide, block.down), columns_of_ds(wide, block.in);
  const int64_t L_dy = wide.length(dy.size(1)), L_h = wide.length(F);
  const int64_t L = recomputes ? wide.length(x.size(1)) : 0;

  const int64_t floats = L_dy + block.down.rank() + L + 2 * L_h + 2 * block.in.rank();
  const int64_t at_once = rows_at_once(N, floats * sizeof(float), PACKED_BYTES);
  PackedRows dy_rows(at_once, L_dy, block.down.rank());
  PackedRows x_rows(at_once, L, block.in.rank());
  PackedRows d_rows(at_once, 2 * L_h, block.in.rank());  // [dgate | dup | ds]
  for (int64_t group = 0; group < N; group += at_once) {
    const Blocks blocks(std::min(at_once, N - group));
    pack_dy(wide, {dy}, columns_of_ds_down, blocks, group, dy_rows, g.ds_down);
    blocks.stretches([&](int64_t first, int64_t count) {
      const int64_t row = group + first;
      pack(wide.view(x), row, count, 0, L, table.row_panel, x_rows.at(first), x_rows.stride());
      pack(
          Matrix(kept.s), row, count, 0, block.in.rank(), table.row_panel, x_rows.at(first, L),
          x_rows.stride());
    });

    parallel_by_columns(F, TILE_COLUMNS, [&](const std::vector<Tile>& tiles) {
      ColumnsOfDx dh(wide, block.down, block.drop_h, TILE_COLUMNS);
      const int64_t again = recomputes ? TILE_COLUMNS : 0;
      ColumnsOfY gate(wide, block.in, again), up(wide, block.in, again);
      Tiles t;
      for (const auto [_, column, count] : tiles) {
        dh.pack(column, count);
        if (recomputes) {
          gate.pack(0, column, count);
          up.pack(1, column, count);
        }
        for (int64_t first = 0; first < blocks.rows; first += blocks.size) {
          const int64_t n = std::min(blocks.size, blocks.rows - first), row = group + first;
          dh.multiply(dy_rows, first, n, row, t.h.data());
          if (recomputes) {
            gate.multiply(x_rows, first, n, t.gate.data());
            up.multiply(x_rows, first, n, t.up.data());
          } else {
            load_tile(kept.gate_up[0], row, n, column, count, t.gate);
            load_tile(kept.gate_up[1], row, n, column, count, t.up);
          }
          for (int64_t i = 0; i < n; ++i) {
            const int64_t at = i * TILE_COLUMNS;
            table.gated_gradient(
                t.gate.data() + at, t.up.data() + at, t.h.data() + at, count, block.activation);
          }
          const int64_t k = wide.length(column);
          t.pack_rows(wide, t.gate, n, count, d_rows.at(first, k), d_rows.stride());
          t.pack_rows(wide, t.up, n, count, d_rows.at(first, L_h + k), d_rows.stride());
          if (needs.dbias) {
            t.add_rows(t.gate, n, count, column, g.dbias[0]);
            t.add_rows(t.up, n, count, column, g.dbias[1]);
          }
          if (!needs.dab) continue;
          if (block.drop_h.active()) {
            for (int64_t i = 0; i < n; ++i) {
              block.drop_h.apply(
                    t.h.data() + i * TILE_COLUMNS, Dtype::float32, count, row + i, column);
            }
          }
          t.add_product(
              dy_rows.at(first, L_dy), dy_rows.stride(), t.h, n, count, column, g.da_down);
          t.add_product(
              x_rows.at(first, L), x_rows.stride(), t.gate, n, count, column, g.db[0]);
          t.add_product(
              x_rows.at(first, L + block.in.r[1]), x_rows.stride(), t.up, n, count, column,
              g.db[1]);
        }
      }
    });

    blocks.stretches([&](int64_t first, int64_t count) {
      columns_of_ds.multiply(first, count, d_rows, g.ds, group + first);
    });
    if (needs.dx) write_dx(wide, block.in, block.drop_x, d_rows, blocks, group, dx);
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
  (better_by_aten(x) ? forward_by_aten : forward_by_tiles)(x, block, kept, y);
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
