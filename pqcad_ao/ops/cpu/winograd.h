// Convolutions of 3x3 and stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray 2016) in 8-bit arithmetic, exactly.
//
// For weights of at most 4 bits and inputs of at most 6. With d of 6 bits, fifteen of the sixteen planes of B^T d B are
// differences and lie within [-126, 126]; the sixteenth is a sum of four values and lies within 252 of four times the
// least of them, which its own offset makes zero. With g of 4 bits, (2G) g (2G)^T lies within [-72, 72]; the result is
// four times the convolution, and a shift by two restores it without remainder.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "epilogue.h"
#include "product.h"
#include "widen.h"

namespace {

constexpr int64_t CHUNK = NEAR;  // bytes of transformed input that are kept at once
constexpr int64_t FEW = 8;  // tiles whose transform takes less time than a second thread's start
constexpr int64_t MANY = 128;  // tiles for which a thread widens all weights, and waits for no other
constexpr int MIDDLE = 5;  // the plane in row 1 and column 1 of the sixteen: sums alone, and it enters all four outputs

// Bytes from one of sixteen planes to the next: an odd number of lines of the cache, so that what belongs together in
// all of them does not meet in one set of lines, of which a power of two would make most.
constexpr int64_t apart(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }
inline int64_t input_plane(const Part& part) { return apart(TILE * part.padded); }
inline int64_t weight_plane(const Part& part, const Panel& panel) { return apart(part.padded * panel.columns()); }
inline int64_t product_plane(const Panel& panel) {  // in sums
  return apart(TILE * panel.columns() * (int64_t)sizeof(int32_t)) / (int64_t)sizeof(int32_t);
}

inline int64_t input_block(const Problem& p) {
  int64_t bytes = 0;
  for (auto& part : p.parts) bytes += 16 * input_plane(part);
  return bytes;
}

struct Tiles {  // of two by two outputs
  int64_t rows, columns;  // in an image
  const int32_t* middle;  // offset of the middle plane, [B][part]
};

// ------------------------------------------------------------------------------------------------- weights

// (2G) g (2G)^T
template <class T> inline void transform_weight(const T (&g)[9], T (&u)[16]) {
  T q[4][3];
  for (int k = 0; k < 3; k++) {
    const T ends = g[k] + g[6 + k];
    q[0][k] = g[k] + g[k], q[1][k] = ends + g[3 + k], q[2][k] = ends - g[3 + k], q[3][k] = g[6 + k] + g[6 + k];
  }
  for (int i = 0; i < 4; i++) {
    const T ends = q[i][0] + q[i][2];
    u[4 * i] = q[i][0] + q[i][0], u[4 * i + 1] = ends + q[i][1];
    u[4 * i + 2] = ends - q[i][1], u[4 * i + 3] = q[i][2] + q[i][2];
  }
}

// u[16][c/4][width][LANES][4] = (2G) g (2G)^T of one part, a plane `weight_plane` from the next, and comp[16][columns], its sum over the channels.
void widen_winograd(const Problem& p, const Panel& panel, const Part& part, int8_t* u, int32_t* comp) {
  Widener widener(p, panel);
  Halves some[9][LANES];
  const int64_t plane = weight_plane(part, panel);
  for (int j = 0; j < panel.width; j++) {
    Ints sums[9] = {}, of_plane[16];
    for (int64_t c = 0; c < part.padded; c += Widener::CHANNELS) {
      const int count = (int)std::min<int64_t>(LANES, (part.padded - c) / 8);
      for (int t = 0; t < 9; t++) widener.widen(part, t, c, count, j, some[t], sums[t]);
      for (int k = 0; k < 2 * count; k++) {
        Bytes g[9], row[16];
        for (int t = 0; t < 9; t++) g[t] = some[t][k / 2].of[k % 2];
        transform_weight(g, row);
        int8_t* to = u + ((c / 4 + k) * panel.width + j) * BYTES;
        for (int n = 0; n < 16; n++) store(to + n * plane, row[n]);
      }
    }
    transform_weight(sums, of_plane);
    for (int n = 0; n < 16; n++) store(comp + (n * panel.width + j) * LANES, of_plane[n]);
  }
}

// A^T comp A: what an offset of 1 in all planes adds to each of a tile's four outputs, as [4][columns], and what one in
// the middle plane adds to all of them.
void transform_offset(const Panel& panel, const int32_t* comp, int32_t* of_output) {
  const int64_t columns = panel.columns();
  for (int64_t c = 0; c < columns; c++) {
    int32_t e[2][4];
    for (int k = 0; k < 4; k++) {
      const int32_t m[4] = {comp[k * columns + c], comp[(4 + k) * columns + c], comp[(8 + k) * columns + c],
                            comp[(12 + k) * columns + c]};
      e[0][k] = m[0] + m[1] + m[2], e[1][k] = m[1] - m[2] - m[3];
    }
    for (int i = 0; i < 2; i++) {
      of_output[(2 * i) * columns + c] = e[i][0] + e[i][1] + e[i][2];
      of_output[(2 * i + 1) * columns + c] = e[i][1] - e[i][2] - e[i][3];
    }
    of_output[4 * columns + c] = comp[MIDDLE * columns + c];
  }
}

// -------------------------------------------------------------------------------------------------- inputs

// What brings the middle plane into the range of a byte, [B][part]: minus four times the least integer of a sample, or
// of the zeros around it. Up to 5 bits the offset of the other planes does.
std::vector<int32_t> middle_offsets(const Problem& p) {
  const int64_t parts = (int64_t)p.parts.size();
  std::vector<int32_t> offsets(p.B * parts, OFFSET);
  if (p.input_bits <= 5) return offsets;
  torch::stable::parallel_for(0, p.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t s = 0; s < parts; s++) {
        const Part& part = p.parts[s];
        Bytes least{};
        for (int64_t pixel = 0; pixel < p.H * p.W; pixel++) {
          const int8_t* from = p.input + (b * p.H * p.W + pixel) * p.C + part.first;
          for (int64_t k = 0; k < part.length; k += BYTES)
            least = min(least, load_bytes(from + k, first_bytes(part.length - k)));
        }
        alignas(BYTES) int8_t lanes[BYTES];
        store(lanes, least);
        offsets[b * parts + s] = OFFSET - 128 - 4 * *std::min_element(lanes, lanes + BYTES);
      }
  });
  return offsets;
}

// Input tiles B^T d B, with their offset, of tiles [from, to) behind `start`. v: blocks, each [part][16][TILE][padded], a
// plane `input_plane` from the next.
void transform_input(const Problem& p, const Tiles& tiles, int64_t start, int64_t from, int64_t to, uint8_t* v) {
  static const int8_t zeros[BYTES] = {};
  const Bytes offset = all_bytes(OFFSET);
  for (int64_t q = from; q < to; q++) {
    const int64_t t = start + q, b = t / (tiles.rows * tiles.columns);
    const int64_t y = t % (tiles.rows * tiles.columns) / tiles.columns * 2 - p.PH, x = t % tiles.columns * 2 - p.PW;
    const int8_t* pixel[16];
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) {
        const bool inside = y + i >= 0 && y + i < p.H && x + j >= 0 && x + j < p.W;
        pixel[i * 4 + j] = inside ? p.input + ((b * p.H + y + i) * p.W + x + j) * p.C : nullptr;
      }
    uint8_t* of_part = v + q / TILE * input_block(p);
    const int32_t* middle = tiles.middle + b * (int64_t)p.parts.size();
    for (auto& part : p.parts) {
      const Bytes of_middle = all_bytes(*middle++);
      for (int64_t k = 0; k < part.padded; k += BYTES) {
        const ByteMask have = first_bytes(part.length - k), want = first_bytes(part.padded - k);
        Bytes d[16], e[16];
        for (int n = 0; n < 16; n++)
          d[n] = even_first(load_bytes(pixel[n] ? pixel[n] + part.first + k : zeros, have));
        for (int j = 0; j < 4; j++) {
          e[j] = d[j] - d[8 + j], e[4 + j] = d[4 + j] + d[8 + j];
          e[8 + j] = d[8 + j] - d[4 + j], e[12 + j] = d[4 + j] - d[12 + j];
        }
        uint8_t* to = of_part + q % TILE * part.padded + k;
        const int64_t plane = input_plane(part);
        for (int i = 0; i < 4; i++) {
          const Bytes* r = e + i * 4;
          const Bytes f[4] = {r[0] - r[2], r[1] + r[2], r[2] - r[1], r[1] - r[3]};
          for (int j = 0; j < 4; j++)
            store(to + (i * 4 + j) * plane, f[j] + (i * 4 + j == MIDDLE ? of_middle : offset), want);
        }
      }
      of_part += 16 * input_plane(part);
    }
  }
}

// ------------------------------------------------------------------------------------------------- outputs

// The greatest magnitude that weights of plane n can have, or else do have. Of 4 bits it is 32 in the corners of the
// four by four planes, 48 along their sides and 72 between: so large is hardly a sum of nine weights.
inline int largest(const Problem& p, int n, const int8_t* w, int64_t bytes) {
  const auto sum = [](int row) { return row == 0 || row == 3 ? 2 : 3; };  // of the magnitudes in a row of 2G
  const int most = sum(n / 4) * sum(n % 4) << (p.bits - 1);
  return most <= DOT_WEIGHTS ? most : magnitude(w, bytes);
}

// m[tile][NR][LANES] for one of the sixteen planes; v: [TILE][K].
template <int NR, bool DOT>
void plane_product(const uint8_t* v, const int8_t* u, int64_t K, int64_t tiles, int32_t* m) {
  constexpr int MR = rows_of<NR>();
  const int64_t start = 0;
  for (int64_t q = 0; q < tiles; q += MR) {
    const uint8_t* rows[MR];
    for (int i = 0; i < MR; i++) rows[i] = v + (q + i) * K;
    product<MR, NR, DOT>(rows, &start, 1, K, u, m + q * NR * LANES);
  }
}

// Outputs of one segment of a block: A^T m A without what the offsets of the inputs added. between: [tile][4][columns],
// what the segments before it have summed up.
void transform_output(const Problem& p, const Panel& panel, const Tiles& tiles, const int32_t* m,
                      const int32_t* of_output, float* between, int64_t first, int64_t count, int64_t segment) {
  const int NR = panel.width;
  for (int j = 0; j < NR; j++) {
    Ints of_all[5], offset[4];
    for (int k = 0; k < 5; k++) of_all[k] = load_ints(of_output + (k * NR + j) * LANES);
    Epilogue put(p, panel, j, segment);
    int64_t sample = -1;
    for (int64_t q = 0; q < count; q++) {
      const int64_t t = first + q, b = t / (tiles.rows * tiles.columns);
      const int64_t y = t % (tiles.rows * tiles.columns) / tiles.columns * 2, x = t % tiles.columns * 2;
      const int32_t* at = m + (q * NR + j) * LANES;
      const int64_t plane = product_plane(panel);
      Ints e[2][4];
      for (int k = 0; k < 4; k++, at += plane) {
        const Ints m0 = load_ints(at), m1 = load_ints(at + 4 * plane), m2 = load_ints(at + 8 * plane),
                   m3 = load_ints(at + 12 * plane);
        e[0][k] = m0 + m1 + m2, e[1][k] = m1 - m2 - m3;
      }
      put.of_sample(b);
      if (b != sample) {
        sample = b;
        const Ints more = all_ints(tiles.middle[b * (int64_t)p.parts.size() + segment] - OFFSET);
        for (int k = 0; k < 4; k++) offset[k] = of_all[k] * all_ints(OFFSET) + of_all[4] * more;
      }
      for (int i = 0; i < 2 && y + i < p.OH; i++) {
        const int64_t pixel = (b * p.OH + y + i) * p.OW + x;
        float* kept = between + ((4 * q + 2 * i) * NR + j) * LANES;
        put((e[i][0] + e[i][1] + e[i][2] - offset[2 * i]) >> 2, pixel, kept);
        if (x + 1 < p.OW) put((e[i][1] - e[i][2] - e[i][3] - offset[2 * i + 1]) >> 2, pixel + 1, kept + NR * LANES);
      }
    }
  }
}

// Outputs of tiles [first, last): threads share out the panels, whose weights each of them widens.
void of_tiles(const Problem& p, const Tiles& tiles, const std::vector<Panel>& panels, int64_t first, int64_t last) {
  const int64_t of_block = input_block(p), chunk = std::max<int64_t>(1, CHUNK / of_block) * TILE;
  uint8_t* v = activations.of<uint8_t>((std::min(chunk, last - first) + TILE - 1) / TILE * of_block);
  for (int64_t start = first; start < last; start += chunk) {
    const int64_t stop = std::min(start + chunk, last), blocks = (stop - start + TILE - 1) / TILE;
    torch::stable::parallel_for(0, stop - start, FEW, [&](int64_t begin, int64_t end) {
      transform_input(p, tiles, start, begin, end, v);
    });
    torch::stable::parallel_for(0, (int64_t)panels.size() * blocks, 1, [&](int64_t begin, int64_t end) {
      int64_t current = -1;
      const int64_t parts = (int64_t)p.parts.size();
      for (int64_t task = begin; task < end; task++) {
        const Panel& panel = panels[task / blocks];
        const int64_t columns = panel.columns(), from = start + task % blocks * TILE,
                      count = std::min<int64_t>(TILE, stop - from);
        int64_t of_panel = 0;
        for (auto& part : p.parts) of_panel += 16 * weight_plane(part, panel);
        int8_t* u = weights.of<int8_t>(of_panel);
        int32_t* of_output = sums.of<int32_t>((parts * 5 + 16) * columns);
        int32_t* m = products.of<int32_t>(16 * product_plane(panel) + (parts > 1 ? 4 * TILE * columns : 0));
        float* between = (float*)(m + 16 * product_plane(panel));
        if (current != task / blocks) {
          current = task / blocks;
          int32_t* comp = of_output + parts * 5 * columns;
          int8_t* of_part = u;
          int32_t* offset = of_output;
          for (auto& part : p.parts) {
            widen_winograd(p, panel, part, of_part, comp);
            transform_offset(panel, comp, offset);
            of_part += 16 * weight_plane(part, panel), offset += 5 * columns;
          }
        }
        const uint8_t* of_part = v + task % blocks * of_block;
        const int8_t* w = u;
        for (int64_t s = 0; s < parts; s++) {
          const Part& part = p.parts[s];
          with_width(panel.width, [&](auto width) {
            for (int n = 0; n < 16; n++, of_part += input_plane(part), w += weight_plane(part, panel))
              with_dot(largest(p, n, w, part.padded * columns), [&](auto dot) {
                plane_product<width, dot>(of_part, w, part.padded, count, m + n * product_plane(panel));
              });
          });
          transform_output(p, panel, tiles, m, of_output + s * 5 * columns, between, from, count, s);
        }
      }
      finish_streams();
    });
  }
}

void winograd(const Problem& p) {
  const auto middle = middle_offsets(p);
  const Tiles tiles{(p.OH + 1) / 2, (p.OW + 1) / 2, middle.data()};
  const auto panels = panels_of(p);
  const int64_t all = p.B * tiles.rows * tiles.columns;
  if (all < MANY * torch::stable::get_num_threads()) return of_tiles(p, tiles, panels, 0, all);
  torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) { of_tiles(p, tiles, panels, begin, end); });
}

}  // namespace
