// Tensors as the operators see them, in PyTorch's stable ABI: what is compiled serves PyTorch 2.11 and those that follow.
//
// A call of PyTorch's own functions through it costs a microsecond: what a tensor can be asked without one is asked so.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

std::ostream& operator<<(std::ostream& stream, Sizes sizes) {
  stream << "[";
  for (size_t i = 0; i < sizes.size(); i++) stream << (i ? ", " : "") << sizes[i];
  return stream << "]";
}

template <class... Parts> [[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());  // a ValueError in Python; the ABI has no errors of PyTorch's own
}

// What follows the condition is only worked out where it does not hold.
#define PQCAD_CHECK(holds, ...) \
  if (!(holds)) refuse(__VA_ARGS__)

// A tensor's dimensions in the order of its memory, the innermost first.
using Order = std::vector<int64_t>;

Order row_major(int64_t dims) {
  Order order;
  while (dims-- > 0) order.push_back(dims);
  return order;
}
const Order& channels_last() {
  static const Order order{1, 3, 2, 0};
  return order;
}

// Memory for a tensor on the CPU, of a type as aoti_torch_dtype_ calls it.
Tensor empty(Sizes sizes, int32_t type, const Order& order) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (auto d : order) strides[d] = stride, stride *= sizes[d];
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

bool is_floating_point(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

bool lies_in(const Tensor& tensor, const Order& order) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t stride = 1;
  for (auto d : order) {
    if (sizes[d] != 1 && strides[d] != stride) return false;
    stride *= sizes[d];
  }
  return true;
}

Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

Tensor dense(const Tensor& tensor) {
  return lies_in(tensor, row_major(tensor.dim())) ? tensor : torch::stable::contiguous(tensor);
}
Tensor dense_channels_last(const Tensor& tensor) {
  return lies_in(tensor, channels_last()) ? tensor : torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// What a problem points into: it has to live until the problem is solved.
class Held {
  std::vector<Tensor> tensors;

 public:
  const Tensor& keep(const Tensor& tensor) { return tensors.emplace_back(tensor); }  // until the next one is kept
  const float* floats(const Tensor& tensor) {
    return keep(dense(as_type(tensor, ScalarType::Float))).const_data_ptr<float>();
  }
  const float* floats(const std::optional<Tensor>& tensor) { return tensor ? floats(*tensor) : nullptr; }
  const float* channels_last_floats(const Tensor& tensor) {
    return keep(dense_channels_last(as_type(tensor, ScalarType::Float))).const_data_ptr<float>();
  }
};

}  // namespace
