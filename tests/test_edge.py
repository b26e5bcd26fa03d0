"""A quantized network as a .pte: what it computes, what the file says about itself, and what is refused."""

import gc
import json
import math
import random
import struct
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from networks import SHAPE, TINY_TEXT_UNET, TINY_UNET, Plain, Small, cosine_scheduler, quick, sqnr
from torch import nn
from torch.fx import Graph, Node

from pqcad_ao import quantize_
from pqcad_ao.denoiser import predict
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.edge import export, parity
from pqcad_ao.edge.export import PTEReport, export_fp32_pte, export_pte
from pqcad_ao.edge.lower import layers_of_calls, lower
from pqcad_ao.edge.parity import ParityError
from pqcad_ao.edge.sampler import PTESampler
from pqcad_ao.edge.seal import MARK, seal
from pqcad_ao.models import load_model
from pqcad_ao.nn.state import quantized_state
from pqcad_ao.passes.group_norm import decompose_group_norm
from pqcad_ao.utils import files
from pqcad_ao.utils.assets import asset_path
from pqcad_ao.utils.files import write_whole

pytest.importorskip("executorch.exir", reason="executorch is not installed: pip install pqcad_ao[edge]")

STEPS = 3


class Conditional(Plain):
    """Reads a text of two tokens, a scale inside a nested dictionary, and a class through a layer of weights alone."""

    def build(self):
        self.text, self.label = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, x, t, text, extra):
        t = torch.as_tensor(t, device=x.device).reshape(-1, 1).to(x.dtype) / 1000
        h = self.first(x) + (self.time(t) + self.label(extra["label"]))[:, :, None, None]
        return self.last(torch.nn.functional.silu(h * (1 + self.text(text).mean(1)[:, :, None, None])))


def conditioning(rows: int) -> dict:
    generator = torch.Generator().manual_seed(rows)
    text, label = torch.randn(rows, 2, 6, generator=generator), torch.randn(rows, 4, generator=generator)
    return {"text": text, "extra": {"label": label, "unused": None}}


def noise(count: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


def quantize(model: nn.Module, **options) -> nn.Module:
    quantize_(model, quick(), scheduler=cosine_scheduler(), progress=False, **options)
    return model


@pytest.fixture(scope="module")
def small() -> Small:
    return quantize(Small(), sample_shape=SHAPE)


def export_small(unet: nn.Module, path: Path, **options) -> PTEReport:
    defaults = {"scheduler": cosine_scheduler(), "num_inference_steps": STEPS, "progress": False}
    return export_pte(unet, path, **{**defaults, "sample_shape": SHAPE, **options})


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory) -> PTEReport:
    """Two images in one call."""
    return export_small(small, tmp_path_factory.mktemp("pte") / "small.pte", batch_size=2)


def test_program_predicts_what_the_network_predicts(small, exported):
    sampler = PTESampler(exported.path)
    assert sampler.timesteps.tolist() == [999, 666, 332]
    assert (sampler.sample_shape, sampler.batch_size, sampler.conditioning) == (SHAPE, 2, [])
    x_t = noise(2)
    for index, timestep in enumerate(sampler.timesteps):
        with torch.no_grad():
            assert sqnr(small(x_t, timestep.expand(2)), sampler.predict(x_t, index)) > 60


def test_a_step_of_the_program_is_a_step_of_the_scheduler(small, exported):
    sampler, scheduler = PTESampler(exported.path), cosine_scheduler()
    scheduler.set_timesteps(STEPS)
    x_t = noise(2)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(sampler.predict(x_t, index), timestep, x_t).prev_sample
        x_t = sampler.step(x_t, index)
        assert sqnr(expected, x_t) > 100


def test_methods_of_the_program(exported):
    program = PTESampler(exported.path)._program
    assert {"step", "unet", "image"} < program.method_names
    x_0 = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).repeat(22)[:128].view(2, 1, 8, 8)
    (image,) = program.load_method("image").execute([x_0])
    assert (image.shape, image.dtype) == ((2, 8, 8, 1), torch.uint8)
    assert image.flatten()[:6].tolist() == [0, 0, 128, 191, 255, 255]
    with pytest.raises(RuntimeError):  # a timestep between two of the schedule
        program.load_method("unet").execute([noise(2), torch.tensor([500])])
    with pytest.raises(RuntimeError):
        program.load_method("step").execute([noise(2), torch.tensor([STEPS])])


def test_bytes_of_a_file_by_kind(exported):
    """What lies between its segments, and by how many letters each of them is named, twice."""
    from executorch.exir._serialize._flatbuffer import _program_flatbuffer_to_json
    from executorch.exir._serialize._program import _get_extended_header

    program = exported.path.read_bytes()
    header = _get_extended_header(program)
    description = json.loads(_program_flatbuffer_to_json(program[: header.program_size]))
    sizes = [segment["size"] for segment in description["segments"]]
    assert len(sizes) > 20
    assert len(program) - header.program_size - sum(sizes) < 16 * (len(sizes) + 1)
    names = [data["key"] for data in description["named_data"]]
    assert {len(name) for name in names} == {16}
    weights = sum(layer.bytes for layer in exported.plan.layers)
    held = sum(sizes[data.get("segment_index", 0)] for data in description["named_data"])
    assert weights < held < weights + 1000, "scales and biases come on top"


@torch.no_grad()
def test_nothing_is_transposed_inside_of_a_norm(monkeypatch):
    from executorch.backends.xnnpack import xnnpack_preprocess

    graphs = []
    whole = xnnpack_preprocess.serialize_xnnpack_binary
    monkeypatch.setattr(
        xnnpack_preprocess, "serialize_xnnpack_binary", lambda graph, data: graphs.append(graph) or whole(graph, data)
    )
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    rewritten = decompose_group_norm(torch.export.export(network, (x,)).module(check_guards=False))
    lower(rewritten, (x,))
    (graph,) = graphs
    kinds = [type(node.xnode_union).__name__ for node in graph.xnodes]
    # of the image on its way in and out, and of weight, bias and the numbers that come from outside, ones
    assert kinds.count("XNNStaticTranspose") == 5


class OneNumberAtATime(nn.Module):
    """What XNNPACK multiplies by a number, and what it hands on as it came: a filter, to another operator."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(1.0, 4).view(3, 1, 1, 1))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        number = self.table.index_select(0, index)
        filtered = nn.functional.conv2d(x * number, number.view(1, 1, 1, 1))
        return filtered, number.view(1, 1, 1, 1), number.permute(1, 0, 2, 3)


@torch.no_grad()
def test_a_number_that_a_call_hands_on_is_not_its_input():
    from executorch.runtime import Runtime

    x, network = noise(1), OneNumberAtATime()
    program, _ = lower(network, (x, torch.tensor([0])))
    method = Runtime.get().load_program(program).load_method("forward")
    for index in range(3):
        found = method.execute([x, torch.tensor([index])])
        for value, expected in zip(found, network(x, torch.tensor([index])), strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.slow
def test_weights_are_in_the_file_once(exported, tmp_path):
    """Of a network whose weights are most of it."""

    class Wide(Plain):
        def build(self):
            self.wide = nn.Sequential(nn.Conv2d(8, 256, 3, padding=1), nn.Conv2d(256, 8, 3, padding=1))

        def middle(self, h):
            return h + self.wide(h)

    report = export_small(quantize(Wide(), sample_shape=SHAPE), tmp_path / "wide.pte", objective="size")
    weights = sum(layer.bytes for layer in report.plan.layers)
    assert weights > 18_000
    smaller = export_small(quantize(Plain(), sample_shape=SHAPE), tmp_path / "plain.pte").bytes
    assert report.bytes - smaller < 2.5 * weights, "scales, biases and the list of operators come on top"


@pytest.mark.slow
def test_images_of_several_channels(tmp_path):
    """In a sampler they lie in memory as no runtime reads them."""
    channels = 3

    class Coloured(Small):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)

    shape = (channels, 8, 8)
    unet = quantize(Coloured().eval(), sample_shape=shape)
    export_small(unet, tmp_path / "a.pte", sample_shape=shape)
    eager = sample(unet, cosine_scheduler(), noise(2, shape), STEPS)
    assert sqnr(eager, PTESampler(tmp_path / "a.pte").sample(noise(2, shape))) > 60


@pytest.mark.slow
def test_objectives(small, exported, tmp_path):
    size = export_small(small, tmp_path / "size.pte", batch_size=2, objective="size")
    assert {row.fqn for row in size.plan.layers if row.packed} == {
        *("down", "to_q", "to_k", "to_v", "to_out", "up", "join", "shortcut")
    }
    assert size.arithmetic["down"] == "W4A4: int8 × int4 products, float32 result, exact"
    assert min(size.sqnr_db.values()) > 60
    assert "objective 'size'" in str(size)
    assert sum(row.bytes for row in size.plan.layers) < sum(row.bytes for row in exported.plan.layers)


@pytest.mark.slow
def test_budgets(small, exported, tmp_path):
    with pytest.raises(ValueError, match=r"saves [\d,]+ bytes, [\d,]+ are asked for"):
        export_small(small, tmp_path / "b.pte", max_bytes=1000)
    assert not (tmp_path / "b.pte").exists()
    budget = export_small(small, tmp_path / "b.pte", batch_size=2, max_bytes=exported.bytes)
    assert budget.bytes <= exported.bytes


def test_sampler_fills_up_its_last_call(small, exported):
    eager = sample(small, cosine_scheduler(), noise(5), STEPS)
    images = PTESampler(exported.path).sample(noise(5))
    assert images.shape == (5, *SHAPE)
    assert sqnr(eager, images) > 60


def test_sampler_outlives_the_file_and_the_report(small, exported, tmp_path):
    path = tmp_path / "copy.pte"
    path.write_bytes(exported.path.read_bytes())
    sampler = PTESampler(path)
    path.unlink()
    first = sampler.predict(noise(2), 0)
    sampler.predict(noise(2) + 1, 1)
    assert torch.equal(first, sampler.predict(noise(2), 0)), "a later call does not write into an earlier prediction"


def test_report_says_what_was_written_and_measured(exported):
    assert exported.bytes == exported.path.stat().st_size
    assert exported.delegates >= 1
    assert exported.portable["aten::index_select"] == 2, "the row of the network's table, and that of the sampler's"
    assert list(exported.sqnr_db) == [999, 666, 332]
    assert min(exported.sqnr_db.values()) > 60
    assert exported.rounding_db is None
    assert exported.arithmetic["first"].startswith("W8A8: int8 × int8")
    assert exported.arithmetic["join"].startswith("W4A4: int8 × int8")
    assert exported.arithmetic["to_q"].startswith("W4A4: int8 × int4")
    assert exported.arithmetic["time"] == "W4: a table of 3 rows"
    assert len(exported.arithmetic) == 11
    text = str(exported)
    assert f"{exported.bytes:,} bytes" in text
    assert "2 aten::index_select" in text
    assert "dB at worst" in text


def test_file_holds_all_that_a_sampler_needs(exported):
    sampler = PTESampler(exported.path)
    values = {name: sampler._constant(name) for name in sampler._program.method_names - {"step", "unet", "image"}}
    scheduler = cosine_scheduler()
    assert json.loads(values["scheduler_config"])["beta_schedule"] == "squaredcos_cap_v2"
    assert (values["prediction_type"], values["clip_sample"]) == ("v_prediction", False)
    scheduler.set_timesteps(STEPS)
    x_t, v = noise(1), noise(1) / 2
    columns = (values[name] for name in ("alphas", "sigmas", "alphas_prev", "sigmas_prev"))
    for t, alpha, sigma, alpha_prev, sigma_prev in zip(scheduler.timesteps, *columns, strict=True):
        by_hand = alpha_prev * (alpha * x_t - sigma * v) + sigma_prev * (alpha * v + sigma * x_t)
        assert torch.allclose(by_hand, scheduler.step(v, t, x_t).prev_sample, atol=1e-5)


def test_conditioning_becomes_inputs_of_the_program(tmp_path):
    unet = quantize(Conditional(), sample_shape=SHAPE, conditioning=conditioning(3))
    report = export_small(unet, tmp_path / "c.pte", batch_size=2, conditioning=conditioning(3))
    assert report.arithmetic["label"] == "W4: float32 products of the dequantized weights", "it reads no timestep"
    sampler = PTESampler(tmp_path / "c.pte")
    assert sampler.conditioning == ["['text']", "['extra']['label']"]
    given = conditioning(3)
    eager = sample(unet, cosine_scheduler(), noise(3), STEPS, conditioning=given)
    assert sqnr(eager, sampler.sample(noise(3), given)) > 60
    with pytest.raises(ValueError, match=r"this program takes .*label"):
        sampler.predict(noise(2), 0, {"text": given["text"][:2]})


def test_baseline_is_the_network(tmp_path):
    from executorch.runtime import Runtime

    unet = Small().train()
    report = export_fp32_pte(unet, tmp_path / "fp32.pte", batch_size=2, sample_shape=SHAPE)
    assert unet.training
    assert (report.bytes, report.sqnr_db, report.arithmetic) == ((tmp_path / "fp32.pte").stat().st_size, {}, {})
    written = (tmp_path / "fp32.pte").read_bytes()  # the runtime does not keep them alive
    program = Runtime.get().load_program(written)
    (output,) = program.load_method("forward").execute([noise(2), torch.tensor([3, 500])])
    with torch.no_grad():
        assert sqnr(unet(noise(2), torch.tensor([3, 500])), output) > 100
    with pytest.raises(ValueError, match=r"not one that pqcad_ao\.export_pte wrote"):
        PTESampler(tmp_path / "fp32.pte")


def test_an_export_lets_go_of_its_graphs(tmp_path):
    """ExecuTorch keeps each node that it ever compared, and with it the graph: 9 MB of twelve layers."""
    held = []
    for _ in range(2):
        export_fp32_pte(Plain(), tmp_path / "fp32.pte", sample_shape=SHAPE)
        gc.collect()
        held.append(sum(type(value) is Node for value in gc.get_objects()))
    assert held[1] <= held[0]


def test_program_of_another_function_is_not_written(tmp_path, monkeypatch):
    class Middle(Plain):
        def build(self):
            self.mid = nn.Conv2d(8, 8, 3, padding=1)

        def middle(self, h):
            return self.mid(nn.functional.silu(h))

    unet = quantize(Middle(), sample_shape=SHAPE)
    path = tmp_path / "small.pte"
    path.write_text("older")
    rewrite = export._rewrite

    def wrong(*args):
        graph, arithmetic = rewrite(*args)
        graph.mid_weight_0 = graph.mid_weight_0.roll(1, 0)
        return graph, arithmetic

    unet.train()
    monkeypatch.setattr(export, "_rewrite", wrong)
    with pytest.raises(ParityError, match=r"at timestep \d+, .* 3 of 3 timesteps are below.* first at layer mid, "):
        export_small(unet, path)
    assert unet.training
    assert [file.name for file in tmp_path.iterdir()] == ["small.pte"]
    assert path.read_text() == "older"


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "small.pte"
    path.write_text("older")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"newer")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_bounds_give_way_to_what_rounding_alone_does(small, exported, monkeypatch):
    program, scheduler = exported.path.read_bytes(), cosine_scheduler()

    def check(*measured):
        results = iter(measured)
        monkeypatch.setattr(parity, "_sqnr_db", lambda *args: next(results))
        return parity.check_parity(program, small, [], scheduler, 2, 2, 25.0, lambda record: "here")

    # step by step: the median image, all images together
    assert check([(30.0, 12.0), (90.0, 90.0)]) == ({999: 12.0, 499: 90.0}, None)
    assert check([(15.0, 12.0), (90.0, 90.0)], [(20.0, 19.0), (80.0, 70.0)]) == ({999: 12.0, 499: 90.0}, 19.0)
    with pytest.raises(ParityError, match=r"15\.0 dB for the median image .* timestep 999, where 25 and 10 dB"):
        check([(15.0, 12.0), (90.0, 90.0)], [(120.0, 110.0), (80.0, 70.0)])
    with pytest.raises(ParityError, match=r"5\.0 dB for all .* timestep 499, where 25 and 10 dB"):
        check([(90.0, 90.0), (30.0, 5.0)], [(120.0, 110.0), (80.0, 70.0)])
    with pytest.raises(ParityError, match=r"-inf dB"):
        check([(90.0, 90.0), (-math.inf, -math.inf)], [(3.0, 3.0), (3.0, 3.0)])


def test_moving_the_last_bit_moves_little_and_is_undone(small):
    x_t, t = noise(2), torch.tensor([500, 500])
    with torch.no_grad():
        before = small(x_t, t)
        with parity._moved_in_the_last_bit(small):
            moved = small(x_t, t)
        assert sqnr(before, moved) > 20
        assert torch.equal(small(x_t, t), before)


@pytest.mark.parametrize("seed", range(20))
def test_calls_have_no_cycles(seed):
    chance = random.Random(seed)
    graph, nodes = Graph(), []
    for _ in range(40):
        inputs = chance.sample(nodes, min(len(nodes), chance.randrange(1, 4)))
        nodes.append(graph.call_function(max, tuple(inputs)) if inputs else graph.placeholder("x"))
    first = chance.randrange(1, 39)
    pair = nodes[first : first + 2]  # neighbours: no other operator lies between them
    chosen = [node for node in nodes[1:] if node not in pair and chance.random() < 0.7]
    layers = layers_of_calls(graph, [[node] for node in chosen] + [pair])
    assert layers[pair[0]] == layers[pair[1]], "a group stays together"
    # with one node for each call, the graph must still have an order
    merged = {node: ("call", layers[node]) if node in layers else ("alone", node) for node in nodes}
    edges = {(merged[s], merged[node]) for node in nodes for s in node.all_input_nodes} - {
        (m, m) for m in merged.values()
    }
    waiting = set(merged.values())
    while waiting:
        ready = {m for m in waiting if not any(after == m and before in waiting for before, after in edges)}
        assert ready, "the calls wait for each other"
        waiting -= ready


def test_nodes_that_cannot_share_a_call_are_named():
    graph = Graph()
    first = graph.call_function(abs, (graph.placeholder("x"),))
    last = graph.call_function(abs, (graph.call_function(abs, (first,)),))
    with pytest.raises(ValueError, match="must be in one call"):
        layers_of_calls(graph, [[first, last]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scheduler": EDMEulerScheduler()}, ValueError, "EDMEulerScheduler walks EDM's noise process"),
        (
            {"scheduler": FlowMatchEulerDiscreteScheduler()},
            ValueError,
            "quantized for a DDPM noise process, and FlowMatchEulerDiscreteScheduler walks a rectified flow",
        ),
        ({"scheduler": DDIMScheduler(num_train_timesteps=500)}, ValueError, "500 training timesteps.* 1000"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0"),
        ({"num_inference_steps": 1001}, ValueError, "from 1 to 1000, the scheduler's training timesteps"),
        ({"batch_size": 1.5}, ValueError, r"batch_size=1\.5"),
        ({"batch_size": [4, 4]}, ValueError, r"batch_size=\[4, 4\]: .* without repetition"),
        (
            {"sample_shape": (16, 4)},
            ValueError,
            r"\(16, 4\): a \.pte draws images, .*; packed tokens take torch\.compile",
        ),
        ({"trajectories": 0}, ValueError, "trajectories=0"),
        ({"objective": "fast"}, ValueError, r"objective='fast': allowed are 'speed', 'size'"),
        ({"max_bytes": 0.5}, ValueError, r"max_bytes=0\.5"),
        ({"sample_shape": None}, ValueError, "pass sample_shape"),
        ({"conditioning": {"a": torch.zeros(2), "b": torch.zeros(3)}}, ValueError, r"\[2, 3\] rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_before_the_work(small, tmp_path, monkeypatch, change, error, message):
    monkeypatch.setattr(export, "record", lambda *args: pytest.fail("the work began"))
    with pytest.raises(error, match=message):
        export_small(small, tmp_path / "a.pte", **change)
    assert list(tmp_path.iterdir()) == []


def test_a_distilled_network_is_exported_for_its_own_schedule(tmp_path):
    student = quantize(Plain(), sample_shape=SHAPE)
    quantized_state(student).timestep.schedule = [999, 499]
    with pytest.raises(ValueError, match=r"distilled for 2 steps, timesteps 999, 499, .* 999, 666, 332 in 3"):
        export_small(student, tmp_path / "a.pte", num_inference_steps=3)
    assert list(tmp_path.iterdir()) == []
    report = export_small(student, tmp_path / "a.pte", num_inference_steps=None)
    assert PTESampler(report.path).timesteps.tolist() == [999, 499]


def test_networks_that_cannot_be_exported_are_named(small, tmp_path):
    with pytest.raises(ValueError, match=r"not quantized by pqcad_ao: call quantize_ first, or export_fp32_pte"):
        export_small(Small(), tmp_path / "a.pte")
    foreign = Small()
    foreign.is_quantized = True
    with pytest.raises(ValueError, match="by something else"):
        export_small(foreign, tmp_path / "a.pte")
    with pytest.raises(ValueError, match=r"bfloat16 on cpu.*unet\.to\('cpu', torch\.float32\)"):
        export_fp32_pte(Small().to(torch.bfloat16), tmp_path / "a.pte", sample_shape=SHAPE)
    with pytest.raises(ValueError, match=r"write export_pte"):
        export_fp32_pte(small, tmp_path / "a.pte", sample_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_named_before_the_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "record", lambda *args: pytest.fail("the work began"))
    with pytest.raises(FileNotFoundError, match="cannot write into the folder"):
        export_small(small, tmp_path / "missing" / "a.pte")
    with pytest.raises(IsADirectoryError, match="write the name of a file"):
        export_small(small, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write into the folder"):
        export_small(small, tmp_path / "file" / "a.pte")


def test_files_that_cannot_be_sampled_from_are_named(exported, tmp_path):
    whole = exported.path.read_bytes()
    for name, content in {"empty": b"", "text": b"no program at all", "half": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is (no ExecuTorch program, or is )?damaged"):
            PTESampler(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        PTESampler(tmp_path / "missing")


@pytest.mark.parametrize("at", [0.01, 0.2, 0.5, 0.8, 0.999])
def test_a_flipped_bit_is_said(at, exported, tmp_path):
    content = bytearray(exported.path.read_bytes())
    content[int(at * len(content))] ^= 1
    (tmp_path / "a.pte").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pte is damaged: what it holds is not what was written, by its checksum"):
        PTESampler(tmp_path / "a.pte")


def test_a_name_that_is_no_text_is_said(exported, tmp_path):
    content = exported.path.read_bytes().replace(b"batch_size", b"\x90atch_size")
    (tmp_path / "a.pte").write_bytes(seal(content))
    with pytest.raises(ValueError, match=r"a\.pte is no ExecuTorch program, or is damaged"):
        PTESampler(tmp_path / "a.pte")


@pytest.mark.parametrize("at", ["root", "fields"])
def test_a_program_that_points_outside_of_itself_is_refused(at, exported, tmp_path):
    # a stranger makes the checksum as well: the runtime's verifier is what stands between the offset and a crash
    content = bytearray(exported.path.read_bytes())
    (root,) = struct.unpack_from("<I", content)  # where a flatbuffer's root table begins, which begins with its fields'
    struct.pack_into("<I", content, {"root": 0, "fields": root}[at], 0x7FFFFFF0)
    (tmp_path / "a.pte").write_bytes(seal(bytes(content)))
    with pytest.raises(ValueError, match=r"a\.pte is no ExecuTorch program, or is damaged"):
        PTESampler(tmp_path / "a.pte")


def test_a_checksum_that_is_damaged_itself_is_said(exported, tmp_path):
    for mark in (b"pqcad-sha257:", MARK):
        whole = exported.path.read_bytes()
        at = whole.index(MARK)
        content = whole[:at] + mark + whole[at + len(MARK) :][:3] + b"z" + whole[at + len(MARK) + 4 :]
        (tmp_path / "a.pte").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pte is damaged: .* checksum"):
            PTESampler(tmp_path / "a.pte")


@pytest.mark.parametrize(
    ("x_t", "index", "message"),
    [
        (torch.zeros(1, *SHAPE), 0, r"shape \(1, 1, 8, 8\): this program was exported for \(2, 1, 8, 8\)"),
        (torch.zeros(2, *SHAPE), 3, "steps 0 to 2"),
        (torch.zeros(2, *SHAPE), -1, "steps 0 to 2"),
    ],
)
def test_bad_inputs_of_a_program_are_named(exported, x_t, index, message):
    sampler = PTESampler(exported.path)
    with pytest.raises(ValueError, match=message):
        sampler.predict(x_t, index)
    with pytest.raises(ValueError, match=r"expected \(N, 1, 8, 8\)"):
        sampler.sample(torch.zeros(2, 3, 8, 8))


def test_without_executorch_the_error_says_what_to_install(small, exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    for call in (
        lambda: export_small(small, tmp_path / "a.pte"),
        lambda: export_fp32_pte(Small(), tmp_path / "a.pte"),
        lambda: PTESampler(exported.path),
    ):
        with pytest.raises(ImportError, match=r"pip install pqcad_ao\[edge\]"):
            call()


@pytest.mark.slow
def test_diffusers_unet(quantized_unet, tmp_path):
    report = export_small(quantized_unet, tmp_path / "unet.pte", sample_shape=None)
    assert set(report.portable) <= {"aten::index_select", "dim_order_ops::_to_dim_order_copy"}
    assert report.delegates == 1
    eager = sample(quantized_unet, cosine_scheduler(), noise(3), STEPS)
    assert sqnr(eager, PTESampler(tmp_path / "unet.pte").sample(noise(3))) > 20


@pytest.mark.slow
def test_conditional_diffusers_unet(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**TINY_TEXT_UNET).eval()
    text = {"encoder_hidden_states": torch.randn(4, 5, 12)}
    quantize(unet, conditioning=text)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        export_small(unet, tmp_path / "unet.pte", sample_shape=None)
    report = export_small(unet, tmp_path / "unet.pte", sample_shape=None, conditioning=text)
    assert (report.delegates, set(report.portable)) == (1, {"aten::index_select"})
    eager = sample(unet, cosine_scheduler(), noise(2), STEPS, conditioning={k: v[:2] for k, v in text.items()})
    images = PTESampler(tmp_path / "unet.pte").sample(noise(2), {k: v[:2] for k, v in text.items()})
    assert sqnr(eager, images) > 20


class Tokens(Plain):
    """What conditional networks have: a chunk in the time branch, LayerNorm, cross-attention, gated linears."""

    def build(self):
        self.both, self.norm = nn.Linear(1, 16), nn.GroupNorm(2, 8)
        self.block = BasicTransformerBlock(8, 2, 4, cross_attention_dim=6)

    def forward(self, x, t, text):
        t = torch.as_tensor(t, device=x.device).reshape(-1, 1).to(x.dtype) / 1000
        scale, shift = self.both(t)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        tokens = self.block(h.flatten(2).transpose(1, 2), encoder_hidden_states=text)
        return self.last(tokens.transpose(1, 2).reshape(h.shape))


@pytest.mark.slow
def test_guidance_inside_of_a_step(tmp_path):
    text = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    given = {"text": text, "guidance_scale": 3.0, "negative": {"text": torch.zeros_like(text)}}
    torch.manual_seed(0)
    unet = quantize(Tokens(), sample_shape=SHAPE, conditioning=given)
    report = export_small(unet, tmp_path / "guided.pte", conditioning=given, batch_size=2)
    assert report.delegates == 1
    assert set(report.portable) == {"aten::index_select", "aten::repeat"}
    sampler = PTESampler(report.path)
    assert sampler.conditioning == ["['text']", "['negative']['text']"]
    eager = sample(unet, cosine_scheduler(), noise(3), STEPS, conditioning=given)
    assert sqnr(eager, sampler.sample(noise(3), given)) > 60


@pytest.mark.slow
def test_a_flow(tmp_path):
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unet = Small()
    quantize_(unet, quick(), scheduler=flow, sample_shape=SHAPE, progress=False)
    report = export_small(unet, tmp_path / "flow.pte", scheduler=flow, batch_size=2)
    assert report.delegates == 1
    sampler = PTESampler(report.path)
    assert sampler.timesteps.tolist() == list(report.sqnr_db) == pytest.approx([1000, 6000 / 7, 600])
    assert sampler.scheduler.config.shift == 3
    assert sqnr(sample(unet, flow, noise(3), STEPS), sampler.sample(noise(3))) > 60
    with pytest.raises(ValueError, match=r"quantized for a rectified flow, and DDIMScheduler walks a DDPM noise"):
        export_small(unet, tmp_path / "flow.pte")


@pytest.mark.slow
def test_norms_that_time_scales_and_shifts(tmp_path):
    torch.manual_seed(0)
    unet = quantize(UNet2DModel(**TINY_UNET, resnet_time_scale_shift="scale_shift").eval())
    report = export_small(unet, tmp_path / "unet.pte", sample_shape=None)
    assert (report.delegates, set(report.portable)) == (1, {"aten::index_select"})
    eager = sample(unet, cosine_scheduler(), noise(2), STEPS)
    assert sqnr(eager, PTESampler(report.path).sample(noise(2))) > 20


@pytest.mark.slow
def test_embedded_teacher(tmp_path):
    if not (asset_path("fashion_mnist", "unet")).is_dir():
        pytest.skip("the teacher is not in pqcad_ao/assets yet")
    unet, scheduler = load_model("demo")
    fp32 = export_fp32_pte(unet, tmp_path / "fp32.pte")
    quantize_(unet, quick(), scheduler=scheduler, progress=False)
    report = export_small(unet, tmp_path / "unet.pte", scheduler=scheduler, num_inference_steps=5, sample_shape=None)
    assert report.bytes < 0.35 * fp32.bytes
    assert report.delegates == 1
    exact = [text for text in report.arithmetic.values() if "exact" in text or "table" in text]
    assert len(exact) == len(report.arithmetic), "nothing runs in float32"
    sampler = PTESampler(tmp_path / "unet.pte")
    x_t = noise(1, sampler.sample_shape)
    with torch.no_grad():
        typical = sorted(
            sqnr(predict(unet, x_t, t, {}), sampler.predict(x_t, i)) for i, t in enumerate(sampler.timesteps)
        )
    assert typical[2] > 40
