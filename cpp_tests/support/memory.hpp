// The caller's memory on a backend: buffers, and matrices with gaps between their rows, that notice a stray write.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "dense.hpp"
#include "elements.hpp"

namespace support {

using Bytes = std::vector<unsigned char>;

// In gaps and around buffers: a NaN in every element type, so that what reads it shows in the result.
constexpr unsigned char canary = 0xff;

class Buffer {
 public:
  Buffer(Backend& backend, size_t bytes, unsigned char fill = canary)
      : backend_(&backend),
        bytes_(bytes),
        memory_(static_cast<unsigned char*>(backend.allocate(margin + bytes + margin))) {
    backend.fill(memory_, canary, margin + bytes + margin);
    if (fill != canary) backend.fill(memory_ + margin, fill, bytes);
  }
  Buffer(Buffer&& other) noexcept
      : backend_(other.backend_), bytes_(other.bytes_), memory_(std::exchange(other.memory_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(bytes_, other.bytes_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Buffer() {
    if (memory_ == nullptr) return;
    try {
      Bytes around(2 * margin);
      backend_->download(around.data(), memory_, margin);
      backend_->download(around.data() + margin, memory_ + margin + bytes_, margin);
      for (unsigned char byte : around) EXPECT_EQ(byte, canary) << "a write beside a buffer of " << bytes_ << " bytes";
      backend_->release(memory_);
    } catch (const std::exception& error) {
      ADD_FAILURE() << "at the end of a buffer of " << bytes_ << " bytes: " << error.what();
    }
  }

  void* data() const { return memory_ + margin; }
  size_t size() const { return bytes_; }
  Bytes read() const {
    Bytes bytes(bytes_);
    backend_->download(bytes.data(), data(), bytes_);
    return bytes;
  }
  void write(const Bytes& bytes) { backend_->upload(data(), bytes.data(), bytes.size()); }

 private:
#if ADALORA_SANITIZE
  static constexpr size_t margin = 0;  // AddressSanitizer's own margins also notice what is only read
#else
  static constexpr size_t margin = 64;
#endif

  Backend* backend_;
  size_t bytes_;
  unsigned char* memory_;
};

// One value in the backend's memory.
template <class T>
class Value {
 public:
  explicit Value(Backend& backend, T value = T{}) : buffer_(backend, sizeof(T)) { set(value); }

  T* data() const { return static_cast<T*>(buffer_.data()); }
  T get() const {
    T value;
    std::memcpy(&value, buffer_.read().data(), sizeof value);
    return value;
  }
  void set(T value) {
    Bytes bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    buffer_.write(bytes);
  }
  Bytes bytes() const { return buffer_.read(); }
  void write(const Bytes& bytes) { buffer_.write(bytes); }

 private:
  Buffer buffer_;
};

// Several values without gaps.
template <class T>
class Values {
 public:
  Values(Backend& backend, size_t count) : count_(count), buffer_(backend, count * sizeof(T)) {}
  Values(Backend& backend, const std::vector<T>& values) : Values(backend, values.size()) { set(values); }

  T* data() const { return static_cast<T*>(buffer_.data()); }
  std::vector<T> get() const {
    std::vector<T> values(count_);
    const Bytes bytes = buffer_.read();
    if (count_ > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  void set(const std::vector<T>& values) {
    Bytes bytes(values.size() * sizeof(T));
    if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    buffer_.write(bytes);
  }

 private:
  size_t count_;
  Buffer buffer_;
};

// A row-major matrix; the last row ends the buffer.
class Tensor {
 public:
  Tensor(Backend& backend, adalora_dtype_t type, int64_t rows, int64_t columns, int64_t gap = 0)
      : type_(type),
        rows_(rows),
        columns_(columns),
        stride_(columns + gap),
        buffer_(backend,
                rows == 0 || columns == 0 ? 0 : static_cast<size_t>((rows - 1) * stride_ + columns) * size_of(type)) {}
  Tensor(Backend& backend, adalora_dtype_t type, const Dense<double>& values, int64_t gap = 0)
      : Tensor(backend, type, values.rows, values.columns, gap) {
    set(values);
  }

  // Rounds to the element type; gaps stay as they are.
  void set(const Dense<double>& values) {
    Bytes bytes = stride_ == columns_ ? Bytes(buffer_.size()) : buffer_.read();
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < columns_; ++j) store(bytes.data() + place(i, j), values(i, j), type_);
    buffer_.write(bytes);
  }

  Dense<double> get() const {
    const Bytes bytes = buffer_.read();
    Dense<double> values(rows_, columns_);
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < columns_; ++j) values(i, j) = load(bytes.data() + place(i, j), type_);
    return values;
  }

  Bytes bytes() const { return buffer_.read(); }
  void write(const Bytes& bytes) { buffer_.write(bytes); }

  bool gaps_untouched() const {
    const Bytes bytes = buffer_.read();
    for (int64_t i = 0; i + 1 < rows_ && columns_ > 0; ++i)
      for (size_t at = place(i, columns_); at < place(i + 1, 0); ++at)
        if (bytes[at] != canary) return false;
    return true;
  }

  adalora_matrix_t matrix() const { return columns(0, columns_); }

  // The columns [first, first + count) of every row.
  adalora_matrix_t columns(int64_t first, int64_t count) const {
    return {element(0, first), rows_, count, stride_, type_, 0};
  }

  void* data() const { return buffer_.data(); }
  void* element(int64_t row, int64_t column) const {
    return static_cast<unsigned char*>(buffer_.data()) + place(row, column);
  }
  adalora_dtype_t type() const { return type_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

 private:
  size_t place(int64_t row, int64_t column) const {
    return static_cast<size_t>(row * stride_ + column) * size_of(type_);
  }

  adalora_dtype_t type_;
  int64_t rows_, columns_, stride_;
  Buffer buffer_;
};

}  // namespace support
