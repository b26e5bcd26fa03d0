// The pqcad:: operators for CPUs: their arguments checked and laid out, and their registration. Compiled on first use.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <vector>

#include "primitives.h"

#ifndef PQCAD_NO_PRIMITIVES
#include "attention.h"
#include "direct.h"
#include "quantize.h"
#include "weight_only.h"
#include "winograd.h"

namespace {

using at::Tensor;

// Scales (and lows) of `name` are (batch, segments), and the segments make up the channels.
void check_grid(const char* name, const Tensor& values, at::IntArrayRef segments, int64_t batch, int64_t channels) {
  int64_t sum = 0;
  for (auto s : segments) sum += s;
  TORCH_CHECK_VALUE(sum == channels, "segments ", segments, " sum to ", sum, ", the input has ", channels, " channels");
  TORCH_CHECK_VALUE(values.dim() == 2 && values.size(0) == batch && values.size(1) == (int64_t)segments.size(), name,
                    " has shape ", values.sizes(), ": expected (batch, segments) = (", batch, ", ", segments.size(), ")");
}

void check_weight(const Tensor& weight, const std::optional<Tensor>& bias, int64_t bits, int64_t rows, int64_t reduction) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, "weight_bits=", bits, ": allowed are 2 to 8");
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kByte && weight.dim() == 2 && weight.size(0) == rows &&
                        weight.size(1) == (reduction * bits + 7) / 8,
                    "weight is ", weight.scalar_type(), " of shape ", weight.sizes(), ": expected uint8 (", rows, ", ",
                    (reduction * bits + 7) / 8, ")");
  TORCH_CHECK_VALUE(!bias || bias->numel() == rows, "bias has ", bias ? bias->numel() : 0, " values: expected ", rows);
  TORCH_CHECK_VALUE(reduction > 0, "no input channels");
}

void check(const Tensor& input, const Tensor& weight, const Tensor& input_scale, const std::optional<Tensor>& bias,
           int64_t bits, at::IntArrayRef segments, int64_t channels, int64_t rows, int64_t reduction) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kChar, "input is ", input.scalar_type(),
                   ": the pqcad operators take int8 integers (quantize first)");
  check_grid("input_scale", input_scale, segments, input.size(0), channels);
  check_weight(weight, bias, bits, rows, reduction);
  TORCH_CHECK_VALUE(reduction < (int64_t)1 << 16, "sums of ", reduction, " products: 65535 fit in 32 bits");
}

void fill_parts(Problem& p, at::IntArrayRef segments) {
  int64_t first = 0;
  for (int64_t g = 0; g < (p.groups > 1 ? p.groups : (int64_t)segments.size()); g++) {
    const int64_t length = p.groups > 1 ? p.in_group() : segments[g], padded = (length + 7) / 8 * 8;
    p.parts.push_back({first, length, padded, p.padded});
    first += length;
    p.padded += padded;
  }
}

// Runs `method` on a problem whose sizes are set; input and addend are laid out already, channels innermost.
void compute(Problem& p, void (*method)(const Problem&), const Tensor& input, const Tensor& weight,
             const Tensor& weight_scale, const Tensor& input_scale, const std::optional<Tensor>& bias,
             const Tensor& addend, at::IntArrayRef segments, Tensor& output) {
  if (output.numel() == 0) return;
  const Tensor w = weight.contiguous(), ws = weight_scale.to(at::kFloat).contiguous(),
               is = input_scale.to(at::kFloat).contiguous(), b = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  p.input = input.const_data_ptr<int8_t>(), p.weight = w.const_data_ptr<uint8_t>();
  p.row = w.size(1);
  p.weight_scale = ws.const_data_ptr<float>(), p.input_scale = is.const_data_ptr<float>();
  p.bias = b.defined() ? b.const_data_ptr<float>() : nullptr;
  p.addend = addend.defined() ? addend.const_data_ptr<float>() : nullptr;
  p.output = output.mutable_data_ptr<float>();
  fill_parts(p, segments);
  method(p);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, const Tensor& input_scale,
              const std::optional<Tensor>& bias, int64_t weight_bits, at::IntArrayRef segments,
              at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
              int64_t groups, at::ScalarType dtype, int64_t input_bits, const std::optional<Tensor>& addend) {
  TORCH_CHECK_VALUE(input.dim() == 4, "input has ", input.dim(), " dimensions: expected (B, C, H, W)");
  TORCH_CHECK_VALUE(groups == 1 || segments.size() == 1, "a grouped convolution takes one segment of input channels");
  TORCH_CHECK_VALUE(groups >= 1 && input.size(1) % groups == 0 && weight_scale.numel() % groups == 0, "groups=", groups,
                    ": must divide ", input.size(1), " input and ", weight_scale.numel(), " output channels");
  TORCH_CHECK_VALUE(stride[0] >= 1 && stride[1] >= 1, "stride=", stride, ": at least 1");
  Problem p{};
  p.B = input.size(0), p.C = input.size(1), p.H = input.size(2), p.W = input.size(3), p.O = weight_scale.numel();
  p.KH = kernel_size[0], p.KW = kernel_size[1], p.SH = stride[0], p.SW = stride[1], p.PH = padding[0];
  p.PW = padding[1], p.DH = dilation[0], p.DW = dilation[1], p.groups = groups, p.bits = (int)weight_bits;
  p.input_bits = (int)input_bits;
  const int64_t down = p.H + 2 * p.PH - p.DH * (p.KH - 1) - 1, along = p.W + 2 * p.PW - p.DW * (p.KW - 1) - 1;
  TORCH_CHECK_VALUE(down >= 0 && along >= 0, "kernel of ", kernel_size, " on an input of ", input.sizes(), " leaves nothing");
  p.OH = down / p.SH + 1, p.OW = along / p.SW + 1;
  check(input, weight, input_scale, bias, weight_bits, segments, p.C, p.O, p.in_group() * p.KH * p.KW);
  Tensor output = at::empty({p.B, p.O, p.OH, p.OW}, input.options().dtype(at::kFloat), at::MemoryFormat::ChannelsLast);
  Tensor a;
  if (addend) {
    TORCH_CHECK_VALUE(addend->dim() == 4, "addend has ", addend->dim(), " dimensions: expected 4");
    const bool per_sample = addend->size(2) == 1 && addend->size(3) == 1;
    TORCH_CHECK_VALUE(addend->size(0) == p.B && addend->size(1) == p.O &&
                          (per_sample || (addend->size(2) == p.OH && addend->size(3) == p.OW)),
                      "addend has shape ", addend->sizes(), ": expected ", output.sizes(), " or one value per channel");
    a = addend->to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
    p.addend_sample = per_sample ? p.O : p.O * p.OH * p.OW;
    p.addend_pixel = per_sample ? 0 : p.O;
  }
  const bool three = p.KH == 3 && p.KW == 3 && p.SH == 1 && p.SW == 1 && p.DH == 1 && p.DW == 1 && groups == 1;
  compute(p, three && weight_bits <= 4 && input_bits <= 6 ? winograd : direct,
          input.contiguous(at::MemoryFormat::ChannelsLast), weight, weight_scale, input_scale, bias, a, segments, output);
  return output.to(dtype);
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& weight_scale, const Tensor& input_scale,
              const std::optional<Tensor>& bias, int64_t weight_bits, at::IntArrayRef segments, at::ScalarType dtype,
              const std::optional<Tensor>& addend) {
  TORCH_CHECK_VALUE(input.dim() >= 2, "input has ", input.dim(), " dimensions: expected (B, ..., K)");
  Problem p{};
  p.B = input.size(0), p.C = input.size(-1), p.O = weight_scale.numel();
  p.H = p.B * p.C > 0 ? input.numel() / (p.B * p.C) : 0, p.OH = p.H, p.bits = (int)weight_bits;
  p.W = p.OW = p.KH = p.KW = p.SH = p.SW = p.DH = p.DW = p.groups = 1;
  check(input, weight, input_scale, bias, weight_bits, segments, p.C, p.O, p.C);
  auto shape = input.sizes().vec();
  shape.back() = p.O;
  Tensor output = at::empty(shape, input.options().dtype(at::kFloat));
  Tensor a;
  if (addend) {
    TORCH_CHECK_VALUE(addend->sizes() == output.sizes(), "addend has shape ", addend->sizes(), ": expected ", output.sizes());
    a = addend->to(at::kFloat).contiguous();
    p.addend_sample = p.H * p.O, p.addend_pixel = p.O;
  }
  compute(p, direct, input.contiguous(), weight, weight_scale, input_scale, bias, a, segments, output);
  return output.to(dtype);
}

Tensor weight_only_linear(const Tensor& input, const Tensor& weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, int64_t weight_bits) {
  TORCH_CHECK_VALUE(input.dim() >= 1, "input has no dimension: expected (..., K)");
  TORCH_CHECK_TYPE(at::isFloatingType(input.scalar_type()), "input is ", input.scalar_type(), ": expected floating point");
  Problem p{};
  p.C = input.size(-1), p.O = weight_scale.numel(), p.B = p.C > 0 ? input.numel() / p.C : 0, p.bits = (int)weight_bits;
  p.H = p.W = p.OH = p.OW = p.KH = p.KW = p.SH = p.SW = p.DH = p.DW = p.groups = 1;
  check_weight(weight, bias, weight_bits, p.O, p.C);
  auto shape = input.sizes().vec();
  shape.back() = p.O;
  Tensor output = at::empty(shape, input.options().dtype(at::kFloat));
  if (output.numel() > 0) {
    const Tensor x = input.to(at::kFloat).contiguous(), w = weight.contiguous(),
                 s = weight_scale.to(at::kFloat).contiguous(), b = bias ? bias->to(at::kFloat).contiguous() : Tensor();
    p.weight = w.const_data_ptr<uint8_t>(), p.row = w.size(1), p.weight_scale = s.const_data_ptr<float>();
    p.bias = b.defined() ? b.const_data_ptr<float>() : nullptr, p.output = output.mutable_data_ptr<float>();
    fill_parts(p, {p.C});
    weight_only(p, x.const_data_ptr<float>());
  }
  return output.to(input.scalar_type());
}

Tensor norm_silu_quantize(at::TensorList inputs, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                          int64_t norm_groups, double eps, bool silu, const Tensor& scale, const Tensor& low,
                          at::IntArrayRef segments, int64_t bits, int64_t upsample) {
  TORCH_CHECK_VALUE(!inputs.empty() && upsample >= 1, "no input, or upsample=", upsample);
  const Tensor& head = inputs[0];
  Quantize p{};
  std::vector<Tensor> held;
  for (auto& input : inputs) {
    TORCH_CHECK_VALUE(input.dim() == 4 && input.size(0) == head.size(0) && input.size(2) == head.size(2) &&
                          input.size(3) == head.size(3),
                      "inputs of shapes ", head.sizes(), " and ", input.sizes(), " do not stand side by side");
    held.push_back(input.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast));
    p.sources.push_back({held.back().const_data_ptr<float>(), input.size(1), p.C});
    p.C += input.size(1);
  }
  p.B = head.size(0), p.H = head.size(2), p.W = head.size(3), p.norm_groups = norm_groups, p.upsample = upsample;
  p.eps = eps, p.silu = silu, p.bits = (int)bits, p.segments = segments.vec();
  check_grid("scale", scale, segments, p.B, p.C);
  check_grid("low", low, segments, p.B, p.C);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, "bits=", bits, ": allowed are 2 to 8");
  TORCH_CHECK_VALUE(norm_groups == 0 || p.C % norm_groups == 0, p.C, " channels in ", norm_groups, " groups");
  for (auto* affine : {&weight, &bias})
    TORCH_CHECK_VALUE(!*affine || (*affine)->numel() == p.C, "a norm's weight or bias has ", *affine ? (*affine)->numel() : 0,
                      " values: expected ", p.C);
  Tensor output = at::empty({p.B, p.C, p.H * upsample, p.W * upsample}, head.options().dtype(at::kChar),
                            at::MemoryFormat::ChannelsLast);
  if (output.numel() > 0) {
    const Tensor s = scale.to(at::kFloat).contiguous(), l = low.contiguous();
    Tensor w, b;
    if (weight) w = weight->to(at::kFloat).contiguous(), p.norm_weight = w.const_data_ptr<float>();
    if (bias) b = bias->to(at::kFloat).contiguous(), p.norm_bias = b.const_data_ptr<float>();
    p.scale = s.const_data_ptr<float>();
    AT_DISPATCH_INTEGRAL_TYPES(l.scalar_type(), "low", [&] {  // as they are: a few numbers, and no tensor of them
      p.low.assign(l.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>() + l.numel());
    });
    p.output = output.mutable_data_ptr<int8_t>();
    if (upsample == 1) cut_into_rows(p);
    TORCH_CHECK_VALUE(quantize(p), "NaN or infinity in what is quantized: integers would hide it");
  }
  return output;
}

Tensor quantize_op(const Tensor& input, const Tensor& scale, const Tensor& low, at::IntArrayRef segments, int64_t bits,
                   int64_t channel_dim) {
  const int64_t rank = input.dim(), dim = channel_dim < 0 ? channel_dim + rank : channel_dim;
  TORCH_CHECK_VALUE(rank >= 2 && (dim == rank - 1 || (dim == 1 && rank == 4)), "channel_dim=", channel_dim,
                    " of an input of ", rank, " dimensions: allowed are the last, and 1 of 4");
  if (dim == 1 && rank == 4)
    return norm_silu_quantize({input}, {}, {}, 0, 0, false, scale, low, segments, bits, 1);
  const Tensor x = input.contiguous();
  const int64_t rows = x.numel() ? x.numel() / (x.size(0) * x.size(-1)) : 0;
  Tensor flat = x.view({x.size(0), rows, 1, x.size(-1)}).permute({0, 3, 1, 2});
  return norm_silu_quantize({flat}, {}, {}, 0, 0, false, scale, low, segments, bits, 1).permute({0, 2, 3, 1}).reshape(x.sizes());
}

Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && key.sizes() == value.sizes() &&
                        key.size(0) == query.size(0) && key.size(1) == query.size(1) && key.size(3) == query.size(3),
                    "query, key and value of shapes ", query.sizes(), ", ", key.sizes(), " and ", value.sizes(),
                    ": expected (B, heads, L, D), and twice (B, heads, S, D)");
  Attention p{};
  p.B = query.size(0), p.heads = query.size(1), p.L = query.size(2), p.D = query.size(3), p.S = key.size(2);
  TORCH_CHECK_VALUE(p.S > 0 || query.numel() == 0, "attention to no key");
  p.scale = (float)scale;
  std::vector<Tensor> held;
  const auto rows = [&](const Tensor& tensor) {
    const Tensor floats = tensor.to(at::kFloat);
    held.push_back(floats.stride(3) == 1 ? floats : floats.contiguous());
    const Tensor& t = held.back();
    return Tokens{t.const_data_ptr<float>(), t.stride(0), t.stride(1), t.stride(2)};
  };
  Tensor output = at::empty({p.B, p.L, p.heads, p.D}, query.options().dtype(at::kFloat));
  if (output.numel() > 0) {
    p.query = rows(query), p.key = rows(key), p.value = rows(value), p.output = output.mutable_data_ptr<float>();
    attention(p);
  }
  return output.to(query.scalar_type()).transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_IMPL(pqcad, CPU, m) {
  m.impl("conv2d", conv2d);
  m.impl("linear", linear);
  m.impl("weight_only_linear", weight_only_linear);
  m.impl("quantize", quantize_op);
  m.impl("norm_silu_quantize", norm_silu_quantize);
  m.impl("attention", attention_op);
}
extern "C" const char* pqcad_cpu_kernels() { return INSTRUCTIONS; }
#else
extern "C" const char* pqcad_cpu_kernels() { return ""; }
#endif
