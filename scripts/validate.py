"""Test accuracy of a training checkpoint, or of a safetensors file of repblocks, in every form it has."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import get_console

from repblocks.training import readable_errors
from repblocks.training.console import quiet_lightning, summary_table
from repblocks.training.validation import validate

EXAMPLES = """examples:
  python scripts/validate.py runs/NAME/DATE/checkpoints/best.ckpt
  python scripts/validate.py runs/NAME/DATE/deploy/model.safetensors data=digits
  python scripts/validate.py best.ckpt data=imagefolder data.root=photos data.batch_size=32
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt of train.py, or a .safetensors of rb.save or rb.export")
    parser.add_argument("overrides", nargs="*", metavar="data...", help="the data group's values, as for train.py")
    options = parser.parse_args(arguments)
    with readable_errors():
        quiet_lightning()
        summary = validate(options.checkpoint, options.overrides)
        get_console().print(summary_table(summary))


if __name__ == "__main__":
    sys.exit(main())
