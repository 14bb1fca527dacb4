// fastsn::power_iteration for CPU tensors: u <- M v / |M v|, v <- M^T u / |M^T u| for every view of every weight; with
// v_first the second step before the first.
//
// Where the vector with entries for rows comes first in a round (rows are output channels, and u does; or rows are input
// channels, as of ConvTranspose, and v does), the local half of a block of rows gives its entries, which the
// accumulating half then takes while the block is still in the cache: one read of the weight per round. The accumulated
// vector is not divided by the norm of the first product before the end; sigma is |M^T M v| / |M v|, or |M M^T u| /
// |M^T u|. Otherwise the accumulated vector comes first, and has to be complete before the local half begins: two reads.
#include <c10/core/InferenceMode.h>

#include <cstring>
#include <tuple>

#include "job.h"
#include "ops.h"

namespace fastsn {

using at::Tensor;

namespace {

template <class A>
class Call {
 public:
  Call(const std::vector<Weight>& weights, at::IntArrayRef v_first, A* vectors, A* sigmas) : jobs_(weights.size()) {
    Parts<A> counted;
    for (size_t i = 0; i < weights.size(); ++i) place(jobs_[i], weights[i], counted, vectors, sigmas);
    Parts<A> parts(scratch<A>(counted.size(), 1));
    for (size_t i = 0; i < weights.size(); ++i) {
      place(jobs_[i], weights[i], parts, vectors, sigmas);
      jobs_[i].two_passes = weights[i].arrangement.turned != (v_first[i] != 0);
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
    bool again = false;
    for (Job<A>& job : jobs_) {
      again = again || job.two_passes;
      if (job.two_passes) {
        std::copy_n(job.p_unit, job.p_unit ? job.rows() : 0, job.p);
        std::copy_n(job.q_unit, job.q_unit ? job.rows() * job.shape().k : 0, job.q);
      } else {
        job.prepare();
      }
    }
    pass([](const Job<A>& job) { return job.two_passes ? kAccumulate : kLocal | kAccumulate; },
         [](const Job<A>& job) { job.two_passes ? job.finish_accumulated() : job.finish_fused(); });
    if (again)
      pass([](const Job<A>& job) { return job.two_passes ? kLocal : 0; },
           [](const Job<A>& job) { job.finish_local(); });
  }

 private:
  static void place(Job<A>& job, const Weight& w, Parts<A>& parts, A* vectors, A* sigmas) {
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
    // Vectors reach over the end of every position's B channels when kb; behind the last position there has to be room.
    job.x_size = p.used() ? padded<A>(kb ? (k - 1) * b + padded<A>(b) : b * k) : 0;
    job.z_size = q.used() ? padded<A>(kb ? b : b * k) : 0;
    job.piece_rows = rows_per_piece(w.arrangement.rows, b * k);
    job.pieces = (w.arrangement.rows + job.piece_rows - 1) / job.piece_rows;
    // The last block of rows may be cut short; its missing rows still have a place.
    const int64_t rows = (w.arrangement.rows + kRows - 1) / kRows * kRows;
    const auto cleared = [&](int64_t n) {  // what pads must not be NaN
      A* const part = parts.take(n);
      if (part) std::memset(part, 0, padded<A>(n) * sizeof(A));
      return part;
    };
    job.p = cleared(p.used() ? rows : 0);
    job.q = cleared(q.used() ? rows * k : 0);
    job.x = cleared(job.x_size);
    job.z = cleared(job.z_size);
    for (int64_t piece = 0; piece < job.pieces; ++piece) {
      A* const sums = parts.take(job.x_size);
      parts.take(job.z_size);
      if (piece == 0) job.sums = sums;
    }
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
void run(const std::vector<Weight>& weights, at::TensorList u, at::TensorList v, at::IntArrayRef v_first, int64_t n,
         bool store, const Tensor& sigmas, const Tensor& vectors) {
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
  Call<A> call(weights, v_first, flat, sigmas.mutable_data_ptr<A>());
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
                                   at::IntArrayRef view_masks, at::IntArrayRef v_first, int64_t n, bool store) {
  Sizes sizes;
  const std::vector<Weight> list = read_weights(weights, dims, view_masks, "weights", &sizes);
  TORCH_CHECK_VALUE(v_first.size() == weights.size(), "v_first must have ", weights.size(),
                    " entries, one per entry of weights, got ", v_first.size());
  for (size_t i = 0; i < v_first.size(); ++i)
    TORCH_CHECK_VALUE(v_first[i] == 0 || v_first[i] == 1, "v_first[", i, "] must be 0 (u first) or 1 (v first), got ",
                      v_first[i]);
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
  const Tensor sigmas = fresh_flat(sizes.sigmas, dtype), vectors = fresh_flat(sizes.vectors, dtype);
  if (dtype == at::kDouble)
    run<double>(list, u, v, v_first, n, store, sigmas, vectors);
  else
    run<float>(list, u, v, v_first, n, store, sigmas, vectors);
  return {sigmas, vectors};
}

}  // namespace

std::tuple<Tensor, Tensor> power_iteration(at::TensorList weights, at::TensorList u, at::TensorList v,
                                           at::IntArrayRef dims, at::IntArrayRef view_masks,
                                           at::IntArrayRef v_first, int64_t n) {
  return checked(weights, u, v, dims, view_masks, v_first, n, false);
}

std::tuple<Tensor, Tensor> power_iteration_(at::TensorList weights, at::TensorList u, at::TensorList v,
                                            at::IntArrayRef dims, at::IntArrayRef view_masks,
                                            at::IntArrayRef v_first, int64_t n) {
  return checked(weights, u, v, dims, view_masks, v_first, n, true);
}

}  // namespace fastsn
