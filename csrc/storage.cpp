// Memory of results. The pages of a large fresh block cost more than everything that is computed into them, so the
// memory of a result that nobody holds any more is kept for the next one. "Nobody" is what torch says: the block comes
// back through the deleter of its storage, that is when the last tensor, view, detached copy or saved tensor is gone.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/Allocator.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "weights.h"

namespace fastsn {

namespace {

constexpr size_t kLarge = size_t{1} << 20;  // what is smaller, malloc reuses by itself
constexpr size_t kHugePage = size_t{1} << 21;

struct Block {
  void* data;
  size_t size;
};

class Recycler final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    const size_t size = (n + kHugePage - 1) / kHugePage * kHugePage;
    Block* block = taken(size);
    if (block == nullptr) {
      void* const data = std::aligned_alloc(kHugePage, size);
      TORCH_CHECK(data != nullptr, "out of memory: ", size, " bytes for a normalised weight or its gradient");
#ifdef MADV_HUGEPAGE
      madvise(data, size, MADV_HUGEPAGE);  // advice: without it everything works, in smaller pages
#endif
      block = new Block{data, size};
    }
    return {block->data, block, &release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

  // Lives as long as the process: tensors may outlive every static object.
  static Recycler& instance() {
    static auto* const recycler = new Recycler;
    return *recycler;
  }

 private:
  Block* taken(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    live_ += size;
    peak_ = std::max(peak_, live_);
    for (auto i = idle_.rbegin(); i != idle_.rend(); ++i) {  // the latest is the likeliest to be in a cache
      if ((*i)->size != size) continue;
      Block* const block = *i;
      idle_.erase(std::next(i).base());
      idle_bytes_ -= size;
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
    self.idle_.push_back(block);
    self.idle_bytes_ += block->size;
    self.trim();
  }

  // Keeps at most as much as was ever in use at once; the oldest go first.
  void trim() {
    while (idle_bytes_ + live_ > peak_ && !idle_.empty()) {
      Block* const block = idle_.front();
      idle_bytes_ -= block->size;
      idle_.erase(idle_.begin());
      std::free(block->data);
      delete block;
    }
  }

  std::mutex mutex_;
  std::vector<Block*> idle_;
  size_t idle_bytes_ = 0, live_ = 0, peak_ = 0;
};

}  // namespace

at::Tensor fresh_like(const at::Tensor& tensor, at::ScalarType dtype) {
  const auto strides = tensor.is_non_overlapping_and_dense()
                           ? tensor.strides().vec()
                           : at::infer_dense_strides(tensor.sizes(), tensor.strides());
  const size_t bytes = static_cast<size_t>(tensor.numel()) * c10::elementSize(dtype);
  c10::Allocator* const allocator = bytes >= kLarge ? &Recycler::instance() : c10::GetAllocator(c10::kCPU);
  return at::detail::empty_strided_generic(tensor.sizes(), strides, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                           dtype);
}

}  // namespace fastsn
