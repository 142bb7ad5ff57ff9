// A row of float32 logits that a library's product made: its statistics, then its gradient over it.
//
//     head_rows   log p, entropy, reference log p, KL; and dz, in hidden's type, where the logits lay
//
// One block a row, which it reads twice: once folding, and once, knowing the row's sums, to write.
// A thread takes eight logits at a time by 16-byte loads. What the next step needs is read before
// the barrier that lets this step's dz be written: dz is at most as wide as the logits, so a step
// writes over what it has read itself or an earlier step has.
//
// Plain C++ but for the functions of device.cuh, so that tests/emulate_cuda.cpp runs this very text
// on a CPU. Letters: N rows, V columns.
#pragma once

#include <cstdint>

#include "softmax.cuh"
#include "tiles.cuh"

namespace perl_kernels {

struct alignas(16) Four {
  float value[4];
};

template <typename T>
__device__ void write_chunk(T* to, const float (&x)[CHUNK]) {
  constexpr int SIZE = 16 / sizeof(T);
  struct alignas(16) Pack {
    T value[SIZE];
  };
#pragma unroll
  for (int i = 0; i < CHUNK; i += SIZE) {
    Pack pack;
#pragma unroll
    for (int j = 0; j < SIZE; ++j) pack.value[j] = from_float<T>(x[i + j]);
    *reinterpret_cast<Pack*>(to + i) = pack;
  }
}

template <typename T>
struct HeadRows {
  // (N, V), rows logits_stride apart, which is a multiple of CHUNK: the last chunk has room. Below
  // them the reference's N, where there is one.
  const float* logits;
  int64_t rows, columns, logits_stride;
  const T* bias;          // (V,) or null
  const int64_t* target;  // (N,) or null
  int64_t ignore_index;
  Transform transform;
  float *log_prob, *peak, *log_sum, *entropy, *ref_log_prob, *gap, *kl;  // (N,), null: not asked
  const float *d_log_prob, *d_kl;                                       // (N,) or null
  T* dz;       // (N, V) over the logits, rows dz_stride apart; null: none
  bool apart;  // dz is that of log p alone, and that of the KL lies over the reference's logits
  int64_t dz_stride;

  __device__ float biased(float raw, int64_t column) const {
    return bias && column < columns ? raw + to_float(bias[column]) : raw;
  }
  __device__ float z(float raw, int64_t column) const {
    return column < columns ? transform(raw) : -INFINITY;
  }
  __device__ float z_at(int64_t row, int64_t column) const {
    return z(biased(logits[row * logits_stride + column], column), column);
  }
  // A chunk of logits before softcap and temperature; beyond the row they say nothing.
  __device__ void read(int64_t row, int64_t first, float (&raw)[CHUNK]) const {
    if (first >= columns) return;
    const Four* from = reinterpret_cast<const Four*>(logits + row * logits_stride + first);
    const Four half[2] = {from[0], from[1]};
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) raw[j] = biased(half[j / 4].value[j % 4], first + j);
  }
};

template <typename T, bool HAS_REF>
__global__ void __launch_bounds__(THREADS) head_rows_kernel(const HeadRows<T> of) {
  const int64_t row = blockIdx.x, ref_row = row + of.rows;
  const int64_t wanted = of.target ? of.target[row] : -1;
  const bool counted = !of.target || wanted != of.ignore_index;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * CHUNK, step = THREADS * CHUNK;

  State state;
  for (int64_t first = begin; first < of.columns; first += step) {
    float z[CHUNK], zq[CHUNK];
    of.read(row, first, z);
    if (HAS_REF) of.read(ref_row, first, zq);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
      z[j] = of.z(z[j], first + j);
      if (HAS_REF) zq[j] = of.z(zq[j], first + j);
    }
    state.fold<HAS_REF>(z, zq);
  }
  state = of_block(state);
  const Row found = Row::of<HAS_REF>(state);
  if (threadIdx.x == 0) {
    auto write = [&](float* to, float x) {
      if (to) to[row] = counted ? x : 0.f;
    };
    write(of.peak, found.peak);
    write(of.log_sum, found.log_sum);
    write(of.entropy, found.entropy);
    write(of.gap, found.gap);
    write(of.kl, found.kl);
    const int64_t at = counted && of.target ? wanted : 0;
    write(of.log_prob, of.z_at(row, at) - state.m - found.log_sum);
    if (HAS_REF) write(of.ref_log_prob, of.z_at(ref_row, at) - state.mq - logf(state.lq));
  }
  if (!of.dz) return;

  auto sent = [&](const float* d) { return d && counted ? d[row] : 0.f; };
  const float d_log_prob = sent(of.d_log_prob), d_kl = HAS_REF ? sent(of.d_kl) : 0.f;
  const Gradient of_dz{d_log_prob, 0.f, of.apart ? 0.f : d_kl}, of_dz_kl{0.f, 0.f, d_kl};
  float raw[CHUNK], raw_q[CHUNK];
  auto read = [&](int64_t first) {
    of.read(row, first, raw);
    if (HAS_REF) of.read(ref_row, first, raw_q);
  };
  read(begin);
  for (int64_t first = begin; first - begin < of.columns; first += step) {
    float dz[CHUNK], dz_kl[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
      const int64_t column = first + j;
      const float z = of.z(raw[j], column), zq = HAS_REF ? of.z(raw_q[j], column) : 0.f;
      const float slope = of.transform.slope(raw[j]);
      dz[j] = counted ? of_dz(found, z, zq, column == wanted) * slope : 0.f;
      dz_kl[j] = counted ? of_dz_kl(found, z, zq, false) * slope : 0.f;
    }
    read(first + step);
    __syncthreads();
    if (first >= of.columns) continue;
    write_chunk(of.dz + row * of.dz_stride + first, dz);
    if (HAS_REF && of.apart) write_chunk(of.dz + ref_row * of.dz_stride + first, dz_kl);
  }
}

template <typename T, typename Machine>
void head_rows(Machine& machine, const HeadRows<T>& of, bool has_ref) {
  if (of.rows == 0) return;
  machine.launch(has_ref ? head_rows_kernel<T, true> : head_rows_kernel<T, false>, of.rows, 1, 1,
                 static_cast<int>(WARPS * sizeof(State)), of);
}

}  // namespace perl_kernels
