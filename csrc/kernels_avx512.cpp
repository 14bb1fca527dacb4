#if defined(__x86_64__)
#define FASTSN_ISA avx512
#define FASTSN_TARGET __attribute__((target("arch=x86-64-v4")))
#include "kernels_impl.h"
#endif
