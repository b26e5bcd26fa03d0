"""One quantized network, many ways to call it: eager, compiled, exported, cast, copied, any batch, any timestep."""

import copy
import io
from statistics import median

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from networks import SHAPE, TINY_UNET, quick, sqnr
from torch._dynamo.utils import counters

from pqcad_ao import quantize_
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.graph.capture import capture
from pqcad_ao.nn.layers import QuantizedLayer


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _images(batch: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def _integers(model, x, t) -> dict[str, torch.Tensor]:
    """What each layer hands to its operator."""
    seen, hooks = {}, []

    def record(name):
        original = model.get_submodule(name).quantize_input

        def quantize_input(*args):
            integers, scale = original(*args)
            seen[name] = integers
            return integers, scale

        return quantize_input

    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.activation_bits is not None:
            module.quantize_input = record(name)
            hooks.append(module)
    model(x, t)
    for module in hooks:
        del module.quantize_input
    return seen


# Timesteps and batches


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 5, 65])
def test_any_batch_equals_one_by_one(quantized_unet, batch):
    """65 takes the branch of diffusers' upsampling that one exported graph could not hold as well."""
    x, t = _images(batch), torch.arange(batch) * 999 // max(batch - 1, 1)
    together = quantized_unet(x, t).sample
    assert together.shape == (batch, *SHAPE)
    alone = torch.cat([quantized_unet(x[i : i + 1], t[i]).sample for i in range(batch)])
    assert sqnr(alone, together) > 40
    integers = _integers(quantized_unet, x, t)["conv_in"]
    assert torch.equal(
        integers, torch.cat([_integers(quantized_unet, x[i : i + 1], t[i])["conv_in"] for i in range(batch)])
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "timestep",
    [
        250,
        250.0,
        torch.tensor(250),
        torch.tensor([250]),
        torch.tensor(250.0),
        torch.tensor([250] * 3),
        torch.tensor([250] * 3, dtype=torch.int32),
        torch.tensor(250, device="cpu"),
        np.int64(250),
    ],
    ids=["int", "float", "0-d", "one", "0-d float", "per sample", "int32", "cpu", "numpy"],
)
def test_any_form_of_timestep(quantized_unet, timestep):
    x = _images(3)
    expected = quantized_unet(x, torch.full((3,), 250)).sample
    assert torch.equal(quantized_unet(x, timestep).sample, expected)
    assert torch.equal(quantized_unet(sample=x, timestep=timestep).sample, expected)
    assert torch.equal(quantized_unet(x, timestep=timestep, return_dict=False)[0], expected)


@torch.no_grad()
def test_the_timestep_chooses_the_grid(quantized_unet):
    """Within a group the first layer's integers are the same, between groups they are not."""
    x, boundary = _images(4), 1000 // 4
    first = [_integers(quantized_unet, x, t)["conv_in"] for t in (0, boundary - 1, boundary, 999)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    mixed = _integers(quantized_unet, x, torch.tensor([0, boundary - 1, boundary, 999]))["conv_in"]
    for row in range(4):
        assert torch.equal(mixed[row], first[row][row])


@torch.no_grad()
def test_classifier_free_guidance_doubles_the_batch(quantized_unet):
    x = _images(3)
    doubled = quantized_unet(torch.cat([x, x]), 400).sample
    assert torch.equal(doubled[:3], doubled[3:])
    assert sqnr(quantized_unet(x, 400).sample, doubled[:3]) > 40


def test_calls_that_make_no_sense_say_so(quantized_unet):
    x = _images(3)
    with pytest.raises(ValueError, match="2 timesteps for a batch of 3: give one for all, or one for each sample"):
        quantized_unet(x, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"UNet2DModel is quantized and was called without 'timestep'"):
        quantized_unet(x)
    with pytest.raises(RuntimeError, match="called outside its network"):
        quantized_unet.conv_in(x)


@torch.no_grad()
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_call_that_raises_does_not_poison_the_next(quantized_unet, error):
    x = _images(3)
    expected = quantized_unet(x, 700).sample

    def fail(*args):
        raise error

    handle = quantized_unet.mid_block.register_forward_hook(fail)
    with pytest.raises(error):
        quantized_unet(x, 5)
    handle.remove()
    if issubclass(error, Exception):  # torch runs no hooks for the others
        with pytest.raises(RuntimeError, match="called outside its network"):
            quantized_unet.conv_in(x)
    assert torch.equal(quantized_unet(x, 700).sample, expected)


@torch.no_grad()
def test_the_inputs_layout_does_not_matter(quantized_unet):
    x = _images(4)
    expected = quantized_unet(x, 100).sample
    assert sqnr(expected, quantized_unet(x.to(memory_format=torch.channels_last), 100).sample) > 40
    assert sqnr(expected, quantized_unet(x.transpose(2, 3).contiguous().transpose(2, 3), 100).sample) > 40
    integers, other = (
        _integers(quantized_unet, v, 100)["conv_in"] for v in (x, x.to(memory_format=torch.channels_last))
    )
    assert torch.equal(integers, other)


# Types, copies, states


@torch.no_grad()
def test_bfloat16_leaves_the_grids_in_float32(quantized_unet):
    before = {name: value.clone() for name, value in quantized_unet.state_dict().items()}
    expected = quantized_unet(_images(4), 300).sample
    quantized_unet.to(torch.bfloat16)
    for name, module in quantized_unet.named_modules():
        if isinstance(module, QuantizedLayer):
            for key, value in module.state_dict().items():
                assert torch.equal(value, before[f"{name}.{key}"])
                assert value.dtype == before[f"{name}.{key}"].dtype
    assert quantized_unet.dtype == quantized_unet.conv_norm_out.weight.dtype == torch.bfloat16
    output = quantized_unet(_images(4).bfloat16(), 300).sample
    assert output.dtype == torch.bfloat16
    assert sqnr(expected, output) > 8


def test_casting_there_and_back_is_exact(quantized_unet):
    layer = quantized_unet.mid_block.resnets[0].conv1
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    quantized_unet.half().double().to(torch.bfloat16).float()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@torch.no_grad()
def test_autocast_keeps_the_sums_exact(quantized_unet):
    """What autocast rounds are the layers left in floating point; without those nothing changes."""
    layer, x = quantized_unet.mid_block.resnets[0].conv1, torch.randn(2, 16, 4, 4)
    layer.timestep.call.group = torch.tensor([0, 1])
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_the_meta_device_works(quantized_unet):
    moved = copy.deepcopy(quantized_unet).to("meta")
    assert all(value.is_meta for value in moved.state_dict().values())
    assert moved(torch.zeros(2, *SHAPE, device="meta"), torch.zeros(2, device="meta")).sample.shape == (2, *SHAPE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_cuda_has_the_same_integers(quantized_unet):
    x, t = _images(5), torch.tensor([0, 250, 500, 750, 999])
    expected = _integers(quantized_unet, x, t)["conv_in"]
    reference = quantized_unet(x, t).sample
    quantized_unet.to("cuda")
    assert torch.equal(_integers(quantized_unet, x.cuda(), t.cuda())["conv_in"].cpu(), expected)
    assert sqnr(reference, quantized_unet(x.cuda(), t).sample.cpu()) > 40


@torch.no_grad()
def test_a_deep_copy_is_independent(quantized_unet):
    x = _images(3)
    expected = quantized_unet(x, 10).sample
    other = copy.deepcopy(quantized_unet)
    assert torch.equal(other(x, 10).sample, expected)
    for module in other.modules():
        if isinstance(module, QuantizedLayer):
            module.weight_scale.mul_(2)
            assert module.timestep is other._pqcad_timestep
            assert module.timestep is not quantized_unet._pqcad_timestep
    assert not torch.equal(other(x, 10).sample, expected)
    assert torch.equal(quantized_unet(x, 10).sample, expected)


@torch.no_grad()
def test_state_dict_round_trip(quantized_unet):
    x = _images(3)
    expected = quantized_unet(x, 10).sample
    buffer = io.BytesIO()
    torch.save(quantized_unet.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(quantized_unet)
    for value in other.state_dict().values():
        value.zero_()
    assert not torch.equal(other(x, 10).sample, expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x, 10).sample, expected)


# Pipelines


def test_inside_a_diffusers_pipeline(quantized_unet, scheduler):
    pipeline = DDIMPipeline(quantized_unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options = {"batch_size": 3, "num_inference_steps": 5, "output_type": "np"}
    images = pipeline(generator=torch.Generator().manual_seed(0), **options).images
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    ours = (sample(quantized_unet, scheduler, noise, 5) / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(images, ours.permute(0, 2, 3, 1).numpy(), atol=1e-5)


# torch.compile


@torch.no_grad()
@pytest.mark.slow
def test_inductor_compiles_a_unet_without_a_graph_break(scheduler):
    """One level and no attention, so that Inductor is done in half a minute; the slow tier compiles a whole UNet."""
    torch.manual_seed(0)
    one_level = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(**{**TINY_UNET, **one_level}, add_attention=False).eval()
    quantize_(unet, quick(), scheduler=scheduler, progress=False)
    compiled = torch.compile(unet, fullgraph=True)
    x = _images(5)
    for t in (0, 400, 999):
        assert sqnr(unet(x, torch.tensor(t)).sample, compiled(x, torch.tensor(t)).sample) > 40
    assert counters["stats"]["unique_graphs"] == 2  # the network, and the hook that binds its timestep
    assert not counters["graph_break"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["0-d", "int", "float"])
def test_compiled_once_for_all_timesteps(quantized_least_unet, kind):
    """Numbers become symbolic at their second value; from then on nothing is compiled again."""
    compiled = torch.compile(quantized_least_unet, fullgraph=True, backend="eager")
    convert = {"0-d": torch.tensor, "int": int, "float": float}[kind]
    x = _images(2)
    graphs = []
    for t in (999, 0, *range(100, 1000, 75)):
        assert torch.equal(compiled(x, convert(t)).sample, quantized_least_unet(x, t).sample)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 2
    assert graphs[-1] == graphs[1] <= (2 if kind == "0-d" else 4)


@torch.no_grad()
def test_compiled_for_any_batch(small):
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 2, 65, 1):
        x, t = _images(batch), torch.arange(batch) * 15
        assert torch.equal(compiled(x, t), small(x, t))
    # one graph for all batches but the batch of one, which dynamo always treats apart
    assert counters["stats"]["unique_graphs"] <= 4


@torch.no_grad()
def test_compiled_inside_another_function(small):
    """Then network and hook are one graph."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def guided(x, t):
        both = small(torch.cat([x, x]), torch.cat([t, t]))
        return both[: len(x)] * 2 - both[len(x) :]

    x, t = _images(2), torch.tensor([3, 800])
    expected = small(x, t)
    assert sqnr(expected, guided(x, t)) > 40
    assert counters["stats"]["unique_graphs"] == 1
    with pytest.raises(RuntimeError, match="called outside its network"):
        small.down(x)


@torch.no_grad()
def test_compiled_in_bfloat16(small):
    small.to(torch.bfloat16)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    x, t = _images(3).bfloat16(), torch.tensor([3, 500, 800])
    assert torch.equal(compiled(x, t), small(x, t))


@torch.no_grad()
def test_inductor_gives_the_same_integers_and_sums(small):
    layer = small.join

    def step(x, group):
        layer.timestep.call.group = group
        integers, scale = layer.quantize_input(x, 1)
        output = layer(x)
        layer.timestep.call.group = None
        return integers, scale, output

    x, group = torch.randn(3, 16, 8, 8), torch.tensor([0, 2, 3])
    expected = step(x, group)
    integers, scale, output = torch.compile(step, fullgraph=True)(x, group)
    assert torch.equal(integers, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(output, expected[2])


@torch.no_grad()
@pytest.mark.slow
def test_inductor_compiles_a_whole_unet_for_any_batch(quantized_unet):
    """Inductor sums in another order: an activation on the edge of two integers may fall to the other side.

    After that an image departs by quantization noise, but few do; the median image must not.
    """
    compiled = torch.compile(quantized_unet, fullgraph=True, dynamic=True)
    for batch in (5, 1, 65):
        x, t = _images(batch), torch.arange(batch) * 15
        expected, output = quantized_unet(x, t).sample, compiled(x, t).sample
        assert output.dtype == torch.float32
        assert median(sqnr(*pair) for pair in zip(expected, output, strict=True)) > 60
        assert sqnr(expected, output) > 10


@torch.no_grad()
@pytest.mark.slow
def test_inductor_in_bfloat16_is_as_near_to_float32_as_eager_is(quantized_unet):
    x, t = _images(65), torch.arange(65) * 15
    expected = quantized_unet(x, t).sample
    quantized_unet.to(torch.bfloat16)
    arguments = x.to(torch.bfloat16), t
    eager = quantized_unet(*arguments).sample
    output = torch.compile(quantized_unet, fullgraph=True, dynamic=True)(*arguments).sample
    assert output.dtype == torch.bfloat16
    assert sqnr(expected, output.float()) > sqnr(expected, eager.float()) - 1


# torch.export


@pytest.fixture(scope="module")
def exported(_quantized_unet_prototype):
    """The quantized UNet exported with a dynamic batch and a timestep for each sample."""
    batch = torch.export.Dim("batch", min=1, max=63)
    arguments = (_images(3), torch.tensor([1, 2, 3]))
    return torch.export.export(_quantized_unet_prototype, arguments, dynamic_shapes=({0: batch}, {0: batch}))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 5, 63])
def test_the_exported_network_is_the_same(exported, quantized_unet, batch):
    x, t = _images(batch), torch.arange(batch) * 15
    assert torch.equal(exported.module()(x, t).sample, quantized_unet(x, t).sample)


def test_the_exported_graph_holds_the_operators_and_packed_weights(exported, quantized_unet):
    targets = [node.target for node in exported.graph.nodes]
    layers = [m for m in quantized_unet.modules() if isinstance(m, QuantizedLayer) and m.activation_bits is not None]
    found = targets.count(torch.ops.pqcad.conv2d.default) + targets.count(torch.ops.pqcad.linear.default)
    assert found == len(layers)
    assert exported.state_dict["mid_block.resnets.0.conv1.weight"].dtype == torch.uint8


@torch.no_grad()
def test_an_exported_network_survives_its_file(exported, quantized_unet):
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    x, t = _images(4), torch.tensor([0, 300, 600, 999])
    assert torch.equal(torch.export.load(buffer).module()(x, t).sample, quantized_unet(x, t).sample)


@torch.no_grad()
def test_a_scalar_timestep_and_any_batch_can_be_exported(small):
    x = _images(5)
    batch = torch.export.Dim("batch", min=1, max=1024)
    t = torch.tensor([5])
    graph = torch.export.export(small, (x, t), dynamic_shapes=({0: batch}, None)).module()
    for size in (1, 5, 65):
        assert torch.equal(graph(_images(size), torch.tensor([900])), small(_images(size), torch.tensor([900])))


def test_a_captured_network_runs_under_autocast(tiny_unet):
    """Learning on a GPU does; export's checks of types would not let it."""
    graph = capture(tiny_unet, SHAPE, {}).graph
    x_t, t = torch.randn(2, *SHAPE), torch.tensor([3, 500])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sqnr(tiny_unet(x_t, t).sample, graph(x_t, t, {})) > 20
