// What rescaling and its gradient share: scales, dtypes, and results that are written in the weight's arrangement.
#pragma once
#include "weights.h"

namespace fastsn {

constexpr int64_t kBlock = 4096;  // elements that are converted at a time

// Errors name the argument and the position in the list.
void check_scales(size_t count, at::TensorList scales, at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor);
void check_flat(const at::Tensor& x, int64_t size, at::ScalarType dtype, const char* name);
// Dtypes come as the numbers of c10::ScalarType.
std::vector<at::ScalarType> check_dtypes(size_t count, at::IntArrayRef dtypes);

double scale_of(size_t i, at::TensorList scales, at::IntArrayRef scale_index, at::ArrayRef<double> scale_factor);

// A piece of a weight.
struct Item {
  size_t weight;
  int64_t begin, end;  // rows
};

// All weights in pieces, in order; parallel: whether they are worth more than one thread.
std::vector<Item> items(const std::vector<Weight>& weights, bool* parallel);

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
  at::Tensor tensor;
  Rows rows;
  void finish(int64_t dim) const;
};

// Uninitialized, with the strides of `like` where it is dense. Brings the weight into an arrangement that both can have.
Result result(const at::Tensor& like, Weight& w, at::ScalarType dtype);

}  // namespace fastsn
