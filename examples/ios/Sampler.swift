// Sample an image from a .pte of export_pte on iOS or macOS.
// Package: https://github.com/pytorch/executorch, branch swiftpm-1.0.0 or newer; products executorch, backend_xnnpack,
// kernels_optimized.
import ExecuTorch
import Foundation

final class Sampler {
  private let program: Module
  private let steps: Int
  private let sigma: Double
  let shape: [Int]

  init(path: String) throws {
    program = Module(filePath: path)
    steps = try program.execute("steps")[0].integer()
    sigma = try program.execute("init_noise_sigma")[0].double()
    let batch: Int = try program.execute("batch_size")[0].integer()
    let image: Tensor<Int64> = try program.execute("sample_shape")[0].tensor()
    shape = [batch] + image.scalars().map(Int.init)
  }

  /// (batch, height, width, channels) pixels, one byte each.
  func sample() throws -> [UInt8] {
    let noise = (0..<shape.reduce(1, *)).map { _ -> Float in
      let radius = (-2 * log(Double.random(in: Double.leastNonzeroMagnitude...1))).squareRoot()
      return Float(sigma * radius * cos(2 * .pi * Double.random(in: 0..<1)))
    }
    var x = Tensor<Float>(noise, shape: shape)
    for i in 0..<steps {  // the schedule, its constants and the scales are in the file
      x = try program.execute("step", [x, Tensor<Int64>([Int64(i)], shape: [1])])[0].tensor()
    }
    let image: Tensor<UInt8> = try program.execute("image", x)[0].tensor()
    return image.scalars()
  }
}
