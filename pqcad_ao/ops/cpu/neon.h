// Primitives of ARM's NEON with its products of bytes (Armv8.2's dotprod). What each of them means is said in generic.h.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

namespace {

constexpr const char* INSTRUCTIONS = "NEON dotprod";

constexpr int LANES = 4;
constexpr int BYTES = 16;
constexpr int WIDEST = 4;
template <int NR> constexpr int rows_of() { return NR == 4 ? 4 : NR == 3 ? 6 : NR == 2 ? 8 : 12; }  // of 32 registers
constexpr int OFFSET = 0;

// The compiler's own vectors: they bring their operators along, and no type is taken for another.
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
typedef int8_t LaneBytes __attribute__((vector_size(4)));

using LaneMask = int;
using ByteMask = int;
inline LaneMask first_lanes(int64_t n) { return (int)std::clamp<int64_t>(n, 0, LANES); }
inline ByteMask first_bytes(int64_t n) { return (int)std::clamp<int64_t>(n, 0, BYTES); }

// ---------------------------------------------------------------------------------------------- load and store

inline Bytes all_bytes(int value) { return (Bytes)vdupq_n_u8((uint8_t)value); }
inline Ints all_ints(int32_t value) { return (Ints)vdupq_n_s32(value); }
inline Floats all_floats(float value) { return (Floats)vdupq_n_f32(value); }

inline Bytes load_bytes(const void* from) { return (Bytes)vld1q_u8((const uint8_t*)from); }
inline Bytes load_bytes(const void* from, ByteMask mask) {
  if (mask == BYTES) return load_bytes(from);
  Bytes some{};
  std::memcpy(&some, from, mask);
  return some;
}
inline Ints load_ints(const int32_t* from) { return (Ints)vld1q_s32(from); }
inline Floats load_floats(const float* from, LaneMask mask) {
  if (mask == LANES) return (Floats)vld1q_f32(from);
  Floats some{};
  std::memcpy(&some, from, mask * sizeof(float));
  return some;
}
inline void store(void* to, Bytes v) { vst1q_u8((uint8_t*)to, (uint8x16_t)v); }
inline void store(void* to, Bytes v, ByteMask mask) {
  if (mask == BYTES) return store(to, v);
  std::memcpy(to, &v, mask);
}
inline void store(int32_t* to, Ints v) { vst1q_s32(to, (int32x4_t)v); }
inline void store(float* to, Floats v) { vst1q_f32(to, (float32x4_t)v); }
inline void store(float* to, Floats v, LaneMask mask) {
  if (mask == LANES) return store(to, v);
  std::memcpy(to, &v, mask * sizeof(float));
}
inline void store(int8_t* to, LaneBytes v, LaneMask mask) {
  if (mask == LANES)
    std::memcpy(to, &v, LANES);
  else
    std::memcpy(to, &v, mask);
}

inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

inline bool streams() { return false; }  // a register is no line of the cache
inline void stream(float* to, Floats v) { store(to, v); }
inline void finish_streams() {}

// ------------------------------------------------------------------------------------------------------- bytes

constexpr int DOT_WEIGHTS = 128;
inline Ints dot(Ints sums, Bytes activations, Bytes weights) {
  return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)activations, (int8x16_t)weights);
}
inline Ints dot_any(Ints sums, Bytes activations, Bytes weights) { return dot(sums, activations, weights); }

inline Bytes four_bytes(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return (Bytes)vdupq_n_s32(four);
}

inline Bytes min(Bytes a, Bytes b) { return (Bytes)vminq_s8((int8x16_t)a, (int8x16_t)b); }

inline Bytes even_first(Bytes v) {
  const uint8x16_t order = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
  return (Bytes)vqtbl1q_u8((uint8x16_t)v, order);
}

inline Bytes low_nibbles(Bytes v) { return (Bytes)vshrq_n_s8(vshlq_n_s8((int8x16_t)v, 4), 4); }
inline Bytes high_nibbles(Bytes v) { return (Bytes)vshrq_n_s8((int8x16_t)v, 4); }

inline void transpose(Bytes (&rows)[LANES]) {
  const int32x4x2_t top = vtrnq_s32((int32x4_t)rows[0], (int32x4_t)rows[1]),
                    bottom = vtrnq_s32((int32x4_t)rows[2], (int32x4_t)rows[3]);
  for (int k = 0; k < 2; k++) {
    rows[k] = (Bytes)vcombine_s32(vget_low_s32(top.val[k]), vget_low_s32(bottom.val[k]));
    rows[2 + k] = (Bytes)vcombine_s32(vget_high_s32(top.val[k]), vget_high_s32(bottom.val[k]));
  }
}

// ------------------------------------------------------------------------------------------------------- pairs

inline Bytes pairs(Floats a, Floats b) {
  const auto rounded = [](Floats v) {  // in the upper half of each lane
    const uint32x4_t bits = (uint32x4_t)v, odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32((float32x4_t)v, (float32x4_t)v);
    return vbslq_u32(number, vandq_u32(sum, vdupq_n_u32(0xffff0000)), vdupq_n_u32(0x7fc00000));
  };
  return (Bytes)vorrq_u32(vshrq_n_u32(rounded(a), 16), rounded(b));
}
inline Floats dot_pairs(Floats sums, Bytes a, Bytes b) {
  const auto low = [](Bytes v) { return (float32x4_t)vshlq_n_u32((uint32x4_t)v, 16); };
  const auto high = [](Bytes v) { return (float32x4_t)vandq_u32((uint32x4_t)v, vdupq_n_u32(0xffff0000)); };
  return (Floats)vfmaq_f32(vfmaq_f32((float32x4_t)sums, low(a), low(b)), high(a), high(b));
}

// ------------------------------------------------------------------------------------------------------ floats

inline Floats to_floats(Ints v) { return (Floats)vcvtq_f32_s32((int32x4_t)v); }
inline Floats byte_of_lanes(Bytes v, int byte) { return to_floats(((Ints)v << (24 - 8 * byte)) >> 24); }
inline Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
// Not vminq_f32 and vmaxq_f32, which make a NaN of one that stands on either side.
inline Floats min(Floats a, Floats b) {
  return (Floats)vbslq_f32(vcltq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}
inline Floats max(Floats a, Floats b) {
  return (Floats)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}
inline Floats round(Floats v) { return (Floats)vrndnq_f32((float32x4_t)v); }
inline LaneBytes to_bytes(Floats v) {
  const int16x4_t halves = vqmovn_s32(vcvtnq_s32_f32((float32x4_t)v));
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(halves, halves));
  return std::bit_cast<LaneBytes>(vget_lane_s32(vreinterpret_s32_s8(bytes), 0));
}
inline Floats times_power_of_two(Floats v, Floats n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32((float32x4_t)n), vdupq_n_s32(127));
  return v * (Floats)vshlq_n_s32(exponent, 23);
}
inline Floats reciprocal(Floats v) { return (Floats)vdivq_f32(vdupq_n_f32(1.f), (float32x4_t)v); }

}  // namespace
