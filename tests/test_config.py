"""``PQCADConfig``: every value out of its range is an error that says what is allowed."""

import json
import math
from dataclasses import dataclass

import pytest
from torchao.core.config import AOBaseConfig

from pqcad_ao import CADConfig, PQCADConfig
from pqcad_ao.utils.fields import entries, later, repr_of

BAD = {
    "weight_bits": [None, 1, 9, 0, -4, 4.0, "4", True],
    "activation_bits": [1, 9, 4.0, "4", False],
    "mode": ["pq", "", None, "PTQ"],
    "timestep_groups": [0, -1, 2.0, "20", None, True],
    "calibration_points": [0, -5, 1.5, None],
    "calibration_steps": [0, 2.5, None],
    "calibration_timesteps": ["gauss", "", None],
    "calibration_mean": [-0.1, 1.1, 100, math.nan, math.inf, "0.4", None, True],
    "calibration_std": [0, -0.1, 11, math.nan, math.inf, "0.4", None],
    "calibration_batch_size": [0, 64, 1.0, None],
    "target_bits": [0, 1.9, 8.1, math.nan, "4.2", True],
    "iterations": [0, -1, 2.0, None, True],
    "batch_size": [0, 64, 1.0, None],
    "learning_points": [0, -1, 1.0, None],
    "learning_rate": [-0.1, 1.1, math.nan, "1e-4", None],
    "scale_learning_rate": [-0.1, 1.1, math.nan, None],
    "weight_ladder": [[4, 8], [8, 8], [9], [8, 1], ["8"], 8, None],
    "activation_ladder": [[4, 6], [6, 6], [16], [6.0], None],
    "weight_share": [0, 1, -0.5, math.nan, "0.5", None],
    "transitions": ["auto", "", None],
    "beta": [0, 1, -0.5, math.nan, None],
    "tau": [-0.1, math.nan, "0.02", None],
    "window": [0, 1.5, None],
    "patience": [0, 1.5, None],
    "seed": [-1, 1.0, "0", None, True, 2**63],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_an_error_that_names_it(name, value):
    with pytest.raises(ValueError, match=name):
        PQCADConfig(**{name: value})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (None, TypeError, "overrides is a NoneType; write"),
        ([("a", 1)], TypeError, "overrides is a list; write"),
        ({3: {"weight_bits": 8}}, TypeError, r"overrides\[3\]"),
        ({"a": 8}, TypeError, r"overrides\['a'\]=8: write {'weight_bits': 8"),
        ({"a": {}}, ValueError, "sets nothing: allowed are weight_bits and activation_bits"),
        ({"a": {"bits": 8}}, ValueError, r"sets \['bits'\]: allowed are weight_bits and activation_bits"),
        ({"a": {3: 8}}, ValueError, r"sets \['3'\]: allowed are"),
        ({"a": {"weight_bits": 9}}, ValueError, r"weight_bits=9 in overrides\['a'\]: allowed are 2 to 8, or None"),
        ({"a": {"activation_bits": 1}}, ValueError, r"activation_bits=1 in overrides\['a'\]: allowed are 2 to 8"),
        ({"a": {"activation_bits": "8"}}, ValueError, r"activation_bits='8' in overrides\['a'\]"),
    ],
)
def test_bad_overrides_are_errors(overrides, error, message):
    with pytest.raises(error, match=message):
        PQCADConfig(overrides=overrides)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_is_allowed(bits):
    config = PQCADConfig(weight_bits=bits, activation_bits=bits, overrides={"a": {"weight_bits": bits}})
    assert config.weight_bits == config.activation_bits == bits


def test_the_ends_of_every_range_are_allowed():
    PQCADConfig(
        activation_bits=None,
        timestep_groups=1,
        calibration_points=1,
        calibration_steps=1,
        calibration_timesteps="uniform",
        calibration_mean=0,
        calibration_std=10,
        calibration_batch_size=63,
        seed=2**63 - 1,
        overrides={"stem": {"weight_bits": None, "activation_bits": None}},
    )


def test_defaults_are_w4a6_without_sharing():
    first, second = PQCADConfig(), PQCADConfig()
    assert (first.weight_bits, first.activation_bits, first.mode, first.timestep_groups) == (4, 6, "progressive", 20)
    assert isinstance(first, AOBaseConfig)
    first.overrides["stem"] = {"weight_bits": 4}
    assert second.overrides == {}


# what a run's folder was named by before there was any later field
REPRS = {
    PQCADConfig: "PQCADConfig(weight_bits=4, activation_bits=6, mode='progressive', timestep_groups=20, overrides={}, "
    "target_bits=None, iterations=400, batch_size=32, learning_rate=0.0005, scale_learning_rate=0.001, "
    "weight_ladder=[5], activation_ladder=[6], weight_share=0.15, transitions='momentum', beta=0.9, tau=0.02, "
    "window=20, patience=5, learning_points=4096, calibration_points=512, calibration_steps=20, "
    "calibration_timesteps='uniform', calibration_mean=0.4, calibration_std=0.4, calibration_batch_size=32, seed=0)",
    CADConfig: "CADConfig(steps=20, halvings=1, direct=False, iterations=400, batch_size=32, learning_rate=0.0006, "
    "scale_learning_rate=0.001, reference_weight=1.0, reference_solver='unipc', reference_substeps=None, "
    "teacher_weight=0.0, space='v', points=1024, renoised=False, noise_injection=0.0, generation_batch_size=32, "
    "seed=0)",
}


@pytest.mark.parametrize("kind", REPRS)
def test_a_run_that_uses_no_later_field_is_named_as_it_was(kind):
    assert repr(kind()) == REPRS[kind]


def test_a_later_field_shows_where_it_is_used():
    @dataclass
    class Grown:
        first: int = 1
        added: str = later("none")
        __repr__ = repr_of

    assert repr(Grown()).endswith("Grown(first=1)")
    assert repr(Grown(added="some")).endswith("Grown(first=1, added='some')")
    assert json.dumps(entries(Grown())) == '{"first": 1}'
    assert entries(Grown(added="some")) == {"first": 1, "added": "some"}
