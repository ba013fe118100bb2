"""What `collapse` did, in rows: regions that were merged, and candidates that were left, with the reasons."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from repblocks.verification import EquivalenceReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One tensor that is calculated in a new way.

    Attributes:
        name: The module whose place the new layer takes, or whose code it is new in.
        modules: What went in: layers by path, and functions by name.
        result: The new layer.
        error: Relative error of the new layer on what the old ones read; None where it was not measured.
        params_before, params_after: Parameters.
        macs_before, macs_after: Multiply-accumulates on the example input.
    """

    name: str
    modules: tuple[str, ...]
    result: str
    error: float | None
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int

    def __str__(self) -> str:
        error = "-" if self.error is None else f"{self.error:.1e}"
        return (
            f"{self.name}: {len(self.modules)} -> {self.result}, error {error}, params {self.params_before:,} -> "
            f"{self.params_after:,}, MACs {self.macs_before:,} -> {self.macs_after:,}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Something linear, or with linear layers inside, that was left as it is.

    Attributes:
        name: The layer or module.
        reason: In words.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseReport:
    """Every region and everything skipped.

    Attributes:
        regions: What was merged.
        skipped: What was left, and why.
        rewritten: Modules whose code was rewritten, so that their class is gone.
        equivalence: The whole model on the example input; None if it was not compared.
        other_sizes: What comparing on inputs of another size gave, in words.
    """

    regions: Sequence[Region]
    skipped: Sequence[Skipped]
    rewritten: Sequence[str]
    equivalence: EquivalenceReport | None
    other_sizes: str

    def followed_by(self, other: "CollapseReport") -> "CollapseReport":
        """The report of two collapses, one after the other."""
        rewritten = [*self.rewritten, *(name for name in other.rewritten if name not in self.rewritten)]
        return replace(other, regions=[*self.regions, *other.regions], rewritten=rewritten)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        equivalence = self.equivalence.to_dict() if self.equivalence else None
        return {**asdict(self), "equivalence": equivalence}

    def __str__(self) -> str:
        verified = [f"verified: {self.equivalence}", f"other sizes: {self.other_sizes}"] if self.equivalence else []
        return "\n".join(
            [
                _title(self.regions, "collapsed", "region"),
                *(f"  {region}" for region in self.regions),
                _title(self.skipped, "left", "candidate"),
                *(f"  {skipped}" for skipped in self.skipped),
                *([f"rewritten code: {', '.join(self.rewritten)}"] if self.rewritten else []),
                *verified,
            ]
        )


def _title(rows: Sequence[Any], verb: str, noun: str) -> str:
    return f"{verb} {len(rows)} {noun}{'' if len(rows) == 1 else 's'}"
