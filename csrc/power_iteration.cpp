// fastsn::power_iteration for CPU tensors: u <- M v / |M v|, v <- M^T u / |M^T u| for every view of every weight.
//
// Rows that are output channels: the local half of a block of rows gives its entries of u, which the accumulating half
// then takes while the block is still in the cache: one read of the weight per iteration. The accumulated vector is not
// divided by |M v| before the end; sigma is |M^T M v| / |M v|. Rows that are input channels (ConvTranspose): u is the
// accumulated vector and has to be complete before v is begun, so there are two reads.
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "ops.h"
#include "weights.h"

namespace fastsn {

using at::Tensor;

namespace {

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

// One weight in work. p, q, x, z as in kernels.h; *_unit are the normalised vectors, in the call's flat result.
template <class A>
struct Job {
  const Weight* weight;
  A *p_unit, *q_unit, *x_unit, *z_unit, *p_sigma, *q_sigma;
  A *p, *q;                  // what the local half gives, or what the accumulating half takes
  A *x, *z;                  // what the local half takes: padded, in memory order, z spread
  A* sums;                   // per piece: x and z as accumulated
  int64_t pieces, piece_rows, x_size, z_size;
  std::atomic<int64_t> pending{0};

  const Shape& shape() const { return weight->arrangement.shape; }
  int64_t rows() const { return weight->arrangement.rows; }
  bool turned() const { return weight->arrangement.turned; }

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

  A* x_sums(int64_t piece) const { return sums + piece * (x_size + z_size); }
  A* z_sums(int64_t piece) const { return x_sums(piece) + x_size; }

  // The given halves over the rows of one piece.
  void work(int64_t piece, int halves) const {
    const Shape& s = shape();
    const int64_t n = s.n(), wide_n = padded<A>(n);
    A* const memory = scratch<A>((kRows + 1) * wide_n + inner_size<A>(s), 0);
    A* const zeros = memory + kRows * wide_n;
    A* const inner = zeros + wide_n;
    std::memset(zeros, 0, wide_n * sizeof(A));
    if (halves & kAccumulate) std::memset(x_sums(piece), 0, (x_size + z_size) * sizeof(A));
    const int64_t end = std::min(rows(), (piece + 1) * piece_rows);
    const auto at = [&](int64_t row) { return row * weight->rows.stride; };
    for (int64_t row = piece * piece_rows; row < end; row += kRows) {
      const A *block[kRows], *next[kRows];
      for (int r = 0; r < kRows; ++r) {
        block[r] = row + r < end ? widened<A>(weight->rows.tensor, at(row + r), n, memory + r * wide_n) : zeros;
        next[r] = row + r + kRows < end ? placed<A>(weight->rows.tensor, at(row + r + kRows), zeros) : zeros;
      }
      A* const block_p = p_unit ? p + row : nullptr;
      A* const block_q = q_unit ? q + row * s.k : nullptr;
      if (halves & kLocal) kernels<A>().local(block, s, x, z, block_p, block_q, inner);
      if (halves & kAccumulate)
        kernels<A>().accumulate(block, next, s, block_p, block_q, x_sums(piece), z_sums(piece), inner);
    }
  }

  // Adds the pieces' sums up in order, and brings them to the order of x_unit and z_unit, in place of piece 0.
  void gather() const {
    const auto [b, k, kb] = shape();
    A* const total = x_sums(0);
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const A* part = x_sums(piece);
      for (int64_t i = 0; i < x_size + z_size; ++i) total[i] += part[i];
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

  // Takes over x / |x| unless it is bad; sigma is |x| over the norm of the coefficients that made it.
  static void take(const A* sums, int64_t n, double coefficients, A* unit, A* sigma) {
    const Norm found = norm(sums, n);
    if (found.sound) divide(sums, n, found.value, unit);
    if (!sigma) return;
    *sigma = found.sound         ? static_cast<A>(found.value / coefficients)
             : found.value == 0 ? A(0)
                                : std::numeric_limits<A>::quiet_NaN();
  }

  // After both halves: u from the local one, v and sigma from the accumulating one.
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

  // Turned weights: u, then v and sigma.
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

template <class A>
class Call {
 public:
  Call(const std::vector<Weight>& weights, A* vectors, A* sigmas) : jobs_(weights.size()) {
    int64_t size = 0;
    for (const bool placing : {false, true}) {
      A* memory = placing ? scratch<A>(size, 1) : nullptr;
      const auto take = [&](int64_t n) {
        const int64_t wide = padded<A>(n);
        size += placing ? 0 : wide;
        A* const place = memory;
        memory += placing ? wide : 0;
        return place;
      };
      for (size_t i = 0; i < weights.size(); ++i) place(jobs_[i], weights[i], take, vectors, sigmas);
    }
    for (size_t i = 0; i < jobs_.size(); ++i)
      for (int64_t piece = 0; piece < jobs_[i].pieces; ++piece) items_.push_back({i, piece});
    for (const Weight& w : weights) parallel_ = (elements_ += w.numel()) >= kSerial;
  }

  void measure() {
    for (Job<A>& job : jobs_) job.prepare();
    pass([](const Job<A>&) { return kLocal; }, [](const Job<A>& job) { job.finish_measured(); });
  }

  void iterate() {
    bool turned = false;
    for (Job<A>& job : jobs_) {
      turned = turned || job.turned();
      if (job.turned()) {
        std::copy_n(job.p_unit, job.p_unit ? job.rows() : 0, job.p);
        std::copy_n(job.q_unit, job.q_unit ? job.rows() * job.shape().k : 0, job.q);
      } else {
        job.prepare();
      }
    }
    pass([](const Job<A>& job) { return job.turned() ? kAccumulate : kLocal | kAccumulate; },
         [](const Job<A>& job) { job.turned() ? job.finish_accumulated() : job.finish_fused(); });
    if (turned)
      pass([](const Job<A>& job) { return job.turned() ? kLocal : 0; },
           [](const Job<A>& job) { job.finish_local(); });
  }

 private:
  template <class Take>
  static void place(Job<A>& job, const Weight& w, const Take& take, A* vectors, A* sigmas) {
    const View &p = w.p_view(), &q = w.q_view();
    const bool turned = w.arrangement.turned;
    const auto at = [&](const View& view, int64_t offset) { return view.used() ? vectors + offset : nullptr; };
    job.weight = &w;
    job.p_unit = at(p, turned ? p.v : p.u);
    job.x_unit = at(p, turned ? p.u : p.v);
    job.q_unit = at(q, turned ? q.v : q.u);
    job.z_unit = at(q, turned ? q.u : q.v);
    job.p_sigma = p.used() ? sigmas + p.sigma : nullptr;
    job.q_sigma = q.used() ? sigmas + q.sigma : nullptr;
    const auto [b, k, kb] = w.arrangement.shape;
    job.x_size = p.used() ? padded<A>(b * k) : 0;
    job.z_size = q.used() ? padded<A>(kb ? b : b * k) : 0;
    job.piece_rows = rows_per_piece(w.arrangement.rows, b * k);
    job.pieces = (w.arrangement.rows + job.piece_rows - 1) / job.piece_rows;
    // The last block of rows may be cut short; its missing rows still have a place.
    const int64_t rows = (w.arrangement.rows + kRows - 1) / kRows * kRows;
    job.p = take(p.used() ? rows : 0);
    job.q = take(q.used() ? rows * k : 0);
    job.x = take(job.x_size);
    job.z = take(job.z_size);
    job.sums = take(job.pieces * (job.x_size + job.z_size));
    if (job.sums) std::memset(job.p, 0, (job.sums - job.p) * sizeof(A));  // what pads must not be NaN
  }

  // Works on all pieces; who works on the last piece of a weight finishes it, in an order that is always the same.
  template <class Halves, class Finish>
  void pass(const Halves& halves, const Finish& finish) {
    for (Job<A>& job : jobs_) job.pending.store(job.pieces, std::memory_order_relaxed);
    for_each(static_cast<int64_t>(items_.size()), parallel_, [&](int64_t i) {
      Job<A>& job = jobs_[items_[i].job];
      const int what = halves(job);
      if (what == 0) return;
      job.work(items_[i].piece, what);
      if (job.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) finish(job);
    });
  }

  struct Item {
    size_t job;
    int64_t piece;
  };
  std::vector<Job<A>> jobs_;
  std::vector<Item> items_;
  int64_t elements_ = 0;
  bool parallel_ = false;
};

void check_vector(const Tensor& x, int64_t size, at::ScalarType dtype, const Tensor& w, const char* name, size_t at) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.numel() == size, name, "[", at, "] must have shape [", size, "], got ",
                    x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, "[", at, "] must be ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == w.device(), name, "[", at, "] must be on ", w.device(), ", got ", x.device());
}

template <class A>
void run(const std::vector<Weight>& weights, at::TensorList u, at::TensorList v, int64_t n, bool store,
         const Tensor& sigmas, const Tensor& vectors) {
  A* const flat = vectors.mutable_data_ptr<A>();
  const auto for_vectors = [&](const auto& f) {
    size_t pair = 0;
    for (const Weight& w : weights) {
      for (const View* view : {&w.out, &w.in}) {
        if (!view->used()) continue;
        f(u[pair], view->u, view->u_size);
        f(v[pair], view->v, view->v_size);
        ++pair;
      }
    }
  };
  for_vectors([&](const Tensor& x, int64_t offset, int64_t size) {
    std::copy_n(x.contiguous().template const_data_ptr<A>(), size, flat + offset);
  });
  Call<A> call(weights, flat, sigmas.mutable_data_ptr<A>());
  for (int64_t i = 0; i < n; ++i) call.iterate();
  if (n == 0) call.measure();
  if (!store) return;
  for_vectors([&](const Tensor& x, int64_t offset, int64_t size) {
    if (x.is_contiguous())
      std::copy_n(flat + offset, size, x.mutable_data_ptr<A>());
    else
      x.copy_(vectors.narrow(0, offset, size));
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  });
}

std::tuple<Tensor, Tensor> checked(at::TensorList weights, at::TensorList u, at::TensorList v, at::IntArrayRef dims,
                                   at::IntArrayRef views, int64_t n, bool store) {
  Sizes sizes;
  const std::vector<Weight> list = read_weights(weights, dims, views, "weights", &sizes);
  TORCH_CHECK_VALUE(n >= 0, "n must be at least 0, got ", n);
  const size_t pairs = static_cast<size_t>(sizes.sigmas);
  TORCH_CHECK_VALUE(u.size() == pairs, "u must have ", pairs, " entries, one per weight and view, got ", u.size());
  TORCH_CHECK_VALUE(v.size() == pairs, "v must have ", pairs, " entries, one per weight and view, got ", v.size());
  const at::ScalarType dtype = sum_dtype(weights);
  size_t pair = 0;
  for (const Weight& w : list) {
    for (const View* view : {&w.out, &w.in}) {
      if (!view->used()) continue;
      check_vector(u[pair], view->u_size, dtype, weights[0], "u", pair);
      check_vector(v[pair], view->v_size, dtype, weights[0], "v", pair);
      ++pair;
    }
  }
  for (size_t i = 0; store && i < pairs; ++i)
    TORCH_CHECK(c10::InferenceMode::is_enabled() || !(u[i].is_inference() || v[i].is_inference()), "u[", i, "] or v[",
                i, "] was made in inference mode and cannot be updated outside of it");
  const auto options = weights[0].options().dtype(dtype).requires_grad(false);
  const Tensor sigmas = at::empty({sizes.sigmas}, options), vectors = at::empty({sizes.vectors}, options);
  if (dtype == at::kDouble)
    run<double>(list, u, v, n, store, sigmas, vectors);
  else
    run<float>(list, u, v, n, store, sigmas, vectors);
  return {sigmas, vectors};
}

}  // namespace

std::tuple<Tensor, Tensor> power_iteration(at::TensorList weights, at::TensorList u, at::TensorList v,
                                           at::IntArrayRef dims, at::IntArrayRef views, int64_t n) {
  return checked(weights, u, v, dims, views, n, false);
}

std::tuple<Tensor, Tensor> power_iteration_(at::TensorList weights, at::TensorList u, at::TensorList v,
                                            at::IntArrayRef dims, at::IntArrayRef views, int64_t n) {
  return checked(weights, u, v, dims, views, n, true);
}

}  // namespace fastsn
