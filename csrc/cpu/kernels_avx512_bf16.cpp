#include "kernels.h"
#ifdef PERL_KERNELS_X86
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#define PERL_TABLE kernels_avx512_bf16
#define PERL_NAME "AVX512_BF16"
#define PERL_LANES 16
#define PERL_BFLOAT16
#include "kernels_impl.h"
#endif
