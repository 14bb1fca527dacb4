// The inner loops, as a table of functions per instruction set; kernels() picks the best that this processor has.
//
// All work on rows of a weight in memory order, widened to A (float, or double for double weights). A row has B·K
// elements: element (b, k) lies at b·K + k, or, for channels_last weights ("kb"), at k·B + b. Two matrices share them:
//   row matrix    (A x B·K):   p[a] = <row a, x>         x[j] += p[a] row_a[j]
//   class matrix  (A·K x B):   q[a, k] = sum_b w[a, b, k] z[b]      z[b] += sum_{a, k} q[a, k] w[a, b, k]
// The left column is the local half of a power iteration, the right one the accumulating half.
//
// Every loop works on vectors of 64 bytes whatever the processor, so sums have one order on all of them.
#pragma once
#include <cstdint>

namespace fastsn {

constexpr int kRows = 4;  // rows that go through the halves together: they share the loads of x and z

// Lanes of a vector, and what buffers are padded to.
template <class A>
constexpr int64_t lanes() {
  return 64 / static_cast<int64_t>(sizeof(A));
}
template <class A>
constexpr int64_t padded(int64_t n) {
  return (n + lanes<A>() - 1) / lanes<A>() * lanes<A>();
}

// How rows are laid out.
struct Shape {
  int64_t b, k;
  bool kb;
  int64_t n() const { return b * k; }
};

// Elements after which the class k of a lane repeats: the least common multiple of K and the lanes ("bk" only).
template <class A>
int64_t period(const Shape& s) {
  int64_t a = s.k, b = lanes<A>();
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return s.k / a * lanes<A>();
}

// Whole periods, as many as make a loop worth its start.
template <class A>
int64_t span(const Shape& s) {
  const int64_t one = period<A>(s), least = 8 * lanes<A>();
  return (least + one - 1) / one * one;
}

// Elements of scratch that the loops need: a span for each row, and room for a vector that reaches past the end.
template <class A>
int64_t inner_size(const Shape& s) {
  return kRows * span<A>(s) + padded<A>(s.k) + lanes<A>();
}

template <class A>
struct Kernels {
  // p (may be null): kRows results. q (may be null): kRows x K results; x, z: padded; for "bk" z is spread to n
  // elements, z[b] at b·K + k. next: the rows that come after these, to be fetched meanwhile (never read).
  // scratch: inner_size.
  void (*local)(const A* const* rows, const A* const* next, const Shape& s, const A* x, const A* z, A* p, A* q,
                A* scratch);
  // Adds to x and z (padded; z spread as above for "bk"). p or q null: that matrix is left out.
  void (*accumulate)(const A* const* rows, const A* const* next, const Shape& s, const A* p, const A* q, A* x, A* z,
                     A* scratch);
  // out = (w · inverse) · scale: two roundings, so that BSSN is exactly scale times BSN.
  void (*rescale)(const A* w, A* out, int64_t n, A inverse, A scale);
  double (*dot)(const A* a, const A* b, int64_t n);
  // out = alpha · g + p · x + q[k] · z, one row; p x or q z left out where x or z is null. scratch: period.
  void (*gradient)(const A* g, const Shape& s, A alpha, A p, const A* x, const A* q, const A* z, A* out, A* scratch);
  void (*widen_half)(const uint16_t* in, A* out, int64_t n);
  void (*widen_bfloat)(const uint16_t* in, A* out, int64_t n);
  void (*narrow_half)(const A* in, uint16_t* out, int64_t n);
  void (*narrow_bfloat)(const A* in, uint16_t* out, int64_t n);
};

template <class A>
const Kernels<A>& kernels();
const char* instruction_set();

}  // namespace fastsn
