// fastsn::rescale_backward for CPU tensors:
//   dW = (scale / sigma) · G + (g - <G, W̄> / sigma) · mean of the views' u v^T      G: gradient of W̄, g: of sigma
//   dscale = <G, W> / sigma
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <memory>
#include <thread>
#include <utility>

#include "ops.h"
#include "results.h"

namespace fastsn {

using at::Tensor;

namespace {

// The vectors of a weight as kernels.h takes them, with the mean over the views in p and q; null: not in use.
template <class A>
struct Outer {
  const A *p = nullptr, *q = nullptr, *x = nullptr, *z = nullptr;
  Outer() = default;
  Outer(const Weight& w, const A* flat, double factor) {
    const auto [b, k, kb] = w.arrangement.shape;
    const View &row = w.p_view(), &cls = w.q_view();
    const bool turned = w.arrangement.turned;
    const int64_t rows = w.arrangement.rows;
    memory_.reset(new A[(row.used() ? rows + b * k : 0) + (cls.used() ? rows * k + (kb ? b : b * k) : 0)]);
    A* to = memory_.get();
    const auto times = [&](const A* from, int64_t n) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i] * factor);
      return std::exchange(to, to + n);
    };
    if (row.used()) {
      p = times(flat + (turned ? row.v : row.u), rows);
      const A* const from = flat + (turned ? row.u : row.v);
      for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < k; ++j) to[kb ? j * b + i : i * k + j] = from[i * k + j];
      x = std::exchange(to, to + b * k);
    }
    if (cls.used()) {
      q = times(flat + (turned ? cls.v : cls.u), rows * k);
      const A* const from = flat + (turned ? cls.u : cls.v);
      for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < (kb ? 1 : k); ++j) to[kb ? i : i * k + j] = from[i];
      z = to;
    }
  }

 private:
  std::unique_ptr<A[]> memory_;
};

// What a gradient needs of one weight.
struct Gradient {
  Rows g, base;
  Result result;
  double scale;
  bool base_is_weight;  // otherwise W̄
};

// The gradient of a whole call. G is read twice, once for <G, W̄> of the whole weight and once for dW. Each weight's dW
// follows one weight behind its <G, W̄>, so that where it fits, G comes from the cache the second time.
template <class A>
class Backward {
 public:
  Backward(const std::vector<Weight>& weights, const std::vector<Gradient>& gradients, const A* vectors, const A* sigmas,
           const A* g_sigmas)
      : weights_(weights), gradients_(gradients), vectors_(vectors), sigmas_(sigmas), g_sigmas_(g_sigmas),
        states_(weights.size()) {
    pieces_ = items(weights, &parallel_);
    dots_.resize(pieces_.size());
    for (size_t i = pieces_.size(); i-- > 0;) {
      State& state = states_[pieces_[i].weight];
      state.first_piece = i;
      ++state.pieces;
    }
    for (State& state : states_) state.pending.store(state.pieces, std::memory_order_relaxed);
    // Pieces of a weight lie together: the inner products of weight i + 1 come before the rows of weight i.
    size_t done = 0;
    for (size_t i = 0; i <= pieces_.size(); ++i) {
      while (done < i && (i == pieces_.size() || pieces_[done].weight + 1 < pieces_[i].weight))
        work_.push_back({done++, true});
      if (i < pieces_.size()) work_.push_back({i, false});
    }
  }

  // d_scales: the derivative by the scale of each weight, where its base is the weight itself.
  void run(double* d_scales) {
    for_each(static_cast<int64_t>(work_.size()), parallel_, [&](int64_t i) {
      try {
        work(work_[i], d_scales);
      } catch (...) {  // out of memory: nobody may wait for what will never be there
        failed_.store(true, std::memory_order_release);
        throw;
      }
    });
  }

 private:
  struct Work {
    size_t piece;
    bool rows;  // dW, otherwise <G, W̄>
  };
  struct State {
    Outer<A> outer;
    A alpha = 0;
    size_t first_piece = 0;
    int64_t pieces = 0;
    std::atomic<int64_t> pending{0};
    std::atomic<bool> ready{false};
  };

  void work(const Work& work, double* d_scales) {
    const Item& piece = pieces_[work.piece];
    State& state = states_[piece.weight];
    if (!work.rows) {
      dots_[work.piece] = dot(piece);
      if (state.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) settle(piece.weight, d_scales);
      return;
    }
    // Work is handed out in order: what is waited for is being worked on by another thread, or has failed.
    while (!state.ready.load(std::memory_order_acquire)) {
      if (failed_.load(std::memory_order_acquire)) return;
      std::this_thread::yield();
    }
    rows(piece, state);
  }

  double dot(const Item& piece) const {
    const Gradient& gradient = gradients_[piece.weight];
    A* const memory = scratch<A>(2 * kBlock, 0);
    double sum = 0;
    runs(gradient.g, gradient.base, weights_[piece.weight].n(), piece.begin, piece.end,
         [&](int64_t a, int64_t b, int64_t n) {
           sum += kernels<A>().dot(widened<A>(gradient.g.tensor, a, n, memory),
                                   widened<A>(gradient.base.tensor, b, n, memory + kBlock), n);
         });
    return sum;
  }

  // Once all of a weight's inner products are there: the coefficients of dW. Sums run in the order of the pieces.
  void settle(size_t i, double* d_scales) {
    State& state = states_[i];
    double dot = 0;
    for (int64_t j = 0; j < state.pieces; ++j) dot += dots_[state.first_piece + j];
    const bool zero = sigmas_[i] == 0;
    const double sigma = zero ? 1 : sigmas_[i], factor = gradients_[i].scale / sigma;
    d_scales[i] = dot / sigma;
    const double inner = gradients_[i].base_is_weight ? dot * factor : dot;  // <G, W̄>
    const double along = (g_sigmas_ ? g_sigmas_[i] : 0) - (zero ? 0 : inner / sigma);
    state.alpha = static_cast<A>(factor);
    state.outer = Outer<A>(weights_[i], vectors_, along / weights_[i].views());
    state.ready.store(true, std::memory_order_release);
  }

  void rows(const Item& piece, const State& state) const {
    const Gradient& gradient = gradients_[piece.weight];
    const Rows& out = gradient.result.rows;
    const Outer<A>& o = state.outer;
    const Shape& s = weights_[piece.weight].arrangement.shape;
    const int64_t n = s.n(), inner_n = inner_size<A>(s);
    Parts<A> parts(scratch<A>(2 * Parts<A>::room(n) + Parts<A>::room(inner_n), 0));
    A *const wide_g = parts.take(n), *const wide_out = parts.take(n), *const inner = parts.take(inner_n);
    for (int64_t row = piece.begin; row < piece.end; ++row) {
      const A* const g = widened<A>(gradient.g.tensor, row * gradient.g.stride, n, wide_g);
      A* const place = target<A>(out.tensor, row * out.stride, wide_out);
      kernels<A>().gradient(g, s, state.alpha, o.p ? o.p[row] : A(0), o.x, o.q ? o.q + row * s.k : nullptr, o.z, place,
                            inner);
      narrowed<A>(out.tensor, row * out.stride, n, place);
    }
  }

  const std::vector<Weight>& weights_;
  const std::vector<Gradient>& gradients_;
  const A *vectors_, *sigmas_, *g_sigmas_;
  std::vector<State> states_;
  std::vector<Item> pieces_;
  std::vector<double> dots_;
  std::vector<Work> work_;
  std::atomic<bool> failed_{false};
  bool parallel_ = false;
};

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>> rescale_backward(
    at::TensorList gradients, const std::optional<Tensor>& g_sigma, at::TensorList bases, at::TensorList scales, const Tensor& sigma,
    const Tensor& vectors, at::IntArrayRef dims, at::IntArrayRef view_masks, at::IntArrayRef scale_index,
    at::ArrayRef<double> scale_factor, at::IntArrayRef dtypes) {
  Sizes sizes;
  std::vector<Weight> list = read_weights(bases, dims, view_masks, "bases", &sizes);
  const std::vector<at::ScalarType> own_dtypes = check_dtypes(list.size(), dtypes);
  check_scales(list.size(), scales, scale_index, scale_factor);
  const at::ScalarType dtype = wide(own_dtypes[0]);
  for (size_t i = 0; i < own_dtypes.size(); ++i)
    TORCH_CHECK_TYPE(wide(own_dtypes[i]) == dtype, "dtypes[", i, "] must have sums in ", dtype, ", got ", own_dtypes[i]);
  const int64_t count = static_cast<int64_t>(list.size());
  if (g_sigma) check_flat(*g_sigma, count, dtype, "grad_sigma");
  check_flat(sigma, count, dtype, "sigma");
  check_flat(vectors, sizes.vectors, dtype, "vectors");
  TORCH_CHECK_VALUE(gradients.size() == list.size(), "gradients must have ", count, " entries, one per entry of bases, got ",
                    gradients.size());
  std::vector<Gradient> all;
  all.reserve(list.size());
  std::vector<double> d_scale(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &g = gradients[i], &base = bases[i];
    Weight& w = list[i];
    TORCH_CHECK_VALUE(g.sizes() == base.sizes(), "gradients[", i, "] must have shape ", base.sizes(), ", got ", g.sizes());
    TORCH_CHECK_VALUE(g.device().is_cpu(), "gradients[", i, "] must be on cpu, got ", g.device());
    TORCH_CHECK_TYPE(has_kernels(g.scalar_type()), "gradients[", i,
                     "] must be float32, float64, float16 or bfloat16, got ", g.scalar_type());
    Gradient gradient;
    gradient.result = result(base, w, own_dtypes[i]);
    gradient.base = w.rows;
    if (!w.rows.tensor.is_same(base)) {
      gradient.g = canonical(g, dims[i], &w.arrangement);
    } else if (gradient.g.tensor = g; !arranged(g, dims[i], w.arrangement, &gradient.g.stride)) {
      // fresh_like keeps the order of the base's dimensions, and `result` has seen that its rows then fit.
      gradient.g.tensor = fresh_like(base, g.scalar_type()).copy_(g);
      arranged(gradient.g.tensor, dims[i], w.arrangement, &gradient.g.stride);
    }
    gradient.scale = scale_of(i, scales, scale_index, scale_factor);
    gradient.base_is_weight = scale_index[i] >= 0;
    all.push_back(std::move(gradient));
  }
  const Tensor flat = vectors.contiguous(), sigmas = sigma.contiguous();
  const Tensor g_sigmas = g_sigma ? g_sigma->contiguous() : Tensor();
  if (dtype == at::kDouble)
    Backward<double>(list, all, flat.const_data_ptr<double>(), sigmas.const_data_ptr<double>(),
                     g_sigma ? g_sigmas.const_data_ptr<double>() : nullptr)
        .run(d_scale.data());
  else
    Backward<float>(list, all, flat.const_data_ptr<float>(), sigmas.const_data_ptr<float>(),
                    g_sigma ? g_sigmas.const_data_ptr<float>() : nullptr)
        .run(d_scale.data());
  std::vector<Tensor> d_weights, d_scales;
  d_weights.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    all[i].result.finish(dims[i]);
    d_weights.push_back(std::move(all[i].result.tensor));
  }
  std::vector<double> sums(scales.size());
  for (size_t i = 0; i < list.size(); ++i)
    if (scale_index[i] >= 0) sums[scale_index[i]] += d_scale[i] * scale_factor[i];
  for (size_t i = 0; i < scales.size(); ++i)
    d_scales.push_back(at::scalar_tensor(sums[i], scales[i].options().requires_grad(false)).view(scales[i].sizes()));
  return {std::move(d_weights), std::move(d_scales)};
}

}  // namespace fastsn
