// Linear layers whose activations stay in floating point: packed weights are read once, and widened in registers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "product.h"
#include "widen.h"

namespace {

// MR rows of x, (rows, padded) with zeros behind the channels, times a register of outputs.
template <int MR>
void weight_only_block(const Problem& p, const Panel& panel, const float* x, int64_t from) {
  const Part& part = p.parts[0];
  const Widener widener(p, panel);
  Halves some[LANES];
  Ints unread{};
  Floats sums[MR][2] = {};  // of the even channels and of the odd ones
  for (int64_t c = 0; c < part.padded; c += Widener::CHANNELS) {
    const int count = (int)std::min<int64_t>(LANES, (part.padded - c) / 8);
    widener.widen(part, 0, c, count, 0, some, unread);
    for (int k = 0; k < count; k++)
      PQCAD_UNROLL for (int n = 0; n < 8; n++) {
        const Floats w = byte_of_lanes(some[k].of[n % 2], n / 2);
        PQCAD_UNROLL for (int i = 0; i < MR; i++)
          sums[i][n % 2] = fma(w, all_floats(x[(from + i) * part.padded + c + 8 * k + n]), sums[i][n % 2]);
      }
  }
  const LaneMask lanes = panel.lanes(0);
  const Floats scale = load_floats(p.weight_scale + panel.first, lanes),
               bias = p.bias ? load_floats(p.bias + panel.first, lanes) : Floats{};
  for (int i = 0; i < MR; i++)
    store(p.output + (from + i) * p.O + panel.first, fma(sums[i][0] + sums[i][1], scale, bias), lanes);
}

// p.B rows of `input`, (B, C). Every row is summed in the same order, whatever others there are.
void weight_only(const Problem& p, const float* input) {
  const int64_t padded = p.parts[0].padded;
  float* x = activations.of<float>(p.B * padded);
  for (int64_t b = 0; b < p.B; b++)
    std::fill(std::copy_n(input + b * p.C, p.C, x + b * padded), x + (b + 1) * padded, 0.f);
  torch::stable::parallel_for(0, (p.O + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * LANES; first < std::min(end * LANES, p.O); first += LANES) {
      const Panel panel{0, first, std::min<int64_t>(LANES, p.O - first), 1};
      int64_t b = 0;
      for (; b + 4 <= p.B; b += 4) weight_only_block<4>(p, panel, x, b);
      for (; b < p.B; b++) weight_only_block<1>(p, panel, x, b);
    }
  });
}

}  // namespace
