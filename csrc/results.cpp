#include "results.h"

#include <ATen/ops/empty_like.h>

#include <cmath>

namespace fastsn {

using at::Tensor;

double scale_of(size_t i, at::TensorList scales, at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor) {
  return scale_index[i] < 0 ? scale_factor[i] : scale_factor[i] * scales[scale_index[i]].item<double>();
}

void check_scales(size_t count, at::TensorList scales, at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor) {
  TORCH_CHECK_VALUE(scale_index.size() == count, "scale_index must have ", count, " entries, one per weight, got ",
                    scale_index.size());
  TORCH_CHECK_VALUE(scale_factor.size() == count, "scale_factor must have ", count, " entries, one per weight, got ",
                    scale_factor.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    TORCH_CHECK_VALUE(scales[i].numel() == 1, "scales[", i, "] must be one number, got shape ", scales[i].sizes());
    TORCH_CHECK_TYPE(at::isFloatingType(scales[i].scalar_type()), "scales[", i, "] must be floating point, got ",
                     scales[i].scalar_type());
    TORCH_CHECK_VALUE(scales[i].device().is_cpu(), "scales[", i, "] must be on cpu, got ", scales[i].device());
  }
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(scale_index[i] < static_cast<int64_t>(scales.size()), "scale_index[", i, "] must be less than ",
                      scales.size(), ", the number of scales, got ", scale_index[i]);
    TORCH_CHECK_VALUE(std::isfinite(scale_factor[i]), "scale_factor[", i, "] must be finite, got ", scale_factor[i]);
  }
}

void check_flat(const Tensor& x, int64_t size, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.numel() == size, name, " must have shape [", size, "], got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on cpu, got ", x.device());
}

std::vector<at::ScalarType> check_dtypes(size_t count, at::IntArrayRef dtypes) {
  TORCH_CHECK_VALUE(dtypes.size() == count, "dtypes must have ", count, " entries, one per weight, got ",
                    dtypes.size());
  std::vector<at::ScalarType> found;
  found.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto dtype = static_cast<at::ScalarType>(dtypes[i]);
    TORCH_CHECK_TYPE(static_cast<int64_t>(dtype) == dtypes[i] && has_kernels(dtype), "dtypes[", i, "] must be 5 (float16), 6 (float32), 7 (float64) or 15 (bfloat16), got ", dtypes[i]);
    found.push_back(dtype);
  }
  return found;
}

std::vector<Item> items(const std::vector<Weight>& weights, bool* parallel) {
  std::vector<Item> found;
  found.reserve(weights.size());
  int64_t elements = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = weights[i].arrangement.rows, each = rows_per_piece(rows, weights[i].n());
    for (int64_t row = 0; row < rows; row += each) found.push_back({i, row, std::min(rows, row + each)});
    elements += weights[i].numel();
  }
  *parallel = elements >= kSerial;
  return found;
}

void Result::finish(int64_t dim) const {
  if (!rows.tensor.is_same(tensor)) tensor.movedim(dim, 0).copy_(rows.tensor);
}

Result result(const Tensor& like, Weight& w, at::ScalarType dtype) {
  const Tensor tensor = fresh_like(like, dtype);
  int64_t stride = 0;
  if (arranged(tensor, w.dim, w.arrangement, &stride) && stride == w.n()) return {tensor, {tensor, stride}};
  w.rows = canonical(like, w.dim, &w.arrangement);
  return {tensor, {at::empty_like(w.rows.tensor, w.rows.tensor.options().dtype(dtype)), w.n()}};
}

}  // namespace fastsn
