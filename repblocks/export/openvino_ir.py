"""OpenVINO's IR: a graph in XML with its weights beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repblocks.errors import CheckpointError
from repblocks.export.jobs import Job
from repblocks.runtimes import compiled_by_openvino


def write(job: Job, xml: Path, weights: Path) -> dict[str, Any]:
    """The traced graph, in the precision of the model.

    Raises:
        OSError: OpenVINO could not write the files.
    """
    import openvino

    model: Any = openvino.convert_model(job.program)
    _name(model)
    try:
        openvino.save_model(model, xml, compress_to_fp16=False)
        xml.with_suffix(".bin").replace(weights)
    except RuntimeError as error:
        raise OSError(str(error).strip()) from error
    finally:
        xml.with_suffix(".bin").unlink(missing_ok=True)
    return {}


def open_files(xml: Path, weights: Path) -> Callable[[Tensor], Any]:
    """What runs the files on the CPU: a tensor, or a list of them where the model gives several.

    Raises:
        CheckpointError: OpenVINO does not accept the files.
    """
    try:
        compiled = compiled_by_openvino(xml, weights)
    except RuntimeError as error:
        raise CheckpointError(f"{xml} is not a model that OpenVINO runs ({error}); export it again") from error

    def run(images: Tensor) -> Any:
        outputs = [torch.from_numpy(np.array(output)) for output in compiled(images.numpy()).values()]
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _name(model: Any) -> None:
    """Names by position: OpenVINO's own count up from export to export, and make equal models unequal files."""
    model.set_friendly_name("network")
    for index, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{index}")
    model.input().get_tensor().set_names({"images"})
    for index, output in enumerate(model.outputs):
        output.get_tensor().set_names({"output" if len(model.outputs) == 1 else f"output_{index}"})
