"""Training a plain network with expanded convolutions, and shipping the plain network."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from repblocks.blocks import BLOCKS
from repblocks.errors import ConfigurationError
from repblocks.expansion.expand import expand
from repblocks.expansion.report import ExpansionReport
from repblocks.names import known_name

REASONS_SHOWN, NAMES_SHOWN = 4, 3


def expanded(model: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, ExpansionReport | None]:
    """Expand a model as configured.

    Args:
        model: Not changed.
        config: Group ``model.expand``: ``block``, ``where`` and ``init``, as `repblocks.expand` takes them.

    Returns:
        The expanded copy and the report; the model itself and None where no block is configured.

    Raises:
        ConfigurationError: An unknown block or ``init``, a ``where`` that matches no convolution or comes without a
            block, or nothing that can be expanded.
    """
    block, where = config["block"], config["where"]
    if block is None and where is None:
        return model, None
    if block is None:
        raise ConfigurationError(f"model.expand.where={where} needs model.expand.block, one of {', '.join(BLOCKS)}")
    known_name("model.expand.block", str(block), BLOCKS)
    known_name("model.expand.init", str(config["init"]), ("preserve", "fresh"))
    _require_globs(where)
    bigger, report = expand(model, block, where=where, init=config["init"])
    if not report.expanded:
        reasons = "; ".join(_reasons(report)) or "the model has no convolution"
        raise ConfigurationError(
            f"model.expand.block={block} expands nothing in {type(model).__name__}: {reasons}; choose another "
            "block, or other layers by model.expand.where"
        )
    return bigger, report


def _require_globs(where: Any) -> None:
    names = where if isinstance(where, list) else [where]
    if where is not None and not (names and all(isinstance(name, str) for name in names)):
        raise ConfigurationError(
            f"model.expand.where={where} needs to be a name with wildcards, or a list of such: "
            "model.expand.where=layer1.* or model.expand.where=[layer1.*,layer2.*]"
        )


def remarks_on(report: ExpansionReport) -> list[str]:
    """How many convolutions are trained as blocks, and why others are not."""
    total = len(report.expanded) + len(report.skipped)
    done = f"{len(report.expanded)} of {total} convolutions are trained as {report.block!r} blocks"
    return [f"{done}, and exported as the convolutions that they were", *(f"  {line}" for line in _reasons(report))]


def _reasons(report: ExpansionReport) -> list[str]:
    """Each reason for a skipped convolution with the names that it holds for, the commonest first."""
    names = defaultdict[str, list[str]](list)
    for row in report.skipped:
        names[row.reason].append(row.name)
    common = sorted(names.items(), key=lambda entry: -len(entry[1]))
    lines = [f"{len(found)} stay ({_some(found)}): {reason}" for reason, found in common[:REASONS_SHOWN]]
    left = sum(len(found) for _, found in common[REASONS_SHOWN:])
    return [*lines, *([f"{left} stay for other reasons"] if left else [])]


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
