// Which table of kernels this process runs.
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "matrix.h"

namespace perl_kernels::cpu {
namespace {

enum Cap { DEFAULT, AVX2, AVX512, AVX512_BF16 };

Cap cap_of_environment() {
  const char* names[] = {"default", "avx2", "avx512", "avx512_bf16"};
  const char* value = std::getenv("PERL_KERNELS_CPU_CAPABILITY");
  if (value == nullptr || *value == 0) return AVX512_BF16;
  for (int cap = DEFAULT; cap <= AVX512_BF16; ++cap) {
    if (std::string(value) == names[cap]) return static_cast<Cap>(cap);
  }
  TORCH_CHECK_VALUE(
      false, "PERL_KERNELS_CPU_CAPABILITY is '", value,
      "'; wanted default, avx2, avx512 or avx512_bf16");
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
  const bool bf16 = __builtin_cpu_supports("avx512bf16");
  if (cap() >= AVX512_BF16 && avx2 && avx512 && bf16) return kernels_avx512_bf16;
  if (cap() >= AVX512 && avx2 && avx512) return kernels_avx512;
  if (cap() >= AVX2 && avx2) return kernels_avx2;
#endif
  return kernels_default;
}

// "DEFAULT", "AVX2", "AVX512" or "AVX512_BF16", with "+AMX" where bfloat16 products use it.
std::string cpu_capability() {
  return std::string(kernels().name) + (has_bfloat16_tiles() ? "+AMX" : "");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = widest();
  return chosen;
}

bool beats_library_in_float32() {
#ifdef PERL_KERNELS_X86
  return kernels().row_panel == kernels_avx512.row_panel && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_bfloat16_tiles() {
  return cap() >= AVX512_BF16 && at::native::cpublas::could_pack(at::kBFloat16);
}

TORCH_LIBRARY_IMPL(perl_kernels, CatchAll, m) {
  m.impl("cpu_capability", cpu_capability);
  m.impl("cpu_scratch_bytes", [] { return Buffer::KEPT_BYTES; });
}

}  // namespace perl_kernels::cpu
