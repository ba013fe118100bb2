"""The report as one file: facts and pictures put into the page."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from repblocks.benchmark import TIE
from repblocks.files import replacing
from repblocks.progress import Track, untracked
from repblocks.report import texts
from repblocks.report.facts import Facts, gather
from repblocks.report.figures import Picture, pictures
from repblocks.report.figures.pictures import KERNELS_SHOWN, featured
from repblocks.report.figures.style import inline_svg, write_files


def write_report(
    source: nn.Module | str | Path,
    path: str | Path,
    *,
    figures: str | Path | None = None,
    inputs: Tensor | None = None,
    track: Track = untracked,
) -> list[Path]:
    """Measure a model in both forms and write what was found as one HTML page that needs nothing else.

    The page has no script or style from elsewhere, reads in light and dark, prints, and its tables sort by click or
    key.

    Args:
        source: A run folder of train.py, a deploy folder, a ``.ckpt`` or ``.safetensors`` file, or a model, best in
            train form; it is not changed. A model without blocks of ours is collapsed by `repblocks.collapse`.
        path: Of the page; it appears complete or not at all.
        figures: A folder for each picture as PNG and SVG.
        inputs: Images ``[N, C, H, W]`` to measure on, by default random ones of the model's input size.
        track: Shows how far it is: ``track(items, what)`` gives the items again, one by one.

    Returns:
        The files written, the page first.

    Raises:
        CheckpointError: The source is missing or damaged, or a file cannot be written.
        ConfigurationError: matplotlib or jinja2 is not installed, or nothing says which images the model takes.
        FoldError: A block does not fold.
    """
    facts = gather(source, inputs=inputs, track=track)
    page = render(facts, track=track)
    with replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return [Path(path), *([] if figures is None else _write_figures(facts, Path(figures), track))]


def _write_figures(facts: Facts, folder: Path, track: Track) -> list[Path]:
    drawn = track(list(pictures(facts).values()), "writing figures")
    return [file for picture in drawn for file in write_files(picture.name, picture.draw, folder)]


def render(facts: Facts, *, track: Track = untracked) -> str:
    """The page; equal facts give equal pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("repblocks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(texts.FILTERS)
    return environment.get_template("report.html.j2").render(
        facts=facts,
        run=facts.run,
        svg={picture.name: _inlined(picture) for picture in track(list(pictures(facts).values()), "drawing")},
        featured=featured(facts.blocks) if facts.blocks else None,
        kernels_shown=KERNELS_SHOWN,
        tie=TIE,
        cards=texts.cards(facts),
        training=texts.training(facts),
        config=yaml.safe_dump(dict(facts.run.config), sort_keys=False) if facts.run.config else "",
        notes=texts.notes(facts),
        environment=environment_of(facts),
        style=_asset("report.css"),
        script=_asset("report.js"),
    )


def environment_of(facts: Facts) -> Mapping[str, Mapping[str, Any]]:
    """Where the model was trained, if that is known, and where the report was made."""
    trained = facts.run.summary.get("versions") or facts.run.manifest.get("versions")
    return {**({"training": trained} if trained else {}), "this report": facts.environment}


def _inlined(picture: Picture) -> str:
    return inline_svg(picture.name, picture.label, picture.draw)


def _asset(name: str) -> str:
    return resources.files("repblocks.report").joinpath("templates", name).read_text(encoding="utf-8")
