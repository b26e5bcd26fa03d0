// Floating point to the integers of a grid, after GroupNorm, SiLU and nearest upsampling where they are asked for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exponential.h"
#include "problem.h"

namespace {

struct Source {  // one of the tensors that stand side by side along the channels
  const float* data;
  int64_t channels, first;
};

struct Quantize {
  std::vector<Source> sources;
  const float *norm_weight, *norm_bias;
  const float* scale;
  std::vector<float> low;  // integers, of each sample's segments
  std::vector<int64_t> segments;
  int8_t* output;
  int64_t B, H, W, C, norm_groups, upsample;
  double eps;
  int bits;
  bool silu;
};

constexpr int64_t ROW = 32;  // pixels whose moments are summed in single precision

// Cuts an image of whose pixels only the order counts into rows of at most ROW, as long as its size allows. In tokens
// that stand as an image of width one, the moments would be put away after every pixel.
void cut_into_rows(Quantize& p) {
  const int64_t pixels = p.H * p.W;
  p.W = std::min(pixels, ROW);
  while (pixels % p.W) p.W--;
  p.H = pixels / p.W;
}

// Adds the sums and the sums of squares of rows [from, to) to sums[2][C], for N registers of channels from c on.
template <int N>
void moments(const Quantize& p, const Source& source, int64_t c, int64_t sample, int64_t from, int64_t to, double* sums) {
  const int64_t count = std::min<int64_t>(N * LANES, source.channels - c);
  const LaneMask all = first_lanes(LANES), last = first_lanes(count - (N - 1) * LANES);
  alignas(BYTES) float one[N * LANES], two[N * LANES];
  for (int64_t h = from; h < to; h++) {  // row by row into doubles: long sums in float lose what the grid tells apart
    const float* x = source.data + (sample * p.H + h) * p.W * source.channels + c;
    Floats sum[N] = {}, squares[N] = {};
    for (int64_t w = 0; w < p.W; w++, x += source.channels)
      for (int j = 0; j < N; j++) {
        const Floats v = load_floats(x + j * LANES, j + 1 < N ? all : last);
        sum[j] = sum[j] + v;
        squares[j] = fma(v, v, squares[j]);
      }
    for (int j = 0; j < N; j++) store(one + j * LANES, sum[j]), store(two + j * LANES, squares[j]);
    for (int64_t k = 0; k < count; k++) {
      sums[source.first + c + k] += one[k];
      sums[p.C + source.first + c + k] += two[k];
    }
  }
}

void moments(const Quantize& p, int64_t sample, int64_t from, int64_t to, double* sums) {
  for (auto& source : p.sources)
    for (int64_t c = 0; c < source.channels; c += WIDEST * LANES)
      with_width((int)std::min<int64_t>(WIDEST, (source.channels - c + LANES - 1) / LANES),
                 [&](auto width) { moments<width>(p, source, c, sample, from, to, sums); });
}

// What every channel of a sample is multiplied with and gets added, its reciprocal scale, and its grid's ends. Whether
// the moments are finite: squares that overflow would make a norm of zeros.
bool coefficients(const Quantize& p, int64_t sample, const double* sums, float* of) {
  float *factor = of, *shift = of + p.C, *steps = of + 2 * p.C, *low = of + 3 * p.C, *high = of + 4 * p.C;
  bool finite = true;
  if (p.norm_groups > 0) {
    const int64_t size = p.C / p.norm_groups;
    for (int64_t g = 0; g < p.norm_groups; g++) {
      double sum = 0, squares = 0;
      for (int64_t c = g * size; c < (g + 1) * size; c++) sum += sums[c], squares += sums[p.C + c];
      finite = finite && std::isfinite(sum) && std::isfinite(squares);
      const double count = (double)size * p.H * p.W, mean = sum / count;
      const double rstd = 1 / std::sqrt(std::max(squares / count - mean * mean, 0.0) + p.eps);
      for (int64_t c = g * size; c < (g + 1) * size; c++) {
        const double weight = p.norm_weight ? p.norm_weight[c] : 1, bias = p.norm_bias ? p.norm_bias[c] : 0;
        factor[c] = (float)(rstd * weight), shift[c] = (float)(bias - mean * rstd * weight);
      }
    }
  }
  int64_t c = 0;
  const int64_t count = (int64_t)p.segments.size();
  for (int64_t s = 0; s < count; s++)
    for (int64_t k = 0; k < p.segments[s]; k++, c++) {
      steps[c] = 1.f / p.scale[sample * count + s];
      low[c] = p.low[sample * count + s];
      high[c] = low[c] + (float)((1 << p.bits) - 1);
    }
  return finite;
}

// Whether all values were finite: integers cannot say it.
template <bool NORM, bool SILU>
bool quantize_rows(const Quantize& p, int64_t sample, int64_t from, int64_t to, const float* of) {
  const float *factor = of, *shift = of + p.C, *steps = of + 2 * p.C, *low = of + 3 * p.C, *high = of + 4 * p.C;
  const int64_t U = p.upsample, line = p.W * U * p.C;
  Floats nothing{};  // a zero for each finite value, added up
  for (int64_t h = from; h < to; h++) {
    int8_t* top = p.output + (sample * p.H + h) * U * line;
    for (auto& source : p.sources)
      for (int64_t k = 0; k < source.channels; k += LANES) {
        const LaneMask lanes = first_lanes(source.channels - k);
        const int64_t c = source.first + k;
        const Floats factors = load_floats(factor + c, lanes), shifts = load_floats(shift + c, lanes),
                     step = load_floats(steps + c, lanes), least = load_floats(low + c, lanes),
                     most = load_floats(high + c, lanes);
        const float* x = source.data + (sample * p.H + h) * p.W * source.channels + k;
        int8_t* to = top + c;
        for (int64_t w = 0; w < p.W; w++, x += source.channels, to += U * p.C) {
          Floats v = load_floats(x, lanes);
          if (NORM) v = fma(v, factors, shifts);
          if (SILU) v = silu_of(v);
          nothing = fma(v, all_floats(0.f), nothing);
          const LaneBytes bytes = to_bytes(min(max(v * step, least), most));  // integers: rounding keeps within them
          for (int64_t u = 0; u < U; u++) store(to + u * p.C, bytes, lanes);
        }
      }
    for (int64_t u = 1; u < U; u++) std::memcpy(top + u * line, top, line);
  }
  alignas(BYTES) float sums[LANES];
  store(sums, nothing);
  return std::all_of(sums, sums + LANES, [](float sum) { return sum == 0; });
}

// Whether all values were finite.
bool quantize(const Quantize& p) {
  std::atomic<bool> finite{true};
  const auto rows_of = p.norm_groups > 0 ? (p.silu ? quantize_rows<true, true> : quantize_rows<true, false>)
                                         : (p.silu ? quantize_rows<false, true> : quantize_rows<false, false>);
  const int64_t threads = torch::stable::get_num_threads(), rows = p.B * p.H;
  if (p.B >= threads) {  // a sample's second pass finds it in the cache
    torch::stable::parallel_for(0, p.B, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(2 * p.C);
      std::vector<float> of(5 * p.C);
      for (int64_t b = begin; b < end; b++) {
        std::fill(sums.begin(), sums.end(), 0.0);
        if (p.norm_groups > 0) moments(p, b, 0, p.H, sums.data());
        const bool moments_finite = coefficients(p, b, sums.data(), of.data());
        if (!rows_of(p, b, 0, p.H, of.data()) || !moments_finite) finite = false;
      }
    });
    return finite;
  }
  std::vector<double> sums(p.norm_groups > 0 ? rows * 2 * p.C : 2 * p.C);  // of each row, so that no two threads meet
  std::vector<float> of(p.B * 5 * p.C);
  if (p.norm_groups > 0)
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) moments(p, r / p.H, r % p.H, r % p.H + 1, sums.data() + r * 2 * p.C);
    });
  for (int64_t b = 0; b < p.B; b++) {
    double* of_sample = sums.data() + (p.norm_groups > 0 ? b * p.H * 2 * p.C : 0);
    for (int64_t r = 1; r < p.H && p.norm_groups > 0; r++)
      for (int64_t c = 0; c < 2 * p.C; c++) of_sample[c] += of_sample[r * 2 * p.C + c];
    if (!coefficients(p, b, of_sample, of.data() + b * 5 * p.C)) finite = false;
  }
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      if (!rows_of(p, r / p.H, r % p.H, r % p.H + 1, of.data() + r / p.H * 5 * p.C)) finite = false;
  });
  return finite;
}

}  // namespace
