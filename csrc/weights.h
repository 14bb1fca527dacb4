// What the ops share: how the weights of a call lie in memory, where their vectors lie, and how work is shared out.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <atomic>
#include <vector>

#include "kernels.h"

namespace fastsn {

// A weight as rows of one arrangement. Not turned: rows are output channels, B = I. Turned: rows are input channels,
// B = O, as in ConvTranspose; then u and v change places.
struct Arrangement {
  int64_t rows;
  Shape shape;
  bool turned;
};

// The tensor if its rows can be read where they lie, in this arrangement; stride is the distance of rows.
struct Rows {
  at::Tensor tensor;
  int64_t stride;
};

// One matrix's vectors, as offsets into the flat tensors of a call; -1: not in use.
struct View {
  int64_t u = -1, v = -1, sigma = -1, u_size = 0, v_size = 0;
  bool used() const { return u >= 0; }
};

struct Weight {
  Arrangement arrangement;
  Rows rows;
  View out, in;
  int64_t dim;
  // The rows' matrix (p, x) and the class matrix (q, z) of kernels.h.
  const View& p_view() const { return arrangement.turned ? in : out; }
  const View& q_view() const { return arrangement.turned ? out : in; }
  int64_t n() const { return arrangement.shape.n(); }
  int64_t numel() const { return arrangement.rows * n(); }
  double views() const { return out.used() + in.used(); }
};

// float32 for half-precision weights, otherwise their own.
at::ScalarType wide(at::ScalarType dtype);
// The dtypes of weights, results and gradients.
bool has_kernels(at::ScalarType dtype);
// The one that all weights of a list have in common; an error names the first that has another.
at::ScalarType sum_dtype(at::TensorList weights);

// Checks everything there is to check about a list of weights; copies those whose rows cannot be read in place.
// `name` is what the argument is called. sizes: what flat vectors and sigma need.
struct Sizes {
  int64_t vectors = 0, sigmas = 0;
};
std::vector<Weight> read_weights(at::TensorList weights, at::IntArrayRef dims, at::IntArrayRef view_masks,
                                 const char* name, Sizes* sizes);

// Whether the rows of another tensor of the same shape can be read in this arrangement, and at which distance.
bool arranged(const at::Tensor& tensor, int64_t dim, const Arrangement& a, int64_t* stride);
// (O, I, K) contiguous: the arrangement that every tensor can be copied to.
Rows canonical(const at::Tensor& tensor, int64_t dim, Arrangement* a);

// Calls f(i) for every i on all threads. Each i is worked on by one thread and writes to places of its own, so that
// results do not depend on how many there are.
template <class F>
void for_each(int64_t count, bool parallel, const F& f) {
  const int64_t threads = parallel ? std::min<int64_t>(at::get_num_threads(), count) : 1;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

constexpr int64_t kSerial = 32768;  // elements below which a second thread costs more than it brings

// Cuts a weight into pieces of whole blocks of rows. Depends on sizes alone, never on the number of threads.
inline int64_t rows_per_piece(int64_t rows, int64_t n) {
  constexpr int64_t kElements = 65536, kPieces = 16;
  const int64_t pieces = std::max<int64_t>(1, std::min(kPieces, rows * n / kElements));
  const int64_t each = (rows + pieces - 1) / pieces;
  return (each + kRows - 1) / kRows * kRows;
}

// Memory of a thread that is kept from call to call; grows, never shrinks. Aligned to a vector. Under AddressSanitizer
// nothing behind the n elements may be touched.
template <class A>
A* scratch(int64_t n, int slot);

// Hands out parts of such memory, each padded to whole vectors. Under AddressSanitizer a vector lies behind each that may
// not be touched, so that a loop that leaves its own part is found. Without memory it only counts.
template <class A>
class Parts {
 public:
  explicit Parts(A* memory = nullptr) : memory_(memory) {}

  static int64_t room(int64_t n) { return n == 0 ? 0 : padded<A>(n) + kGuard; }

  A* take(int64_t n) {
    A* const part = memory_ ? memory_ + size_ : nullptr;
    size_ += room(n);
#ifdef __SANITIZE_ADDRESS__
    if (part && n) __asan_poison_memory_region(part + padded<A>(n), kGuard * sizeof(A));
#endif
    return part;
  }

  int64_t size() const { return size_; }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kGuard = lanes<A>();
#else
  static constexpr int64_t kGuard = 0;
#endif
  A* memory_;
  int64_t size_ = 0;
};

// Elements as A, converted into `buffer` unless they are A already.
template <class A>
const A* widened(const at::Tensor& tensor, int64_t offset, int64_t n, A* buffer);
// Their place, if they are A already, otherwise `other`.
template <class A>
const A* placed(const at::Tensor& tensor, int64_t offset, const A* other) {
  if (tensor.scalar_type() != c10::CppTypeToScalarType<A>::value) return other;
  return static_cast<const A*>(tensor.const_data_ptr()) + offset;
}
// Where to write n elements of a tensor: the place itself, or `buffer`, which `narrowed` then writes there.
template <class A>
A* target(const at::Tensor& tensor, int64_t offset, A* buffer);
template <class A>
void narrowed(const at::Tensor& tensor, int64_t offset, int64_t n, const A* buffer);

// An uninitialized tensor like this one (strides kept where it is dense) in memory of storage.cpp.
at::Tensor fresh_like(const at::Tensor& tensor, at::ScalarType dtype);
// One of n elements. torch.empty takes as long as the kernels of a small layer.
at::Tensor fresh_flat(int64_t n, at::ScalarType dtype);

}  // namespace fastsn
