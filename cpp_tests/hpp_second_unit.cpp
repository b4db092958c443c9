// A second translation unit with the whole header in it, twice: test_hpp.cpp links against it.
#include <adalora.hpp>

adalora::Context context_from_second_unit() {
  adalora::ContextDesc desc;
  desc.backend = ADALORA_BACKEND_CPU;
  desc.threads = 1;
  return adalora::Context(desc);
}
