// The ops for CPU tensors, as register.cpp registers them; fastsn/ops/schema.py says what they take and give.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

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

// For the Triton kernels. For arguments of any op: what its tensors look like (shapes, strides, dtypes, devices, whether
// they were made in inference mode, alignment to 16 bytes of those in lists) and its numbers; and where the tensors of
// its lists lie: two numbers, the same for the same and never for anything else, among calls of one op.
void identify(const c10::OperatorHandle& op, c10::Stack* stack);

// torch.empty_like of every tensor, in these dtypes, and the number of where they lie.
std::tuple<std::vector<at::Tensor>, int64_t> allocate(at::TensorList like, at::IntArrayRef dtypes);

}  // namespace fastsn
