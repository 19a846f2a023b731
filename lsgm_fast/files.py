"""Writing files so that nothing half-written is ever left behind."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}(\.[^.]+)?")


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, make_folders: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path`` (same extension) that becomes ``path`` if the block ends without an exception.

    On any exception, Ctrl-C included, the temporary file is removed and an older file at ``path`` stays as it was.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        FileNotFoundError: the folder of ``path`` does not exist (``make_folders`` makes it instead).
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder, give a file name")
    if make_folders:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {path}: the folder {path.parent} does not exist, create it first"
        )
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        # Whatever wrote it (safetensors: for its owner alone), the file is as readable as any other new one.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """What processes that were killed inside :func:`atomic_path` left in ``folder``, and what it would have become.

    Yields:
        (temporary file, its ``path``). Another process may be writing it at this moment.
    """
    for entry in sorted(Path(folder).iterdir()):
        if match := _TEMPORARY.fullmatch(entry.name):
            yield entry, entry.with_name(match[1] + (match[2] or ""))
