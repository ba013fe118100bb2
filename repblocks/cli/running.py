"""Commands that run data through models: training and validation."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from repblocks.cli.output import AsJson, show


def register(app: typer.Typer) -> None:
    """Add the commands."""
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("train", context_settings=passed_on)(train)
    app.command("validate")(validate)


def train(context: typer.Context) -> None:
    """Train, collapse, verify and export: what train.py does, with Hydra's arguments (repblocks train --help)."""
    from repblocks.training.entry import main

    sys.argv = ["repblocks train", *context.args]
    main()


def validate(
    checkpoint: Annotated[Path, typer.Argument(help="A .ckpt of train.py, or a .safetensors of rb.save or rb.export.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="The data group's values: data=digits ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the test accuracy of both forms."""
    from repblocks.training.console import quiet_lightning, summary_table
    from repblocks.training.validation import validate as measured

    quiet_lightning()
    summary: Any = measured(checkpoint, overrides or [])
    show(summary.to_dict(), lambda: summary_table(summary), as_json=as_json)
