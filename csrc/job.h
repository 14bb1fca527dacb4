// One weight in power iteration: the two halves over its rows, and what closes each of them.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "weights.h"

namespace fastsn {

// |M v| outside of this range is rescued by a power of two: the accumulated vector is of the order |M v| · |M|.
template <class A>
constexpr double kTiny = sizeof(A) == 4 ? 0x1p-40 : 0x1p-400;
template <class A>
constexpr double kHuge = 1 / kTiny<A>;

struct Norm {
  double value;
  bool sound;  // finite and not zero
};

template <class A>
Norm norm(const A* x, int64_t n) {
  // In units of the largest entry's power of two when squares could leave the range of double.
  const auto squares = [&](double unit) {
    double sums[8] = {}, sum = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      for (int j = 0; j < 8; ++j) sums[j] += (x[i + j] * unit) * (x[i + j] * unit);
    for (; i < n; ++i) sum += (x[i] * unit) * (x[i] * unit);
    for (const double s : sums) sum += s;
    return sum;
  };
  double sum = squares(1);
  if (std::isnan(sum)) return {sum, false};
  if (sum > 0x1p-900 && sum < 0x1p900) return {std::sqrt(sum), true};
  double peak = 0;
  for (int64_t i = 0; i < n; ++i) peak = std::max(peak, std::abs(static_cast<double>(x[i])));
  if (peak == 0 || !std::isfinite(peak)) return {peak, false};
  const int shift = std::min(-std::ilogb(peak), 1000);  // the unit itself must not overflow
  return {std::ldexp(std::sqrt(squares(std::ldexp(1.0, shift))), -shift), true};
}

template <class A>
void divide(const A* x, int64_t n, double by, A* out) {
  if (by > 0x1p-1000 && by < 0x1p1000) {
    const double inverse = 1 / by;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(x[i] * inverse);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(x[i] / by);
  }
}

enum Half { kLocal = 1, kAccumulate = 2 };

// One weight in work. p, q, x, z as in kernels.h; *_unit are the normalized vectors, in the call's flat result.
template <class A>
struct Job {
  const Weight* weight;
  A *p_unit, *q_unit, *x_unit, *z_unit, *p_sigma, *q_sigma;
  A *p, *q;                  // what the local half gives, or what the accumulating half takes
  A *x, *z;                  // what the local half takes: padded, in memory order, z spread
  A* sums;                   // x and z as accumulated, of one piece after the other
  int64_t pieces, piece_rows, x_size, z_size;
  bool two_passes;  // x and z come first in a round, in a pass of their own; otherwise p and q, and one pass does both
  std::atomic<int64_t> pending{0};

  const Shape& shape() const { return weight->arrangement.shape; }
  int64_t rows() const { return weight->arrangement.rows; }

  // x_unit, z_unit -> x, z
  void prepare() const {
    const auto [b, k, kb] = shape();
    if (x_unit) {
      if (kb) {
        for (int64_t i = 0; i < b; ++i)
          for (int64_t j = 0; j < k; ++j) x[j * b + i] = x_unit[i * k + j];
      } else {
        std::copy_n(x_unit, b * k, x);
      }
    }
    if (z_unit) {
      if (kb) {
        std::copy_n(z_unit, b, z);
      } else {
        for (int64_t i = 0; i < b; ++i)
          for (int64_t j = 0; j < k; ++j) z[i * k + j] = z_unit[i];
      }
    }
  }

  A* x_sums(int64_t piece) const { return sums + piece * (Parts<A>::room(x_size) + Parts<A>::room(z_size)); }
  A* z_sums(int64_t piece) const { return x_sums(piece) + Parts<A>::room(x_size); }

  // The given halves over the rows of one piece.
  void work(int64_t piece, int halves) const {
    const Shape& s = shape();
    const int64_t n = s.n(), wide_n = padded<A>(n);
    const int64_t inner_n = inner_size<A>(s);
    Parts<A> parts(scratch<A>((kRows + 1) * Parts<A>::room(n) + Parts<A>::room(inner_n), 0));
    A* wide_rows[kRows];
    for (A*& wide_row : wide_rows) wide_row = parts.take(n);
    A* const zeros = parts.take(n);
    A* const inner = parts.take(inner_n);
    std::memset(zeros, 0, wide_n * sizeof(A));
    if (halves & kAccumulate) {
      std::memset(x_sums(piece), 0, x_size * sizeof(A));
      std::memset(z_sums(piece), 0, z_size * sizeof(A));
    }
    const int64_t end = std::min(rows(), (piece + 1) * piece_rows);
    const auto at = [&](int64_t row) { return row * weight->rows.stride; };
    for (int64_t row = piece * piece_rows; row < end; row += kRows) {
      const A *block[kRows], *next[kRows];
      for (int r = 0; r < kRows; ++r) {
        block[r] = row + r < end ? widened<A>(weight->rows.tensor, at(row + r), n, wide_rows[r]) : zeros;
        next[r] = row + r + kRows < end ? placed<A>(weight->rows.tensor, at(row + r + kRows), zeros) : zeros;
      }
      A* const block_p = p_unit ? p + row : nullptr;
      A* const block_q = q_unit ? q + row * s.k : nullptr;
      if (halves & kLocal) kernels<A>().local(block, next, s, x, z, block_p, block_q, inner);
      if (halves & kAccumulate)
        kernels<A>().accumulate(block, next, s, block_p, block_q, x_sums(piece), z_sums(piece), inner);
    }
  }

  // Adds the pieces' sums up in order, and brings them to the order of x_unit and z_unit, in place of piece 0.
  void gather() const {
    const auto [b, k, kb] = shape();
    A* const total = x_sums(0);
    for (int64_t piece = 1; piece < pieces; ++piece) {
      add(x_sums(piece), x_size, total);
      add(z_sums(piece), z_size, z_sums(0));
    }
    if (x_unit && kb) {  // x is free by now
      std::copy_n(total, b * k, x);
      for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < k; ++j) total[i * k + j] = x[j * b + i];
    }
    if (z_unit && !kb) {
      A* const spread = z_sums(0);
      for (int64_t i = 0; i < b; ++i) {
        A sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += spread[i * k + j];
        spread[i] = sum;  // i <= i · k: what is overwritten has been added
      }
    }
  }

  static void add(const A* part, int64_t n, A* total) {
    for (int64_t i = 0; i < n; ++i) total[i] += part[i];
  }

  // Takes over x / |x| unless it is bad; sigma is |x| over the norm of the coefficients that made it.
  static void take(const A* sums, int64_t n, double coefficients, A* unit, A* sigma) {
    const Norm found = norm(sums, n);
    if (found.sound) divide(sums, n, found.value, unit);
    if (!sigma) return;
    *sigma = found.sound         ? static_cast<A>(found.value / coefficients)
             : found.value == 0 ? A(0)
                                : std::numeric_limits<A>::quiet_NaN();
  }

  // One pass: p and q from the local half, then x, z and sigma from the accumulating one.
  void finish_fused() const {
    const auto [b, k, kb] = shape();
    const auto in_range = [](const Norm& x) { return x.sound && x.value > kTiny<A> && x.value < kHuge<A>; };
    Norm p_norm{1, true}, q_norm{1, true};
    if (p_unit) p_norm = norm(p, rows());
    if (q_unit) q_norm = norm(q, rows() * k);
    const bool again = !in_range(p_norm) || !in_range(q_norm);
    if (p_unit) p_norm.value = settle(p, rows(), p_norm, again, p_unit);
    if (q_unit) q_norm.value = settle(q, rows() * k, q_norm, again, q_unit);
    if (again)
      for (int64_t piece = 0; piece < pieces; ++piece) work(piece, kAccumulate);
    gather();
    if (p_unit) take(x_sums(0), b * k, p_norm.value, x_unit, p_sigma);
    if (q_unit) take(z_sums(0), b, q_norm.value, z_unit, q_sigma);
  }

  // Stores x / |x| unless it is bad. To accumulate again, x becomes what the accumulating half can take: brought near 1
  // by a power of two, or the vector that stays in force. Returns the norm of what it takes.
  static double settle(A* x, int64_t n, const Norm& found, bool again, A* unit) {
    if (found.sound) divide(x, n, found.value, unit);
    if (!again) return found.value;
    if (!found.sound) {
      std::copy_n(unit, n, x);
      return norm(x, n).value;
    }
    const int exponent = std::ilogb(found.value);
    for (int64_t i = 0; i < n; ++i) x[i] = std::ldexp(x[i], -exponent);
    return std::ldexp(found.value, -exponent);
  }

  // Two passes: x and z from the first, then p, q and sigma from the second.
  void finish_accumulated() const {
    gather();
    if (x_unit) take(x_sums(0), shape().n(), 1, x_unit, nullptr);
    if (z_unit) take(z_sums(0), shape().b, 1, z_unit, nullptr);
    prepare();
  }
  void finish_local() const {
    if (p_unit) take(p, rows(), 1, p_unit, p_sigma);
    if (q_unit) take(q, rows() * shape().k, 1, q_unit, q_sigma);
  }

  // No iteration: sigma = u^T M v, with p = M v (or M^T u) at hand.
  void finish_measured() const {
    const auto sigma = [](const A* a, const A* b, int64_t n) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
      return static_cast<A>(sum);
    };
    if (p_unit) *p_sigma = sigma(p, p_unit, rows());
    if (q_unit) *q_sigma = sigma(q, q_unit, rows() * shape().k);
  }
};

}  // namespace fastsn
