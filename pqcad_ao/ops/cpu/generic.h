// Primitives in plain C++, for any processor: they say what every file of primitives means. Defining PQCAD_GENERIC, a
// register's lanes, chooses them; they are slow, and the tests hold the loops around them to the same exactness as any
// other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr const char* INSTRUCTIONS = "plain C++";  // as users read it

// ----------------------------------------------------------------------------------------- sizes of a register

constexpr int LANES = PQCAD_GENERIC;  // 32-bit lanes in a register: output channels
constexpr int BYTES = 4 * LANES;      // a multiple of 8
constexpr int WIDEST = 4;             // registers of output channels that are worked on together

// Rows of activations that are worked on together with NR registers of output channels: as many as leave all their
// sums in registers. A divisor of TILE.
template <int NR> constexpr int rows_of() { return 4; }

// What is added to activations that `dot` takes: 0 where it takes signed bytes, 128 where it takes unsigned ones.
constexpr int OFFSET = 0;

// ------------------------------------------------------------------------------------------------------- types

// With the operators that each type needs: Bytes + -, Ints + - * and >> (arithmetic), Floats + * and the unary -.
template <class T, int N> struct Vector {
  T lane[N];

  template <class F> static Vector each(F f) {
    Vector v;
    for (int i = 0; i < N; i++) v.lane[i] = (T)f(i);
    return v;
  }
  friend Vector operator+(const Vector& a, const Vector& b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  friend Vector operator-(const Vector& a, const Vector& b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
  friend Vector operator*(const Vector& a, const Vector& b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  friend Vector operator>>(const Vector& a, int bits) { return each([&](int i) { return a.lane[i] >> bits; }); }
  friend Vector operator-(const Vector& a) { return each([&](int i) { return -a.lane[i]; }); }
};
using Bytes = Vector<uint8_t, BYTES>;  // signed or not, as the primitive says; they wrap around
using Ints = Vector<int32_t, LANES>;
using Floats = Vector<float, LANES>;
using LaneBytes = Vector<int8_t, LANES>;  // one byte for each lane

// The first of a register's lanes or bytes: of n, where n may be negative or beyond the register.
using LaneMask = int;
using ByteMask = int;
inline LaneMask first_lanes(int64_t n) { return (int)std::clamp<int64_t>(n, 0, LANES); }
inline ByteMask first_bytes(int64_t n) { return (int)std::clamp<int64_t>(n, 0, BYTES); }

// ---------------------------------------------------------------------------------------------- load and store

inline Bytes all_bytes(int value) { return Bytes::each([&](int) { return value; }); }  // modulo 256
inline Ints all_ints(int32_t value) { return Ints::each([&](int) { return value; }); }
inline Floats all_floats(float value) { return Floats::each([&](int) { return value; }); }

// Of any alignment. What a mask leaves out is zero, and its memory is not touched.
inline Bytes load_bytes(const void* from, ByteMask mask = BYTES) {
  Bytes v{};
  std::memcpy(v.lane, from, mask);
  return v;
}
inline Ints load_ints(const int32_t* from) {
  Ints v;
  std::memcpy(v.lane, from, sizeof(v));
  return v;
}
inline Floats load_floats(const float* from, LaneMask mask) {
  Floats v{};
  std::memcpy(v.lane, from, mask * sizeof(float));
  return v;
}
inline void store(void* to, const Bytes& v, ByteMask mask = BYTES) { std::memcpy(to, v.lane, mask); }
inline void store(int32_t* to, const Ints& v) { std::memcpy(to, v.lane, sizeof(v)); }
inline void store(float* to, const Floats& v, LaneMask mask = LANES) { std::memcpy(to, v.lane, mask * sizeof(float)); }
inline void store(int8_t* to, const LaneBytes& v, LaneMask mask) { std::memcpy(to, v.lane, mask); }

inline void prefetch(const void*) {}  // into the second level of the cache; a hint

// A whole register to memory of its alignment, past the cache where `streams` says that it is faster; other threads see
// it after `finish_streams`.
inline bool streams() { return true; }
inline void stream(float* to, const Floats& v) { store(to, v); }
inline void finish_streams() {}

// ------------------------------------------------------------------------------------------------------- bytes

// The greatest magnitude of weights that `dot` takes; it takes greater ones with activations of 1. Those of four bits
// have to be among them.
constexpr int DOT_WEIGHTS = 128;

// Every lane plus its four products. activations: bytes plus OFFSET. weights: signed.
inline Ints dot(const Ints& sums, const Bytes& activations, const Bytes& weights) {
  return Ints::each([&](int l) {
    int32_t sum = sums.lane[l];
    for (int i = 4 * l; i < 4 * l + 4; i++) sum += (int8_t)activations.lane[i] * (int8_t)weights.lane[i];
    return sum;
  });
}

// The same for all weights.
inline Ints dot_any(const Ints& sums, const Bytes& activations, const Bytes& weights) {
  return dot(sums, activations, weights);
}

// The four bytes at `from`, in every lane.
inline Bytes four_bytes(const uint8_t* from) {
  return Bytes::each([&](int i) { return from[i % 4]; });
}

// The lesser of signed bytes.
inline Bytes min(const Bytes& a, const Bytes& b) {
  return Bytes::each([&](int i) { return std::min((int8_t)a.lane[i], (int8_t)b.lane[i]); });
}

// The even ones of every eight bytes and then the odd ones: so do nibbles come out of their bytes.
inline Bytes even_first(const Bytes& v) {
  return Bytes::each([&](int i) { return v.lane[i / 8 * 8 + (i % 4) * 2 + i % 8 / 4]; });
}

// Every byte's low or high four bits, as a signed byte.
inline Bytes low_nibbles(const Bytes& v) {
  return Bytes::each([&](int i) { return ((v.lane[i] & 15) ^ 8) - 8; });
}
inline Bytes high_nibbles(const Bytes& v) {
  return Bytes::each([&](int i) { return ((v.lane[i] >> 4) ^ 8) - 8; });
}

// Lane l of row k to lane k of row l.
inline void transpose(Bytes (&rows)[LANES]) {
  for (int k = 0; k < LANES; k++)
    for (int l = 0; l < k; l++) std::swap_ranges(rows[k].lane + 4 * l, rows[k].lane + 4 * l + 4, rows[l].lane + 4 * k);
}

// ------------------------------------------------------------------------------------------------------- pairs

// A register of bfloat16, two in each lane: of a and of b, rounded to the nearest, halves to the even one.
inline Bytes pairs(const Floats& a, const Floats& b) {
  const auto rounded = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fc0u : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return Bytes::each([&](int i) { return rounded((i % 4 < 2 ? a : b).lane[i / 4]) >> i % 2 * 8; });
}

// Every lane plus its two products.
inline Floats dot_pairs(const Floats& sums, const Bytes& a, const Bytes& b) {
  const auto value = [](const Bytes& v, int first) {
    const uint32_t bits = (uint32_t)v.lane[first] << 16 | (uint32_t)v.lane[first + 1] << 24;
    float of;
    std::memcpy(&of, &bits, 4);
    return of;
  };
  return Floats::each([&](int l) {
    return sums.lane[l] + value(a, 4 * l) * value(b, 4 * l) + value(a, 4 * l + 2) * value(b, 4 * l + 2);
  });
}

// ------------------------------------------------------------------------------------------------------ floats

inline Floats to_floats(const Ints& v) {
  return Floats::each([&](int i) { return (float)v.lane[i]; });
}
inline Floats byte_of_lanes(const Bytes& v, int byte) {  // the signed byte of that number in every lane
  return Floats::each([&](int l) { return (float)(int8_t)v.lane[4 * l + byte]; });
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {  // a b + c, rounded once
  return Floats::each([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Floats min(const Floats& a, const Floats& b) {  // b, where a is not a number
  return Floats::each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats max(const Floats& a, const Floats& b) {  // b, where a is not a number
  return Floats::each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats round(const Floats& v) {  // to the nearest integer, halves to the even one
  return Floats::each([&](int i) { return std::nearbyint(v.lane[i]); });
}
inline LaneBytes to_bytes(const Floats& v) {  // the same, of values in [-128, 127]
  return LaneBytes::each([&](int i) { return (int32_t)std::nearbyint(v.lane[i]); });
}
inline Floats times_power_of_two(const Floats& v, const Floats& n) {  // v 2^n: both are normal, and n an integer
  return Floats::each([&](int i) { return std::ldexp(v.lane[i], (int)n.lane[i]); });
}
inline Floats reciprocal(const Floats& v) {  // to two units in the last place, or better
  return Floats::each([&](int i) { return 1.f / v.lane[i]; });
}

}  // namespace
