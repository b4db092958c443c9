// What a refused call must do: return the right status, say what was wrong in words, and change nothing.
#pragma once

#include <adalora.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace boundary {

struct Refusal {
  std::string what;  // the mistake, for the reader
  adalora_status_t status;
  std::vector<std::string> words;  // the argument, what was found, what was expected
};

// Right after the call, on the thread that made it.
inline void expect_refused(const std::string& call, const Refusal& refusal, adalora_status_t status) {
  const std::string text = adalora_last_error();
  EXPECT_EQ(status, refusal.status) << refusal.what << ": " << adalora_status_name(status) << ", last error: " << text;
  if (status != refusal.status) return;
  EXPECT_EQ(text.rfind(call + ": ", 0), 0u) << refusal.what << ": the text does not begin with the call: " << text;
  for (const std::string& word : refusal.words)
    EXPECT_NE(text.find(word), std::string::npos) << refusal.what << ": no '" << word << "' in: " << text;
  if (status != ADALORA_ERROR_INVALID_ARGUMENT && status != ADALORA_ERROR_INVALID_HANDLE) return;
  for (const char* word : {"found ", "expected "})
    EXPECT_NE(text.find(word), std::string::npos) << refusal.what << ": no '" << word << "' in: " << text;
}

}  // namespace boundary
