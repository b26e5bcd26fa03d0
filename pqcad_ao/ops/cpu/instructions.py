"""Which of the instruction sets that the CPU kernels are written for this processor has."""

import os

from pqcad_ao.ops.cpu.build import INSTRUCTION_SETS, InstructionSet
from pqcad_ao.utils.machine import cpu_flags

SWITCH = "PQCAD_CPU_KERNELS"


def choose() -> list[InstructionSet]:
    """The instruction sets to try, one after another: those of this processor, or what ``PQCAD_CPU_KERNELS`` names.

    Raises:
        ValueError: the variable names none, or one that this processor does not have.
    """
    value = os.environ.get(SWITCH, "")
    flags = cpu_flags()
    here = {key: chosen for key, chosen in INSTRUCTION_SETS.items() if chosen.features <= flags}
    if value in ("", "1"):
        return list(here.values())
    if value == "0":
        return []
    if value in here:
        return [here[value]]
    reason = ""
    if value in INSTRUCTION_SETS:
        missing = sorted(INSTRUCTION_SETS[value].features - flags)
        reason = f"this processor has no {' and no '.join(missing)}; "
    named = ", ".join((*here, "0 (no kernels: dequantized weights in floating point)"))
    raise ValueError(
        f"{SWITCH}={value!r} in the environment: {reason}allowed are unset or 1 (the fastest that this processor has), "
        f"{named}"
    )
