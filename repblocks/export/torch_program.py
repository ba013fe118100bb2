"""torch.export's .pt2: a traced graph with its weights, for torch without the code of the model."""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, cast

import torch

from repblocks.errors import CheckpointError
from repblocks.export.jobs import Job

#: What `write` leaves in an archive; the record of example inputs is empty.
_RECORD = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/(\w+_config\.json|(weight|tensor)_\d+))"
)


def write(job: Job, path: Path) -> dict[str, Any]:
    """The traced graph; through memory, so that a full disk is an OSError and not an error of torch's zip writer."""
    content = io.BytesIO()
    torch.export.save(job.program, content)
    path.write_bytes(content.getbuffer())
    return {"load": "torch.export.load('model.pt2').module()"}


def open_file(path: Path) -> Any:
    """The graph as a module.

    torch unpickles what else an archive may hold (example inputs, tensors of odd kinds), running code that is in it;
    `write` puts nothing of that kind in, so archives that hold it are refused. The graph itself is a program all the
    same, with expressions that torch evaluates: only open files of people you trust.

    Raises:
        CheckpointError: torch cannot read it, it unpacks to more than it is, or it holds pickles.
    """
    try:
        return torch.export.load(_checked_copy(path)).module()
    except Exception as error:  # a damaged archive leads torch's readers to anything
        raise CheckpointError(
            f"{path} is not a torch.export file that repblocks wrote ({error}); export the model again"
        ) from error


def _checked_copy(path: Path) -> io.BytesIO:
    """The records that were checked, and no others: torch's reader can find another directory in the same file."""
    copied = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copied, "w") as copy:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("its records unpack to more than the file has bytes")
        _require_no_pickles(archive)
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
    copied.seek(0)
    return copied


def _require_no_pickles(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError("it has two records of one name")
    for name in names:
        if not _RECORD.fullmatch(name) or (name.endswith(".pt") and archive.getinfo(name).file_size):
            raise ValueError(f"{name} may hold code")
        if name.endswith("_config.json") and _mentions_pickles(json.loads(archive.read(name))):
            raise ValueError(f"{name} asks torch to unpickle tensors")


def _mentions_pickles(value: Any) -> bool:
    """Whether a description of tensors says so of one of them."""
    entries = cast("dict[str, Any]", value if isinstance(value, dict) else {})
    return bool(entries.get("use_pickle")) or any(_mentions_pickles(entry) for entry in entries.values())
