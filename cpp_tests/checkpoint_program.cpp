// Prints what is in a checkpoint's adapter files, every number with all its digits: one line for each adapter and each
// of its matrices, with masked triplets in their places, and for each other tensor.
#include <adalora.hpp>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

using adalora::View;

void print(const char* name, const std::vector<double>& values) {
  std::printf("%s", name);
  for (const double value : values) std::printf(" %.17g", value);
  std::printf("\n");
}

int main(int argc, char** argv) try {
  if (argc != 2) return std::cerr << "usage: checkpoint_program FOLDER\n", 2;
  const adalora::Checkpoint checkpoint(argv[1]);
  const std::vector<adalora::AdapterInfo> adapters = checkpoint.adapters();
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    const adalora::AdapterInfo& found = adapters[i];
    std::printf("adapter %s rank %lld kept %lld\n", found.name, static_cast<long long>(found.rank),
                static_cast<long long>(found.kept));
    std::vector<double> A(static_cast<std::size_t>(found.rank * found.in_features)),
        E(static_cast<std::size_t>(found.rank)), B(static_cast<std::size_t>(found.out_features * found.rank));
    const adalora_triplets_t params = {View(A.data(), found.rank, found.in_features), View(E.data(), found.rank),
                                       View(B.data(), found.out_features, found.rank)};
    checkpoint.read_adapter(static_cast<std::int64_t>(i), params);
    print("A", A), print("E", E), print("B", B);
  }
  const std::vector<adalora::Tensor> tensors = checkpoint.tensors(ADALORA_FILES_ADAPTER);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].dtype != ADALORA_FLOAT32) continue;
    std::vector<float> values(tensors[i].bytes / sizeof(float));
    checkpoint.read_tensor(ADALORA_FILES_ADAPTER, static_cast<std::int64_t>(i), values.data(), tensors[i].bytes);
    print(tensors[i].name, std::vector<double>(values.begin(), values.end()));
  }
  return 0;
} catch (const adalora::Error& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
