"""The folder in which this user's compiled code is kept: nobody else may have put anything there."""

import hashlib
import os
import stat
from pathlib import Path

from pqcad_ao.utils.files import flush, settle

VARIABLE = "PQCAD_CACHE"  # names another folder than ~/.cache/pqcad_ao


def cache_folder() -> Path:
    """The user's own folder, made if it is missing: ``PQCAD_CACHE``, or ``pqcad_ao`` in the XDG cache.

    Raises:
        OSError: it cannot be made, it is another user's, or another user may write into it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get(VARIABLE) or os.path.join(home, "pqcad_ao"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_mine(folder)
    if stat.S_IMODE(folder.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users may write into {folder}: write chmod go-w {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


def find_code(folder: Path, name: str) -> Path | None:
    """The file that :func:`keep_code` put there under this name; a damaged one is deleted, and there is none.

    Raises:
        OSError: another user put it there.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        _check_mine(path)
        if path.stem == f"{name}-{_content_hash(path.read_bytes())}":
            return path
        path.unlink()  # the system kills a process that runs a file which ends too soon
    return None


def keep_code(folder: Path, name: str, built: Path) -> Path:
    """Move a library from the folder where it was built to ``folder``, under ``name`` and the hash of its content.

    The file appears whole or not at all.
    """
    path = folder / f"{name}-{_content_hash(built.read_bytes())}.so"
    settle(built.parent)
    built.replace(path)
    flush(folder)
    return path


def _content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _check_mine(path: Path) -> None:
    """Raises PermissionError: another user made a file or folder."""
    if not hasattr(os, "geteuid"):  # Windows keeps a user's folder by other means
        return
    for status in (path.lstat(), path.stat()):  # of a link, and of what it leads to
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to user {status.st_uid}, not to this one: its code is not run")
