// The statistics of a row of logits and the gradient of what they say, with the state and the letters
// of perl_kernels/_softmax.py. Plain C++ but for the functions of device.cuh.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "tiles.cuh"

namespace perl_kernels {

// z = softcap * tanh(raw / softcap) / temperature; softcap 0 means none.
struct Transform {
  float inverse_temperature, softcap;
  __device__ float operator()(float raw) const {
    if (softcap > 0.f) raw = softcap * tanhf(raw / softcap);
    return raw * inverse_temperature;
  }
  // dz / draw, of the tanh itself: divided out of z again it has lost digits deep in the cap.
  __device__ float slope(float raw) const {
    if (softcap == 0.f) return inverse_temperature;
    const float t = tanhf(raw / softcap);
    return (1.f - t * t) * inverse_temperature;
  }
};

struct State {
  float m = -FLT_MAX, l = 0.f, u = 0.f, mq = -FLT_MAX, lq = 0.f, d = 0.f;

  __device__ void merge(const State& other) {
    float m_new = fmaxf(m, other.m);
    // A side that has seen nothing but -inf has l = 0 and no say.
    float ours = l > 0.f ? expf(m - m_new) : 0.f;
    float theirs = other.l > 0.f ? expf(other.m - m_new) : 0.f;
    u = (l > 0.f ? (u + l * (m - m_new)) * ours : 0.f) +
        (other.l > 0.f ? (other.u + other.l * (other.m - m_new)) * theirs : 0.f);
    l = l * ours + other.l * theirs;
    d = d * ours + other.d * theirs;
    m = m_new;
    float mq_new = fmaxf(mq, other.mq);
    lq = (lq > 0.f ? lq * expf(mq - mq_new) : 0.f) +
         (other.lq > 0.f ? other.lq * expf(other.mq - mq_new) : 0.f);
    mq = mq_new;
  }

  // Fold SIZE logits at once: one rescaling for all of them.
  template <bool HAS_REF, int SIZE>
  __device__ void fold(const float (&z)[SIZE], const float (&zq)[SIZE]) {
    State tile;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      tile.m = fmaxf(tile.m, z[i]);
      if (HAS_REF) tile.mq = fmaxf(tile.mq, zq[i]);
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      float centred = z[i] - tile.m, e = expf(centred);
      tile.l += e;
      if (e > 0.f) {
        tile.u += e * centred;
        if (HAS_REF) tile.d += e * (z[i] - zq[i]);
      }
      if (HAS_REF) tile.lq += expf(zq[i] - tile.mq);
    }
    merge(tile);
  }

  __device__ void merge_lanes(int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      State other;
      other.m = of_other_lane(m, mask);
      other.l = of_other_lane(l, mask);
      other.u = of_other_lane(u, mask);
      other.mq = of_other_lane(mq, mask);
      other.lq = of_other_lane(lq, mask);
      other.d = of_other_lane(d, mask);
      merge(other);
    }
  }
};

// The states of all threads of a block as one, the same for all; uses WARPS states of its shared
// memory.
__device__ inline State of_block(State state) {
  State* const of_warp = reinterpret_cast<State*>(shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  state.merge_lanes(32);
  if (lane == 0) of_warp[warp] = state;
  __syncthreads();
  if (warp == 0) {
    state = lane < WARPS ? of_warp[lane] : State{};
    state.merge_lanes(WARPS);
    if (lane == 0) of_warp[0] = state;
  }
  __syncthreads();
  return of_warp[0];
}

// What a row's finished state says.
struct Row {
  float peak, log_sum, entropy, gap, kl;

  template <bool HAS_REF>
  __device__ static Row of(const State& s) {
    const float log_l = logf(s.l), gap = HAS_REF ? s.d / s.l : 0.f;
    const float kl = HAS_REF ? gap - (s.m - s.mq) - (log_l - logf(s.lq)) : 0.f;
    return {s.m, log_l, log_l - s.u / s.l, gap, kl};
  }
};

// d loss / dz of one logit, by the row's incoming gradients. zq is not looked at without d_kl.
struct Gradient {
  float d_log_prob, d_entropy, d_kl;

  __device__ float operator()(const Row& row, float z, float zq, bool is_target) const {
    const float log_p = z - row.peak - row.log_sum, p = expf(log_p);
    float dz = is_target ? d_log_prob : 0.f;
    if (p > 0.f) {
      float slope = -d_log_prob - d_entropy * (log_p + row.entropy);
      if (d_kl != 0.f) slope += d_kl * (z - zq - row.gap);
      dz += p * slope;
    }
    return dz;
  }
};

}  // namespace perl_kernels
