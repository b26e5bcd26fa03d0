"""The instruction sets that the CPU kernels are written for, and which of them this processor has."""

import os
from dataclasses import dataclass

from pqcad_ao.utils.machine import cpu_flags

SWITCH = "PQCAD_CPU_KERNELS"


@dataclass(frozen=True)
class InstructionSet:
    """A file of primitives in this folder, ``primitives.h`` says which.

    Attributes:
        name: as the kernels' library says it. features: that a processor must have, as /proc/cpuinfo calls them.
        options: of the compiler, after those that would let it use whatever this processor has.
    """

    name: str
    features: frozenset[str]
    options: tuple[str, ...]


# The fastest first. Code for the smaller sets may not hold instructions of the larger ones, even where they are there.
INSTRUCTION_SETS = {
    "avx512-vnni": InstructionSet(
        "AVX512-VNNI", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}), ("-march=native",)
    ),
    "avx-vnni": InstructionSet(
        "AVX-VNNI", frozenset({"avx2", "fma", "avx_vnni"}), ("-march=x86-64", "-mavx2", "-mfma", "-mavxvnni")
    ),
    "avx2": InstructionSet("AVX2", frozenset({"avx2", "fma"}), ("-march=x86-64", "-mavx2", "-mfma")),
    "neon-dotprod": InstructionSet("NEON dotprod", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",)),
}


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
