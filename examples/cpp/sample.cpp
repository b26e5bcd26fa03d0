// Sample one image from a .pte of export_pte with ExecuTorch's C++ runtime, and write it as a PGM or PPM file.
//
// Build: link against executorch (extension_module, extension_tensor, xnnpack_backend, portable_ops_lib).
// Run:   ./sample unet.pte out.ppm [seed]
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

using executorch::extension::from_blob;
using executorch::extension::Module;

namespace {

template <typename T>
T unwrap(executorch::runtime::Result<T> result, const char* what) {
  if (!result.ok()) {
    std::fprintf(stderr, "%s failed: error 0x%x\n", what, static_cast<unsigned>(result.error()));
    std::exit(1);
  }
  return std::move(*result);
}

int64_t constant(Module& program, const char* name) {
  return unwrap(program.execute(name), name).at(0).toInt();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s unet.pte out.ppm [seed]\n", argv[0]);
    return 2;
  }
  Module program(argv[1]);
  const int64_t steps = constant(program, "steps"), batch = constant(program, "batch_size");
  const auto shape_of = unwrap(program.execute("sample_shape"), "sample_shape");
  const auto* chw = shape_of.at(0).toTensor().const_data_ptr<int64_t>();
  const std::vector<int> shape = {int(batch), int(chw[0]), int(chw[1]), int(chw[2])};
  const double sigma = unwrap(program.execute("init_noise_sigma"), "init_noise_sigma").at(0).toDouble();

  std::mt19937 generator(argc > 3 ? std::atoi(argv[3]) : 0);
  std::normal_distribution<float> normal(0.0f, float(sigma));
  std::vector<float> x(size_t(shape[0]) * shape[1] * shape[2] * shape[3]);
  for (float& value : x) value = normal(generator);

  for (int64_t i = 0; i < steps; ++i) {  // the schedule, its constants and the scales are in the file
    std::vector<int64_t> index = {i};
    const auto output = unwrap(program.execute("step", {from_blob(x.data(), shape), from_blob(index.data(), {1}, executorch::aten::ScalarType::Long)}), "step");
    const float* next = output.at(0).toTensor().const_data_ptr<float>();
    x.assign(next, next + x.size());
  }
  const auto image = unwrap(program.execute("image", {from_blob(x.data(), shape)}), "image");
  const uint8_t* pixels = image.at(0).toTensor().const_data_ptr<uint8_t>();

  if (shape[1] != 1 && shape[1] != 3) {
    std::fprintf(stderr, "%d channels are neither grey nor RGB\n", shape[1]);
    return 1;
  }
  std::FILE* file = std::fopen(argv[2], "wb");
  if (file == nullptr) {
    std::perror(argv[2]);
    return 1;
  }
  std::fprintf(file, "P%d\n%d %d\n255\n", shape[1] == 3 ? 6 : 5, shape[3], shape[2]);
  std::fwrite(pixels, 1, size_t(shape[1]) * shape[2] * shape[3], file);
  std::fclose(file);
  return 0;
}
