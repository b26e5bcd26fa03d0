// Every primitive of an instruction set against that of plain C++, which says what it means, on random values and on the
// ends of what it takes. Prints the instruction set's name, or the first primitive that differs.
#include "primitives.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#define PQCAD_GENERIC ::LANES
namespace plain {
#include "generic.h"
}

namespace {

std::mt19937 generator(0);
int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// Memory in which a register of either kind is laid down.
struct Memory {
  alignas(64) uint8_t at[64 + 2 * BYTES];
  Memory() { std::memset(at, 0x5a, sizeof(at)); }
  int32_t* ints() { return (int32_t*)at; }
  float* floats() { return (float*)at; }
};

void same(const char* name, const Memory& own, const Memory& expected) {
  if (std::memcmp(own.at, expected.at, sizeof(own.at)) == 0) return;
  std::printf("%s differs\n", name);
  std::exit(1);
}

void put(Memory& to, const Bytes& v) { store((void*)to.at, v); }
void put(Memory& to, const Ints& v) { store(to.ints(), v); }
void put(Memory& to, const Floats& v) { store(to.floats(), v); }
void put(Memory& to, const LaneBytes& v) { store((int8_t*)to.at, v, first_lanes(LANES)); }
void put(Memory& to, const plain::Bytes& v) { plain::store((void*)to.at, v); }
void put(Memory& to, const plain::Ints& v) { plain::store(to.ints(), v); }
void put(Memory& to, const plain::Floats& v) { plain::store(to.floats(), v); }
void put(Memory& to, const plain::LaneBytes& v) { plain::store((int8_t*)to.at, v, LANES); }

template <class Own, class Plain> void same(const char* name, const Own& own, const Plain& expected) {
  Memory a, b;
  put(a, own), put(b, expected);
  same(name, a, b);
}

// Values in both forms.
struct SomeBytes {
  Bytes own;
  plain::Bytes expected;
  SomeBytes(int low, int high) {
    uint8_t at[BYTES];
    for (auto& byte : at) {  // half of them at an end
      const int draw = between(0, 3);
      byte = (uint8_t)(draw == 0 ? low : draw == 1 ? high : between(low, high));
    }
    own = load_bytes(at), expected = plain::load_bytes(at);
  }
};
struct SomeInts {
  Ints own;
  plain::Ints expected;
  SomeInts() {
    int32_t at[LANES];
    for (auto& lane : at) lane = between(-(1 << 30), 1 << 30);
    own = load_ints(at), expected = plain::load_ints(at);
  }
};
struct SomeFloats {
  Floats own;
  plain::Floats expected;
  SomeFloats(float low, float high, bool whole = false) {
    float at[LANES];
    for (auto& lane : at) {
      lane = std::uniform_real_distribution<float>(low, high)(generator);
      if (between(0, 3) == 0) lane = (float)between((int)low, (int)high - 1) + (whole ? 0.f : 0.5f);  // halves
      if (whole) lane = std::nearbyint(lane);
    }
    own = load_floats(at, first_lanes(LANES)), expected = plain::load_floats(at, LANES);
  }
};

void bytes() {
  const SomeBytes a(0, 255), b(-128, 127), weights(-DOT_WEIGHTS, std::min(DOT_WEIGHTS, 127));
  const SomeInts sums;
  // what the offset of the activations adds is the same for every one of them
  const auto offset = [](const SomeBytes& w) { return dot(all_ints(0), all_bytes(1), w.own) * all_ints(OFFSET); };
  const Bytes carried = a.own + all_bytes(OFFSET);
  same("dot", dot(sums.own, carried, weights.own) - offset(weights), plain::dot(sums.expected, a.expected, weights.expected));
  same("dot_any", dot_any(sums.own, carried, b.own) - offset(b), plain::dot_any(sums.expected, a.expected, b.expected));
  same("dot of ones", dot(sums.own, all_bytes(1), b.own), plain::dot(sums.expected, plain::all_bytes(1), b.expected));
  same("min", min(a.own, b.own), plain::min(a.expected, b.expected));
  same("even_first", even_first(a.own), plain::even_first(a.expected));
  same("low_nibbles", low_nibbles(a.own), plain::low_nibbles(a.expected));
  same("high_nibbles", high_nibbles(a.own), plain::high_nibbles(a.expected));
  for (int n = 0; n < 4; n++) same("byte_of_lanes", byte_of_lanes(a.own, n), plain::byte_of_lanes(a.expected, n));
  same("+ of bytes", a.own + b.own, a.expected + b.expected);
  same("- of bytes", a.own - b.own, a.expected - b.expected);
  const int value = between(-128, 255);
  same("all_bytes", all_bytes(value), plain::all_bytes(value));
  Bytes own[LANES];
  plain::Bytes expected[LANES];
  uint8_t four[4];
  for (int l = 0; l < LANES; l++) {
    const SomeBytes row(0, 255);
    own[l] = row.own, expected[l] = row.expected;
    if (l < 4) four[l] = (uint8_t)between(0, 255);
  }
  transpose(own), plain::transpose(expected);
  for (int l = 0; l < LANES; l++) same("transpose", own[l], expected[l]);
  same("four_bytes", four_bytes(four), plain::four_bytes(four));
}

void ints() {
  const SomeInts a, b;
  const int32_t value = between(-(1 << 30), 1 << 30);
  same("all_ints", all_ints(value), plain::all_ints(value));
  same("+ of ints", (a.own >> 1) + (b.own >> 1), (a.expected >> 1) + (b.expected >> 1));
  same("- of ints", (a.own >> 1) - (b.own >> 1), (a.expected >> 1) - (b.expected >> 1));
  same("* of ints", (a.own >> 16) * (b.own >> 16), (a.expected >> 16) * (b.expected >> 16));
  same("to_floats", to_floats(a.own), plain::to_floats(a.expected));
}

void floats() {
  const SomeFloats a(-100, 100), b(-100, 100), c(-100, 100), n(-126, 126, true), positive(1, 2), wide(-128, 127);
  same("fma", fma(a.own, b.own, c.own), plain::fma(a.expected, b.expected, c.expected));
  same("+ of floats", a.own + b.own, a.expected + b.expected);
  same("* of floats", a.own * b.own, a.expected * b.expected);
  same("- of floats", -a.own, -a.expected);
  same("round", round(a.own), plain::round(a.expected));
  same("to_bytes", to_bytes(wide.own), plain::to_bytes(wide.expected));
  same("times_power_of_two", times_power_of_two(positive.own, n.own),
       plain::times_power_of_two(positive.expected, n.expected));
  const float odd[] = {NAN, INFINITY, -INFINITY, 0.f, a.expected.lane[0]};
  const float one = odd[between(0, 4)], two = odd[between(0, 4)];
  same("all_floats", all_floats(one), plain::all_floats(one));
  if (!(one == 0 && two == 0)) {
    same("min", min(all_floats(one), all_floats(two)), plain::min(plain::all_floats(one), plain::all_floats(two)));
    same("max", max(all_floats(one), all_floats(two)), plain::max(plain::all_floats(one), plain::all_floats(two)));
  }
  same("pairs", pairs(a.own, b.own), plain::pairs(a.expected, b.expected));
  // a NaN is some NaN
  same("pairs of infinity", pairs(all_floats(INFINITY), a.own), plain::pairs(plain::all_floats(INFINITY), a.expected));
  Memory own, expected, q, r;
  put(own, reciprocal(a.own)), put(expected, plain::reciprocal(a.expected));
  put(q, dot_pairs(c.own, pairs(a.own, b.own), pairs(b.own, c.own)));
  put(r, plain::dot_pairs(c.expected, plain::pairs(a.expected, b.expected), plain::pairs(b.expected, c.expected)));
  for (int l = 0; l < LANES; l++) {
    const float close = std::abs(own.floats()[l] - expected.floats()[l]), sum = q.floats()[l] - r.floats()[l];
    if (close > std::abs(expected.floats()[l]) * 2.5e-7f) std::printf("reciprocal differs\n"), std::exit(1);
    if (std::abs(sum) > 0.01f) std::printf("dot_pairs differs\n"), std::exit(1);  // their order is free
  }
}

// What a mask leaves out is zero when it is loaded, and keeps its memory when it is stored.
void masks() {
  const int64_t lanes = between(-3, LANES + 3), count = between(-3, BYTES + 3);
  const LaneMask of_lanes = first_lanes(lanes);
  const ByteMask of_bytes = first_bytes(count);
  Memory from;
  for (int i = 0; i < BYTES; i++) from.at[i] = (uint8_t)between(0, 127);
  const void* end = from.at + 64 + BYTES - std::max<int64_t>(count, 0);  // of any alignment
  same("load_bytes", load_bytes(end, of_bytes), plain::load_bytes(end, plain::first_bytes(count)));
  same("load_floats", load_floats(from.floats(), of_lanes), plain::load_floats(from.floats(), plain::first_lanes(lanes)));
  const SomeBytes bytes(0, 255);
  const SomeFloats floats(-128, 127);
  Memory own, expected;
  store((void*)(own.at + 3), bytes.own, of_bytes), plain::store((void*)(expected.at + 3), bytes.expected, plain::first_bytes(count));
  same("store of bytes", own, expected);
  store(own.floats(), floats.own, of_lanes), plain::store(expected.floats(), floats.expected, plain::first_lanes(lanes));
  same("store of floats", own, expected);
  store((int8_t*)own.at + 5, to_bytes(floats.own), of_lanes);
  plain::store((int8_t*)expected.at + 5, plain::to_bytes(floats.expected), plain::first_lanes(lanes));
  same("store of a byte a lane", own, expected);
  stream(own.floats(), floats.own), plain::stream(expected.floats(), floats.expected);
  finish_streams();
  same("stream", own, expected);
}

}  // namespace

int main() {
  for (int turn = 0; turn < 3000; turn++) bytes(), ints(), floats(), masks();
  std::printf("%s\n", INSTRUCTIONS);
}
