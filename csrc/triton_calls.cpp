// The ops for tensors of a GPU, as far as the Triton kernels leave it to C++: to turn the lists of a call into those of
// Python, and its results back, takes longer than all that Python does with them. A call like one that was prepared
// before, with tensors where there were tensors before, goes to Python as three numbers (fastsn/ops/cuda.py).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "dispatch.h"

namespace fastsn {

namespace {

using at::Tensor;
using c10::IValue;
using c10::Stack;
using Tensors = std::vector<Tensor>;
using Words = std::vector<int64_t>;

enum Op { kIteration, kStoredIteration, kRescale, kRescaleBackward };
constexpr const char* kNames[] = {"power_iteration", "power_iteration_", "rescale", "rescale_backward"};

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

// The same number for the same words, as long as they are remembered, and never a number for other words. A number can
// be marked.
class Numbers {
 public:
  int64_t of(const Words& words) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = known_.find(words);
    if (found != known_.end()) return found->second;
    words_ += words.size() + kEntry;
    if (words_ > kWords) {
      known_.clear();
      marked_.clear();
      words_ = words.size() + kEntry;
    }
    known_.emplace(words, ++last_);
    return last_;
  }

  void mark(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    marked_.insert(number);
  }

  bool is_marked(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    return marked_.count(number) != 0;
  }

 private:
  // What is remembered takes 1 MiB at most: 50 calls for 100 weights, or the calls of thousands of single layers.
  // More does not stay in the processor's cache.
  static constexpr size_t kWords = 1 << 17, kEntry = 16;
  size_t words_ = 0;
  std::mutex mutex_;
  std::unordered_map<Words, int64_t, Hash> known_;
  std::unordered_set<int64_t> marked_;
  int64_t last_ = 0;
};

Numbers kinds, places;  // marked kinds: those that Python has prepared and can do again

// Where the kernels will find it: this copies a lazy clone, which lies where its original does until it is written to.
int64_t address_of(const Tensor& x) { return reinterpret_cast<int64_t>(x.mutable_data_ptr()); }

// How many words follow is in the first, so that different values never give the same ones.
void describe(const IValue& value, Words& words) {
  if (value.isTensor()) {
    const Tensor& x = value.toTensor();
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

// What the tensors of a call look like (shapes, strides, dtypes, devices, whether they were made in inference mode,
// alignment to 16 bytes), with its numbers; and where the tensors of its lists lie.
struct Keys {
  int64_t kind, place;
};

Keys keys_of(Op op, at::ArrayRef<IValue> arguments) {
  thread_local Words kind, place;
  kind.assign(1, op);
  place.clear();
  for (const IValue& argument : arguments) {
    if (!argument.isList()) {
      describe(argument, kind);
      continue;
    }
    const c10::ArrayRef<IValue> list = argument.toListRef();
    kind.push_back(static_cast<int64_t>(list.size()));
    for (const IValue& value : list) {
      describe(value, kind);
      if (value.isTensor()) place.push_back(address_of(value.toTensor()));
    }
  }
  return {kinds.of(kind), places.of(place)};
}

size_t count_of(const c10::OperatorHandle& op) { return op.schema().arguments().size(); }

template <Op kOp>
void identify(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = count_of(op);
  const Keys found = keys_of(kOp, torch::jit::last(*stack, count));
  torch::jit::drop(*stack, count);
  torch::jit::push(*stack, found.kind, found.place);
}

// torch.empty_like of every tensor, in these dtypes, and the number of where they lie.
std::tuple<Tensors, int64_t> allocate(at::TensorList like, at::IntArrayRef dtypes) {
  thread_local Words place;
  place.clear();
  Tensors results;
  results.reserve(like.size());
  for (size_t i = 0; i < like.size(); ++i) {
    const Tensor& x = like[i];
    const auto options = at::TensorOptions(static_cast<at::ScalarType>(dtypes[i])).device(x.device());
    results.push_back(x.is_non_overlapping_and_dense() ? at::empty_strided(x.sizes(), x.strides(), options)
                                                       : at::empty_like(x, options));
    place.push_back(address_of(results[i]));
  }
  return {std::move(results), places.of(place)};
}

// A call that Python has prepared, with what it is given of it: results that lie at ``place``, and tensors.
struct Launch {
  Keys keys;
  at::ArrayRef<IValue> arguments;
  Tensors results;
  int64_t place;
  IValue sigma, vectors, grad_sigma;

  // What the op gives beside the results. Python is told where all tensors lie if it does not know these places.
  std::optional<Tensors> run() const {
    std::optional<Tensors> found = ask(IValue());
    return found ? found : ask(addresses());
  }

 private:
  std::optional<Tensors> ask(IValue addresses) const {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastsn::_launch", "");
    Stack stack;
    torch::jit::push(stack, keys.kind, keys.place, place, std::move(addresses), sigma, vectors, grad_sigma);
    op.callBoxed(&stack);
    if (stack.back().isNone()) return std::nullopt;
    return stack.back().toTensorVector();
  }

  IValue addresses() const {
    Words found;
    for (const IValue& argument : arguments) {
      if (!argument.isList()) continue;
      for (const IValue& value : argument.toListRef())
        if (value.isTensor()) found.push_back(address_of(value.toTensor()));
    }
    for (const Tensor& x : results) found.push_back(address_of(x));
    return IValue(std::move(found));
  }
};

// None was made in inference mode, or Python would not do the call again.
void changes(const IValue& list) {
  for (const IValue& value : list.toListRef()) value.toTensor().unsafeGetTensorImpl()->bump_version();
}

template <Op kOp>
bool launched(const Keys& keys, size_t count, Stack* stack) {
  const auto argument = [&](size_t i) -> const IValue& { return torch::jit::peek(*stack, i, count); };
  Launch call{keys, torch::jit::last(*stack, count), {}, 0, {}, {}, {}};
  if constexpr (kOp == kIteration || kOp == kStoredIteration) {
    const std::optional<Tensors> found = call.run();
    if (!found) return false;
    if (kOp == kStoredIteration && argument(count - 1).toInt() > 0)
      for (const size_t i : {1, 2}) changes(argument(i));
    torch::jit::drop(*stack, count);
    torch::jit::push(*stack, (*found)[0], (*found)[1]);
  } else if constexpr (kOp == kRescale) {
    std::tie(call.results, call.place) = allocate(argument(0).toTensorVector(), argument(8).toIntVector());
    call.sigma = argument(2);
    const std::optional<Tensors> found = call.run();
    if (!found) return false;
    torch::jit::drop(*stack, count);
    torch::jit::push(*stack, std::move(call.results), (*found)[0]);
  } else {
    Tensors like = argument(2).toTensorVector();
    const Tensors scales = argument(3).toTensorVector();
    std::vector<int64_t> dtypes = argument(10).toIntVector();
    like.insert(like.end(), scales.begin(), scales.end());
    dtypes.resize(like.size(), static_cast<int64_t>(at::kFloat));
    std::tie(call.results, call.place) = allocate(like, dtypes);
    call.sigma = argument(4);
    call.vectors = argument(5);
    call.grad_sigma = argument(1);
    if (!call.run()) return false;
    Tensors& results = call.results;
    Tensors d_scales(results.end() - static_cast<int64_t>(scales.size()), results.end());
    results.resize(results.size() - scales.size());
    torch::jit::drop(*stack, count);
    torch::jit::push(*stack, std::move(results), std::move(d_scales));
  }
  return true;
}

template <Op kOp>
void call(const c10::OperatorHandle& op, Stack* stack) {
  static const auto in_python =
      c10::Dispatcher::singleton().findSchemaOrThrow((std::string("fastsn::_run_") + kNames[kOp]).c_str(), "");
  // Not below ADInplaceOrView: where torch serves instead of the kernels, it counts the changes of u and v there.
  const at::AutoDispatchBelowAutograd guard;
  const size_t count = count_of(op);
  std::optional<Keys> keys;
  try {
    keys = keys_of(kOp, torch::jit::last(*stack, count));
  } catch (const c10::Error&) {  // a tensor without strides or storage, of which Python has more to say
  }
  if (!(keys && kinds.is_marked(keys->kind) && launched<kOp>(*keys, count, stack))) in_python.callBoxed(stack);
}

template <Op kOp>
void register_op(torch::Library& m) {
  m.impl(kNames[kOp], torch::CppFunction::makeFromBoxedFunction<&call<kOp>>());
}

void register_ops(torch::Library& m) {
  register_op<kIteration>(m);
  register_op<kStoredIteration>(m);
  register_op<kRescale>(m);
  register_op<kRescaleBackward>(m);
}

// For tests without a GPU: calls for tensors of the CPU come here too, or no longer.
void take_cpu_calls(bool take) {
  static std::unique_ptr<torch::Library> library;
  library.reset();
  if (!take) return;
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "fastsn", c10::DispatchKey::CPU, __FILE__, __LINE__);
  register_ops(*library);
}

template <Op kOp>
void define(torch::Library& m, const std::string& arguments, const std::string& results) {
  const std::string rest = std::string(kNames[kOp]) + "(" + arguments + ") -> ";
  m.def(("_identify_" + rest + "(int, int)").c_str(), torch::CppFunction::makeFromBoxedFunction<&identify<kOp>>());
  m.def(("_run_" + rest + results).c_str());
}

}  // namespace

}  // namespace fastsn

TORCH_LIBRARY_FRAGMENT(fastsn, m) {
  // The arguments of the ops, as in fastsn/ops/schema.py.
  const std::string iteration =
      "Tensor[] weights, Tensor[] u, Tensor[] v, int[] dims, int[] view_masks, int[] v_first, int n";
  const std::string numbers = "int[] dims, int[] view_masks, int[] scale_index, float[] scale_factor, int[] dtypes";
  const std::string vectors = "Tensor[] scales, Tensor sigma, Tensor vectors, " + numbers;
  fastsn::define<fastsn::kIteration>(m, iteration, "(Tensor, Tensor)");
  fastsn::define<fastsn::kStoredIteration>(m, iteration, "(Tensor, Tensor)");
  fastsn::define<fastsn::kRescale>(m, "Tensor[] weights, " + vectors, "(Tensor[], Tensor)");
  fastsn::define<fastsn::kRescaleBackward>(
      m, "Tensor[] gradients, Tensor? grad_sigma, Tensor[] bases, " + vectors, "(Tensor[], Tensor[])");
  m.def("_allocate(Tensor[] like, int[] dtypes) -> (Tensor[], int)", &fastsn::allocate);
  m.def("_mark_as_prepared(int kind) -> ()", [](int64_t kind) { fastsn::kinds.mark(kind); });
  m.def(
      "_launch(int kind, int places, int places_of_results, int[]? addresses, Tensor? sigma, Tensor? vectors, "
      "Tensor? grad_sigma) -> Tensor[]?");
  m.def("_take_cpu_calls(bool take) -> ()", &fastsn::take_cpu_calls);
}

TORCH_LIBRARY_IMPL(fastsn, CUDA, m) { fastsn::register_ops(m); }
