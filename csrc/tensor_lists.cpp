// What the Triton kernels ask of whole lists of tensors at every call, as fastsn/tensor_lists.py does in Python, where it
// takes longer than everything else that a call costs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <mutex>
#include <unordered_map>
#include <vector>

#include "ops.h"

namespace fastsn {

namespace {

using Words = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Words& words) const {
    uint64_t hash = words.size();
    for (const int64_t word : words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

// The same number for the same words, as long as they are remembered, and never a number for other words.
class Numbers {
 public:
  int64_t of(const Words& words) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = known_.find(words);
    if (found != known_.end()) return found->second;
    if (known_.size() >= kKnown) known_.clear();
    known_.emplace(words, ++last_);
    return last_;
  }

 private:
  static constexpr size_t kKnown = 1024;
  std::mutex mutex_;
  std::unordered_map<Words, int64_t, Hash> known_;
  int64_t last_ = 0;
};

Numbers layouts, places;

}  // namespace

std::tuple<int64_t, int64_t> identify(at::TensorList tensors) {
  thread_local Words layout, place;
  layout.clear();
  place.clear();
  for (const at::Tensor& x : tensors) {
    const auto address = reinterpret_cast<int64_t>(x.data_ptr());
    const at::Device device = x.device();
    layout.insert(layout.end(), {x.dim(), static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(device.type()),
                                 device.index(), address & 15, x.is_inference()});
    layout.insert(layout.end(), x.sizes().begin(), x.sizes().end());
    layout.insert(layout.end(), x.strides().begin(), x.strides().end());
    place.push_back(address);
  }
  return {layouts.of(layout), places.of(place)};
}

std::tuple<std::vector<at::Tensor>, int64_t> allocate(at::TensorList like, at::IntArrayRef dtypes) {
  thread_local Words place;
  place.clear();
  std::vector<at::Tensor> results;
  results.reserve(like.size());
  for (size_t i = 0; i < like.size(); ++i) {
    results.push_back(at::empty_like(like[i], like[i].options().dtype(static_cast<at::ScalarType>(dtypes[i]))));
    place.push_back(reinterpret_cast<int64_t>(results[i].data_ptr()));
  }
  return {std::move(results), places.of(place)};
}

}  // namespace fastsn
