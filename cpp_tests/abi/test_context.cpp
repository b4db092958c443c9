// Versions, status names, the last error, contexts.

#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <thread>

#include "refusal.hpp"
#include "support/backend.hpp"

namespace boundary {
namespace {

using support::Context;
using support::host;

constexpr adalora_status_t invalid = ADALORA_ERROR_INVALID_ARGUMENT;

adalora_context_desc_t cpu() {
  adalora_context_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.backend = ADALORA_BACKEND_CPU;
  return desc;
}

TEST(Version, IsTheHeaders) {
  EXPECT_EQ(adalora_abi_version(), static_cast<uint32_t>(ADALORA_ABI_VERSION));
  EXPECT_GT(adalora_version(), 0u);
}

TEST(StatusName, NamesEveryStatus) {
  const std::pair<adalora_status_t, const char*> names[] = {
      {ADALORA_SUCCESS, "ADALORA_SUCCESS"},
      {ADALORA_ERROR_INVALID_ARGUMENT, "ADALORA_ERROR_INVALID_ARGUMENT"},
      {ADALORA_ERROR_INVALID_HANDLE, "ADALORA_ERROR_INVALID_HANDLE"},
      {ADALORA_ERROR_INVALID_STATE, "ADALORA_ERROR_INVALID_STATE"},
      {ADALORA_ERROR_OUT_OF_MEMORY, "ADALORA_ERROR_OUT_OF_MEMORY"},
      {ADALORA_ERROR_UNSUPPORTED, "ADALORA_ERROR_UNSUPPORTED"},
      {ADALORA_ERROR_BACKEND_UNAVAILABLE, "ADALORA_ERROR_BACKEND_UNAVAILABLE"},
      {ADALORA_ERROR_INCOMPLETE, "ADALORA_ERROR_INCOMPLETE"},
      {ADALORA_ERROR_CORRUPT_DATA, "ADALORA_ERROR_CORRUPT_DATA"},
      {ADALORA_ERROR_INTERNAL, "ADALORA_ERROR_INTERNAL"},
      {ADALORA_ERROR_NOT_FOUND, "ADALORA_ERROR_NOT_FOUND"},
      {ADALORA_ERROR_IO, "ADALORA_ERROR_IO"},
  };
  for (const auto& [status, name] : names) EXPECT_STREQ(adalora_status_name(status), name);
  for (adalora_status_t other :
       {-1, 12, std::numeric_limits<adalora_status_t>::min(), std::numeric_limits<adalora_status_t>::max()})
    EXPECT_STREQ(adalora_status_name(other), "unknown status");
}

TEST(LastError, IsEmptyBeforeTheFirst) {
  std::thread([] { EXPECT_STREQ(adalora_last_error(), ""); }).join();
}

TEST(LastError, IsTheThreadsOwn) {
  EXPECT_EQ(adalora_context_create(nullptr, nullptr), invalid);
  const std::string here = adalora_last_error();
  EXPECT_NE(here.find("adalora_context_create"), std::string::npos);
  std::thread([] {
    EXPECT_EQ(adalora_context_prepare(nullptr, nullptr), ADALORA_ERROR_INVALID_HANDLE);
    EXPECT_NE(std::string(adalora_last_error()).find("adalora_context_prepare"), std::string::npos);
  }).join();
  EXPECT_EQ(adalora_last_error(), here);
}

TEST(LastError, StaysAfterASuccess) {
  EXPECT_EQ(adalora_context_create(nullptr, nullptr), invalid);
  const std::string before = adalora_last_error();
  EXPECT_EQ(adalora_context_prepare(host().context(), nullptr), ADALORA_SUCCESS);
  EXPECT_EQ(adalora_last_error(), before);
}

struct BadContext {
  Refusal refusal;
  void (*spoil)(adalora_context_desc_t&);
};

TEST(ContextCreate, RefusesWhatMakesNoSense) {
  const BadContext cases[] = {
      {{"no backend", invalid, {"desc.backend", "found 0"}}, [](auto& d) { d.backend = 0; }},
      {{"another backend", invalid, {"desc.backend", "found 3"}}, [](auto& d) { d.backend = 3; }},
      {{"a device", invalid, {"desc.device", "found 1", "expected 0"}}, [](auto& d) { d.device = 1; }},
      {{"negative threads", invalid, {"desc.threads", "found -1", "0 to 1024"}}, [](auto& d) { d.threads = -1; }},
      {{"too many threads", invalid, {"desc.threads", "found 1025", "0 to 1024"}}, [](auto& d) { d.threads = 1025; }},
      {{"reserved", invalid, {"desc.reserved", "found 7", "expected 0"}}, [](auto& d) { d.reserved = 7; }},
      {{"a cuBLAS handle", invalid, {"desc.cublas_handle", "expected NULL"}}, [](auto& d) { d.cublas_handle = &d; }},
      {{"a folder", invalid, {"desc.library_folder", "found /opt", "expected NULL"}},
       [](auto& d) { d.library_folder = "/opt"; }},
      {{"TF32", invalid, {"desc.tf32", "found 1", "expected 0 on the CPU"}}, [](auto& d) { d.tf32 = 1; }},
      {{"another TF32", invalid, {"desc.tf32", "found 2", "expected 0 or 1"}}, [](auto& d) { d.tf32 = 2; }},
      {{"the end reserved", invalid, {"desc.reserved_end", "found -1", "expected 0"}},
       [](auto& d) { d.reserved_end = -1; }},
      {{"threads on CUDA", invalid, {"desc.threads", "found 2", "expected 0 on the CUDA"}},
       [](auto& d) { d.backend = ADALORA_BACKEND_CUDA, d.threads = 2; }},
      {{"the caller's threads on CUDA", invalid, {"desc.parallel", "expected NULL on the CUDA"}},
       [](auto& d) {
         d.backend = ADALORA_BACKEND_CUDA;
         d.parallel = [](void (*)(void*), void*, uint32_t, uint32_t) {};
       }},
      {{"no size", invalid, {"desc.struct_size", "found 0"}}, [](auto& d) { d.struct_size = 0; }},
      {{"a size without the backend", invalid, {"desc.struct_size", "found 8"}}, [](auto& d) { d.struct_size = 8; }},
      {{"an absurd size", invalid, {"desc.struct_size"}},
       [](auto& d) { d.struct_size = std::numeric_limits<size_t>::max(); }},
  };
  for (const BadContext& c : cases) {
    adalora_context_desc_t desc = cpu();
    c.spoil(desc);
    auto* const before = reinterpret_cast<adalora_context_t*>(0x5a5a);
    adalora_context_t* context = before;
    expect_refused("adalora_context_create", c.refusal, adalora_context_create(&desc, &context));
    EXPECT_EQ(context, before) << "written on success alone";
  }
  const adalora_context_desc_t good = cpu();
  adalora_context_t* context = nullptr;
  expect_refused("adalora_context_create", {"no descriptor", invalid, {"desc", "NULL"}},
                 adalora_context_create(nullptr, &context));
  expect_refused("adalora_context_create", {"no output", invalid, {"context", "NULL"}},
                 adalora_context_create(&good, nullptr));
}

TEST(ContextCreate, SaysThatABackendIsNotHere) {
  adalora_context_desc_t desc = cpu();
  desc.backend = ADALORA_BACKEND_CUDA;
  desc.device = 1 << 20;  // more devices than any machine has
  adalora_context_t* context = nullptr;
  expect_refused("adalora_context_create", {"CUDA", ADALORA_ERROR_BACKEND_UNAVAILABLE, {"CUDA"}},
                 adalora_context_create(&desc, &context));
  EXPECT_EQ(context, nullptr);
}

TEST(ContextCreate, ServesOlderAndNewerDescriptors) {
  adalora_context_desc_t older = cpu();
  older.struct_size = offsetof(adalora_context_desc_t, parallel);
  older.parallel = [](void (*)(void*), void*, uint32_t, uint32_t) { FAIL() << "beyond the caller's descriptor"; };
  adalora_context_t* context = nullptr;
  ASSERT_EQ(adalora_context_create(&older, &context), ADALORA_SUCCESS) << adalora_last_error();
  adalora_context_destroy(context);

  struct {
    adalora_context_desc_t known;
    unsigned char unknown[24];
  } newer{cpu(), {}};
  newer.known.struct_size = sizeof newer;
  ASSERT_EQ(adalora_context_create(&newer.known, &context), ADALORA_SUCCESS) << adalora_last_error();
  adalora_context_destroy(context);
  newer.unknown[23] = 1;
  expect_refused("adalora_context_create", {"a newer field", invalid, {"desc", "struct_size"}},
                 adalora_context_create(&newer.known, &context));
}

TEST(ContextDescribe, SaysHowLongTheTextIs) {
  size_t needed = 0;
  ASSERT_EQ(adalora_context_describe(host().context(), nullptr, &needed), ADALORA_SUCCESS);
  std::vector<char> text(needed, '#');

  size_t room = needed - 1;
  expect_refused("adalora_context_describe",
                 {"too little room", invalid, {"text", std::to_string(needed - 1), std::to_string(needed)}},
                 adalora_context_describe(host().context(), text.data(), &room));
  EXPECT_EQ(room, needed) << "the bytes needed, also where the room is too small";
  EXPECT_EQ(text, std::vector<char>(needed, '#')) << "then text is not written";

  room = needed;
  ASSERT_EQ(adalora_context_describe(host().context(), text.data(), &room), ADALORA_SUCCESS);
  EXPECT_EQ(std::strlen(text.data()) + 1, needed);
  for (const char* word : {"adalora", "cpu", "thread"}) {
    std::string lower(text.data());
    for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    EXPECT_NE(lower.find(word), std::string::npos) << text.data();
  }
  expect_refused("adalora_context_describe", {"no size", invalid, {"bytes", "NULL"}},
                 adalora_context_describe(host().context(), text.data(), nullptr));
}

TEST(ContextDestroy, OfNullIsNothing) { adalora_context_destroy(nullptr); }

TEST(GradientFactor, RefusesWhatMakesNoSense) {
  double squares = 4, scale = 2, factor = -1;
  const auto call = [&](const double* s, const double* l, double max_norm, double* f) {
    return adalora_context_gradient_factor(host().context(), s, l, max_norm, f, nullptr);
  };
  const auto moved = [](double* p) { return reinterpret_cast<double*>(reinterpret_cast<char*>(p) + 4); };
  const std::string name = "adalora_context_gradient_factor";
  double room[2] = {4, 4};
  expect_refused(name, {"no sum", invalid, {"sum_of_squares", "NULL"}}, call(nullptr, &scale, 1, &factor));
  expect_refused(name, {"misaligned sum", invalid, {"sum_of_squares"}}, call(moved(room), &scale, 1, &factor));
  expect_refused(name, {"misaligned scale", invalid, {"loss_scale"}}, call(&squares, moved(room), 1, &factor));
  expect_refused(name, {"no factor", invalid, {"grad_factor", "NULL"}}, call(&squares, &scale, 1, nullptr));
  expect_refused(name, {"misaligned factor", invalid, {"grad_factor"}}, call(&squares, &scale, 1, moved(room)));
  expect_refused(name, {"norm 0", invalid, {"max_norm", "found 0"}}, call(&squares, &scale, 0, &factor));
  expect_refused(name, {"negative norm", invalid, {"max_norm", "found -1"}}, call(&squares, &scale, -1, &factor));
  expect_refused(name, {"norm that is no number", invalid, {"max_norm", "NaN"}},
                 call(&squares, &scale, std::nan(""), &factor));
  expect_refused(name, {"factor over sum", invalid, {"grad_factor", "overlaps"}}, call(&squares, &scale, 1, &squares));
  expect_refused(name, {"factor over scale", invalid, {"grad_factor", "overlaps"}}, call(&squares, &scale, 1, &scale));
  EXPECT_EQ(factor, -1);
  EXPECT_EQ(squares, 4);
  EXPECT_EQ(scale, 2);
}

struct Log {
  std::vector<std::pair<int32_t, std::string>> messages;

  static void receive(void* user, int32_t level, const char* text) {
    static_cast<Log*>(user)->messages.emplace_back(level, text);
  }
};

TEST(ContextLog, ReceivesMessagesInWords) {
  Log log;
  adalora_context_desc_t desc = cpu();
  desc.log = Log::receive;
  desc.log_user = &log;
  adalora_context_t* context = nullptr;
  ASSERT_EQ(adalora_context_create(&desc, &context), ADALORA_SUCCESS);
  EXPECT_EQ(adalora_context_prepare(context, nullptr), ADALORA_SUCCESS);
  adalora_context_destroy(context);
  ASSERT_FALSE(log.messages.empty()) << "what was chosen, once per object";
  for (const auto& [level, text] : log.messages) {
    EXPECT_TRUE(level == ADALORA_LOG_INFO || level == ADALORA_LOG_WARNING) << level;
    EXPECT_FALSE(text.empty());
  }
}

}  // namespace
}  // namespace boundary
