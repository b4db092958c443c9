// Checkpoints: what is written and read back, and what is refused. What PEFT makes of the files is tested in Python.
#include <gtest/gtest.h>
#include <unistd.h>

#include <adalora.hpp>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

using adalora::View;
namespace fs = std::filesystem;

constexpr std::int64_t in = 5, out = 3, rank = 4;

/// Triplets with different numbers in rows that have gaps; E of triplets 1 and 3 is 0.
struct Params {
  explicit Params(double phase) : A(rank * (in + 2)), E(2 * rank), B(out * (rank + 1)) {
    double next = phase;
    for (std::vector<float>* values : {&A, &E, &B}) {
      for (float& value : *values) value = static_cast<float>(std::sin(next += 1.7));
    }
    E[2] = E[6] = 0;
  }

  adalora_triplets_t triplets() {
    return {View(A.data(), rank, in, in + 2), View(E.data(), rank, 1, 2), View(B.data(), out, rank, rank + 1)};
  }

  float a(std::int64_t r, std::int64_t i) const { return A[static_cast<std::size_t>(r * (in + 2) + i)]; }
  float e(std::int64_t r) const { return E[static_cast<std::size_t>(2 * r)]; }
  float b(std::int64_t o, std::int64_t r) const { return B[static_cast<std::size_t>(o * (rank + 1) + r)]; }

  std::vector<float> A, E, B;
};

class Checkpoints : public testing::Test {
 protected:
  Checkpoints() : folder((fs::temp_directory_path() / ("adalora-" + std::to_string(::getpid()))).string()) {
    fs::remove_all(folder);
    desc.folder = folder.c_str();
    desc.config = R"({"lora_alpha": 0, "total_step": 10, "kept": [1.5e-7, null]})";
    for (std::size_t k = 0; k < 2; ++k) {
      adapters[k].name = k == 0 ? "layers.1" : "layers.0";
      adapters[k].params = params[k].triplets();
      adapters[k].rank = rank;
    }
  }
  ~Checkpoints() override { fs::remove_all(folder); }

  /// The status of a refused write, whose text must hold `part`.
  adalora_status_t refusal(const std::string& part, adalora::Span<adalora::Tensor> tensors = {},
                           adalora::Span<adalora::Tensor> state = {}) {
    return status([&] { adalora::Checkpoint::write(desc, adapters, tensors, state); }, part);
  }

  template <class Body>
  static adalora_status_t status(Body body, const std::string& part) {
    try {
      body();
    } catch (const adalora::Error& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
      return error.status();
    }
    return ADALORA_SUCCESS;
  }

  std::string content(const char* name) const {
    std::ifstream file(fs::path(folder) / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  std::string folder;
  adalora::CheckpointDesc desc;
  std::vector<Params> params{Params(0), Params(50)};
  std::vector<adalora::AdapterEntry> adapters{2};
};

constexpr std::uint8_t kept_0_and_2[] = {1, 0, 7, 0};

TEST_F(Checkpoints, ComeBackWholeCutAndConverted) {
  adapters[0].pattern = kept_0_and_2;
  const std::int64_t shape[] = {2, 0, 3};
  adalora::Tensor empty, number;
  empty.name = "base_model.model.empty", empty.dtype = ADALORA_INT64, empty.shape = shape, empty.n_dims = 3;
  const std::uint64_t value = 1234567890123456789;
  number.name = "number", number.dtype = ADALORA_UINT64, number.data = &value, number.bytes = 8;
  desc.state = "of \"mine\"\n";
  adalora::Checkpoint::write(desc, adapters, std::vector{empty, number}, number);

  const adalora::Checkpoint read(folder, ADALORA_FILES_ALL);
  EXPECT_EQ(read.text(ADALORA_FILES_STATE), desc.state);
  const std::string config = read.text(ADALORA_FILES_ADAPTER);
  for (const char* part : {"\"lora_alpha\": 4,", "\"init_r\": 4,", "\"peft_type\": \"ADALORA\"", "1.5e-7,\n    null",
                           "\"layers.0.lora_E\": [\n      true,\n      true,\n      true,\n      true\n    ]",
                           "\"layers.1.lora_E\": [\n      true,\n      false,\n      true,\n      false\n    ]",
                           "\"target_modules\": [\n    \"layers.1\",\n    \"layers.0\"\n  ]"}) {
    EXPECT_NE(config.find(part), std::string::npos) << config;
  }

  const std::vector<adalora::AdapterInfo> found = read.adapters();
  ASSERT_EQ(found.size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) {
    const std::size_t k = 1 - i;  // In the order of their names.
    EXPECT_STREQ(found[i].name, adapters[k].name);
    EXPECT_EQ(found[i].rank, rank);
    EXPECT_EQ(found[i].kept, k == 0 ? 2 : 4);
    EXPECT_EQ(found[i].in_features, in);
    EXPECT_EQ(found[i].out_features, out);
    EXPECT_EQ(found[i].a_dtype, ADALORA_FLOAT32);
    EXPECT_EQ(found[i].pattern != nullptr, true);
    EXPECT_EQ(found[i].pattern[1], k == 0 ? 0 : 1);

    std::vector<double> A(rank * in, 9), E(rank, 9), B(out * rank, 9);
    read.read_adapter(static_cast<std::int64_t>(i),
                      {View(A.data(), rank, in), View(E.data(), rank), View(B.data(), out, rank)});
    for (std::int64_t r = 0; r < rank; ++r) {
      const bool there = k == 1 || r % 2 == 0;
      for (std::int64_t c = 0; c < in; ++c) EXPECT_EQ(A[r * in + c], there ? params[k].a(r, c) : 0);
      EXPECT_EQ(E[r], there ? params[k].e(r) : 0);
      for (std::int64_t o = 0; o < out; ++o) EXPECT_EQ(B[o * rank + r], there ? params[k].b(o, r) : 0);
    }
  }
  // The second of the file is the cut one; here it comes alone.
  std::vector<float> A(2 * in), E(2), B(out * 2);
  read.read_adapter(1, {View(A.data(), 2, in), View(E.data(), 2), View(B.data(), out, 2)});
  EXPECT_EQ(A[in + 1], params[0].a(2, 1));
  EXPECT_EQ(B[3], params[0].b(1, 2));
  EXPECT_EQ(E[1], params[0].e(2));
  // To half precision, as a cast does.
  std::vector<adalora::bfloat16> halves(rank * in), half_e(rank), half_b(out * rank);
  read.read_adapter(0, {View(halves.data(), rank, in), View(half_e.data(), rank), View(half_b.data(), out, rank)});
  std::uint32_t bits;
  const float exact = params[1].a(3, 4);
  std::memcpy(&bits, &exact, 4);
  EXPECT_EQ(static_cast<std::uint32_t>(halves[rank * in - 1]), (bits + 0x7fff + (bits >> 16 & 1)) >> 16);

  const std::vector<adalora::Tensor> tensors = read.tensors(ADALORA_FILES_ADAPTER);
  ASSERT_EQ(tensors.size(), 2u);
  EXPECT_STREQ(tensors[0].name, empty.name);
  EXPECT_EQ(tensors[0].dtype, ADALORA_INT64);
  EXPECT_EQ(std::vector<std::int64_t>(tensors[0].shape, tensors[0].shape + tensors[0].n_dims),
            std::vector<std::int64_t>(shape, shape + 3));
  read.read_tensor(ADALORA_FILES_ADAPTER, 0, nullptr, 0);
  std::uint64_t back = 0;
  read.read_tensor(ADALORA_FILES_STATE, 0, &back, sizeof back);
  EXPECT_EQ(back, value);

  EXPECT_EQ(status([&] { read.read_tensor(ADALORA_FILES_STATE, 0, &back, 7); }, "bytes: found 7, expected"),
            ADALORA_ERROR_INVALID_ARGUMENT);
  EXPECT_EQ(status([&] { read.read_tensor(ADALORA_FILES_STATE, 1, &back, 8); }, "index: found 1, expected 0 to 0"),
            ADALORA_ERROR_INVALID_ARGUMENT);
  EXPECT_EQ(status([&] { read.text(ADALORA_FILES_ALL); }, "files: found 3, expected"), ADALORA_ERROR_INVALID_ARGUMENT);
  const adalora_triplets_t narrow = {View(A.data(), 2, in - 1), View(E.data(), 2), View(B.data(), out, 2)};
  EXPECT_EQ(status([&] { read.read_adapter(1, narrow); }, "params.A: found [2, 4], expected [2, 5]"),
            ADALORA_ERROR_INVALID_ARGUMENT);
  const adalora_triplets_t few = {View(A.data(), 1, in), View(E.data(), 1), View(B.data(), out, 1)};
  EXPECT_EQ(status([&] { read.read_adapter(1, few); }, "expected rank, 4, or the 2 that are in the file"),
            ADALORA_ERROR_INVALID_ARGUMENT);
  const adalora_triplets_t twice = {View(A.data(), 2, in), View(A.data(), 2), View(B.data(), out, 2)};
  EXPECT_EQ(status([&] { read.read_adapter(1, twice); }, "params.A: found memory that overlaps params.E"),
            ADALORA_ERROR_INVALID_ARGUMENT);
}

TEST_F(Checkpoints, TakeCompactedAdapters) {
  adalora::Checkpoint::write(desc, adapters);
  const std::string whole = content("adapter_model.safetensors");
  for (adalora::AdapterEntry& adapter : adapters) adapter.pattern = kept_0_and_2;
  adalora::Checkpoint::write(desc, adapters);
  const std::string cut = content("adapter_model.safetensors"), config = content("adapter_config.json");
  EXPECT_LT(cut.size(), whole.size());
  std::vector<float> A, E, B;
  std::vector<adalora::AdapterEntry> compacted = adapters;
  A.resize(2 * 2 * in), E.resize(4), B.resize(2 * out * 2);
  for (std::size_t k = 0; k < 2; ++k) {
    float *a = &A[k * 2 * in], *e = &E[k * 2], *b = &B[k * out * 2];
    for (std::int64_t j = 0; j < 2; ++j) {
      for (std::int64_t c = 0; c < in; ++c) a[j * in + c] = params[k].a(2 * j, c);
      e[j] = params[k].e(2 * j);
      for (std::int64_t o = 0; o < out; ++o) b[o * 2 + j] = params[k].b(o, 2 * j);
    }
    compacted[k].params = {View(a, 2, in), View(e, 2), View(b, out, 2)};
  }
  adalora::Checkpoint::write(desc, compacted);
  EXPECT_EQ(content("adapter_model.safetensors"), cut);
  EXPECT_EQ(content("adapter_config.json"), config);
}

TEST_F(Checkpoints, BecomePlainLora) {
  adapters[1].scaling = 0.5;
  adapters[1].pattern = kept_0_and_2;
  params[1].E[4] = 0;  // One triplet is left there, and two in the other.
  adalora::Checkpoint::export_lora(desc, adapters);
  EXPECT_NE(content("adapter_config.json").find("\"peft_type\": \"LORA\""), std::string::npos);
  EXPECT_NE(content("adapter_config.json").find("\"r\": 2,"), std::string::npos);
  EXPECT_EQ(content("adapter_config.json").find("total_step"), std::string::npos);
  EXPECT_EQ(status([&] { adalora::Checkpoint read(folder); }, "peft_type: found \"LORA\", expected \"ADALORA\""),
            ADALORA_ERROR_INVALID_ARGUMENT);
  // All tensors are float32, so they lie in the order of their names: layers.0.lora_A and lora_B, then layers.1's.
  const std::string file = content("adapter_model.safetensors");
  constexpr std::size_t n = 2 * (2 * in + out * 2);
  std::vector<float> values(n);
  std::memcpy(values.data(), file.data() + file.size() - n * sizeof(float), n * sizeof(float));
  const auto scaled = [](float b, float e, double s) { return static_cast<float>(double{b} * (double{e} * s)); };
  const float* at = values.data();
  for (std::int64_t c = 0; c < in; ++c) EXPECT_EQ(at[c], params[1].a(0, c));
  for (std::int64_t c = 0; c < in; ++c) EXPECT_EQ(at[in + c], 0);
  at += 2 * in;
  for (std::int64_t o = 0; o < out; ++o) {
    EXPECT_EQ(at[o * 2], scaled(params[1].b(o, 0), params[1].e(0), 0.5));
    EXPECT_EQ(at[o * 2 + 1], 0);
  }
  at += out * 2;
  for (std::int64_t j = 0; j < 2; ++j) {
    for (std::int64_t c = 0; c < in; ++c) EXPECT_EQ(at[j * in + c], params[0].a(2 * j, c));
  }
  at += 2 * in;
  for (std::int64_t o = 0; o < out; ++o) {
    for (std::int64_t j = 0; j < 2; ++j) {
      EXPECT_EQ(at[o * 2 + j], scaled(params[0].b(o, 2 * j), params[0].e(2 * j), 4 / (4 + 1e-5)));
    }
  }
  const std::int64_t kernel[] = {2, 2};
  adapters[0].kernel = kernel, adapters[0].n_kernel = 2;
  EXPECT_EQ(status([&] { adalora::Checkpoint::export_lora(desc, adapters); }, "adapters[0].kernel: found [2, 2]"),
            ADALORA_ERROR_INVALID_ARGUMENT);
}

TEST_F(Checkpoints, RefuseWhatDoesNotFit) {
  const auto invalid = ADALORA_ERROR_INVALID_ARGUMENT;
  const auto spoilt = [&](auto change, const std::string& part) {
    const std::vector<adalora::AdapterEntry> good = adapters;
    const adalora::CheckpointDesc good_desc = desc;
    change();
    EXPECT_EQ(refusal(part), invalid) << part;
    adapters = good, desc = good_desc;
  };
  spoilt([&] { desc.folder = nullptr; }, "desc.folder: found NULL, expected a path");
  spoilt([&] { desc.folder = ""; }, "desc.folder: found an empty text");
  spoilt([&] { desc.config = nullptr; }, "desc.config: found NULL, expected a text, since there are adapters");
  spoilt([&] { desc.config = "{"; }, "desc.config: found what is not");
  spoilt([&] { desc.config = "[]"; }, "expected a JSON object");
  spoilt([&] { desc.config = "\xff"; }, "desc.config: found what is no UTF-8");
  spoilt([&] { desc.config = R"({"init_r": 5})"; }, "adapters[0].rank: found 4, expected 5");
  spoilt([&] { desc.config = R"({"init_r": 4.5})"; }, "desc.config: init_r: found 4.5, expected an integer");
  spoilt([&] { desc.config = R"({"lora_alpha": -1})"; }, "desc.config: lora_alpha: found -1");
  spoilt([&] { desc.config = R"({"peft_type": "LORA"})"; }, "desc.config: peft_type: found \"LORA\"");
  spoilt([&] { adapters[1].rank = 3; }, "adapters[1].");
  spoilt([&] { adapters[1].name = adapters[0].name; }, "twice");
  spoilt([&] { adapters[1].name = ""; }, "adapters[1].name: found an empty text");
  spoilt([&] { adapters[1].params.A.dtype = ADALORA_INT64; }, "adapters[1].params.A.dtype: found 13");
  spoilt([&] { adapters[1].params.B.columns = 3; }, "adapters[1].params.B: found [3, 3], expected 4 columns");
  spoilt([&] { adapters[1].params.E.rows = 3; }, "adapters[1].params.E: found 3, expected rank, 4");
  spoilt([&] { adapters[1].scaling = 1; }, "adapters[1].scaling: found 1, expected 0");
  constexpr std::uint8_t others[] = {0, 1, 1, 1};
  spoilt([&] { adapters[1].pattern = others; }, "adapters[1].pattern: found 0 for triplet 0, whose E is");

  const float one = 1;
  adalora::Tensor tensor;
  tensor.data = &one, tensor.dtype = ADALORA_FLOAT32, tensor.name = "t";
  const auto wrong = [&](auto change, const std::string& part) {
    adalora::Tensor changed = tensor;
    change(changed);
    EXPECT_EQ(refusal(part, changed), invalid) << part;
  };
  const std::int64_t negative = -1, huge[] = {INT64_MAX, 4};
  wrong([](auto& t) { t.name = "__metadata__"; }, "tensors: found the name \"__metadata__\"");
  wrong([](auto& t) { t.name = "base_model.model.layers.7.lora_A"; }, "tensors[0].name: found");
  wrong([](auto& t) { t.dtype = 20; }, "tensors[0].dtype: found 20, expected one of");
  wrong([](auto& t) { t.bytes = 8; }, "tensors[0].bytes: found 8, expected 0, or 4");
  wrong([](auto& t) { t.data = nullptr; }, "tensors[0].data: found NULL");
  wrong([](auto& t) { t.n_dims = 65; }, "tensors[0].n_dims: found 65, expected 0 to 64");
  wrong([&](auto& t) { t.n_dims = 1, t.shape = &negative; }, "tensors[0].shape[0]: found -1, expected 0 or more");
  wrong([&](auto& t) { t.n_dims = 2, t.shape = huge; }, "tensors[0].shape: found [9223372036854775807, 4]");
  EXPECT_EQ(refusal("desc.state: found NULL, expected a text, since there are state_tensors", {}, tensor), invalid);
  EXPECT_FALSE(fs::exists(folder));

  EXPECT_EQ(status([&] { adalora::Checkpoint read(folder); }, "adapter_config.json: opening it failed"),
            ADALORA_ERROR_NOT_FOUND);
  adalora::Checkpoint::write(desc, adapters);
  const adalora::Checkpoint read(folder);
  EXPECT_EQ(status([&] { read.text(ADALORA_FILES_STATE); }, "opened without ADALORA_FILES_STATE"),
            ADALORA_ERROR_INVALID_STATE);
  EXPECT_EQ(status([&] { adalora::Checkpoint all(folder, ADALORA_FILES_ALL); }, "training_state.safetensors"),
            ADALORA_ERROR_NOT_FOUND);
  EXPECT_EQ(adalora_checkpoint_text(reinterpret_cast<const adalora_checkpoint_t*>(&desc), 1, nullptr, nullptr),
            ADALORA_ERROR_INVALID_HANDLE);
  fs::resize_file(fs::path(folder) / "adapter_model.safetensors", 800);
  std::vector<float> A(rank * in), E(rank), B(out * rank);
  const adalora_triplets_t room = {View(A.data(), rank, in), View(E.data(), rank), View(B.data(), out, rank)};
  EXPECT_EQ(status([&] { read.read_adapter(1, room); }, "params are undefined"), ADALORA_ERROR_INCOMPLETE);
  EXPECT_EQ(status([&] { adalora::Checkpoint again(folder); }, "expected a whole safetensors file"),
            ADALORA_ERROR_CORRUPT_DATA);
}

}  // namespace
