// Statistics of softmax(z) and their gradient from hidden states, with z made tile by tile:
// z = softcap * tanh((hidden weight^T + bias) / softcap) / temperature. No [N, V] buffer exists.
//
// Rows are packed once per group. Statistics: the vocabulary is cut into shares whose number does
// not depend on the number of threads; each sweeps its tiles into a state per row, and the states
// merge in order. Gradient: for one slab of the vocabulary at a time, dz of all rows of the group
// is made tile by tile and packed at once as the left operand of dhidden += dz weight.
#include <torch/library.h>

#include "softmax.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t PACKED_BYTES = int64_t{8} << 20;  // of rows at once, policy and reference
constexpr int64_t MOST_ROWS = 10 * TILE_ROWS;
constexpr int64_t MOST_SHARES = 64;
constexpr int64_t SLAB = 5 * TILE_COLUMNS;  // a multiple of TILE_ROWS too

struct Options {
  float temperature, softcap;
};

// The head and the hidden states that go through it.
struct Head {
  const Matrix weight, hidden, ref_hidden;
  const bool has_ref;
  Buffer bias;  // float32, or none
  const bool has_bias;

  Head(
      const Tensor& weight, const OptionalTensor& bias, const Tensor& hidden,
      const OptionalTensor& ref_hidden)
      : weight(weight), hidden(hidden), ref_hidden(ref_hidden.value_or(hidden)),
        has_ref(ref_hidden.has_value()), bias(bias.has_value() ? weight.size(0) : 0),
        has_bias(bias.has_value()) {
    if (has_bias) vector_to_float(*bias, 0, weight.size(0), this->bias.data());
  }

  int64_t V() const { return weight.rows; }
  int64_t H() const { return weight.columns; }
  int64_t rows_at_once(int64_t rows) const {
    const int64_t bytes = H() * sizeof(float) * (has_ref ? 2 : 1);
    return cpu::rows_at_once(rows, std::max(bytes, PACKED_BYTES / MOST_ROWS), PACKED_BYTES);
  }
};

// Packed hidden states of a group of rows, in blocks of TILE_ROWS.
class PackedRows {
 public:
  PackedRows(const Matrix& hidden, int64_t rows) : hidden_(hidden), memory_(rows * hidden.columns) {}

  void pack_group(int64_t first, int64_t rows) {
    const Kernels& table = kernels();
    const int64_t H = hidden_.columns;
    at::parallel_for(0, ceil_div(rows, TILE_ROWS), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * TILE_ROWS;
        pack(
            hidden_, first + row, std::min(TILE_ROWS, rows - row), 0, H, table.row_panel,
            memory_.data() + row * H, H * table.row_panel);
      }
    });
  }
  float* block(int64_t i) { return memory_.data() + i * TILE_ROWS * hidden_.columns; }

 private:
  const Matrix hidden_;
  Buffer memory_;
};

// One thread's tile of the head's weight and of logits.
class TileMaker {
 public:
  explicit TileMaker(const Head& head)
      : head_(head), columns_(TILE_COLUMNS * head.H()), z_(TILE_ROWS * TILE_COLUMNS),
        zq_(head.has_ref ? TILE_ROWS * TILE_COLUMNS : 0) {}

  // Choose columns first .. first + count of the vocabulary.
  void choose(int64_t first, int64_t count) {
    if (first == first_) return;
    first_ = first;
    count_ = count;
    const int64_t width = kernels().column_panel;
    pack(head_.weight, first, count, 0, head_.H(), width, columns_.data(), head_.H() * width);
  }

  // Raw logits of one packed block of `rows` rows; returned with stride TILE_COLUMNS.
  float* logits(const float* packed, int64_t rows) { return multiply(packed, rows, z_.data()); }
  float* ref_logits(const float* packed, int64_t rows) {
    return multiply(packed, rows, zq_.data());
  }

 private:
  float* multiply(const float* packed, int64_t rows, float* to) {
    const Kernels& table = kernels();
    const int64_t H = head_.H();
    table.multiply(
        packed, ceil_div(rows, table.row_panel), H * table.row_panel, columns_.data(),
        ceil_div(count_, table.column_panel), H * table.column_panel, H, to, TILE_COLUMNS, false);
    return to;
  }

  const Head& head_;
  Buffer columns_, z_, zq_;
  int64_t first_ = -1, count_ = 0;
};

StatsTuple head_stats(
    const Tensor& hidden,              // (N, H)
    const Tensor& weight,              // (V, H)
    const OptionalTensor& bias,        // (V,)
    const OptionalTensor& target,      // (N,)
    const OptionalTensor& ref_hidden,  // (N, H)
    double temperature, double softcap, int64_t ignore_index) {
  Head head(weight, bias, hidden, ref_hidden);
  const Options options{static_cast<float>(temperature), static_cast<float>(softcap)};
  const Targets targets(target, ignore_index);
  const int64_t N = hidden.size(0), V = head.V();
  Stats out(hidden, N, target.has_value(), head.has_ref);
  if (N == 0) return out.tuple();

  const int64_t tiles = ceil_div(V, TILE_COLUMNS);
  const int64_t tiles_per_share = ceil_div(tiles, MOST_SHARES);
  const int64_t shares = ceil_div(tiles, tiles_per_share);
  const int64_t at_once = head.rows_at_once(N);
  PackedRows rows(head.hidden, at_once), ref_rows(head.ref_hidden, head.has_ref ? at_once : 0);
  std::vector<RowState> states(shares * std::min(at_once, N));

  for (int64_t group = 0; group < N; group += at_once) {
    const int64_t count = std::min(at_once, N - group);
    rows.pack_group(group, count);
    if (head.has_ref) ref_rows.pack_group(group, count);
    std::fill(states.begin(), states.end(), RowState());

    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      TileMaker maker(head);
      for (int64_t share = begin; share < end; ++share) {
        const int64_t last = std::min((share + 1) * tiles_per_share, tiles);
        for (int64_t tile = share * tiles_per_share; tile < last; ++tile) {
          const int64_t first = tile * TILE_COLUMNS, width = std::min(TILE_COLUMNS, V - first);
          maker.choose(first, width);
          for (int64_t row = 0; row < count; row += TILE_ROWS) {
            const int64_t block_rows = std::min(TILE_ROWS, count - row);
            float* z = maker.logits(rows.block(row / TILE_ROWS), block_rows);
            float* zq = head.has_ref
                ? maker.ref_logits(ref_rows.block(row / TILE_ROWS), block_rows) : nullptr;
            for (int64_t i = 0; i < block_rows; ++i) {
              states[share * count + row + i].fold(
                  z + i * TILE_COLUMNS, zq == nullptr ? nullptr : zq + i * TILE_COLUMNS,
                  head.has_bias ? head.bias.data() + first : nullptr, width,
                  targets[group + row + i] - first, options.temperature, options.softcap);
            }
          }
        }
      }
    });

    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        RowState& state = states[row];
        for (int64_t share = 1; share < shares; ++share) {
          state.merge(states[share * count + row]);
        }
        // the share that holds the target's column has its logit
        const int64_t column = targets[group + row];
        if (column >= 0 && column < V) {
          const RowState& holder = states[column / TILE_COLUMNS / tiles_per_share * count + row];
          state.t = holder.t;
          state.tq = holder.tq;
        }
        out.write(group + row, state, targets.counted(group + row));
      }
    });
  }
  return out.tuple();
}

// c += or = tile
void put_tile(
    const float* tile, int64_t rows, int64_t columns, bool add, float* c, int64_t ldc) {
  const Kernels& table = kernels();
  for (int64_t i = 0; i < rows; ++i, c += ldc, tile += TILE_COLUMNS) {
    if (add) {
      table.accumulate(tile, columns, c);
    } else {
      table.from_float(tile, columns, Dtype::float32, c);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> head_grad(
    const Tensor& hidden,              // (N, H)
    const Tensor& weight,              // (V, H)
    const OptionalTensor& bias,        // (V,)
    const OptionalTensor& target,      // (N,)
    const OptionalTensor& ref_hidden,  // (N, H)
    const Tensor& peak, const Tensor& log_sum, const Tensor& entropy, const Tensor& gap,
    const OptionalTensor& d_log_prob, const OptionalTensor& d_entropy, const OptionalTensor& d_kl,
    double temperature, double softcap, int64_t ignore_index,
    bool need_dhidden, bool need_dweight, bool need_dbias) {
  const Kernels& table = kernels();
  const Options options{static_cast<float>(temperature), static_cast<float>(softcap)};
  const Targets targets(target, ignore_index);
  const GradientRows incoming(peak, log_sum, entropy, gap, d_log_prob, d_entropy, d_kl);
  Head head(weight, bias, hidden, incoming.has_kl() ? ref_hidden : OptionalTensor());
  const int64_t N = hidden.size(0), V = head.V(), H = head.H();
  Tensor dhidden = need_dhidden ? at::empty({N, H}, hidden.options()) : at::empty({0}, hidden.options());
  Tensor dweight = need_dweight ? at::empty({V, H}, weight.options()) : at::empty({0}, weight.options());
  Tensor dbias = at::empty({need_dbias ? V : 0}, hidden.options().dtype(at::kFloat));
  if (N == 0) {
    dweight.zero_();
    dbias.zero_();
    return {dhidden, dweight, dbias};
  }

  // A slab's dweight and dbias must be whole before the next slab, so then every row is of one
  // group; otherwise a group is as many rows as are packed at once.
  const int64_t at_once = head.rows_at_once(N);
  const bool all_rows = need_dweight || need_dbias;
  const int64_t group_size = all_rows ? N : std::min(at_once, N);
  const int64_t blocks_at_once = at_once / TILE_ROWS;
  PackedRows rows(head.hidden, at_once), ref_rows(head.ref_hidden, head.has_ref ? at_once : 0);
  Buffer dz_rows(at_once * SLAB);                                  // panels of rows, K = the slab
  Buffer dz_columns(need_dweight ? at_once * SLAB : 0);            // panels of the slab, K = rows
  Buffer dbias_blocks(need_dbias ? blocks_at_once * SLAB : 0);     // column sums of each block
  Buffer dweight_sum(need_dweight ? SLAB * H : 0);
  const bool direct = dhidden.scalar_type() == at::kFloat;
  Buffer dhidden_room(need_dhidden && !direct ? group_size * H : 0);

  for (int64_t group = 0; group < N; group += group_size) {
    const int64_t group_rows = std::min(group_size, N - group);
    float* dhidden_sum = !need_dhidden ? nullptr
        : direct ? dhidden.mutable_data_ptr<float>() + group * H : dhidden_room.data();
    for (int64_t slab = 0; slab < V; slab += SLAB) {
      const int64_t width = std::min(SLAB, V - slab);
      const int64_t tiles = ceil_div(width, TILE_COLUMNS);
      for (int64_t part = 0; part < group_rows; part += at_once) {
        const int64_t count = std::min(at_once, group_rows - part);
        const int64_t first_row = group + part, blocks = ceil_div(count, TILE_ROWS);
        auto rows_of = [&](int64_t block) { return std::min(TILE_ROWS, count - block * TILE_ROWS); };
        if (slab == 0 || group_rows > at_once) {
          rows.pack_group(first_row, count);
          if (head.has_ref) ref_rows.pack_group(first_row, count);
        }

        // dz of the slab
        at::parallel_for(0, tiles * blocks, 1, [&](int64_t begin, int64_t end) {
          TileMaker maker(head);
          for (int64_t item = begin; item < end; ++item) {
            const int64_t tile = item / blocks * TILE_COLUMNS, block = item % blocks;
            const int64_t first = slab + tile, n = std::min(TILE_COLUMNS, V - first);
            const int64_t row = first_row + block * TILE_ROWS;
            const float* tile_bias = head.has_bias ? head.bias.data() + first : nullptr;
            maker.choose(first, n);
            float* z = maker.logits(rows.block(block), rows_of(block));
            float* zq =
                head.has_ref ? maker.ref_logits(ref_rows.block(block), rows_of(block)) : nullptr;
            for (int64_t i = 0; i < rows_of(block); ++i) {
              float* z_row = z + i * TILE_COLUMNS;
              float* zq_row = zq == nullptr ? nullptr : zq + i * TILE_COLUMNS;
              if (!targets.counted(row + i)) {
                std::fill(z_row, z_row + n, 0.0f);
                continue;
              }
              table.transform(z_row, tile_bias, n, options.temperature, options.softcap);
              if (zq_row != nullptr) {
                table.transform(zq_row, tile_bias, n, options.temperature, options.softcap);
              }
              const int64_t column = targets[row + i] - first;
              table.gradient(
                  z_row, zq_row, n, column >= 0 && column < n ? column : -1, incoming[row + i],
                  options.temperature, options.softcap);
            }
            const Matrix dz(z, rows_of(block), n, TILE_COLUMNS);
            if (need_dhidden) {
              pack(
                  dz, 0, rows_of(block), 0, n, table.row_panel,
                  dz_rows.data() + block * TILE_ROWS * SLAB + tile * table.row_panel,
                  SLAB * table.row_panel);
            }
            if (need_dweight) {
              pack(
                  dz.t(), 0, n, 0, rows_of(block), table.row_panel,
                  dz_columns.data() + tile * at_once + block * TILE_ROWS * table.row_panel,
                  at_once * table.row_panel);
            }
            if (need_dbias) {
              float* sums = dbias_blocks.data() + block * SLAB + tile;
              put_tile(z, 1, n, false, sums, SLAB);
              for (int64_t i = 1; i < rows_of(block); ++i) {
                table.accumulate(z + i * TILE_COLUMNS, n, sums);
              }
            }
          }
        });

        // dhidden += dz weight
        const int64_t h_tiles = ceil_div(H, TILE_COLUMNS);
        const int64_t h_items = need_dhidden ? h_tiles * blocks : 0;
        at::parallel_for(0, h_items, 1, [&](int64_t begin, int64_t end) {
          Buffer columns(TILE_COLUMNS * width), tile(TILE_ROWS * TILE_COLUMNS);
          int64_t packed = -1;
          for (int64_t item = begin; item < end; ++item) {
            const int64_t h = item / blocks * TILE_COLUMNS, block = item % blocks;
            const int64_t n = std::min(TILE_COLUMNS, H - h);
            if (packed != h) {
              packed = h;
              pack(
                  head.weight.t(), h, n, slab, width, table.column_panel, columns.data(),
                  width * table.column_panel);
            }
            table.multiply(
                dz_rows.data() + block * TILE_ROWS * SLAB,
                ceil_div(rows_of(block), table.row_panel), SLAB * table.row_panel, columns.data(),
                ceil_div(n, table.column_panel), width * table.column_panel, width, tile.data(),
                TILE_COLUMNS, false);
            put_tile(
                tile.data(), rows_of(block), n, slab > 0,
                dhidden_sum + (part + block * TILE_ROWS) * H + h, H);
          }
        });

        // dweight += dz^T hidden
        const int64_t v_blocks = ceil_div(width, TILE_ROWS);
        const int64_t w_items = need_dweight ? h_tiles * v_blocks : 0;
        at::parallel_for(0, w_items, 1, [&](int64_t begin, int64_t end) {
          Buffer columns(TILE_COLUMNS * count), tile(TILE_ROWS * TILE_COLUMNS);
          int64_t packed = -1;
          for (int64_t item = begin; item < end; ++item) {
            const int64_t h = item / v_blocks * TILE_COLUMNS, v = item % v_blocks * TILE_ROWS;
            const int64_t n = std::min(TILE_COLUMNS, H - h);
            const int64_t v_count = std::min(TILE_ROWS, width - v);
            if (packed != h) {
              packed = h;
              pack(
                  head.hidden.t(), h, n, first_row, count, table.column_panel, columns.data(),
                  count * table.column_panel);
            }
            table.multiply(
                dz_columns.data() + v * at_once, ceil_div(v_count, table.row_panel),
                at_once * table.row_panel, columns.data(), ceil_div(n, table.column_panel),
                count * table.column_panel, count, tile.data(), TILE_COLUMNS, false);
            put_tile(
                tile.data(), v_count, n, part > 0, dweight_sum.data() + v * H + h, H);
          }
        });
        for (int64_t block = 0; need_dbias && block < blocks; ++block) {
          put_tile(
              dbias_blocks.data() + block * SLAB, 1, width, part + block > 0,
              dbias.mutable_data_ptr<float>() + slab, V);
        }
      }
      if (need_dweight) store_tile(dweight_sum.data(), H, width, H, dweight, slab, 0);
    }
    if (need_dhidden && !direct) {
      store_tile(dhidden_sum, H, group_rows, H, dhidden, group, 0);
    }
  }
  return {dhidden, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("head_stats_cpu", head_stats);
  m.impl("head_grad_cpu", head_grad);
}

}  // namespace perl_kernels::cpu
