"""ONNX: one file, executed by onnxruntime on the CPU before it is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repblocks.errors import CheckpointError, ConfigurationError, VerificationError
from repblocks.export.jobs import AXES, Job

#: Older operator sets are beyond torch's exporter, which would write another one with a warning.
OLDEST_OPSET = 18
_LARGEST_ONNX_BYTES = 2**31


def write(job: Job, path: Path) -> dict[str, Any]:
    """The traced graph as ONNX.

    Raises:
        ConfigurationError: Too many weights for one file, or an operator set that torch does not write.
        VerificationError: The graph has other layers than the deploy model, or leftovers of training.
    """
    import onnx

    _require_room(job.deploy)
    _require_opset(job.opset)
    proto = _converted(job)
    _require_same_layers(job.program, proto)
    _require_no_leftovers(proto)
    _remove_debug_information(proto)
    onnx.save_model(proto, path)
    return {"opset": _opset(proto), "batch_norms": [node.op_type for node in proto.graph.node].count(_NORM)}


def open_file(path: Path) -> Callable[[Tensor], Any]:
    """What runs the file in onnxruntime: a tensor, or a list of them where the model gives several.

    Raises:
        CheckpointError: onnxruntime does not accept the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors are raised; without this they are printed too
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every status
        raise CheckpointError(f"{path} is not a model that onnxruntime runs ({error}); export it again") from error
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Any:
        outputs = [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _converted(job: Job) -> Any:
    with torch.no_grad():
        names = ["output"] if isinstance(job.graph(job.images[:1]), Tensor) else None
    program = torch.onnx.export(
        job.program,
        (job.images,),
        dynamo=True,
        dynamic_shapes=({axis: AXES[axis] for axis in ((0, 2, 3) if job.sizes == "dynamic" else (0,))},),
        input_names=["images"],
        output_names=names,
        opset_version=job.opset,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    if job.opset not in (None, _opset(proto)):
        raise ConfigurationError(
            f"torch wrote opset {_opset(proto)} where opset={job.opset} was asked for; choose that one, or leave it out"
        )
    return proto


def _opset(proto: Any) -> int:
    return next(entry.version for entry in proto.opset_import if not entry.domain)


def _require_opset(opset: int | None) -> None:
    import onnx.defs

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ConfigurationError(
            f"opset={opset} is not one that torch writes; choose from {OLDEST_OPSET} to {newest}, or leave it out"
        )


def _require_room(deploy: nn.Module) -> None:
    size = sum(parameter.nbytes for parameter in deploy.parameters())
    if size >= _LARGEST_ONNX_BYTES:
        raise ConfigurationError(
            f"an ONNX file holds at most 2 GiB, the weights need {size / 2**30:.1f} GiB; export model.half(), or "
            "choose formats=('safetensors',)"
        )


_NORM = "BatchNormalization"
_TRAINING = ("Dropout",)


def _require_same_layers(traced: ExportedProgram, proto: Any) -> None:
    """The graph must run as many convolutions as the deploy model does, and bring no BatchNorm back."""
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    kinds = [node.op_type for node in proto.graph.node]
    expected = sum(call.startswith("aten.conv") for call in calls)
    convolutions = sum(kind in ("Conv", "ConvTranspose") for kind in kinds)
    norms = sum("batch_norm" in call for call in calls)
    if convolutions != expected or kinds.count(_NORM) > norms:
        raise VerificationError(
            f"the ONNX graph has {convolutions} convolutions and {kinds.count(_NORM)} BatchNorms, the "
            f"deploy model {expected} and {norms}; no file was written; report this with the versions of torch and "
            "onnxscript"
        )


def _require_no_leftovers(proto: Any) -> None:
    """Nothing that only training needs: dropout, statistics of batches, weights that no layer reads."""
    graph = proto.graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    found = [node.op_type for node in graph.node if node.op_type in _TRAINING or _is_in_training(node)]
    found += [weight.name for weight in graph.initializer if weight.name not in read]
    if found:
        raise VerificationError(
            f"the ONNX graph keeps {len(found)} leftovers of training (such as {found[0]!r}); no file was written; "
            "report this with the versions of torch and onnxscript"
        )


def _is_in_training(node: Any) -> bool:
    return any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)


def _remove_debug_information(proto: Any) -> None:
    """Drop names of classes and files: they hold paths of this machine, and make equal models unequal files."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]
