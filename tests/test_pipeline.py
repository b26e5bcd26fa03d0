"""A pipeline in place of its network: C_QC is what it hands to its network while it draws prompts or classes."""

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from networks import cosine_scheduler, quick, sqnr
from pipelines import CALLS, PROMPTS, TEXT, dit, vae
from safetensors.torch import load_file, save_file
from torch import Tensor

from pqcad_ao import load_quantized, plan, quantize_, save_quantized
from pqcad_ao.denoiser import predict
from pqcad_ao.diffusion.layer_inputs import LayerInputs
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.pipeline import PipelineWalk, network_of
from pqcad_ao.utils.tensor_files import read_tensors, write_tensors

CLASSES = [3, 7, 500]
GUIDED = {"class_labels": CLASSES, "guidance_scale": 3.0}
FLOWS = {"sd3": 1.0, "flux": 1 / 1000}  # of the text pipelines, with the factor of their time


@pytest.fixture
def pipeline() -> DiffusionPipeline:
    return dit()


def recorded(pipeline: DiffusionPipeline, **call) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x_t, timestep and class of every row that a pipeline hands to its network."""
    rows: list = []

    def look(network, args, kwargs):
        rows.extend(zip(args[0].clone(), kwargs["timestep"], kwargs["class_labels"], strict=True))

    handle = pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        pipeline(**call)
    finally:
        handle.remove()
    return rows


def test_points_are_the_inputs_of_the_guided_walk(pipeline):
    config = quick(mode="fixed", learning_points=24, calibration_batch_size=4)
    walk = PipelineWalk(pipeline, None, GUIDED, config)
    seen: list[tuple[str, int, int]] = []
    points = walk.points(callback=lambda *state: seen.append(state))
    assert len(points) == 24
    pictures = seen[-1][2]
    assert seen == [("trajectories", min(first + 2, pictures), pictures) for first in range(0, pictures, 2)]
    order = torch.randperm(3, generator=torch.Generator().manual_seed(config.seed)).tolist()
    rows = recorded(
        pipeline,
        class_labels=[CLASSES[order[number % 3]] for number in range(pictures)],
        guidance_scale=3.0,
        num_inference_steps=4,
        output_type="latent",
        generator=[torch.Generator().manual_seed((config.seed * 1_000_003 + n) % 2**63) for n in range(pictures)],
    )
    kept = set()
    for x_t, timestep, label in zip(points.x_t, points.timesteps, points.conditioning["class_labels"], strict=True):
        found = [
            number
            for number, (x, t, c) in enumerate(rows)
            if t == timestep and c == label and torch.allclose(x, x_t, rtol=1e-3, atol=1e-4)
        ]
        assert found
        kept.add((found[0], int(label)))
    labels = [label for _, label in kept]
    assert set(labels) <= {*CLASSES, 1000}
    assert 0.2 < labels.count(1000) / len(labels) < 0.8  # of both prompts, nearly equal parts


def test_a_pipeline_is_quantized_in_place_and_draws_the_same_pictures(pipeline, tmp_path):
    call = {"class_labels": [3], "num_inference_steps": 4, "output_type": "np"}
    expected = torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(5)).images)
    quantize_(pipeline, quick(weight_bits=8, activation_bits=8), call=GUIDED, progress=False)
    assert plan(pipeline.transformer).quantized
    assert quantized_state(pipeline.transformer).timestep.num_train_timesteps == 1000
    assert "disable" not in getattr(pipeline, "_progress_bar_config", {})
    images = torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(5)).images)
    assert sqnr(expected, images) > 30
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(torch.from_numpy(loaded(**call, generator=torch.Generator().manual_seed(5)).images), images)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_from_prompts_to_the_same_picture_in_a_fresh_process(name, tmp_path):
    """Quantized with prompts, saved, loaded where nothing was quantized: eager, compiled, and with a LoRA."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pipeline = TEXT[name](tmp_path / "tokens")
    full = copy.deepcopy(network_of(pipeline))
    options = {"weight_bits": 8, "activation_bits": 8}
    quantize_(pipeline, quick(**options), prompts=PROMPTS, call=CALLS[name], progress=False)
    network = network_of(pipeline)
    points = PipelineWalk(pipeline, PROMPTS, CALLS[name], quick()).points()
    with torch.no_grad():
        outputs = [predict(net, points.x_t, points.timesteps, points.conditioning) for net in (full, network)]
    assert sqnr(*outputs) > 25
    known = quantized_state(network).timestep
    assert (known.continuous, known.time_scale) == (name in FLOWS, FLOWS.get(name, 1.0))
    pipeline.save_pretrained(tmp_path / "model")
    pictures = {"eager": draw(pipeline, name)}
    peft.inject_adapter_in_model(lora(), network)
    for number, (key, value) in enumerate(network.named_parameters()):
        if "lora_" in key:
            value.data = 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    save_file(peft.get_peft_model_state_dict(network), tmp_path / "lora.safetensors")
    pictures["lora"] = draw(pipeline, name)
    assert not torch.equal(*pictures.values())
    script = """
import sys, torch
import peft, pqcad_ao
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from pqcad_ao.pipeline import network_of
from test_pipeline import draw, lora
name, folder = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder + "/model")
network = network_of(pipeline)
found = {"eager": draw(pipeline, name)}
network.compile(backend="pqcad")
found["compiled"] = draw(pipeline, name)
network._compiled_call_impl = None
peft.inject_adapter_in_model(lora(), network)
peft.set_peft_model_state_dict(network, load_file(folder + "/lora.safetensors"))
found["lora"] = draw(pipeline, name)
save_file(found, folder + "/found.safetensors")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", script, name, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = load_file(tmp_path / "found.safetensors")
    for key, picture in pictures.items():
        assert torch.equal(found[key], picture), key
    torch.testing.assert_close(found["compiled"], found["eager"], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_flow_with_a_fixed_shift_in_a_file_of_its_own(tmp_path):
    pytest.importorskip("transformers")
    pipeline = TEXT["flux"](tmp_path / "tokens")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected, fresh = draw(pipeline, "flux"), copy.deepcopy(pipeline.transformer)
    options = {"weight_bits": 8, "activation_bits": 8}
    quantize_(pipeline, quick(**options), prompts=PROMPTS, call=CALLS["flux"], progress=False)
    found = draw(pipeline, "flux")
    assert sqnr(expected, found) > 20
    save_quantized(pipeline.transformer, tmp_path / "transformer.safetensors")
    pipeline.transformer = load_quantized(fresh, tmp_path / "transformer.safetensors")
    assert torch.equal(draw(pipeline, "flux"), found)


SCHEDULERS = (DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler)
VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_scale": 1.0},
    {"prompt": PROMPTS[:3], "num_inference_steps": 5},
    {"negative_prompt": "snow", "num_inference_steps": 7},
    {"num_images_per_prompt": 3},
)


@pytest.mark.slow
def test_a_loaded_pipeline_draws_the_same_pictures_whatever_it_is_called_with(tmp_path):
    pytest.importorskip("transformers")
    pipeline = TEXT["sd"](tmp_path / "text")
    quantize_(pipeline, quick(), prompts=PROMPTS, progress=False)

    def pictures(drawing: Any, **call: Any) -> Tensor:
        options = {"prompt": PROMPTS[0], "num_inference_steps": 4, "height": 8, "width": 8, "output_type": "np", **call}
        return torch.from_numpy(drawing(**options, generator=torch.Generator().manual_seed(5)).images)

    def loaded(**options: Any) -> Any:
        return DiffusionPipeline.from_pretrained(tmp_path / "saved", **options)

    given = pipeline.scheduler.config
    for kind in SCHEDULERS:
        pipeline.scheduler = kind.from_config(given)
        pipeline.save_pretrained(tmp_path / "saved")
        again = loaded()
        for call in VARIATIONS:
            assert torch.equal(pictures(pipeline, **call), pictures(again, **call)), (kind, call)
    narrow = loaded().to(torch.bfloat16)
    expected = pictures(narrow)
    assert torch.equal(expected, pictures(loaded(torch_dtype=torch.bfloat16)))
    narrow.save_pretrained(tmp_path / "saved")
    assert torch.equal(expected, pictures(loaded(torch_dtype=torch.bfloat16)))


def test_another_scheduler_of_a_loaded_ones_configuration_has_other_options(tmp_path):
    """Of diffusers 0.42: its defaults go to another class once a configuration was saved, and not before."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.save_pretrained(tmp_path)
    again = DDIMScheduler.from_pretrained(tmp_path)
    spacings = [EulerDiscreteScheduler.from_config(each.config).config.timestep_spacing for each in (scheduler, again)]
    assert spacings == ["linspace", "leading"]


def lora() -> Any:
    """Of some of a UNet's or a transformer's layers."""
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "linear_1"])


def draw(pipeline: DiffusionPipeline, name: str) -> Tensor:
    """Two pictures of a text-to-image pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 4, "generator": generator, "output_type": "np", **CALLS[name]}
    return torch.from_numpy(pipeline(PROMPTS[:2], **options).images).contiguous()


def test_one_without_conditioning_needs_nothing(tiny_unet):
    pipeline = DDIMPipeline(tiny_unet, cosine_scheduler())
    points = PipelineWalk(pipeline, None, None, quick()).points()
    assert points.timesteps.dtype == torch.int64
    assert set(points.timesteps.tolist()) <= {249, 499, 749, 999}
    assert points.conditioning == {}


def test_a_walk_that_was_cut_short_goes_on(pipeline, tmp_path):
    config = quick(mode="fixed", learning_points=24, calibration_batch_size=4)
    whole = PipelineWalk(pipeline, None, GUIDED, config).points()

    def stop(stage, done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PipelineWalk(pipeline, None, GUIDED, config).points(folder=tmp_path, callback=stop)
    before = set(tmp_path.iterdir())
    assert before
    walk, calls = PipelineWalk(pipeline, None, GUIDED, config), []
    handle = pipeline.transformer.proj_out_2.register_forward_hook(lambda *_: calls.append(1))
    again = walk.points(folder=tmp_path)
    handle.remove()
    files = set(tmp_path.iterdir())
    assert len(calls) == 1 + 4 * (len(files) - len(before))  # to see the schedule; steps of each batch that was left
    for points in (again, PipelineWalk(pipeline, None, GUIDED, config).points(folder=tmp_path)):
        assert torch.equal(points.x_t, whole.x_t)
        assert torch.equal(points.timesteps, whole.timesteps)
        assert torch.equal(points.conditioning["class_labels"], whole.conditioning["class_labels"])
    other = PipelineWalk(pipeline, None, {**GUIDED, "guidance_scale": 2.0}, config).points(folder=tmp_path)
    assert not torch.equal(other.x_t, whole.x_t)
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is damaged .*: delete it, and it is made again"):
        PipelineWalk(pipeline, None, GUIDED, config).points(folder=tmp_path)


def _set(name, change):
    def damage(tensors, numbers):
        tensors[name] = change(tensors[name])

    return damage


LAYER = "transformer_blocks.0.attn1.to_q"
DAMAGES = {
    "NaN": _set("0", lambda x_t: x_t.fill_(float("nan"))),
    "another type": _set("0", lambda x_t: x_t.double()),
    "another shape": _set("0", lambda x_t: x_t[:, :2].contiguous()),
    "another row": _set("2", lambda labels: labels[1:].contiguous()),
    "timesteps that nobody visits": _set("1", lambda timesteps: timesteps + 1),
    "timesteps of other points": _set("1", lambda timesteps: timesteps.flip(0)),
    "another shape of a layer's inputs": _set(LAYER, lambda values: values[:, :, :1].contiguous()),
    "a tensor less": lambda tensors, numbers: tensors.pop("2"),
    "a layer less": lambda tensors, numbers: tensors.pop(LAYER),
    "a tensor more": lambda tensors, numbers: tensors.update({"3": tensors["2"].clone()}),
    "more points": lambda tensors, numbers: tensors.update({name: torch.cat([v] * 9) for name, v in tensors.items()}),
    "numbers of no points": lambda tensors, numbers: numbers.__setitem__(0, 10**6),
    "a number in words": lambda tensors, numbers: numbers.__setitem__(0, "abc"),
    "a number twice": lambda tensors, numbers: numbers.__setitem__(0, numbers[1]),
    "numbers in a list": lambda tensors, numbers: numbers.__setitem__(0, [0]),
    "a number less": lambda tensors, numbers: numbers.pop(),
}


def points_in(folder: Path) -> None:
    inputs = LayerInputs({LAYER: ([16], -1)})
    PipelineWalk(dit(), None, GUIDED, quick(calibration_batch_size=63)).points(folder=folder, inputs=inputs)


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """The file that keeps a walk's points, and one layer's inputs."""
    folder = tmp_path_factory.mktemp("walked")
    points_in(folder)
    return next(folder.iterdir())


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_points_that_were_not_walked_are_refused(damage, walked, tmp_path):
    """A file that is whole, by its checksum, and says what cannot be."""
    tensors, numbers = read_tensors(walked, "points")
    damage(tensors, numbers)
    write_tensors(tmp_path / walked.name, tensors, {"points": json.dumps(numbers)})
    with pytest.raises(ValueError, match=rf"{walked.name} is damaged \(.*\): delete it"):
        points_in(tmp_path)


def test_what_does_not_fit_is_said_before_any_work(pipeline, tiny_unet):
    def refused(message: str, model=pipeline, **options) -> None:
        with pytest.raises(ValueError, match=message):
            quantize_(model, quick(), progress=False, **options)

    refused(r"DiTPipeline takes no prompts: leave them out", prompts=["a house"])
    refused(r"DiTPipeline is not called with guidance: allowed in call are class_labels", call={"guidance": 3})
    refused(r"brings its own scheduler: leave it out", call=GUIDED, scheduler=cosine_scheduler())
    refused(r"brings its own sample_shape and conditioning", sample_shape=(1, 8, 8), conditioning={})
    refused(r"prompts are for pipelines, and a UNet2DModel is none", tiny_unet, prompts=["a house"])
    logs = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    other = DiTPipeline(pipeline.transformer, pipeline.vae, logs)
    refused(r"EulerDiscreteScheduler calls its network with timesteps from .* to -.*: networks are", other, call=GUIDED)
    pipeline.transformer = None
    refused(r"neither a unet nor a transformer \(its components: scheduler, transformer, vae\): hand over the network")
    with pytest.raises(ValueError, match=r"prompts is 'a house': write a list of strings"):
        PipelineWalk(DDIMPipeline(tiny_unet, cosine_scheduler()), "a house", None, quick())


def test_overflow_is_an_error(pipeline):
    walk = PipelineWalk(pipeline, None, GUIDED, quick())
    pipeline.vae, handle = vae(), pipeline.transformer.proj_out_2.register_forward_hook(lambda m, a, o: o / 0)
    with pytest.raises(FloatingPointError, match=r"the pipeline left the finite numbers before its step 2"):
        walk.points()
    handle.remove()


@pytest.mark.parametrize("name", TEXT)
def test_prompts_become_the_conditioning_of_the_network(name, tmp_path):
    """What is calibrated on is what the pipeline's own text encoders make of the prompts."""
    pytest.importorskip("transformers")
    pipeline = TEXT[name](tmp_path)
    with pytest.raises(ValueError, match=r"draws what prompts say and has none: pass prompts=\[\.\.\.\]"):
        quantize_(pipeline, quick(), progress=False)
    walk = PipelineWalk(pipeline, PROMPTS, {"guidance_scale": 4.0, **CALLS[name]}, quick())
    points = walk.points()
    assert walk.shape == ((16, 16) if name == "flux" else (4, 8, 8))
    rows = points.conditioning["encoder_hidden_states"]
    given = {"prompt": PROMPTS, "prompt_2": None, "prompt_3": None, "device": "cpu", "num_images_per_prompt": 1}
    given |= {"do_classifier_free_guidance": True, **CALLS[name]}
    taken = inspect.signature(pipeline.encode_prompt).parameters
    encoded = pipeline.encode_prompt(**{key: value for key, value in given.items() if key in taken})
    known = torch.cat([e for e in encoded if e is not None and e.dim() == 3])
    assert all(any(torch.allclose(row, one, atol=1e-5) for one in known) for row in rows)


def test_a_mask_is_conditioning(tmp_path):
    pytest.importorskip("transformers")
    pipeline = TEXT["sd"](tmp_path)
    torch.manual_seed(0)
    unet = type(pipeline.unet)(**{**pipeline.unet.config, "in_channels": 9}).eval()
    inpaint = StableDiffusionInpaintPipeline(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)
    picture = torch.zeros(1, 3, 8, 8)
    call = {"image": picture, "mask_image": picture[:, :1], "height": 8, "width": 8}
    walk = PipelineWalk(inpaint, PROMPTS, call, quick())
    assert walk.shape == (4, 8, 8)
    assert walk.conditioning["extra_channels"].shape[1:] == (5, 8, 8)
    assert walk.points().conditioning["extra_channels"].shape == (16, 5, 8, 8)


@pytest.mark.slow
def test_three_calls_for_a_picture(tmp_path):
    """A picture beside the sample, and guidance by it and by the text: prompt, picture alone, and neither."""
    pytest.importorskip("transformers")
    pipeline = TEXT["sd"](tmp_path)
    torch.manual_seed(0)
    unet = type(pipeline.unet)(**{**pipeline.unet.config, "in_channels": 8}).eval()
    parts = {**pipeline.components, "unet": unet, "image_encoder": None}
    editing = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    walk = PipelineWalk(editing, PROMPTS, {"image": picture}, quick())
    points = walk.points()
    assert (walk.shape, len(points)) == ((4, 8, 8), 16)
    assert points.conditioning["extra_channels"].shape == (16, 4, 8, 8)
    beside = points.conditioning["extra_channels"].flatten(1).any(1)
    assert beside.any()
    assert not beside.all()  # without the picture, it is zero

    def drawn() -> Tensor:
        options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        return torch.from_numpy(editing("two cats", image=picture, **options).images)

    expected = drawn()
    wide = {"weight_bits": 8, "activation_bits": 8}
    quantize_(editing, quick(**wide), prompts=PROMPTS, call={"image": picture}, progress=False)
    assert sqnr(expected, drawn()) > 20


def test_a_scheduler_that_calls_twice_at_a_timestep_gives_each_point_once(pipeline):
    pipeline.scheduler = PNDMScheduler(skip_prk_steps=True)
    config = quick(mode="fixed", learning_points=24, calibration_batch_size=4)
    points = PipelineWalk(pipeline, None, {**GUIDED, "class_labels": [3]}, config).points()
    assert len(points) == 24
    rows = torch.cat([points.x_t.flatten(1), points.conditioning["class_labels"][:, None]], 1)
    assert len(rows.unique(dim=0)) == 24
