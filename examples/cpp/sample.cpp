// Sample one image from a .pte of export_pte with ExecuTorch's C++ runtime, and write it as a PGM or PPM file.
//
// Build: see CMakeLists.txt. It asks for nothing beyond the headers and the library that ExecuTorch's Python package has.
// Run:   ./sample unet.pte out.ppm [seed]
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/platform_memory_allocator.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

using executorch::extension::from_blob;
using executorch::extension::TensorPtr;
using executorch::runtime::DataLoader;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::Program;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::internal::PlatformMemoryAllocator;

namespace {

template <typename T>
T unwrap(Result<T> result, const char* what) {
  if (!result.ok()) {
    std::fprintf(stderr, "%s failed: error 0x%x\n", what, static_cast<unsigned>(result.error()));
    std::exit(1);
  }
  return std::move(*result);
}

void check(Error error, const char* what) {
  if (error != Error::Ok) {
    std::fprintf(stderr, "%s failed: error 0x%x\n", what, static_cast<unsigned>(error));
    std::exit(1);
  }
}

// A file in memory, which the program reads its weights from as long as it lives.
class File final : public DataLoader {
 public:
  explicit File(const char* path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) {
      std::perror(path);
      std::exit(1);
    }
    size_ = static_cast<size_t>(file.tellg());
    bytes_.resize(size_ / sizeof(std::max_align_t) + 1);
    file.seekg(0);
    file.read(reinterpret_cast<char*>(bytes_.data()), static_cast<std::streamsize>(size_));
  }
  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
    return FreeableBuffer(reinterpret_cast<const char*>(bytes_.data()) + offset, size, nullptr);
  }
  Result<size_t> size() const override { return size_; }

 private:
  std::vector<std::max_align_t> bytes_;  // aligned for every type
  size_t size_ = 0;
};

// One method of a program, with the memory that the exporter planned for it.
class Call {
 public:
  Call(const Program& program, const char* name)
      : name_(name),
        buffers_(planned(program, name)),
        spans_(views(buffers_)),
        planned_({spans_.data(), spans_.size()}),
        manager_(&allocator_, &planned_, &temporary_),
        method_(unwrap(program.load_method(name, &manager_), name)) {}

  const EValue& operator()(const std::vector<TensorPtr>& inputs = {}) {
    for (size_t index = 0; index < inputs.size(); ++index)
      check(method_.set_input(EValue(*inputs[index]), index), name_);
    check(method_.execute(), name_);
    temporary_.reset();
    return method_.get_output(0);
  }

  const EValue& output(size_t index) const { return method_.get_output(index); }

 private:
  static std::vector<std::vector<uint8_t>> planned(const Program& program, const char* name) {
    const auto meta = unwrap(program.method_meta(name), name);
    std::vector<std::vector<uint8_t>> buffers;
    for (size_t index = 0; index < meta.num_memory_planned_buffers(); ++index)
      buffers.emplace_back(static_cast<size_t>(unwrap(meta.memory_planned_buffer_size(index), name)));
    return buffers;
  }

  static std::vector<Span<uint8_t>> views(std::vector<std::vector<uint8_t>>& buffers) {
    std::vector<Span<uint8_t>> spans;
    for (auto& buffer : buffers) spans.emplace_back(buffer.data(), buffer.size());
    return spans;
  }

  const char* name_;
  std::vector<std::vector<uint8_t>> buffers_;
  std::vector<Span<uint8_t>> spans_;
  HierarchicalAllocator planned_;
  PlatformMemoryAllocator allocator_, temporary_;
  MemoryManager manager_;
  Method method_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s unet.pte out.ppm [seed]\n", argv[0]);
    return 2;
  }
  executorch::runtime::runtime_init();
  File file(argv[1]);
  const Program program = unwrap(Program::load(&file), argv[1]);
  const int64_t steps = Call(program, "steps")().toInt(), batch = Call(program, "batch_size")().toInt();
  Call sample_shape(program, "sample_shape");
  const int64_t* chw = sample_shape().toTensor().const_data_ptr<int64_t>();
  const std::vector<int> shape = {int(batch), int(chw[0]), int(chw[1]), int(chw[2])};
  const double sigma = Call(program, "init_noise_sigma")().toDouble();

  std::mt19937 generator(argc > 3 ? std::atoi(argv[3]) : 0);
  std::normal_distribution<float> normal(0.0f, float(sigma));
  std::vector<float> x(size_t(shape[0]) * shape[1] * shape[2] * shape[3]);
  for (float& value : x) value = normal(generator);

  // of a file for several batch sizes, these are the first's; one of 4 has step_4, step_cached_4 and image_4
  Call step(program, "step"), image(program, "image");
  std::unique_ptr<Call> step_cached;  // where the file has a cache plan
  std::vector<int64_t> sources;       // the step whose feature each step takes; its own where it is computed in full
  if (program.method_meta("step_cached").ok()) {
    step_cached = std::make_unique<Call>(program, "step_cached");
    Call cache_sources(program, "cache_sources");
    const int64_t* taken = cache_sources().toTensor().const_data_ptr<int64_t>();
    sources.assign(taken, taken + steps);
  }
  std::vector<float> feature;
  std::vector<int> feature_shape;
  for (int64_t i = 0; i < steps; ++i) {  // the schedule, its constants and the scales are in the file
    const auto x_t = from_blob(x.data(), shape), index = from_blob(&i, {1}, executorch::aten::ScalarType::Long);
    const float* next = nullptr;
    if (step_cached && sources[i] != i) {
      const auto kept = from_blob(feature.data(), feature_shape);
      next = (*step_cached)({x_t, index, kept}).toTensor().const_data_ptr<float>();
    } else {
      next = step({x_t, index}).toTensor().const_data_ptr<float>();
      if (step_cached) {
        const auto& deep = step.output(1).toTensor();
        feature.assign(deep.const_data_ptr<float>(), deep.const_data_ptr<float>() + deep.numel());
        feature_shape.assign(deep.sizes().begin(), deep.sizes().end());
      }
    }
    x.assign(next, next + x.size());
  }
  const uint8_t* pixels = image({from_blob(x.data(), shape)}).toTensor().const_data_ptr<uint8_t>();

  if (shape[1] != 1 && shape[1] != 3) {
    std::fprintf(stderr, "%d channels are neither grey nor RGB\n", shape[1]);
    return 1;
  }
  std::FILE* out = std::fopen(argv[2], "wb");
  if (out == nullptr) {
    std::perror(argv[2]);
    return 1;
  }
  std::fprintf(out, "P%d\n%d %d\n255\n", shape[1] == 3 ? 6 : 5, shape[3], shape[2]);
  std::fwrite(pixels, 1, size_t(shape[1]) * shape[2] * shape[3], out);
  std::fclose(out);
  return 0;
}
