// Any processor: 128-bit vectors, which every x86-64 (SSE2) and ARMv8 (NEON) has.
#define PERL_TABLE kernels_default
#define PERL_NAME "DEFAULT"
#define PERL_LANES 4
#include "kernels_impl.h"
