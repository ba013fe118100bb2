"""What executes a model in a benchmark, on one thread: PyTorch, its compiler, and runtimes of exported graphs."""

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.errors import ConfigurationError
from repblocks.names import known_name

Run = Callable[[Tensor], Any]


def eager(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """PyTorch, operation by operation."""
    return model.eval()


def compiled(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """``torch.compile``, compiled before it is timed."""
    run: Run = torch.compile(model.eval())
    with torch.no_grad():
        run(images)
    return run


def onnxruntime_session(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = written(model, folder / "model.onnx", images)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def openvino_session(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """OpenVINO on the CPU."""
    import openvino  # pyright: ignore[reportMissingImports]  # an extra

    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    session: Any = openvino.compile_model(written(model, folder / "model.onnx", images), "CPU", settings)
    return lambda images: session(images.numpy())


def written(model: nn.Module, path: Path, images: Tensor) -> Path:
    """A model as an ONNX graph, as it is: not collapsed, not verified."""
    program = torch.onnx.export(model.eval(), (images,), dynamo=True, input_names=["images"], verbose=False)
    assert program is not None
    program.save(path)
    return path


RUNTIMES: Mapping[str, Callable[[nn.Module, Tensor, Path], Run]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime_session,
    "openvino": openvino_session,
}
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnxscript"),
    "openvino": ("openvino", "onnxscript"),
}
_EXTRAS = {"onnxruntime": "export", "openvino": "export,openvino"}


def usable_runtimes(names: Sequence[str] | None = None) -> list[str]:
    """The runtimes asked for; all that are installed, where none are.

    Raises:
        ConfigurationError: An unknown one, or one whose packages are not installed.
    """
    if names is None:
        return [name for name in RUNTIMES if not _missing(name)]
    for name in names:
        known_name("runtimes", name, RUNTIMES)
        if missing := _missing(name):
            raise ConfigurationError(
                f'the runtime {name} needs {", ".join(missing)}; run: pip install "repblocks[{_EXTRAS[name]}]"'
            )
    return list(names)


def _missing(name: str) -> list[str]:
    return [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]


def opened(runtime: str, models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Run]:
    """Models in one runtime, by name."""
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Run] = {}
        for name, model in models.items():
            place = Path(folder) / name
            place.mkdir()
            runs[name] = RUNTIMES[runtime](model, images, place)
    return runs
