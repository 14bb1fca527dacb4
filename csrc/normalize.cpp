// Both ops in one call from Python, which costs half as much as two where weights are small: lists are turned into
// those of C++ once, and sigma into no Python object. The ops themselves are called through the dispatcher, so that
// each device, its gradients and those who watch see what they would see otherwise. Not for graphs: it says nothing of
// u and v, which it may write to.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops.h"

namespace fastsn {

namespace {

using at::Tensor;

template <class Op>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

std::tuple<std::vector<Tensor>, Tensor> normalize(at::TensorList weights, at::TensorList u, at::TensorList v,
                                                  at::TensorList scales, at::IntArrayRef dims,
                                                  at::IntArrayRef view_masks, at::IntArrayRef v_first, int64_t n,
                                                  bool store, at::IntArrayRef scale_index,
                                                  at::ArrayRef<double> scale_factor, at::IntArrayRef dtypes) {
  static const auto iterate = find<decltype(power_iteration)>("fastsn::power_iteration");
  static const auto iterate_and_store = find<decltype(power_iteration)>("fastsn::power_iteration_");
  static const auto rescaled = find<decltype(rescale)>("fastsn::rescale");
  const auto& iterated = store ? iterate_and_store : iterate;
  const auto [sigma, vectors] = iterated.call(weights, u, v, dims, view_masks, v_first, n);
  auto [outputs, mean] =
      rescaled.call(weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes);
  return {std::move(outputs), vectors};
}

}  // namespace

}  // namespace fastsn

TORCH_LIBRARY_FRAGMENT(fastsn, m) {
  m.def(
      "_normalize(Tensor[] weights, Tensor[] u, Tensor[] v, Tensor[] scales, int[] dims, int[] view_masks, "
      "int[] v_first, int n, bool store, int[] scale_index, float[] scale_factor, int[] dtypes) -> (Tensor[], Tensor)");
}

TORCH_LIBRARY_IMPL(fastsn, CompositeImplicitAutograd, m) { m.impl("_normalize", &fastsn::normalize); }
