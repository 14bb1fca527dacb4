// Keeps the kernels loadable with the oldest C library that torch itself supports (manylinux_2_28). Built where glibc is
// 2.32 or newer, libstdc++'s reference counts (ext/atomicity.h, used by std::shared_ptr) ask the variable
// __libc_single_threaded of glibc whether they may do without atomic instructions, and no macro turns that off. This
// one, which nothing outside of the library sees, always answers no; that is right in any process.
#ifdef __linux__
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
