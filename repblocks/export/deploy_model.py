"""A deploy folder at work: images in, class names out, without any training code."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms.functional import normalize

from repblocks.checkpoint import load
from repblocks.errors import CheckpointError, ConfigurationError, DataError
from repblocks.export.formats import FORMATS, Run, installed_formats, require_packages
from repblocks.export.manifest import NAME, DeployFile, files_in, read
from repblocks.export.pixels import WHITE
from repblocks.header import describe
from repblocks.images import Mode, in_mode, read_image
from repblocks.names import known_name

#: Which of a folder's files to use where nobody chooses.
PREFERRED = ("onnx", "openvino", "safetensors", "timm")
#: Formats that are programs, which run whatever is in them.
PROGRAMS = ("pt2", "executorch")

_INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
_SMALLEST_CROP = 0.01
_MODES: Mapping[int, Mode] = {1: "L", 3: "RGB"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One class of an image.

    Attributes:
        index: Of the class.
        label: Its name; the index where the model has no class names.
        probability: By softmax, from 0 to 1.
    """

    index: int
    label: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.label} ({self.probability:.1%})"


class DeployModel:
    """The model in a deploy folder, made by `load_deploy`.

    Args:
        file: The file that is executed.
        run: What executes it.
        about: The folder's ``deploy.json``.
    """

    def __init__(self, file: DeployFile, run: Run, about: Mapping[str, Any]) -> None:
        self.file, self.about = file, about
        self.classes: list[str] | None = about["classes"]
        self._run = run
        self._preprocessing = _checked(file, about["preprocessing"])

    def __call__(self, images: Tensor) -> Any:
        """The model's output for images ``[N, C, H, W]`` as `preprocess` gives them."""
        with torch.inference_mode():
            return self._run(images)

    def preprocess(self, images: Iterable[str | Path | Image]) -> Tensor:
        """Read, resize, crop and normalise images as in the evaluation that chose the model: ``[N, C, H, W]``.

        Pixels stay pixels where the file normalises them itself.

        Raises:
            DataError: There are none, or one is no image; its path is named.
        """
        batch = [self._pixels(image, place) for place, image in enumerate(images)]
        if not batch:
            raise DataError("got no images to predict; give paths of image files")
        return self._as_taken(torch.stack(batch))

    def predict(self, images: Iterable[str | Path | Image], *, top: int = 5) -> list[list[Prediction]]:
        """The most probable classes of each image, the best first.

        Args:
            images: Paths, or images of Pillow.
            top: How many classes; fewer where the model has fewer.

        Raises:
            ConfigurationError: ``top`` is not positive, or the model gives no class scores.
            DataError: There are none, or one is no image; its path is named.
        """
        if top < 1:
            raise ConfigurationError(f"got top={top}; at least one class is needed")
        scores = self(self.preprocess(images))
        self._require_scores(scores)
        probabilities = scores.double().softmax(dim=1)
        values, indices = probabilities.topk(min(top, scores.shape[1]), dim=1)
        return [
            [self._prediction(index, value) for index, value in zip(row, best, strict=True)]
            for row, best in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def _prediction(self, index: int, probability: float) -> Prediction:
        label = str(index) if self.classes is None else str(self.classes[index])
        return Prediction(index=index, label=label, probability=probability)

    def _require_scores(self, scores: Any) -> None:
        expected = "classes" if self.classes is None else str(len(self.classes))
        shape = list(scores.shape) if isinstance(scores, Tensor) else f"{type(scores).__name__} of several tensors"
        if not isinstance(scores, Tensor) or scores.ndim != 2 or expected not in ("classes", str(scores.shape[1])):
            raise ConfigurationError(
                f"{self.file.paths[0]} gives {shape}, and predictions need class scores [N, {expected}]; call "
                "the model itself for its outputs: model(model.preprocess(images))"
            )

    def _pixels(self, image: str | Path | Image, place: int) -> Tensor:
        """One image as bytes ``[C, H, W]``, resized and cropped."""
        settings = self._preprocessing
        mode = _MODES[settings["input_size"][0]]
        picture = _opened(image, mode, place) if isinstance(image, Image) else read_image(image, mode)
        shape = {key: settings[key] for key in ("interpolation", "crop_pct") if key in settings}
        return cast("Any", create_transform(settings["input_size"], normalize=False, **shape))(picture)

    def _as_taken(self, pixels: Tensor) -> Tensor:
        """Bytes as the file takes them."""
        dtype = getattr(torch, self.about["dtype"])
        if self.file.pixels == "uint8":
            return pixels
        unit = pixels / WHITE["uint8"]
        if self.file.pixels == "unit":
            return unit.to(dtype)
        return normalize(unit, list(self._preprocessing["mean"]), list(self._preprocessing["std"])).to(dtype)


def _opened(image: Image, mode: Mode, place: int) -> Image:
    """An image of Pillow, which may not have read its file yet."""
    name = f"image {place}"
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise DataError(f"{name} cannot be decoded ({error}); repair or remove it") from error
    return in_mode(image, mode, name)


def load_deploy(path: str | Path, *, runtime: str | None = None) -> DeployModel:
    """Open what ``export`` wrote; no training code is needed, nor imported.

    Args:
        path: A folder with a ``deploy.json``; or one of the files in it, which is then the one to execute. A file of
            ``save`` does without a folder.
        runtime: Which of the folder's files to execute: a name in ``deploy.json``, such as ``onnx``. None takes the
            first of onnx, openvino, safetensors and timm that is there and whose runtime is installed; a .pt2 or .pte
            is only taken if named, as those are programs, which one has to trust.

    Raises:
        CheckpointError: It is nothing that an export wrote, a file is not the one that was exported, or a program goes
            by a name that hides what it is.
        ConfigurationError: The folder has no such file, or no runtime for its files is installed.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if path.suffix == ".safetensors" and path.is_file() and not (folder / NAME).is_file():
        return _saved(path)
    about = read(folder)
    files = files_in(folder, about)
    file = files[_chosen(folder, files, runtime or _entry_of(path, files))]
    _require_no_hidden_program(file)
    format = FORMATS[file.format]
    require_packages(file.name, format)
    file.require_unchanged()
    return DeployModel(file, format.open(*file.paths), about)


def _saved(path: Path) -> DeployModel:
    """A file of ``save``, whose header says all that ``deploy.json`` would."""
    model = load(path).eval()
    file = DeployFile(name="safetensors", format="safetensors", paths=(path,), hashes=(), pixels="normalized", facts={})
    return DeployModel(file, model, json.loads(json.dumps(describe(model))))  # lists, as in a deploy.json


def _entry_of(path: Path, files: Mapping[str, DeployFile]) -> str | None:
    """What ``deploy.json`` calls a file; None for the folder and for ``deploy.json`` itself."""
    if not path.is_file() or path.name == NAME:
        return None
    for name, file in files.items():
        if file.paths[0].name == path.name:
            return name
    raise CheckpointError(
        f"{path} is none of the files that the {NAME} beside it describes ({_listed(list(files))}); give one of those"
    )


def _chosen(folder: Path, files: Mapping[str, DeployFile], runtime: str | None) -> str:
    if runtime is not None:
        if runtime not in files:
            raise ConfigurationError(
                f"{folder} has no {runtime!r} file; it has {', '.join(files) or 'none'}: choose one of them"
            )
        known_name("format", files[runtime].format, FORMATS)
        return runtime
    usable = [name for name in PREFERRED if name in files and files[name].format in installed_formats()]
    if not usable:
        raise ConfigurationError(
            f"{folder} has {_listed(list(files))}, none of which runs here; install a runtime, such as "
            'pip install "repblocks[export]", or name a file with runtime=...'
        )
    return usable[0]


def _require_no_hidden_program(file: DeployFile) -> None:
    """Who asks for a format that is no program must not get one."""
    if file.format in PROGRAMS and not file.name.startswith(file.format):
        raise CheckpointError(
            f"the deploy.json beside {file.paths[0]} calls a {file.format} program {file.name!r}, which hides that it "
            f"is one; if you trust it, rename the entry to '{file.format}-{file.name}' and ask for that"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no files"


def _checked(file: DeployFile, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing, if it is one that images can go through.

    Raises:
        CheckpointError: It lacks something, or is damaged.
        ConfigurationError: The images that the model takes are no pictures.
    """
    size = preprocessing.get("input_size")
    if not _is_size(size):
        raise CheckpointError(
            f"the deploy.json beside {file.paths[0]} says preprocessing.input_size={size!r:.80}, needed are channels, "
            "height and width; export a model whose pretrained_cfg has them"
        )
    channels = cast("list[int]", size)[0]
    if channels not in _MODES:
        raise ConfigurationError(
            f"{file.paths[0]} takes images of {channels} channels, pictures have 1 or 3; prepare tensors yourself and "
            "open the file in its own runtime"
        )
    valid = {
        "mean": _is_per_channel(preprocessing.get("mean"), channels) or file.pixels != "normalized",
        "std": _is_per_channel(preprocessing.get("std"), channels, above=0) or file.pixels != "normalized",
        "interpolation": preprocessing.get("interpolation", "bilinear") in _INTERPOLATIONS,
        "crop_pct": _is_crop(preprocessing.get("crop_pct", 1.0)),
    }
    if wrong := [f"{key}={preprocessing.get(key)!r:.80}" for key, is_valid in valid.items() if not is_valid]:
        raise CheckpointError(
            f"the deploy.json beside {file.paths[0]} says preprocessing.{', '.join(wrong)}, which is none for images "
            f"of {channels} channels; export a model whose pretrained_cfg has it"
        )
    return {**preprocessing, "input_size": tuple(cast("list[int]", size))}


def _is_size(size: Any) -> bool:
    sides = cast("list[Any]", size if isinstance(size, list) else [])
    return len(sides) == 3 and all(type(side) is int and side > 0 for side in sides)


def _is_per_channel(values: Any, channels: int, above: float = -math.inf) -> bool:
    numbers = cast("list[Any]", values if isinstance(values, list) else [])
    return len(numbers) == channels and all(
        isinstance(number, int | float) and above < number < math.inf for number in numbers
    )


def _is_crop(value: Any) -> bool:
    """Images are resized to the input's size divided by it: a smaller one would only fill the memory."""
    return isinstance(value, int | float) and _SMALLEST_CROP <= value <= 1
