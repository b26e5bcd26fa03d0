// The innermost product: rows of activations with a panel of weights.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <type_traits>

#include "problem.h"

// Before a loop over registers: unrolled early, an array of them becomes registers; later, GCC leaves it in memory.
#define PQCAD_UNROLL _Pragma("GCC unroll 24")

namespace {

// Calls f with whether `dot` takes weights of this magnitude, as a constant. Where it takes all, nothing is compiled
// for others.
template <class F> void with_dot(int magnitude, F&& f) {
  if constexpr (DOT_WEIGHTS < 128)
    if (magnitude > DOT_WEIGHTS) return f(std::false_type{});
  f(std::true_type{});
}

// to[MR][NR][LANES], 32-bit sums of MR rows of activations with NR registers of outputs, over `count` stretches of K
// channels each, K a multiple of 4: stretch t of row i begins at rows[i] + starts[t]. w: [count][K/4][NR][LANES][4],
// which `dot` takes, or else `dot_any`.
//
// Never inlined, so that no code around it asks for its registers: GCC 12 kept the sums on the stack wherever anything
// was added to a caller's loop, at a third of the speed.
template <int MR, int NR, bool DOT>
C10_NOINLINE void product(const uint8_t* const* rows, const int64_t* starts, int64_t count, int64_t K, const int8_t* w,
                          int32_t* to) {
  static_assert(TILE % MR == 0 && MR <= 24);
  Ints sums[MR][NR];
  PQCAD_UNROLL for (int i = 0; i < MR; i++)
    PQCAD_UNROLL for (int j = 0; j < NR; j++) sums[i][j] = all_ints(0);
  for (int64_t t = 0; t < count; t++) {
    const uint8_t* row[MR];
    PQCAD_UNROLL for (int i = 0; i < MR; i++) row[i] = rows[i] + starts[t];
    for (int64_t k = 0; k < K; k += 4, w += NR * BYTES) {
      Bytes b[NR];
      PQCAD_UNROLL for (int j = 0; j < NR; j++) b[j] = load_bytes(w + j * BYTES);
      PQCAD_UNROLL for (int i = 0; i < MR; i++) {
        const Bytes a = four_bytes(row[i] + k);
        PQCAD_UNROLL for (int j = 0; j < NR; j++) sums[i][j] = DOT ? dot(sums[i][j], a, b[j]) : dot_any(sums[i][j], a, b[j]);
      }
    }
  }
  PQCAD_UNROLL for (int i = 0; i < MR; i++)
    PQCAD_UNROLL for (int j = 0; j < NR; j++) store(to + (i * NR + j) * LANES, sums[i][j]);
}

}  // namespace
