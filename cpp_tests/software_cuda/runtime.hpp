// What the runtime's functions share.
#pragma once

#include "core.hpp"

namespace software_cuda {

int& last_error();

template <class Body>
int runtime(const char* name, int injected, Body body) {
  const int code = guarded(name, injected, body);
  if (code != 0) last_error() = code;
  return code;
}

}  // namespace software_cuda
