// log-probabilities, entropy and KL of rows of logits that already exist, on torch's stable ABI.
//
// logits_stats_cuda   one block a row, one pass: 16-byte loads, the state of perl_kernels/_softmax.py
//                     kept per thread in registers, merged over the block at the end.
//                     Bytes: each logit read once.
// logits_grad_cuda    one block a row: each logit read once, each gradient written once.
//
// Letters: N rows, V columns; m, l, u, d, mq, lq as in perl_kernels/_softmax.py.

#include <cstdint>
#include <optional>
#include <tuple>

#include "device.cuh"
#include "tensor.cuh"

#include "softmax.cuh"  // after the device that it asks

namespace perl_kernels {
namespace {

// 16 bytes of logits.
template <typename T>
struct alignas(16) Pack {
  static constexpr int SIZE = 16 / sizeof(T);
  T value[SIZE];
};

template <typename T, bool HAS_REF>
__global__ void __launch_bounds__(THREADS) logits_stats_kernel(
    const T* __restrict__ logits,        // (N, V)
    const int64_t* __restrict__ target,  // (N,) or null
    const T* __restrict__ ref_logits,    // (N, V) when HAS_REF
    float* __restrict__ log_prob, float* __restrict__ peak, float* __restrict__ log_sum,
    float* __restrict__ entropy, float* __restrict__ ref_log_prob, float* __restrict__ gap,
    float* __restrict__ kl, int64_t columns, Transform transform, int64_t ignore_index) {
  const int64_t row = blockIdx.x;
  const int64_t wanted = target ? target[row] : 0;
  const bool counted = !target || wanted != ignore_index;
  State state;
  if (counted) {
    const T* z_row = logits + row * columns;
    const T* q_row = HAS_REF ? ref_logits + row * columns : nullptr;
    constexpr int SIZE = Pack<T>::SIZE;
    // Rows of an odd V start off a 16-byte boundary: then element by element.
    const bool wide = columns % SIZE == 0;
    const int64_t packs = wide ? columns / SIZE : 0;
    for (int64_t i = threadIdx.x; i < packs; i += THREADS) {
      float z[SIZE], zq[SIZE];
      const Pack<T> p = reinterpret_cast<const Pack<T>*>(z_row)[i];
#pragma unroll
      for (int j = 0; j < SIZE; ++j) z[j] = transform(to_float(p.value[j]));
      if (HAS_REF) {
        const Pack<T> q = reinterpret_cast<const Pack<T>*>(q_row)[i];
#pragma unroll
        for (int j = 0; j < SIZE; ++j) zq[j] = transform(to_float(q.value[j]));
      }
      state.fold<HAS_REF>(z, zq);
    }
    for (int64_t i = packs * SIZE + threadIdx.x; i < columns; i += THREADS) {
      float z[1] = {transform(to_float(z_row[i]))}, zq[1] = {0.f};
      if (HAS_REF) zq[0] = transform(to_float(q_row[i]));
      state.fold<HAS_REF>(z, zq);
    }
  }
  state = of_block(state);
  if (threadIdx.x != 0) return;
  const Row found = counted ? Row::of<HAS_REF>(state) : Row{};
  peak[row] = found.peak;
  log_sum[row] = found.log_sum;
  entropy[row] = found.entropy;
  if (HAS_REF) {
    gap[row] = found.gap;
    kl[row] = found.kl;
  }
  if (target) {
    const int64_t at = row * columns + wanted;
    log_prob[row] = counted ? transform(to_float(logits[at])) - state.m - found.log_sum : 0.f;
    if (HAS_REF) {
      ref_log_prob[row] =
          counted ? transform(to_float(ref_logits[at])) - state.mq - logf(state.lq) : 0.f;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) logits_grad_kernel(
    const T* __restrict__ logits, const int64_t* __restrict__ target,
    const T* __restrict__ ref_logits, const float* __restrict__ peak,
    const float* __restrict__ log_sum, const float* __restrict__ entropy,
    const float* __restrict__ gap, const float* __restrict__ d_log_prob,
    const float* __restrict__ d_entropy, const float* __restrict__ d_kl, T* __restrict__ dlogits,
    int64_t columns, Transform transform, int64_t ignore_index) {
  const int64_t row = blockIdx.x;
  const int64_t wanted = target ? target[row] : -1;
  const bool counted = !target || wanted != ignore_index;
  const Row known{peak[row], log_sum[row], entropy[row], d_kl ? gap[row] : 0.f, 0.f};
  const Gradient of_z{d_log_prob && counted ? d_log_prob[row] : 0.f,
                      d_entropy && counted ? d_entropy[row] : 0.f,
                      d_kl && counted ? d_kl[row] : 0.f};
  const T* z_row = logits + row * columns;
  const T* q_row = d_kl ? ref_logits + row * columns : nullptr;
  T* out = dlogits + row * columns;

  auto gradient = [&](float raw, float raw_q, int64_t column) {
    if (!counted) return 0.f;
    const float zq = q_row ? transform(raw_q) : 0.f;
    return of_z(known, transform(raw), zq, column == wanted) * transform.slope(raw);
  };

  constexpr int SIZE = Pack<T>::SIZE;
  const int64_t packs = columns % SIZE == 0 ? columns / SIZE : 0;
  for (int64_t i = threadIdx.x; i < packs; i += THREADS) {
    const Pack<T> z = reinterpret_cast<const Pack<T>*>(z_row)[i];
    Pack<T> q{}, result;
    if (q_row) q = reinterpret_cast<const Pack<T>*>(q_row)[i];
#pragma unroll
    for (int j = 0; j < SIZE; ++j) {
      result.value[j] =
          from_float<T>(gradient(to_float(z.value[j]), to_float(q.value[j]), i * SIZE + j));
    }
    reinterpret_cast<Pack<T>*>(out)[i] = result;
  }
  for (int64_t i = packs * SIZE + threadIdx.x; i < columns; i += THREADS) {
    const float raw_q = q_row ? to_float(q_row[i]) : 0.f;
    out[i] = from_float<T>(gradient(to_float(z_row[i]), raw_q, i));
  }
}

// Contiguous, and so aligned that 16-byte loads are allowed.
Tensor dense(const Tensor& tensor) {
  Tensor made = torch::stable::contiguous(tensor);
  if (reinterpret_cast<uintptr_t>(made.data_ptr()) % 16 != 0) made = torch::stable::clone(made);
  return made;
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logits_stats_cuda(
    Tensor logits, std::optional<Tensor> target, std::optional<Tensor> ref_logits,
    double temperature, double softcap, int64_t ignore_index) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  logits = dense(logits);
  target = dense(target);
  ref_logits = dense(ref_logits);
  const int64_t rows = logits.size(0), columns = logits.size(1);
  auto column = [&](bool asked) {
    return torch::stable::new_empty(logits, {asked ? rows : 0}, ScalarType::Float);
  };
  const bool has_target = target.has_value(), has_ref = ref_logits.has_value();
  Tensor log_prob = column(has_target), peak = column(true), log_sum = column(true),
         entropy = column(true), ref_log_prob = column(has_target && has_ref),
         gap = column(has_ref), kl = column(has_ref);
  if (rows > 0) {
    const Transform transform{static_cast<float>(1.0 / temperature), static_cast<float>(softcap)};
    auto number = [](Tensor& t) { return static_cast<float*>(t.data_ptr()); };
    for_dtype(logits, [&](auto element) {
      using T = decltype(element);
      auto kernel = has_ref ? logits_stats_kernel<T, true> : logits_stats_kernel<T, false>;
      kernel<<<rows, THREADS, WARPS * sizeof(State), current_stream(logits)>>>(
          static_cast<const T*>(logits.data_ptr()), pointer<int64_t>(target),
          pointer<T>(ref_logits), number(log_prob), number(peak), number(log_sum),
          number(entropy), number(ref_log_prob), number(gap), number(kl), columns, transform,
          ignore_index);
    });
    check_launch("logits_stats");
  }
  return {log_prob, peak, log_sum, entropy, ref_log_prob, gap, kl};
}

Tensor logits_grad_cuda(
    Tensor logits, std::optional<Tensor> target, std::optional<Tensor> ref_logits, Tensor peak,
    Tensor log_sum, Tensor entropy, Tensor gap, std::optional<Tensor> d_log_prob,
    std::optional<Tensor> d_entropy, std::optional<Tensor> d_kl, double temperature,
    double softcap, int64_t ignore_index) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  logits = dense(logits);
  target = dense(target);
  ref_logits = dense(ref_logits);
  d_log_prob = dense(d_log_prob);
  d_entropy = dense(d_entropy);
  d_kl = dense(d_kl);
  Tensor dlogits = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  if (logits.size(0) > 0) {
    const Transform transform{static_cast<float>(1.0 / temperature), static_cast<float>(softcap)};
    auto number = [](const Tensor& t) { return static_cast<const float*>(t.data_ptr()); };
    for_dtype(logits, [&](auto element) {
      using T = decltype(element);
      logits_grad_kernel<T><<<logits.size(0), THREADS, 0, current_stream(logits)>>>(
          static_cast<const T*>(logits.data_ptr()), pointer<int64_t>(target),
          pointer<T>(ref_logits), number(peak), number(log_sum), number(entropy), number(gap),
          pointer<float>(d_log_prob), pointer<float>(d_entropy), pointer<float>(d_kl),
          static_cast<T*>(dlogits.data_ptr()), logits.size(1), transform, ignore_index);
    });
    check_launch("logits_grad");
  }
  return dlogits;
}

}  // namespace
}  // namespace perl_kernels

STABLE_TORCH_LIBRARY_IMPL(perl_kernels, CUDA, m) {
  m.impl("logits_stats_cuda", TORCH_BOX(&perl_kernels::logits_stats_cuda));
  m.impl("logits_grad_cuda", TORCH_BOX(&perl_kernels::logits_grad_cuda));
}
