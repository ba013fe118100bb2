"""ONNX Runtime's static quantization: a model and images in, an int8 file out."""

import logging
import tempfile
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from repblocks.errors import ConfigurationError
from repblocks.export import FORMATS, Job

PERCENTILE = 99.99
Calibration = Literal["minmax", "percentile"]
METHODS: Mapping[Calibration, str] = {"minmax": "MinMax", "percentile": "Percentile"}


def write_int8(
    deploy: nn.Module,
    batches: Sequence[Tensor],
    path: Path,
    *,
    method: Calibration = "minmax",
    weight_bits: int = 8,
    in_float: Collection[str] = (),
) -> None:
    """Quantize a float32 model in deploy form by way of a float file, in a folder that goes.

    Args:
        deploy: In eval mode on the CPU.
        batches: Images ``[N, C, H, W]`` that set the ranges of the activations.
        path: Where to write.
        method: How ranges are taken from the activations.
        weight_bits: 7 or 8.
        in_float: Names of layers that are not quantized.

    Raises:
        ConfigurationError: One of those is none that the graph shows as one operation with its weight.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        plain, prepared = Path(scratch, "model.onnx"), Path(scratch, "prepared.onnx")
        FORMATS["onnx"].write(
            Job(reference=deploy, deploy=deploy, graph=deploy, images=_at_least_two(batches[0])), plain
        )
        # Shapes only: the graph is collapsed, and the optimizer would hide which tensor is whose.
        quant_pre_process(plain, prepared, skip_optimization=True, skip_symbolic_shape=True)
        infinite = _without_infinities(prepared)
        quantize_static(
            prepared,
            path,
            _reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=weight_bits == 7,
            nodes_to_exclude=[*_operations_of(in_float, prepared), *infinite],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[METHODS[method]],
            extra_options={"CalibPercentile": PERCENTILE},
        )


def _operations_of(layers: Collection[str], path: Path) -> list[str]:
    """The names of what reads the layers' weights in an ONNX graph."""
    import onnx

    nodes = onnx.load(path).graph.node
    found = {name: [node.name for node in nodes if f"{name}.weight" in node.input] for name in layers}
    if missing := [name for name, readers in found.items() if not readers]:
        raise ConfigurationError(
            f"the ONNX graph does not show {missing[0]!r} as one operation with its weight, so it cannot be kept in "
            "float; leave it out of in_float"
        )
    return [name for readers in found.values() for name in readers]


def _without_infinities(path: Path) -> list[str]:
    """Write the largest number in place of infinite constants, and give the names of what reads them: not for integers.

    A maximum is padded by minus infinity, of which the quantizer would calculate a scale.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    infinite: set[str] = set()
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.FLOAT and np.isinf(values).any():
            infinite.add(tensor.name)
            tensor.CopyFrom(numpy_helper.from_array(np.nan_to_num(values, nan=np.nan), tensor.name))
    onnx.save_model(proto, path)
    return [node.name for node in proto.graph.node if infinite & set(node.input)]


def _at_least_two(images: Tensor) -> Tensor:
    """torch.export takes a batch of one for a constant."""
    return images if len(images) > 1 else images.repeat(2, 1, 1, 1)


def _reader(batches: Sequence[Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]  # its None is unannotated
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()


@contextmanager
def _quiet() -> Generator[None]:
    """ONNX Runtime's quantizer advises on the root logger what is done here, and prints how it gets on."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(None):
            yield
    finally:
        root.setLevel(level)
