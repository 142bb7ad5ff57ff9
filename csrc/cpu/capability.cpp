// Which table of kernels this process runs.
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "kernels.h"

namespace perl_kernels::cpu {
namespace {

const Kernels& widest(int cap) {
#ifdef PERL_KERNELS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq");
  if (cap >= 2 && avx512) return kernels_avx512;
  if (cap >= 1 && avx2) return kernels_avx2;
#endif
  return kernels_default;
}

// 0 default, 1 avx2, 2 avx512
int cap_of_environment() {
  const char* value = std::getenv("PERL_KERNELS_CPU_CAPABILITY");
  const std::string cap = value == nullptr || *value == 0 ? "avx512" : value;
  if (cap == "avx512") return 2;
  if (cap == "avx2") return 1;
  TORCH_CHECK_VALUE(
      cap == "default", "PERL_KERNELS_CPU_CAPABILITY is '", cap,
      "'; wanted default, avx2 or avx512");
  return 0;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace

bool multiplies_bfloat16() {
#ifdef PERL_KERNELS_X86
  static const bool yes = cap_of_environment() >= 2 && __builtin_cpu_supports("avx512bf16");
  return yes;
#else
  return false;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = widest(cap_of_environment());
  return chosen;
}

TORCH_LIBRARY_IMPL(perl_kernels, CatchAll, m) { m.impl("cpu_capability", cpu_capability); }

}  // namespace perl_kernels::cpu
