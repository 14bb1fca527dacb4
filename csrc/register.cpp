// Registration only: the kernels for CPU tensors, and rescale's rule of differentiation in C++, because one that is
// written in Python costs ten times as long as the kernels of a small layer; it serves the Triton kernels too. Schemas,
// fakes and the rules for other devices and for the second order are in fastsn/ops/.
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "dispatch.h"
#include "kernels.h"
#include "ops.h"

namespace fastsn {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Ints = std::vector<int64_t>;

auto call_rescale(at::TensorList weights, at::TensorList scales, const Tensor& sigma, const Tensor& vectors,
                  at::IntArrayRef dims, at::IntArrayRef view_masks, at::IntArrayRef scale_index,
                  at::ArrayRef<double> scale_factor, at::IntArrayRef dtypes) {
  static const auto op = find<decltype(rescale)>("fastsn::rescale");
  return op.call(weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes);
}

// The plain numbers of a call, one entry per weight. Those of all lists of integers lie end to end: every list that
// autograd keeps costs as much as a small weight's kernel.
struct Numbers {
  Ints lists;
  std::vector<double> scale_factor;

  at::IntArrayRef dims() const { return list(0); }
  at::IntArrayRef view_masks() const { return list(1); }
  at::IntArrayRef scale_index() const { return list(2); }
  at::IntArrayRef dtypes() const { return list(3); }

  // Of the given weights only.
  Numbers at(const Ints& places) const {
    Numbers found;
    for (size_t which = 0; which < kLists; ++which)
      for (const int64_t i : places) found.lists.push_back(list(which)[i]);
    for (const int64_t i : places) found.scale_factor.push_back(scale_factor[i]);
    return found;
  }

 private:
  static constexpr size_t kLists = 4;
  at::IntArrayRef list(size_t which) const {
    return at::IntArrayRef(lists).slice(which * scale_factor.size(), scale_factor.size());
  }
};

// How many entries of the flat vectors belong to a weight: O + I·K for the view `out`, O·K + I for `in`.
c10::SymInt vector_size(const Tensor& weight, int64_t dim, int64_t view_mask) {
  const c10::SymInt o = weight.sym_size(dim), i = weight.sym_size(dim == 0 ? 1 : 0), n = weight.sym_numel();
  return ((view_mask & 1) ? o + n / o : c10::SymInt(0)) + ((view_mask & 2) ? n / i + i : c10::SymInt(0));
}

struct Rescale : torch::autograd::Function<Rescale> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights, at::TensorList scales, const Tensor& sigma,
                               const Tensor& vectors, at::IntArrayRef dims, at::IntArrayRef view_masks,
                               at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor,
                               at::IntArrayRef dtypes) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [outputs, mean] =
        call_rescale(weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes);
    ctx->set_materialize_grads(false);
    // W̄ is what the gradient needs, so that the weight may change before it is asked for. Only the gradient of a scale
    // needs the weight itself, because the scale may be 0.
    variable_list saved;
    Ints lists;
    saved.reserve(weights.size() + scales.size() + 2);
    lists.reserve(4 * weights.size());
    for (const at::IntArrayRef list : {dims, view_masks, scale_index}) lists.insert(lists.end(), list.begin(), list.end());
    for (size_t i = 0; i < weights.size(); ++i) {
      lists.push_back(static_cast<int64_t>(weights[i].scalar_type()));
      saved.push_back(scale_index[i] < 0 ? outputs[i] : weights[i]);
    }
    saved.insert(saved.end(), scales.begin(), scales.end());
    saved.push_back(mean);
    saved.push_back(vectors);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["lists"] = std::move(lists);
    ctx->saved_data["scale_factor"] = scale_factor.vec();
    outputs.push_back(std::move(mean));
    return std::move(outputs);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = saved_variables(*ctx);
    const Numbers all{ctx->saved_data["lists"].toIntVector(), ctx->saved_data["scale_factor"].toDoubleVector()};
    const size_t count = all.scale_factor.size(), scale_count = saved.size() - count - 2;
    const Tensor &sigma = saved[saved.size() - 2], &vectors = saved.back(), &g_sigma = grads[count];

    // One entry per tensor of forward's arguments and per other argument. A weight that was not used gets no gradient,
    // rather than one of zeros.
    variable_list result(count + scale_count + 7), g, bases;
    Ints used;
    for (variable_list* list : {&g, &bases}) list->reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t scale = all.scale_index()[i];
      const bool asked = ctx->needs_input_grad(i) || (scale >= 0 && ctx->needs_input_grad(count + scale));
      if (!asked || !(grads[i].defined() || g_sigma.defined())) continue;
      used.push_back(static_cast<int64_t>(i));
      bases.push_back(saved[i]);
      g.push_back(grads[i].defined() ? grads[i] : at::zeros_like(saved[i]));
    }
    if (used.empty()) return result;
    const at::TensorList scales = at::TensorList(saved).slice(count, scale_count);
    const bool whole = used.size() == count;
    std::optional<Tensor> own_g_sigma;
    if (g_sigma.defined()) own_g_sigma = whole ? g_sigma : some(g_sigma, used);
    const auto [d_weights, d_scales] =
        whole ? call(g, own_g_sigma, bases, scales, sigma, vectors, all)
              : call(g, own_g_sigma, bases, scales, some(sigma, used), some_vectors(vectors, saved, all, used),
                     all.at(used));
    for (size_t i = 0; i < used.size(); ++i)
      if (ctx->needs_input_grad(used[i])) result[used[i]] = d_weights[i];
    for (size_t i = 0; i < scale_count; ++i)
      if (ctx->needs_input_grad(count + i)) result[count + i] = d_scales[i];
    return result;
  }

 private:
  // torch's own error for a graph that has been freed knows nothing of steps. ops/autograd.py says the same.
  static variable_list saved_variables(const AutogradContext& ctx) {
    try {
      return ctx.get_saved_variables();
    } catch (const c10::Error& error) {
      if (std::strstr(error.what_without_backtrace(), "second time") == nullptr) throw;
    }
    TORCH_CHECK(false,
                "backward has come to weights of fastsn a second time, and the first has freed their graph. All uses in "
                "a fastsn.step share one: call one backward for the sum of the losses, or leave the step out "
                "(fastsn.fuse(model) needs none), or give all backward calls but the last one retain_graph=True");
  }

  // To be differentiated again, it goes the way of fastsn/ops/; otherwise straight to the kernel.
  static std::tuple<variable_list, variable_list> call(const variable_list& g,
                                                       const std::optional<Tensor>& g_sigma,
                                                       const variable_list& bases, at::TensorList scales,
                                                       const Tensor& sigma, const Tensor& vectors, const Numbers& n) {
    static const auto op = find<decltype(rescale_backward)>("fastsn::rescale_backward");
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    return op.call(g, g_sigma, bases, scales, sigma, vectors, n.dims(), n.view_masks(), n.scale_index(),
                   n.scale_factor, n.dtypes());
  }

  static Tensor some(const Tensor& x, const Ints& places) {
    variable_list parts;
    for (const int64_t i : places) parts.push_back(x.narrow(0, i, 1));
    return at::cat(parts);
  }

  static Tensor some_vectors(const Tensor& vectors, const variable_list& weights, const Numbers& all,
                             const Ints& places) {
    variable_list parts;
    c10::SymInt offset = 0;
    size_t next = 0;
    for (size_t i = 0; i < all.scale_factor.size(); ++i) {
      const c10::SymInt size = vector_size(weights[i], all.dims()[i], all.view_masks()[i]);
      if (next < places.size() && places[next] == static_cast<int64_t>(i)) {
        parts.push_back(vectors.narrow_symint(0, offset, size));
        ++next;
      }
      offset += size;
    }
    return at::cat(parts);
  }
};

bool requires_grad(at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& x) { return x.requires_grad(); });
}

std::tuple<variable_list, Tensor> rescale_autograd(at::TensorList weights, at::TensorList scales, const Tensor& sigma,
                                                   const Tensor& vectors, at::IntArrayRef dims,
                                                   at::IntArrayRef view_masks, at::IntArrayRef scale_index,
                                                   at::ArrayRef<double> scale_factor, at::IntArrayRef dtypes) {
  for (const Tensor& w : weights)
    TORCH_CHECK_NOT_IMPLEMENTED(!w._fw_grad(0).defined(), "fastsn::rescale has no forward-mode derivative");
  if (!at::GradMode::is_enabled() || !(requires_grad(weights) || requires_grad(scales))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_rescale(weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes);
  }
  variable_list outputs =
      Rescale::apply(weights, scales, sigma, vectors, dims, view_masks, scale_index, scale_factor, dtypes);
  Tensor mean = std::move(outputs.back());
  outputs.pop_back();
  return {std::move(outputs), std::move(mean)};
}

}  // namespace
}  // namespace fastsn

TORCH_LIBRARY_FRAGMENT(fastsn, m) {
  m.def("_instruction_set() -> str", [] { return std::string(fastsn::instruction_set()); });
  m.def("_release_memory() -> int", &fastsn::release_memory);
}

TORCH_LIBRARY_IMPL(fastsn, CPU, m) {
  m.impl("power_iteration", &fastsn::power_iteration);
  m.impl("power_iteration_", &fastsn::power_iteration_);
  m.impl("rescale", &fastsn::rescale);
  m.impl("rescale_backward", &fastsn::rescale_backward);
}

TORCH_LIBRARY_IMPL(fastsn, AutogradCPU, m) { m.impl("rescale", &fastsn::rescale_autograd); }
TORCH_LIBRARY_IMPL(fastsn, AutogradCUDA, m) { m.impl("rescale", &fastsn::rescale_autograd); }
