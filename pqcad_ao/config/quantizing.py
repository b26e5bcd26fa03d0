"""How a network is quantized: ``PQCADConfig``, and what a file says of it."""

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pqcad_ao.config.shared import MAX_BATCH, AOBaseConfig, check_selected, check_weights
from pqcad_ao.utils.checks import check_count, check_fields, check_numbers, check_seed, check_word, is_number, is_whole
from pqcad_ao.utils.fields import later, repr_of

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
Mode = Literal["ptq", "fixed", "progressive"]
TransitionLaw = Literal["momentum", "schedule"]
TimestepLaw = Literal["normal", "uniform"]
SampleWeighting = Literal["uniform", "groups", "aligned", "reach"]
Selection = Literal["first", "clusters"]
WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = range(2, 9)
LEARNING = (  # idle without learning
    *("trainable", "sensitive_share", "local_weight", "global_weight", "time_rounding", "sample_weights"),
    *("weight_rate", "weight_temperature", "weight_pairs", "weight_validation", "weight_tasks", "weight_every"),
    "shard",
)


@dataclass
class PQCADConfig(AOBaseConfig):
    """How a diffusion UNet becomes one of four-bit weights and six-bit activations, W4A6; W4A4 is one argument away.

    Args:
        weight_bits: bits of the weights, 2 to 8.
        activation_bits: bits of the activations, 2 to 8; None leaves them in floating point (weights only). Six take
            the same kernels and the same file as four, and make better pictures.
        mode: ``"progressive"`` learns in two stages, weights and then activations, each down its ladder of bits, where
            that has widths above the final one;
            ``"fixed"`` learns as long at the final bits; ``"ptq"`` calibrates at the final bits and learns nothing.
        timestep_groups: how many activation scales a layer has over the training timesteps; one for each group.
        overrides: bits for a role (one of ``ROLES``) or for layers by name (a glob over fully qualified names), such
            as ``{"attention": {"weight_bits": 8}, "up_blocks.*.conv1": {"activation_bits": 4}}``. ``None`` in place of
            the bits leaves that side in floating point; layer globs win over roles.
        target_bits: the average width that the quantized layers' weights may reach by giving the most sensitive layers
            more bits; None gives none.
        iterations: training updates, both stages together.
        batch_size: of a training update, at most 63.
        learning_rate: of weights, biases and norms (Adam), after a short rise falling linearly to zero; halved for each
            bit that the current width is above the final one.
        scale_learning_rate: of the scales, as a part of their own size, falling alike.
        weight_ladder: bits of the weights to step through before the final ones, falling; those not above the final
            ones are left out.
        activation_ladder: the same of the activations.
        weight_share: part of the updates that the first stage, weights alone, takes.
        transitions: ``"momentum"``, or ``"schedule"``, where every width takes an equal share and gives way at once.
        beta: momentum of the loss, by which a width gives way to the next, and of the blend between the two.
        tau: progress below which a width counts as settled, as a part of the loss.
        window: updates over which progress is measured.
        patience: how many updates in a row must show it.
        learning_points: noisy images x_t to learn from, and for ``"clusters"`` to choose from.
        calibration_points: as many of them calibrate the activations, the first eight of each timestep group; without
            learning, no others are walked to.
        calibration_steps: sampling steps of the trajectories from which they are taken.
        calibration_timesteps: ``"normal"``, timesteps drawn from N(mean·T, (std·T)²) truncated to [0, T), or
            ``"uniform"``.
        calibration_mean: mean of the normal law as a part of T, 0 to 1.
        calibration_std: standard deviation of the normal law as a part of T, 0.001 to 10.
        calibration_batch_size: images per forward call while calibrating, at most 63.
        seed: seeds every random draw, 0 to 2^63 - 1.
        trainable: which layers learn weights, biases and weight scales; None: all, and everything else of the network.
            Roles, globs over names, ``"time"`` (both of its roles), ``"sensitive"`` and ``"norms"``, those before the
            layers that learn. Activation scales learn in all layers.
        sensitive_share: part of the quantized layers that ``"sensitive"`` names, most sensitive for each parameter.
        local_weight: of the local loss: how far each learning layer's output is from full precision's, over its power.
        global_weight: of the loss of the network's prediction.
        time_rounding: first round the time projections' weights for the timesteps that are walked, and let their biases
            take the mean error, in closed form; with ``mode="fixed"``.
        sample_weights: how much each point counts: ``"uniform"``; ``"aligned"``, a learned weight for each point, or
            ``"groups"``, for each range of timesteps, which rise where their gradients agree with the held-out ones of
            all ranges; ``"reach"``, by the squared distance that an error at that step carries.
        weight_rate: at which the logits of the learned weights move, 0 to 1000.
        weight_temperature: by which the logits are divided, above 0.
        weight_pairs: part of their alignment that asks to help both ranges of every pair, 0 to 1.
        weight_validation: part of the learning points that is held out for it, between 0 and 1.
        weight_tasks: ranges of timesteps, from 2.
        weight_every: updates between two looks at the held-out points.
        calibration_selection: which points of a timestep group calibrate the activations: ``"first"``, or
            ``"clusters"``, as many, one of each cluster of all the group's points (Q&C's TAP); walked to for that are
            all ``learning_points``, in ``mode="ptq"`` as well.
        cluster_alpha: how much the pictures count for a cluster, from 0 to 1; the rest are their timesteps.
        shard: of several processes each keeps a part of the weights that learn, of their gradients and of Adam's
            moments, and has a layer's whole weight while it computes: for networks whose learning no device holds.

    Raises:
        ValueError, TypeError: a value outside its range; the message says which and what is allowed.

    Example:
        >>> config = PQCADConfig(activation_bits=4, overrides={"attention": {"weight_bits": 8}})
        >>> config.weight_bits, config.mode
        (4, 'progressive')
        >>> PQCADConfig(weight_bits=9)
        Traceback (most recent call last):
            ...
        ValueError: weight_bits=9: allowed are 2 to 8, or None for floating point
    """

    quant_method: ClassVar[str] = "pqcad"  # as diffusers asks a quantization_config
    version: ClassVar[int] = 1  # of the JSON that torchao writes

    weight_bits: int = 4
    activation_bits: int | None = 6
    mode: Mode = "progressive"
    timestep_groups: int = 20
    overrides: dict[str, dict[str, int | None]] = field(default_factory=dict)
    target_bits: float | None = None
    iterations: int = 400
    batch_size: int = 32
    learning_rate: float = 5e-4
    scale_learning_rate: float = 1e-3
    weight_ladder: list[int] = field(default_factory=lambda: [5])
    activation_ladder: list[int] = field(default_factory=lambda: [6])
    weight_share: float = 0.15
    transitions: TransitionLaw = "momentum"
    beta: float = 0.9
    tau: float = 0.02
    window: int = 20
    patience: int = 5
    learning_points: int = 4096
    calibration_points: int = 512
    calibration_steps: int = 20
    calibration_timesteps: TimestepLaw = "uniform"
    calibration_mean: float = 0.4
    calibration_std: float = 0.4
    calibration_batch_size: int = 32
    seed: int = 0
    trainable: list[str] | None = later(None)
    sensitive_share: float = later(0.1)
    local_weight: float = later(0.0)
    global_weight: float = later(1.0)
    time_rounding: bool = later(False)
    sample_weights: SampleWeighting = later("uniform")
    weight_rate: float = later(0.5)
    weight_temperature: float = later(1.0)
    weight_pairs: float = later(0.5)
    weight_validation: float = later(0.05)
    weight_tasks: int = later(5)
    weight_every: int = later(20)
    calibration_selection: Selection = later("first")
    cluster_alpha: float = later(0.5)
    shard: bool = later(False)

    def __post_init__(self) -> None:
        if self.weight_bits is None:
            raise ValueError(
                "weight_bits=None: weights are always quantized; to keep a layer in floating point use overrides"
            )
        _check_bits("weight_bits", self.weight_bits, WEIGHT_BITS)
        _check_bits("activation_bits", self.activation_bits, ACTIVATION_BITS)
        check_word("mode", self.mode, Mode)
        check_word("transitions", self.transitions, TransitionLaw)
        check_word("calibration_timesteps", self.calibration_timesteps, TimestepLaw)
        check_word("calibration_selection", self.calibration_selection, Selection)
        if self.target_bits is not None and not is_number(self.target_bits, 2, 8):
            raise ValueError(f"target_bits={self.target_bits!r}: allowed are numbers from 2 to 8, or None")
        _check_ladder("weight_ladder", self.weight_ladder, WEIGHT_BITS)
        _check_ladder("activation_ladder", self.activation_ladder, ACTIVATION_BITS)
        check_numbers(self, ("learning_rate", "scale_learning_rate", "tau", "cluster_alpha"))
        for name in ("weight_share", "beta"):
            if not is_number(getattr(self, name), 0, 1) or getattr(self, name) in (0, 1):
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are numbers between 0 and 1")
        check_fields(self, ("timestep_groups", "calibration_points", "calibration_steps"))
        check_fields(self, ("iterations", "window", "patience", "learning_points"))
        check_fields(self, ("batch_size", "calibration_batch_size"), most=MAX_BATCH)
        # within these bounds the truncated law keeps a fair part of what is drawn
        for name, most in (("calibration_mean", 1), ("calibration_std", 10)):
            value = getattr(self, name)
            if not is_number(value, 0, most):
                raise ValueError(f"{name}={value!r}: allowed are numbers from 0 to {most}, as a part of T")
        if self.calibration_std < 0.001:
            raise ValueError(
                f"calibration_std={self.calibration_std!r} would put every calibration point on one timestep: "
                "allowed are numbers from 0.001; 0.4 is the default"
            )
        check_seed(self.seed)
        self._check_selection()
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

    __repr__ = repr_of

    def _check_selection(self) -> None:
        """Raises ValueError, TypeError: options of what learns, and by which loss, that make no sense."""
        check_selected(self.trainable, self.sensitive_share)
        check_weights(self, SampleWeighting)
        check_count("weight_tasks", self.weight_tasks, 2)
        check_count("weight_every", self.weight_every)
        if not is_number(self.weight_validation, 0, 1) or self.weight_validation in (0, 1):
            raise ValueError(f"weight_validation={self.weight_validation!r}: allowed are numbers between 0 and 1")
        check_numbers(self, ("local_weight", "global_weight"), most=1000)
        if self.local_weight + self.global_weight == 0:
            raise ValueError("local_weight=0 and global_weight=0 leave nothing to learn from")
        for name in ("time_rounding", "shard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: write True or False")
        if self.time_rounding and self.mode == "progressive":
            raise ValueError(
                "time_rounding=True with mode='progressive': every width of a ladder rounds anew; write mode='fixed'"
            )
        if not self.learns:
            idle = [f.name for f in fields(self) if f.name in LEARNING and getattr(self, f.name) != f.default]
            if idle:
                raise ValueError(f"{' and '.join(idle)}: mode='ptq' learns nothing; write 'fixed' or 'progressive'")

    @property
    def learns(self) -> bool:
        return self.mode != "ptq"

    @property
    def clusters(self) -> bool:
        return self.calibration_selection == "clusters"

    @classmethod
    def fast(cls, **options: Any) -> "PQCADConfig":
        """Fewer updates and widths: less than 90 seconds for a network of a million parameters on two cores."""
        length: dict[str, Any] = {"iterations": 50, "learning_points": 512}
        ladders = {"weight_ladder": [6], "activation_ladder": [6], "weight_share": 0.25}
        return cls(**{**length, **ladders, "beta": 0.5, "window": 3, "patience": 1, **options})

    @classmethod
    def quest(cls, **options: Any) -> "PQCADConfig":
        """Selective finetuning after QuEST (arXiv 2402.03666): time projections, attention and the most sensitive
        layers learn, under a local loss each and the global one. The measure of sensitivity, the closed form of the
        time projections and the rates are ours; activation scales are one for each timestep group, not each channel."""
        trainable = {"trainable": ["time", "attention", "sensitive"], "sensitive_share": 0.4}
        return cls(**{"mode": "fixed", **trainable, "local_weight": 1.0, "time_rounding": True, **options})

    @classmethod
    def paper(cls, **options: Any) -> "PQCADConfig":
        """The parts that are published of PQCAD-DM (arXiv 2506.16776): two stages moved by momentum, and C_QC with
        normally distributed timesteps. Its numbers are not: ladders from eight bits down, their updates and rates are
        ours."""
        length: dict[str, Any] = {"iterations": 800, "learning_rate": 2e-4, "weight_share": 0.4}
        ladders = {"weight_ladder": [8, 6, 5], "activation_ladder": [8, 6]}
        published = {"activation_bits": 4, "calibration_timesteps": "normal", "transitions": "momentum"}
        return cls(**{**published, **length, **ladders, **options})


def config_from_json(values: Any) -> "PQCADConfig":
    """The configuration that torchao's ``config_to_dict`` wrote; no name in ``values`` is looked up or called.

    Raises:
        ValueError, TypeError: it is of another class or version, or holds what a configuration does not.
    """
    kind = values.get("_type") if isinstance(values, dict) else type(values).__name__
    if kind != PQCADConfig.__name__:
        raise ValueError(f"its config is a {kind}, not a PQCADConfig")
    if values.keys() != {"_type", "_version", "_data"} or values["_version"] != PQCADConfig.version:
        raise ValueError(f"its config is of version {values.get('_version')!r}: allowed is {PQCADConfig.version}")
    if not isinstance(values["_data"], dict) or _holds_type(values["_data"]):
        raise ValueError("its config names a type within its values, which are numbers, words, lists and overrides")
    return PQCADConfig(**values["_data"])


def _holds_type(value: Any) -> bool:
    """Whether a ``_type`` stands anywhere in a JSON value."""
    if isinstance(value, dict):
        return "_type" in value or any(_holds_type(entry) for entry in value.values())
    return isinstance(value, list) and any(_holds_type(entry) for entry in value)


def _check_bits(name: str, value: Any, allowed: range, where: str = "") -> None:
    if value is not None and not is_whole(value, allowed.start, allowed.stop - 1):
        raise ValueError(
            f"{name}={value!r}{where}: allowed are {allowed.start} to {allowed.stop - 1}, or None for floating point"
        )


def _check_ladder(name: str, ladder: Any, allowed: range) -> None:
    sound = isinstance(ladder, (list, tuple)) and all(isinstance(bits, int) and bits in allowed for bits in ladder)
    if not sound or any(a <= b for a, b in pairwise(ladder)):
        raise ValueError(
            f"{name}={ladder!r}: write falling widths from {allowed.start} to {allowed.stop - 1}, such as [8, 6, 5]"
        )
