// Convolutions and linear layers as direct products over the taps of the kernel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "epilogue.h"
#include "product.h"
#include "widen.h"

namespace {

constexpr int64_t MANY_BLOCKS = 8;  // of TILE pixels, for which a thread widens all weights and reads what it wrote

struct PaddedInput {
  uint8_t* data;   // (B, H, W, padded) with their offset
  int64_t H, W;
  std::vector<int64_t> taps;  // where each of the kernel's begins, from its first
};

// Copies the rows [begin, end) of B * H, zeros around the image included.
void pad_input(const Problem& p, const PaddedInput& x, int64_t begin, int64_t end) {
  const Bytes offset = all_bytes(OFFSET);
  for (int64_t r = begin; r < end; r++) {
    const int64_t b = r / x.H, h = r % x.H - p.PH;
    uint8_t* row = x.data + r * x.W * p.padded;
    if (h < 0 || h >= p.H) {
      std::memset(row, OFFSET, x.W * p.padded);
      continue;
    }
    for (int64_t z = 0; z < x.W; z++, row += p.padded) {
      const int64_t c = z - p.PW;
      if (c < 0 || c >= p.W) {
        std::memset(row, OFFSET, p.padded);
        continue;
      }
      const int8_t* pixel = p.input + ((b * p.H + h) * p.W + c) * p.C;
      for (auto& part : p.parts)
        for (int64_t k = 0; k < part.padded; k += BYTES) {
          const Bytes v = load_bytes(pixel + part.first + k, first_bytes(part.length - k));
          store(row + part.offset + k, even_first(v + offset), first_bytes(part.padded - k));
        }
    }
  }
}

// Weights of the parts [from, to) as [part][tap][c/4][width][LANES][4], and comp[part][columns], what the offset of the
// activations adds to every sum.
void widen_direct(const Problem& p, const Panel& panel, int64_t from, int64_t to, int8_t* w, int32_t* comp) {
  Widener widener(p, panel);
  Halves some[LANES];
  for (int64_t s = from; s < to; s++, comp += panel.columns()) {
    Ints sums[WIDEST] = {};
    for (int64_t tap = 0; tap < p.KH * p.KW; tap++)
      for (int64_t c = 0; c < p.parts[s].padded; c += Widener::CHANNELS) {
        const int count = (int)std::min<int64_t>(LANES, (p.parts[s].padded - c) / 8);
        for (int j = 0; j < panel.width; j++) {
          widener.widen(p.parts[s], tap, c, count, j, some, sums[j]);
          for (int k = 0; k < 2 * count; k++) store(w + (k * panel.width + j) * BYTES, some[k / 2].of[k % 2]);
        }
        w += 2 * count * panel.width * BYTES;
      }
    for (int j = 0; j < panel.width; j++) store(comp + j * LANES, sums[j] * all_ints(OFFSET));
  }
}

// Outputs of the pixels [from, to) of the batch.
template <int NR, bool DOT>
void direct_block(const Problem& p, const Panel& panel, const PaddedInput& x, const int8_t* w, const int32_t* comp,
                  int64_t from, int64_t to) {
  constexpr int MR = rows_of<NR>();
  const int64_t pixels = p.OH * p.OW, taps = (int64_t)x.taps.size(), first = p.groups > 1 ? panel.group : 0,
                last = p.groups > 1 ? panel.group + 1 : (int64_t)p.parts.size();
  alignas(BYTES) int32_t sums[MR * NR * LANES];
  alignas(BYTES) float between[MR * NR * LANES];
  for (int64_t q = from; q < to; q += MR) {
    const uint8_t* base[MR];
    int64_t sample[MR], b = q / pixels, y = q % pixels / p.OW, z = q % p.OW;
    const int used = (int)std::min<int64_t>(MR, to - q);
    for (int i = 0; i < MR; i++) {  // the last one again, where there are no more
      sample[i] = b;
      base[i] = x.data + ((b * x.H + y * p.SH) * x.W + z * p.SW) * p.padded;
      if (i + 1 >= used || ++z < p.OW) continue;
      z = 0;
      if (++y == p.OH) y = 0, b++;
    }
    const int8_t* of_part = w;
    for (int64_t s = first; s < last; s++) {
      const Part& part = p.parts[s];
      const uint8_t* rows[MR];
      for (int i = 0; i < MR; i++) rows[i] = base[i] + part.offset;
      product<MR, NR, DOT>(rows, x.taps.data(), taps, part.padded, of_part, sums);
      of_part += taps * part.padded * NR * LANES;
      for (int j = 0; j < NR; j++) {
        Epilogue put(p, panel, j, s - first);
        const Ints offset = load_ints(comp + ((s - first) * NR + j) * LANES);
        for (int i = 0; i < used; i++) {
          put.of_sample(sample[i]);
          put(load_ints(sums + (i * NR + j) * LANES) - offset, q + i, between + (i * NR + j) * LANES);
        }
      }
    }
  }
}

// A panel's outputs for blocks [first, last) of TILE pixels.
void of_panel(const Problem& p, const Panel& panel, const PaddedInput& x, int64_t first, int64_t last) {
  const int64_t from = p.groups > 1 ? panel.group : 0, to = p.groups > 1 ? panel.group + 1 : (int64_t)p.parts.size();
  int64_t depth = 0;
  for (int64_t s = from; s < to; s++) depth += p.parts[s].padded;
  int8_t* w = weights.of<int8_t>(depth * p.KH * p.KW * panel.columns());
  int32_t* comp = sums.of<int32_t>((to - from) * panel.columns());
  widen_direct(p, panel, from, to, w, comp);
  const int64_t end = std::min(last * TILE, p.B * p.OH * p.OW);
  with_width(panel.width, [&](auto width) {
    with_dot(1 << (p.bits - 1), [&](auto dot) { direct_block<width, dot>(p, panel, x, w, comp, first * TILE, end); });
  });
  finish_streams();
}

void direct(const Problem& p) {
  PaddedInput x{nullptr, std::max((p.OH - 1) * p.SH + (p.KH - 1) * p.DH + 1, p.H + p.PH),
                std::max((p.OW - 1) * p.SW + (p.KW - 1) * p.DW + 1, p.W + p.PW), {}};
  x.data = activations.of<uint8_t>(p.B * x.H * x.W * p.padded);
  for (int64_t tap = 0; tap < p.KH * p.KW; tap++)
    x.taps.push_back((tap / p.KW * p.DH * x.W + tap % p.KW * p.DW) * p.padded);
  torch::stable::parallel_for(0, p.B * x.H, 1, [&](int64_t begin, int64_t end) { pad_input(p, x, begin, end); });
  const auto panels = panels_of(p);
  const int64_t blocks = (p.B * p.OH * p.OW + TILE - 1) / TILE;
  if (blocks >= MANY_BLOCKS * torch::stable::get_num_threads())
    return torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (auto& panel : panels) of_panel(p, panel, x, begin, end);
    });
  torch::stable::parallel_for(0, (int64_t)panels.size() * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t next, task = begin; task < end; task = next) {
      const int64_t first = task / blocks * blocks;
      next = std::min(end, first + blocks);
      of_panel(p, panels[task / blocks], x, task - first, next - first);
    }
  });
}

}  // namespace
