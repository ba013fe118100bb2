"""Training checkpoints on disk: written so that a kill at any moment loses none, read so that no damage goes unseen."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO

from repblocks.errors import CheckpointError
from repblocks.files import replacing

FOLDER = "checkpoints"
"""Where a run folder keeps them."""


class CheckpointFiles(CheckpointIO):
    """Lightning's way to the disk: `write_checkpoint` and `read_checkpoint`, whatever asks for them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; ``storage_options`` are of remote file systems, and not used."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,
        weights_only: bool | None = None,  # noqa: FBT001 - Lightning's
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; pickled code is refused, whatever ``weights_only`` says."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, and then its hash, so that there is none without."""
        Path(path).unlink(missing_ok=True)
        hash_file(Path(path)).unlink(missing_ok=True)


def write_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values to ``path``, and the SHA-256 of the file beside it, as ``sha256sum`` does.

    A temporary file in the same folder is written and synchronised, the hash put in its place, the file renamed, and
    the folder synchronised: a file under its name is complete and has its hash, at every moment.

    Raises:
        CheckpointError: The file system refuses; the message names the path, and what was there before is there still.
    """
    with replacing(path) as temporary:
        digest = _save(content, temporary)
        with replacing(hash_file(path)) as hashed:
            hashed.write_text(f"{digest}  {path.name}\n")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read tensors and plain values, onto the CPU; pickled code is refused, not run.

    Raises:
        CheckpointError: The file is missing, damaged, foreign, or not what its hash says.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path.absolute()}; checkpoints are in RUN/{FOLDER}/")
    require_intact(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(_unreadable(path, "it is no complete archive of torch.save"))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is foreign: it holds objects other than tensors and plain values, which are not loaded because "
            f"they can run code ({str(error).partition(chr(10))[0]})"
        ) from error
    except Exception as error:  # a damaged archive can make an unpickler raise anything
        raise CheckpointError(_unreadable(path, repr(error))) from error
    return cast("dict[str, Any]", checkpoint) if isinstance(checkpoint, dict) else {}


def require_intact(path: Path) -> None:
    """Compare a checkpoint with the hash beside it, where there is one.

    Raises:
        CheckpointError: They differ.
    """
    beside = hash_file(path.resolve())
    if beside.is_file() and beside.read_text().split()[:1] != [_sha256(path)]:
        raise CheckpointError(_unreadable(path, f"its content is not what {beside.name} says"))


def hash_file(path: Path) -> Path:
    """The file that holds the hash of a checkpoint."""
    return path.with_name(path.name + ".sha256")


def steps_written(folder: Path) -> list[Path]:
    """The checkpoints of a run's ``checkpoints/`` by the optimizer step that they were written after, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def step_of(path: Path) -> int:
    """The optimizer steps that were done when one of `steps_written` was written."""
    return int(path.stem.split("-")[1])


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, and for each newer one the reason why it is not used."""
    reasons: list[str] = []
    for path in reversed(steps_written(folder)):
        try:
            _require_whole(path)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return path, reasons
    return None, reasons


def _require_whole(path: Path) -> None:
    """That a checkpoint which a run goes on from is what was written."""
    if not hash_file(path).is_file():
        raise CheckpointError(_unreadable(path, f"there is no {hash_file(path).name} beside it"))
    require_intact(path)


def _save(content: Mapping[str, Any], path: Path) -> str:
    """Write a file with torch and give its SHA-256."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(dict(content), cast("Any", hashing))
        except RuntimeError as error:
            # torch reports a failed write as a broken archive; what the file system said is what helps.
            raise hashing.error or error from error
    return hashing.digest.hexdigest()


class _Hashing:
    """A file that is only appended to, and the hash of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path, why: str) -> str:
    return (
        f"{path} is truncated or not a checkpoint ({why}); use another of the same run, or a .safetensors file written "
        "by rb.save or rb.export"
    )


def last_checkpoint(folder: Path) -> Path | None:
    """``last.ckpt`` of a run's ``checkpoints/``, if one was written."""
    path = folder / "last.ckpt"
    return path if path.exists() else None
