// Floating point to the integers of a grid, after GroupNorm, SiLU and nearest upsampling where they are asked for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
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

struct Channels {  // of all that stand side by side
  int64_t from, to;
};

// Calls f(source, begin, end) with every source that has some of `channels`, and with which of its own they are.
template <class F> void of_sources(const Quantize& p, Channels channels, F&& f) {
  for (auto& source : p.sources) {
    const int64_t begin = std::max<int64_t>(channels.from - source.first, 0),
                  end = std::min(channels.to - source.first, source.channels);
    if (begin < end) f(source, begin, end);
  }
}

// Puts the sums and the sums of squares of a source's channels [c, c + count), N registers of them, into sums[2][C].
template <int N>
void moments(const Quantize& p, const Source& source, int64_t c, int64_t count, int64_t sample, double* sums) {
  const LaneMask all = first_lanes(LANES), last = first_lanes(count - (N - 1) * LANES);
  alignas(BYTES) float one[N * LANES], two[N * LANES];
  double *of_values = sums + source.first + c, *of_squares = of_values + p.C;
  std::fill(of_values, of_values + count, 0.0), std::fill(of_squares, of_squares + count, 0.0);
  for (int64_t h = 0; h < p.H; h++) {  // row by row into doubles: long sums in float lose what the grid tells apart
    const float* x = source.data + (sample * p.H + h) * p.W * source.channels + c;
    Floats sum[N] = {}, squares[N] = {};
    for (int64_t w = 0; w < p.W; w++, x += source.channels)
      for (int j = 0; j < N; j++) {
        const Floats v = load_floats(x + j * LANES, j + 1 < N ? all : last);
        sum[j] = sum[j] + v;
        squares[j] = fma(v, v, squares[j]);
      }
    for (int j = 0; j < N; j++) store(one + j * LANES, sum[j]), store(two + j * LANES, squares[j]);
    for (int64_t k = 0; k < count; k++) of_values[k] += one[k], of_squares[k] += two[k];
  }
}

void moments(const Quantize& p, Channels channels, int64_t sample, double* sums) {
  of_sources(p, channels, [&](const Source& source, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += WIDEST * LANES) {
      const int64_t count = std::min<int64_t>(WIDEST * LANES, end - c);
      with_width((int)((count + LANES - 1) / LANES),
                 [&](auto width) { moments<width>(p, source, c, count, sample, sums); });
    }
  });
}

// What each of the channels is multiplied with and gets added after the norm; they are whole groups of it. Whether the
// moments are finite: squares that overflow would make a norm of zeros.
bool normalize(const Quantize& p, Channels channels, const double* sums, float* of) {
  float *factor = of, *shift = of + p.C;
  bool finite = true;
  const int64_t size = p.C / p.norm_groups;
  for (int64_t first = channels.from; first < channels.to; first += size) {
    double sum = 0, squares = 0;
    for (int64_t c = first; c < first + size; c++) sum += sums[c], squares += sums[p.C + c];
    finite = finite && std::isfinite(sum) && std::isfinite(squares);
    const double count = (double)size * p.H * p.W, mean = sum / count;
    const double rstd = 1 / std::sqrt(std::max(squares / count - mean * mean, 0.0) + p.eps);
    for (int64_t c = first; c < first + size; c++) {
      const double weight = p.norm_weight ? p.norm_weight[c] : 1, bias = p.norm_bias ? p.norm_bias[c] : 0;
      factor[c] = (float)(rstd * weight), shift[c] = (float)(bias - mean * rstd * weight);
    }
  }
  return finite;
}

// The reciprocal scale of each of the channels, and its grid's ends.
void grid(const Quantize& p, Channels channels, int64_t sample, float* of) {
  float *steps = of + 2 * p.C, *low = of + 3 * p.C, *high = of + 4 * p.C;
  const int64_t count = (int64_t)p.segments.size();
  int64_t first = 0;
  for (int64_t s = 0; s < count; first += p.segments[s++]) {
    const float step = 1.f / p.scale[sample * count + s], least = p.low[sample * count + s];
    for (int64_t c = std::max(first, channels.from); c < std::min(first + p.segments[s], channels.to); c++)
      steps[c] = step, low[c] = least, high[c] = least + (float)((1 << p.bits) - 1);
  }
}

// Rows [from, to) of a sample. Whether all values were finite: integers cannot say it.
template <bool NORM, bool SILU>
bool quantize_rows(const Quantize& p, Channels channels, int64_t sample, int64_t from, int64_t to, const float* of) {
  const float *factor = of, *shift = of + p.C, *steps = of + 2 * p.C, *low = of + 3 * p.C, *high = of + 4 * p.C;
  const int64_t U = p.upsample, line = p.W * U * p.C;
  Floats nothing{};  // a zero for each finite value, added up
  for (int64_t h = from; h < to; h++)
    of_sources(p, channels, [&](const Source& source, int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k += LANES) {
        const LaneMask lanes = first_lanes(end - k);
        const int64_t c = source.first + k;
        const Floats factors = load_floats(factor + c, lanes), shifts = load_floats(shift + c, lanes),
                     step = load_floats(steps + c, lanes), least = load_floats(low + c, lanes),
                     most = load_floats(high + c, lanes);
        const float* x = source.data + (sample * p.H + h) * p.W * source.channels + k;
        int8_t* to = p.output + (sample * p.H + h) * U * line + c;
        for (int64_t w = 0; w < p.W; w++, x += source.channels, to += U * p.C) {
          Floats v = load_floats(x, lanes);
          if (NORM) v = fma(v, factors, shifts);
          if (SILU) v = silu_of(v);
          nothing = fma(v, all_floats(0.f), nothing);
          const LaneBytes bytes = to_bytes(min(max(v * step, least), most));  // integers: rounding keeps within them
          for (int64_t i = 0; i < U; i++)
            for (int64_t j = 0; j < U; j++) store(to + i * line + j * p.C, bytes, lanes);
        }
      }
    });
  alignas(BYTES) float sums[LANES];
  store(sums, nothing);
  return std::all_of(sums, sums + LANES, [](float sum) { return sum == 0; });
}

// Whether all values were finite. A norm's threads share a sample's groups out among them: nobody waits for another's
// moments, and the second pass finds in the cache what the first one read.
bool quantize(const Quantize& p) {
  std::atomic<bool> finite{true};
  if (p.norm_groups > 0) {
    const auto rows_of = p.silu ? quantize_rows<true, true> : quantize_rows<true, false>;
    const int64_t size = p.C / p.norm_groups;
    torch::stable::parallel_for(0, p.B * p.norm_groups, 1, [&](int64_t begin, int64_t end) {
      double* moments_of = products.of<double>(2 * p.C);
      float* of = sums.of<float>(5 * p.C);
      for (int64_t next, task = begin; task < end; task = next) {
        const int64_t b = task / p.norm_groups, first = b * p.norm_groups;
        next = std::min(end, first + p.norm_groups);
        const Channels channels{(task - first) * size, (next - first) * size};
        moments(p, channels, b, moments_of);
        if (!normalize(p, channels, moments_of, of)) finite = false;
        grid(p, channels, b, of);
        if (!rows_of(p, channels, b, 0, p.H, of)) finite = false;
      }
    });
  } else {
    const auto rows_of = p.silu ? quantize_rows<false, true> : quantize_rows<false, false>;
    torch::stable::parallel_for(0, p.B * p.H, 1, [&](int64_t begin, int64_t end) {
      float* of = sums.of<float>(5 * p.C);
      for (int64_t next, row = begin; row < end; row = next) {
        const int64_t b = row / p.H, first = b * p.H;
        next = std::min(end, first + p.H);
        grid(p, {0, p.C}, b, of);
        if (!rows_of(p, {0, p.C}, b, row - first, next - first, of)) finite = false;
      }
    });
  }
  return finite;
}

}  // namespace
