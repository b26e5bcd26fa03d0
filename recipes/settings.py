"""What a training recipe is set to: a YAML file, the published architecture that it names, and the user's overrides."""

from collections.abc import Sequence
from pathlib import Path

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
    try:
        settings = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML or is damaged: {error}") from error
    layers = [settings, OmegaConf.from_dotlist(list(overrides))]
    name = OmegaConf.select(settings, "architecture")
    merged = OmegaConf.merge(*layers) if name is None else OmegaConf.merge(architecture(name), *layers)
    if not isinstance(merged, DictConfig):
        raise ValueError(f"{name_or_file} holds a list: a recipe's settings are names with values")
    return merged
