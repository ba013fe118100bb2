"""What the writers of the formats are given."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repblocks.errors import ConfigurationError
from repblocks.export.pixels import Pixels

Sizes = Literal["fixed", "dynamic"]

#: Axes of images, by name where a graph leaves them open.
AXES = ("batch", "channels", "height", "width")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model to write, in whatever formats.

    Attributes:
        reference: The model as it was given, in eval mode on the CPU.
        deploy: Its deploy form, which takes normalised images and which files of weights hold.
        graph: What graphs hold: that without the BatchNorms of layers that are no blocks, and with the normalisation of
            ``pixels`` in front.
        images: An example of what the graph takes: ``[N, C, H, W]`` with N > 1.
        pixels: What the graph takes.
        sizes: Whether graphs take images of one size, or leave it open.
        opset: Of ONNX; None for the exporter's default.
    """

    reference: nn.Module
    deploy: nn.Module
    graph: nn.Module
    images: Tensor
    pixels: Pixels = "normalized"
    sizes: Sizes = "fixed"
    opset: int | None = None

    @cached_property
    def program(self) -> ExportedProgram:
        """The graph as torch traces it, once for all formats, with an open batch axis.

        Raises:
            ConfigurationError: It cannot be traced, or it fixes the size of images that was to stay open.
        """
        axes: dict[int, Any] = {0: Dim("batch"), **({2: Dim.AUTO, 3: Dim.AUTO} if self.sizes == "dynamic" else {})}
        return traced(self.graph, self.images, axes)


def traced(graph: nn.Module, images: Tensor, axes: dict[int, Any]) -> ExportedProgram:
    """Trace a graph, without what only the machine knows that traced it: paths of source files and example images.

    Raises:
        ConfigurationError: It cannot be traced, or it fixes an axis that was to stay open.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (images,), dynamic_shapes=(axes,))
    except Exception as error:  # tracing runs the user's code under torch's tracer: anything can come out
        raise ConfigurationError(
            f"torch.export cannot trace this model ({type(error).__name__}: {str(error).splitlines()[0]:.300}); "
            "choose formats=('safetensors',), or sizes='fixed' if only open sizes fail"
        ) from error
    _require_open(program, axes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def shape_of_input(job: Job) -> list[str | int]:
    """The shape that a graph takes, open axes by name."""
    open_axes = (0, 2, 3) if job.sizes == "dynamic" else (0,)
    return [AXES[axis] if axis in open_axes else size for axis, size in enumerate(job.images.shape)]


def require_sizes(sizes: str) -> None:
    """Check whether sizes are to be open.

    Raises:
        ConfigurationError: It is neither.
    """
    if sizes not in get_args(Sizes):
        raise ConfigurationError(f"sizes={sizes!r} is unknown; choose from {', '.join(get_args(Sizes))}")


def _require_open(program: ExportedProgram, axes: dict[int, Any]) -> None:
    """Tracers fix an axis silently where the code depends on its length."""
    inputs = set(program.graph_signature.user_inputs)
    images = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs)
    fixed = [axis for axis in axes if str(images.meta["val"].shape[axis]).isdecimal()]  # open ones are symbols
    if fixed:
        raise ConfigurationError(
            f"the model's code fixes the {' and '.join(AXES[axis] for axis in fixed)} of its images, which "
            "sizes='dynamic' would leave open; use sizes='fixed'"
        )
