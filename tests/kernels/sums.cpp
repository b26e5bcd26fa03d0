// The kernels' loops of an instruction set, without PyTorch: convolutions of random sizes against sums of 64-bit integers.
// Prints the instruction set's name, or the first convolution that differs.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "direct.h"
#include "winograd.h"

namespace {

std::mt19937 generator(0);
int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

struct Case {
  Problem p{};
  std::vector<int8_t> input, integers;  // of the weights: (O, KH, KW, C / groups)
  std::vector<uint8_t> weight;
  std::vector<float> ones, output;
};

// Values from low to high: any, one end, or stretches of either end.
void fill(std::vector<int8_t>& values, int low, int high) {
  const int kind = between(0, 3);
  int end = low, left = 0;
  for (auto& value : values) {
    if (left-- == 0) end = between(0, 1) ? low : high, left = between(0, 2000);
    value = (int8_t)(kind == 0 ? low : kind == 1 ? end : between(low, high));
  }
}

Case make(bool fast) {
  Case c;
  Problem& p = c.p;
  p.groups = fast || between(0, 2) ? 1 : between(2, 3);
  std::vector<int64_t> segments;
  for (int64_t s = 0, count = p.groups > 1 ? 1 : between(1, 2); s < count; s++) segments.push_back(p.groups * between(1, 70));
  for (auto length : segments) p.C += length;
  p.O = p.groups * between(1, p.groups > 1 ? 9 : 75), p.B = between(1, 2);
  p.bits = between(2, fast ? 4 : 8), p.input_bits = between(2, fast ? 6 : 8);
  const auto any = [&](int low, int high, int if_fast) { return (int64_t)(fast ? if_fast : between(low, high)); };
  p.KH = any(1, 3, 3), p.KW = any(1, 3, 3), p.SH = any(1, 2, 1), p.SW = any(1, 2, 1), p.DH = any(1, 2, 1), p.DW = any(1, 2, 1);
  p.PH = between(0, 2), p.PW = between(0, 2);
  p.H = p.DH * (p.KH - 1) + between(1, 6), p.W = p.DW * (p.KW - 1) + between(1, 6);
  p.OH = (p.H + 2 * p.PH - p.DH * (p.KH - 1) - 1) / p.SH + 1, p.OW = (p.W + 2 * p.PW - p.DW * (p.KW - 1) - 1) / p.SW + 1;
  const int low = -between(0, std::min((1 << p.input_bits) - 1, 128)), high = std::min(low + (1 << p.input_bits) - 1, 127);
  c.input.resize(p.B * p.H * p.W * p.C), fill(c.input, low, high);
  const int64_t reduction = p.KH * p.KW * p.in_group();
  c.integers.resize(p.O * reduction), fill(c.integers, -(1 << (p.bits - 1)), (1 << (p.bits - 1)) - 1);
  p.row = (reduction * p.bits + 7) / 8;
  c.weight.resize(p.O * p.row);
  for (int64_t o = 0; o < p.O; o++)
    for (int64_t k = 0; k < reduction * p.bits; k++)
      c.weight[o * p.row + k / 8] |= (c.integers[o * reduction + k / p.bits] >> k % p.bits & 1) << k % 8;
  c.ones.assign(std::max<int64_t>(p.O, p.B * (int64_t)segments.size()), 1.f);
  c.output.resize(p.B * p.OH * p.OW * p.O);
  p.input = c.input.data(), p.weight = c.weight.data(), p.output = c.output.data();
  p.weight_scale = p.input_scale = c.ones.data();
  for (int64_t g = 0, first = 0; g < (p.groups > 1 ? p.groups : (int64_t)segments.size()); g++) {
    const int64_t length = p.groups > 1 ? p.in_group() : segments[g], padded = (length + 7) / 8 * 8;
    p.parts.push_back({first, length, padded, p.padded});
    first += length, p.padded += padded;
  }
  return c;
}

int64_t sum(const Case& c, int64_t b, int64_t y, int64_t x, int64_t o) {
  const Problem& p = c.p;
  int64_t total = 0;
  for (int64_t i = 0; i < p.KH; i++)
    for (int64_t j = 0; j < p.KW; j++) {
      const int64_t h = y * p.SH - p.PH + i * p.DH, w = x * p.SW - p.PW + j * p.DW;
      if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
      const int8_t* from = c.input.data() + ((b * p.H + h) * p.W + w) * p.C + o / p.out_group() * p.in_group();
      const int8_t* of = c.integers.data() + ((o * p.KH + i) * p.KW + j) * p.in_group();
      for (int64_t k = 0; k < p.in_group(); k++) total += from[k] * of[k];
    }
  return total;
}

}  // namespace

int main(int count, char** arguments) {
  const int turns = count > 1 ? std::atoi(arguments[1]) : 100;
  for (int turn = 0; turn < turns; turn++) {
    const bool fast = turn % 2;
    const Case c = make(fast);
    const Problem& p = c.p;
    (fast ? winograd : direct)(p);
    for (int64_t at = 0; at < (int64_t)c.output.size(); at++) {
      const int64_t o = at % p.O, x = at / p.O % p.OW, y = at / p.O / p.OW % p.OH, b = at / p.O / p.OW / p.OH;
      const int64_t expected = sum(c, b, y, x, o);
      if ((int64_t)c.output[at] == expected) continue;
      std::printf("%s differs in turn %d: %g in place of %ld\n", fast ? "winograd" : "direct", turn, c.output[at], (long)expected);
      return 1;
    }
  }
  std::printf("%s\n", INSTRUCTIONS);
}
