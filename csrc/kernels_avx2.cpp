#if defined(__x86_64__)
#define FASTSN_ISA avx2
#define FASTSN_TARGET __attribute__((target("arch=x86-64-v3")))
#include "kernels_impl.h"
#endif
