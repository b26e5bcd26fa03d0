// From integer sums to floating-point outputs.
#pragma once

#include <cstdint>

#include "problem.h"

namespace {

// Puts sums of one segment, scaled, onto those of the segments before it; the first segment brings bias and addend along,
// the last one's make a register of an output's channels.
class Epilogue {
  const Problem& p;
  const int64_t channel, segment;
  const bool last, streamed;
  const LaneMask lanes;
  const Floats weight_scale;
  Floats scale, bias;
  int64_t sample = -1;

 public:
  Epilogue(const Problem& p, const Panel& panel, int j, int64_t segment)
      : p(p), channel(panel.first + j * LANES), segment(segment), last(segment + 1 == p.segments()), streamed(p.streamed()),
        lanes(panel.lanes(j)), weight_scale(load_floats(p.weight_scale + channel, lanes)) {}

  void of_sample(int64_t b) {
    if (b == sample) return;
    sample = b;
    scale = weight_scale * all_floats(p.input_scale[b * p.segments() + segment]);
    bias = p.bias ? load_floats(p.bias + channel, lanes) : Floats{};
    if (p.addend && p.addend_pixel == 0)
      bias = bias + load_floats(p.addend + b * p.addend_sample + channel, lanes);
  }

  // between: LANES values, which this output's segments before this one have left, and where it leaves them to the next.
  void operator()(Ints sums, int64_t pixel, float* between) const {
    float* to = p.output + pixel * p.O + channel;
    Floats base = bias;
    if (segment > 0)
      base = load_floats(between, first_lanes(LANES));
    else if (p.addend_pixel)
      base = base + load_floats(p.addend + pixel * p.O + channel, lanes);
    const Floats all = fma(to_floats(sums), scale, base);
    if (!last)
      store(between, all);
    else if (streamed)
      stream(to, all);
    else
      store(to, all, lanes);
  }
};

}  // namespace
