"""A checksum inside of a .pte: a constant of the program like any other, so that every runtime reads the file."""

import hashlib

MARK = b"pqcad-sha256:"  # before the digest, by which it is found without reading the program
DIGEST = 64  # characters
UNSEALED = MARK.decode() + "0" * DIGEST  # what the constant holds while the digest is made


def seal(program: bytes) -> bytes:
    """A program with the constant :data:`UNSEALED` in it, with its digest there."""
    start = _place(program)
    if start is None:
        raise ValueError("the program has no place for a checksum")
    return program[:start] + _digest(program, start) + program[start + DIGEST :]


def is_sealed(program: bytes) -> bool | None:
    """Whether a program is what was sealed; None where it has no checksum."""
    start = _place(program)
    return None if start is None else program[start : start + DIGEST] == _digest(program, start)


def _place(program: bytes) -> int | None:
    found = program.find(MARK)
    return None if found < 0 else found + len(MARK)


def _digest(program: bytes, start: int) -> bytes:
    """SHA-256 of a program as it is while its digest is zeros."""
    whole = memoryview(program)
    sha = hashlib.sha256(whole[:start])
    sha.update(b"0" * DIGEST)
    sha.update(whole[start + DIGEST :])
    return sha.hexdigest().encode()
