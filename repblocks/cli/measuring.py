"""Commands that measure: speed in several runtimes, and the report page."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from repblocks.cli.output import AsJson, progress, show, table
from repblocks.cli.sources import Size, Source, model_from, parsed_size, size_of
from repblocks.images import random_images
from repblocks.runtimes import usable_runtimes


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("benchmark")(benchmark)
    app.command("report")(report)


def benchmark(
    models: Annotated[list[str], typer.Argument(help="Names, checkpoints, folders, or module:function.")],
    runtimes: Annotated[
        str | None, typer.Option("--runtimes", help="eager,compile,onnxruntime,openvino; those installed by default.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Images at a time.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds, of which the median counts.")] = 20,
    size: Size = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it, as .png or .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time train form, deploy form and timm's twin in several runtimes, in turns on one thread."""
    from repblocks.benchmark import compare_forms, compare_shortcuts, draw, has_shortcuts, require_drawable

    chosen = usable_runtimes(runtimes and runtimes.split(","))
    if plot is not None:
        require_drawable(plot)
    rows: list[dict[str, Any]] = []
    shortcuts: list[dict[str, Any]] = []
    for name in progress(models, "measuring", as_json=as_json):
        model = model_from(name)
        how: Any = {"size": size_of(model, size), "runtimes": chosen, "batch": batch, "repeats": repeats}
        rows += compare_forms(name, model, **how)
        shortcuts += compare_shortcuts(model, **how) if has_shortcuts(model) else []
    if plot is not None:
        draw(rows, plot)
    result = {"threads": 1, "batch": batch, "rows": rows, "shortcuts": shortcuts}
    show(result, lambda: _tables(rows, shortcuts, batch), as_json=as_json)


def _tables(rows: list[dict[str, Any]], shortcuts: list[dict[str, Any]], batch: int) -> Any:
    """The forms; and of models whose shortcuts can be absorbed, whether that pays."""
    titles = f"milliseconds (medians), {batch} image(s), 1 thread", "shortcuts of the same: absorbed or kept"
    columns = ("model", "runtime", "train", "deploy", "timm", "train/\ndeploy", "timm/\ndeploy")
    cells = [
        (
            row["model"],
            row["runtime"],
            *(_number(row[f"{side}_ms"]) for side in ("train", "deploy", "timm")),
            *(_number(row[f"{side}_over_deploy"]) for side in ("train", "timm")),
        )
        for row in rows
    ]
    forms = table(titles[0], columns, cells)
    ways = [
        (row["model"], row["runtime"], *(_number(row[key]) for key in _SHORTCUT_KEYS), row["faster"])
        for row in shortcuts
    ]
    columns = ("model", "runtime", "absorb", "keep", "keep / absorb", "recommended")
    return Group(forms, table(titles[1], columns, ways)) if ways else forms


_SHORTCUT_KEYS = ("absorb_ms", "keep_ms", "keep_over_absorb")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def report(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option("--figures", help="PNG and SVG of each figure go here.")] = None,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained page about a model: blocks, kernels, curves, costs."""
    from repblocks.report import write_report

    path = Path(source)
    written = write_report(
        path if path.exists() else model_from(source),
        out,
        figures=figures,
        inputs=None if size is None else random_images(2, parsed_size(size)),
        track=partial(progress, as_json=as_json),
    )
    files = [str(file) for file in written]
    show({"written": files}, lambda: "\n".join(["written:", *(f"  {file}" for file in files)]), as_json=as_json)
