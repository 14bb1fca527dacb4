// Any processor, and the choice between the instruction sets.
#define FASTSN_ISA baseline
#define FASTSN_TARGET
#include "kernels_impl.h"

namespace fastsn {

#if defined(__x86_64__)
namespace avx512 {
const Kernels<float>& floats();
const Kernels<double>& doubles();
}  // namespace avx512
namespace avx2 {
const Kernels<float>& floats();
const Kernels<double>& doubles();
}  // namespace avx2

static int level() {
  static const int found = __builtin_cpu_supports("x86-64-v4") ? 2 : __builtin_cpu_supports("x86-64-v3") ? 1 : 0;
  return found;
}
#else
namespace avx512 = baseline;
namespace avx2 = baseline;
static int level() { return 0; }
#endif

template <>
const Kernels<float>& kernels<float>() {
  return level() == 2 ? avx512::floats() : level() == 1 ? avx2::floats() : baseline::floats();
}

template <>
const Kernels<double>& kernels<double>() {
  return level() == 2 ? avx512::doubles() : level() == 1 ? avx2::doubles() : baseline::doubles();
}

const char* instruction_set() { return level() == 2 ? "AVX-512" : level() == 1 ? "AVX2" : "baseline"; }

}  // namespace fastsn
