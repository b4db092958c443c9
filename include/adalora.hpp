#ifndef ADALORA_HPP
#define ADALORA_HPP

/// C++17 over adalora.h, header only: handles that destroy themselves, errors that are thrown, matrices that know their
/// element type.
///
/// Every object of the C interface is a class, and every function that takes the object a method, with the C function's
/// arguments in their order; what they mean is written in adalora.h. Arguments at the end that a caller may do without
/// have defaults. What C reports into host memory is returned; what lives in the backend's memory stays a pointer.
/// Functions without an object (`adalora_version` and its kind) are called as they are.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "adalora.h"

namespace adalora {

/// A call that failed. `what()` says which call, which argument, what was found and what was expected.
class Error : public std::runtime_error {
 public:
  Error(adalora_status_t status, const std::string& text) : std::runtime_error(text), status_(status) {}

  /// One of the `ADALORA_ERROR_*` numbers.
  adalora_status_t status() const noexcept { return status_; }

 private:
  adalora_status_t status_;
};

/// Throws the thread's last error unless `status` is `ADALORA_SUCCESS`.
inline void check(adalora_status_t status) {
  if (status != ADALORA_SUCCESS) throw Error(status, adalora_last_error());
}

// Element types ------------------------------------------------------------------------------------------------------

/// An element of a bfloat16 matrix, as its bits; it has no arithmetic.
enum class bfloat16 : std::uint16_t {};

/// An element of an IEEE 754 binary16 matrix, as its bits; it has no arithmetic.
enum class float16 : std::uint16_t {};

/// The `adalora_dtype_t` of an element type. Specialise it for types of your own, such as `__nv_bfloat16`.
template <class T>
inline constexpr adalora_dtype_t dtype = 0;
template <>
inline constexpr adalora_dtype_t dtype<float> = ADALORA_FLOAT32;
template <>
inline constexpr adalora_dtype_t dtype<double> = ADALORA_FLOAT64;
template <>
inline constexpr adalora_dtype_t dtype<bfloat16> = ADALORA_BFLOAT16;
template <>
inline constexpr adalora_dtype_t dtype<float16> = ADALORA_FLOAT16;

/// A row-major matrix, or a vector, in memory that somebody else owns.
///
/// It converts to `adalora_matrix_t` wherever one is wanted, unless its elements are const: the C type has one pointer
/// for what is read and what is written, so that const elements are handed over by `read_only()`.
template <class T>
class View {
  static_assert(dtype<std::remove_const_t<T>> != 0, "adalora::dtype has to be specialised for this element type");

 public:
  /// `row_stride` counts elements; 0: the rows lie without gaps.
  View(T* data, std::int64_t rows, std::int64_t columns, std::int64_t row_stride = 0) noexcept
      : data_(data), rows_(rows), columns_(columns), row_stride_(row_stride) {}

  /// A vector.
  View(T* data, std::int64_t elements) noexcept : View(data, 1, elements) {}

  template <class U = T, class = std::enable_if_t<!std::is_const_v<U>>>
  operator adalora_matrix_t() const noexcept {
    return read_only();
  }

  /// For an operand that the call reads and does not write; adalora.h says which these are.
  adalora_matrix_t read_only() const noexcept {
    using Element = std::remove_const_t<T>;
    adalora_matrix_t matrix{};
    matrix.data = const_cast<Element*>(data_);
    matrix.rows = rows_;
    matrix.columns = columns_;
    matrix.row_stride = row_stride_;
    matrix.dtype = dtype<Element>;
    return matrix;
  }

 private:
  T* data_;
  std::int64_t rows_;
  std::int64_t columns_;
  std::int64_t row_stride_;
};

// Descriptors --------------------------------------------------------------------------------------------------------

/// A descriptor of the C interface with `struct_size` set and every other field 0, which means its default.
template <class Descriptor>
struct Sized : Descriptor {
  Sized() noexcept : Descriptor{} {
    static_assert(sizeof(Sized) == sizeof(Descriptor), "an array of these has to be an array of descriptors");
    this->struct_size = sizeof(Descriptor);
  }
};

using ContextDesc = Sized<adalora_context_desc_t>;
using AdapterDesc = Sized<adalora_adapter_desc_t>;
using AllocatorDesc = Sized<adalora_allocator_desc_t>;
using Call = Sized<adalora_call_t>;
using Slice = Sized<adalora_slice_t>;
using Hyper = Sized<adalora_hyper_t>;
using Step = Sized<adalora_step_t>;
using Report = Sized<adalora_report_t>;
using CheckpointDesc = Sized<adalora_checkpoint_desc_t>;
using AdapterEntry = Sized<adalora_adapter_entry_t>;
using AdapterInfo = Sized<adalora_adapter_info_t>;
using Tensor = Sized<adalora_tensor_t>;

/// The descriptors that a call takes: one of them, or a container of them (std::vector, std::array; not a braced list,
/// which would end before the call). It does not own them.
template <class T>
class Span {
 public:
  Span() noexcept = default;
  Span(const T& one) noexcept : data_(&one), size_(1) {}

  template <class Container, class Data = decltype(std::declval<const Container&>().data()),
            class = std::enable_if_t<std::is_same_v<Data, const T*>>>
  Span(const Container& container) noexcept : data_(container.data()), size_(container.size()) {}

  const T* data() const noexcept { return data_; }
  std::int64_t size() const noexcept { return static_cast<std::int64_t>(size_); }

 private:
  const T* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Zeroed host memory, aligned as workspace and state have to be, for trainers on the CPU backend.
class Buffer {
 public:
  Buffer() noexcept = default;
  explicit Buffer(std::size_t bytes) : data_(::operator new(bytes, alignment)), size_(bytes) {
    std::memset(data_.get(), 0, bytes);
  }

  void* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(void* data) const noexcept { ::operator delete(data, alignment); }
  };
  std::unique_ptr<void, Free> data_;
  std::size_t size_ = 0;
};

namespace detail {

template <class T, void (*destroy)(T*)>
struct Destroy {
  void operator()(T* handle) const noexcept { destroy(handle); }
};

/// Owns a handle of the C interface; empty after it was moved from.
template <class T, void (*destroy)(T*)>
using Handle = std::unique_ptr<T, Destroy<T, destroy>>;

template <class T>
const T* address(const std::optional<T>& value) noexcept {
  return value ? &*value : nullptr;
}

inline void require_abi_version(std::uint32_t library) {
  if (library != ADALORA_ABI_VERSION) {
    throw Error(ADALORA_ERROR_UNSUPPORTED, "adalora.h describes version " + std::to_string(ADALORA_ABI_VERSION) +
                                               " of the interface, and the library that was loaded serves version " +
                                               std::to_string(library));
  }
}

}  // namespace detail

// Context ------------------------------------------------------------------------------------------------------------

/// A backend, its device and threads. Adapters and allocators go on working after it is gone.
class Context {
 public:
  /// Throws, before anything else, where the library's interface is of another version than this header's.
  explicit Context(const ContextDesc& desc) {
    detail::require_abi_version(adalora_abi_version());
    adalora_context_t* handle = nullptr;
    check(adalora_context_create(&desc, &handle));
    handle_.reset(handle);
  }

  /// The handle for the C interface, which stays this object's.
  adalora_context_t* get() const noexcept { return handle_.get(); }

  /// Worth a call before the first step is timed, or captured into a CUDA graph.
  void prepare(void* stream = nullptr) { check(adalora_context_prepare(get(), stream)); }

  /// For the head of a log.
  std::string describe() const {
    std::size_t bytes = 0;
    check(adalora_context_describe(get(), nullptr, &bytes));
    std::string text(bytes, '\0');
    check(adalora_context_describe(get(), text.data(), &bytes));
    text.resize(std::strlen(text.c_str()));
    return text;
  }

  /// Its result is what `Step::grad_factor` points to.
  void gradient_factor(const double* sum_of_squares, const double* loss_scale, double max_norm, double* grad_factor,
                       void* stream = nullptr) const {
    check(adalora_context_gradient_factor(get(), sum_of_squares, loss_scale, max_norm, grad_factor, stream));
  }

 private:
  detail::Handle<adalora_context_t, adalora_context_destroy> handle_;
};

// Adapter ------------------------------------------------------------------------------------------------------------

/// The geometry of one layer's adapter. Its triplets are the caller's, and travel with every call.
class Adapter {
 public:
  Adapter(Context& context, const AdapterDesc& desc) : rank_(desc.rank) {
    adalora_adapter_t* handle = nullptr;
    check(adalora_adapter_create(context.get(), &desc, &handle));
    handle_.reset(handle);
  }

  /// The handle for the C interface, such as `Call::adapter`; it stays this object's.
  adalora_adapter_t* get() const noexcept { return handle_.get(); }

  /// Triplets.
  std::int64_t rank() const noexcept { return rank_; }

  /// With E zero the model computes at first what its base computes.
  void initialize(const adalora_triplets_t& params, std::uint64_t seed, void* stream = nullptr) const {
    check(adalora_adapter_initialize(get(), &params, seed, stream));
  }

  void delta_weight(const adalora_triplets_t& params, double scaling, bool fan_in_fan_out, bool accumulate,
                    const adalora_matrix_t& w, void* stream = nullptr) const {
    check(adalora_adapter_delta_weight(get(), &params, scaling, fan_in_fan_out, accumulate, &w, stream));
  }

  /// Afterwards the base layer alone computes what base and adapter did.
  void merge(const adalora_triplets_t& params, double scaling, bool fan_in_fan_out, const adalora_matrix_t& w,
             const std::optional<adalora_matrix_t>& backup = std::nullopt, float* non_finite = nullptr,
             void* stream = nullptr) const {
    check(adalora_adapter_merge(get(), &params, scaling, fan_in_fan_out, &w, detail::address(backup), non_finite,
                                stream));
  }

  /// `params` may be `std::nullopt` where there is a backup.
  void unmerge(const std::optional<adalora_triplets_t>& params, double scaling, bool fan_in_fan_out,
               const adalora_matrix_t& w, const std::optional<adalora_matrix_t>& backup = std::nullopt,
               void* stream = nullptr) const {
    check(adalora_adapter_unmerge(get(), detail::address(params), scaling, fan_in_fan_out, &w, detail::address(backup),
                                  stream));
  }

 private:
  std::int64_t rank_;
  detail::Handle<adalora_adapter_t, adalora_adapter_destroy> handle_;
};

/// Bytes that a forward or backward call needs.
struct CallSizes {
  /// `h`, and as many for `g`, of each adapter.
  std::vector<std::size_t> saved;
  /// For the call as a whole; both directions.
  std::size_t workspace = 0;
};

/// Of the calls only the adapters need to be filled in.
inline CallSizes sizes(Span<Call> calls, std::int64_t tokens) {
  CallSizes result;
  result.saved.resize(static_cast<std::size_t>(calls.size()));
  check(
      adalora_adapter_sizes(calls.data(), sizeof(Call), calls.size(), tokens, result.saved.data(), &result.workspace));
  return result;
}

/// Adds the adapters' outputs to what the base layers left in `y`. `std::nullopt` for x in `ADALORA_STAGE_EXPAND` only.
inline void forward(Span<Call> calls, std::int32_t stages, const std::optional<adalora_matrix_t>& x, void* workspace,
                    std::size_t bytes, void* stream = nullptr) {
  check(adalora_adapter_forward(calls.data(), sizeof(Call), calls.size(), stages, detail::address(x), workspace, bytes,
                                stream));
}

/// `dx` is added to: the trainer puts the base layer's share there first. `std::nullopt` for a model's first layer.
inline void backward(Span<Call> calls, std::int32_t stages, bool accumulate, const std::optional<adalora_matrix_t>& x,
                     const std::optional<adalora_matrix_t>& dx, void* workspace, std::size_t bytes,
                     void* stream = nullptr) {
  check(adalora_adapter_backward(calls.data(), sizeof(Call), calls.size(), stages, accumulate, detail::address(x),
                                 detail::address(dx), workspace, bytes, stream));
}

// Allocator ----------------------------------------------------------------------------------------------------------

/// Bytes of the buffers that belong to an allocator.
struct AllocatorSizes {
  std::size_t state = 0;
  std::size_t workspace = 0;
  std::size_t gram = 0;
};

/// What the schedule sets for a step.
struct ScheduledBudget {
  std::int64_t budget = 0;
  /// Whether a mask falls on the step.
  bool masks = false;
};

/// Where a run stands.
struct Snapshot {
  /// Of every triplet, adapter by adapter: 1 where it is kept, else 0.
  std::vector<std::uint8_t> pattern;
  /// Of every adapter: triplets kept.
  std::vector<std::int64_t> ranks;
  /// Of every adapter: updates that AdamW applied.
  std::vector<std::int64_t> adam_steps;
  Report report;
};

/// Decides which triplets of a model are kept, and updates them.
class Allocator {
 public:
  /// `adapters` are all of the model's, in an order that every process shares; the descriptor's own list is not read.
  Allocator(Context& context, AllocatorDesc desc, const std::vector<std::reference_wrapper<const Adapter>>& adapters) {
    std::vector<const adalora_adapter_t*> handles;
    for (const Adapter& adapter : adapters) {
      handles.push_back(adapter.get());
      total_rank_ += adapter.rank();
    }
    desc.adapters = handles.data();
    desc.n_adapters = static_cast<std::int64_t>(handles.size());
    n_adapters_ = desc.n_adapters;
    adalora_allocator_t* handle = nullptr;
    check(adalora_allocator_create(context.get(), &desc, &handle));
    handle_.reset(handle);
  }

  /// The handle for the C interface, which stays this object's.
  adalora_allocator_t* get() const noexcept { return handle_.get(); }

  /// Triplets of all adapters: elements of a pattern, and of the scores.
  std::int64_t total_rank() const noexcept { return total_rank_; }

  AllocatorSizes sizes(std::int64_t n_slices) const {
    AllocatorSizes result;
    check(adalora_allocator_sizes(get(), n_slices, &result.state, &result.workspace, &result.gram));
    return result;
  }

  /// The buffers must outlive the binding; the descriptors need not. Without `hypers` AdamW cannot be asked for.
  void bind(void* state, void* workspace, Span<Slice> slices, Span<Hyper> hypers = {}, void* stream = nullptr) {
    check(adalora_allocator_bind(get(), state, workspace, slices.data(), sizeof(Slice), slices.size(), hypers.data(),
                                 sizeof(Hyper), hypers.size(), stream));
  }

  ScheduledBudget budget(std::int64_t step) const {
    ScheduledBudget result;
    std::int32_t masks = 0;
    check(adalora_allocator_budget(get(), step, &result.budget, &masks));
    result.masks = masks != 0;
    return result;
  }

  /// Needed by trainers that shard parameters; others let `orthogonality` compute them.
  void gram(double* gram, void* stream = nullptr) const { check(adalora_allocator_gram(get(), gram, stream)); }

  /// The penalty is part of no loss that the trainer computed: add `value` where the total is wanted.
  void orthogonality(const double* gram, double weight, const double* factor = nullptr, double* value = nullptr,
                     void* stream = nullptr) const {
    check(adalora_allocator_orthogonality(get(), gram, weight, factor, value, stream));
  }

  /// Set both results to 0 at the beginning of a step.
  void gradient_norm(const std::uint8_t* has_grad, double* sum_of_squares, float* found_inf = nullptr,
                     void* stream = nullptr) const {
    check(adalora_allocator_gradient_norm(get(), has_grad, sum_of_squares, found_inf, stream));
  }

  /// The first part of `step`, for trainers that reduce scores over processes.
  void update(const Step& step, bool with_adamw, void* stream = nullptr) {
    check(adalora_allocator_update(get(), &step, with_adamw, stream));
  }

  /// The second part of `step`. `scores` receives `total_rank()` values.
  void scores(double* scores, void* stream = nullptr) const { check(adalora_allocator_scores(get(), scores, stream)); }

  /// The third part of `step`.
  void select(const Step& step, const double* scores = nullptr, void* stream = nullptr) {
    check(adalora_allocator_select(get(), &step, scores, stream));
  }

  /// The end of every training step: update, scores and selection.
  void step(const Step& step, bool with_adamw, void* stream = nullptr) {
    check(adalora_allocator_step(get(), &step, with_adamw, stream));
  }

  /// For a run that ends before its schedule does.
  void finalize(const double* scores = nullptr, void* stream = nullptr) {
    check(adalora_allocator_finalize(get(), scores, stream));
  }

  void reset(void* stream = nullptr) { check(adalora_allocator_reset(get(), stream)); }

  /// Processes compare it to prove that they keep the same triplets.
  void digest(std::uint64_t* digest, void* stream = nullptr) const {
    check(adalora_allocator_digest(get(), digest, stream));
  }

  Snapshot read_sync(void* stream = nullptr) const {
    Snapshot result;
    result.pattern.resize(static_cast<std::size_t>(total_rank_));
    result.ranks.resize(static_cast<std::size_t>(n_adapters_));
    result.adam_steps.resize(static_cast<std::size_t>(n_adapters_));
    check(adalora_allocator_read_sync(get(), result.pattern.data(), result.ranks.data(), result.adam_steps.data(),
                                      &result.report, stream));
    return result;
  }

  /// `pattern` has `total_rank()` elements, in the backend's memory.
  void set_pattern(const std::uint8_t* pattern, bool is_final, void* stream = nullptr) {
    check(adalora_allocator_set_pattern(get(), pattern, is_final, stream));
  }

  /// For moments that another optimiser made: how many updates led to each adapter's. One element for each adapter, on
  /// the host.
  void set_adam_steps_sync(const std::int64_t* adam_steps, void* stream = nullptr) {
    check(adalora_allocator_set_adam_steps_sync(get(), adam_steps, stream));
  }

  /// Hands the run over to `compacted`: bound, over adapters of the ranks that are left.
  void compact_sync(Allocator& compacted, void* stream = nullptr) const {
    check(adalora_allocator_compact_sync(get(), compacted.get(), stream));
  }

  std::vector<std::byte> save_state_sync(void* stream = nullptr) const {
    std::size_t size = 0;
    check(adalora_allocator_save_state_sync(get(), nullptr, &size, stream));
    std::vector<std::byte> bytes(size);
    check(adalora_allocator_save_state_sync(get(), bytes.data(), &size, stream));
    return bytes;
  }

  /// The bytes need not be trusted: damage throws, and leaves the state as it was.
  void load_state_sync(const std::vector<std::byte>& bytes, void* stream = nullptr) {
    check(adalora_allocator_load_state_sync(get(), bytes.data(), bytes.size(), stream));
  }

 private:
  std::int64_t n_adapters_ = 0;
  std::int64_t total_rank_ = 0;
  detail::Handle<adalora_allocator_t, adalora_allocator_destroy> handle_;
};

// Checkpoint ---------------------------------------------------------------------------------------------------------

/// Adapters in PEFT's files, and training state beside them. An object is one that is read; writing needs none. It reads
/// AdaLoRA's files alone: folders of `export_lora` are LoRA's, and are refused.
class Checkpoint {
 public:
  explicit Checkpoint(const std::string& folder, std::int32_t files = ADALORA_FILES_ADAPTER) {
    detail::require_abi_version(adalora_abi_version());
    adalora_checkpoint_t* handle = nullptr;
    check(adalora_checkpoint_open(folder.c_str(), files, &handle));
    handle_.reset(handle);
  }

  /// The descriptor says folder, configuration and the state's text; its own lists are not read.
  static void write(const CheckpointDesc& desc, Span<AdapterEntry> adapters, Span<Tensor> tensors = {},
                    Span<Tensor> state_tensors = {}) {
    const CheckpointDesc filled = with_lists(desc, adapters, tensors, state_tensors);
    check(adalora_checkpoint_write(&filled));
  }

  /// Likewise.
  static void export_lora(const CheckpointDesc& desc, Span<AdapterEntry> adapters, Span<Tensor> tensors = {}) {
    const CheckpointDesc filled = with_lists(desc, adapters, tensors, {});
    check(adalora_checkpoint_export_lora(&filled));
  }

  /// The handle for the C interface, which stays this object's.
  adalora_checkpoint_t* get() const noexcept { return handle_.get(); }

  /// The configuration, or the state's text.
  std::string text(std::int32_t files) const {
    std::size_t bytes = 0;
    check(adalora_checkpoint_text(get(), files, nullptr, &bytes));
    std::string text(bytes, '\0');
    check(adalora_checkpoint_text(get(), files, text.data(), &bytes));
    text.resize(bytes - 1);
    return text;
  }

  /// All adapters, in the order of their indices. What they point to lives as long as this object.
  std::vector<AdapterInfo> adapters() const {
    std::int64_t n = 0;
    check(adalora_checkpoint_sizes(get(), ADALORA_FILES_ADAPTER, &n, nullptr));
    std::vector<AdapterInfo> result(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      check(adalora_checkpoint_adapter(get(), i, &result[static_cast<std::size_t>(i)]));
    }
    return result;
  }

  /// The room decides whether all triplets come or those of the file.
  void read_adapter(std::int64_t index, const adalora_triplets_t& params) const {
    check(adalora_checkpoint_read_adapter(get(), index, &params));
  }

  /// All tensors of the files that belong to no adapter, in the order of their indices. What they point to lives as
  /// long as this object.
  std::vector<Tensor> tensors(std::int32_t files) const {
    std::int64_t n = 0;
    check(adalora_checkpoint_sizes(get(), files, nullptr, &n));
    std::vector<Tensor> result(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
      check(adalora_checkpoint_tensor(get(), files, i, &result[static_cast<std::size_t>(i)]));
    }
    return result;
  }

  /// `bytes` are the tensor's.
  void read_tensor(std::int32_t files, std::int64_t index, void* data, std::size_t bytes) const {
    check(adalora_checkpoint_read_tensor(get(), files, index, data, bytes));
  }

 private:
  static CheckpointDesc with_lists(CheckpointDesc desc, Span<AdapterEntry> adapters, Span<Tensor> tensors,
                                   Span<Tensor> state_tensors) {
    desc.adapters = adapters.data(), desc.adapter_stride = sizeof(AdapterEntry), desc.n_adapters = adapters.size();
    desc.tensors = tensors.data(), desc.tensor_stride = sizeof(Tensor), desc.n_tensors = tensors.size();
    desc.state_tensors = state_tensors.data(), desc.state_tensor_stride = sizeof(Tensor);
    desc.n_state_tensors = state_tensors.size();
    return desc;
  }

  detail::Handle<adalora_checkpoint_t, adalora_checkpoint_destroy> handle_;
};

}  // namespace adalora

#endif  // ADALORA_HPP
