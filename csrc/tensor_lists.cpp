// What the Triton kernels ask of the arguments of every call, as fastsn/tensor_lists.py does in Python, where it
// takes longer than everything else that a call costs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <cstring>
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

Numbers kinds, places;

int64_t address_of(const at::Tensor& x) { return reinterpret_cast<int64_t>(x.const_data_ptr()); }

// How many words follow is in the first, so that different values never give the same ones.
void describe(const c10::IValue& value, Words& words) {
  if (value.isTensor()) {
    const at::Tensor& x = value.toTensor();
    const at::Device device = x.device();
    const int64_t look[] = {x.dim(), static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(device.type()),
                            static_cast<uint8_t>(device.index()), x.is_inference()};
    int64_t word = 0;
    for (const int64_t part : look) word = word << 8 | part;
    words.push_back(word);
    words.insert(words.end(), x.sizes().begin(), x.sizes().end());
    words.insert(words.end(), x.strides().begin(), x.strides().end());
    words.push_back(address_of(x) & 15);
  } else if (value.isDouble()) {
    const double number = value.toDouble();
    int64_t word;
    std::memcpy(&word, &number, sizeof(word));
    words.push_back(word);
  } else {
    words.push_back(value.isNone() ? -1 : value.toInt());
  }
}

}  // namespace

void identify(const c10::OperatorHandle& op, c10::Stack* stack) {
  thread_local Words kind, place;
  kind.clear();
  place.clear();
  const size_t count = op.schema().arguments().size();
  for (const c10::IValue& argument : torch::jit::last(*stack, count)) {
    if (!argument.isList()) {
      describe(argument, kind);
      continue;
    }
    const c10::ArrayRef<c10::IValue> list = argument.toListRef();
    kind.push_back(static_cast<int64_t>(list.size()));
    for (const c10::IValue& value : list) {
      describe(value, kind);
      if (value.isTensor()) place.push_back(address_of(value.toTensor()));
    }
  }
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, kinds.of(kind), places.of(place));
}

std::tuple<std::vector<at::Tensor>, int64_t> allocate(at::TensorList like, at::IntArrayRef dtypes) {
  thread_local Words place;
  place.clear();
  std::vector<at::Tensor> results;
  results.reserve(like.size());
  for (size_t i = 0; i < like.size(); ++i) {
    const at::Tensor& x = like[i];
    const auto options = at::TensorOptions(static_cast<at::ScalarType>(dtypes[i])).device(x.device());
    results.push_back(x.is_non_overlapping_and_dense() ? at::empty_strided(x.sizes(), x.strides(), options)
                                                       : at::empty_like(x, options));
    place.push_back(address_of(results[i]));
  }
  return {std::move(results), places.of(place)};
}

}  // namespace fastsn
