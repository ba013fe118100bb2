"""What an expansion did, and what it left and why."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Init = Literal["preserve", "fresh"]
Preserved = Literal["train and eval", "eval only", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedRow:
    """One convolution that became a block.

    Attributes:
        name: Of the convolution, and of the block now.
        norm: Name of the BatchNorm that went into the block, if any.
        before, after: What was there, and what is.
        params_before, params_after: Learned numbers of either.
        preserves: The modes in which the function is the same.
    """

    name: str
    norm: str | None
    before: str
    after: str
    params_before: int
    params_after: int
    preserves: Preserved

    def __str__(self) -> str:
        behind = f" + {self.norm}" if self.norm else ""
        counts = f"{self.params_before} -> {self.params_after} parameters"
        return f"{self.name}{behind}: {self.before} becomes {self.after}, {counts}, preserves {self.preserves}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRow:
    """One convolution that stayed, and the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionReport:
    """What `expand` did.

    Attributes:
        block, init: As asked for.
        expanded: The convolutions that became blocks, in the model's order.
        skipped: Those that were meant by ``where`` and stayed.
    """

    block: str
    init: Init
    expanded: tuple[ExpandedRow, ...]
    skipped: tuple[SkippedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {
            **asdict(self),
            "expanded": [asdict(r) for r in self.expanded],
            "skipped": [asdict(r) for r in self.skipped],
        }

    def __str__(self) -> str:
        total = len(self.expanded) + len(self.skipped)
        head = f"{len(self.expanded)} of {total} convolutions became {self.block!r} blocks, init={self.init!r}"
        warning = "" if self.expanded else "; WARNING: nothing was expanded, the model is a plain copy"
        rows = [f"  expanded {row}" for row in self.expanded] + [f"  skipped {row}" for row in self.skipped]
        return "\n".join([head + warning, *rows])
