// fastsn::rescale for CPU tensors: W̄ = scale · W / sigma, with the mean of the views' sigmas; where it is exactly 0, 1
// takes its place.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops.h"
#include "results.h"

namespace fastsn {

using at::Tensor;

namespace {

// 1 / sigma and scale, the factors of W̄. Where 1 / sigma is out of range, a power of two that is not, and the rest.
template <class A>
std::pair<A, A> factors(A sigma, double scale) {
  constexpr int kRange = std::numeric_limits<A>::max_exponent - 2;
  if (sigma == 0) return {A(1), static_cast<A>(scale)};
  const double size = std::abs(static_cast<double>(sigma));
  if (!std::isfinite(size) || (size > std::ldexp(1.0, -kRange) && size < std::ldexp(1.0, kRange)))
    return {A(1) / sigma, static_cast<A>(scale)};
  const int power = std::clamp(-std::ilogb(size), -kRange, kRange);
  return {static_cast<A>(std::ldexp(1.0, power)), static_cast<A>(scale * (std::ldexp(1.0, -power) / sigma))};
}

template <class A>
void forward(const std::vector<Weight>& weights, const std::vector<double>& scales, const A* sigmas,
             const std::vector<Result>& results) {
  bool parallel;
  const std::vector<Item> work = items(weights, &parallel);
  const int64_t count = static_cast<int64_t>(work.size());
  for_each(count, parallel, [&](int64_t i) {
    const Item& item = work[count - 1 - i];  // backwards: what was iterated last is still in the cache
    const Weight& w = weights[item.weight];
    const Rows& out = results[item.weight].rows;
    const auto [inverse, scale] = factors<A>(sigmas[item.weight], scales[item.weight]);
    A* const memory = scratch<A>(2 * kBlock, 0);
    runs(w.rows, out, w.n(), item.begin, item.end, [&](int64_t from, int64_t to, int64_t n) {
      const A* const in = widened<A>(w.rows.tensor, from, n, memory);
      A* const place = target<A>(out.tensor, to, memory + kBlock);
      kernels<A>().rescale(in, place, n, inverse, scale);
      narrowed<A>(out.tensor, to, n, place);
    });
  });
}

// The means of the views' sigmas.
template <class A>
Tensor means(const std::vector<Weight>& weights, const Tensor& sigma) {
  const Tensor result = fresh_flat(static_cast<int64_t>(weights.size()), sigma.scalar_type());
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

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> rescale(at::TensorList weights, at::TensorList scales, const Tensor& sigma,
                                                const Tensor& vectors, at::IntArrayRef dims, at::IntArrayRef view_masks,
                                                at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor,
                                                at::IntArrayRef dtypes) {
  Sizes sizes;
  std::vector<Weight> list = read_weights(weights, dims, view_masks, "weights", &sizes);
  const at::ScalarType dtype = sum_dtype(weights);
  check_flat(sigma, sizes.sigmas, dtype, "sigma");
  check_flat(vectors, sizes.vectors, dtype, "vectors");
  check_scales(list.size(), scales, scale_index, scale_factor);
  const std::vector<at::ScalarType> out_dtypes = check_dtypes(list.size(), dtypes);
  std::vector<double> numbers;
  std::vector<Result> results;
  numbers.reserve(list.size());
  results.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    numbers.push_back(scale_of(i, scales, scale_index, scale_factor));
    results.push_back(result(weights[i], list[i], out_dtypes[i]));
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
  outputs.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    results[i].finish(dims[i]);
    outputs.push_back(std::move(results[i].tensor));
  }
  return {std::move(outputs), mean};
}

}  // namespace fastsn
