"""Commands about models: what there is, what they are made of, what collapses, what is equal."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from rich.tree import Tree
from torch import nn

from repblocks.blocks.base import RepBlock, deployed, form_of
from repblocks.checkpoint import save
from repblocks.cli.output import AsJson, progress, show, table, working
from repblocks.cli.sources import (
    Size,
    Source,
    arguments_from,
    model_from,
    program_from,
    size_of,
    weights_in,
)
from repblocks.graph import CollapseReport
from repblocks.graph import collapse as collapse_graph
from repblocks.images import random_images
from repblocks.models.registry import create_model, list_models
from repblocks.profiling import profile
from repblocks.report.anatomy import anatomy
from repblocks.report.blocks import blocks_in_train_form, folded
from repblocks.report.kernels import in_words


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (("list", list_), ("describe", describe), ("collapse", collapse), ("verify", verify)):
        app.command(name)(command)
    app.command("convert")(convert)


def list_(
    pattern: Annotated[str, typer.Argument(help="Shell-style wildcard; 'resnet*' for timm's models.")] = "rb_*",
    as_json: AsJson = False,
) -> None:
    """List models with parameters and MACs of both forms."""
    rows = [_costs(name) for name in progress(list_models(pattern), "counting", as_json=as_json)]
    columns = ("model", "input", "params (M)\ntrain", "\ndeploy", "MACs (G)\ntrain", "\ndeploy")
    show(rows, lambda: table("", columns, map(_cost_row, rows)), as_json=as_json)


def _costs(name: str) -> dict[str, Any]:
    with torch.device("meta"):  # shapes are all that counting needs
        model = create_model(name)
    size = size_of(model)
    forms = {"train": model, "deploy": deployed(model)}
    return {"model": name, "input_size": size, **{form: profile(it, size).to_dict() for form, it in forms.items()}}


def _cost_row(row: dict[str, Any]) -> list[str]:
    train, deploy = row["train"], row["deploy"]
    millions = [f"{form['params'] / 1e6:.2f}" for form in (train, deploy)]
    return [row["model"], str(row["input_size"][1]), *millions, *(f"{f['macs'] / 1e9:.2f}" for f in (train, deploy))]


def describe(
    model: Source,
    as_json: AsJson = False,
) -> None:
    """Show a model's blocks, their branches, and what each folds into."""
    with working("reading", as_json=as_json):
        network = model_from(model)
        size = size_of(network)
        costs = profile(network, size).to_dict()
        blocks = {name: _described(block, new) for name, block, new in blocks_in_train_form(network)}
        found = None if blocks else collapse_graph(network, random_images(2, size)).report
    result = {"model": type(network).__name__, "form": form_of(network), **costs, "blocks": blocks}
    regions = [] if found is None else [asdict(region) for region in found.regions]
    show({**result, "regions": regions}, lambda: _tree(result, found), as_json=as_json)


def _described(block: RepBlock, new: Mapping[str, nn.Module]) -> dict[str, Any]:
    parts = anatomy(block)
    return {
        "kind": type(block).__name__,
        "before": parts.before,
        "branches": {branch.name: branch.layers for branch in parts.branches},
        "joined": parts.joined,
        "after": parts.after,
        "folds_into": {child: in_words(value) for child, value in folded(block, new).items()},
    }


def _tree(result: dict[str, Any], found: CollapseReport | None) -> Tree:
    head = f"{result['model']}, {result['form']} form, {result['params']:,} params, {result['macs']:,} MACs"
    tree = Tree(Text(head))
    for name, block in result["blocks"].items():
        node = tree.add(Text(f"{name or 'model'}: {block['kind']} = {'; '.join(block['folds_into'].values())}"))
        for branch, layers in block["branches"].items():
            node.add(Text(f"{branch}: {_chain(layers) or 'identity'}"))
        for place in ("before", "after"):
            if block[place]:
                node.add(Text(f"{place} the branches: {_chain(block[place])}"))
    if found is not None:
        merged = tree.add(Text(f"no block of repblocks; collapse merges {len(found.regions)} regions of its graph"))
        for region in found.regions:
            merged.add(Text(f"{', '.join(region.modules)} = {region.result}"))
    return tree


def _chain(layers: Iterable[str]) -> str:
    return " - ".join(layers)


def collapse(
    model: Source,
    out: Annotated[Path | None, typer.Option("--out", help="Write the collapsed weights here.")] = None,
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Collapse any model by its graph, and say what was merged and what was left."""
    with working("collapsing", as_json=as_json):
        network = model_from(model)
        small, report = collapse_graph(network, random_images(2, size_of(network, size)))
        if out is not None:
            _write(small, out)
    show({**report.to_dict(), "written": out and str(out)}, lambda: str(report), as_json=as_json)


def _write(model: nn.Module, path: Path) -> None:
    """Write a model with all that rebuilds it where one of ours was collapsed, else its weights."""
    if any(isinstance(module, RepBlock) for module in model.modules()):
        save(model, path)
        return
    from safetensors.torch import save_file

    from repblocks.files import replacing

    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)


def verify(
    reference: Source,
    candidate: Annotated[str, typer.Argument(help="What should compute the same; a deploy graph (.onnx, ...) too.")],
    size: Size = None,
    count: Annotated[int, typer.Option("--count", help="Random images to compare on.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Compare two models on the same images; exit code 1 where they differ."""
    from repblocks.verification import verify as compare

    with working("comparing", as_json=as_json):
        first, second = model_from(reference), program_from(candidate)
        report = compare(first, second, random_images(count, size_of(first, size)))
    show(report.to_dict(), lambda: str(report), as_json=as_json)
    report.raise_if_different(candidate)


def convert(
    weights: Annotated[Path, typer.Argument(help="Weights of timm, of a paper's repository, or of ours.")],
    out: Annotated[Path, typer.Option("--out", help="A safetensors file.")],
    model: Annotated[str | None, typer.Option("--model", help="Our name of the model; told by the weights.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="Whose names they have; told by them.")] = None,
    target: Annotated[str, typer.Option("--target", help="Whose names to give.")] = "repblocks",
    arg: Annotated[list[str], typer.Option("--arg", help="Of the model, such as num_classes=10.")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Rename weights between libraries."""
    from safetensors.torch import save_file

    from repblocks.convert import convert as rename
    from repblocks.files import replacing

    with working("renaming", as_json=as_json):
        given = weights_in(weights)
        renamed = rename(given, model=model, source=source, target=target, **arguments_from(arg))
        with replacing(out) as temporary:
            save_file({name: value.clone().contiguous() for name, value in renamed.items()}, temporary)
    result = {"weights": str(weights), "written": str(out), "tensors": len(renamed)}
    show(result, lambda: f"{len(renamed)} tensors written to {out}", as_json=as_json)
