"""Damaged files that a fuzzer chooses by the lines that they reach: ``python tests/faults --guided SECONDS``.

It wants atheris (``pip install atheris``), which has wheels for Linux. A case is a whole folder, packed; it is changed
as in :mod:`fuzz`, or by libFuzzer's own mutations of one file, and kept where it reaches what none did before.
"""

import importlib.util
import io
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from zipfile import BadZipFile, ZipFile

LARGEST = 2**22  # bytes of a case
INSTRUMENTED = ["pqcad_ao", "safetensors", "diffusers.configuration_utils", "PIL"]


def missing() -> str:
    """Why no fuzzer can run here, or ""."""
    return "" if importlib.util.find_spec("atheris") else "atheris is not installed"


def guide(name: str, seconds: int, scratch: Path) -> tuple[Counter[str], list[str]]:
    """As :func:`fuzz.fuzz`, for some seconds in a process of its own."""
    scratch.mkdir()
    command = [sys.executable, __file__, name, str(seconds), str(scratch)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    verdicts, said = scratch / "verdicts", scratch / "said"
    counts = Counter(verdicts.read_text().split() if verdicts.exists() else [])
    complaints = [said.read_text()] if said.exists() else []
    if result.returncode != 0 or not counts:
        counts["crashes"] += 1
        complaints.append(f"{name}: the fuzzer ended with {result.returncode}\n{result.stderr[-3000:]}")
    shutil.rmtree(scratch)
    return counts, complaints


def pack(folder: Path) -> bytes:
    """A folder's files as one case."""
    packed = io.BytesIO()
    with ZipFile(packed, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return packed.getvalue()


def unpack(case: bytes, folder: Path) -> bool:
    """Write a case's files; False: it is none."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with ZipFile(io.BytesIO(case)) as archive:
            archive.extractall(folder)
    except (BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        return False
    return True


def main() -> None:
    """The process that libFuzzer runs in, and ends."""
    import atheris

    name, seconds, scratch = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    sys.path.append(str(Path(__file__).parents[1]))  # the networks of the tests
    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz import READERS, SLOW_READERS, verdict
    import torch

    torch.set_num_threads(1)
    reader = {**READERS, **SLOW_READERS}[name]
    corpus, changed, mutated = scratch / "corpus", scratch / "changed", scratch / "mutated"
    for folder in (corpus, changed):
        folder.mkdir()
    reader.make(changed)
    (corpus / "sound").write_bytes(pack(changed))
    verdicts, said = (scratch / "verdicts").open("w", buffering=1), (scratch / "said").open("w", buffering=1)

    def mutate(case: bytes, largest: int, seed: int) -> bytes:
        luck = random.Random(seed)
        if not unpack(case, mutated) or not any(mutated.iterdir()):
            return (corpus / "sound").read_bytes()
        if luck.random() < 0.7:
            try:
                reader.change(mutated, luck)
            # what was changed before may no longer have the joints at which it would be changed; of sound files, the
            # same changes must not fail (`--files`)
            except Exception:
                return (corpus / "sound").read_bytes()
        else:
            file = luck.choice([path for path in sorted(mutated.rglob("*")) if path.is_file()])
            content = file.read_bytes()
            file.write_bytes(atheris.Mutate(content, len(content) + 64))
        case = pack(mutated)
        return case if len(case) <= largest else (corpus / "sound").read_bytes()

    def read(case: bytes) -> None:
        if not unpack(case, changed):
            return
        found, text = verdict(reader.read, changed)
        print(found, file=verdicts)
        if text:
            print(found, text, file=said)

    options = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-handle_alrm=0", "-rss_limit_mb=0", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
