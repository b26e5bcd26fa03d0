// What a product is asked for, how its outputs are cut into panels, and the memory that it works in.
//
// Activations are NHWC int8, carried as bytes with an offset (`OFFSET`); what the offset adds to a sum is the same for
// every pixel and is taken off again. Weights stay packed in memory: a panel of up to WIDEST registers of output channels
// is widened into scratch, is used for a chunk of the batch, and is forgotten. Nibbles leave their bytes as even and odd
// channels and are not interleaved again: in scratch, activations and weights hold the even ones of every eight channels
// and then the odd ones. Sums are exact 32-bit integers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "primitives.h"

// Here and in the other headers: a library keeps its kernels to itself, two of them may be in one process.
namespace {

struct Part {        // channels with a scale of their own (a segment), or the channels of a group
  int64_t first, length, padded, offset;  // in the input; padded to 8; where the padded ones begin in scratch
};

constexpr int64_t NEAR = 1 << 20;  // bytes that stay near a core, in its second level, beside what else it works on

struct Problem {
  const int8_t* input;   // (B, H, W, C)
  const uint8_t* weight; // (O, row) packed along (kh, kw, in)
  int64_t row;
  const float *weight_scale, *input_scale, *bias;
  const float* addend;
  int64_t addend_sample, addend_pixel;  // strides; the channel's is 1
  float* output;         // (B, OH, OW, O)
  int64_t B, H, W, C, O, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, groups;
  int bits, input_bits;  // of weights, and of inputs where the form of the product depends on it
  std::vector<Part> parts;
  int64_t padded;        // channels of all parts together, each padded
  int64_t in_group() const { return C / groups; }
  int64_t out_group() const { return O / groups; }
  int64_t segments() const { return groups > 1 ? 1 : (int64_t)parts.size(); }

  // Whether outputs are written past the cache: whole registers, and more of them than are there when they are read.
  bool streamed() const {
    return streams() && O % LANES == 0 && (uintptr_t)output % BYTES == 0 &&
           B * OH * OW * O * (int64_t)sizeof(float) > NEAR;
  }
};

struct Panel {  // output channels that are worked on together
  int64_t group, first, length;
  int width;  // registers
  int64_t columns() const { return width * LANES; }
  LaneMask lanes(int j) const { return first_lanes(length - j * LANES); }  // of its register j
};

std::vector<Panel> panels_of(const Problem& p) {
  int64_t registers = (p.out_group() + LANES - 1) / LANES, count = (registers + WIDEST - 1) / WIDEST;
  int64_t width = (registers + count - 1) / count;
  std::vector<Panel> panels;
  for (int64_t g = 0; g < p.groups; g++)
    for (int64_t o = 0; o < p.out_group(); o += width * LANES) {
      int64_t length = std::min(width * LANES, p.out_group() - o);
      panels.push_back({g, g * p.out_group() + o, length, (int)((length + LANES - 1) / LANES)});
    }
  return panels;
}

// Calls f with `width`, 1 to WIDEST, as a constant.
template <int N = WIDEST, class F> void with_width(int width, F&& f) {
  if constexpr (N > 1)
    if (width < N) return with_width<N - 1>(width, f);
  f(std::integral_constant<int, N>{});
}

constexpr int TILE = 48;  // Winograd tiles or pixels in a block: a multiple of every register block's rows

// Memory that a thread keeps for its next call: fresh pages for every layer would cost as much as the products.
class Scratch {
  std::unique_ptr<uint8_t[]> bytes;
  int64_t size = 0;

 public:
  template <class T> T* of(int64_t count) {
    const int64_t needed = count * (int64_t)sizeof(T) + 64;
    if (size < needed) {
      bytes.reset(), size = 0;  // should there be no memory, nothing is left
      bytes.reset(new uint8_t[needed]);
      size = needed;
    }
    return (T*)(((uintptr_t)bytes.get() + 63) & ~(uintptr_t)63);
  }
};
thread_local Scratch activations, weights, sums, products;

}  // namespace
