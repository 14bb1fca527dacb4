// Ops by name, to be called through the dispatcher.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace fastsn {

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace fastsn
