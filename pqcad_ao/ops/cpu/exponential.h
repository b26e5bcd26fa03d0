// The exponential function, and what is made of it.
#pragma once

#include "primitives.h"

namespace {

// e^(sign x) to two units in the last place or better, as a power of two times a polynomial in what remains of the
// exponent. Ends of +-87 keep the power a normal number; what is not a number stays none.
inline Floats exp_of(Floats x, float sign = 1) {
  const Floats log2e = all_floats(1.44269504f * sign), ended = min(all_floats(87.f), max(all_floats(-87.f), x));
  const Floats n = round(ended * log2e), r = fma(ended, log2e, -n);
  Floats y = all_floats(1.546144485e-4f);  // 2^r on [-1/2, 1/2], interpolated at Chebyshev's points
  for (float c : {1.3400428e-3f, 9.618056938e-3f, 5.550327152e-2f, 2.402265072e-1f, 6.931471825e-1f, 1.f})
    y = fma(y, r, all_floats(c));
  return times_power_of_two(y, n);
}

// x / (1 + e^-x), to 4 units in the last place where its size matters and to 1.5e-6 everywhere.
inline Floats silu_of(Floats x) { return x * reciprocal(all_floats(1.f) + exp_of(x, -1)); }

}  // namespace
