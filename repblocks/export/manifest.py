"""``deploy.json``: what a deploy folder holds, and how to use it."""

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from repblocks.errors import CheckpointError
from repblocks.export.formats import Format
from repblocks.export.pixels import Pixels
from repblocks.files import replacing
from repblocks.header import describe

NAME = "deploy.json"
#: Raised by one whenever an older repblocks could not read the file any more.
DEPLOY_VERSION = 1
#: Descriptions are small; larger files are no descriptions.
_LARGEST_BYTES = 2**26
_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class DeployFile:
    """One format's files in a folder, with the hashes that ``deploy.json`` gives.

    Attributes:
        name: Key in ``deploy.json``.
        format: Key of ``FORMATS``: what opens it.
        paths: The file, and those beside it.
        hashes: SHA-256 of each.
        pixels: What it takes: ``normalized`` images, or pixels it normalises itself.
        facts: All that ``deploy.json`` says of it.
    """

    name: str
    format: str
    paths: tuple[Path, ...]
    hashes: tuple[str, ...]
    pixels: str
    facts: Mapping[str, Any]

    def require_unchanged(self) -> None:
        """Compare the files with their hashes.

        Raises:
            CheckpointError: One is missing, or is not the one that was exported.
        """
        for path, expected in zip(self.paths, self.hashes, strict=True):
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing, which {path.parent / NAME} describes; export the model again"
                )
            if (found := sha256(path)) != expected:
                raise CheckpointError(
                    f"{path} is not the file that was exported: its SHA-256 is {found[:16]}... and {NAME} says "
                    f"{expected[:16]}...; take another copy of the folder, or export the model again"
                )


def described(
    deploy: nn.Module, formats: Mapping[str, Format], entries: Mapping[str, Mapping[str, Any]], **facts: Any
) -> dict[str, Any]:
    """The content of ``deploy.json``.

    Args:
        deploy: The deploy form.
        formats: Those that were written.
        entries: What to say of each.
        facts: Further entries.

    Raises:
        CheckpointError: The model's class names are not as many as its classes.
    """
    about = describe(deploy)
    del about["format_version"]
    about["versions"] |= {package: version(package) for format in formats.values() for package in format.packages}
    params = sum(parameter.numel() for parameter in deploy.parameters())
    return {"deploy_version": DEPLOY_VERSION, **about, "params": params, **facts, "files": entries}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a description; a NaN is none of JSON's numbers."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def add_file(
    folder: str | Path, name: str, path: Path, *, format: str, pixels: str = "normalized", **facts: Any
) -> None:
    """Describe one more file in the ``deploy.json`` of its folder, such as an int8 variant.

    Args:
        folder: With a ``deploy.json``.
        name: What to call it there; for a .pt2 or .pte it begins with the format's, as whoever asks for it has to know.
        path: The file, complete, in the folder.
        format: Key of ``FORMATS`` whose runtime executes it.
        pixels: What it takes.
        facts: What else to say of it, for JSON.

    Raises:
        CheckpointError: The folder has no readable ``deploy.json``, or that cannot be written.
    """
    content = _with_file(read(Path(folder)), name, path, file=path.name, **_as_entry(format, pixels), **facts)
    with replacing(Path(folder) / NAME) as temporary:
        write(temporary, content)


@contextmanager
def adding(path: Path, name: str, *, format: str) -> Generator[tuple[Path, dict[str, Any]]]:
    """Write one more file of a folder, and describe it in the ``deploy.json`` if there is one: both, or neither.

    Args:
        path: The file that the folder will have.
        name: As for `add_file`.
        format: As for `add_file`.

    Yields:
        A temporary name to write to, and a dictionary for what else to say of the file.

    Raises:
        CheckpointError: The ``deploy.json`` is not readable, or the file system refuses.
    """
    facts: dict[str, Any] = {}
    content = read(path.parent) if (path.parent / NAME).is_file() else None
    with ExitStack() as files:  # closes in reverse: the description gets its name after the file
        description = None if content is None else files.enter_context(replacing(path.parent / NAME))
        temporary = files.enter_context(replacing(path))
        yield temporary, facts
        if content is not None and description is not None:
            entry = {"file": path.name, **_as_entry(format, "normalized"), **facts}
            write(description, _with_file(content, name, temporary, **entry))


def _as_entry(format: str, pixels: str) -> dict[str, Any]:
    return {"format": format, "input": {"layout": "NCHW", "pixels": pixels}}


def _with_file(content: Mapping[str, Any], name: str, path: Path, **entry: Any) -> dict[str, Any]:
    """A description of one more file, which need not have its own name yet."""
    return {**content, "files": {**content["files"], name: {**entry, **fingerprint(path)}}}


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``deploy.json``, its structure checked.

    Raises:
        CheckpointError: There is none, it is damaged, or too new.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"there is no {path.absolute()}; give a folder that repblocks.export wrote")
    if path.stat().st_size > _LARGEST_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, which no export writes; do not trust it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_damaged(path, repr(error))) from error
    if not isinstance(content, dict):
        raise CheckpointError(_damaged(path, f"it is {content!r:.80}, not an object"))
    return _checked(path, cast("dict[str, Any]", content))


def files_in(folder: Path, content: Mapping[str, Any]) -> dict[str, DeployFile]:
    """What a checked description says of each format's files."""
    return {name: _file(folder, name, entry) for name, entry in content["files"].items()}


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's hash and size."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path.absolute()} ({error}); give the path of a file") from error


def _checked(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    written = content.get("deploy_version")
    if isinstance(written, int) and written > DEPLOY_VERSION:
        raise CheckpointError(
            f"{path} has version {written}, and this repblocks reads up to {DEPLOY_VERSION}; upgrade with "
            "pip install --upgrade repblocks"
        )
    if "deploy_version" not in content and "files" in content:
        raise CheckpointError(
            f"{path} has no deploy_version: an older repblocks wrote it, and this one needs what it does not say; "
            "export the model again"
        )
    valid = {
        "deploy_version": isinstance(written, int) and written > 0,
        "classes": isinstance(content.get("classes"), list | None),
        "preprocessing": isinstance(content.get("preprocessing"), dict),
        "dtype": content.get("dtype") in _DTYPES,
        "files": isinstance(content.get("files"), dict),
    }
    wrong = [f"{key} is {content.get(key, 'missing')!r:.80}" for key, is_valid in valid.items() if not is_valid]
    entries = cast("dict[str, Any]", content["files"] if valid["files"] else {})
    wrong += [f"files[{name!r}] is {entry!r:.80}" for name, entry in entries.items() if not _is_entry(entry)]
    if wrong:
        raise CheckpointError(_damaged(path, ", ".join(wrong)))
    return content


def _is_entry(entry: Any) -> bool:
    """Whether it names files right in the folder, not elsewhere on the disk."""
    if not isinstance(entry, dict):
        return False
    known = cast("dict[str, Any]", entry)
    beside, given = known.get("beside", []), known.get("input")
    return (
        isinstance(known.get("format"), str)
        and isinstance(beside, list)
        and all(_is_fingerprint(part) for part in (known, *cast("list[Any]", beside)))
        and isinstance(given, dict)
        and cast("dict[str, Any]", given).get("pixels") in get_args(Pixels)
    )


def _is_fingerprint(part: Any) -> bool:
    known = cast("dict[str, Any]", part if isinstance(part, dict) else {})
    file = known.get("file")
    return isinstance(file, str) and Path(file).name == file not in ("", "..") and isinstance(known.get("sha256"), str)


def _file(folder: Path, name: str, entry: Mapping[str, Any]) -> DeployFile:
    parts = [entry, *entry.get("beside", [])]
    return DeployFile(
        name=name,
        format=entry["format"],
        paths=tuple(folder / part["file"] for part in parts),
        hashes=tuple(part["sha256"] for part in parts),
        pixels=entry["input"]["pixels"],
        facts=entry,
    )


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged: {why}; use another copy of the folder, or export the model again"
