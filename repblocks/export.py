"""Deploy files: collapsed, run in their own runtime, compared with what was trained, and only then kept."""

import copy
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repblocks.blocks.base import deployed
from repblocks.checkpoint import load, save
from repblocks.errors import ConfigurationError, VerificationError
from repblocks.files import replacing
from repblocks.header import describe, dtype_of
from repblocks.verification import HALF_PRECISION, EquivalenceReport, block_errors, most_different, verify

#: Images drawn at random for the comparison, beside those that the caller gives. The rule for half precision compares
#: two maxima of rounding errors: on 4 images 3% of equal models fail it, on 16 less than 1%.
RANDOM_IMAGES, RANDOM_IMAGES_IN_HALF_PRECISION = 4, 16
_LARGEST_ONNX_BYTES = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file just written: what executes it, and facts about it for ``deploy.json``."""

    run: Callable[[Tensor], Any]
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way to write deploy models.

    Attributes:
        filename: Name of the file in the export folder.
        packages: Python packages beyond repblocks' own requirements.
        write: ``write(deploy_model, path, images)`` writes the file and returns what executes it.
    """

    filename: str
    packages: tuple[str, ...] = ()
    write: Callable[[nn.Module, Path, Tensor], Written]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        files: Path by format.
        equivalence: Comparison of each file, run in its own runtime, with the model that was exported.
        manifest: Path of ``deploy.json``.
    """

    files: Mapping[str, Path]
    equivalence: Mapping[str, EquivalenceReport]
    manifest: Path


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    formats: Iterable[str] = ("safetensors", "onnx"),
    inputs: Tensor | None = None,
) -> ExportReport:
    """Write the deploy form of a model, and ``deploy.json`` that describes the files.

    Every file is written under a temporary name, executed in its own runtime and compared with the model as given.
    Only when all of them agree do they get their names; otherwise the folder stays as it was.

    Args:
        model: In train or deploy form, on any device; it is not changed.
        folder: Made if it is missing; files of an earlier export are replaced, or removed if their
            format is not chosen now.
        formats: Keys of ``FORMATS``.
        inputs: Real images ``[N, C, H, W]`` to compare on, beside random ones. Their size becomes the input size of
            the ONNX graph, whose batch axis is dynamic; otherwise that is ``model.pretrained_cfg["input_size"]``.

    Raises:
        ConfigurationError: An unknown format, packages that are not installed, a dtype or size that a format cannot
            hold, no known input size, or ``inputs`` that the model does not take.
        CheckpointError: No registered name rebuilds the model, which safetensors needs; or a file cannot be written.
        VerificationError: A file or the deploy form differs from the model; the message names the block that
            differs most.
    """
    chosen = check_formats(formats)
    folder = Path(folder)
    reference = copy.deepcopy(model).cpu().eval()
    batches = _batches(reference, inputs)
    deploy = deployed(reference)
    _compare("the deploy form", reference, deploy, deploy, batches)
    entries: dict[str, dict[str, Any]] = {}
    equivalence: dict[str, EquivalenceReport] = {}
    with ExitStack() as files:  # closes in reverse: the manifest gets its name after the files it describes
        manifest = files.enter_context(replacing(folder / "deploy.json"))
        for name, format in chosen.items():
            path = files.enter_context(replacing(folder / format.filename))
            written = format.write(deploy, path, batches[0])
            equivalence[name] = _compare(f"the {name} file", reference, written.run, deploy, batches)
            entries[name] = {"file": format.filename, **_fingerprint(path), **written.facts}
            entries[name]["equivalence"] = equivalence[name].to_dict()
        manifest.write_text(json.dumps(_manifest(deploy, chosen, entries), indent=2) + "\n", encoding="utf-8")
    _remove_stale(folder, chosen.values())
    paths = {name: folder / format.filename for name, format in chosen.items()}
    return ExportReport(files=paths, equivalence=equivalence, manifest=folder / "deploy.json")


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
        if missing := _missing_packages(format):
            raise ConfigurationError(
                f"the {name} format needs {', '.join(missing)}, not installed here; "
                'run: pip install "repblocks[export]", or choose other formats'
            )
    return chosen


def _remove_stale(folder: Path, chosen: Iterable[Format]) -> None:
    """Remove what an earlier export wrote in formats that the new ``deploy.json`` does not describe."""
    for filename in {format.filename for format in FORMATS.values()} - {format.filename for format in chosen}:
        if (path := folder / filename).is_file():
            path.unlink()


def installed_formats() -> list[str]:
    """The formats whose packages are installed."""
    return [name for name, format in FORMATS.items() if not _missing_packages(format)]


def _missing_packages(format: Format) -> list[str]:
    return [package for package in format.packages if importlib.util.find_spec(package) is None]


def _batches(model: nn.Module, inputs: Tensor | None) -> list[Tensor]:
    """Random images, the same in every export, and the given ones; in the model's dtype."""
    config: dict[str, Any] = vars(model).get("pretrained_cfg", {})
    if inputs is None and "input_size" not in config:
        raise ConfigurationError(
            f"{type(model).__name__} has no pretrained_cfg['input_size'] to draw images of; "
            "pass some with inputs=images"
        )
    if inputs is not None:
        _require_accepted(model, inputs)
    size = config["input_size"] if inputs is None else inputs.shape[1:]
    dtype = dtype_of(model)
    count = RANDOM_IMAGES_IN_HALF_PRECISION if dtype in HALF_PRECISION else RANDOM_IMAGES
    drawn = torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
    return [images.detach().cpu().to(dtype) for images in (drawn, inputs) if images is not None]


def _require_accepted(model: nn.Module, inputs: Tensor) -> None:
    """Run one of the images: a model of the user's own does not say which it takes."""
    channels = vars(model).get("model_args", {}).get("in_chans", "C")
    needed = f"export needs inputs=images of shape [N, {channels}, H, W]"
    if inputs.ndim != 4 or not inputs.numel() or channels not in ("C", inputs.shape[1]):
        raise ConfigurationError(f"{needed}, and got {list(inputs.shape)}")
    try:
        with torch.inference_mode():
            model(inputs[:1].detach().cpu().to(dtype_of(model)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(
            f"{needed} that the model runs on; on {list(inputs.shape)} {type(model).__name__} says: {error}"
        ) from error


def _compare(
    what: str, reference: nn.Module, run: Callable[[Tensor], Any], deploy: nn.Module, batches: list[Tensor]
) -> EquivalenceReport:
    """The worst report over the batches, if all pass."""
    reports = [verify(reference, run, images) for images in batches]
    for report, images in zip(reports, batches, strict=True):
        if not report.passed:
            blame = _blame(reference, run, deploy, images)
            raise VerificationError(f"{what} differs from the exported model: {report}; {blame}; no file was written")
    worst = max(reports, key=lambda report: report.relative_error)
    return replace(worst, samples=sum(report.samples for report in reports))


def _blame(reference: nn.Module, run: Callable[[Tensor], Any], deploy: nn.Module, images: Tensor) -> str:
    """The block to look at; for a runtime that shows no blocks, that of the model the file was written from."""
    errors = block_errors(reference, run if isinstance(run, nn.Module) else deploy, images)
    name = most_different(errors)
    block = f"the block that differs most is {name or type(reference).__name__!r} (relative error {errors[name]:.2g})"
    return (
        block if isinstance(run, nn.Module) else f"before it was written {block}, so look at the writer or its runtime"
    )


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _manifest(
    deploy: nn.Module, formats: Mapping[str, Format], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    about = describe(deploy)
    del about["format_version"]
    about["versions"] |= {package: version(package) for format in formats.values() for package in format.packages}
    params = sum(parameter.numel() for parameter in deploy.parameters())
    return {**about, "params": params, "files": entries}


def _write_safetensors(deploy: nn.Module, path: Path, images: Tensor) -> Written:
    save(deploy, path)
    return Written(run=load(path))


def _write_onnx(deploy: nn.Module, path: Path, images: Tensor) -> Written:
    """One file with a dynamic batch axis, executed by onnxruntime on the CPU."""
    import onnx

    _require_onnx_can_hold(deploy)
    names = ["output"] if isinstance(deploy(images[:1]), Tensor) else None
    program = torch.onnx.export(
        deploy,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=names,
        verbose=False,
    )
    assert program is not None
    assert program.exported_program is not None
    proto = program.model_proto
    _require_same_layers(program.exported_program, proto)
    _remove_debug_information(proto)
    onnx.save_model(proto, path)
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    return Written(run=_onnx_session(path), facts={"opset": opset, "input_size": list(images.shape[1:])})


def _require_onnx_can_hold(deploy: nn.Module) -> None:
    parameters = list(deploy.parameters())
    others = {parameter.dtype for parameter in parameters} - {torch.float32, torch.float16}
    if others:
        raise ConfigurationError(
            f"the onnx format cannot hold {others.pop()}: onnxruntime has no CPU convolution for it, so the file could "
            "not be compared with the model; export model.float(), or choose formats=('safetensors',)"
        )
    size = sum(parameter.nbytes for parameter in parameters)
    if size >= _LARGEST_ONNX_BYTES:
        raise ConfigurationError(
            f"an ONNX file holds at most 2 GiB, the weights need {size / 2**30:.1f} GiB; export model.half(), or "
            "choose formats=('safetensors',)"
        )


def _require_same_layers(traced: torch.export.ExportedProgram, proto: Any) -> None:
    """The graph must run as many convolutions as the deploy model does, and bring no BatchNorm back."""
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    kinds = [node.op_type for node in proto.graph.node]
    expected = sum(call.startswith("aten.conv") for call in calls)
    convolutions = sum(kind in ("Conv", "ConvTranspose") for kind in kinds)
    norms = sum("batch_norm" in call for call in calls)
    if convolutions != expected or kinds.count("BatchNormalization") > norms:
        raise VerificationError(
            f"the ONNX graph has {convolutions} convolutions and {kinds.count('BatchNormalization')} BatchNorms, the "
            f"deploy model {expected} and {norms}; no file was written; report this with the versions of torch and "
            "onnxscript"
        )


def _remove_debug_information(proto: Any) -> None:
    """Drop stack traces: they hold paths of this machine, and make equal models unequal files."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]


def _onnx_session(path: Path) -> Callable[[Tensor], Any]:
    """Run the file, the first image by itself: the batch axis has to be dynamic."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Any:
        batches = [batch.numpy() for batch in (images[:1], images[1:]) if len(batch)]
        outputs = zip(*(session.run(None, {"images": batch}) for batch in batches), strict=True)
        tensors = [torch.cat([torch.from_numpy(part) for part in parts]) for parts in outputs]
        return tensors[0] if len(tensors) == 1 else tensors

    return run


FORMATS: dict[str, Format] = {
    "safetensors": Format(filename="model.safetensors", write=_write_safetensors),
    "onnx": Format(filename="model.onnx", packages=("onnx", "onnxscript", "onnxruntime"), write=_write_onnx),
}
