"""The ``data`` group of the configuration, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

from repblocks.errors import ConfigurationError
from repblocks.names import known_name
from repblocks.training.data.batches import Size
from repblocks.training.data.reading import BadImages
from repblocks.training.data.resizing import Growth
from repblocks.training.data.transforms import Preprocessing

Sides = int | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The ``data`` group of the configuration; ``configs/data/`` documents each value.

    Raises:
        ConfigurationError: A value of a wrong kind or out of range.
    """

    name: str
    image_size: Sides
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float
    batch_size: int
    workers: int
    drop_last: bool
    augment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    root: str | None = None
    download: bool = False
    eval_size: Sides | None = None
    progressive: Mapping[str, Any] = field(default_factory=dict[str, Any])
    in_memory: bool = False
    bad_images: BadImages = "error"
    train_split: str = "train"
    val_split: str = "validation"
    test_split: str | None = None
    classes: int | str | None = None

    def __post_init__(self) -> None:
        for key, (fits, needed) in _CHECKS.items():
            if not fits(getattr(self, key)):
                raise ConfigurationError(f"data.{key}={getattr(self, key)} needs to be {needed}; see configs/data/")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "DataConfig":
        """The configuration in ``values``.

        Raises:
            ConfigurationError: A key that does not exist, one that is missing, or a wrong value.
        """
        for key in values:
            known_name("data", key, [known.name for known in fields(cls)])
        required = [known.name for known in fields(cls) if known.default is known.default_factory is MISSING]
        if missing := [key for key in required if key not in values]:
            raise ConfigurationError(f"the data group lacks {', '.join(missing)}; add +data.KEY=VALUE for each")
        return cls(**values)

    def preprocessing(self) -> Preprocessing:
        """The part of it that travels with the model: the evaluation's size, not the training's.

        Gray images of colour statistics get their averages.
        """
        height, width = _size(self.image_size if self.eval_size is None else self.eval_size)
        return Preprocessing(
            input_size=(self.in_chans, height, width),
            mean=_for_channels(self.in_chans, self.mean),
            std=_for_channels(self.in_chans, self.std),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )

    def growth(self, epochs: int) -> Growth:
        """The size of training images in each of ``epochs`` epochs.

        Raises:
            ConfigurationError: ``progressive`` has unknown keys, lacks some, or begins above ``image_size``.
        """
        end = _size(self.image_size)
        if not self.progressive:
            return Growth(start=end, end=end, epochs=0)
        for key in self.progressive:
            known_name("data.progressive", key, _PROGRESSIVE)
        values = {key: self.progressive.get(key) for key in _PROGRESSIVE}
        if not _is_size(values["start"]) or not _is_fraction(values["until"]):
            raise ConfigurationError(
                f"data.progressive={dict(self.progressive)} needs to be start (pixels, or [height, width]) and until "
                "(a fraction of the epochs, above 0 and at most 1), such as {start: 128, until: 0.8}; see configs/data/"
            )
        start = _size(cast("Sides", values["start"]))
        if any(small > large for small, large in zip(start, end, strict=True)):
            raise ConfigurationError(
                f"data.progressive.start={values['start']} is above data.image_size={self.image_size}, which images "
                "grow to; lower it"
            )
        return Growth(start=start, end=end, epochs=cast("float", values["until"]) * epochs)


def _size(sides: Sides) -> Size:
    if isinstance(sides, int):
        return sides, sides
    height, width = sides
    return height, width


def _for_channels(channels: int, values: Sequence[float]) -> tuple[float, ...]:
    """One value per channel where gray and colour meet; other counts stay, and are refused later."""
    if {channels, len(values)} == {1, 3}:
        return (sum(values) / len(values),) * channels
    return tuple(values)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: Any) -> bool:
    sides = cast("list[Any]", value if isinstance(value, list | tuple) else [value, value])
    return len(sides) == 2 and all(_is_whole(side, 1) for side in sides)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in cast("list[Any]", value))


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_PROGRESSIVE = ("start", "until")

_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": (_is_size, "a number of pixels, or [height, width]"),
    "eval_size": (lambda value: value is None or _is_size(value), "a number of pixels, [height, width] or null"),
    "in_chans": (lambda value: _is_whole(value, 1), "a whole number, at least 1"),
    "mean": (_are_numbers, "a list of numbers, one per channel"),
    "std": (_are_numbers, "a list of numbers, one per channel"),
    "crop_pct": (_is_fraction, "above 0 and at most 1"),
    "batch_size": (lambda value: _is_whole(value, 1), "a whole number, at least 1"),
    "workers": (lambda value: _is_whole(value, 0), "a whole number, at least 0"),
    "drop_last": (lambda value: isinstance(value, bool), "true or false"),
    "in_memory": (lambda value: isinstance(value, bool), "true or false"),
    "bad_images": (lambda value: value in ("error", "skip"), "error or skip"),
    "augment": (lambda value: isinstance(value, Mapping), "a group of values"),
    "progressive": (lambda value: value is None or isinstance(value, Mapping), "a group of values, {} for none"),
    "train_split": (_is_text, "the name of a split"),
    "val_split": (_is_text, "the name of a split"),
    "test_split": (lambda value: value is None or _is_text(value), "the name of a split, or null"),
    "classes": (
        lambda value: value is None or _is_text(value) or _is_whole(value, 1),
        "a number of classes, a file with a class name per line, or null",
    ),
}
