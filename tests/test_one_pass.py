"""Calibrating without learning: layers are looked at in the calls that walk, and nothing is computed twice."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import SHAPE, Small, cosine_scheduler, quick
from pipelines import dit
from test_guidance import Labelled, guidance
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pqcad_ao import PQCADConfig, quantize_
from pqcad_ao.denoiser import timestep_position, unguided
from pqcad_ao.diffusion import calibration
from pqcad_ao.diffusion.calibration import CalibrationSet, calibration_set
from pqcad_ao.diffusion.layer_inputs import LayerInputs
from pqcad_ao.graph.capture import capture
from pqcad_ao.graph.plan import resolve
from pqcad_ao.learn.ptq import calibrate, prepare
from pqcad_ao.nn.timestep import Timestep
from pqcad_ao.pipeline import PipelineWalk
from pqcad_ao.prepare.fold import fold

ALONE = quick(calibration_batch_size=1, calibration_timesteps="uniform")


class Calls(CalibrationSet):
    """Points in the very tensors that a walk called the network with: the last bits depend on their layout, too."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        assert size == 1
        for row in super().batches(1):
            yield next(call for call in self.calls if all(map(torch.equal, tree_leaves(call), tree_leaves(row))))


def in_two_passes(
    network: nn.Module, walk: Callable[[], CalibrationSet], conditioning: dict[str, Any]
) -> dict[str, Tensor]:
    """Every quantized layer's tensors, fitted to what the exported graph's layers are given where a walk has been."""
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    names = list(inspect.signature(network.forward).parameters)

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {name: value for name, value in (dict(zip(names, args, strict=False)) | kwargs).items()}
        x_t, timesteps = given.pop(names[0]), given.pop(names[timestep_position(network)])
        calls.append((x_t, timesteps, {name: v for name, v in given.items() if isinstance(v, Tensor)}))

    handle = network.register_forward_pre_hook(record, with_kwargs=True)
    points = walk()
    handle.remove()
    captured = capture(network, tuple(points.x_t.shape[1:]), unguided(conditioning))
    resolved = resolve(captured, network, ALONE)
    graph = prepare(captured, resolved, ALONE, 1000)
    points = Calls(points.x_t, points.timesteps, points.conditioning)
    points.calls = calls
    calibrate(graph, resolved, points, ALONE, progress=False)
    layers = fold(graph, network, resolved, Timestep(ALONE.timestep_groups, 1000))
    return {f"{fqn}.{name}": value for fqn, layer in layers.items() for name, value in layer.state_dict().items()}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def quantized(network: nn.Module, config: PQCADConfig, conditioning: Any = None, **options) -> dict[str, Tensor]:
    quantize_(
        network,
        config,
        scheduler=cosine_scheduler(),
        sample_shape=SHAPE,
        conditioning=conditioning,
        progress=False,
        **options,
    )
    return network.state_dict()


@pytest.mark.parametrize(
    ("network", "given", "dtype"),
    [
        pytest.param(Small, {}, torch.float32, marks=pytest.mark.slow),
        pytest.param(Small, {}, torch.bfloat16, marks=pytest.mark.slow),
        (Labelled, guidance(), torch.float32),
    ],
    ids=["plain", "bfloat16", "guided"],
)
def test_grids_are_those_of_two_passes(network, given, dtype, monkeypatch):
    """To the bit: in the same calls the exported graph's layers are given what the network's are."""
    network = network().to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(calibration._Draw, "last", lambda *_: 10)  # the network is called at the last points, too
        expected = in_two_passes(
            network, lambda: calibration_set(network, cosine_scheduler(), SHAPE, ALONE, given), given
        )
    check_equal(quantized(network, ALONE, given), expected)


@pytest.mark.slow
def test_grids_of_a_pipeline_are_those_of_two_passes():
    pipeline, call = dit(), {"class_labels": [3, 7, 500], "guidance_scale": 1.0}
    walk = PipelineWalk(pipeline, None, call, ALONE)
    expected = in_two_passes(pipeline.transformer, walk.points, walk.conditioning)
    quantize_(pipeline, ALONE, call=call, progress=False)
    check_equal(pipeline.transformer.state_dict(), expected)


def calls_of(network: nn.Module) -> list[int]:
    """A list that grows with each call of a network from now on."""
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_no_point_is_computed_twice():
    network, inputs = Small(), LayerInputs({"first": ([1], 1), "to_q": ([12], -1)})
    calls = calls_of(network)
    config = quick(calibration_points=200, calibration_timesteps="uniform")
    points = calibration_set(network, cosine_scheduler(), SHAPE, config, inputs=inputs)
    assert len(points) == 4 * 8
    assert len(calls) == 4  # of eight trajectories in one batch
    for values in inputs.values.values():
        assert values[:, :, 1].any(-1).all()
    assert torch.equal(inputs.values["first"][:, 0, 0, :64], points.x_t.flatten(1))  # so few are all kept


@pytest.mark.parametrize("how", [{"mode": "fixed"}, {"mode": "ptq"}], ids=str)
def test_a_walk_ends_at_its_last_point(how, monkeypatch):
    """All points lie at the first steps: the others are not walked, and x_t is what it is on a whole walk."""
    network = Small()
    config = quick(
        **how,
        learning_points=16,
        calibration_batch_size=63,
        calibration_steps=10,
        calibration_mean=0.9,
        calibration_std=0.05,
    )
    calls = calls_of(network)
    points = calibration_set(network, cosine_scheduler(), SHAPE, config)
    steps = (999 - points.timesteps.min()) // 100  # to the last point; there nobody wants the prediction
    assert 0 < len(calls) == steps < 5
    monkeypatch.setattr(calibration._Draw, "last", lambda *_: 10)
    assert torch.equal(calibration_set(network, cosine_scheduler(), SHAPE, config).x_t, points.x_t)


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, guidance()], ids=["plain", "guided"])
def test_a_killed_calibration_goes_on_to_the_same_bits(given, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SAVE_EVERY_S", -1.0)
    network, config = Labelled() if given else Small(), quick(calibration_batch_size=2)
    expected = quantized(copy.deepcopy(network), config, given)

    def stop(stage, done, total):
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(network, config, given, folder=tmp_path, callback=stop)
    for _ in range(2):
        check_equal(quantized(copy.deepcopy(network), config, given, folder=tmp_path), expected)
    for file in tmp_path.glob("c_qc-*"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        quantized(network, config, given, folder=tmp_path)


@pytest.mark.slow
def test_a_pipelines_killed_calibration_goes_on_to_the_same_bits(tmp_path):
    pipeline, config = dit(), quick(calibration_batch_size=4)
    options = {"call": {"class_labels": [3, 7, 500], "guidance_scale": 3.0}, "progress": False}
    fresh = copy.deepcopy(pipeline)
    quantize_(fresh, config, **options)

    def stop(stage, done, total):
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_(pipeline, config, **options, folder=tmp_path, callback=stop)
    assert len(list(tmp_path.glob("c_qc-*"))) == 1
    for _ in range(2):
        again = copy.deepcopy(pipeline)
        quantize_(again, config, **options, folder=tmp_path)
        check_equal(again.transformer.state_dict(), fresh.transformer.state_dict())


@pytest.mark.slow
def test_parts_that_are_compiled_are_looked_into(tiny_unet):
    expected = quantized(copy.deepcopy(tiny_unet), ALONE)
    tiny_unet.mid_block.compile(backend="eager")
    check_equal(quantized(tiny_unet, ALONE), expected)
