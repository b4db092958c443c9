// What the host process tells the device process, over a socket. Records follow each other; the device answers `read`
// and `finish` alone, and does nothing more once something failed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace protocol {

enum class Command : uint32_t { map, unmap, fill, copy, write, kernel, gemm, read, finish };

struct Header {
  Command command;
  uint32_t name_bytes;   // of the call that asked for it; the name follows the record
  uint64_t extra_bytes;  // a kernel's arguments, the bytes to write; they follow the name
};

// An allocation in pages of its own: what it leaves of them belongs to nobody.
struct Map {
  uint64_t pages, page_bytes, address, bytes;
};
struct Unmap {
  uint64_t address;
};
struct Fill {
  uint64_t address, pitch, width, rows;
  uint32_t byte, padding;
};
struct Copy {
  uint64_t from, from_pitch, to, to_pitch, width, rows;
};
// Rows of `width` bytes, one after another in the extra bytes.
struct Write {
  uint64_t to, to_pitch, width, rows;
};
struct Read {
  uint64_t from, from_pitch, width, rows;
};
struct Kernel {
  uint32_t number, grid[3], block[3], padding;
  uint64_t seed;
};

enum class Element : uint32_t { float64, float32, bfloat16, float16 };
enum class Rounding : uint32_t { none, tf32, bfloat16, float16 };
struct Operand {
  uint64_t address, stride;
  Element element;
  uint32_t transposed;
};
// Column-major, as cuBLAS has it.
struct Gemm {
  uint64_t m, n, k;
  Operand a, b, c;
  double alpha, beta;
  uint64_t alpha_address, beta_address;  // where they are read from the device
  Rounding rounding;
  uint32_t is_double;
};

// Words follow where there is an error; else what was read.
struct Answer {
  int32_t error;
  uint32_t padding;
  uint64_t bytes;
};

// At the start, once per kernel; the last one has no name.
struct KernelName {
  uint32_t name_bytes, argument_bytes;
};

}  // namespace protocol
