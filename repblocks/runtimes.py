"""What executes a model in a benchmark, on one thread: PyTorch, its compiler, and runtimes of exported graphs."""

import importlib.util
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.errors import ConfigurationError
from repblocks.names import known_name

Run = Callable[[Tensor], Any]
Graph = Callable[[], Path]
"""Gives the model's ONNX file, which is written when the first runtime asks for it."""


def eager(model: nn.Module, images: Tensor, graph: Graph) -> Run:
    """PyTorch, operation by operation."""
    return model


def compiled(model: nn.Module, images: Tensor, graph: Graph) -> Run:
    """``torch.compile``, compiled before it is timed."""
    run: Run = torch.compile(model)
    with torch.no_grad():
        run(images)
    return run


def onnxruntime_session(model: nn.Module, images: Tensor, graph: Graph) -> Run:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def openvino_session(model: nn.Module, images: Tensor, graph: Graph) -> Run:
    """OpenVINO on the CPU, in float32 as the others."""
    session = compiled_by_openvino(graph(), INFERENCE_NUM_THREADS=1, NUM_STREAMS=1, PERFORMANCE_HINT="LATENCY")
    return lambda images: session(images.numpy())


def compiled_by_openvino(*files: Path, **settings: Any) -> Any:
    """What executes OpenVINO's files, or an ONNX file, on the CPU, in the precision of the model.

    Where the CPU computes in bfloat16, OpenVINO would by default. It also gives the thread that compiles a stack for
    signals, and takes that away with the compiled model: of several models that go in another order than they came,
    it leaves a stack that is gone, on which the next signal ends the process. So a thread of its own compiles.

    Raises:
        RuntimeError: OpenVINO does not accept the files.
    """
    import openvino  # pyright: ignore[reportMissingImports]  # an extra

    def compiled() -> Any:
        core: Any = openvino.Core()
        return openvino.compile_model(core.read_model(*files), "CPU", {**settings, "INFERENCE_PRECISION_HINT": "f32"})

    with ThreadPoolExecutor(1) as aside:
        return aside.submit(compiled).result()


RUNTIMES: Mapping[str, Callable[[nn.Module, Tensor, Graph], Run]] = {
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


@contextmanager
def opened(models: Mapping[str, nn.Module], images: Tensor) -> Generator[Callable[[str], dict[str, Run]]]:
    """Gives a function that opens all models in a runtime: ``runs_in("onnxruntime")[name](images)``.

    Each model is written as a graph at most once, whatever the number of runtimes; the files go with the block.

    Args:
        models: In eval mode, on the CPU, by name.
        images: ``[N, C, H, W]``, as the models will read them.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{place}.onnx" for place, name in enumerate(models)}
        graphs = {name: cache(partial(_written, model, files[name], images)) for name, model in models.items()}

        def runs_in(runtime: str) -> dict[str, Run]:
            return {name: RUNTIMES[runtime](model, images, graphs[name]) for name, model in models.items()}

        yield runs_in


def _written(model: nn.Module, path: Path, images: Tensor) -> Path:
    """A model as an ONNX graph, as it is: not collapsed, not verified."""
    program = torch.onnx.export(model, (images,), dynamo=True, input_names=["images"], verbose=False)
    assert program is not None
    program.save(path)
    return path
