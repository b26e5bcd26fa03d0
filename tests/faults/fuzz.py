"""Files that are changed where their format has its joints: each is read as it is, or is an error that names the file.

A change is resealed as often as not (its checksum is made anew), so that what is behind the checksum is looked at, too.
"""

import copy
import gzip
import json
import random
import resource
import shutil
import signal
import struct
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import CAD, LEARNS, SHAPE, UNET, Small, cosine_scheduler, export, quantize_, quick, teach
from PIL import Image
from pipelines import dit
from safetensors import safe_open
from safetensors.torch import save_file

from pqcad_ao import PTESampler, load_quantized, save_quantized
from pqcad_ao.data import load_images, read_conditioning
from pqcad_ao.diffusion.cache_plan import CachePlan, attach_cache_plan, cache_plan
from pqcad_ao.diffusion.cache_walk import Walk
from pqcad_ao.diffusion.calibration import calibration_set
from pqcad_ao.diffusion.correction import CorrectionTable, correction_of
from pqcad_ao.diffusion.trajectories import draw_trajectories
from pqcad_ao.edge.seal import MARK, seal
from pqcad_ao.evaluate.features import FeatureClassifier, RealFeatures, load_classifier
from pqcad_ao.models import load_model, save_model
from pqcad_ao.nn.files import CACHE, KIND
from pqcad_ao.nn.state import required_state
from pqcad_ao.pipeline import PipelineWalk
from pqcad_ao.recipes.settings import load_settings
from pqcad_ao.utils.files import digest
from pqcad_ao.utils.tensor_files import CHECKSUM, checksum, write_tensors

SECONDS = 20.0  # that a file may take
MEMORY = 3 * 2**30  # bytes that reading may take beyond what is taken before
FOUND = ("read", "named", "unnamed", "foreign", "hangs", "crashes")


class Hangs(BaseException):
    """No Exception, which a reader might take for the file's."""


# ------------------------------------------------------------------------------------------------------- changes

HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a", "../../etc/passwd", "\x00", "é" * 1000, [], {}, [[]], [None], {"a": 1}, [0] * 1000, [-1, 2.5, "b"]),
    *({"_type": "import_module", "_version": 1, "_data": {"name": "this"}}, [999, 999], [1, 2, 3], ["x", 1]),
]


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every entry of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, entry in entries for place in [(*path, key), *_places(entry, (*path, key))]]


def change_json(values: Any, luck: random.Random) -> Any:
    """Another JSON value: an entry that is hostile, gone, doubled, or beside what it was."""
    values = copy.deepcopy(values)
    for _ in range(luck.choice((1, 1, 1, 3))):
        places = _places(values)
        if not places:
            return luck.choice(HOSTILE)
        *path, key = luck.choice(places)
        owner = values
        for step in path:
            owner = owner[step]
        how = luck.randrange(6)
        if how == 0:
            del owner[key]
        elif how == 1 and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif how == 2 and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
            owner[key] = luck.choice(
                (owner[key] + 1, -owner[key], owner[key] * 10**6, float(owner[key]), str(owner[key]))
            )
        elif how == 3 and isinstance(owner, dict):
            owner[luck.choice(("zzz", "_type", "auto_map", "_class_name"))] = luck.choice(HOSTILE)
        else:
            owner[key] = copy.deepcopy(luck.choice(HOSTILE))
    return values


def change_bytes(content: bytes, luck: random.Random) -> bytes:
    """Bits that flip, ends and middles that are gone, zeros, noise."""
    at = luck.randrange(len(content) + 1)
    end = min(len(content), at + luck.choice((1, 8, 100, 4096)))
    how = luck.randrange(6)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + content[end:]
    if how == 2:
        return content[:at] + bytes(end - at) + content[end:]
    if how == 3:
        return content[:at] + luck.randbytes(luck.choice((1, 8, 100))) + content[at:]
    if how == 4:
        return content[:at] + luck.randbytes(end - at) + content[end:]
    flipped = bytearray(content)
    for _ in range(luck.choice((1, 1, 5))):
        flipped[luck.randrange(len(flipped))] ^= 1 << luck.randrange(8)
    return bytes(flipped)


def change_tensor(value: torch.Tensor, luck: random.Random) -> torch.Tensor:
    """Another type, another shape, or a number that cannot be."""
    how = luck.randrange(3)
    if how == 0:
        names = ("int8", "uint8", "int16", "int64", "float16", "bfloat16", "float32", "float64", "complex64", "bool")
        return value.to(getattr(torch, luck.choice(names)))
    if how == 1:
        rows = value if value.dim() else value[None]
        shapes = (value[None], rows.flatten(), rows[:0], rows.repeat(2, *[1] * (rows.dim() - 1)), rows[..., :1])
        return luck.choice(shapes).contiguous()
    value = value.clone()
    numbers = (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1e38, 3000.0, -129.0)
    number = torch.tensor(luck.choice(numbers), dtype=torch.float64)
    if value.numel():
        value.view(-1)[luck.randrange(value.numel())] = (
            number.nan_to_num().clamp(-32768, 32767)
            if not (value.is_floating_point() or value.is_complex())
            else number
        )
    return value


def change_tensors(tensors: dict[str, torch.Tensor], luck: random.Random) -> None:
    """One tensor gone, renamed, exchanged or changed."""
    name = luck.choice(sorted(tensors))
    how = luck.randrange(6)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[f"{name}z"] = tensors.pop(name)
    elif how == 2:
        other = luck.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    else:
        tensors[name] = change_tensor(tensors[name], luck)


def change_safetensors(file: Path, luck: random.Random) -> None:
    """Bytes, or header and tensors with a checksum that fits, fits no longer, or is gone."""
    if luck.random() < 0.3:
        file.write_bytes(change_bytes(file.read_bytes(), luck))
        return
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata() or {}, {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    sealed = metadata.pop(CHECKSUM, None)
    keys = [key for key in metadata if key != "format"]
    if keys and luck.random() < 0.5:
        key = luck.choice(keys)
        # in a list, for it may be a number, which is changed itself
        changed = change_json([json.loads(metadata[key])], luck)
        metadata[key] = json.dumps(changed[0] if isinstance(changed, list) and changed else None)
    else:
        change_tensors(tensors, luck)
    if sealed is not None and luck.random() < 0.8:
        metadata[CHECKSUM] = checksum(tensors, metadata)
    save_file(tensors, file, metadata)


def change_json_file(file: Path, luck: random.Random) -> None:
    how = luck.random()
    if how < 0.2:
        file.write_bytes(change_bytes(file.read_bytes(), luck))
    elif how < 0.25:
        file.write_text(luck.choice(("[" * 100_000, '{"a":' * 50_000, "1" * 5000, "", "null", '"a"', "{}")))
    else:
        file.write_text(json.dumps(change_json(json.loads(file.read_bytes()), luck)))


def change_bytes_file(file: Path, luck: random.Random) -> None:
    file.write_bytes(change_bytes(file.read_bytes(), luck))


def change_program(file: Path, luck: random.Random) -> None:
    changed = change_bytes(file.read_bytes(), luck)
    file.write_bytes(seal(changed) if MARK in changed and luck.random() < 0.8 else changed)


# ------------------------------------------------------------------------------------------------------- readers


@dataclass
class Reader:
    """What reads files: ``make`` writes sound ones into a folder, ``read`` reads them, ``change`` changes one."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    change: Callable[[Path, random.Random], None]


def _unet() -> torch.nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(**UNET).eval()


def _make_model(folder: Path) -> None:
    unet = _unet()
    quantize_(unet, quick(), scheduler=cosine_scheduler(), progress=False)
    save_model(unet, cosine_scheduler(), folder)


def _change_model(folder: Path, luck: random.Random) -> None:
    where = luck.random()
    config = folder / "unet" / "config.json"
    if where < 0.25:
        change_json_file(folder / "scheduler" / "scheduler_config.json", luck)
    elif where < 0.6:
        change_json_file(config, luck)
    else:
        change_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", luck)
        if luck.random() < 0.8:
            values = json.loads(config.read_text())
            values.get("quantization_config", {}).pop("weights", None)
            config.write_text(json.dumps(values))


def _read_model(folder: Path) -> None:
    unet, _ = load_model(folder)
    with torch.no_grad():
        assert unet(torch.zeros(1, *SHAPE), 10).sample.shape == (1, *SHAPE)


def _make_file(folder: Path) -> None:
    model = Small()
    quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    save_quantized(model, folder / "small.safetensors")


def _read_file(folder: Path) -> None:
    model = load_quantized(Small(), folder / "small.safetensors")
    with torch.no_grad():
        assert model(torch.zeros(1, *SHAPE), torch.tensor([10])).shape == (1, *SHAPE)


def _make_kept(folder: Path) -> None:
    model, timesteps, lines = Small(), [999, 749, 499, 249], torch.ones(4, 8)
    quantize_(model, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    plan = CachePlan(1, timesteps, [0, 0, 2, 2], lines, 0 * lines, [0.0, 0.5, 0.0, 0.5], 1000, 100)
    attach_cache_plan(model, plan)
    filters = torch.ones(4, SHAPE[0], 3, 3) / 9
    required_state(model).correction = CorrectionTable("debias", "prediction", timesteps, filters, filters[:, :, 0, 0])
    save_quantized(model, folder / "small.safetensors")


def _change_kept(folder: Path, luck: random.Random) -> None:
    """One of both, with a checksum of the file that fits as often as not."""
    file = folder / "small.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    header, name = json.loads(metadata[KIND]), luck.choice((CACHE, "correction"))
    metadata[KIND] = json.dumps({**header, name: change_json(header[name], luck)})
    sealed = metadata.pop(CHECKSUM)
    metadata[CHECKSUM] = checksum(tensors, metadata) if luck.random() < 0.8 else sealed
    save_file(tensors, file, metadata)


def _read_kept(folder: Path) -> None:
    model = load_quantized(Small(), folder / "small.safetensors")
    plan, table, x_t = cache_plan(model), correction_of(model), torch.zeros(1, *SHAPE)
    assert plan is not None
    feature = torch.zeros(1, plan.scale.shape[1], 2, 2)
    walk = Walk(plan, lambda x_t, *_: (x_t, feature), lambda x_t, t, given, kept, *line: x_t + (kept * line[0]).sum())
    assert all(walk(x_t, t).isfinite().all() for t in plan.timesteps)
    assert table is not None
    assert table.apply(x_t.expand(1, table.bias.shape[1], 8, 8), torch.tensor([0])).isfinite().all()


def _points(folder: Path) -> None:
    assert calibration_set(Small(), cosine_scheduler(), SHAPE, quick(), folder=folder).x_t.isfinite().all()


def _walk(folder: Path) -> None:
    call = {"class_labels": [3, 7], "guidance_scale": 3.0}
    assert PipelineWalk(dit(), None, call, quick()).points(folder=folder).x_t.isfinite().all()


def _pictures(folder: Path) -> None:
    drawn = draw_trajectories(Small(), cosine_scheduler(), SHAPE, CAD, {}, folder=folder)
    assert drawn.rows(torch.arange(len(drawn)))[0].isfinite().all()


def _change_pictures(folder: Path, luck: random.Random) -> None:
    file = luck.choice(sorted(folder.iterdir()))
    if luck.random() < 0.3:
        (*_, whole) = folder.glob("*.whole.json")
        whole.unlink()
    if file.exists():
        (change_json_file if file.suffix == ".json" else change_bytes_file)(file, luck)


def _learn(folder: Path) -> None:
    quantize_(
        Small(),
        quick(**{**LEARNS, "iterations": 16, "weight_share": 0.4}),
        scheduler=cosine_scheduler(),
        sample_shape=SHAPE,
        folder=folder,
        progress=False,
    )


def _make_features(folder: Path) -> None:
    torch.manual_seed(0)
    FeatureClassifier(1, 8, (4, 4)).save(folder / "classifier.safetensors")
    RealFeatures.from_features(torch.randn(10, 4)).save(folder / "real.safetensors")


def _read_features(folder: Path) -> None:
    network = load_classifier(folder / "classifier.safetensors")
    size = network.architecture["image_size"]
    if size < 100:
        assert network.features(torch.zeros(2, network.architecture["in_channels"], size, size)).shape[0] == 2
    assert RealFeatures.load(folder / "real.safetensors").n > 1


def _make_idx(folder: Path) -> None:
    for name, shape in (("images-idx3", (6, 8, 8)), ("labels-idx1", (6,))):
        values = np.arange(np.prod(shape), dtype=np.uint8)
        header = struct.pack(f">BBBB{len(shape)}i", 0, 0, 8, len(shape), *shape)
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))


def _change_idx(folder: Path, luck: random.Random) -> None:
    file = luck.choice(sorted(folder.iterdir()))
    if luck.random() < 0.7:
        file.write_bytes(gzip.compress(change_bytes(gzip.decompress(file.read_bytes()), luck)))
    else:
        change_bytes_file(file, luck)


def _make_pictures(folder: Path) -> None:
    for name in ("a.png", "b.jpg", "c.bmp", "d.webp"):
        Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(folder / name)


def _change_any(change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    return lambda folder, luck: change(luck.choice([p for p in sorted(folder.rglob("*")) if p.is_file()]), luck)


def _change_one(pattern: str, change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    return lambda folder, luck: change(luck.choice(sorted(folder.glob(pattern))), luck)


def _make_conditioning(folder: Path) -> None:
    tensors = {"class_labels": torch.arange(4), "added_cond_kwargs.text_embeds": torch.ones(4, 3)}
    write_tensors(folder / "c.safetensors", {**tensors, "guidance_scale": torch.tensor(7.5)})


def _make_settings(folder: Path) -> None:
    (folder / "mine.yaml").write_text("unet:\n  a: [1, 2]\ntrain: {lr: 0.1, steps: 3}\nname: &x word\nother: *x\n")


READERS: dict[str, Reader] = {
    "load_model": Reader(_make_model, _read_model, _change_model),
    "load_quantized": Reader(_make_file, _read_file, _change_any(change_safetensors)),
    "cache plan and correction": Reader(_make_kept, _read_kept, _change_kept),
    "C_QC": Reader(_points, _points, _change_any(change_safetensors)),
    "C_QC of a pipeline": Reader(_walk, _walk, _change_any(change_safetensors)),
    "C_DC": Reader(_pictures, _pictures, _change_pictures),
    "features": Reader(_make_features, _read_features, _change_any(change_safetensors)),
    "idx images": Reader(_make_idx, lambda f: load_images(f, image_size=8), _change_idx),
    "pictures": Reader(_make_pictures, lambda f: load_images(f, image_size=8), _change_any(change_bytes_file)),
    "conditioning": Reader(
        _make_conditioning, lambda f: read_conditioning(f / "c.safetensors"), _change_any(change_safetensors)
    ),
    "settings": Reader(_make_settings, lambda f: load_settings(str(f / "mine.yaml")), _change_any(change_bytes_file)),
}
SLOW_READERS: dict[str, Reader] = {
    "learning checkpoint": Reader(_learn, _learn, _change_one("checkpoint*", change_safetensors)),
    "teacher checkpoint": Reader(teach, teach, _change_one("*.pt", change_bytes_file)),
    ".pte": Reader(export, lambda f: PTESampler(f / "a.pte"), _change_any(change_program)),
}


# ------------------------------------------------------------------------------------------------------- verdicts


def _alarm(*_: object) -> None:
    raise Hangs


def verdict(read: Callable[[Path], Any], folder: Path) -> tuple[str, str]:
    """What reading a changed file came to, and what was said."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(folder)
        return "read", ""
    except (ValueError, OSError, FloatingPointError) as error:
        # a network whose finite weights overflow is read, and says in which layer as it is used
        overflows = isinstance(error, FloatingPointError) and " layer " in str(error)
        found = "named" if overflows or folder.name in str(error) else "unnamed"
        return found, "" if found == "named" else traceback.format_exc()
    except Hangs:
        return "hangs", traceback.format_exc()
    except Exception:
        return "foreign", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(name: str, reader: Reader, files: int, scratch: Path, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Change and read ``files`` times; how often it came to what, and what was said where it was not sound."""
    scratch.mkdir(exist_ok=True)
    sound, counts, complaints, number = scratch / "sound", Counter[str](), list[str](), 0
    sound.mkdir()
    torch.set_num_threads(1)
    reader.make(sound)
    while number < files:
        answers = get_context("fork").SimpleQueue()

        def work(first: int = number, answers: Any = answers) -> None:
            warnings.simplefilter("ignore")
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
            for trial in range(first, files):
                folder = scratch / f"changed-{digest(name, trial)}"
                shutil.copytree(sound, folder)
                reader.change(folder, random.Random(f"{name} {seed} {trial}"))
                answers.put((trial, *verdict(reader.read, folder)))
                shutil.rmtree(folder)
            answers.put(None)

        process = get_context("fork").Process(target=work)
        process.start()
        while True:
            while answers.empty() and process.is_alive():
                process.join(0.01)
            answer = None if answers.empty() else answers.get()
            if answer is None:
                break
            number, found, said = answer[0] + 1, answer[1], answer[2]
            counts[found] += 1
            if said:
                complaints.append(f"{name} {seed} {answer[0]}: {found}\n{said}")
        process.join()
        if number < files:
            counts["crashes"] += 1
            complaints.append(f"{name} {seed} {number}: the process ended with {process.exitcode}")
            number += 1
        for left in scratch.glob("changed-*"):
            shutil.rmtree(left)
    shutil.rmtree(sound)
    return counts, complaints
