// Primitives of AVX512-VNNI. What each of them means is said in generic.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512BF16__
constexpr const char* INSTRUCTIONS = "AVX512-VNNI with BF16";
#else
constexpr const char* INSTRUCTIONS = "AVX512-VNNI";
#endif

constexpr int LANES = 16;
constexpr int BYTES = 64;
constexpr int WIDEST = 4;
template <int NR> constexpr int rows_of() { return NR == 4 ? 6 : NR == 3 ? 8 : NR == 2 ? 12 : 24; }  // of 32 registers
constexpr int OFFSET = 128;

// The compiler's own vectors: they bring their operators along, and no type is taken for another.
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef int8_t LaneBytes __attribute__((vector_size(16)));

using LaneMask = __mmask16;
using ByteMask = __mmask64;
inline LaneMask first_lanes(int64_t n) { return n >= LANES ? 0xffff : n > 0 ? (LaneMask)((1u << n) - 1) : 0; }
inline ByteMask first_bytes(int64_t n) { return n >= BYTES ? ~0ull : n > 0 ? (1ull << n) - 1 : 0; }

// ---------------------------------------------------------------------------------------------- load and store

inline Bytes all_bytes(int value) { return (Bytes)_mm512_set1_epi8((char)value); }
inline Ints all_ints(int32_t value) { return (Ints)_mm512_set1_epi32(value); }
inline Floats all_floats(float value) { return (Floats)_mm512_set1_ps(value); }

inline Bytes load_bytes(const void* from) { return (Bytes)_mm512_loadu_si512(from); }
inline Bytes load_bytes(const void* from, ByteMask mask) { return (Bytes)_mm512_maskz_loadu_epi8(mask, from); }
inline Ints load_ints(const int32_t* from) { return (Ints)_mm512_loadu_si512(from); }
inline Floats load_floats(const float* from, LaneMask mask) { return (Floats)_mm512_maskz_loadu_ps(mask, from); }
inline void store(void* to, Bytes v) { _mm512_storeu_si512(to, (__m512i)v); }
inline void store(void* to, Bytes v, ByteMask mask) { _mm512_mask_storeu_epi8(to, mask, (__m512i)v); }
inline void store(int32_t* to, Ints v) { _mm512_storeu_si512(to, (__m512i)v); }
inline void store(float* to, Floats v) { _mm512_storeu_ps(to, (__m512)v); }
inline void store(float* to, Floats v, LaneMask mask) { _mm512_mask_storeu_ps(to, mask, (__m512)v); }
inline void store(int8_t* to, LaneBytes v, LaneMask mask) { _mm_mask_storeu_epi8(to, mask, (__m128i)v); }

inline void prefetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

// Measured on an Emerald Rapids, where a core writes scattered lines of many megabytes to the third level at a fifth of the
// speed at which it streams them to memory. AMD has not been measured: its third level is nearer.
inline bool streams() { return __builtin_cpu_is("intel"); }
inline void stream(float* to, Floats v) { _mm512_stream_ps(to, (__m512)v); }
inline void finish_streams() { _mm_sfence(); }

// ------------------------------------------------------------------------------------------------------- bytes

constexpr int DOT_WEIGHTS = 128;
inline Ints dot(Ints sums, Bytes activations, Bytes weights) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)activations, (__m512i)weights);
}
inline Ints dot_any(Ints sums, Bytes activations, Bytes weights) { return dot(sums, activations, weights); }

inline Bytes four_bytes(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return (Bytes)_mm512_set1_epi32(four);
}

inline Bytes min(Bytes a, Bytes b) { return (Bytes)_mm512_min_epi8((__m512i)a, (__m512i)b); }

inline Bytes even_first(Bytes v) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return (Bytes)_mm512_shuffle_epi8((__m512i)v, _mm512_broadcast_i32x4(order));
}

inline Bytes low_nibbles(Bytes v) {
  const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return (Bytes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), _mm512_and_si512((__m512i)v, _mm512_set1_epi8(15)));
}
inline Bytes high_nibbles(Bytes v) { return low_nibbles((Bytes)_mm512_srli_epi16((__m512i)v, 4)); }

inline void transpose(Bytes (&rows)[LANES]) {
  __m512i r[LANES], t[LANES];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + 2 + k]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + 2 + k]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int k = 0; k < 4; k++) {
      t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0x88);
      t[i + 4 + k] = _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0xdd);
    }
  for (int k = 0; k < 8; k++) {
    rows[k] = (Bytes)_mm512_shuffle_i32x4(t[k], t[8 + k], 0x88);
    rows[8 + k] = (Bytes)_mm512_shuffle_i32x4(t[k], t[8 + k], 0xdd);
  }
}

// ------------------------------------------------------------------------------------------------------- pairs

#ifdef __AVX512BF16__
inline Bytes pairs(Floats a, Floats b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Bytes)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
inline Floats dot_pairs(Floats sums, Bytes a, Bytes b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#else
inline Bytes pairs(Floats a, Floats b) {
  const auto rounded = [](Floats v) {  // in the upper half of each lane
    const __m512i bits = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_and_si512(sum, _mm512_set1_epi32(-65536)), nan, _mm512_set1_epi32(0x7fc00000));
  };
  return (Bytes)_mm512_or_si512(_mm512_srli_epi32(rounded(a), 16), rounded(b));
}
inline Floats dot_pairs(Floats sums, Bytes a, Bytes b) {
  const auto low = [](Bytes v) { return (__m512)_mm512_slli_epi32((__m512i)v, 16); };
  const auto high = [](Bytes v) { return (__m512)_mm512_and_si512((__m512i)v, _mm512_set1_epi32(-65536)); };
  return (Floats)_mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), (__m512)sums));
}
#endif

// ------------------------------------------------------------------------------------------------------ floats

inline Floats to_floats(Ints v) { return (Floats)_mm512_cvtepi32_ps((__m512i)v); }
inline Floats byte_of_lanes(Bytes v, int byte) { return to_floats(((Ints)v << (24 - 8 * byte)) >> 24); }
inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Floats min(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline Floats max(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats round(Floats v) { return (Floats)_mm512_roundscale_ps((__m512)v, 8); }
inline LaneBytes to_bytes(Floats v) { return (LaneBytes)_mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v)); }
inline Floats times_power_of_two(Floats v, Floats n) { return (Floats)_mm512_scalef_ps((__m512)v, (__m512)n); }

inline Floats reciprocal(Floats v) {  // 14 bits, and a Newton step: together shorter than a division
  const __m512 guess = _mm512_rcp14_ps((__m512)v);
  return (Floats)_mm512_mul_ps(guess, _mm512_fnmadd_ps((__m512)v, guess, _mm512_set1_ps(2.f)));
}

}  // namespace
