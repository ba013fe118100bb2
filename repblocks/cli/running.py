"""Commands that run data through models: training and validation."""

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from repblocks.cli.output import AsJson, show
from repblocks.cli.sources import Source, model_from


def register(app: typer.Typer) -> None:
    """Add the commands."""
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("train", context_settings=passed_on)(train)
    app.command("validate")(validate)


def train(context: typer.Context) -> None:
    """Train, collapse, verify and export: what train.py does, with Hydra's arguments (repblocks train --help).

    With --json the summaries of the runs (several with --multirun) are printed, and all else goes to stderr.
    """
    from repblocks.training.entry import main, summary_of, validation_error

    sys.argv = ["repblocks train", *(argument for argument in context.args if argument != "--json")]
    if "--json" not in context.args:
        main()
        return
    summaries: list[dict[str, Any]] = []

    def task(config: Any) -> float | None:
        summary = summary_of(config)
        summaries.extend([] if summary is None else [summary.to_dict()])
        return validation_error(summary)

    with redirect_stdout(sys.stderr):
        main(task)
    show(summaries, str, as_json=True)


def validate(
    checkpoint: Source,
    overrides: Annotated[list[str] | None, typer.Argument(help="The data group's values: data=digits ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the test accuracy of both forms."""
    from repblocks.training.console import quiet_lightning, summary_table
    from repblocks.training.validation import validate as measured

    quiet_lightning()
    with redirect_stdout(sys.stderr):  # progress bars
        summary: Any = measured(model_from(checkpoint), overrides or [])
    show(summary.to_dict(), lambda: summary_table(summary), as_json=as_json)
