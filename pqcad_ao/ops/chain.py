"""Chains: calls of the other ``pqcad::`` operators, written down as numbers, that are one call.

Each call that comes from Python, or from a package by the operator's name, costs some microseconds for its arguments
alone. The CPU's kernels read a chain and call each other (``ops/cpu/chain.h``); :func:`run` says what it computes.

A program is whole numbers with a space between two. A call is its operator's place in ``OPERATORS`` and the arguments
in the order of the schema: of a tensor the number of a value, -1 of None; a list's length before what is in it; the 64
bits of a float; a type's number. Values are the chain's inputs and, behind them, every call's result. Where nothing
reads value n any more it is -2 - n, so that its memory is free again.
"""

import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# what a chain may call; ops/cpu/operators.cpp has the same places
OPERATORS = ("conv2d", "linear", "weight_only_linear", "quantize", "norm_silu_quantize", "attention")
TYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}  # by c10::ScalarType's numbers


def write(calls: Sequence[tuple[str, Sequence[Any]]], inputs: int, results: Sequence[int]) -> str:
    """The program of some calls, one after the other.

    Args:
        calls: an operator's name and all of its arguments; where the schema has a tensor, the number of a value.
        inputs: how many values there are before the first call. results: the values that are read behind the last.
    """
    tokens: list[tuple[bool, int]] = []  # whether it is a value's number, and the number
    for name, arguments in calls:
        tokens.append((False, OPERATORS.index(name)))
        for kind, argument in zip(_kinds(name), arguments, strict=True):
            tokens += _tokens(kind, argument)
    needed, numbers = {*range(inputs), *results}, []
    for is_value, number in reversed(tokens):
        last = is_value and number >= 0 and number not in needed
        if last:
            needed.add(number)
        numbers.append(-2 - number if last else number)
    return " ".join(map(str, reversed(numbers)))


def run(inputs: list[Tensor], program: str, results: list[int]) -> list[Tensor]:
    """``pqcad::chain`` on any device, on whatever kernels its operators have there."""
    values: list[Tensor | None] = list(inputs)
    numbers = map(int, program.split())
    for number in numbers:
        name = OPERATORS[number]
        arguments = [_read(kind, numbers, values) for kind in _kinds(name)]
        values.append(getattr(torch.ops.pqcad, name)(*arguments))
    return [value for index in results if (value := values[index]) is not None]


@cache
def _kinds(name: str) -> tuple[str, ...]:
    """The types in an operator's schema."""
    return tuple(str(argument.real_type) for argument in getattr(torch.ops.pqcad, name).default._schema.arguments)


def _tokens(kind: str, argument: Any) -> list[tuple[bool, int]]:
    if kind.startswith("List["):
        parts = [token for part in argument for token in _tokens(kind[5:-1], part)]
        return [(False, len(argument)), *parts]
    if "Tensor" in kind:
        return [(True, -1 if argument is None else argument)]
    if kind == "float":
        return [(False, struct.unpack("<q", struct.pack("<d", argument))[0])]
    if kind == "ScalarType":
        return [(False, next(number for number, dtype in TYPES.items() if dtype == argument))]
    return [(False, int(argument))]


def _read(kind: str, numbers: Iterator[int], values: list[Tensor | None]) -> Any:
    if kind.startswith("List["):
        return [_read(kind[5:-1], numbers, values) for _ in range(next(numbers))]
    number = next(numbers)
    if "Tensor" in kind:
        if number < -1:
            number = -2 - number
            value, values[number] = values[number], None
            return value
        return None if number == -1 else values[number]
    if kind == "float":
        return struct.unpack("<d", struct.pack("<q", number))[0]
    if kind == "ScalarType":
        return TYPES[number]
    return bool(number) if kind == "bool" else number
