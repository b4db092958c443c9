// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011), and the dropout
// mask made of it.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace support {

inline std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// Whether dropout keeps element (token, column) of the whole layer's input.
inline bool kept(uint64_t seed, uint64_t offset, int64_t token, int64_t column, double dropout) {
  const auto words = philox4x32_10({static_cast<uint32_t>(column / 4), static_cast<uint32_t>(token),
                                    static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)},
                                   {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return static_cast<double>(words[static_cast<size_t>(column % 4)]) >= std::nearbyint(dropout * 0x1p32);
}

}  // namespace support
