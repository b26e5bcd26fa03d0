"""What a user may ask for: frozen-vocabulary dataclasses, checked when they are made.

They are torchao's ``AOBaseConfig``, as which ``nn/state.py`` registers them: this folder imports no PyTorch, for the
command line reads its options off these fields and their descriptions, and is to answer ``--help`` at once.
"""

from pqcad_ao.config.caching import CacheConfig, FeatureCorrection, Refreshes
from pqcad_ao.config.correcting import PUBLISHED, Correction, CorrectionKind, Place
from pqcad_ao.config.distilling import REFERENCE_STEPS, CADConfig, Guidance, Solver, Space, StepWeighting
from pqcad_ao.config.quantizing import (
    ACTIVATION_BITS,
    LEARNING,
    ROLES,
    WEIGHT_BITS,
    Mode,
    PQCADConfig,
    SampleWeighting,
    Selection,
    TimestepLaw,
    TransitionLaw,
    config_from_json,
)
from pqcad_ao.config.shared import MAX_BATCH

__all__ = [
    "ACTIVATION_BITS",
    "LEARNING",
    "MAX_BATCH",
    "PUBLISHED",
    "REFERENCE_STEPS",
    "ROLES",
    "WEIGHT_BITS",
    "CADConfig",
    "CacheConfig",
    "Correction",
    "CorrectionKind",
    "FeatureCorrection",
    "Guidance",
    "Mode",
    "PQCADConfig",
    "Place",
    "Refreshes",
    "SampleWeighting",
    "Selection",
    "Solver",
    "Space",
    "StepWeighting",
    "TimestepLaw",
    "TransitionLaw",
    "config_from_json",
]
