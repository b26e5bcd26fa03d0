// The pqcad:: operators for CPUs: their arguments checked and laid out, and their registration.
#include <cstdint>
#include <optional>
#include <vector>

#include "primitives.h"

#ifndef PQCAD_NO_PRIMITIVES
#include "attention.h"
#include "chain.h"
#include "direct.h"
#include "quantize.h"
#include "tensor.h"
#include "weight_only.h"
#include "winograd.h"

namespace {

// Scales (and lows) of `name` are (batch, segments), and the segments make up the channels.
void check_grid(const char* name, const Tensor& values, Sizes segments, int64_t batch, int64_t channels) {
  int64_t sum = 0;
  for (auto s : segments) sum += s;
  PQCAD_CHECK(sum == channels, "segments ", segments, " sum to ", sum, ", the input has ", channels, " channels");
  PQCAD_CHECK(values.dim() == 2 && values.size(0) == batch && values.size(1) == (int64_t)segments.size(), name,
                    " has shape ", values.sizes(), ": expected (batch, segments) = (", batch, ", ", segments.size(), ")");
}

void check_weight(const Tensor& weight, const std::optional<Tensor>& bias, int64_t bits, int64_t rows, int64_t reduction) {
  PQCAD_CHECK(bits >= 2 && bits <= 8, "weight_bits=", bits, ": allowed are 2 to 8");
  PQCAD_CHECK(weight.scalar_type() == ScalarType::Byte && weight.dim() == 2 && weight.size(0) == rows &&
                        weight.size(1) == (reduction * bits + 7) / 8,
                    "weight is ", weight.scalar_type(), " of shape ", weight.sizes(), ": expected uint8 (", rows, ", ",
                    (reduction * bits + 7) / 8, ")");
  PQCAD_CHECK(!bias || bias->numel() == rows, "bias has ", bias ? bias->numel() : 0, " values: expected ", rows);
  PQCAD_CHECK(reduction > 0, "no input channels");
}

void check(const Tensor& input, const Tensor& weight, const Tensor& input_scale, const std::optional<Tensor>& bias,
           int64_t bits, Sizes segments, int64_t channels, int64_t rows, int64_t reduction) {
  PQCAD_CHECK(input.scalar_type() == ScalarType::Char, "input is ", input.scalar_type(),
                   ": the pqcad operators take int8 integers (quantize first)");
  check_grid("input_scale", input_scale, segments, input.size(0), channels);
  check_weight(weight, bias, bits, rows, reduction);
  PQCAD_CHECK(reduction < (int64_t)1 << 16, "sums of ", reduction, " products: 65535 fit in 32 bits");
}

void fill_parts(Problem& p, Sizes segments) {
  int64_t first = 0;
  for (int64_t g = 0; g < (p.groups > 1 ? p.groups : (int64_t)segments.size()); g++) {
    const int64_t length = p.groups > 1 ? p.in_group() : segments[g], padded = (length + 7) / 8 * 8;
    p.parts.push_back({first, length, padded, p.padded});
    first += length;
    p.padded += padded;
  }
}

// Runs `method` on a problem whose sizes and addend are set; the input is laid out already, channels innermost.
void compute(Problem& p, void (*method)(const Problem&), const Tensor& input, const Tensor& weight,
             const Tensor& weight_scale, const Tensor& input_scale, const std::optional<Tensor>& bias, Sizes segments,
             Held& held, const Tensor& output) {
  if (output.numel() == 0) return;
  p.input = input.const_data_ptr<int8_t>(), p.weight = held.keep(dense(weight)).const_data_ptr<uint8_t>();
  p.row = weight.size(1);
  p.weight_scale = held.floats(weight_scale), p.input_scale = held.floats(input_scale), p.bias = held.floats(bias);
  p.output = output.mutable_data_ptr<float>();
  fill_parts(p, segments);
  method(p);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, const Tensor& input_scale,
              const std::optional<Tensor>& bias, int64_t weight_bits, Sizes segments,
              Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
              int64_t groups, ScalarType dtype, int64_t input_bits, const std::optional<Tensor>& addend) {
  PQCAD_CHECK(input.dim() == 4, "input has ", input.dim(), " dimensions: expected (B, C, H, W)");
  PQCAD_CHECK(groups == 1 || segments.size() == 1, "a grouped convolution takes one segment of input channels");
  PQCAD_CHECK(groups >= 1 && input.size(1) % groups == 0 && weight_scale.numel() % groups == 0, "groups=", groups,
                    ": must divide ", input.size(1), " input and ", weight_scale.numel(), " output channels");
  PQCAD_CHECK(stride[0] >= 1 && stride[1] >= 1, "stride=", stride, ": at least 1");
  Problem p{};
  p.B = input.size(0), p.C = input.size(1), p.H = input.size(2), p.W = input.size(3), p.O = weight_scale.numel();
  p.KH = kernel_size[0], p.KW = kernel_size[1], p.SH = stride[0], p.SW = stride[1], p.PH = padding[0];
  p.PW = padding[1], p.DH = dilation[0], p.DW = dilation[1], p.groups = groups, p.bits = (int)weight_bits;
  p.input_bits = (int)input_bits;
  const int64_t down = p.H + 2 * p.PH - p.DH * (p.KH - 1) - 1, along = p.W + 2 * p.PW - p.DW * (p.KW - 1) - 1;
  PQCAD_CHECK(down >= 0 && along >= 0, "kernel of ", kernel_size, " on an input of ", input.sizes(), " leaves nothing");
  p.OH = down / p.SH + 1, p.OW = along / p.SW + 1;
  check(input, weight, input_scale, bias, weight_bits, segments, p.C, p.O, p.in_group() * p.KH * p.KW);
  const Tensor output = empty({p.B, p.O, p.OH, p.OW}, aoti_torch_dtype_float32(), channels_last());
  Held held;
  if (addend) {
    PQCAD_CHECK(addend->dim() == 4, "addend has ", addend->dim(), " dimensions: expected 4");
    const bool per_sample = addend->size(2) == 1 && addend->size(3) == 1;
    PQCAD_CHECK(addend->size(0) == p.B && addend->size(1) == p.O &&
                          (per_sample || (addend->size(2) == p.OH && addend->size(3) == p.OW)),
                      "addend has shape ", addend->sizes(), ": expected ", output.sizes(), " or one value per channel");
    p.addend = held.channels_last_floats(*addend);
    p.addend_sample = per_sample ? p.O : p.O * p.OH * p.OW;
    p.addend_pixel = per_sample ? 0 : p.O;
  }
  const bool three = p.KH == 3 && p.KW == 3 && p.SH == 1 && p.SW == 1 && p.DH == 1 && p.DW == 1 && groups == 1;
  compute(p, three && weight_bits <= 4 && input_bits <= 6 ? winograd : direct,
          dense_channels_last(input), weight, weight_scale, input_scale, bias, segments, held, output);
  return as_type(output, dtype);
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, const Tensor& input_scale,
              const std::optional<Tensor>& bias, int64_t weight_bits, Sizes segments, ScalarType dtype,
              const std::optional<Tensor>& addend) {
  PQCAD_CHECK(input.dim() >= 2, "input has ", input.dim(), " dimensions: expected (B, ..., K)");
  Problem p{};
  p.B = input.size(0), p.C = input.size(-1), p.O = weight_scale.numel();
  p.H = p.B * p.C > 0 ? input.numel() / (p.B * p.C) : 0, p.OH = p.H, p.bits = (int)weight_bits;
  p.W = p.OW = p.KH = p.KW = p.SH = p.SW = p.DH = p.DW = p.groups = 1;
  check(input, weight, input_scale, bias, weight_bits, segments, p.C, p.O, p.C);
  auto shape = input.sizes().vec();
  shape.back() = p.O;
  const Tensor output = empty(shape, aoti_torch_dtype_float32(), row_major(input.dim()));
  Held held;
  if (addend) {
    PQCAD_CHECK(addend->sizes() == output.sizes(), "addend has shape ", addend->sizes(), ": expected ", output.sizes());
    p.addend = held.floats(*addend);
    p.addend_sample = p.H * p.O, p.addend_pixel = p.O;
  }
  compute(p, direct, dense(input), weight, weight_scale, input_scale, bias, segments, held, output);
  return as_type(output, dtype);
}

Tensor weight_only_linear(const Tensor& input, const Tensor& weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, int64_t weight_bits) {
  PQCAD_CHECK(input.dim() >= 1, "input has no dimension: expected (..., K)");
  PQCAD_CHECK(is_floating_point(input.scalar_type()), "input is ", input.scalar_type(), ": expected floating point");
  Problem p{};
  p.C = input.size(-1), p.O = weight_scale.numel(), p.B = p.C > 0 ? input.numel() / p.C : 0, p.bits = (int)weight_bits;
  p.H = p.W = p.OH = p.OW = p.KH = p.KW = p.SH = p.SW = p.DH = p.DW = p.groups = 1;
  check_weight(weight, bias, weight_bits, p.O, p.C);
  auto shape = input.sizes().vec();
  shape.back() = p.O;
  const Tensor output = empty(shape, aoti_torch_dtype_float32(), row_major(input.dim()));
  if (output.numel() > 0) {
    Held held;
    p.weight = held.keep(dense(weight)).const_data_ptr<uint8_t>(), p.row = weight.size(1);
    p.weight_scale = held.floats(weight_scale), p.bias = held.floats(bias), p.output = output.mutable_data_ptr<float>();
    fill_parts(p, {p.C});
    weight_only(p, held.floats(input));
  }
  return as_type(output, input.scalar_type());
}

// Of each sample's segments: a few numbers, taken as they are without making a tensor of them.
std::vector<float> integers_of(const Tensor& low) {
  const Tensor l = dense(low);
  const auto all = [&](auto zero) {
    const auto* from = l.const_data_ptr<decltype(zero)>();
    return std::vector<float>(from, from + l.numel());
  };
  switch (l.scalar_type()) {
    case ScalarType::Char: return all(int8_t{});
    case ScalarType::Short: return all(int16_t{});
    case ScalarType::Int: return all(int32_t{});
    case ScalarType::Long: return all(int64_t{});
    default: refuse("low is ", l.scalar_type(), ": expected signed integers");
  }
}

// Quantizes into `output`, whose values lie as the sources' do; sources and sizes are set.
void quantize_into(Quantize& p, const Tensor& scale, const Tensor& low, Sizes segments, int64_t bits, Held& held,
                   const Tensor& output) {
  check_grid("scale", scale, segments, p.B, p.C);
  check_grid("low", low, segments, p.B, p.C);
  PQCAD_CHECK(bits >= 2 && bits <= 8, "bits=", bits, ": allowed are 2 to 8");
  if (output.numel() == 0) return;
  p.bits = (int)bits, p.segments = segments.vec(), p.scale = held.floats(scale), p.low = integers_of(low);
  p.output = output.mutable_data_ptr<int8_t>();
  if (p.upsample == 1) cut_into_rows(p);
  PQCAD_CHECK(quantize(p), "NaN or infinity in what is quantized: integers would hide it");
}

Tensor norm_silu_quantize(const std::vector<Tensor>& inputs, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias, int64_t norm_groups, double eps, bool silu,
                          const Tensor& scale, const Tensor& low, Sizes segments, int64_t bits, int64_t upsample) {
  PQCAD_CHECK(!inputs.empty() && upsample >= 1, "no input, or upsample=", upsample);
  const Tensor& head = inputs[0];
  Quantize p{};
  Held held;
  for (auto& input : inputs) {
    PQCAD_CHECK(input.dim() == 4 && input.size(0) == head.size(0) && input.size(2) == head.size(2) &&
                    input.size(3) == head.size(3),
                "inputs of shapes ", head.sizes(), " and ", input.sizes(), " do not stand side by side");
    p.sources.push_back({held.channels_last_floats(input), input.size(1), p.C});
    p.C += input.size(1);
  }
  p.B = head.size(0), p.H = head.size(2), p.W = head.size(3), p.norm_groups = norm_groups, p.upsample = upsample;
  p.eps = eps, p.silu = silu;
  PQCAD_CHECK(norm_groups == 0 || p.C % norm_groups == 0, p.C, " channels in ", norm_groups, " groups");
  for (auto* affine : {&weight, &bias})
    PQCAD_CHECK(!*affine || (*affine)->numel() == p.C, "a norm's weight or bias has ", *affine ? (*affine)->numel() : 0,
                " values: expected ", p.C);
  p.norm_weight = held.floats(weight), p.norm_bias = held.floats(bias);
  const Tensor output = empty({p.B, p.C, p.H * upsample, p.W * upsample}, aoti_torch_dtype_int8(), channels_last());
  quantize_into(p, scale, low, segments, bits, held, output);
  return output;
}

Tensor quantize_op(const Tensor& input, const Tensor& scale, const Tensor& low, Sizes segments, int64_t bits,
                   int64_t channel_dim) {
  const int64_t rank = input.dim(), dim = channel_dim < 0 ? channel_dim + rank : channel_dim;
  PQCAD_CHECK(rank >= 2 && (dim == rank - 1 || (dim == 1 && rank == 4)), "channel_dim=", channel_dim, " of an input of ",
              rank, " dimensions: allowed are the last, and 1 of 4");
  if (dim == 1 && rank == 4) return norm_silu_quantize({input}, {}, {}, 0, 0, false, scale, low, segments, bits, 1);
  Quantize p{};
  Held held;
  p.B = input.size(0), p.C = input.size(-1), p.H = input.numel() ? input.numel() / (p.B * p.C) : 0, p.W = p.upsample = 1;
  p.sources.push_back({held.floats(input), p.C, 0});
  const Tensor output = empty(input.sizes(), aoti_torch_dtype_int8(), row_major(rank));
  quantize_into(p, scale, low, segments, bits, held, output);
  return output;
}

Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  PQCAD_CHECK(query.dim() == 4 && key.dim() == 4 && key.sizes() == value.sizes() &&
                        key.size(0) == query.size(0) && key.size(1) == query.size(1) && key.size(3) == query.size(3),
                    "query, key and value of shapes ", query.sizes(), ", ", key.sizes(), " and ", value.sizes(),
                    ": expected (B, heads, L, D), and twice (B, heads, S, D)");
  Attention p{};
  p.B = query.size(0), p.heads = query.size(1), p.L = query.size(2), p.D = query.size(3), p.S = key.size(2);
  PQCAD_CHECK(p.S > 0 || query.numel() == 0, "attention to no key");
  p.scale = (float)scale;
  Held held;
  const auto rows = [&](const Tensor& tensor) {
    const Tensor floats = as_type(tensor, ScalarType::Float);
    const Tensor& t = held.keep(floats.stride(3) == 1 ? floats : torch::stable::contiguous(floats));
    return Tokens{t.const_data_ptr<float>(), t.stride(0), t.stride(1), t.stride(2)};
  };
  // its memory is (B, L, heads, D)
  const Tensor output = empty({p.B, p.heads, p.L, p.D}, aoti_torch_dtype_float32(), {3, 1, 2, 0});
  if (output.numel() > 0) {
    p.query = rows(query), p.key = rows(key), p.value = rows(value), p.output = output.mutable_data_ptr<float>();
    attention(p);
  }
  return as_type(output, query.scalar_type());
}

std::vector<Tensor> chain(const std::vector<Tensor>& inputs, const std::string& program, Sizes results) {
  Program p(inputs, program);
  Latest<decltype(norm_silu_quantize)> normed;
  while (p.goes_on()) {
    switch (const int64_t number = p.number()) {  // places in OPERATORS of ops/chain.py
      case 0: p.call(conv2d); break;
      case 1: p.call(linear); break;
      case 2: p.call(weight_only_linear); break;
      case 3: p.call(quantize_op); break;
      case 4: p.call(norm_silu_quantize, &normed); break;
      case 5: p.call(attention_op); break;
      default: refuse("a chain calls operator ", number, ": there are 0 to 5");
    }
  }
  return p.results(results);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pqcad, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("weight_only_linear", TORCH_BOX(&weight_only_linear));
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("norm_silu_quantize", TORCH_BOX(&norm_silu_quantize));
  m.impl("attention", TORCH_BOX(&attention_op));
  m.impl("chain", TORCH_BOX(&chain));
}
extern "C" const char* pqcad_cpu_kernels() { return INSTRUCTIONS; }
#else
extern "C" const char* pqcad_cpu_kernels() { return ""; }
#endif
