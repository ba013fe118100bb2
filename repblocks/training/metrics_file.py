"""``metrics.csv``: one row per epoch, which a resumed run goes on with."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger

from repblocks.files import replacing


class MetricsFile(Logger):
    """A logger whose rows are part of a run's checkpoints.

    Lightning's ``CSVLogger`` deletes the file of the run that is resumed, and splits an epoch over several rows.

    Args:
        path: The file; it is replaced as a whole, so it is complete at every moment.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """None: the run folder is the version."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        self.rows.append({**{key: float(value) for key, value in metrics.items()}, "step": float(step or 0)})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: they stand in ``run.yaml``."""

    @rank_zero_only
    def save(self) -> None:
        """Write all rows; columns are the names in alphabetic order."""
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, sorted({key for row in self.rows for key in row}))
        writer.writeheader()
        writer.writerows({key: _shown(value) for key, value in row.items()} for row in self.rows)
        with replacing(self.path) as temporary:
            temporary.write_text(table.getvalue(), newline="")


def _shown(value: float) -> float | int:
    """Whole numbers, such as epochs and steps, without a point."""
    return int(value) if value.is_integer() else value
