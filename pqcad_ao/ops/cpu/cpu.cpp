// The pqcad:: operators for CPUs with AVX512-VNNI. Compiled on first use (cpu.py).
//
// Activations are NHWC int8, carried as unsigned bytes with an offset of 128; what the offset adds to a sum is the same
// for every pixel and is taken off again through `comp`. Weights stay packed in memory: a panel of up to 64 output
// channels is widened into scratch, is used for a chunk of the batch, and is forgotten. Nibbles leave their bytes as even
// and odd channels and are not interleaved again: in scratch, activations and weights hold the even ones of every eight
// channels and then the odd ones. Sums are exact 32-bit integers.
//
// A 3x3 convolution of stride 1 with weights of at most 4 bits and inputs of at most 6 goes by Winograd's F(2x2, 3x3)
// (Lavin and Gray 2016) in 8-bit arithmetic. With d of 6 bits, fifteen of the sixteen planes of B^T d B are differences
// and lie within [-126, 126]; the sixteenth is a sum of four values and lies within 252 of four times the least of them,
// which its own offset makes zero. With g of 4 bits, (2G) g (2G)^T lies within [-72, 72]; the result is four times the
// convolution, and a shift by two restores it without remainder. Everything else is a direct product over the taps.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

namespace {

using at::Tensor;

constexpr int LANES = 16;   // output channels in a register
constexpr int WIDEST = 4;   // registers in a panel
constexpr int TILE = 48;    // Winograd tiles or pixels in a block: a multiple of every register block's rows
constexpr int64_t CHUNK = 4 << 20;  // bytes of transformed input that are kept at once

struct Part {        // channels with a scale of their own (a segment), or the channels of a group
  int64_t first, length, padded, offset;  // in the input; padded to 8; where the padded ones begin in scratch
};

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
};

struct Panel {  // output channels that are worked on together
  int64_t group, first, length;
  int width;  // registers
};

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

std::vector<Panel> panels(const Problem& p) {
  int64_t registers = (p.out_group() + LANES - 1) / LANES, count = (registers + WIDEST - 1) / WIDEST;
  int64_t width = (registers + count - 1) / count;
  std::vector<Panel> found;
  for (int64_t g = 0; g < p.groups; g++)
    for (int64_t o = 0; o < p.out_group(); o += width * LANES) {
      int64_t length = std::min(width * LANES, p.out_group() - o);
      found.push_back({g, g * p.out_group() + o, length, (int)((length + LANES - 1) / LANES)});
    }
  return found;
}

// ------------------------------------------------------------------------------------------------ products

// MR rows by NR registers of outputs; a: rows of bytes, w: [K/4][NR][16][4], both K long.
template <int MR, int NR>
inline void product(const uint8_t* const* rows, const int8_t* w, int64_t K, __m512i (&acc)[MR][NR]) {
  for (int64_t k = 0; k < K; k += 4) {
    __m512i b[NR];
    for (int j = 0; j < NR; j++) b[j] = _mm512_loadu_si512(w + j * 64);
    w += NR * 64;
    for (int i = 0; i < MR; i++) {
      int32_t four;
      std::memcpy(&four, rows[i] + k, 4);
      __m512i x = _mm512_set1_epi32(four);
      for (int j = 0; j < NR; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], x, b[j]);
    }
  }
}

// As many rows as fill the 32 registers.
template <int NR> constexpr int rows_of() { return NR == 4 ? 6 : NR == 3 ? 8 : NR == 2 ? 12 : 24; }

// ------------------------------------------------------------------------------------------------- weights

inline int read_bits(const uint8_t* row, int64_t bytes, int64_t index, int bits) {
  int64_t at = index * bits;
  int value = row[at >> 3];
  if ((at >> 3) + 1 < bytes) value |= row[(at >> 3) + 1] << 8;
  value = (value >> (at & 7)) & ((1 << bits) - 1);
  return value - ((value >> (bits - 1)) << bits);
}

// Lane l of row k to lane k of row l.
inline void transpose(__m512i (&r)[LANES]) {
  __m512i t[LANES];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + 2 + k]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + 2 + k]);
    }
  for (int k = 0; k < 4; k++) {
    t[k] = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x88), t[4 + k] = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xdd);
    t[8 + k] = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x88), t[12 + k] = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xdd);
  }
  for (int k = 0; k < 4; k++) {
    r[k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0x88), r[8 + k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0xdd);
    r[4 + k] = _mm512_shuffle_i32x4(t[4 + k], t[12 + k], 0x88), r[12 + k] = _mm512_shuffle_i32x4(t[4 + k], t[12 + k], 0xdd);
  }
}

// The even ones of every eight channels and then the odd ones: so do nibbles come out of their bytes.
inline __m512i even_first(__m512i bytes) {
  return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)));
}

struct Halves {  // eight channels of one tap for 16 outputs: the even ones and the odd ones, as [16][4] signed bytes
  __m512i of[2];
};

struct Widener {
  const Problem& p;
  const Panel& panel;
  bool nibbles;

  Widener(const Problem& p, const Panel& panel) : p(p), panel(panel) {
    nibbles = p.bits == 4 && p.in_group() % 2 == 0;  // every row's nibbles of one tap begin in a byte of their own
    for (auto& part : p.parts) nibbles = nibbles && part.first % 2 == 0;
  }

  // Channels c ... c + 8 count of a part's tap, at most 16 times eight, for 16 outputs; zero beyond the part. Adds 128
  // times each output's sum to `sums`.
  void widen(const Part& part, int64_t tap, int64_t c, int count, int j, Halves* to, __m512i& sums) const {
    const int64_t in_row = tap * p.in_group() + (p.groups > 1 ? 0 : part.first) + c, left = part.length - c;
    const uint8_t* row[LANES];
    for (int l = 0; l < LANES; l++)
      row[l] = p.weight + (panel.first + std::min<int64_t>(j * LANES + l, panel.length - 1)) * p.row;
    if (nibbles) {
      const __mmask64 have = left >= 128 ? ~0ull : left > 0 ? (1ull << (left / 2)) - 1 : 0;
      const __m512i signs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)),
                    low = _mm512_set1_epi8(0x0f);
      __m512i v[LANES];
      for (int l = 0; l < LANES; l++) {
        v[l] = _mm512_maskz_loadu_epi8(have, row[l] + in_row / 2);
        _mm_prefetch((const char*)(row[l] + LANES * p.row + in_row / 2), _MM_HINT_T1);  // of the outputs that come next
      }
      transpose(v);
      for (int k = 0; k < count; k++) {
        to[k].of[0] = _mm512_shuffle_epi8(signs, _mm512_and_si512(v[k], low));
        to[k].of[1] = _mm512_shuffle_epi8(signs, _mm512_and_si512(_mm512_srli_epi16(v[k], 4), low));
      }
    } else {
      for (int k = 0; k < count; k++) {
        alignas(64) int8_t two[2][LANES][4];
        for (int l = 0; l < LANES; l++)
          for (int n = 0; n < 8; n++)
            two[n % 2][l][n / 2] = 8 * k + n < left ? read_bits(row[l], p.row, in_row + 8 * k + n, p.bits) : 0;
        for (int h = 0; h < 2; h++) to[k].of[h] = _mm512_load_si512(two[h]);
      }
    }
    __m512i odd = _mm512_setzero_si512(), even = sums;
    for (int k = 0; k < count; k++) {
      even = _mm512_dpbusd_epi32(even, _mm512_set1_epi8((char)128), to[k].of[0]);
      odd = _mm512_dpbusd_epi32(odd, _mm512_set1_epi8((char)128), to[k].of[1]);
    }
    sums = _mm512_add_epi32(even, odd);
  }
};

// [part][tap][c/4][width][16][4], and comp[part][width*16] = 128 times the sum over taps and channels.
void widen_direct(const Problem& p, const Panel& panel, int64_t from, int64_t to, int8_t* w, int32_t* comp) {
  Widener widener(p, panel);
  Halves some[16];
  for (int64_t s = from; s < to; s++, comp += panel.width * LANES) {
    __m512i sums[WIDEST];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t tap = 0; tap < p.KH * p.KW; tap++)
      for (int64_t c = 0; c < p.parts[s].padded; c += 128) {
        const int count = (int)std::min<int64_t>(16, (p.parts[s].padded - c) / 8);
        for (int j = 0; j < panel.width; j++) {
          widener.widen(p.parts[s], tap, c, count, j, some, sums[j]);
          for (int k = 0; k < 2 * count; k++) _mm512_storeu_si512(w + (k * panel.width + j) * 64, some[k / 2].of[k % 2]);
        }
        w += 2 * count * panel.width * 64;
      }
    for (int j = 0; j < panel.width; j++) _mm512_storeu_si512(comp + j * LANES, sums[j]);
  }
}

// (2G) g (2G)^T
template <class T, class Add, class Sub> inline void transform_weight(const T (&g)[9], T (&u)[16], Add add, Sub sub) {
  T q[4][3];
  for (int k = 0; k < 3; k++) {
    const T ends = add(g[k], g[6 + k]);
    q[0][k] = add(g[k], g[k]), q[1][k] = add(ends, g[3 + k]);
    q[2][k] = sub(ends, g[3 + k]), q[3][k] = add(g[6 + k], g[6 + k]);
  }
  for (int i = 0; i < 4; i++) {
    const T ends = add(q[i][0], q[i][2]);
    u[4 * i] = add(q[i][0], q[i][0]), u[4 * i + 1] = add(ends, q[i][1]);
    u[4 * i + 2] = sub(ends, q[i][1]), u[4 * i + 3] = add(q[i][2], q[i][2]);
  }
}

// u[16][c/4][width][16][4] = (2G) g (2G)^T of one part, and comp[16][width*16], 128 times its sum over the channels.
void widen_winograd(const Problem& p, const Panel& panel, const Part& part, int8_t* u, int32_t* comp) {
  Widener widener(p, panel);
  Halves some[9][16];
  const int64_t plane = part.padded / 4 * panel.width * 64;
  for (int j = 0; j < panel.width; j++) {
    __m512i sums[9], of_plane[16];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < part.padded; c += 128) {
      const int count = (int)std::min<int64_t>(16, (part.padded - c) / 8);
      for (int t = 0; t < 9; t++) widener.widen(part, t, c, count, j, some[t], sums[t]);
      for (int k = 0; k < 2 * count; k++) {
        __m512i g[9], row[16];
        for (int t = 0; t < 9; t++) g[t] = some[t][k / 2].of[k % 2];
        transform_weight(g, row, [](__m512i a, __m512i b) { return _mm512_add_epi8(a, b); },
                         [](__m512i a, __m512i b) { return _mm512_sub_epi8(a, b); });
        int8_t* to = u + ((c / 4 + k) * panel.width + j) * 64;
        for (int n = 0; n < 16; n++) _mm512_storeu_si512(to + n * plane, row[n]);
      }
    }
    transform_weight(sums, of_plane, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); },
                     [](__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); });
    for (int n = 0; n < 16; n++) _mm512_storeu_si512(comp + (n * panel.width + j) * LANES, of_plane[n]);
  }
}

// ------------------------------------------------------------------------------------------------ epilogue

// Puts sums of one segment, scaled, onto 16 channels of an output; the first segment brings bias and addend along.
class Epilogue {
  const Problem& p;
  const int64_t channel, segment;
  const __mmask16 lanes;
  const __m512 weight_scale;
  __m512 scale, bias;
  int64_t sample = -1;

 public:
  Epilogue(const Problem& p, int64_t channel, __mmask16 lanes, int64_t segment)
      : p(p), channel(channel), segment(segment), lanes(lanes),
        weight_scale(_mm512_maskz_loadu_ps(lanes, p.weight_scale + channel)) {}

  void of_sample(int64_t b) {
    if (b == sample) return;
    sample = b;
    scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(p.input_scale[b * p.segments() + segment]));
    bias = p.bias ? _mm512_maskz_loadu_ps(lanes, p.bias + channel) : _mm512_setzero_ps();
    if (p.addend && p.addend_pixel == 0)
      bias = _mm512_add_ps(bias, _mm512_maskz_loadu_ps(lanes, p.addend + b * p.addend_sample + channel));
  }

  void operator()(__m512i sums, int64_t pixel) const {
    float* to = p.output + pixel * p.O + channel;
    __m512 base = bias;
    if (segment > 0)
      base = _mm512_maskz_loadu_ps(lanes, to);
    else if (p.addend_pixel)
      base = _mm512_add_ps(base, _mm512_maskz_loadu_ps(lanes, p.addend + pixel * p.O + channel));
    _mm512_mask_storeu_ps(to, lanes, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, base));
  }
};

inline __mmask16 lanes_of(const Panel& panel, int j) {
  int64_t left = panel.length - j * LANES;
  return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
}

// -------------------------------------------------------------------------------------------------- direct

template <int NR>
void direct_block(const Problem& p, const Panel& panel, const uint8_t* x, int64_t HP, int64_t WP, const int8_t* w,
                  const int32_t* comp, int64_t from, int64_t to) {
  constexpr int MR = rows_of<NR>();
  const int64_t pixels = p.OH * p.OW, first = p.groups > 1 ? panel.group : 0,
                last = p.groups > 1 ? panel.group + 1 : (int64_t)p.parts.size();
  for (int64_t q = from; q < to; q += MR) {
    const uint8_t* base[MR];
    const int used = (int)std::min<int64_t>(MR, to - q);
    for (int i = 0; i < MR; i++) {
      int64_t n = q + std::min(i, used - 1), b = n / pixels, y = n % pixels / p.OW, z = n % p.OW;
      base[i] = x + ((b * HP + y * p.SH) * WP + z * p.SW) * p.padded;
    }
    const int8_t* panel_weights = w;
    for (int64_t s = first; s < last; s++) {
      const Part& part = p.parts[s];
      __m512i acc[MR][NR];
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) acc[i][j] = _mm512_setzero_si512();
      for (int64_t tap = 0; tap < p.KH * p.KW; tap++) {
        const uint8_t* rows[MR];
        int64_t shift = (tap / p.KW * p.DH * WP + tap % p.KW * p.DW) * p.padded + part.offset;
        for (int i = 0; i < MR; i++) rows[i] = base[i] + shift;
        product<MR, NR>(rows, panel_weights, part.padded, acc);
        panel_weights += part.padded / 4 * NR * 64;
      }
      const int32_t* sums = comp + (s - first) * NR * LANES;
      for (int j = 0; j < NR; j++) {
        Epilogue store(p, panel.first + j * LANES, lanes_of(panel, j), s - first);
        const __m512i offset = _mm512_loadu_si512(sums + j * LANES);
        for (int i = 0; i < used; i++) {
          store.of_sample((q + i) / pixels);
          store(_mm512_sub_epi32(acc[i][j], offset), q + i);
        }
      }
    }
  }
}

void direct(const Problem& p) {
  const int64_t HP = std::max((p.OH - 1) * p.SH + (p.KH - 1) * p.DH + 1, p.H + p.PH),
                WP = std::max((p.OW - 1) * p.SW + (p.KW - 1) * p.DW + 1, p.W + p.PW);
  uint8_t* x = activations.of<uint8_t>(p.B * HP * WP * p.padded);
  at::parallel_for(0, p.B * HP, 1, [&](int64_t begin, int64_t end) {
    const __m512i offset = _mm512_set1_epi8((char)128);
    for (int64_t r = begin; r < end; r++) {
      const int64_t b = r / HP, h = r % HP - p.PH;
      uint8_t* row = x + r * WP * p.padded;
      if (h < 0 || h >= p.H) {
        std::memset(row, 128, WP * p.padded);
        continue;
      }
      for (int64_t z = 0; z < WP; z++, row += p.padded) {
        const int64_t c = z - p.PW;
        if (c < 0 || c >= p.W) {
          std::memset(row, 128, p.padded);
          continue;
        }
        const int8_t* pixel = p.input + ((b * p.H + h) * p.W + c) * p.C;
        for (auto& part : p.parts)
          for (int64_t k = 0; k < part.padded; k += 64) {
            __mmask64 have = part.length - k >= 64 ? ~0ull : part.length > k ? (1ull << (part.length - k)) - 1 : 0;
            __mmask64 want = part.padded - k >= 64 ? ~0ull : (1ull << (part.padded - k)) - 1;
            __m512i v = _mm512_maskz_loadu_epi8(have, pixel + part.first + k);
            _mm512_mask_storeu_epi8(row + part.offset + k, want, even_first(_mm512_xor_si512(v, offset)));
          }
      }
    }
  });
  const auto all = panels(p);
  const int64_t rows = p.B * p.OH * p.OW, blocks = (rows + TILE - 1) / TILE, tasks = (int64_t)all.size() * blocks;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    int64_t current = -1;
    for (int64_t task = begin; task < end; task++) {
      const Panel& panel = all[task / blocks];
      const int64_t from = p.groups > 1 ? panel.group : 0,
                    to = p.groups > 1 ? panel.group + 1 : (int64_t)p.parts.size();
      int64_t depth = 0;
      for (int64_t s = from; s < to; s++) depth += p.parts[s].padded;
      int8_t* w = weights.of<int8_t>(depth * p.KH * p.KW * panel.width * LANES);
      int32_t* comp = sums.of<int32_t>((to - from) * panel.width * LANES);
      if (current != task / blocks) {
        current = task / blocks;
        widen_direct(p, panel, from, to, w, comp);
      }
      const int64_t q = task % blocks * TILE, end_of = std::min(q + TILE, rows);
      switch (panel.width) {
        case 1: direct_block<1>(p, panel, x, HP, WP, w, comp, q, end_of); break;
        case 2: direct_block<2>(p, panel, x, HP, WP, w, comp, q, end_of); break;
        case 3: direct_block<3>(p, panel, x, HP, WP, w, comp, q, end_of); break;
        default: direct_block<4>(p, panel, x, HP, WP, w, comp, q, end_of);
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------ Winograd

// m[tile][NR][16] for one of the sixteen planes; v: [TILE][K].
template <int NR> void plane_product(const uint8_t* v, const int8_t* u, int64_t K, int64_t tiles, int32_t* m) {
  constexpr int MR = rows_of<NR>();
  for (int64_t q = 0; q < tiles; q += MR) {
    const uint8_t* rows[MR];
    for (int i = 0; i < MR; i++) rows[i] = v + (q + i) * K;
    __m512i acc[MR][NR];
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j++) acc[i][j] = _mm512_setzero_si512();
    product<MR, NR>(rows, u, K, acc);
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NR; j++) _mm512_storeu_si512(m + ((q + i) * NR + j) * LANES, acc[i][j]);
  }
}

constexpr int MIDDLE = 5;  // the plane in row 1 and column 1 of the sixteen: sums alone, and it enters all four outputs

// What makes the middle plane unsigned, [B][part]: minus four times the least integer of a sample, or of the zeros around
// it. Up to 5 bits the offset of the other planes does.
std::vector<int32_t> middle_offsets(const Problem& p) {
  const int64_t parts = (int64_t)p.parts.size();
  std::vector<int32_t> offsets(p.B * parts, 128);
  if (p.input_bits <= 5) return offsets;
  at::parallel_for(0, p.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t s = 0; s < parts; s++) {
        const Part& part = p.parts[s];
        __m512i least = _mm512_setzero_si512();
        for (int64_t pixel = 0; pixel < p.H * p.W; pixel++) {
          const int8_t* from = p.input + (b * p.H * p.W + pixel) * p.C + part.first;
          for (int64_t k = 0; k < part.length; k += 64) {
            const __mmask64 have = part.length - k >= 64 ? ~0ull : (1ull << (part.length - k)) - 1;
            least = _mm512_min_epi8(least, _mm512_maskz_loadu_epi8(have, from + k));
          }
        }
        alignas(64) int8_t lanes[64];
        _mm512_store_si512(lanes, least);
        offsets[b * parts + s] = -4 * *std::min_element(lanes, lanes + 64);
      }
  });
  return offsets;
}

// Input tiles B^T d B, with their offset, of a block: v[part][16][TILE][padded].
void transform_input(const Problem& p, const int32_t* middle, int64_t first, int64_t count, int64_t TH, int64_t TW,
                     uint8_t* v) {
  static const int8_t zeros[64] = {};
  const __m512i offset = _mm512_set1_epi8((char)128);
  for (int64_t q = 0; q < count; q++) {
    const int64_t t = first + q, b = t / (TH * TW), y = t % (TH * TW) / TW * 2 - p.PH, x = t % TW * 2 - p.PW;
    const int8_t* pixel[16];
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) {
        const bool inside = y + i >= 0 && y + i < p.H && x + j >= 0 && x + j < p.W;
        pixel[i * 4 + j] = inside ? p.input + ((b * p.H + y + i) * p.W + x + j) * p.C : nullptr;
      }
    uint8_t* of_part = v;
    const int32_t* of_middle = middle + b * (int64_t)p.parts.size();
    for (auto& part : p.parts) {
      const __m512i own = _mm512_set1_epi8((char)*of_middle++);
      for (int64_t k = 0; k < part.padded; k += 64) {
        const __mmask64 have = part.length - k >= 64 ? ~0ull : part.length > k ? (1ull << (part.length - k)) - 1 : 0;
        const __mmask64 want = part.padded - k >= 64 ? ~0ull : (1ull << (part.padded - k)) - 1;
        __m512i d[16], e[16];
        for (int n = 0; n < 16; n++)
          d[n] = even_first(_mm512_maskz_loadu_epi8(have, pixel[n] ? pixel[n] + part.first + k : zeros));
        for (int j = 0; j < 4; j++) {
          e[j] = _mm512_sub_epi8(d[j], d[8 + j]);
          e[4 + j] = _mm512_add_epi8(d[4 + j], d[8 + j]);
          e[8 + j] = _mm512_sub_epi8(d[8 + j], d[4 + j]);
          e[12 + j] = _mm512_sub_epi8(d[4 + j], d[12 + j]);
        }
        uint8_t* to = of_part + q * part.padded + k;
        const int64_t plane = TILE * part.padded;
        for (int i = 0; i < 4; i++) {
          const __m512i* r = e + i * 4;
          const __m512i f[4] = {_mm512_sub_epi8(r[0], r[2]), _mm512_add_epi8(r[1], r[2]), _mm512_sub_epi8(r[2], r[1]),
                                _mm512_sub_epi8(r[1], r[3])};
          for (int j = 0; j < 4; j++)
            _mm512_mask_storeu_epi8(to + (i * 4 + j) * plane, want,
                                    _mm512_add_epi8(f[j], i * 4 + j == MIDDLE ? own : offset));
        }
      }
      of_part += 16 * TILE * part.padded;
    }
  }
}

// A^T comp A: what an offset of 128 adds to each of a tile's four outputs, as [4][width*16], and what one of 1 in the
// middle plane adds to all of them.
void transform_offset(const Panel& panel, const int32_t* comp, int32_t* of_output) {
  const int64_t columns = panel.width * LANES;
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
    of_output[4 * columns + c] = comp[MIDDLE * columns + c] / 128;
  }
}

void transform_output(const Problem& p, const Panel& panel, const int32_t* middle, const int32_t* m,
                      const int32_t* of_output, int64_t first, int64_t count, int64_t TH, int64_t TW, int64_t segment) {
  const int NR = panel.width;
  for (int j = 0; j < NR; j++) {
    const __mmask16 lanes = lanes_of(panel, j);
    __m512i of_all[5], offset[4];
    for (int k = 0; k < 5; k++) of_all[k] = _mm512_loadu_si512(of_output + (k * NR + j) * LANES);
    Epilogue store(p, panel.first + j * LANES, lanes, segment);
    int64_t sample = -1;
    for (int64_t q = 0; q < count; q++) {
      const int64_t t = first + q, b = t / (TH * TW), y = t % (TH * TW) / TW * 2, x = t % TW * 2;
      const int32_t* at = m + (q * NR + j) * LANES;
      const int64_t plane = TILE * NR * LANES;
      __m512i e[2][4];
      for (int k = 0; k < 4; k++, at += plane) {
        const __m512i m0 = _mm512_loadu_si512(at), m1 = _mm512_loadu_si512(at + 4 * plane),
                      m2 = _mm512_loadu_si512(at + 8 * plane), m3 = _mm512_loadu_si512(at + 12 * plane);
        e[0][k] = _mm512_add_epi32(_mm512_add_epi32(m0, m1), m2);
        e[1][k] = _mm512_sub_epi32(_mm512_sub_epi32(m1, m2), m3);
      }
      store.of_sample(b);
      if (b != sample) {
        sample = b;
        const __m512i more = _mm512_set1_epi32(middle[b * (int64_t)p.parts.size() + segment] - 128);
        for (int k = 0; k < 4; k++) offset[k] = _mm512_add_epi32(of_all[k], _mm512_mullo_epi32(of_all[4], more));
      }
      for (int i = 0; i < 2 && y + i < p.OH; i++) {
        const int64_t pixel = (b * p.OH + y + i) * p.OW + x;
        __m512i sums = _mm512_add_epi32(_mm512_add_epi32(e[i][0], e[i][1]), e[i][2]);
        store(_mm512_srai_epi32(_mm512_sub_epi32(sums, offset[2 * i]), 2), pixel);
        if (x + 1 == p.OW) continue;
        sums = _mm512_sub_epi32(_mm512_sub_epi32(e[i][1], e[i][2]), e[i][3]);
        store(_mm512_srai_epi32(_mm512_sub_epi32(sums, offset[2 * i + 1]), 2), pixel + 1);
      }
    }
  }
}

void winograd(const Problem& p) {
  const auto middle = middle_offsets(p);
  const int64_t TH = (p.OH + 1) / 2, TW = (p.OW + 1) / 2, tiles = p.B * TH * TW;
  const int64_t of_block = 16 * TILE * p.padded;
  const int64_t chunk = std::max<int64_t>(1, CHUNK / of_block) * TILE;
  const auto all = panels(p);
  uint8_t* v = activations.of<uint8_t>((std::min(chunk, tiles) + TILE - 1) / TILE * of_block);
  for (int64_t start = 0; start < tiles; start += chunk) {
    const int64_t stop = std::min(start + chunk, tiles), blocks = (stop - start + TILE - 1) / TILE;
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++)
        transform_input(p, middle.data(), start + k * TILE, std::min<int64_t>(TILE, stop - start - k * TILE), TH, TW,
                        v + k * of_block);
    });
    at::parallel_for(0, (int64_t)all.size() * blocks, 1, [&](int64_t begin, int64_t end) {
      int64_t current = -1;
      const int64_t parts = (int64_t)p.parts.size();
      for (int64_t task = begin; task < end; task++) {
        const Panel& panel = all[task / blocks];
        const int64_t columns = panel.width * LANES, from = start + task % blocks * TILE,
                      count = std::min<int64_t>(TILE, stop - from);
        int8_t* u = weights.of<int8_t>(16 * p.padded * columns);
        int32_t* of_output = sums.of<int32_t>((parts * 5 + 16) * columns);
        int32_t* m = products.of<int32_t>(16 * TILE * columns);
        if (current != task / blocks) {
          current = task / blocks;
          int32_t* comp = of_output + parts * 5 * columns;
          for (int64_t s = 0; s < parts; s++) {
            widen_winograd(p, panel, p.parts[s], u + 16 * p.parts[s].offset * columns, comp);
            transform_offset(panel, comp, of_output + s * 5 * columns);
          }
        }
        for (int64_t s = 0; s < parts; s++) {
          const Part& part = p.parts[s];
          const uint8_t* of_part = v + task % blocks * of_block + 16 * TILE * part.offset;
          for (int n = 0; n < 16; n++) {
            const uint8_t* a = of_part + n * TILE * part.padded;
            const int8_t* w = u + 16 * part.offset * columns + n * part.padded * columns;
            int32_t* to = m + n * TILE * columns;
            switch (panel.width) {
              case 1: plane_product<1>(a, w, part.padded, count, to); break;
              case 2: plane_product<2>(a, w, part.padded, count, to); break;
              case 3: plane_product<3>(a, w, part.padded, count, to); break;
              default: plane_product<4>(a, w, part.padded, count, to);
            }
          }
          transform_output(p, panel, middle.data(), m, of_output + s * 5 * columns, from, count, TH, TW, s);
        }
      }
    });
  }
}

// ------------------------------------------------------------------------------------------------ quantize

struct Source {  // one of the tensors that stand side by side along the channels
  const float* data;
  int64_t channels, first;
};

struct Quantize {
  std::vector<Source> sources;
  const float *norm_weight, *norm_bias;
  const float* scale;
  const int64_t* low;
  std::vector<int64_t> segments;
  int8_t* output;
  int64_t B, H, W, C, norm_groups, upsample;
  double eps;
  int bits;
  bool silu;
};

// x / (1 + e^-x), to 4 units in the last place where its size matters and to 1.5e-6 everywhere: e^-x is a power of two
// times a polynomial in what remains of the exponent. Ends of +-87 keep the power a normal number.
inline __m512 silu_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f), minus_log2e = _mm512_set1_ps(-1.44269504f);
  const __m512 ended = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(87.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(ended, minus_log2e), 8), r = _mm512_fmsub_ps(ended, minus_log2e, n);
  __m512 y = _mm512_set1_ps(1.546144485e-4f);  // 2^r on [-1/2, 1/2], interpolated at Chebyshev's points
  for (float c : {1.3400428e-3f, 9.618056938e-3f, 5.550327152e-2f, 2.402265072e-1f, 6.931471825e-1f, 1.f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  const __m512 d = _mm512_add_ps(one, _mm512_scalef_ps(y, n));
  __m512 inverse = _mm512_rcp14_ps(d);  // 14 bits, and a Newton step: together shorter than a division
  inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(d, inverse, _mm512_set1_ps(2.f)));
  return _mm512_mul_ps(x, inverse);
}

// Adds the sums and the sums of squares of rows [from, to) to sums[2][C], for N registers of channels from c on.
template <int N>
void moments(const Quantize& p, const Source& source, int64_t c, int64_t sample, int64_t from, int64_t to, double* sums) {
  const int64_t count = std::min<int64_t>(N * LANES, source.channels - c);
  const __mmask16 last = (__mmask16)((1u << (count - (N - 1) * LANES)) - 1);
  alignas(64) float one[N * LANES], two[N * LANES];
  for (int64_t h = from; h < to; h++) {  // row by row into doubles: long sums in float lose what the grid tells apart
    const float* x = source.data + (sample * p.H + h) * p.W * source.channels + c;
    __m512 sum[N], squares[N];
    for (int j = 0; j < N; j++) sum[j] = squares[j] = _mm512_setzero_ps();
    for (int64_t w = 0; w < p.W; w++, x += source.channels)
      for (int j = 0; j < N; j++) {
        const __m512 v = _mm512_maskz_loadu_ps(j + 1 < N ? (__mmask16)0xffff : last, x + j * LANES);
        sum[j] = _mm512_add_ps(sum[j], v);
        squares[j] = _mm512_fmadd_ps(v, v, squares[j]);
      }
    for (int j = 0; j < N; j++) _mm512_store_ps(one + j * LANES, sum[j]), _mm512_store_ps(two + j * LANES, squares[j]);
    for (int64_t k = 0; k < count; k++) {
      sums[source.first + c + k] += one[k];
      sums[p.C + source.first + c + k] += two[k];
    }
  }
}

void moments(const Quantize& p, int64_t sample, int64_t from, int64_t to, double* sums) {
  for (auto& source : p.sources)
    for (int64_t c = 0; c < source.channels; c += 4 * LANES)
      switch (std::min<int64_t>(4, (source.channels - c + LANES - 1) / LANES)) {
        case 1: moments<1>(p, source, c, sample, from, to, sums); break;
        case 2: moments<2>(p, source, c, sample, from, to, sums); break;
        case 3: moments<3>(p, source, c, sample, from, to, sums); break;
        default: moments<4>(p, source, c, sample, from, to, sums);
      }
}

// What every channel of a sample is multiplied with and gets added, its reciprocal scale, and its grid's ends.
void coefficients(const Quantize& p, int64_t sample, const double* sums, float* of) {
  float *factor = of, *shift = of + p.C, *steps = of + 2 * p.C, *low = of + 3 * p.C, *high = of + 4 * p.C;
  if (p.norm_groups > 0) {
    const int64_t size = p.C / p.norm_groups;
    for (int64_t g = 0; g < p.norm_groups; g++) {
      double sum = 0, squares = 0;
      for (int64_t c = g * size; c < (g + 1) * size; c++) sum += sums[c], squares += sums[p.C + c];
      const double count = (double)size * p.H * p.W, mean = sum / count;
      const double rstd = 1 / std::sqrt(std::max(squares / count - mean * mean, 0.0) + p.eps);
      for (int64_t c = g * size; c < (g + 1) * size; c++) {
        const double weight = p.norm_weight ? p.norm_weight[c] : 1, bias = p.norm_bias ? p.norm_bias[c] : 0;
        factor[c] = (float)(rstd * weight), shift[c] = (float)(bias - mean * rstd * weight);
      }
    }
  }
  int64_t c = 0;
  const int64_t count = (int64_t)p.segments.size();
  for (int64_t s = 0; s < count; s++)
    for (int64_t k = 0; k < p.segments[s]; k++, c++) {
      steps[c] = 1.f / p.scale[sample * count + s];
      low[c] = (float)p.low[sample * count + s];
      high[c] = low[c] + (float)((1 << p.bits) - 1);
    }
}

template <bool NORM, bool SILU>
void quantize_rows(const Quantize& p, int64_t sample, int64_t from, int64_t to, const float* of) {
  const float *factor = of, *shift = of + p.C, *steps = of + 2 * p.C, *low = of + 3 * p.C, *high = of + 4 * p.C;
  const int64_t U = p.upsample, line = p.W * U * p.C;
  for (int64_t h = from; h < to; h++) {
    int8_t* top = p.output + (sample * p.H + h) * U * line;
    for (auto& source : p.sources)
      for (int64_t k = 0; k < source.channels; k += LANES) {
        const __mmask16 lanes = source.channels - k >= LANES ? 0xffff : (__mmask16)((1u << (source.channels - k)) - 1);
        const int64_t c = source.first + k;
        const __m512 factors = _mm512_maskz_loadu_ps(lanes, factor + c), shifts = _mm512_maskz_loadu_ps(lanes, shift + c),
                     step = _mm512_maskz_loadu_ps(lanes, steps + c), least = _mm512_maskz_loadu_ps(lanes, low + c),
                     most = _mm512_maskz_loadu_ps(lanes, high + c);
        const float* x = source.data + (sample * p.H + h) * p.W * source.channels + k;
        int8_t* to = top + c;
        for (int64_t w = 0; w < p.W; w++, x += source.channels, to += U * p.C) {
          __m512 v = _mm512_maskz_loadu_ps(lanes, x);
          if (NORM) v = _mm512_fmadd_ps(v, factors, shifts);
          if (SILU) v = silu_of(v);
          v = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(v, step), least), most);  // integers: rounding keeps within them
          const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
          for (int64_t u = 0; u < U; u++) _mm_mask_storeu_epi8(to + u * p.C, lanes, bytes);
        }
      }
    for (int64_t u = 1; u < U; u++) std::memcpy(top + u * line, top, line);
  }
}

void quantize(const Quantize& p) {
  const auto rows_of = p.norm_groups > 0 ? (p.silu ? quantize_rows<true, true> : quantize_rows<true, false>)
                                         : (p.silu ? quantize_rows<false, true> : quantize_rows<false, false>);
  const int64_t threads = at::get_num_threads(), rows = p.B * p.H;
  if (p.B >= threads) {  // a sample's second pass finds it in the cache
    at::parallel_for(0, p.B, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(2 * p.C);
      std::vector<float> of(5 * p.C);
      for (int64_t b = begin; b < end; b++) {
        std::fill(sums.begin(), sums.end(), 0.0);
        if (p.norm_groups > 0) moments(p, b, 0, p.H, sums.data());
        coefficients(p, b, sums.data(), of.data());
        rows_of(p, b, 0, p.H, of.data());
      }
    });
    return;
  }
  std::vector<double> sums(p.norm_groups > 0 ? rows * 2 * p.C : 2 * p.C);  // of each row, so that no two threads meet
  std::vector<float> of(p.B * 5 * p.C);
  if (p.norm_groups > 0)
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) moments(p, r / p.H, r % p.H, r % p.H + 1, sums.data() + r * 2 * p.C);
    });
  for (int64_t b = 0; b < p.B; b++) {
    double* of_sample = sums.data() + (p.norm_groups > 0 ? b * p.H * 2 * p.C : 0);
    for (int64_t r = 1; r < p.H && p.norm_groups > 0; r++)
      for (int64_t c = 0; c < 2 * p.C; c++) of_sample[c] += of_sample[r * 2 * p.C + c];
    coefficients(p, b, of_sample, of.data() + b * 5 * p.C);
  }
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      rows_of(p, r / p.H, r % p.H, r % p.H + 1, of.data() + r / p.H * 5 * p.C);
  });
}

// ------------------------------------------------------------------------------------------------ operators

// Scales (and lows) of `name` are (batch, segments), and the segments make up the channels.
void check_grid(const char* name, const Tensor& values, at::IntArrayRef segments, int64_t batch, int64_t channels) {
  int64_t sum = 0;
  for (auto s : segments) sum += s;
  TORCH_CHECK_VALUE(sum == channels, "segments ", segments, " sum to ", sum, ", the input has ", channels, " channels");
  TORCH_CHECK_VALUE(values.dim() == 2 && values.size(0) == batch && values.size(1) == (int64_t)segments.size(), name,
                    " has shape ", values.sizes(), ": expected (batch, segments) = (", batch, ", ", segments.size(), ")");
}

void check(const Tensor& input, const Tensor& weight, const Tensor& input_scale, const std::optional<Tensor>& bias,
           int64_t bits, at::IntArrayRef segments, int64_t channels, int64_t rows, int64_t reduction) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kChar, "input is ", input.scalar_type(),
                   ": the pqcad operators take int8 integers (quantize first)");
  check_grid("input_scale", input_scale, segments, input.size(0), channels);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, "weight_bits=", bits, ": allowed are 2 to 8");
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kByte && weight.dim() == 2 && weight.size(0) == rows &&
                        weight.size(1) == (reduction * bits + 7) / 8,
                    "weight is ", weight.scalar_type(), " of shape ", weight.sizes(), ": expected uint8 (", rows, ", ",
                    (reduction * bits + 7) / 8, ")");
  TORCH_CHECK_VALUE(!bias || bias->numel() == rows, "bias has ", bias ? bias->numel() : 0, " values: expected ", rows);
  TORCH_CHECK_VALUE(reduction > 0, "no input channels");
  TORCH_CHECK_VALUE(reduction < (int64_t)1 << 16, "sums of ", reduction, " products: 65535 fit in 32 bits");
}

void fill_parts(Problem& p, at::IntArrayRef segments) {
  int64_t first = 0;
  for (int64_t g = 0; g < (p.groups > 1 ? p.groups : (int64_t)segments.size()); g++) {
    const int64_t length = p.groups > 1 ? p.in_group() : segments[g], padded = (length + 7) / 8 * 8;
    p.parts.push_back({first, length, padded, p.padded});
    first += length;
    p.padded += padded;
  }
}

// Runs `method` on a problem whose sizes are set; input and addend are laid out already, channels innermost.
void compute(Problem& p, void (*method)(const Problem&), const Tensor& input, const Tensor& weight,
             const Tensor& weight_scale, const Tensor& input_scale, const std::optional<Tensor>& bias,
             const Tensor& addend, at::IntArrayRef segments, Tensor& output) {
  if (output.numel() == 0) return;
  const Tensor w = weight.contiguous(), ws = weight_scale.to(at::kFloat).contiguous(),
               is = input_scale.to(at::kFloat).contiguous(), b = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  p.input = input.const_data_ptr<int8_t>(), p.weight = w.const_data_ptr<uint8_t>();
  p.row = w.size(1);
  p.weight_scale = ws.const_data_ptr<float>(), p.input_scale = is.const_data_ptr<float>();
  p.bias = b.defined() ? b.const_data_ptr<float>() : nullptr;
  p.addend = addend.defined() ? addend.const_data_ptr<float>() : nullptr;
  p.output = output.mutable_data_ptr<float>();
  fill_parts(p, segments);
  method(p);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, const Tensor& input_scale,
              const std::optional<Tensor>& bias, int64_t weight_bits, at::IntArrayRef segments,
              at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
              int64_t groups, at::ScalarType dtype, int64_t input_bits, const std::optional<Tensor>& addend) {
  TORCH_CHECK_VALUE(input.dim() == 4, "input has ", input.dim(), " dimensions: expected (B, C, H, W)");
  TORCH_CHECK_VALUE(groups == 1 || segments.size() == 1, "a grouped convolution takes one segment of input channels");
  TORCH_CHECK_VALUE(groups >= 1 && input.size(1) % groups == 0 && weight_scale.numel() % groups == 0, "groups=", groups,
                    ": must divide ", input.size(1), " input and ", weight_scale.numel(), " output channels");
  TORCH_CHECK_VALUE(stride[0] >= 1 && stride[1] >= 1, "stride=", stride, ": at least 1");
  Problem p{};
  p.B = input.size(0), p.C = input.size(1), p.H = input.size(2), p.W = input.size(3), p.O = weight_scale.numel();
  p.KH = kernel_size[0], p.KW = kernel_size[1], p.SH = stride[0], p.SW = stride[1], p.PH = padding[0];
  p.PW = padding[1], p.DH = dilation[0], p.DW = dilation[1], p.groups = groups, p.bits = (int)weight_bits;
  p.input_bits = (int)input_bits;
  const int64_t down = p.H + 2 * p.PH - p.DH * (p.KH - 1) - 1, along = p.W + 2 * p.PW - p.DW * (p.KW - 1) - 1;
  TORCH_CHECK_VALUE(down >= 0 && along >= 0, "kernel of ", kernel_size, " on an input of ", input.sizes(), " leaves nothing");
  p.OH = down / p.SH + 1, p.OW = along / p.SW + 1;
  check(input, weight, input_scale, bias, weight_bits, segments, p.C, p.O, p.in_group() * p.KH * p.KW);
  Tensor output = at::empty({p.B, p.O, p.OH, p.OW}, input.options().dtype(at::kFloat), at::MemoryFormat::ChannelsLast);
  Tensor a;
  if (addend) {
    TORCH_CHECK_VALUE(addend->dim() == 4, "addend has ", addend->dim(), " dimensions: expected 4");
    const bool per_sample = addend->size(2) == 1 && addend->size(3) == 1;
    TORCH_CHECK_VALUE(addend->size(0) == p.B && addend->size(1) == p.O &&
                          (per_sample || (addend->size(2) == p.OH && addend->size(3) == p.OW)),
                      "addend has shape ", addend->sizes(), ": expected ", output.sizes(), " or one value per channel");
    a = addend->to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
    p.addend_sample = per_sample ? p.O : p.O * p.OH * p.OW;
    p.addend_pixel = per_sample ? 0 : p.O;
  }
  const bool three = p.KH == 3 && p.KW == 3 && p.SH == 1 && p.SW == 1 && p.DH == 1 && p.DW == 1 && groups == 1;
  compute(p, three && weight_bits <= 4 && input_bits <= 6 ? winograd : direct,
          input.contiguous(at::MemoryFormat::ChannelsLast), weight, weight_scale, input_scale, bias, a, segments, output);
  return output.to(dtype);
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, const Tensor& input_scale,
              const std::optional<Tensor>& bias, int64_t weight_bits, at::IntArrayRef segments, at::ScalarType dtype,
              const std::optional<Tensor>& addend) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "input has ", input.dim(), " dimensions: expected (B, ..., K)");
  Problem p{};
  p.B = input.size(0), p.C = input.size(-1), p.O = weight_scale.numel();
  p.H = p.B * p.C ? input.numel() / (p.B * p.C) : 0, p.OH = p.H, p.bits = (int)weight_bits;
  p.W = p.OW = p.KH = p.KW = p.SH = p.SW = p.DH = p.DW = p.groups = 1;
  check(input, weight, input_scale, bias, weight_bits, segments, p.C, p.O, p.C);
  auto shape = input.sizes().vec();
  shape.back() = p.O;
  Tensor output = at::empty(shape, input.options().dtype(at::kFloat));
  Tensor a;
  if (addend) {
    TORCH_CHECK_VALUE(addend->sizes() == output.sizes(), "addend has shape ", addend->sizes(), ": expected ", output.sizes());
    a = addend->to(at::kFloat).contiguous();
    p.addend_sample = p.H * p.O, p.addend_pixel = p.O;
  }
  compute(p, direct, input.contiguous(), weight, weight_scale, input_scale, bias, a, segments, output);
  return output.to(dtype);
}

Tensor norm_silu_quantize(at::TensorList inputs, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                          int64_t norm_groups, double eps, bool silu, const Tensor& scale, const Tensor& low,
                          at::IntArrayRef segments, int64_t bits, int64_t upsample) {
  TORCH_CHECK_VALUE(!inputs.empty() && upsample >= 1, "no input, or upsample=", upsample);
  const Tensor& head = inputs[0];
  Quantize p{};
  std::vector<Tensor> held;
  for (auto& input : inputs) {
    TORCH_CHECK_VALUE(input.dim() == 4 && input.size(0) == head.size(0) && input.size(2) == head.size(2) &&
                          input.size(3) == head.size(3),
                      "inputs of shapes ", head.sizes(), " and ", input.sizes(), " do not stand side by side");
    held.push_back(input.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast));
    p.sources.push_back({held.back().const_data_ptr<float>(), input.size(1), p.C});
    p.C += input.size(1);
  }
  p.B = head.size(0), p.H = head.size(2), p.W = head.size(3), p.norm_groups = norm_groups, p.upsample = upsample;
  p.eps = eps, p.silu = silu, p.bits = (int)bits, p.segments = segments.vec();
  check_grid("scale", scale, segments, p.B, p.C);
  check_grid("low", low, segments, p.B, p.C);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, "bits=", bits, ": allowed are 2 to 8");
  TORCH_CHECK_VALUE(norm_groups == 0 || p.C % norm_groups == 0, p.C, " channels in ", norm_groups, " groups");
  for (auto* affine : {&weight, &bias})
    TORCH_CHECK_VALUE(!*affine || (*affine)->numel() == p.C, "a norm's weight or bias has ", *affine ? (*affine)->numel() : 0,
                      " values: expected ", p.C);
  Tensor output = at::empty({p.B, p.C, p.H * upsample, p.W * upsample}, head.options().dtype(at::kChar),
                            at::MemoryFormat::ChannelsLast);
  if (output.numel() > 0) {
    const Tensor s = scale.to(at::kFloat).contiguous(), l = low.to(at::kLong).contiguous();
    Tensor w, b;
    if (weight) w = weight->to(at::kFloat).contiguous(), p.norm_weight = w.const_data_ptr<float>();
    if (bias) b = bias->to(at::kFloat).contiguous(), p.norm_bias = b.const_data_ptr<float>();
    p.scale = s.const_data_ptr<float>(), p.low = l.const_data_ptr<int64_t>();
    p.output = output.mutable_data_ptr<int8_t>();
    quantize(p);
  }
  return output;
}

Tensor quantize_op(const Tensor& input, const Tensor& scale, const Tensor& low, at::IntArrayRef segments, int64_t bits,
                   int64_t channel_dim) {
  const int64_t rank = input.dim(), dim = channel_dim < 0 ? channel_dim + rank : channel_dim;
  TORCH_CHECK_VALUE(rank >= 2 && (dim == rank - 1 || (dim == 1 && rank == 4)), "channel_dim=", channel_dim,
                    " of an input of ", rank, " dimensions: allowed are the last, and 1 of 4");
  if (dim == 1 && rank == 4)
    return norm_silu_quantize({input}, {}, {}, 0, 0, false, scale, low, segments, bits, 1);
  const Tensor x = input.contiguous();
  const int64_t rows = x.numel() ? x.numel() / (x.size(0) * x.size(-1)) : 0;
  Tensor flat = x.view({x.size(0), rows, 1, x.size(-1)}).permute({0, 3, 1, 2});
  return norm_silu_quantize({flat}, {}, {}, 0, 0, false, scale, low, segments, bits, 1).permute({0, 2, 3, 1}).reshape(x.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(pqcad, CPU, m) {
  m.impl("conv2d", conv2d);
  m.impl("linear", linear);
  m.impl("quantize", quantize_op);
  m.impl("norm_silu_quantize", norm_silu_quantize);
}
extern "C" const char* pqcad_cpu_kernels() { return "AVX512-VNNI"; }
#else
extern "C" const char* pqcad_cpu_kernels() { return ""; }
#endif
