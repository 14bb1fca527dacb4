// Memory of results. The pages of a large fresh block cost more than everything that is computed into them, so the
// memory of a result that nobody holds any more is kept for the next one. "Nobody" is what torch says: the block comes
// back through the deleter of its storage, that is when the last tensor, view, detached copy or saved tensor is gone.
// Kept is at most as much as was in use at once, and nothing that many later results have not needed.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/Allocator.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "ops.h"
#include "weights.h"

namespace fastsn {

namespace {

constexpr size_t kLarge = size_t{1} << 20;  // what is smaller, malloc reuses by itself
constexpr size_t kHugePage = size_t{1} << 21;
constexpr uint64_t kPatience = 512;  // large results after which an idle block is given back: 4 steps of 64 layers

struct Block {
  void* data;
  size_t size;
  uint64_t idle_since = 0;  // how many large results had been made
};

class Recycler final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const size_t size = (n + kHugePage - 1) / kHugePage * kHugePage;
    Block* block = taken(size);
    if (block == nullptr) {
      void* const data = std::aligned_alloc(kHugePage, size);
      TORCH_CHECK(data != nullptr, "out of memory: ", size, " bytes for a normalized weight or its gradient");
#ifdef MADV_HUGEPAGE
      madvise(data, size, MADV_HUGEPAGE);  // advice: without it everything works, in smaller pages
#endif
      block = new Block{data, size, 0};
    }
    return {block->data, block, &release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

  // Gives all idle memory back to the system; returns how much.
  size_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = idle_bytes_;
    while (!idle_.empty()) free_oldest();
    peak_ = live_;
    return bytes;
  }

  // Lives as long as the process: tensors may outlive every static object.
  static Recycler& instance() {
    static auto* const recycler = new Recycler;
    return *recycler;
  }

 private:
  Block* taken(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++results_;
    live_ += size;
    peak_ = std::max(peak_, live_);
    for (auto i = idle_.rbegin(); i != idle_.rend(); ++i) {  // the latest is the likeliest to be in a cache
      if ((*i)->size != size) continue;
      Block* const block = *i;
      idle_.erase(std::next(i).base());
      idle_bytes_ -= size;
      trim();
      return block;
    }
    trim();
    return nullptr;
  }

  static void release(void* context) {
    Recycler& self = instance();
    const std::lock_guard<std::mutex> lock(self.mutex_);
    auto* const block = static_cast<Block*>(context);
    self.live_ -= block->size;
    block->idle_since = self.results_;
    self.idle_.push_back(block);
    self.idle_bytes_ += block->size;
    self.trim();
  }

  void trim() {
    while (idle_bytes_ + live_ > peak_ && !idle_.empty()) free_oldest();
    while (!idle_.empty() && results_ - idle_.front()->idle_since > kPatience) {
      peak_ -= idle_.front()->size;  // what was in use at once lately
      free_oldest();
    }
  }

  void free_oldest() {
    Block* const block = idle_.front();
    idle_bytes_ -= block->size;
    idle_.erase(idle_.begin());
    std::free(block->data);
    delete block;
  }

  std::mutex mutex_;
  std::vector<Block*> idle_;
  size_t idle_bytes_ = 0, live_ = 0, peak_ = 0;
  uint64_t results_ = 0;
};

}  // namespace

int64_t release_memory() {
  return static_cast<int64_t>(Recycler::instance().clear());
}

at::Tensor fresh_like(const at::Tensor& tensor, at::ScalarType dtype) {
  const auto strides = tensor.is_non_overlapping_and_dense()
                           ? tensor.strides().vec()
                           : at::infer_dense_strides(tensor.sizes(), tensor.strides());
  const size_t bytes = static_cast<size_t>(tensor.numel()) * c10::elementSize(dtype);
  c10::Allocator* const allocator = bytes >= kLarge ? &Recycler::instance() : c10::GetAllocator(c10::kCPU);
  return at::detail::empty_strided_generic(tensor.sizes(), strides, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                           dtype);
}

at::Tensor fresh_flat(int64_t n, at::ScalarType dtype) {
  return at::detail::empty_cpu({n}, dtype);
}

}  // namespace fastsn
