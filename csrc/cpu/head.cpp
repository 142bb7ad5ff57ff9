// Statistics of softmax(z) and their gradient from hidden states, with z made tile by tile:
// z = softcap * tanh((hidden weight^T + bias) / softcap) / temperature. No [N, V] buffer exists.
// An adapter makes the product's inner dimension R longer: [hidden | s] [weight | b]^T with
// s = scale * hidden a^T; the reference goes without. Its gradient ds is R more columns of dhidden.
//
// Rows are packed once per group. Statistics: the vocabulary is cut into shares whose number does
// not depend on the number of threads; each sweeps its tiles into a state per row, and the states
// merge in order. Gradient: for one slab of the vocabulary at a time, dz of all rows of the group
// is made tile by tile and packed at once as the left operand of dhidden += dz weight. Both at once,
// in one sweep, where only log p and KL have a gradient: `head_units`.
//
// Where the processor multiplies bfloat16 itself, its products stay bfloat16 with float32 sums: by
// vectors (AVX512-BF16) here, by matrix tiles (AMX) through oneDNN; logits are float32 either way,
// and the adapter's part of them is made of float32 panels.
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <atomic>

#include "softmax.h"

namespace perl_kernels::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t PACKED_BYTES = int64_t{8} << 20;  // of rows at once, policy and reference
constexpr int64_t SWEEP_BYTES = int64_t{24} << 20;  // and with them of their gradients
constexpr int64_t MOST_ROWS = 10 * TILE_ROWS;
constexpr int64_t MOST_SHARES = 64;
constexpr int64_t SLAB = 6 * TILE_COLUMNS;

struct Options {
  float temperature, softcap;
};

// How a product is made.
enum class Products {
  floats,  // operands become float32 panels
  pairs,   // bfloat16 panels, by the processor's vectors
  tiles    // bfloat16, by the processor's matrix tiles (AMX), through oneDNN
};

const at::BFloat16* bfloat16(const char* data) {
  return reinterpret_cast<const at::BFloat16*>(data);
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

// The sizes of tiles that cut n columns.
std::vector<int64_t> tiles_of(int64_t n) {
  std::vector<int64_t> sizes;
  for (int64_t first = 0; first < n; first += TILE_COLUMNS) {
    sizes.push_back(std::min(TILE_COLUMNS, n - first));
  }
  return sizes;
}

// Calls work(begin, end) on runs of (tile, block of rows) items, numbered tile * blocks + block, of
// even total size.
template <class Work>
void parallel_items(const std::vector<int64_t>& tiles, int64_t rows, const Work& work) {
  std::vector<int64_t> weights;
  for (int64_t columns : tiles) {
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
      weights.push_back(
          round_up(columns, kernels().column_panel) *
          round_up(std::min(TILE_ROWS, rows - row), kernels().row_panel));
    }
  }
  parallel_by_weight(weights, work);
}

// c (P, Q) = or += rows (P, K) columns (Q, K)^T of float32 panels, for the adapter's small products
void product(const Matrix& rows, const Matrix& columns, bool add, float* c, int64_t ldc) {
  const Kernels& table = kernels();
  const int64_t K = rows.columns, blocks = ceil_div(rows.rows, TILE_ROWS);
  const int64_t tiles = ceil_div(columns.rows, TILE_COLUMNS);
  at::parallel_for(0, tiles * blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer left(TILE_ROWS * K), right(TILE_COLUMNS * K), tile(TILE_ROWS * TILE_COLUMNS);
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item % blocks * TILE_ROWS, j = item / blocks * TILE_COLUMNS;
      const int64_t p = std::min(TILE_ROWS, rows.rows - i);
      const int64_t q = std::min(TILE_COLUMNS, columns.rows - j);
      if (packed != j) {
        packed = j;
        pack(columns, j, q, 0, K, table.column_panel, right.data(), K * table.column_panel);
      }
      pack(rows, i, p, 0, K, table.row_panel, left.data(), K * table.row_panel);
      table.multiply(
          left.data(), ceil_div(p, table.row_panel), K * table.row_panel, right.data(),
          ceil_div(q, table.column_panel), K * table.column_panel, K, tile.data(), TILE_COLUMNS,
          false);
      put_tile(tile.data(), p, q, add, c + i * ldc + j, ldc);
    }
  });
}

// The head's adapter, or none: R is 0.
struct Adapter {
  const OptionalTensor a, b;  // (R, H), (V, R)
  const float scale;
  const int64_t R;
  Tensor s;  // (N, R) = scale * hidden a^T, float32

  Adapter(const OptionalTensor& a, const OptionalTensor& b, double scale, const Tensor& hidden)
      : a(a), b(b), scale(static_cast<float>(scale)), R(a.has_value() ? a->size(0) : 0) {
    if (R == 0) return;
    s = at::empty({hidden.size(0), R}, hidden.options().dtype(at::kFloat));
    product(Matrix(hidden), Matrix(*a).scaled(this->scale), false, s.mutable_data_ptr<float>(), R);
  }

  // dhidden (rows, H) += scale * ds a, where each row of `sums` is dhidden and then ds.
  void add_dhidden(float* sums, int64_t rows, int64_t H) const {
    if (R == 0) return;
    product(Matrix(sums + H, rows, R, H + R), Matrix(*a).t().scaled(scale), true, sums, H + R);
  }
};

// The head and the hidden states that go through it.
struct Head {
  const Matrix weight, hidden, ref_hidden;
  const bool has_ref;
  Buffer bias;  // float32, or none
  const bool has_bias;
  const Adapter adapter;
  const Products products;

  Head(
      const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& a,
      const OptionalTensor& b, double scale, const Tensor& hidden,
      const OptionalTensor& ref_hidden)
      : weight(weight), hidden(hidden), ref_hidden(ref_hidden.value_or(hidden)),
        has_ref(ref_hidden.has_value()), bias(bias.has_value() ? weight.size(0) : 0),
        has_bias(bias.has_value()), adapter(a, b, scale, hidden),
        products(
            !(paired(this->weight) && paired(this->hidden) && paired(this->ref_hidden))
                ? Products::floats
            : has_bfloat16_tiles()                  ? Products::tiles
            : kernels().multiply_pairs != nullptr   ? Products::pairs
                                                    : Products::floats) {
    if (has_bias) vector_to_float(*bias, 0, weight.size(0), this->bias.data());
  }

  int64_t V() const { return weight.rows; }
  int64_t H() const { return weight.columns; }
  int64_t R() const { return adapter.R; }
  // A row of an operand as it is multiplied: H floats, or as many of pairs.
  Matrix operand(const Matrix& m) const {
    return products == Products::floats ? m : pairs_of(m);
  }
  int64_t K() const { return products == Products::floats ? H() : H() / 2; }
  // Floats of a packed column: weight's, then b's.
  int64_t column_length() const { return K() + R(); }
  // Row `column` of [weight | b] as floats.
  void read_class(int64_t column, float* to) const {
    auto read = [&](const Matrix& m) {
      kernels().to_float(m.at(column, 0), m.dtype, m.column_stride, m.columns, to);
      to += m.columns;
    };
    read(weight);
    if (R() > 0) read(Matrix(*adapter.b));
  }
  // How many rows to work on at once, each with `more` floats beside its packed operands.
  int64_t rows_at_once(int64_t rows, int64_t more = 0, int64_t max_bytes = PACKED_BYTES) const {
    const int64_t bytes = (K() * (has_ref ? 2 : 1) + R() + more) * sizeof(float);
    return cpu::rows_at_once(rows, std::max(bytes, max_bytes / MOST_ROWS), max_bytes);
  }
};

// Hidden states of a group of rows as a left operand, in blocks of TILE_ROWS.
class Rows {
 public:
  static Rows policy(const Head& head, int64_t at_once) {
    return Rows(head, head.hidden, head.R(), at_once);
  }
  static Rows reference(const Head& head, int64_t at_once) {
    return Rows(head, head.ref_hidden, 0, head.has_ref ? at_once : 0);
  }

  void take(int64_t first, int64_t rows) {
    first_ = first;
    const Kernels& table = kernels();
    const int64_t stride = length() * table.row_panel;
    at::parallel_for(0, ceil_div(rows, TILE_ROWS), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * TILE_ROWS; row < std::min(end * TILE_ROWS, rows);
           row += TILE_ROWS) {
        const int64_t count = std::min(TILE_ROWS, rows - row);
        float* to = packed_.data() + row * length();
        if (K_ > 0) {
          pack(head_.operand(hidden_), first + row, count, 0, K_, table.row_panel, to, stride);
        }
        if (R_ > 0) {
          pack(
              Matrix(head_.adapter.s), first + row, count, 0, R_, table.row_panel,
              to + K_ * table.row_panel, stride);
        }
      }
    });
  }

  // z (rows, n) = block * columns^T, with stride TILE_COLUMNS
  void multiply(int64_t block, int64_t rows, float* columns, int64_t n, float* z) {
    const Kernels& table = kernels();
    const int64_t width = table.column_panel, columns_stride = head_.column_length() * width;
    const int64_t row_panels = ceil_div(rows, table.row_panel);
    const int64_t row_stride = length() * table.row_panel;
    const float* packed = packed_.data() + block * TILE_ROWS * length();
    if (head_.products != Products::tiles) {
      (head_.products == Products::pairs ? table.multiply_pairs : table.multiply)(
          packed, row_panels, row_stride, columns, ceil_div(n, width), columns_stride, K_, z,
          TILE_COLUMNS, false);
    } else {
      for (int64_t j = 0; j < n; j += width) {
        at::native::cpublas::brgemm(
            rows, width, head_.H(), hidden_.row_stride, width, TILE_COLUMNS, /*add_C=*/false,
            bfloat16(hidden_.at(first_ + block * TILE_ROWS, 0)),
            reinterpret_cast<const at::BFloat16*>(columns + j * head_.column_length()), z + j);
      }
    }
    if (R_ > 0) {
      table.multiply(
          packed + K_ * table.row_panel, row_panels, row_stride, columns + head_.K() * width,
          ceil_div(n, width), columns_stride, R_, z, TILE_COLUMNS, true);
    }
  }

 private:
  Rows(const Head& head, const Matrix& hidden, int64_t R, int64_t at_once)
      : head_(head), hidden_(hidden), K_(head.products == Products::tiles ? 0 : head.K()), R_(R),
        packed_(at_once * length()) {}
  // Floats of a packed row: hidden's, unless oneDNN reads them where they are, then those of s.
  int64_t length() const { return K_ + R_; }

  const Head& head_;
  const Matrix hidden_;
  const int64_t K_, R_;
  Buffer packed_;
  int64_t first_ = 0;
};

// One thread's tile of the head's weight, and of logits.
class TileMaker {
 public:
  explicit TileMaker(const Head& head)
      : head_(head), columns_(TILE_COLUMNS * head.column_length()), z_(TILE_ROWS * TILE_COLUMNS),
        zq_(head.has_ref ? TILE_ROWS * TILE_COLUMNS : 0) {}
  ~TileMaker() {
    if (head_.products == Products::tiles) at::native::cpublas::brgemm_release();
  }

  // Choose columns first .. first + count of the vocabulary.
  void choose(int64_t first, int64_t count) {
    if (first == first_) return;
    first_ = first;
    count_ = count;
    const int64_t width = kernels().column_panel, stride = head_.column_length() * width;
    const int64_t K = head_.K(), R = head_.R();
    pack(head_.operand(head_.weight), first, count, 0, K, width, columns_.data(), stride);
    if (R > 0) {
      pack(
          Matrix(*head_.adapter.b), first, count, 0, R, width, columns_.data() + K * width,
          stride);
    }
  }

  // Raw logits of one block of `count` rows, with stride TILE_COLUMNS.
  float* logits(Rows& rows, int64_t block, int64_t count) {
    logits(rows, block, count, z_.data());
    return z_.data();
  }
  void logits(Rows& rows, int64_t block, int64_t count, float* z) {
    rows.multiply(block, count, columns_.data(), count_, z);
  }
  float* ref_logits(Rows& rows, int64_t block, int64_t count) {
    rows.multiply(block, count, columns_.data(), count_, zq_.data());
    return zq_.data();
  }

 private:
  const Head& head_;
  Buffer columns_, z_, zq_;
  int64_t first_ = -1, count_ = 0;
};

// dz of one slab of the vocabulary as a left operand of dz [weight | b]; or several such dz, each a
// set of the same rows.
class GradientRowsOfSlab {
 public:
  GradientRowsOfSlab(const Head& head, int64_t at_once, int64_t sets, bool need_dhidden)
      : head_(head), stride_(head.products == Products::floats ? SLAB : SLAB / 2),
        blocks_at_once_(at_once / TILE_ROWS), sets_(sets), packed_(sets * at_once * stride_) {
    if (need_dhidden) add_pieces(head.weight, 0);
    if (head.R() == 0) return;
    b_ = head.products == Products::floats ? *head.adapter.b
                                           : head.adapter.b->to(at::kBFloat16).contiguous();
    add_pieces(Matrix(b_), head.H());
  }

  // A tile of a set's dz, `first` columns into the slab; overwrites z.
  void put(int64_t set, int64_t block, float* z, int64_t rows, int64_t first, int64_t n) {
    const Kernels& table = kernels();
    block += set * blocks_at_once_;
    Matrix tile(z, rows, n, TILE_COLUMNS);
    if (head_.products != Products::floats) {
      // rounded in place, so that a row of pairs starts where the row of floats did
      const int64_t stride = head_.products == Products::tiles ? SLAB : 2 * TILE_COLUMNS;
      at::BFloat16* to = head_.products == Products::tiles
          ? rounded() + block * TILE_ROWS * SLAB + first
          : reinterpret_cast<at::BFloat16*>(z);
      for (int64_t i = 0; i < rows; ++i, z += TILE_COLUMNS, to += stride) {
        table.from_float(z, n, Dtype::bfloat16, to);
        if (n % 2 != 0) to[n] = 0;
      }
      if (head_.products == Products::tiles) return;
      tile = Matrix(z - rows * TILE_COLUMNS, rows, ceil_div(n, 2), TILE_COLUMNS);
      first /= 2;
    }
    pack(
        tile, 0, rows, 0, tile.columns, table.row_panel,
        packed_.data() + block * TILE_ROWS * stride_ + first * table.row_panel,
        stride_ * table.row_panel);
  }

  // c (sets, count, H + R), the sets c_stride apart, = or += dz [weight | b] over the slab's `width`
  // columns.
  void times_weight(
      int64_t slab, int64_t width, int64_t count, bool add, float* c, int64_t c_stride = 0) {
    const int64_t blocks = ceil_div(count, TILE_ROWS), ldc = head_.H() + head_.R();
    std::vector<int64_t> sizes;
    for (const Piece& piece : pieces_) sizes.push_back(piece.count);
    parallel_items(sizes, count, [&](int64_t begin, int64_t end) {
      Buffer columns(TILE_COLUMNS * round_up(width, 2)), tile(TILE_ROWS * TILE_COLUMNS);
      int64_t packed = -1;
      for (int64_t item = begin; item < end; ++item) {
        const Piece& piece = pieces_[item / blocks];
        const int64_t row = item % blocks * TILE_ROWS, rows = std::min(TILE_ROWS, count - row);
        if (packed != item / blocks) {
          packed = item / blocks;
          pack_piece(piece, slab, width, columns.data());
        }
        for (int64_t set = 0; set < sets_; ++set) {
          const int64_t block = set * blocks_at_once_ + item % blocks;
          multiply(block, rows, width, columns.data(), piece.count, tile.data());
          put_tile(
              tile.data(), rows, piece.count, add, c + set * c_stride + row * ldc + piece.to, ldc);
        }
      }
      if (head_.products == Products::tiles) at::native::cpublas::brgemm_release();
    });
  }

 private:
  // Columns first .. first + count of weight or b, and where they go in a row of results.
  struct Piece {
    Matrix source;
    int64_t first, count, to;
  };

  void add_pieces(const Matrix& source, int64_t to) {
    for (int64_t first = 0; first < source.columns; first += TILE_COLUMNS) {
      const int64_t count = std::min(TILE_COLUMNS, source.columns - first);
      pieces_.push_back({source, first, count, to + first});
    }
  }

  // The slab's rows of a piece as the right operand.
  void pack_piece(const Piece& piece, int64_t slab, int64_t width, float* columns) const {
    const auto& [source, first, count, _] = piece;
    const int64_t panel = kernels().column_panel;
    if (head_.products == Products::floats) {
      pack(source.t(), first, count, slab, width, panel, columns, width * panel);
    } else {
      pack_pairs_of_rows(
          source, first, count, slab, width, panel, columns, ceil_div(width, 2) * panel);
    }
  }

  // tile (rows, n) = dz of the block * columns^T
  void multiply(
      int64_t block, int64_t rows, int64_t width, float* columns, int64_t n, float* tile) {
    const Kernels& table = kernels();
    const int64_t panel = table.column_panel;
    const int64_t K = head_.products == Products::floats ? width : ceil_div(width, 2);
    if (head_.products != Products::tiles) {
      (head_.products == Products::pairs ? table.multiply_pairs : table.multiply)(
          packed_.data() + block * TILE_ROWS * stride_, ceil_div(rows, table.row_panel),
          stride_ * table.row_panel, columns, ceil_div(n, panel), K * panel, K, tile,
          TILE_COLUMNS, false);
      return;
    }
    for (int64_t j = 0; j < n; j += panel) {
      at::native::cpublas::brgemm(
          rows, panel, 2 * K, SLAB, panel, TILE_COLUMNS, /*add_C=*/false,
          rounded() + block * TILE_ROWS * SLAB,
          reinterpret_cast<const at::BFloat16*>(columns + j * K), tile + j);
    }
  }

  at::BFloat16* rounded() { return reinterpret_cast<at::BFloat16*>(packed_.data()); }

  const Head& head_;
  const int64_t stride_;  // floats of one row
  const int64_t blocks_at_once_, sets_;
  Buffer packed_;
  Tensor b_;  // as the products want it
  std::vector<Piece> pieces_;
};

StatsTuple head_stats(
    const Tensor& hidden,              // (N, H)
    const Tensor& weight,              // (V, H)
    const OptionalTensor& bias,        // (V,)
    const OptionalTensor& a,           // (R, H)
    const OptionalTensor& b,           // (V, R)
    const OptionalTensor& target,      // (N,)
    const OptionalTensor& ref_hidden,  // (N, H)
    double scale, double temperature, double softcap, int64_t ignore_index) {
  Head head(weight, bias, a, b, scale, hidden, ref_hidden);
  const Options options{static_cast<float>(temperature), static_cast<float>(softcap)};
  const Targets targets(target, ignore_index);
  const int64_t N = hidden.size(0), V = head.V();
  Stats out(hidden, N, target.has_value(), head.has_ref);
  if (N == 0) return out.tuple();

  const int64_t tiles = ceil_div(V, TILE_COLUMNS);
  const int64_t tiles_per_share = ceil_div(tiles, MOST_SHARES);
  const int64_t shares = ceil_div(tiles, tiles_per_share);
  const int64_t at_once = head.rows_at_once(N);
  Rows rows = Rows::policy(head, at_once), ref_rows = Rows::reference(head, at_once);
  std::vector<RowState> states(shares * std::min(at_once, N));

  for (int64_t group = 0; group < N; group += at_once) {
    const int64_t count = std::min(at_once, N - group);
    rows.take(group, count);
    if (head.has_ref) ref_rows.take(group, count);
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
            float* z = maker.logits(rows, row / TILE_ROWS, block_rows);
            float* zq = head.has_ref
                ? maker.ref_logits(ref_rows, row / TILE_ROWS, block_rows) : nullptr;
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_grad(
    const Tensor& hidden,              // (N, H)
    const Tensor& weight,              // (V, H)
    const OptionalTensor& bias,        // (V,)
    const OptionalTensor& a,           // (R, H)
    const OptionalTensor& b,           // (V, R)
    const OptionalTensor& target,      // (N,)
    const OptionalTensor& ref_hidden,  // (N, H)
    const Tensor& peak, const Tensor& log_sum, const Tensor& entropy, const Tensor& gap,
    const OptionalTensor& d_log_prob, const OptionalTensor& d_entropy, const OptionalTensor& d_kl,
    double scale, double temperature, double softcap, int64_t ignore_index,
    bool need_dhidden, bool need_dweight, bool need_dbias, bool need_dab) {
  const Kernels& table = kernels();
  const Options options{static_cast<float>(temperature), static_cast<float>(softcap)};
  const Targets targets(target, ignore_index);
  const GradientRows incoming(peak, log_sum, entropy, gap, d_log_prob, d_entropy, d_kl);
  Head head(
      weight, bias, a, b, scale, hidden, incoming.has_kl() ? ref_hidden : OptionalTensor());
  const int64_t N = hidden.size(0), V = head.V(), H = head.H(), R = head.R();
  auto output = [](const Tensor& like, bool wanted) {
    return at::empty(wanted ? like.sizes() : at::IntArrayRef{0}, like.options());
  };
  Tensor dhidden = output(hidden, need_dhidden), dweight = output(weight, need_dweight);
  Tensor dbias = at::empty({need_dbias ? V : 0}, hidden.options().dtype(at::kFloat));
  Tensor da = output(a.value_or(hidden), need_dab), db = output(b.value_or(hidden), need_dab);
  if (N == 0) {
    for (Tensor* zeros : {&dweight, &dbias, &da, &db}) zeros->zero_();
    return {dhidden, dweight, dbias, da, db};
  }
  // dz^T hidden, or with an adapter dz^T s: never both, as the base of an adapter is frozen
  const bool need_dcolumns = need_dweight || need_dab;
  const Matrix dcolumns_right = need_dab ? Matrix(head.adapter.s) : head.hidden;
  Tensor& dcolumns_out = need_dab ? db : dweight;
  const int64_t C = dcolumns_right.columns;
  Tensor ds = at::empty({need_dab ? N : 0, R}, hidden.options().dtype(at::kFloat));

  // A slab's dweight, db and dbias must be whole before the next slab, so then every row is of one
  // group; otherwise a group is as many rows as are packed at once.
  const int64_t at_once = head.rows_at_once(N);
  const bool all_rows = need_dcolumns || need_dbias;
  const int64_t group_size = all_rows ? N : std::min(at_once, N);
  const int64_t blocks_at_once = at_once / TILE_ROWS;
  Rows rows = Rows::policy(head, at_once), ref_rows = Rows::reference(head, at_once);
  const bool need_rows = need_dhidden || need_dab;
  GradientRowsOfSlab dz_rows(head, need_rows ? at_once : 0, 1, need_dhidden);
  Buffer dz_columns(need_dcolumns ? at_once * SLAB : 0);        // panels of the slab, K = rows
  Buffer dbias_blocks(need_dbias ? blocks_at_once * SLAB : 0);  // column sums of each block
  Buffer dcolumns_sum(need_dcolumns ? SLAB * C : 0);
  const bool direct = dhidden.scalar_type() == at::kFloat && R == 0;
  Buffer rows_room(need_rows && !direct ? group_size * (H + R) : 0);

  for (int64_t group = 0; group < N; group += group_size) {
    const int64_t group_rows = std::min(group_size, N - group);
    float* rows_sum = !need_rows ? nullptr  // dhidden and ds, row by row
        : direct ? dhidden.mutable_data_ptr<float>() + group * H : rows_room.data();
    for (int64_t slab = 0; slab < V; slab += SLAB) {
      const int64_t width = std::min(SLAB, V - slab);
      for (int64_t part = 0; part < group_rows; part += at_once) {
        const int64_t count = std::min(at_once, group_rows - part);
        const int64_t first_row = group + part, blocks = ceil_div(count, TILE_ROWS);
        auto rows_of = [&](int64_t block) {
          return std::min(TILE_ROWS, count - block * TILE_ROWS);
        };
        if (slab == 0 || group_rows > at_once) {
          rows.take(first_row, count);
          if (head.has_ref) ref_rows.take(first_row, count);
        }

        // dz of the slab
        parallel_items(tiles_of(width), count, [&](int64_t begin, int64_t end) {
          TileMaker maker(head);
          for (int64_t item = begin; item < end; ++item) {
            const int64_t tile = item / blocks * TILE_COLUMNS, block = item % blocks;
            const int64_t first = slab + tile, n = std::min(TILE_COLUMNS, V - first);
            const int64_t row = first_row + block * TILE_ROWS;
            const float* tile_bias = head.has_bias ? head.bias.data() + first : nullptr;
            maker.choose(first, n);
            float* z = maker.logits(rows, block, rows_of(block));
            float* zq = head.has_ref ? maker.ref_logits(ref_rows, block, rows_of(block)) : nullptr;
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
            if (need_dcolumns) {
              pack(
                  Matrix(z, rows_of(block), n, TILE_COLUMNS).t(), 0, n, 0, rows_of(block),
                  table.row_panel,
                  dz_columns.data() + tile * at_once + block * TILE_ROWS * table.row_panel,
                  at_once * table.row_panel);
            }
            if (need_dbias) {
              float* sums = dbias_blocks.data() + block * SLAB + tile;
              alignas(64) float part[TILE_COLUMNS];  // a sum of sums of 12 rows rounds less
              for (int64_t i = 0; i < rows_of(block); i += 12) {
                put_tile(z + i * TILE_COLUMNS, 1, n, false, part, TILE_COLUMNS);
                for (int64_t j = i + 1; j < std::min(i + 12, rows_of(block)); ++j) {
                  table.accumulate(z + j * TILE_COLUMNS, n, part);
                }
                put_tile(part, 1, n, i > 0, sums, SLAB);
              }
            }
            if (need_rows) dz_rows.put(0, block, z, rows_of(block), tile, n);
          }
        });

        // [dhidden | ds] += dz [weight | b]
        if (need_rows) {
          dz_rows.times_weight(slab, width, count, slab > 0, rows_sum + part * (H + R));
        }

        // dweight += dz^T hidden, or db += dz^T s
        const int64_t c_tiles = ceil_div(C, TILE_COLUMNS), v_blocks = ceil_div(width, TILE_ROWS);
        const int64_t c_items = need_dcolumns ? c_tiles * v_blocks : 0;
        at::parallel_for(0, c_items, 1, [&](int64_t begin, int64_t end) {
          Buffer columns(TILE_COLUMNS * count), tile(TILE_ROWS * TILE_COLUMNS);
          int64_t packed = -1;
          for (int64_t item = begin; item < end; ++item) {
            const int64_t c = item / v_blocks * TILE_COLUMNS, v = item % v_blocks * TILE_ROWS;
            const int64_t n = std::min(TILE_COLUMNS, C - c);
            const int64_t v_count = std::min(TILE_ROWS, width - v);
            if (packed != c) {
              packed = c;
              pack(
                  dcolumns_right.t(), c, n, first_row, count, table.column_panel, columns.data(),
                  count * table.column_panel);
            }
            table.multiply(
                dz_columns.data() + v * at_once, ceil_div(v_count, table.row_panel),
                at_once * table.row_panel, columns.data(), ceil_div(n, table.column_panel),
                count * table.column_panel, count, tile.data(), TILE_COLUMNS, false);
            put_tile(
                tile.data(), v_count, n, part > 0, dcolumns_sum.data() + v * C + c, C);
          }
        });
        for (int64_t block = 0; need_dbias && block < blocks; ++block) {
          put_tile(
              dbias_blocks.data() + block * SLAB, 1, width, part + block > 0,
              dbias.mutable_data_ptr<float>() + slab, V);
        }
      }
      if (need_dcolumns) store_tile(dcolumns_sum.data(), C, width, C, dcolumns_out, slab, 0);
    }
    if (need_dab) store_tile(rows_sum + H, H + R, group_rows, R, ds, group, 0);
    if (need_dhidden && !direct) {
      head.adapter.add_dhidden(rows_sum, group_rows, H);
      store_tile(rows_sum, H + R, group_rows, H, dhidden, group, 0);
    }
  }
  if (need_dab) transposed_product(Matrix(ds), head.hidden, head.adapter.scale, da);
  return {dhidden, dweight, dbias, da, db};
}

// e^(z-m) is finite in float32, and so are its sums, up to this far above m.
constexpr double HIGHEST = 80;

// A class that is left out of a row's sums and put back exactly at the end.
struct LeftOut {
  int64_t column = -1;
  float z = 0, zq = 0;  // as `transform` left them
};

// What one tile says of a row.
struct TileOfRow {
  float most, most_q;
  LeftOut top;  // the tile's likeliest class, where it is likelier than any before the slab
  double sums[4];
};

// A row of `head_units`. `rest` is over all classes but target and top, relative to m and mq that
// need not be the largest logits; its d is centred: sum e^(z-m) (z - zq - centre).
struct SweepRow {
  RowState rest;
  LeftOut target, top;  // top, with a reference: the likeliest class so far
  double centre = 0;    // z - zq of top
  double most = std::numeric_limits<float>::lowest(), most_q = most;

  // Add a class that was left out.
  void add(double z, double zq, bool has_ref) {
    const double e = std::exp(z - rest.m);
    rest.l += e;
    if (e > 0) rest.u += e * (z - rest.m);
    if (!has_ref) return;
    if (e > 0) rest.d += e * (z - zq - centre);
    rest.lq += std::exp(zq - rest.mq);
  }
};

// One sweep for the statistics and for the gradients of log p and KL. With e = e^(z-m) for some m
// that keeps it finite, delta = z - zq and E = sum e, a row collects
//
//     A = sum e_j slope_j weight[j]        B = sum e_j (delta_j - c) slope_j weight[j]
//
// over all classes but two, the target and the likeliest: where p is near 1 their part would cancel
// most of the gradient. c is the likeliest one's delta. With gap = E_p[delta], at the end
//
//     d log p / d hidden = -A / E + ([j = target] - p_j) slope_j weight[j] of these two
//     d KL / d hidden    = (B - (gap - c) A) / E + p_j (delta_j - gap) slope_j weight[j] of these two
//
// Without a reference there is no B, and only the target is left out. Returned are both gradients;
// or, with d_log_prob, their sum weighted by d_log_prob and d_kl.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_units(
    const Tensor& hidden,              // (N, H)
    const Tensor& weight,              // (V, H)
    const OptionalTensor& bias,        // (V,)
    const OptionalTensor& a,           // (R, H)
    const OptionalTensor& b,           // (V, R)
    const OptionalTensor& target,      // (N,)
    const OptionalTensor& ref_hidden,  // (N, H)
    const OptionalTensor& d_log_prob,  // (N,)
    const OptionalTensor& d_kl,        // (N,), with d_log_prob where there is a reference
    double scale, double temperature, double softcap, int64_t ignore_index) {
  constexpr int64_t SLAB_TILES = SLAB / TILE_COLUMNS;
  const Kernels& table = kernels();
  const Options options{static_cast<float>(temperature), static_cast<float>(softcap)};
  const Targets targets(target, ignore_index);
  const double unit = logit_unit(options.temperature, options.softcap);
  Head head(weight, bias, a, b, scale, hidden, ref_hidden);
  const bool has_ref = head.has_ref, has_target = target.has_value();
  const bool weighted = d_log_prob.has_value();
  const int64_t N = hidden.size(0), V = head.V(), H = head.H(), C = H + head.R();
  Stats out(hidden, N, has_target, has_ref);
  auto gradient = [&](bool wanted) {
    return at::empty(wanted ? hidden.sizes() : at::IntArrayRef{0}, hidden.options());
  };
  Tensor dlog_prob = gradient(has_target || weighted), dkl = gradient(has_ref && !weighted);
  auto coefficients = [](const OptionalTensor& d) {
    return d.has_value() ? d->to(at::kFloat).contiguous() : Tensor();
  };
  const Tensor d_log_probs = coefficients(d_log_prob), d_kls = coefficients(d_kl);

  const int64_t sets = has_ref ? 2 : 1;
  const int64_t dz_floats = head.products == Products::floats ? SLAB : SLAB / 2;
  const int64_t at_once =
      N == 0 ? 0 : head.rows_at_once(N, sets * (C + dz_floats), SWEEP_BYTES);
  Rows rows = Rows::policy(head, at_once), ref_rows = Rows::reference(head, at_once);
  GradientRowsOfSlab dz_rows(head, at_once, sets, true);
  Buffer sums(sets * at_once * C);  // A and B: of dhidden and ds, row by row
  float* const sum_a = sums.data();
  float* const sum_b = sum_a + at_once * C;
  std::vector<TileOfRow> tile_rows(SLAB_TILES * at_once);

  for (int64_t group = 0; group < N; group += at_once) {
    const int64_t count = std::min(at_once, N - group), blocks = ceil_div(count, TILE_ROWS);
    auto rows_of = [&](int64_t block) { return std::min(TILE_ROWS, count - block * TILE_ROWS); };
    std::vector<SweepRow> states(count);
    rows.take(group, count);
    if (has_ref) ref_rows.take(group, count);

    auto slope = [&](const LeftOut& left_out) {
      const double capped = softcap > 0 ? left_out.z : 0.0;
      return (1.0 - capped * capped) / temperature;
    };

    int64_t width;
    // the first slab is small: it is done twice, to find m
    for (int64_t slab = 0; slab < V; slab += width) {
      width = std::min(slab == 0 ? TILE_COLUMNS : SLAB, V - slab);
      const int64_t tiles = ceil_div(width, TILE_COLUMNS);

      // e slope and e (delta - c) slope, folded and packed
      auto weigh_row = [&](int64_t row, int64_t first, int64_t n, float* z, float* zq,
                           TileOfRow& tile) {
        SweepRow& state = states[row];
        const float* tile_bias = head.has_bias ? head.bias.data() + first : nullptr;
        auto at = [&](int64_t column) {
          return LeftOut{column, z[column - first], zq == nullptr ? 0.0f : zq[column - first]};
        };
        auto leave_out = [&](int64_t column) {
          if (column < first || column >= first + n) return;
          z[column - first] = -std::numeric_limits<float>::infinity();
          if (zq != nullptr) zq[column - first] = -std::numeric_limits<float>::infinity();
        };
        tile.most = table.transform(z, tile_bias, n, options.temperature, options.softcap);
        tile.most_q = zq == nullptr
            ? 0.0f : table.transform(zq, tile_bias, n, options.temperature, options.softcap);
        tile.top = LeftOut();
        if (zq != nullptr && tile.most > state.most) {
          int64_t i = 0;
          while (i < n && z[i] * static_cast<float>(unit) != tile.most) ++i;
          tile.top = at(first + i);
        }
        const int64_t column = targets[group + row];
        if (column >= first && column < first + n) state.target = at(column);
        for (int64_t left : {column, state.top.column, tile.top.column}) leave_out(left);
        if (zq == nullptr) {
          table.weigh(
              z, n, static_cast<float>(state.rest.m), options.temperature, options.softcap,
              tile.sums);
        } else {
          table.weigh_pair(
              z, zq, n, static_cast<float>(state.rest.m), static_cast<float>(state.rest.mq),
              static_cast<float>(state.centre), options.temperature, options.softcap, tile.sums);
        }
        return tile.most > state.rest.m + HIGHEST ||
            (zq != nullptr && tile.most_q > state.rest.mq + HIGHEST);
      };
      std::atomic<bool> beyond;
      do {
        beyond = false;
        parallel_items(tiles_of(width), count, [&](int64_t begin, int64_t end) {
          TileMaker maker(head);
          for (int64_t item = begin; item < end; ++item) {
            const int64_t tile = item / blocks, block = item % blocks;
            const int64_t first = slab + tile * TILE_COLUMNS;
            const int64_t n = std::min(TILE_COLUMNS, slab + width - first);
            maker.choose(first, n);
            float* z = maker.logits(rows, block, rows_of(block));
            float* zq = has_ref ? maker.ref_logits(ref_rows, block, rows_of(block)) : nullptr;
            for (int64_t i = 0; i < rows_of(block); ++i) {
              const int64_t row = block * TILE_ROWS + i;
              const bool too_far = weigh_row(
                  row, first, n, z + i * TILE_COLUMNS,
                  zq == nullptr ? nullptr : zq + i * TILE_COLUMNS,
                  tile_rows[tile * at_once + row]);
              if (too_far) beyond = true;
            }
            dz_rows.put(0, block, z, rows_of(block), tile * TILE_COLUMNS, n);
            if (has_ref) dz_rows.put(1, block, zq, rows_of(block), tile * TILE_COLUMNS, n);
          }
        });
        if (!beyond) break;
        // move m and mq to the largest logits, and do the slab again
        at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            SweepRow& state = states[row];
            double m = state.rest.m, mq = state.rest.mq;
            for (int64_t tile = 0; tile < tiles; ++tile) {
              const TileOfRow& of = tile_rows[tile * at_once + row];
              if (of.most > state.rest.m + HIGHEST) m = std::max(m, double{of.most});
              if (has_ref && of.most_q > state.rest.mq + HIGHEST) {
                mq = std::max(mq, double{of.most_q});
              }
              if (slab == 0 && of.top.column >= 0) {
                state.top = of.top;
                state.most = of.most;
                state.centre = (double{of.top.z} - of.top.zq) * unit;
              }
            }
            if (slab > 0 && m > state.rest.m) {
              const float shrink = static_cast<float>(std::exp(state.rest.m - m));
              for (int64_t set = 0; set < sets; ++set) {
                float* values = sum_a + (set * at_once + row) * C;
                for (int64_t c = 0; c < C; ++c) values[c] *= shrink;
              }
            }
            state.rest.move_to(m, mq);
          }
        });
      } while (true);

      dz_rows.times_weight(slab, width, count, slab > 0, sum_a, at_once * C);

      at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        Buffer class_row(C);
        for (int64_t row = begin; row < end; ++row) {
          SweepRow& state = states[row];
          LeftOut top = state.top;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const TileOfRow& of = tile_rows[tile * at_once + row];
            state.rest.l += of.sums[0];
            state.rest.u += of.sums[1];
            state.most = std::max(state.most, double{of.most});
            if (!has_ref) continue;
            state.rest.lq += of.sums[2];
            state.rest.d += of.sums[3];
            state.most_q = std::max(state.most_q, double{of.most_q});
            if (of.top.column >= 0 && (top.column < 0 || of.top.z > top.z)) top = of.top;
          }
          if (top.column == state.top.column) continue;
          // a new likeliest class: the others come back, and it becomes the centre
          float* values_a = sum_a + row * C;
          float* values_b = sum_b + row * C;
          auto put_back = [&](const LeftOut& other) {
            if (other.column < 0 || other.column == top.column ||
                other.column == state.target.column) {
              return;
            }
            const double z = other.z * unit, zq = other.zq * unit;
            const double e = std::exp(z - state.rest.m) * slope(other);
            const float weight_a = static_cast<float>(e);
            const float weight_b = static_cast<float>(e * (z - zq - state.centre));
            head.read_class(other.column, class_row.data());
            for (int64_t c = 0; c < C; ++c) {
              values_a[c] += weight_a * class_row.data()[c];
              values_b[c] += weight_b * class_row.data()[c];
            }
            state.add(z, zq, true);
          };
          put_back(state.top);
          for (int64_t tile = 0; tile < tiles; ++tile) {
            put_back(tile_rows[tile * at_once + row].top);
          }
          const double centre = (double{top.z} - top.zq) * unit, moved = state.centre - centre;
          for (int64_t c = 0; c < C; ++c) values_b[c] += static_cast<float>(moved) * values_a[c];
          state.rest.d += moved * state.rest.l;
          state.centre = centre;
          state.top = top;
        }
      });
    }

    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      Buffer target_row(C), top_row(C), first(C);
      for (int64_t row = begin; row < end; ++row) {
        SweepRow& state = states[row];
        const bool counted = targets.counted(group + row);
        const LeftOut of_target = state.target, top = state.top;
        float* values_a = sum_a + row * C;
        float* values_b = sum_b + row * C;
        const double rest = state.rest.l;
        const bool apart = top.column >= 0 && top.column != of_target.column;
        if (of_target.column >= 0) state.add(of_target.z * unit, of_target.zq * unit, has_ref);
        const double with_target = state.rest.l;
        if (apart) state.add(top.z * unit, top.zq * unit, has_ref);
        const double E = state.rest.l, p_target = (with_target - rest) / E;
        const double p_top = (E - with_target) / E, gap = state.rest.d / E;  // from the centre
        const double others = (rest + E - with_target) / E;                  // than the target
        const double delta = (double{of_target.z} - of_target.zq) * unit - state.centre;
        state.rest.d += state.centre * E;
        state.rest.t = of_target.z * unit;
        state.rest.tq = of_target.zq * unit;
        state.rest.move_to(state.most, has_ref ? state.most_q : state.rest.mq);
        out.write(group + row, state.rest, counted);
        if (!counted) {
          std::fill(values_a, values_a + C, 0.0f);
          if (has_ref) std::fill(values_b, values_b + C, 0.0f);
          continue;
        }

        if (of_target.column >= 0) {
          head.read_class(of_target.column, target_row.data());
        } else {
          std::fill(target_row.data(), target_row.data() + C, 0.0f);
        }
        if (apart) {
          head.read_class(top.column, top_row.data());
        } else {
          std::fill(top_row.data(), top_row.data() + C, 0.0f);
        }
        // to = of_log_prob d log p / d hidden + of_kl d KL / d hidden, and ds
        auto blend = [&](double of_log_prob, double of_kl, float* to) {
          const float a_part = static_cast<float>(-(of_log_prob + of_kl * gap) / E);
          const float b_part = static_cast<float>(of_kl / E);
          const float target_part = static_cast<float>(
              (of_log_prob * others + (has_ref && p_target > 0 ? of_kl * p_target * (delta - gap) : 0.0)) *
              slope(of_target));
          const float top_part =
              static_cast<float>(-(of_log_prob + of_kl * gap) * p_top * slope(top));
          for (int64_t c = 0; c < C; ++c) {
            float sum = a_part * values_a[c] + target_part * target_row.data()[c];
            if (has_ref) sum += b_part * values_b[c] + top_part * top_row.data()[c];
            to[c] = sum;
          }
        };
        if (weighted) {
          blend(
              d_log_probs.const_data_ptr<float>()[group + row],
              has_ref ? d_kls.const_data_ptr<float>()[group + row] : 0.0, values_a);
        } else {
          blend(1.0, 0.0, first.data());
          if (has_ref) blend(0.0, 1.0, values_b);
          std::copy(first.data(), first.data() + C, values_a);
        }
      }
    });
    auto store = [&](float* values, Tensor& to) {
      if (to.numel() == 0) return;
      head.adapter.add_dhidden(values, count, H);
      at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        store_tile(values + begin * C, C, end - begin, H, to, group + begin, 0);
      });
    };
    store(sum_a, dlog_prob);
    store(sum_b, dkl);
  }
  return {out.log_prob, out.peak, out.log_sum, out.entropy, out.ref_log_prob, out.gap, out.kl,
          dlog_prob, dkl};
}

}  // namespace

TORCH_LIBRARY_IMPL(perl_kernels, CPU, m) {
  m.impl("head_stats_cpu", head_stats);
  m.impl("head_grad_cpu", head_grad);
  m.impl("head_units_cpu", head_units);
}

}  // namespace perl_kernels::cpu
