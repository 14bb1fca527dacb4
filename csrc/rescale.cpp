// fastsn::rescale and its gradient for CPU tensors.
//   W̄ = scale · W / sigma        sigma: the mean of the views' sigmas; where it is exactly 0, 1 in its place
//   dW = (scale / sigma) · G + (g - <G, W̄> / sigma) · mean of the views' u v^T      G: gradient of W̄, g: of sigma
//   dscale = <G, W> / sigma
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <cmath>

#include "weights.h"

namespace fastsn {

using at::Tensor;

namespace {

constexpr int64_t kBlock = 4096;  // elements that are converted at a time

double scale_of(size_t i, at::TensorList scales, at::IntArrayRef which, at::ArrayRef<double> factors) {
  return which[i] < 0 ? factors[i] : factors[i] * scales[which[i]].item<double>();
}

void check_scales(size_t count, at::TensorList scales, at::IntArrayRef which, at::ArrayRef<double> factors) {
  TORCH_CHECK_VALUE(which.size() == count, "which must have ", count, " entries, one per weight, got ", which.size());
  TORCH_CHECK_VALUE(factors.size() == count, "factors must have ", count, " entries, one per weight, got ",
                    factors.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    TORCH_CHECK_VALUE(scales[i].numel() == 1, "scales[", i, "] must be one number, got shape ", scales[i].sizes());
    TORCH_CHECK_TYPE(at::isFloatingType(scales[i].scalar_type()), "scales[", i, "] must be floating point, got ",
                     scales[i].scalar_type());
    TORCH_CHECK_VALUE(scales[i].device().is_cpu(), "scales[", i, "] must be on cpu, got ", scales[i].device());
  }
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(which[i] < static_cast<int64_t>(scales.size()), "which[", i, "] must be less than ",
                      scales.size(), ", the number of scales, got ", which[i]);
    TORCH_CHECK_VALUE(std::isfinite(factors[i]), "factors[", i, "] must be finite, got ", factors[i]);
  }
}

void check_flat(const Tensor& x, int64_t size, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.numel() == size, name, " must have shape [", size, "], got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on cpu, got ", x.device());
}

void check_dtypes(size_t count, at::ArrayRef<at::ScalarType> dtypes) {
  TORCH_CHECK_VALUE(dtypes.size() == count, "dtypes must have ", count, " entries, one per weight, got ",
                    dtypes.size());
  for (size_t i = 0; i < count; ++i)
    TORCH_CHECK_TYPE(dtypes[i] == at::kFloat || dtypes[i] == at::kDouble || dtypes[i] == at::kHalf ||
                         dtypes[i] == at::kBFloat16,
                     "dtypes[", i, "] must be float32, float64, float16 or bfloat16, got ", dtypes[i]);
}

struct Item {
  size_t weight;
  int64_t begin, end;  // rows
};

std::vector<Item> items(const std::vector<Weight>& weights, bool* parallel) {
  std::vector<Item> found;
  int64_t elements = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = weights[i].arrangement.rows, each = rows_per_piece(rows, weights[i].n());
    for (int64_t row = 0; row < rows; row += each) found.push_back({i, row, std::min(rows, row + each)});
    elements += weights[i].numel();
  }
  *parallel = elements >= kSerial;
  return found;
}

// Calls f(offset in a, offset in b, elements) over the rows begin..end of two tensors, in runs as long as possible.
template <class F>
void runs(const Rows& a, const Rows& b, int64_t n, int64_t begin, int64_t end, const F& f) {
  if (a.stride == n && b.stride == n) {
    for (int64_t at = begin * n; at < end * n; at += kBlock) f(at, at, std::min(kBlock, end * n - at));
    return;
  }
  for (int64_t row = begin; row < end; ++row)
    for (int64_t at = 0; at < n; at += kBlock) f(row * a.stride + at, row * b.stride + at, std::min(kBlock, n - at));
}

// A result's rows in the weight's arrangement: the result itself, or memory that is copied into it at the end.
struct Result {
  Tensor tensor;
  Rows rows;
  void finish(int64_t dim) const {
    if (!rows.tensor.is_same(tensor)) tensor.movedim(dim, 0).copy_(rows.tensor);
  }
};

Result result(const Tensor& like, Weight& w, at::ScalarType dtype) {
  const Tensor tensor = fresh_like(like, dtype);
  int64_t stride = 0;
  if (arranged(tensor, w.dim, w.arrangement, &stride) && stride == w.n()) return {tensor, {tensor, stride}};
  w.rows = canonical(like, w.dim, &w.arrangement);
  return {tensor, {at::empty_like(w.rows.tensor, w.rows.tensor.options().dtype(dtype)), w.n()}};
}

template <class A>
void forward(const std::vector<Weight>& weights, const std::vector<double>& scales, const A* sigmas,
             const std::vector<Result>& results) {
  bool parallel;
  const std::vector<Item> work = items(weights, &parallel);
  for_each(static_cast<int64_t>(work.size()), parallel, [&](int64_t i) {
    const Item& item = work[i];
    const Weight& w = weights[item.weight];
    const Rows& out = results[item.weight].rows;
    const A sigma = sigmas[item.weight], inverse = A(1) / (sigma == 0 ? A(1) : sigma);
    A* const memory = scratch<A>(2 * kBlock, 0);
    runs(w.rows, out, w.n(), item.begin, item.end, [&](int64_t from, int64_t to, int64_t n) {
      const A* const in = widened<A>(w.rows.tensor, from, n, memory);
      A* const place = target<A>(out.tensor, to, memory + kBlock);
      kernels<A>().rescale(in, place, n, inverse, static_cast<A>(scales[item.weight]));
      narrowed<A>(out.tensor, to, n, place);
    });
  });
}

// The means of the views' sigmas.
template <class A>
Tensor means(const std::vector<Weight>& weights, const Tensor& sigma) {
  const Tensor result = at::empty({static_cast<int64_t>(weights.size())}, sigma.options().requires_grad(false));
  const Tensor all = sigma.contiguous();
  const A* const from = all.const_data_ptr<A>();
  A* const to = result.mutable_data_ptr<A>();
  for (size_t i = 0; i < weights.size(); ++i) {
    double sum = 0;
    for (const View* view : {&weights[i].out, &weights[i].in})
      if (view->used()) sum += from[view->sigma];
    to[i] = static_cast<A>(sum / weights[i].views());
  }
  return result;
}

// The vectors of a weight as kernels.h takes them, with the mean over the views in p and q.
template <class A>
struct Outer {
  std::vector<A> p, q, x, z;
  Outer() = default;
  Outer(const Weight& w, const A* flat, double factor) {
    const auto [b, k, kb] = w.arrangement.shape;
    const View &row = w.p_view(), &cls = w.q_view();
    const bool turned = w.arrangement.turned;
    const auto times = [&](const A* from, int64_t n) {
      std::vector<A> to(n);
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i] * factor);
      return to;
    };
    if (row.used()) {
      p = times(flat + (turned ? row.v : row.u), w.arrangement.rows);
      const A* const from = flat + (turned ? row.u : row.v);
      x.resize(b * k);
      for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < k; ++j) x[kb ? j * b + i : i * k + j] = from[i * k + j];
    }
    if (cls.used()) {
      q = times(flat + (turned ? cls.v : cls.u), w.arrangement.rows * k);
      const A* const from = flat + (turned ? cls.u : cls.v);
      z.resize(kb ? b : b * k);
      for (int64_t i = 0; i < b; ++i)
        for (int64_t j = 0; j < (kb ? 1 : k); ++j) z[kb ? i : i * k + j] = from[i];
    }
  }
};

// What a gradient needs of one weight.
struct Gradient {
  Rows g, base;
  Result result;
};

template <class A>
void backward(const std::vector<Weight>& weights, const std::vector<Gradient>& gradients, const A* vectors,
              const std::vector<double>& scales, const std::vector<bool>& of_weight, const A* sigmas, const A* g_sigma,
              double* d_scale) {
  bool parallel;
  const std::vector<Item> work = items(weights, &parallel);
  std::vector<double> dots(work.size());
  for_each(static_cast<int64_t>(work.size()), parallel, [&](int64_t i) {
    const Item& item = work[i];
    const Gradient& gradient = gradients[item.weight];
    A* const memory = scratch<A>(2 * kBlock, 0);
    runs(gradient.g, gradient.base, weights[item.weight].n(), item.begin, item.end, [&](int64_t a, int64_t b, int64_t n) {
      dots[i] += kernels<A>().dot(widened<A>(gradient.g.tensor, a, n, memory),
                                  widened<A>(gradient.base.tensor, b, n, memory + kBlock), n);
    });
  });
  std::vector<double> dot(weights.size());
  for (size_t i = 0; i < work.size(); ++i) dot[work[i].weight] += dots[i];
  std::vector<Outer<A>> outer(weights.size());
  std::vector<A> alpha(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool zero = sigmas[i] == 0;
    const double sigma = zero ? 1 : sigmas[i];
    // <G, W̄>, from W̄ or from W
    const double inner = of_weight[i] ? dot[i] * (scales[i] / sigma) : dot[i];
    d_scale[i] = of_weight[i] ? dot[i] / sigma : 0;
    const double factor = (g_sigma ? g_sigma[i] : 0) - (zero ? 0 : inner / sigma);
    alpha[i] = static_cast<A>(scales[i] / sigma);
    outer[i] = Outer<A>(weights[i], vectors, factor / weights[i].views());
  }
  for_each(static_cast<int64_t>(work.size()), parallel, [&](int64_t i) {
    const Item& item = work[i];
    const Weight& w = weights[item.weight];
    const Gradient& gradient = gradients[item.weight];
    const Outer<A>& o = outer[item.weight];
    const Shape& s = w.arrangement.shape;
    const int64_t n = s.n(), wide_n = padded<A>(n);
    A* const memory = scratch<A>(2 * wide_n + period<A>(s), 0);
    const Rows& out = gradient.result.rows;
    for (int64_t row = item.begin; row < item.end; ++row) {
      const A* const g = widened<A>(gradient.g.tensor, row * gradient.g.stride, n, memory);
      A* const place = target<A>(out.tensor, row * out.stride, memory + wide_n);
      kernels<A>().gradient(g, s, alpha[item.weight], o.p.empty() ? A(0) : o.p[row], o.p.empty() ? nullptr : o.x.data(),
                            o.q.empty() ? nullptr : o.q.data() + row * s.k, o.q.empty() ? nullptr : o.z.data(), place,
                            memory + 2 * wide_n);
      narrowed<A>(out.tensor, row * out.stride, n, place);
    }
  });
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> rescale(at::TensorList weights, at::TensorList scales, const Tensor& sigma,
                                                const Tensor& vectors, at::IntArrayRef dims, at::IntArrayRef views,
                                                at::IntArrayRef which, at::ArrayRef<double> factors,
                                                at::ArrayRef<at::ScalarType> dtypes) {
  Sizes sizes;
  std::vector<Weight> list = read_weights(weights, dims, views, "weights", &sizes);
  const at::ScalarType dtype = sum_dtype(weights);
  check_flat(sigma, sizes.sigmas, dtype, "sigma");
  check_flat(vectors, sizes.vectors, dtype, "vectors");
  check_scales(list.size(), scales, which, factors);
  check_dtypes(list.size(), dtypes);
  std::vector<double> numbers;
  std::vector<Result> results;
  for (size_t i = 0; i < list.size(); ++i) {
    numbers.push_back(scale_of(i, scales, which, factors));
    results.push_back(result(weights[i], list[i], dtypes[i]));
  }
  Tensor mean;
  if (dtype == at::kDouble) {
    mean = means<double>(list, sigma);
    forward<double>(list, numbers, mean.const_data_ptr<double>(), results);
  } else {
    mean = means<float>(list, sigma);
    forward<float>(list, numbers, mean.const_data_ptr<float>(), results);
  }
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < list.size(); ++i) {
    results[i].finish(dims[i]);
    outputs.push_back(results[i].tensor);
  }
  return {outputs, mean};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> rescale_backward(
    at::TensorList gradients, const Tensor& g_sigma, at::TensorList bases, at::TensorList scales, const Tensor& sigma,
    const Tensor& vectors, at::IntArrayRef dims, at::IntArrayRef views, at::IntArrayRef which,
    at::ArrayRef<double> factors, at::ArrayRef<at::ScalarType> dtypes) {
  Sizes sizes;
  std::vector<Weight> list = read_weights(bases, dims, views, "bases", &sizes);
  check_dtypes(list.size(), dtypes);
  check_scales(list.size(), scales, which, factors);
  const at::ScalarType dtype = wide(dtypes[0]);
  for (size_t i = 0; i < dtypes.size(); ++i)
    TORCH_CHECK_TYPE(wide(dtypes[i]) == dtype, "dtypes[", i, "] must have sums in ", dtype, ", got ", dtypes[i]);
  const int64_t count = static_cast<int64_t>(list.size());
  check_flat(g_sigma, count, dtype, "grad_sigma");
  check_flat(sigma, count, dtype, "sigma");
  check_flat(vectors, sizes.vectors, dtype, "vectors");
  TORCH_CHECK_VALUE(gradients.size() == list.size(), "gradients must have ", count, " entries, one per entry of bases, got ",
                    gradients.size());
  std::vector<Gradient> all;
  std::vector<double> numbers, d_scale(list.size());
  std::vector<bool> of_weight;
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &g = gradients[i], &base = bases[i];
    Weight& w = list[i];
    TORCH_CHECK_VALUE(g.sizes() == base.sizes(), "gradients[", i, "] must have shape ", base.sizes(), ", got ", g.sizes());
    TORCH_CHECK_VALUE(g.device().is_cpu(), "gradients[", i, "] must be on cpu, got ", g.device());
    TORCH_CHECK_TYPE(at::isFloatingType(g.scalar_type()), "gradients[", i, "] must be floating point, got ",
                     g.scalar_type());
    Gradient gradient;
    gradient.result = result(base, w, dtypes[i]);
    gradient.base = w.rows;
    if (!w.rows.tensor.is_same(base)) {
      gradient.g = canonical(g, dims[i], &w.arrangement);
    } else if (gradient.g.tensor = g; !arranged(g, dims[i], w.arrangement, &gradient.g.stride)) {
      // fresh_like keeps the order of the base's dimensions, and `result` has seen that its rows then fit.
      gradient.g.tensor = fresh_like(base, g.scalar_type()).copy_(g);
      arranged(gradient.g.tensor, dims[i], w.arrangement, &gradient.g.stride);
    }
    all.push_back(std::move(gradient));
    numbers.push_back(scale_of(i, scales, which, factors));
    of_weight.push_back(which[i] >= 0);
  }
  const Tensor flat = vectors.contiguous(), sigmas = sigma.contiguous(), g_sigmas = g_sigma.contiguous();
  if (dtype == at::kDouble)
    backward<double>(list, all, flat.const_data_ptr<double>(), numbers, of_weight, sigmas.const_data_ptr<double>(),
                     g_sigmas.const_data_ptr<double>(), d_scale.data());
  else
    backward<float>(list, all, flat.const_data_ptr<float>(), numbers, of_weight, sigmas.const_data_ptr<float>(),
                    g_sigmas.const_data_ptr<float>(), d_scale.data());
  std::vector<Tensor> d_weights, d_scales;
  for (size_t i = 0; i < list.size(); ++i) {
    all[i].result.finish(dims[i]);
    d_weights.push_back(all[i].result.tensor);
  }
  std::vector<double> sums(scales.size());
  for (size_t i = 0; i < list.size(); ++i)
    if (which[i] >= 0) sums[which[i]] += d_scale[i] * factors[i];
  for (size_t i = 0; i < scales.size(); ++i)
    d_scales.push_back(at::scalar_tensor(sums[i], scales[i].options().requires_grad(false)).view(scales[i].sizes()));
  return {d_weights, d_scales};
}

}  // namespace fastsn
