// Attention, softmax(q k^T scale) v: products of bfloat16, two to a lane, and sums, exponentials and division in single
// precision. The scores of a few rows are all there is of them at a time.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "product.h"

namespace {

struct Tokens {  // their channels lie side by side
  const float* data;
  int64_t sample, head, token;  // strides
  const float* of(int64_t b, int64_t h) const { return data + b * sample + h * head; }
};

struct Attention {
  Tokens query, key, value;
  float* output;  // (B, L, heads, D)
  int64_t B, heads, L, S, D;
  float scale;

  // Padded with zeros: channels that are summed over, keys, and channels of the result.
  int64_t depth() const { return (D + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }
  int64_t keys() const { return (S + COLUMNS - 1) / COLUMNS * COLUMNS; }
  int64_t channels() const { return (D + COLUMNS - 1) / COLUMNS * COLUMNS; }

  static constexpr int64_t COLUMNS = WIDEST * LANES;
};

constexpr int HEIGHT = rows_of<WIDEST>();  // rows of queries that are worked on together

// Two registers of values from `first` on, of which there are `count`, as pairs of bfloat16.
inline Bytes paired(const float* first, int64_t count, Floats factor) {
  return pairs(load_floats(first, first_lanes(count)) * factor,
               load_floats(first + std::min<int64_t>(count, LANES), first_lanes(count - LANES)) * factor);
}

// to[HEIGHT][COLUMNS], rows `stride` apart: sums over `count` pairs. rows: [HEIGHT][count], w: [count][WIDEST][LANES].
//
// Never inlined, as in product.h.
C10_NOINLINE void pair_product(const uint8_t* rows, const uint8_t* w, int64_t count, float* to, int64_t stride) {
  Floats sums[HEIGHT][WIDEST];
  PQCAD_UNROLL for (int i = 0; i < HEIGHT; i++)
    PQCAD_UNROLL for (int j = 0; j < WIDEST; j++) sums[i][j] = all_floats(0);
  for (int64_t k = 0; k < count; k++, w += WIDEST * BYTES) {
    Bytes b[WIDEST];
    PQCAD_UNROLL for (int j = 0; j < WIDEST; j++) b[j] = load_bytes(w + j * BYTES);
    PQCAD_UNROLL for (int i = 0; i < HEIGHT; i++) {
      const Bytes a = four_bytes(rows + 4 * (i * count + k));
      PQCAD_UNROLL for (int j = 0; j < WIDEST; j++) sums[i][j] = dot_pairs(sums[i][j], a, b[j]);
    }
  }
  PQCAD_UNROLL for (int i = 0; i < HEIGHT; i++)
    PQCAD_UNROLL for (int j = 0; j < WIDEST; j++) store(to + i * stride + j * LANES, sums[i][j]);
}

// One head's keys as [keys/COLUMNS][depth/2][WIDEST][LANES] pairs: a lane is a key, a pair two of its channels.
void pack_keys(const Attention& p, const float* key, uint8_t* to) {
  const int64_t depth = p.depth();
  for (int64_t s = 0; s < p.keys(); s += LANES) {
    uint8_t* of_keys = to + s / p.COLUMNS * (depth / 2) * WIDEST * BYTES + s % p.COLUMNS / LANES * BYTES;
    for (int64_t c = 0; c < depth; c += 2 * LANES) {
      Bytes rows[LANES];
      for (int l = 0; l < LANES; l++)
        rows[l] = s + l < p.S ? paired(key + (s + l) * p.key.token + c, p.D - c, all_floats(1)) : all_bytes(0);
      transpose(rows);
      for (int l = 0; l < LANES; l++) store(of_keys + (c / 2 + l) * WIDEST * BYTES, rows[l]);
    }
  }
}

// One head's values as [channels/COLUMNS][keys/2][WIDEST][LANES] pairs: a lane is a channel, a pair that of two keys.
void pack_values(const Attention& p, const float* value, uint8_t* to) {
  const int64_t keys = p.keys();
  for (int64_t s = 0; s < keys; s += 2 * LANES)
    for (int l = 0; l < LANES; l++) {
      const int64_t one = s + l, two = one + LANES;
      for (int64_t c = 0; c < p.channels(); c += LANES) {
        const int64_t left = std::max<int64_t>(p.D - c, 0), from = std::min(c, p.D);
        const LaneMask first = first_lanes(one < p.S ? left : 0), second = first_lanes(two < p.S ? left : 0);
        store(to + ((c / p.COLUMNS * (keys / 2) + s / 2 + l) * WIDEST + c % p.COLUMNS / LANES) * BYTES,
              pairs(load_floats(value + std::min(one, p.S - 1) * p.value.token + from, first),
                    load_floats(value + std::min(two, p.S - 1) * p.value.token + from, second)));
      }
    }
}

// A row of scores to pairs of e^(score - the greatest); returns one over their sum. NaN and infinity become NaN.
float exponentials(float* scores, int64_t keys, int64_t padded, uint8_t* to) {
  std::fill(scores + keys, scores + padded, -INFINITY);
  alignas(BYTES) float lanes[LANES];
  Floats most = load_floats(scores, first_lanes(LANES)), sum = all_floats(0);
  for (int64_t s = LANES; s < padded; s += LANES) most = max(most, load_floats(scores + s, first_lanes(LANES)));
  store(lanes, most);
  const Floats greatest = all_floats(*std::max_element(lanes, lanes + LANES));
  for (int64_t s = 0; s < padded; s += 2 * LANES) {
    const Floats one = exp_of(load_floats(scores + s, first_lanes(LANES)) - greatest),
                 two = exp_of(load_floats(scores + s + LANES, first_lanes(LANES)) - greatest);
    sum = sum + (one + two);
    store(to + 2 * s, pairs(one, two));
  }
  store(lanes, sum);
  float total = 0;
  for (float lane : lanes) total += lane;
  return 1 / total;
}

// Rows [from, from + used) of one head, used at most HEIGHT.
void attend(const Attention& p, int64_t b, int64_t h, int64_t from, int64_t used, const uint8_t* keys,
            const uint8_t* values, uint8_t* queries, uint8_t* weights_of, float* scores) {
  const int64_t depth = p.depth(), padded = p.keys();
  const float* query = p.query.of(b, h);
  for (int64_t i = 0; i < HEIGHT; i++)  // the last one again, where there are no more
    for (int64_t c = 0; c < depth; c += 2 * LANES)
      store(queries + 2 * (i * depth + c),
            paired(query + (from + std::min(i, used - 1)) * p.query.token + c, p.D - c, all_floats(p.scale)));
  for (int64_t s = 0; s < padded; s += p.COLUMNS)
    pair_product(queries, keys + s * depth * 2, depth / 2, scores + s, padded);
  float share[HEIGHT];
  for (int64_t i = 0; i < HEIGHT; i++)
    share[i] = exponentials(scores + i * padded, p.S, padded, weights_of + 2 * i * padded);
  alignas(BYTES) float sums[HEIGHT * Attention::COLUMNS];
  for (int64_t c = 0; c < p.D; c += p.COLUMNS) {
    pair_product(weights_of, values + c * padded * 2, padded / 2, sums, p.COLUMNS);
    for (int64_t i = 0; i < used; i++)
      for (int64_t k = 0; k < std::min<int64_t>(p.COLUMNS, p.D - c); k += LANES)
        store(p.output + ((b * p.L + from + i) * p.heads + h) * p.D + c + k,
              load_floats(sums + i * p.COLUMNS + k, first_lanes(LANES)) * all_floats(share[i]),
              first_lanes(p.D - c - k));
  }
}

void attention(const Attention& p) {
  const int64_t blocks = (p.L + HEIGHT - 1) / HEIGHT, depth = p.depth(), padded = p.keys();
  torch::stable::parallel_for(0, p.B * p.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    uint8_t* keys = weights.of<uint8_t>(2 * padded * (depth + p.channels()));
    uint8_t* values = keys + 2 * padded * depth;
    uint8_t* queries = activations.of<uint8_t>(2 * HEIGHT * (depth + padded));
    float* scores = products.of<float>(HEIGHT * padded);
    int64_t current = -1;
    for (int64_t task = begin; task < end; task++) {
      const int64_t head = task / blocks, b = head / p.heads, h = head % p.heads, from = task % blocks * HEIGHT;
      if (current != head) {
        current = head;
        pack_keys(p, p.key.of(b, h), keys);
        pack_values(p, p.value.of(b, h), values);
      }
      attend(p, b, h, from, std::min<int64_t>(HEIGHT, p.L - from), keys, values, queries, queries + 2 * HEIGHT * depth,
             scores);
    }
  });
}

}  // namespace
