"""Files that appear complete or not at all, whatever happens while they are written."""

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from repblocks.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary name beside ``path``; what was written there replaces ``path`` at the end, or vanishes.

    The content is on the disk before the old file goes, and the new name before this returns, so at every moment,
    also after a loss of power, there is one complete file or none.

    Raises:
        CheckpointError: The file system refuses.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _vanishing(temporary):
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.chmod(_usual_mode())  # safetensors writes files that nobody else can read
            temporary.replace(path)
            _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path.absolute()} ({error}); give a path in a folder that you may write to, on a disk with "
            "space left"
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what `replacing` left under temporary names in a folder when its process was killed."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 8}.*"):
        path.unlink(missing_ok=True)


def _usual_mode() -> int:
    """The permissions that a file gets which nothing is said about."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextmanager
def _vanishing(path: Path) -> Generator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
