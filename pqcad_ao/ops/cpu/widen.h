// Packed weights of a panel to signed bytes, as the products read them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace {

inline int read_bits(const uint8_t* row, int64_t bytes, int64_t index, int bits) {
  int64_t at = index * bits;
  int value = row[at >> 3];
  if ((at >> 3) + 1 < bytes) value |= row[(at >> 3) + 1] << 8;
  value = (value >> (at & 7)) & ((1 << bits) - 1);
  return value - ((value >> (bits - 1)) << bits);
}

// The greatest magnitude among widened weights, whole registers of them.
inline int magnitude(const int8_t* w, int64_t bytes) {
  Bytes least{};  // of the weights, and of what they are with the other sign
  for (int64_t k = 0; k < bytes; k += BYTES) {
    const Bytes v = load_bytes(w + k);
    least = min(least, min(v, all_bytes(0) - v));
  }
  alignas(BYTES) int8_t lanes[BYTES];
  store(lanes, least);
  return -*std::min_element(lanes, lanes + BYTES);
}

struct Halves {  // eight channels of one tap for a register of outputs: the even ones and the odd ones, as [LANES][4]
  Bytes of[2];
};

struct Widener {
  static constexpr int CHANNELS = 8 * LANES;  // that are widened at once: nibbles of a register
  const Problem& p;
  const Panel& panel;
  bool nibbles;

  Widener(const Problem& p, const Panel& panel) : p(p), panel(panel) {
    nibbles = p.bits == 4 && p.in_group() % 2 == 0;  // every row's nibbles of one tap begin in a byte of their own
    for (auto& part : p.parts) nibbles = nibbles && part.first % 2 == 0;
  }

  // Channels c ... c + 8 count of a part's tap, at most CHANNELS, for register j of outputs; zero beyond the part. Adds
  // each output's sum to `sums`.
  void widen(const Part& part, int64_t tap, int64_t c, int count, int j, Halves* to, Ints& sums) const {
    const int64_t in_row = tap * p.in_group() + (p.groups > 1 ? 0 : part.first) + c, left = part.length - c;
    const uint8_t* row[LANES];
    for (int l = 0; l < LANES; l++)
      row[l] = p.weight + (panel.first + std::min<int64_t>(j * LANES + l, panel.length - 1)) * p.row;
    if (nibbles) {
      const ByteMask have = first_bytes(left / 2);
      Bytes v[LANES];
      for (int l = 0; l < LANES; l++) {
        v[l] = load_bytes(row[l] + in_row / 2, have);
        prefetch(row[l] + LANES * p.row + in_row / 2);  // of the outputs that come next
      }
      transpose(v);
      for (int k = 0; k < count; k++) to[k].of[0] = low_nibbles(v[k]), to[k].of[1] = high_nibbles(v[k]);
    } else {
      for (int k = 0; k < count; k++) {
        alignas(BYTES) int8_t two[2][LANES][4];
        for (int l = 0; l < LANES; l++)
          for (int n = 0; n < 8; n++)
            two[n % 2][l][n / 2] = 8 * k + n < left ? read_bits(row[l], p.row, in_row + 8 * k + n, p.bits) : 0;
        for (int h = 0; h < 2; h++) to[k].of[h] = load_bytes(two[h]);
      }
    }
    Ints odd{}, even = sums;
    for (int k = 0; k < count; k++) {
      even = dot(even, all_bytes(1), to[k].of[0]);
      odd = dot(odd, all_bytes(1), to[k].of[1]);
    }
    sums = even + odd;
  }
};

}  // namespace
