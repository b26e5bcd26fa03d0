"""What a training recipe is set to: a YAML file, the published architecture that it names, and the user's overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's own parser raises it

from pqcad_ao.models import architecture

CONFIGS = Path(__file__).parent / "configs"


def load_settings(name_or_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a recipe's settings.

    Args:
        name_or_file: a name in ``recipes/configs``, or a YAML file. Where it has ``architecture``, that one's ``unet``
            and ``scheduler`` stand beneath its own (:func:`~pqcad_ao.models.architecture`).
        overrides: such as ``train.steps=100``.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged; no such architecture.
    """
    is_file = name_or_file.endswith((".yaml", ".yml"))
    path = Path(name_or_file if is_file else CONFIGS / f"{name_or_file}.yaml")
    given = OmegaConf.from_dotlist(list(overrides))
    try:
        settings = OmegaConf.load(path)
        if not isinstance(settings, DictConfig):
            raise ValueError("it holds a list; a recipe's settings are names with values")
        name = OmegaConf.select(settings, "architecture")
        layers = [settings, given] if name is None else [architecture(name), settings, given]
        merged: Any = OmegaConf.merge(*layers)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} is no YAML or is damaged: {error}") from error
    return merged
