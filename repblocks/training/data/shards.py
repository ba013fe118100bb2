"""Images in tar shards, read one after the other (the format of webdataset)."""

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from repblocks.errors import DataError
from repblocks.images import Mode, read_image

Member = dict[str, Any]
"""The files of one image by their extension, undecoded, and where they are from."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """One part of a dataset in tar files; a member is an image file and a ``.cls`` file or a field of its ``.json``.

    Attributes:
        files: Paths or URLs, whatever webdataset opens.
        images: How many they hold together.
        mode: Gray or colour.
        extensions: Of image files.
        label_key: The field of ``.json`` that holds the label; empty for ``.cls``.
        shuffled: How many members are held to be shuffled, in each process.
        ahead: How many of them are read before the first is given out.
    """

    files: tuple[str, ...]
    images: int
    mode: Mode
    extensions: tuple[str, ...]
    label_key: str
    shuffled: int
    ahead: int

    def __len__(self) -> int:
        return self.images

    def members(self, files: Iterable[str], report: Callable[[DataError], None]) -> Iterator[Member]:
        """The members of some of the files; ``report`` is told of a damaged file, whose rest is left out."""

        def damaged(error: Exception) -> bool:
            report(DataError(f"{error.args[-1]} cannot be read as a tar file ({error.args[0]}); repair or remove it"))
            return True

        return group_by_keys(tar_file_expander(_opened(files, report), handler=damaged), handler=damaged)

    def decode(self, member: Member) -> tuple[Image.Image, int]:
        """The image and its label.

        Raises:
            DataError: It has no image file or no label, or one that cannot be read.
        """
        name = f"{member['__url__']}/{member['__key__']}"
        extension = next((known for known in self.extensions if known in member), None)
        if extension is None:
            raise DataError(f"{name} has no image file ({', '.join(self.extensions)}); repair or remove it")
        image = read_image(BytesIO(member[extension]), self.mode, f"{name}.{extension}")
        return image, self._label(member, name)

    def _label(self, member: Member, name: str) -> int:
        try:
            return int(json.loads(member["json"])[self.label_key] if self.label_key else member["cls"])
        except (KeyError, ValueError, TypeError) as error:
            where = f"the field {self.label_key!r} of its .json" if self.label_key else "its .cls file"
            raise DataError(
                f"{name} has no label ({error!r}); needed is a whole number in {where}; repair or remove it"
            ) from error


def _opened(files: Iterable[str], report: Callable[[DataError], None]) -> Generator[dict[str, Any]]:
    for file in files:
        try:
            stream = gopen(file)
        except Exception as error:  # webdataset opens files, pipes and buckets, and each fails in its own way
            report(DataError(f"{file} cannot be opened ({error}); check data.root and the names of the splits"))
            continue
        with stream:
            yield {"url": file, "stream": stream}
