"""Everything a report says, measured once; the page and the pictures only show it."""

import copy
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from repblocks.deploy_form import deploy_form_of
from repblocks.errors import ConfigurationError
from repblocks.graph import CollapseReport
from repblocks.images import random_images
from repblocks.profiling import latency_ms, profile
from repblocks.progress import Track, untracked
from repblocks.quantization.ranges import RangeReport, range_report
from repblocks.report.blocks import BlockFacts, Cost, deployed_kernels, measure_blocks
from repblocks.report.kernels import KernelFacts
from repblocks.report.shortcuts import ShortcutFacts, measure_shortcuts
from repblocks.report.sources import Run, Source, read_source
from repblocks.verification import EquivalenceReport, verify

IMAGES = 2
"""Random images that a report measures on, where it is given none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A report without its looks.

    Attributes:
        title: The model's name.
        input_size: ``(channels, height, width)`` that everything was measured on.
        train: Cost of the train form; None for a model that has only one form.
        deploy: Cost of the deploy form.
        equivalence: The two forms compared; None where there is one.
        blocks: The blocks of the library, in the model's order.
        shortcuts: Whether those are better absorbed or kept; None for a model without a choice.
        collapsed: What `repblocks.collapse` did beside those blocks, or in a model that has none; None where it was
            not needed.
        kernels: The convolutions of the deploy form.
        ranges: What int8 would do to each layer of it.
        run: What training recorded.
        environment: Where the report was made.
    """

    title: str
    input_size: tuple[int, ...]
    train: Cost | None
    deploy: Cost
    equivalence: EquivalenceReport | None
    blocks: tuple[BlockFacts, ...]
    shortcuts: ShortcutFacts | None
    collapsed: CollapseReport | None
    kernels: tuple[KernelFacts, ...]
    ranges: RangeReport
    run: Run
    environment: Mapping[str, str]


def gather(source: nn.Module | str | Path, *, inputs: Tensor | None = None, track: Track = untracked) -> Facts:
    """Read and measure.

    Args:
        source: A run folder of train.py, a deploy folder, a checkpoint, a ``.safetensors`` file, or a model.
        inputs: Images ``[N, C, H, W]`` to measure on, in float32 on the CPU; by default random ones of
            ``model.pretrained_cfg["input_size"]``.
        track: Shows how far it is.

    Raises:
        CheckpointError: There is no such file or folder, or it is damaged.
        ConfigurationError: The model does not say which images it takes.
        FoldError: A block does not fold.
    """
    read = read_source(source)
    images = _images(read.model, inputs)
    with torch.no_grad():
        return _measured(read, copy.deepcopy(read.model).cpu().float().eval(), images, track)


def _measured(read: Source, model: nn.Module, images: Tensor, track: Track) -> Facts:
    channels, height, width = images.shape[1:]
    shipped = deploy_form_of(model, images)
    plain, differs = shipped.model, shipped.differs_from(model)
    forms = {"train": model, "deploy": plain} if differs else {"deploy": plain}
    costs = _costs(forms, images)
    blocks = tuple(measure_blocks(model, images, track=track))
    kernels = [kernel for block in blocks for kernel in block.kernels] if blocks else deployed_kernels(plain)
    return Facts(
        title=read.title,
        input_size=tuple(images.shape[1:]),
        train=costs.get("train"),
        deploy=costs["deploy"],
        equivalence=verify(model, plain, images) if differs else None,
        blocks=blocks,
        shortcuts=measure_shortcuts(model, (channels, height, width), track=track),
        collapsed=shipped.report,
        kernels=tuple(kernels),
        ranges=range_report(model if blocks else plain, images),
        run=read.run,
        environment=environment(),
    )


def _images(model: nn.Module, inputs: Tensor | None) -> Tensor:
    size = vars(model).get("pretrained_cfg", {}).get("input_size")
    if inputs is None and size is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no pretrained_cfg['input_size'], so no images can be drawn for it; pass some "
            "with inputs=images, [N, C, H, W]"
        )
    if inputs is not None:
        return inputs.detach().cpu().float()
    return random_images(IMAGES, size)


def _costs(forms: Mapping[str, nn.Module], images: Tensor) -> dict[str, Cost]:
    times = latency_ms(forms, images[:1], repeats=30, warmup=5)
    counted = {name: profile(form, tuple(images.shape[1:])) for name, form in forms.items()}
    return {name: Cost(params=count.params, macs=count.macs, latency_ms=times[name]) for name, count in counted.items()}


def environment() -> dict[str, str]:
    """The machine and the versions that the numbers were measured with; no name that identifies the machine."""
    names = ("repblocks", "torch", "timm", "matplotlib", "onnxruntime", "openvino")
    packages = {name: version(name) for name in names if find_spec(name) is not None}
    return {
        "python": platform.python_version(),
        **packages,
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "threads used for latency": "1",
    }
