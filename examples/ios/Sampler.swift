// Sample an image from a .pte of export_pte on iOS or macOS.
// Package: https://github.com/pytorch/executorch, branch swiftpm-1.0.0 or newer; products executorch, backend_xnnpack,
// kernels_optimized.
import ExecuTorch
import Foundation

final class Sampler {
  private let program: Module
  private let steps: Int
  private let sigma: Double
  private let sources: [Int]?  // of a file with a cache plan: the step whose feature each step takes, or its own
  let shape: [Int]

  init(path: String) throws {
    program = Module(filePath: path)
    steps = try program.execute("steps")[0].integer()
    sigma = try program.execute("init_noise_sigma")[0].double()
    // of a file for several batch sizes, the first; for a further one of 4 execute step_4, step_cached_4 and image_4
    let batch: Int = try program.execute("batch_size")[0].integer()
    if try program.methodNames().contains("step_cached") {
      let taken: Tensor<Int64> = try program.execute("cache_sources")[0].tensor()
      sources = taken.scalars().map(Int.init)
    } else {
      sources = nil
    }
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
    var feature: Tensor<Float>?
    for i in 0..<steps {  // the schedule, its constants and the scales are in the file
      let index = Tensor<Int64>([Int64(i)], shape: [1])
      if let sources, let kept = feature, sources[i] != i {
        x = try program.execute("step_cached", [x, index, kept])[0].tensor()
      } else {
        let made = try program.execute("step", [x, index])
        x = try made[0].tensor()
        if sources != nil { feature = try made[1].tensor() }
      }
    }
    let image: Tensor<UInt8> = try program.execute("image", x)[0].tensor()
    return image.scalars()
  }
}
