// The device: a process of its own that holds the device's memory at the addresses that the host hands out, and runs
// kernels, matrix products, copies and fills one after another.

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "fibers.hpp"
#include "protocol.hpp"

namespace {

using namespace protocol;

constexpr int channel = 3;  // a file descriptor that the host process gives

constexpr int illegal_address = 700, misaligned_address = 716, launch_failure = 719;
constexpr unsigned char unset = 0xff;  // a NaN in every type of element
constexpr uint64_t page = 4096;

uint64_t window, window_bytes;  // where the memory lies
int error = 0;
std::string text, doing;
sigjmp_buf main_loop;
std::map<uint64_t, Map> allocations;
std::vector<const host::Kernel*> kernels;

void fail(int code, const std::string& what) {
  error = code;
  text = what;
}

[[noreturn]] void quit(const char* what) {
  fprintf(stderr, "software CUDA's device: %s: errno %d\n", what, errno);
  _exit(1);
}

// False where the host process has gone.
bool read_all(void* to, size_t bytes) {
  static char waiting[64 << 10];
  static size_t begin = 0, end = 0;
  for (size_t at = 0; at < bytes;) {
    if (begin < end) {
      const size_t count = std::min(bytes - at, end - begin);
      memcpy(static_cast<char*>(to) + at, waiting + begin, count);
      begin += count;
      at += count;
      continue;
    }
    const ssize_t n = read(channel, waiting, sizeof waiting);
    if (n == 0 || (n < 0 && errno != EINTR)) return false;
    begin = 0;
    end = n > 0 ? size_t(n) : 0;
  }
  return true;
}

void write_all(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes;) {
    const ssize_t n = write(channel, static_cast<const char*>(from) + at, bytes - at);
    if (n > 0)
      at += size_t(n);
    else if (errno != EINTR)
      _exit(0);
  }
}

char* pointer(uint64_t address) { return reinterpret_cast<char*>(address); }

std::string hexadecimal(uint64_t address) {
  char digits[24];
  snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(address));
  return digits;
}

std::string neighbour(uint64_t address) {
  if (address - window >= window_bytes) return ", outside the device's memory";
  auto next = allocations.upper_bound(address);
  std::string words;
  if (next != allocations.begin()) {
    const Map& before = std::prev(next)->second;
    words += ", " + std::to_string(address - before.address) + " bytes past the start of an allocation of " +
             std::to_string(before.bytes);
  }
  if (next != allocations.end())
    words +=
        ", " + std::to_string(next->first - address) + " bytes before one of " + std::to_string(next->second.bytes);
  return words;
}

void on_signal(int number, siginfo_t* info, void*) {
  const uint64_t address = reinterpret_cast<uint64_t>(info->si_addr);
  const std::string where = " (" + fibers::here() + ")";
  switch (number) {
    case SIGSEGV:
    case SIGBUS:
      fail(illegal_address, doing + ": no access to " + hexadecimal(address) + neighbour(address) + where);
      break;
    case SIGFPE:
      fail(launch_failure, doing + ": an integer divided by zero" + where);
      break;
    default:
      fail(misaligned_address, doing + ": undefined behaviour, see above" + where);
  }
  siglongjmp(main_loop, 1);
}

void catch_signals() {
  static char stack[64 << 10];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigaction(number, &action, nullptr);
}

// Pages in which nothing is set: memory begins as copies of them, made where somebody writes.
constexpr uint64_t unset_bytes = 2 << 20;
int unset_file;
const char* unset_pages;

void make_unset_pages() {
  unset_file = memfd_create("unset", 0);
  if (unset_file < 0 || ftruncate(unset_file, unset_bytes) != 0) quit("memfd_create");
  void* at = mmap(nullptr, unset_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, unset_file, 0);
  if (at == MAP_FAILED) quit("mmap");
  memset(at, unset, unset_bytes);
  unset_pages = static_cast<const char*>(at);
}

// Whether somebody wrote beside an allocation, in its own pages.
void check_margins(const Map& map) {
  const uint64_t before = map.address - map.pages, after = map.page_bytes - before - map.bytes;
  if (memcmp(pointer(map.pages), unset_pages, before) != 0)
    fail(illegal_address,
         doing + ": something was written before an allocation of " + std::to_string(map.bytes) + " bytes");
  if (memcmp(pointer(map.address + map.bytes), unset_pages, after) != 0)
    fail(illegal_address,
         doing + ": something was written past the end of an allocation of " + std::to_string(map.bytes) + " bytes");
}

void unset_all(uint64_t pages, uint64_t bytes) {
  for (uint64_t at = 0; at < bytes; at += unset_bytes)
    if (mmap(pointer(pages + at), std::min(unset_bytes, bytes - at), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
             unset_file, 0) == MAP_FAILED)
      quit("mmap of an allocation");
}

void run(const Map& map) {
  unset_all(map.pages, map.page_bytes);
  allocations[map.address] = map;
}

void run(const Unmap& unmap) {
  const Map map = allocations.at(unmap.address);
  check_margins(map);
  allocations.erase(unmap.address);
  if (mmap(pointer(map.pages), map.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
           0) == MAP_FAILED)
    quit("mmap of what was freed");
}

void run(const Fill& fill) {
  // What is large costs less as pages that nobody has written to.
  if (fill.byte == unset && fill.rows == 1 && fill.width >= unset_bytes) {
    const uint64_t first = (fill.address + page - 1) / page * page, last = (fill.address + fill.width) / page * page;
    memset(pointer(fill.address), unset, first - fill.address);
    unset_all(first, last - first);
    memset(pointer(last), unset, fill.address + fill.width - last);
    return;
  }
  for (uint64_t row = 0; row < fill.rows; ++row)
    memset(pointer(fill.address + row * fill.pitch), int(fill.byte), fill.width);
}

void run(const Copy& copy) {
  for (uint64_t row = 0; row < copy.rows; ++row)
    memmove(pointer(copy.to + row * copy.to_pitch), pointer(copy.from + row * copy.from_pitch), copy.width);
}

void run(const Write& write, const std::vector<char>& bytes) {
  for (uint64_t row = 0; row < write.rows; ++row)
    memcpy(pointer(write.to + row * write.to_pitch), &bytes[row * write.width], write.width);
}

void run(const Read& read, std::vector<char>& bytes) {
  bytes.resize(read.width * read.rows);
  for (uint64_t row = 0; row < read.rows; ++row)
    memcpy(&bytes[row * read.width], pointer(read.from + row * read.from_pitch), read.width);
}

void answer(const void* bytes, size_t count) {
  const Answer head{error, 0, error != 0 ? text.size() : count};
  write_all(&head, sizeof head);
  if (error != 0)
    write_all(text.data(), text.size());
  else
    write_all(bytes, count);
}

void run(const Kernel& launch, const std::vector<char>& args) {
  std::vector<double> aligned((args.size() + 31) / 8);  // room to lie on 16 bytes, as a kernel's parameters do
  char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(aligned.data()) + 15) & ~uintptr_t(15));
  memcpy(at, args.data(), args.size());
  const uint3 grid{launch.grid[0], launch.grid[1], launch.grid[2]};
  const uint3 block{launch.block[0], launch.block[1], launch.block[2]};
  if (!fibers::run(*kernels[launch.number], grid, block, at, launch.seed)) {
    fail(launch_failure, doing + ": " + fibers::problem());
    return;
  }
  for (const auto& [address, map] : allocations) check_margins(map);
}

uint16_t to_bfloat16(float x) {
  const uint32_t bits = host::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
float from_bfloat16(uint16_t x) { return host::bit_cast<float>(uint32_t(x) << 16); }

// Ten bits of mantissa, to the nearest.
float to_tf32(float x) {
  const uint32_t bits = host::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return host::bit_cast<float>((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
}

template <class T>
T load(Element element, uint64_t matrix, uint64_t at) {
  const char* from = pointer(matrix);
  switch (element) {
    case Element::float64:
      return T(reinterpret_cast<const double*>(from)[at]);
    case Element::float32:
      return T(reinterpret_cast<const float*>(from)[at]);
    case Element::bfloat16:
      return T(from_bfloat16(reinterpret_cast<const uint16_t*>(from)[at]));
    case Element::float16:
      return T(host::half_to_float(reinterpret_cast<const uint16_t*>(from)[at]));
  }
  abort();
}

template <class T>
void store(Element element, uint64_t matrix, uint64_t at, T value) {
  char* to = pointer(matrix);
  switch (element) {
    case Element::float64:
      reinterpret_cast<double*>(to)[at] = double(value);
      break;
    case Element::float32:
      reinterpret_cast<float*>(to)[at] = float(value);
      break;
    case Element::bfloat16:
      reinterpret_cast<uint16_t*>(to)[at] = to_bfloat16(float(value));
      break;
    case Element::float16:
      reinterpret_cast<uint16_t*>(to)[at] = host::float_to_half(float(value));
      break;
  }
}

template <class T>
T rounded(T value, Rounding rounding) {
  switch (rounding) {
    case Rounding::none:
      return value;
    case Rounding::tf32:
      return T(to_tf32(float(value)));
    case Rounding::bfloat16:
      return T(from_bfloat16(to_bfloat16(float(value))));
    case Rounding::float16:
      return T(host::half_to_float(host::float_to_half(float(value))));
  }
  abort();
}

// [rows, columns] of op(operand), column after column.
template <class T>
std::vector<T> gather(const Operand& operand, uint64_t rows, uint64_t columns, Rounding rounding) {
  std::vector<T> values(rows * columns);
  for (uint64_t j = 0; j < columns; ++j)
    for (uint64_t i = 0; i < rows; ++i) {
      const uint64_t at = operand.transposed != 0 ? j + i * operand.stride : i + j * operand.stride;
      values[i + j * rows] = rounded(load<T>(operand.element, operand.address, at), rounding);
    }
  return values;
}

// Sums in the order of k, and rounds once at the end.
template <class T>
void multiply(const Gemm& g) {
  const T alpha = g.alpha_address != 0 ? *reinterpret_cast<const T*>(pointer(g.alpha_address)) : T(g.alpha);
  const T beta = g.beta_address != 0 ? *reinterpret_cast<const T*>(pointer(g.beta_address)) : T(g.beta);
  const uint64_t k = alpha == T(0) ? 0 : g.k;  // then neither a nor b is read
  const std::vector<T> a = gather<T>(g.a, g.m, k, g.rounding), b = gather<T>(g.b, k, g.n, g.rounding);
  std::vector<T> sums(g.m);
  for (uint64_t j = 0; j < g.n; ++j) {
    std::fill(sums.begin(), sums.end(), T(0));
    for (uint64_t p = 0; p < k; ++p) {
      const T factor = b[p + j * k];
      const T* column = &a[p * g.m];
      for (uint64_t i = 0; i < g.m; ++i) sums[i] += column[i] * factor;
    }
    for (uint64_t i = 0; i < g.m; ++i) {
      const uint64_t at = i + j * g.c.stride;
      T value = k == 0 ? T(0) : alpha * sums[i];
      if (beta != T(0)) value += beta * load<T>(g.c.element, g.c.address, at);
      store(g.c.element, g.c.address, at, value);
    }
  }
}

void run(const Gemm& g) {
  if (g.is_double != 0)
    multiply<double>(g);
  else
    multiply<float>(g);
}

// A record, with what follows it.
template <class T>
bool take(const Header& header, T& record, std::vector<char>& extra) {
  doing.resize(header.name_bytes);
  extra.resize(header.extra_bytes);
  return read_all(&record, sizeof record) && read_all(doing.data(), doing.size()) &&
         read_all(extra.data(), extra.size());
}

template <class T>
bool serve(const Header& header) {
  // Both outlive the jump out of a signal's handler.
  static T record;
  static std::vector<char> extra;
  if (!take(header, record, extra)) return false;
  if (error == 0 && sigsetjmp(main_loop, 1) == 0) {
    if constexpr (std::is_same_v<T, Kernel> || std::is_same_v<T, Write> || std::is_same_v<T, Read>)
      run(record, extra);
    else
      run(record);
  }
  if constexpr (std::is_same_v<T, Read>) answer(extra.data(), extra.size());
  return true;
}

void introduce() {
  for (const host::Kernel* kernel = fibers::kernels(); kernel != nullptr; kernel = kernel->next) {
    kernels.push_back(kernel);
    const KernelName name{uint32_t(strlen(kernel->name)), uint32_t(kernel->argument_bytes)};
    write_all(&name, sizeof name);
    write_all(kernel->name, name.name_bytes);
  }
  const KernelName last{0, 0};
  write_all(&last, sizeof last);
}

}  // namespace

// Where the memory begins, and how large it is.
int main(int argc, char** argv) {
  if (argc != 3) quit("two numbers expected");
  window = strtoull(argv[1], nullptr, 0);
  window_bytes = strtoull(argv[2], nullptr, 0);
  if (mmap(pointer(window), window_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE,
           -1, 0) != pointer(window))
    quit("mmap at the host's addresses");
  make_unset_pages();
  fibers::prepare();
  catch_signals();
  introduce();
  Header header;
  while (read_all(&header, sizeof header)) {
    bool more = true;
    switch (header.command) {
      case Command::map:
        more = serve<Map>(header);
        break;
      case Command::unmap:
        more = serve<Unmap>(header);
        break;
      case Command::fill:
        more = serve<Fill>(header);
        break;
      case Command::copy:
        more = serve<Copy>(header);
        break;
      case Command::write:
        more = serve<Write>(header);
        break;
      case Command::kernel:
        more = serve<Kernel>(header);
        break;
      case Command::gemm:
        more = serve<Gemm>(header);
        break;
      case Command::read:
        more = serve<Read>(header);
        break;
      case Command::finish:
        answer(nullptr, 0);
        break;
    }
    if (!more) break;
  }
  return 0;
}

// Checks of undefined behaviour in the kernels end in a signal, which says which thread it was.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_summary=0"; }
