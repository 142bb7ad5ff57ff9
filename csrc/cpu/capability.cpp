// Which table of kernels this process runs.
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "kernels.h"

namespace perl_kernels::cpu {
namespace {

enum Cap { DEFAULT, AVX2, AVX512 };

Cap cap_of_environment() {
  const char* value = std::getenv("PERL_KERNELS_CPU_CAPABILITY");
  const std::string cap = value == nullptr || *value == 0 ? "avx512" : value;
  TORCH_CHECK_VALUE(
      cap == "default" || cap == "avx2" || cap == "avx512", "PERL_KERNELS_CPU_CAPABILITY is '",
      cap, "'; wanted default, avx2 or avx512");
  return cap == "avx512" ? AVX512 : cap == "avx2" ? AVX2 : DEFAULT;
}

Cap cap() {
  static const Cap chosen = cap_of_environment();
  return chosen;
}

const Kernels& widest() {
#ifdef PERL_KERNELS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (cap() >= AVX512 && avx2 && avx512) return kernels_avx512;
  if (cap() >= AVX2 && avx2) return kernels_avx2;
#endif
  return kernels_default;
}

// "DEFAULT", "AVX2" or "AVX512", with "+BF16" or "+AMX" where bfloat16 products use them.
std::string cpu_capability() {
  const char* more = has_bfloat16_tiles() ? "+AMX" : has_bfloat16_vectors() ? "+BF16" : "";
  return std::string(kernels().name) + more;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = widest();
  return chosen;
}

bool has_bfloat16_vectors() {
#ifdef PERL_KERNELS_X86
  return cap() >= AVX512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_bfloat16_tiles() {
  return cap() >= AVX512 && at::native::cpublas::could_pack(at::kBFloat16);
}

TORCH_LIBRARY_IMPL(perl_kernels, CatchAll, m) { m.impl("cpu_capability", cpu_capability); }

}  // namespace perl_kernels::cpu
