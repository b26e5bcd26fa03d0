"""Options of a configuration that a user writes as ``NAME=VALUE``."""

from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's own parser raises it


def read_options(kind: type, asked: list[str]) -> dict[str, Any]:
    """The options of a dataclass that ``name=value`` arguments set, such as ``weight_ladder=[8,6]``.

    Raises:
        ValueError: no ``name=value``, or a name that the dataclass does not have.
    """
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(asked))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{' '.join(asked)!r} cannot be read as NAME=VALUE: {str(error).splitlines()[0]}") from error
    known = {field.name for field in fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}: allowed are {', '.join(sorted(known))}")
    return values
