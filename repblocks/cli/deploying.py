"""Commands about deploy files: writing them, and using them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Group
from rich.text import Text
from torch import nn

from repblocks.cli.output import AsJson, pairs, progress, show, table, working
from repblocks.cli.sources import Size, Source, model_from, size_of
from repblocks.deploy_form import deploy_form_of
from repblocks.expansion.contract import contracted
from repblocks.export import USUAL_FORMATS, load_deploy
from repblocks.images import random_images
from repblocks.names import known_name

Sizes = Annotated[bool, typer.Option("--dynamic-size", help="Graphs take images of any size.")]
Pixels = Annotated[str, typer.Option("--pixels", help="What graphs take: normalized, unit ([0, 1]) or uint8.")]
Preparation = Annotated[
    str, typer.Option("--int8-preparation", help="none, equalized, corrected, ..., or best, which tries all.")
]
Data = Annotated[list[str] | None, typer.Argument(help="Data for comparing and calibrating: data=digits data.root=...")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("export")(export)
    app.command("predict")(predict)


def export(
    checkpoint: Source,
    overrides: Data = None,
    out: Annotated[Path, typer.Option("--out", help="The deploy folder.")] = Path("deploy"),
    formats: Annotated[
        str | None, typer.Option("--format", help="Separated by commas; safetensors,onnx, or what the model allows.")
    ] = None,
    size: Size = None,
    dynamic_size: Sizes = False,
    pixels: Pixels = "normalized",
    opset: Annotated[int | None, typer.Option("--opset", help="Of ONNX; the exporter's own by default.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write model.int8.onnx too, calibrated on the data.")] = False,
    preparation: Preparation = "none",
    max_drop: Annotated[float, typer.Option("--max-drop", help="Accuracy that int8 may cost.")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Collapse, write deploy files, and prove each of them equal in its own runtime."""
    from repblocks.export import export as write

    with working("exporting", as_json=as_json):
        model = model_from(checkpoint)
        data = _data(model, overrides or []) if overrides or int8 else None
        images = random_images(8, size_of(model, size)) if data is None else data.test_images(64)
        report = write(
            contracted(model),
            out,
            formats=_usual(model) if formats is None else formats.split(","),
            inputs=images,
            sizes="dynamic" if dynamic_size else "fixed",
            pixels=cast("Any", pixels),
            opset=opset,
            source=_weights_file(checkpoint),
        )
    files = {
        name: {"file": str(path), "equivalence": report.equivalence[name].to_dict()}
        for name, path in report.files.items()
    }
    with working("quantizing", as_json=as_json):
        quantized = _quantized(model, data, out, preparation, max_drop) if int8 else None
    result = {"manifest": str(report.manifest), "files": files, "float16": report.half_range.to_dict()}
    text = partial(_said, files, str(report.half_range), quantized)
    show({**result, "int8": quantized and quantized.to_dict()}, text, as_json=as_json)


def _usual(model: nn.Module) -> tuple[str, ...]:
    """Formats for whom nothing chooses: a model of the user's has no name under which weights could be loaded."""
    return USUAL_FORMATS if "model_name" in vars(model) else ("onnx", "pt2")


def _weights_file(source: str) -> Path | None:
    """The file whose hash ``deploy.json`` notes; None for a name or a function."""
    places = [source, source.partition("@")[2], f"{source}/checkpoints/best.ckpt", f"{source}/model.safetensors"]
    return next((Path(place) for place in places if Path(place).is_file()), None)


def _said(files: dict[str, Any], half: str, quantized: Any) -> Any:
    rows = [
        (name, of["file"], f"{of['equivalence']['relative_error']:.1e}", f"{of['equivalence']['tolerance']:.0e}")
        for name, of in files.items()
    ]
    lines = [Text(half), *([] if quantized is None else [Text(str(quantized))])]
    return Group(table("", ("format", "file", "relative error", "at most"), rows), *lines)


def _quantized(model: nn.Module, data: Any, folder: Path, preparation: str, max_drop: float) -> Any:
    """Calibrate on validation images, and measure the gate on test images."""
    from repblocks.quantization import PREPARATIONS, best_prepared, prepared, quantize

    known_name("preparation", preparation, [*PREPARATIONS, "best"])
    images = [images for images, *_ in data.val_dataloader()]
    plain = deploy_form_of(model, images[0]).model
    best = preparation == "best"
    candidate = best_prepared(plain, images).model if best else prepared(plain, images, cast("Any", preparation))
    return quantize(candidate, images, folder, reference=plain, labelled=data.test_dataloader(), max_drop=max_drop)


def _data(model: nn.Module, overrides: Sequence[str]) -> Any:
    """The data, from which the model also learns the names of its classes, where it knew none."""
    from repblocks.training.validation import completed, data_for

    data = data_for(model, overrides)
    completed(model, data)
    return data


def predict(
    deploy: Annotated[Path, typer.Argument(help="A deploy folder, one of its files, or a file of rb.save.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option("--top", help="Classes per image.")] = 5,
    runtime: Annotated[str | None, typer.Option("--runtime", help="Which of its files to run; told by itself.")] = None,
    as_json: AsJson = False,
) -> None:
    """Name the most probable classes of images, from a deploy folder alone."""
    with working("opening", as_json=as_json):
        model = load_deploy(deploy, runtime=runtime)
    found = [model.predict([path], top=top)[0] for path in progress(images, "predicting", as_json=as_json)]
    result = {str(path): [each.to_dict() for each in best] for path, best in zip(images, found, strict=True)}
    lines = {str(path): ", ".join(map(str, best)) for path, best in zip(images, found, strict=True)}
    show(result, lambda: pairs(lines), as_json=as_json)
