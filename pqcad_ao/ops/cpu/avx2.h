// Primitives of registers of 32 bytes: AVX2, and AVX-VNNI where it is compiled for. What each of them means is said in
// generic.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 8;
constexpr int BYTES = 32;
constexpr int WIDEST = 2;
constexpr int OFFSET = 128;

// The compiler's own vectors: they bring their operators along, and no type is taken for another.
typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
typedef int8_t LaneBytes __attribute__((vector_size(8)));

// Counts: a whole register is stored without a mask, which AMD's processors would take twenty times as long for.
using LaneMask = int;
using ByteMask = int;
inline LaneMask first_lanes(int64_t n) { return (int)std::clamp<int64_t>(n, 0, LANES); }
inline ByteMask first_bytes(int64_t n) { return (int)std::clamp<int64_t>(n, 0, BYTES); }

// ---------------------------------------------------------------------------------------------- load and store

inline Bytes all_bytes(int value) { return (Bytes)_mm256_set1_epi8((char)value); }
inline Ints all_ints(int32_t value) { return (Ints)_mm256_set1_epi32(value); }
inline Floats all_floats(float value) { return (Floats)_mm256_set1_ps(value); }

const auto of_lanes = [](LaneMask mask) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(mask), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
};

inline Bytes load_bytes(const void* from) { return (Bytes)_mm256_loadu_si256((const __m256i*)from); }
inline Bytes load_bytes(const void* from, ByteMask mask) {
  if (mask == BYTES) return load_bytes(from);
  alignas(BYTES) uint8_t some[BYTES] = {};
  std::memcpy(some, from, mask);
  return load_bytes(some);
}
inline Ints load_ints(const int32_t* from) { return (Ints)_mm256_loadu_si256((const __m256i*)from); }
inline Floats load_floats(const float* from, LaneMask mask) {
  if (mask == LANES) return (Floats)_mm256_loadu_ps(from);
  return (Floats)_mm256_maskload_ps(from, of_lanes(mask));
}
inline void store(void* to, Bytes v) { _mm256_storeu_si256((__m256i*)to, (__m256i)v); }
inline void store(void* to, Bytes v, ByteMask mask) {
  if (mask == BYTES) return store(to, v);
  alignas(BYTES) uint8_t some[BYTES];
  store(some, v);
  std::memcpy(to, some, mask);
}
inline void store(int32_t* to, Ints v) { _mm256_storeu_si256((__m256i*)to, (__m256i)v); }
inline void store(float* to, Floats v) { _mm256_storeu_ps(to, (__m256)v); }
inline void store(float* to, Floats v, LaneMask mask) {
  if (mask == LANES) return store(to, v);
  _mm256_maskstore_ps(to, of_lanes(mask), (__m256)v);
}
inline void store(int8_t* to, LaneBytes v, LaneMask mask) {
  if (mask == LANES)
    std::memcpy(to, &v, LANES);
  else
    std::memcpy(to, &v, mask);
}

inline void prefetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

inline bool streams() { return false; }  // a register is no line of the cache
inline void stream(float* to, Floats v) { store(to, v); }
inline void finish_streams() {}

// ------------------------------------------------------------------------------------------------------- bytes

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
constexpr const char* INSTRUCTIONS = "AVX-VNNI";
template <int NR> constexpr int rows_of() { return NR == 2 ? 6 : 12; }  // of 16 registers
constexpr int DOT_WEIGHTS = 128;

inline Ints dot(Ints sums, Bytes activations, Bytes weights) {
#ifdef __AVXVNNI__
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)activations, (__m256i)weights);
#else  // the same instruction as AVX512 encodes it
  return (Ints)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)activations, (__m256i)weights);
#endif
}
inline Ints dot_any(Ints sums, Bytes activations, Bytes weights) { return dot(sums, activations, weights); }
#else
constexpr const char* INSTRUCTIONS = "AVX2";
template <int NR> constexpr int rows_of() { return NR == 2 ? 4 : 8; }  // GCC 12 keeps one of more sums in memory
constexpr int DOT_WEIGHTS = 64;

// Two products of a byte with a weight are added in 16 bits, which saturate: 2 * 255 * 64 = 32640 fits, 2 * 255 * 65
// does not.
inline Ints dot(Ints sums, Bytes activations, Bytes weights) {
  const __m256i twos = _mm256_maddubs_epi16((__m256i)activations, (__m256i)weights);
  return sums + (Ints)_mm256_madd_epi16(twos, _mm256_set1_epi16(1));
}

// Widened to 16 bits first, the even bytes and the odd ones.
inline Ints dot_any(Ints sums, Bytes activations, Bytes weights) {
  const __m256i a = (__m256i)activations, w = (__m256i)weights;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(w, 8));
  return sums + (Ints)even + (Ints)odd;
}
#endif

inline Bytes four_bytes(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return (Bytes)_mm256_set1_epi32(four);
}

inline Bytes min(Bytes a, Bytes b) { return (Bytes)_mm256_min_epi8((__m256i)a, (__m256i)b); }

inline Bytes even_first(Bytes v) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return (Bytes)_mm256_shuffle_epi8((__m256i)v, _mm256_broadcastsi128_si256(order));
}

inline Bytes low_nibbles(Bytes v) {
  const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const __m256i nibbles = _mm256_and_si256((__m256i)v, _mm256_set1_epi8(15));
  return (Bytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), nibbles);
}
inline Bytes high_nibbles(Bytes v) { return low_nibbles((Bytes)_mm256_srli_epi16((__m256i)v, 4)); }

inline void transpose(Bytes (&rows)[LANES]) {
  __m256i r[LANES], t[LANES];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm256_unpacklo_epi64(t[i + k], t[i + 2 + k]);
      r[i + 2 * k + 1] = _mm256_unpackhi_epi64(t[i + k], t[i + 2 + k]);
    }
  for (int k = 0; k < 4; k++) {
    rows[k] = (Bytes)_mm256_permute2x128_si256(r[k], r[4 + k], 0x20);
    rows[4 + k] = (Bytes)_mm256_permute2x128_si256(r[k], r[4 + k], 0x31);
  }
}

// ------------------------------------------------------------------------------------------------------- pairs

inline Bytes pairs(Floats a, Floats b) {
  const auto rounded = [](Floats v) {  // in the upper half of each lane
    const __m256i bits = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(_mm256_and_si256(sum, _mm256_set1_epi32(-65536)), _mm256_set1_epi32(0x7fc00000), nan);
  };
  return (Bytes)_mm256_or_si256(_mm256_srli_epi32(rounded(a), 16), rounded(b));
}
inline Floats dot_pairs(Floats sums, Bytes a, Bytes b) {
  const auto low = [](Bytes v) { return (__m256)_mm256_slli_epi32((__m256i)v, 16); };
  const auto high = [](Bytes v) { return (__m256)_mm256_and_si256((__m256i)v, _mm256_set1_epi32(-65536)); };
  return (Floats)_mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), (__m256)sums));
}

// ------------------------------------------------------------------------------------------------------ floats

inline Floats to_floats(Ints v) { return (Floats)_mm256_cvtepi32_ps((__m256i)v); }
inline Floats byte_of_lanes(Bytes v, int byte) { return to_floats(((Ints)v << (24 - 8 * byte)) >> 24); }
inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Floats min(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline Floats max(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Floats round(Floats v) { return (Floats)_mm256_round_ps((__m256)v, 8); }
inline LaneBytes to_bytes(Floats v) {
  const __m256i ints = _mm256_cvtps_epi32((__m256)v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  return std::bit_cast<LaneBytes>(_mm_cvtsi128_si64(_mm_packs_epi16(halves, halves)));
}
inline Floats times_power_of_two(Floats v, Floats n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32((__m256)n), _mm256_set1_epi32(127));
  return v * (Floats)_mm256_slli_epi32(exponent, 23);
}
inline Floats reciprocal(Floats v) { return (Floats)_mm256_div_ps(_mm256_set1_ps(1.f), (__m256)v); }

}  // namespace
