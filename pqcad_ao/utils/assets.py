"""Data files that are part of this package."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "assets"


def asset_path(*parts: str) -> Path:
    """The path of a file or folder among them; whether it is there is for the caller to see."""
    return FOLDER.joinpath(*parts)
