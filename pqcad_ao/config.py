"""What a user may ask for: frozen-vocabulary dataclasses on torchao's ``AOBaseConfig``, checked when they are made."""

from dataclasses import dataclass, field
from typing import Any

from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig

ROLES = (
    "stem",
    "head",
    "time_embedding",
    "time_projection",
    "attention",
    "skip_concat",
    "shortcut",
    "resample",
    "body",
)
MODES = ("ptq",)
TIMESTEP_LAWS = ("normal", "uniform")
WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = range(2, 9)

# torchao rebuilds a config from JSON only from modules on its allow-list (torchao 0.18, core/config.py).
ALLOWED_AO_MODULES.add("pqcad_ao")


def _check_bits(name: str, value: Any, allowed: range, where: str = "") -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value not in allowed):
        raise ValueError(
            f"{name}={value!r}{where}: allowed are {allowed.start} to {allowed.stop - 1}, or None for floating point"
        )


@dataclass
class PQCADConfig(AOBaseConfig):
    """How a diffusion UNet becomes a W4A4 one.

    Args:
        weight_bits: bits of the weights, 2 to 8.
        activation_bits: bits of the activations, 2 to 8; None leaves them in floating point (weights only).
        mode: ``"ptq"`` calibrates fixed-bit weights and activations and learns nothing.
        timestep_groups: how many activation scales a layer has over the training timesteps; one for each group.
        overrides: bits for a role (one of ``ROLES``) or for layers by name (a glob over fully qualified names), such
            as ``{"attention": {"weight_bits": 8}, "up_blocks.*.conv1": {"activation_bits": 6}}``. ``None`` in place of
            the bits leaves that side in floating point; layer globs win over roles.
        calibration_points: noisy images x_t that calibrate the activations.
        calibration_steps: sampling steps of the trajectories from which they are taken.
        calibration_timesteps: ``"normal"``, timesteps drawn from N(mean·T, (std·T)²) truncated to [0, T), or
            ``"uniform"``.
        calibration_mean: mean of the normal law as a part of T, 0 to 1.
        calibration_std: standard deviation of the normal law as a part of T, above 0 and at most 10.
        calibration_batch_size: images per forward call while calibrating, at most 63 (diffusers' upsampling takes
            another branch from 64 on, which the captured graph does not hold).
        seed: seeds every random draw, 0 to 2^63 - 1.

    Raises:
        ValueError, TypeError: a value outside its range; the message says which and what is allowed.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    mode: str = "ptq"
    timestep_groups: int = 20
    overrides: dict[str, dict[str, int | None]] = field(default_factory=dict)
    calibration_points: int = 512
    calibration_steps: int = 20
    calibration_timesteps: str = "normal"
    calibration_mean: float = 0.4
    calibration_std: float = 0.4
    calibration_batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight_bits is None:
            raise ValueError(
                "weight_bits=None: weights are always quantized; to keep a layer in floating point use overrides"
            )
        _check_bits("weight_bits", self.weight_bits, WEIGHT_BITS)
        _check_bits("activation_bits", self.activation_bits, ACTIVATION_BITS)
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: allowed are {', '.join(map(repr, MODES))}")
        if self.calibration_timesteps not in TIMESTEP_LAWS:
            allowed = ", ".join(map(repr, TIMESTEP_LAWS))
            raise ValueError(f"calibration_timesteps={self.calibration_timesteps!r}: allowed are {allowed}")
        for name in ("timestep_groups", "calibration_points", "calibration_steps", "calibration_batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: allowed are whole numbers from 1")
        if self.calibration_batch_size > 63:
            raise ValueError(f"calibration_batch_size={self.calibration_batch_size}: allowed are 1 to 63")
        # within these bounds the truncated law keeps a fair part of what is drawn
        for name, most in (("calibration_mean", 1), ("calibration_std", 10)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ValueError(f"{name}={value!r}: allowed are numbers from 0 to {most}, as a part of T")
        if self.calibration_std == 0:
            raise ValueError("calibration_std=0 would put every calibration point on one timestep; 0.4 is the default")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: allowed are whole numbers from 0 to 2^63 - 1")
        if not isinstance(self.overrides, dict):
            raise TypeError(
                f"overrides is a {type(self.overrides).__name__}; write {{'role or glob': {{'weight_bits': 8}}}}"
            )
        for key, bits in self.overrides.items():
            if not isinstance(key, str) or not isinstance(bits, dict):
                raise TypeError(f"overrides[{key!r}]={bits!r}: write {{'weight_bits': 8, 'activation_bits': 8}} for it")
            unknown = set(bits) - {"weight_bits", "activation_bits"}
            if unknown or not bits:
                given = sorted(map(str, unknown)) or "nothing"
                raise ValueError(f"overrides[{key!r}] sets {given}: allowed are weight_bits and activation_bits")
            _check_bits("weight_bits", bits.get("weight_bits"), WEIGHT_BITS, f" in overrides[{key!r}]")
            _check_bits("activation_bits", bits.get("activation_bits"), ACTIVATION_BITS, f" in overrides[{key!r}]")
