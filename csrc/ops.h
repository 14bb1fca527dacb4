// The ops for CPU tensors, as register.cpp registers them; fastsn/ops/schema.py says what they take and give.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastsn {

std::tuple<at::Tensor, at::Tensor> power_iteration(at::TensorList weights, at::TensorList u, at::TensorList v,
                                                   at::IntArrayRef dims, at::IntArrayRef view_masks,
                                                   at::IntArrayRef v_first, int64_t n);

// Writes the vectors back into u and v.
std::tuple<at::Tensor, at::Tensor> power_iteration_(at::TensorList weights, at::TensorList u, at::TensorList v,
                                                    at::IntArrayRef dims, at::IntArrayRef view_masks,
                                                    at::IntArrayRef v_first, int64_t n);

std::tuple<std::vector<at::Tensor>, at::Tensor> rescale(at::TensorList weights, at::TensorList scales,
                                                        const at::Tensor& sigma, const at::Tensor& vectors,
                                                        at::IntArrayRef dims, at::IntArrayRef view_masks,
                                                        at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor,
                                                        at::IntArrayRef dtypes);

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> rescale_backward(
    at::TensorList gradients, const std::optional<at::Tensor>& g_sigma, at::TensorList bases, at::TensorList scales,
    const at::Tensor& sigma, const at::Tensor& vectors, at::IntArrayRef dims, at::IntArrayRef view_masks,
    at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor, at::IntArrayRef dtypes);

// Gives the memory of results that nobody holds any more back to the system; returns how many bytes.
int64_t release_memory();

}  // namespace fastsn
