#include "kernels.h"
#ifdef PERL_KERNELS_X86
#pragma GCC target("avx2,fma")
#define PERL_TABLE kernels_avx2
#define PERL_NAME "AVX2"
#define PERL_LANES 8
#include "kernels_impl.h"
#endif
