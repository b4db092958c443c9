#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "core.hpp"

extern "C" char** environ;

namespace software_cuda {
namespace {

// The environment's, or the one beside this library.
std::string program() {
  if (const char* given = getenv("SOFTWARE_CUDA_DEVICE"); given != nullptr && *given != '\0') return given;
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&program), &info);
  const std::string library = info.dli_fname;
  return library.substr(0, library.rfind('/') + 1) + "software_cuda_device";
}

}  // namespace

Process::Process(uint64_t window, uint64_t bytes) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) refuse(cudaErrorUnknown, "socketpair");
  socket_ = pair[0];
  const int theirs = fcntl(pair[1], F_DUPFD_CLOEXEC, 10);  // not the number that it is to have there
  close(pair[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, theirs, 3);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none, usual;
  sigemptyset(&none);
  sigfillset(&usual);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &usual);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  const std::string path = program();
  std::string first = std::to_string(window), second = std::to_string(bytes);
  char* arguments[] = {const_cast<char*>(path.c_str()), first.data(), second.data(), nullptr};
  const int failed = posix_spawn(&pid_, path.c_str(), &actions, &attributes, arguments, environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  close(theirs);
  if (failed != 0) {
    pid_ = -1;
    refuse(cudaErrorUnknown, "cannot start " + path + ": " + strerror(failed));
  }
  for (;;) {
    protocol::KernelName next{};
    if (!receive(&next, sizeof next)) refuse(cudaErrorUnknown, path + " ended at its start");
    if (next.name_bytes == 0) break;
    std::string name(next.name_bytes, '\0');
    receive(name.data(), name.size());
    kernels_.push_back({name, next.argument_bytes});
  }
}

Process::~Process() {
  if (socket_ >= 0) close(socket_);
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
    }
  }
}

void Process::append(const protocol::Header& header, const void* record, size_t bytes, const std::string& name,
                     const void* extra) {
  const auto add = [&](const void* from, size_t count) {
    const char* at = static_cast<const char*>(from);
    unsent_.insert(unsent_.end(), at, at + count);
  };
  using protocol::Command;
  working_ |= header.command != Command::map && header.command != Command::unmap;
  add(&header, sizeof header);
  if (bytes > 0) add(record, bytes);
  add(name.data(), name.size());
  if (header.extra_bytes > 0) add(extra, header.extra_bytes);
  if (unsent_.size() > size_t(1) << 20) flush();
}

bool Process::flush() {
  for (size_t at = 0; at < unsent_.size();) {
    const ssize_t n = ::send(socket_, unsent_.data() + at, unsent_.size() - at, MSG_NOSIGNAL);
    if (n > 0)
      at += size_t(n);
    else if (errno != EINTR)
      return false;
  }
  unsent_.clear();
  return true;
}

bool Process::receive(void* to, size_t bytes) {
  for (size_t at = 0; at < bytes;) {
    const ssize_t n = ::recv(socket_, static_cast<char*>(to) + at, bytes - at, 0);
    if (n > 0)
      at += size_t(n);
    else if (n == 0 || errno != EINTR)
      return false;
  }
  return true;
}

// Takes the words, if there are any.
int Process::answer(std::string& words, void* to, size_t to_pitch, size_t width, size_t rows) {
  working_ = false;
  protocol::Answer head{};
  if (!flush() || !receive(&head, sizeof head)) {
    words = "the device's process has ended";
    return cudaErrorLaunchFailure;
  }
  if (head.error != 0) {
    words.resize(head.bytes);
    receive(words.data(), words.size());
  } else {
    for (size_t row = 0; row < rows; ++row) receive(static_cast<char*>(to) + row * to_pitch, width);
  }
  return head.error;
}

int Process::finish(std::string& words) {
  if (!working_) return 0;
  append({protocol::Command::finish, 0, 0}, nullptr, 0, "", nullptr);
  return answer(words, nullptr, 0, 0, 0);
}

int Process::read(const protocol::Read& record, const std::string& name, void* to, size_t to_pitch,
                  std::string& words) {
  send(protocol::Command::read, record, name);
  return answer(words, to, to_pitch, record.width, record.rows);
}

}  // namespace software_cuda
