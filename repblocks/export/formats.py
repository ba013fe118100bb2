"""The formats that a deploy model is written in."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from repblocks.errors import ConfigurationError
from repblocks.export import executorch_program, onnx_graph, openvino_ir, safetensors_file, timm_file, torch_program

Run = Callable[[Tensor], Any]
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way to write deploy models.

    Attributes:
        filename: Name of the file in the deploy folder.
        beside: Names of further files that belong to it.
        extra: What to install it with: ``pip install "repblocks[EXTRA]"``.
        packages: Python packages beyond repblocks' own requirements.
        dtypes: Those that its runtime computes in; None for all.
        holds: ``weights`` of a network that takes normalised images, or a ``graph`` that takes the chosen pixels.
        image_sizes: Whether it can leave the size of images open.
        write: ``write(job, path, *beside)`` writes the files and returns facts about them for ``deploy.json``.
        open: ``open(path, *beside)`` gives what executes the files: images in, outputs out.
    """

    filename: str
    beside: tuple[str, ...] = ()
    extra: str | None = None
    packages: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] | None = None
    holds: Literal["weights", "graph"] = "graph"
    image_sizes: Literal["open", "one"] = "open"
    write: Callable[..., Facts]
    open: Callable[..., Run]

    @property
    def filenames(self) -> tuple[str, ...]:
        """All its files."""
        return (self.filename, *self.beside)


FORMATS: dict[str, Format] = {
    "safetensors": Format(
        filename="model.safetensors", holds="weights", write=safetensors_file.write, open=safetensors_file.open_file
    ),
    "timm": Format(filename="model.timm.safetensors", holds="weights", write=timm_file.write, open=timm_file.open_file),
    "onnx": Format(
        filename="model.onnx",
        extra="export",
        packages=("onnx", "onnxscript", "onnxruntime"),
        dtypes=(torch.float32, torch.float16),
        write=onnx_graph.write,
        open=onnx_graph.open_file,
    ),
    "pt2": Format(filename="model.pt2", write=torch_program.write, open=torch_program.open_file),
    "openvino": Format(
        filename="model.xml",
        beside=("model.bin",),
        extra="openvino",
        packages=("openvino",),
        dtypes=(torch.float32, torch.float16),
        write=openvino_ir.write,
        open=openvino_ir.open_files,
    ),
    "executorch": Format(
        filename="model.pte",
        extra="executorch",
        packages=("executorch",),
        dtypes=(torch.float32,),
        image_sizes="one",
        write=executorch_program.write,
        open=executorch_program.open_file,
    ),
}

#: What is written where nobody chooses, as far as its packages are installed.
USUAL_FORMATS = ("safetensors", "onnx")


def check_formats(formats: Iterable[str]) -> dict[str, Format]:
    """The chosen formats; worth calling before a long training.

    Raises:
        ConfigurationError: An unknown format, or one whose packages are not installed.
    """
    names = [formats] if isinstance(formats, str) else list(formats)
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise ConfigurationError(f"unknown export format {unknown[0]!r}; choose from {', '.join(FORMATS)}")
    chosen = {name: FORMATS[name] for name in names}
    for name, format in chosen.items():
        require_packages(name, format)
    return chosen


def require_packages(name: str, format: Format) -> None:
    """Check that a format can be used here.

    Raises:
        ConfigurationError: Its packages are not installed; the message holds the command.
    """
    if missing := _missing_packages(format):
        command = f'pip install "repblocks[{format.extra}]"' if format.extra else f"pip install {' '.join(missing)}"
        raise ConfigurationError(
            f"the {name} format needs {', '.join(missing)}, not installed here; run: {command}, or choose other formats"
        )


def require_dtype(name: str, format: Format, dtype: torch.dtype) -> None:
    """Check that a format can hold and execute weights of a dtype.

    Raises:
        ConfigurationError: It cannot.
    """
    if format.dtypes is not None and dtype not in format.dtypes:
        raise ConfigurationError(
            f"the {name} format cannot hold {dtype}: its runtime has no CPU convolution for it, so the file could "
            "not be compared with the model; export model.float(), or choose formats=('safetensors',)"
        )


def installed_formats() -> list[str]:
    """The formats whose packages are installed."""
    return [name for name, format in FORMATS.items() if not _missing_packages(format)]


def _missing_packages(format: Format) -> list[str]:
    return [package for package in format.packages if importlib.util.find_spec(package) is None]
