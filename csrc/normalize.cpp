// Both ops in one call from Python, for lists that are used again and again: to turn them into lists of C++, and sigma
// into a Python object, costs more than small weights do. The ops are called through the dispatcher, so that each
// device, its gradients and those who watch see what they would see otherwise. Not for graphs: it says nothing of u, v.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <vector>

#include "dispatch.h"
#include "ops.h"

namespace fastsn {

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// Weak references: Python's batch owns the tensors. References from C++ would hide cycles from the garbage collector.
class WeakTensors {
 public:
  explicit WeakTensors(at::TensorList tensors) {
    for (const Tensor& x : tensors) tensors_.emplace_back(x.getIntrusivePtr());
  }

  Tensors lock() const {
    Tensors found;
    found.reserve(tensors_.size());
    for (const auto& x : tensors_) {
      auto locked = x.lock();
      TORCH_CHECK(locked, "the tensors of a batch must live as long as the batch");
      found.emplace_back(std::move(locked));
    }
    return found;
  }

 private:
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl>> tensors_;
};

// The arguments of the ops, see fastsn/ops/schema.py.
struct Batch {
  WeakTensors weights, u, v, scales;
  std::vector<int64_t> dims, view_masks, v_first, scale_index, dtypes;
  std::vector<double> scale_factor;
};

// A batch goes to Python as a CPU tensor whose data is the Batch: to free the tensor frees the batch.
Tensor remember(at::TensorList weights, at::TensorList u, at::TensorList v, at::TensorList scales,
                at::IntArrayRef dims, at::IntArrayRef view_masks, at::IntArrayRef v_first, at::IntArrayRef scale_index,
                at::ArrayRef<double> scale_factor, at::IntArrayRef dtypes) {
  auto* const batch =
      new Batch{WeakTensors(weights), WeakTensors(u), WeakTensors(v),    WeakTensors(scales), dims.vec(),
                view_masks.vec(),     v_first.vec(),  scale_index.vec(), dtypes.vec(),        scale_factor.vec()};
  return at::from_blob(
      batch, {static_cast<int64_t>(sizeof(Batch))}, [](void* of) { delete static_cast<Batch*>(of); }, at::kByte);
}

// The W̄ after n iterations, whose vectors are stored if asked for, and the vectors. fastsn/normalize.py does the same.
std::tuple<Tensors, Tensor> normalize(const Tensor& batch, int64_t n, bool store) {
  static const auto iterate = find<decltype(power_iteration)>("fastsn::power_iteration");
  static const auto iterate_and_store = find<decltype(power_iteration)>("fastsn::power_iteration_");
  static const auto rescaled = find<decltype(rescale)>("fastsn::rescale");
  const auto* const b = static_cast<const Batch*>(batch.const_data_ptr());
  const Tensors weights = b->weights.lock();
  const auto& iterated = store ? iterate_and_store : iterate;
  const auto [sigma, vectors] =
      iterated.call(weights, b->u.lock(), b->v.lock(), b->dims, b->view_masks, b->v_first, n);
  Tensors scales = b->scales.lock();
  const auto requires_grad = [&, given = scales](size_t i) {
    const int64_t scale = b->scale_index[i];
    return weights[i].requires_grad() || (scale >= 0 && given[scale].requires_grad());
  };
  for (Tensor& scale : scales)
    if (at::GradMode::is_enabled() && !scale.requires_grad()) scale = scale.clone();
  auto [outputs, mean] = rescaled.call(weights, scales, sigma, vectors, b->dims, b->view_masks, b->scale_index,
                                       b->scale_factor, b->dtypes);
  for (size_t i = 0; i < outputs.size(); ++i)
    if (outputs[i].requires_grad() && !requires_grad(i)) outputs[i] = outputs[i].detach();
  return {std::move(outputs), vectors};
}

}  // namespace

}  // namespace fastsn

TORCH_LIBRARY_FRAGMENT(fastsn, m) {
  m.def(
      "_remember(Tensor[] weights, Tensor[] u, Tensor[] v, Tensor[] scales, int[] dims, int[] view_masks, "
      "int[] v_first, int[] scale_index, float[] scale_factor, int[] dtypes) -> Tensor",
      &fastsn::remember);
  m.def("_normalize(Tensor batch, int n, bool store) -> (Tensor[], Tensor)", &fastsn::normalize);
}
