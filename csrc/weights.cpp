#include "weights.h"

#include <cstdlib>
#include <memory>

namespace fastsn {

using at::Tensor;

at::ScalarType wide(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

at::ScalarType sum_dtype(at::TensorList weights) {
  const at::ScalarType first = wide(weights[0].scalar_type());
  for (size_t i = 0; i < weights.size(); ++i)
    TORCH_CHECK_TYPE(wide(weights[i].scalar_type()) == first, "weights[", i, "] must have sums in ", first,
                     " as weights[0], got ", weights[i].scalar_type());
  return first;
}

namespace {

// The strides of (O, I, K), if the positions can be flattened; strides of size 1 count as whatever is asked for.
struct Strides {
  int64_t o, i, k, so, si, sk;
  bool flat;
};

Strides oik(const Tensor& t, int64_t dim) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t second = dim == 0 ? 1 : 0;
  Strides s{sizes[dim], sizes[second], 1, strides[dim], strides[second], 1, true};
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (d == dim || d == second || sizes[d] == 1) continue;
    if (s.k == 1)
      s.sk = strides[d];
    else
      s.flat = s.flat && strides[d] == s.sk * s.k;
    s.k *= sizes[d];
  }
  return s;
}

bool fits(const Strides& s, bool turned, bool kb) {
  const int64_t b = turned ? s.o : s.i, sb = turned ? s.so : s.si;
  const bool b_ok = b == 1 || sb == (kb ? 1 : s.k);
  const bool k_ok = s.k == 1 || s.sk == (kb ? b : 1);
  return s.flat && b_ok && k_ok;
}

Arrangement arrangement(const Strides& s, bool turned, bool kb) {
  return {turned ? s.i : s.o, {turned ? s.o : s.i, s.k, kb}, turned};
}

View place(int64_t u_size, int64_t v_size, Sizes* sizes) {
  View view{sizes->vectors, sizes->vectors + u_size, sizes->sigmas, u_size, v_size};
  sizes->vectors += u_size + v_size;
  sizes->sigmas += 1;
  return view;
}

void check(const Tensor& w, int64_t dim, int64_t view_mask, const Tensor& first, const char* name, size_t at) {
  TORCH_CHECK_TYPE(w.layout() == at::kStrided, name, "[", at, "] must be dense, got layout ", w.layout());
  const auto dtype = w.scalar_type();
  TORCH_CHECK_TYPE(has_kernels(dtype), name, "[", at, "] must be float32, float64, float16 or bfloat16, got ", dtype);
  TORCH_CHECK_VALUE(w.dim() >= 2, name, "[", at, "] must have at least 2 dimensions, got shape ", w.sizes());
  TORCH_CHECK_VALUE(w.numel() > 0, name, "[", at, "] must have at least one element, got shape ", w.sizes());
  TORCH_CHECK_VALUE(w.device() == first.device(), name, "[", at, "] must be on the device of ", name, "[0], ",
                    first.device(), ", got ", w.device());
  TORCH_CHECK_INDEX(0 <= dim && dim < w.dim(), "dims[", at, "] must be in [0, ", w.dim() - 1, "], got ", dim);
  TORCH_CHECK_VALUE(1 <= view_mask && view_mask <= 3, "view_masks[", at, "] must be 1 (out), 2 (in) or 3 (both), got ",
                    view_mask);
}

}  // namespace

bool arranged(const Tensor& tensor, int64_t dim, const Arrangement& a, int64_t* stride) {
  const Strides s = oik(tensor, dim);
  *stride = a.turned ? s.si : s.so;
  return fits(s, a.turned, a.shape.kb);
}

Rows canonical(const Tensor& tensor, int64_t dim, Arrangement* a) {
  const Tensor copy = tensor.movedim(dim, 0).contiguous();
  const Strides s = oik(copy, 0);
  *a = arrangement(s, false, false);
  return {copy, s.i * s.k};
}

std::vector<Weight> read_weights(at::TensorList weights, at::IntArrayRef dims, at::IntArrayRef view_masks,
                                 const char* name, Sizes* sizes) {
  TORCH_CHECK_VALUE(!weights.empty(), name, " must have at least one entry, got none");
  TORCH_CHECK_VALUE(dims.size() == weights.size(), "dims must have ", weights.size(), " entries, one per entry of ",
                    name, ", got ", dims.size());
  TORCH_CHECK_VALUE(view_masks.size() == weights.size(), "view_masks must have ", weights.size(),
                    " entries, one per entry of ", name, ", got ", view_masks.size());
  std::vector<Weight> found;
  found.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check(w, dims[i], view_masks[i], weights[0], name, i);
    Weight weight;
    weight.dim = dims[i];
    const Strides s = oik(w, dims[i]);
    bool done = false;
    for (const bool turned : {false, true}) {
      for (const bool kb : {false, true}) {
        if (done || !fits(s, turned, kb)) continue;
        weight.arrangement = arrangement(s, turned, kb);
        weight.rows = {w, turned ? s.si : s.so};
        done = true;
      }
    }
    if (!done) weight.rows = canonical(w, dims[i], &weight.arrangement);
    if (view_masks[i] & 1) weight.out = place(s.o, s.i * s.k, sizes);
    if (view_masks[i] & 2) weight.in = place(s.o * s.k, s.i, sizes);
    found.push_back(std::move(weight));
  }
  return found;
}

template <class A>
A* scratch(int64_t n, int slot) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local struct {
    std::unique_ptr<void, Free> memory;
    size_t size = 0;
  } kept[4];
  const size_t bytes = (static_cast<size_t>(n) * sizeof(A) + 4095) / 4096 * 4096;
#ifdef __SANITIZE_ADDRESS__
  if (kept[slot].memory) __asan_unpoison_memory_region(kept[slot].memory.get(), kept[slot].size);
#endif
  if (kept[slot].size < bytes) {
    kept[slot].memory.reset();
    kept[slot].memory.reset(std::aligned_alloc(4096, bytes));
    kept[slot].size = kept[slot].memory ? bytes : 0;
    TORCH_CHECK(kept[slot].memory, "out of memory: ", bytes, " bytes of scratch");
  }
#ifdef __SANITIZE_ADDRESS__
  const size_t used = static_cast<size_t>(n) * sizeof(A);
  __asan_poison_memory_region(static_cast<char*>(kept[slot].memory.get()) + used, kept[slot].size - used);
#endif
  return static_cast<A*>(kept[slot].memory.get());
}

template <class A>
const A* widened(const Tensor& tensor, int64_t offset, int64_t n, A* buffer) {
  const char* data = static_cast<const char*>(tensor.const_data_ptr()) + offset * tensor.element_size();
  switch (tensor.scalar_type()) {
    case at::kHalf:
      kernels<A>().widen_half(reinterpret_cast<const uint16_t*>(data), buffer, n);
      return buffer;
    case at::kBFloat16:
      kernels<A>().widen_bfloat(reinterpret_cast<const uint16_t*>(data), buffer, n);
      return buffer;
    default:
      if (tensor.scalar_type() == c10::CppTypeToScalarType<A>::value) return reinterpret_cast<const A*>(data);
      if (tensor.scalar_type() == at::kFloat)
        std::copy_n(reinterpret_cast<const float*>(data), n, buffer);
      else
        std::copy_n(reinterpret_cast<const double*>(data), n, buffer);
      return buffer;
  }
}

template <class A>
A* target(const Tensor& tensor, int64_t offset, A* buffer) {
  if (tensor.scalar_type() != c10::CppTypeToScalarType<A>::value) return buffer;
  return static_cast<A*>(tensor.mutable_data_ptr()) + offset;
}

template <class A>
void narrowed(const Tensor& tensor, int64_t offset, int64_t n, const A* buffer) {
  char* data = static_cast<char*>(tensor.mutable_data_ptr()) + offset * tensor.element_size();
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return kernels<A>().narrow_half(buffer, reinterpret_cast<uint16_t*>(data), n);
    case at::kBFloat16:
      return kernels<A>().narrow_bfloat(buffer, reinterpret_cast<uint16_t*>(data), n);
    default:
      if (tensor.scalar_type() == c10::CppTypeToScalarType<A>::value) return;  // `target` was the place itself
      if (tensor.scalar_type() == at::kFloat)
        std::copy_n(buffer, n, reinterpret_cast<float*>(data));
      else
        std::copy_n(buffer, n, reinterpret_cast<double*>(data));
  }
}

#define FASTSN_INSTANTIATE(A)                                             \
  template A* scratch<A>(int64_t, int);                                   \
  template const A* widened<A>(const Tensor&, int64_t, int64_t, A*);      \
  template A* target<A>(const Tensor&, int64_t, A*);                      \
  template void narrowed<A>(const Tensor&, int64_t, int64_t, const A*);
FASTSN_INSTANTIATE(float)
FASTSN_INSTANTIATE(double)

}  // namespace fastsn
