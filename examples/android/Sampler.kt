// Sample an image from a .pte of export_pte on Android.
// Gradle: implementation("org.pytorch:executorch-android:1.0.0") or newer; put unet.pte where the app can read it.
package pqcad

import java.util.Random
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

class Sampler(path: String) {
    private val program = Module.load(path)
    private val steps = program.execute("steps")[0].toInt()
    // of a file for several batch sizes, the first; for a further one of 4 execute step_4, step_cached_4 and image_4
    private val batch = program.execute("batch_size")[0].toInt()
    private val sigma = program.execute("init_noise_sigma")[0].toDouble()
    // of a file with a cache plan: the step whose feature each step takes, its own where it is computed in full
    private val sources =
        if ("step_cached" in program.getMethods()) program.execute("cache_sources")[0].toTensor().dataAsLongArray else null
    val shape: LongArray = longArrayOf(batch) + program.execute("sample_shape")[0].toTensor().dataAsLongArray

    /** (batch, height, width, channels) pixels, one byte each. */
    fun sample(seed: Long): ByteArray {
        val random = Random(seed)
        val count = shape.reduce(Long::times).toInt()
        var x = Tensor.fromBlob(FloatArray(count) { (random.nextGaussian() * sigma).toFloat() }, shape)
        var feature: EValue? = null
        for (i in 0L until steps) { // the schedule, its constants and the scales are in the file
            val inputs = arrayOf(EValue.from(x), EValue.from(Tensor.fromBlob(longArrayOf(i), longArrayOf(1))))
            val kept = feature
            if (sources != null && sources[i.toInt()] != i && kept != null) {
                x = program.execute("step_cached", *inputs, kept)[0].toTensor()
            } else {
                val made = program.execute("step", *inputs)
                x = made[0].toTensor()
                if (sources != null) feature = made[1]
            }
        }
        return program.execute("image", EValue.from(x))[0].toTensor().dataAsUnsignedByteArray
    }

}
