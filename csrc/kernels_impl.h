// The inner loops, compiled once per instruction set: the includer defines FASTSN_ISA (a namespace) and FASTSN_TARGET
// (a function attribute). Nothing here may call a function of another file, whose code could then be compiled for a
// processor that is not there: only arithmetic on vectors that the compiler splits into what the target has.
#include "kernels.h"

#define FN FASTSN_TARGET static inline __attribute__((always_inline))
#define ENTRY FASTSN_TARGET static

namespace fastsn::FASTSN_ISA {

template <class A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <class A>
using V = typename Vector<A>::type;

template <class A>
FN V<A> load(const A* p) {
  V<A> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class A>
FN void store(A* p, const V<A>& x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// The first n < lanes elements, the rest zero. Rows end where the tensor ends: nothing behind them may be read.
template <class A>
FN V<A> load_some(const A* p, int64_t n) {
  A part[lanes<A>()] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

template <class A>
FN void store_some(A* p, const V<A>& x, int64_t n) {
  A part[lanes<A>()];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

template <class A>
FN A sum(const V<A>& x) {
  A part[lanes<A>()];
  store(part, x);
  for (int64_t width = lanes<A>() / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

template <class A>
FN void clear(A* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// One vector of each row.
template <class A>
struct Four {
  V<A> w0, w1, w2, w3;
};

template <class A>
FN Four<A> load_rows(const A* const* rows, int64_t at) {
  return {load(rows[0] + at), load(rows[1] + at), load(rows[2] + at), load(rows[3] + at)};
}

template <class A>
FN Four<A> load_rows_some(const A* const* rows, int64_t at, int64_t n) {
  return {load_some(rows[0] + at, n), load_some(rows[1] + at, n), load_some(rows[2] + at, n),
          load_some(rows[3] + at, n)};
}

template <class A>
FN void add_product(Four<A>& sums, const Four<A>& w, const V<A>& x) {
  sums.w0 += w.w0 * x;
  sums.w1 += w.w1 * x;
  sums.w2 += w.w2 * x;
  sums.w3 += w.w3 * x;
}

// Sums of each class lie `period` apart per row, at `at`.
template <class A>
FN void add_product(A* classes, int64_t period, const Four<A>& w, const V<A>& z) {
  store(classes, V<A>(load(classes) + w.w0 * z));
  store(classes + period, V<A>(load(classes + period) + w.w1 * z));
  store(classes + 2 * period, V<A>(load(classes + 2 * period) + w.w2 * z));
  store(classes + 3 * period, V<A>(load(classes + 3 * period) + w.w3 * z));
}

template <class A>
FN void store_sums(const Four<A>& sums, A* out, int64_t stride) {
  out[0] = sum<A>(sums.w0);
  out[stride] = sum<A>(sums.w1);
  out[2 * stride] = sum<A>(sums.w2);
  out[3 * stride] = sum<A>(sums.w3);
}

template <class A>
FN void store_rows(const Four<A>& x, A* out, int64_t stride) {
  store(out, x.w0);
  store(out + stride, x.w1);
  store(out + 2 * stride, x.w2);
  store(out + 3 * stride, x.w3);
}

// Sums up the classes of one row: out[k] = sum over g of classes[g·K + k]. Vectors reach past a group into the next, or
// into what pads the buffer; those lanes are dropped.
template <class A>
FN void fold(const A* classes, int64_t k, int64_t used, A* out) {
  for (int64_t c = 0; c < k; c += lanes<A>()) {
    V<A> sum = {};
    for (int64_t j = c; j < used; j += k) sum += load(classes + j);
    if (k - c >= lanes<A>())
      store(out + c, sum);
    else
      store_some(out + c, sum, k - c);
  }
}

// The inverse: lays the classes of a row over a span. What a vector writes too far, into the next group or into what
// pads the buffer, is overwritten by what comes after it: groups upwards, vectors within a group downwards.
template <class A>
FN void spread(const A* q, int64_t k, int64_t period, int64_t span, A* out) {
  for (int64_t c = (k - 1) / lanes<A>() * lanes<A>(); c >= 0; c -= lanes<A>()) {
    const V<A> part = k - c >= lanes<A>() ? load(q + c) : load_some(q + c, k - c);
    for (int64_t j = c; j < period; j += k) store(out + j, part);
  }
  for (int64_t j = period; j < span; j += lanes<A>()) store(out + j, load(out + j - period));
}

// Fetches the next block of rows while this one is worked on: a block goes through both halves, and only the first time
// does it come from far away. Each half fetches one half of the rows, so that memory is never idle.
template <class A>
FN void prefetch(const A* const* next, int half, int64_t at) {
  for (int r = half * kRows / 2; r < (half + 1) * kRows / 2; ++r) __builtin_prefetch(next[r] + at, 0, 2);
}

// "bk": the class of a lane repeats after `period` elements, which are added up per class at the end. One: the period
// is a single vector (K is a power of two up to the lanes), and the sums stay in registers.
template <class A, bool P, bool Q, bool One>
FN void local_bk(const A* const* rows, const A* const* next, const Shape& s, int64_t period, const A* x, const A* z,
                 A* p, A* q, A* classes) {
  const int64_t n = s.n(), run = Q && !One ? period : n;
  Four<A> sums = {}, one = {};
  if (Q && !One) clear(classes, kRows * period);
  const auto step = [&](const Four<A>& w, int64_t at, int64_t j) FASTSN_TARGET __attribute__((always_inline)) {
    if (P) add_product(sums, w, load(x + at));
    if (Q && One) add_product(one, w, load(z + at));
    if (Q && !One) add_product(classes + j, period, w, load(z + at));
  };
  for (int64_t begin = 0; begin < n; begin += run) {
    const int64_t length = n - begin < run ? n - begin : run;
    int64_t j = 0;
    for (; j + lanes<A>() <= length; j += lanes<A>()) {
      prefetch(next, 0, begin + j);
      step(load_rows(rows, begin + j), begin + j, j);
    }
    if (j < length) step(load_rows_some(rows, begin + j, length - j), begin + j, j);
  }
  if (P) store_sums(sums, p, 1);
  if (!Q) return;
  if (One) store_rows(one, classes, period);
  const int64_t used = n < period ? n : period;
  for (int r = 0; r < kRows; ++r) fold(classes + r * period, s.k, used, q + r * s.k);
}

template <class A, bool P, bool Q>
FN void local_kb(const A* const* rows, const A* const* next, const Shape& s, const A* x, const A* z, A* p, A* q) {
  Four<A> sums = {};
  for (int64_t k = 0; k < s.k; ++k) {
    Four<A> segment = {};
    const auto step = [&](const Four<A>& w, int64_t b) FASTSN_TARGET __attribute__((always_inline)) {
      if (P) add_product(sums, w, load(x + k * s.b + b));
      if (Q) add_product(segment, w, load(z + b));
    };
    int64_t b = 0;
    for (; b + lanes<A>() <= s.b; b += lanes<A>()) {
      prefetch(next, 0, k * s.b + b);
      step(load_rows(rows, k * s.b + b), b);
    }
    if (b < s.b) step(load_rows_some(rows, k * s.b + b, s.b - b), b);
    if (Q) store_sums(segment, q + k, s.k);
  }
  if (P) store_sums(sums, p, 1);
}

template <class A>
ENTRY void local(const A* const* rows, const A* const* next, const Shape& s, const A* x, const A* z, A* p, A* q,
                 A* scratch) {
  const int64_t period = fastsn::period<A>(s);
  const bool one = period == lanes<A>();
  if (s.kb) {
    if (p && q) return local_kb<A, true, true>(rows, next, s, x, z, p, q);
    if (p) return local_kb<A, true, false>(rows, next, s, x, z, p, q);
    return local_kb<A, false, true>(rows, next, s, x, z, p, q);
  }
  if (p && q && one) return local_bk<A, true, true, true>(rows, next, s, period, x, z, p, q, scratch);
  if (p && q) return local_bk<A, true, true, false>(rows, next, s, period, x, z, p, q, scratch);
  if (p) return local_bk<A, true, false, false>(rows, next, s, period, x, z, p, q, scratch);
  if (one) return local_bk<A, false, true, true>(rows, next, s, period, x, z, p, q, scratch);
  return local_bk<A, false, true, false>(rows, next, s, period, x, z, p, q, scratch);
}

template <class A, bool P, bool Q>
FN void accumulate_bk(const A* const* rows, const A* const* next, const Shape& s, const A* p, const A* q, A* x, A* z,
                      A* classes) {
  const int64_t n = s.n(), run = Q ? span<A>(s) : n;
  if (Q)
    for (int r = 0; r < kRows; ++r) spread(q + r * s.k, s.k, fastsn::period<A>(s), run, classes + r * run);
  const A* const spreads[kRows] = {classes, classes + run, classes + 2 * run, classes + 3 * run};
  const auto step = [&](const Four<A>& w, int64_t at, int64_t j) FASTSN_TARGET __attribute__((always_inline)) {
    if (P) store(x + at, V<A>(load(x + at) + ((w.w0 * p[0] + w.w1 * p[1]) + (w.w2 * p[2] + w.w3 * p[3]))));
    if (Q) {
      const Four<A> c = load_rows(spreads, j);
      store(z + at, V<A>(load(z + at) + ((w.w0 * c.w0 + w.w1 * c.w1) + (w.w2 * c.w2 + w.w3 * c.w3))));
    }
  };
  for (int64_t begin = 0; begin < n; begin += run) {
    const int64_t length = n - begin < run ? n - begin : run;
    int64_t j = 0;
    for (; j + lanes<A>() <= length; j += lanes<A>()) {
      prefetch(next, 1, begin + j);
      step(load_rows(rows, begin + j), begin + j, j);
    }
    if (j < length) step(load_rows_some(rows, begin + j, length - j), begin + j, j);
  }
}

template <class A, bool P, bool Q>
FN void accumulate_kb(const A* const* rows, const A* const* next, const Shape& s, const A* p, const A* q, A* x, A* z) {
  for (int64_t k = 0; k < s.k; ++k) {
    const A *q0 = q + k, *q1 = q0 + s.k, *q2 = q1 + s.k, *q3 = q2 + s.k;
    const auto step = [&](const Four<A>& w, int64_t b) FASTSN_TARGET __attribute__((always_inline)) {
      A* const to = x + k * s.b + b;
      if (P) store(to, V<A>(load(to) + ((w.w0 * p[0] + w.w1 * p[1]) + (w.w2 * p[2] + w.w3 * p[3]))));
      if (Q) store(z + b, V<A>(load(z + b) + ((w.w0 * *q0 + w.w1 * *q1) + (w.w2 * *q2 + w.w3 * *q3))));
    };
    int64_t b = 0;
    for (; b + lanes<A>() <= s.b; b += lanes<A>()) {
      prefetch(next, 1, k * s.b + b);
      step(load_rows(rows, k * s.b + b), b);
    }
    if (b < s.b) step(load_rows_some(rows, k * s.b + b, s.b - b), b);
  }
}

template <class A>
ENTRY void accumulate(const A* const* rows, const A* const* next, const Shape& s, const A* p, const A* q, A* x, A* z,
                      A* scratch) {
  if (s.kb) {
    if (p && q) return accumulate_kb<A, true, true>(rows, next, s, p, q, x, z);
    if (p) return accumulate_kb<A, true, false>(rows, next, s, p, q, x, z);
    return accumulate_kb<A, false, true>(rows, next, s, p, q, x, z);
  }
  if (p && q) return accumulate_bk<A, true, true>(rows, next, s, p, q, x, z, scratch);
  if (p) return accumulate_bk<A, true, false>(rows, next, s, p, q, x, z, scratch);
  return accumulate_bk<A, false, true>(rows, next, s, p, q, x, z, scratch);
}

template <class A>
ENTRY void rescale(const A* w, A* out, int64_t n, A inverse, A scale) {
  int64_t i = 0;
  for (; i + lanes<A>() <= n; i += lanes<A>()) store(out + i, V<A>(load(w + i) * inverse * scale));
  for (; i < n; ++i) out[i] = w[i] * inverse * scale;
}

template <class A>
ENTRY double dot(const A* a, const A* b, int64_t n) {
  constexpr int64_t step = 4 * lanes<A>();
  Four<A> sums = {};
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    sums.w0 += load(a + i) * load(b + i);
    sums.w1 += load(a + i + lanes<A>()) * load(b + i + lanes<A>());
    sums.w2 += load(a + i + 2 * lanes<A>()) * load(b + i + 2 * lanes<A>());
    sums.w3 += load(a + i + 3 * lanes<A>()) * load(b + i + 3 * lanes<A>());
  }
  A rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return static_cast<double>(sum<A>((sums.w0 + sums.w1) + (sums.w2 + sums.w3))) + static_cast<double>(rest);
}

template <class A, bool P, bool Q>
FN void gradient_bk(const A* g, const Shape& s, A alpha, A p, const A* x, const A* q, const A* z, A* out, A* classes) {
  const int64_t n = s.n(), run = Q ? span<A>(s) : n;
  if (Q) spread(q, s.k, fastsn::period<A>(s), run, classes);
  for (int64_t begin = 0; begin < n; begin += run) {
    const int64_t length = n - begin < run ? n - begin : run;
    int64_t j = 0;
    for (; j + lanes<A>() <= length; j += lanes<A>()) {
      V<A> sum = load(g + begin + j) * alpha;
      if (P) sum += load(x + begin + j) * p;
      if (Q) sum += load(z + begin + j) * load(classes + j);
      store(out + begin + j, sum);
    }
    for (; j < length; ++j) {
      A sum = g[begin + j] * alpha;
      if (P) sum += x[begin + j] * p;
      if (Q) sum += z[begin + j] * classes[j];
      out[begin + j] = sum;
    }
  }
}

template <class A, bool P, bool Q>
FN void gradient_kb(const A* g, const Shape& s, A alpha, A p, const A* x, const A* q, const A* z, A* out) {
  for (int64_t k = 0; k < s.k; ++k) {
    const int64_t at = k * s.b;
    int64_t b = 0;
    for (; b + lanes<A>() <= s.b; b += lanes<A>()) {
      V<A> sum = load(g + at + b) * alpha;
      if (P) sum += load(x + at + b) * p;
      if (Q) sum += load(z + b) * q[k];
      store(out + at + b, sum);
    }
    for (; b < s.b; ++b) {
      A sum = g[at + b] * alpha;
      if (P) sum += x[at + b] * p;
      if (Q) sum += z[b] * q[k];
      out[at + b] = sum;
    }
  }
}

template <class A>
ENTRY void gradient(const A* g, const Shape& s, A alpha, A p, const A* x, const A* q, const A* z, A* out, A* scratch) {
  if (s.kb) {
    if (x && z) return gradient_kb<A, true, true>(g, s, alpha, p, x, q, z, out);
    if (x) return gradient_kb<A, true, false>(g, s, alpha, p, x, q, z, out);
    return gradient_kb<A, false, true>(g, s, alpha, p, x, q, z, out);
  }
  if (x && z) return gradient_bk<A, true, true>(g, s, alpha, p, x, q, z, out, scratch);
  if (x) return gradient_bk<A, true, false>(g, s, alpha, p, x, q, z, out, scratch);
  return gradient_bk<A, false, true>(g, s, alpha, p, x, q, z, out, scratch);
}

#include "kernels_half.h"

template <class A>
static constexpr Kernels<A> table = {local<A>,       accumulate<A>,   rescale<A>,     dot<A>,          gradient<A>,
                                     widen_half<A>,  widen_bfloat<A>, narrow_half<A>, narrow_bfloat<A>};

const Kernels<float>& floats() { return table<float>; }
const Kernels<double>& doubles() { return table<double>; }

}  // namespace fastsn::FASTSN_ISA
