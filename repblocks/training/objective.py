"""What training minimises: a loss of mixed images and smoothed labels, and of a teacher's outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from timm.data.mixup import Mixup, mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy  # pyright: ignore[reportPrivateImportUsage]
from timm.task import DistillationTeacher
from torch import Tensor, nn

from repblocks.checkpoint import load
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models.registry import create_model
from repblocks.names import known_name
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.data.transforms import Preprocessing

LOSSES = ("cross_entropy", "bce")
KINDS = ("soft", "hard")


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


Checks = Mapping[str, tuple[Callable[[Any], bool], str]]
_SHARE = (_is_share, "from 0 to 1")
_ALPHA = (lambda value: _is_number(value) and value >= 0, "a number, at least 0; 0 is none")
_CHECKS: Checks = {
    "label_smoothing": (lambda value: _is_share(value) and value < 1, "from 0 to below 1; 0.1 is usual, 0 is none"),
    "mixup": _ALPHA,
    "cutmix": _ALPHA,
    "mixup_prob": _SHARE,
    "mixup_switch_prob": _SHARE,
    "mixup_off_epoch": (_is_whole, "a number of epochs, at least 0; 0 mixes all"),
}
_TEACHER_CHECKS: Checks = {
    "weight": _SHARE,
    "temperature": (lambda value: _is_number(value) and value > 0, "a number above 0; 1 to 4 is usual"),
}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The part ``distillation`` of the ``objective`` group, which documents each value.

    Raises:
        ConfigurationError: A value of a wrong kind or out of range.
    """

    teacher: str | None = None
    checkpoint: str | None = None
    kind: Literal["soft", "hard"] = "soft"
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        known_name("objective.distillation.kind", str(self.kind), KINDS)
        _check(self, _TEACHER_CHECKS, "objective.distillation.")

    @property
    def is_wanted(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or self.checkpoint is not None


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The ``objective`` group of the configuration; ``configs/objective/`` documents each value.

    Raises:
        ConfigurationError: A value of a wrong kind or out of range.
    """

    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0
    distillation: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        known_name("objective.loss", str(self.loss), LOSSES)
        _check(self, _CHECKS, "objective.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ObjectiveConfig":
        """The configuration in ``values``; what they leave out has its default.

        Raises:
            ConfigurationError: A key that does not exist, or a wrong value.
        """
        given = dict(values)
        _require_known("objective", given, cls)
        about_teacher = given.pop("distillation", None) or {}
        _require_known("objective.distillation", about_teacher, Distillation)
        return cls(**given, distillation=Distillation(**about_teacher))


def _require_known(group: str, values: Mapping[str, Any], kind: type[ObjectiveConfig | Distillation]) -> None:
    for key in values:
        known_name(group, key, [known.name for known in fields(kind)])


def _check(values: object, checks: Checks, prefix: str) -> None:
    for key, (fits, needed) in checks.items():
        value = getattr(values, key)
        if not fits(value):
            raise ConfigurationError(f"{prefix}{key}={value} needs to be {needed}; see configs/objective/")


class Teacher:
    """A trained network that gives its logits for the student's images; no part of any module, it is never trained.

    It follows the images to their device and dtype, and takes them in its own normalisation.

    Args:
        network: The teacher.
        preprocessing: How the student's images are normalised.
        classes: Number of classes.

    Raises:
        ConfigurationError: The teacher does not take such images, or has other classes.
    """

    def __init__(self, network: DistillationTeacher, preprocessing: Preprocessing, classes: int) -> None:
        self.network = network.requires_grad_(requires_grad=False).eval()
        self.mean, self.std = (_per_channel(values) for values in (preprocessing.mean, preprocessing.std))
        channels = preprocessing.input_size[0]
        network.mean_kd, network.std_kd = (_fit(network.get_buffer(name), channels) for name in ("mean_kd", "std_kd"))
        _require_classes(self, preprocessing.input_size, classes)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of normalised images ``[N, C, H, W]``."""
        network, place = self.network, (images.device, images.dtype)
        if (network.mean_kd.device, network.mean_kd.dtype) != place:
            network.to(*place)
        own = network.normalize_input(images, self.mean.to(*place), self.std.to(*place))
        return network(own)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, :, None, None]


def _fit(values: Tensor, channels: int) -> Tensor:
    """The statistics of gray images are the averages of those of colour, as everywhere in the data."""
    return values.mean(1, keepdim=True).expand(-1, channels, -1, -1) if values.shape[1] != channels else values


def _require_classes(teacher: Teacher, size: tuple[int, int, int], classes: int) -> None:
    try:
        shape = tuple(teacher(torch.zeros(1, *size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigurationError(
            f"the teacher of objective.distillation fails on images of {size}: {error}; choose one that takes the size "
            "and channels of the data"
        ) from error
    if shape != (1, classes):
        raise ConfigurationError(
            f"the teacher of objective.distillation gives {shape} for one image, needed are scores of {classes} "
            "classes; choose one that was trained on the same classes"
        )


def make_teacher(config: Mapping[str, Any], preprocessing: Preprocessing, classes: int) -> Teacher | None:
    """The teacher of the group ``objective``, or None without one.

    A published model is downloaded. A file is read without running code of its: a checkpoint of train.py or a file of
    ``rb.save`` where no ``teacher`` is named, else weights of that model, as timm reads them.

    Args:
        config: The group.
        preprocessing: Of the student's images.
        classes: Number of classes.

    Raises:
        ConfigurationError: A wrong value, or a teacher of other images or classes.
        CheckpointError: A file that is missing, damaged or of another model, or weights that cannot be fetched.
    """
    wanted = ObjectiveConfig.of(config).distillation
    if not wanted.is_wanted:
        return None
    return Teacher(_network(wanted, preprocessing.input_size[0], classes), preprocessing, classes)


def _network(wanted: Distillation, channels: int, classes: int) -> DistillationTeacher:
    if wanted.checkpoint is None:
        assert wanted.teacher is not None
        return DistillationTeacher(create_model(wanted.teacher, pretrained=True, in_chans=channels))
    if wanted.teacher is not None:
        return _from_weights(wanted.teacher, wanted.checkpoint, channels, classes)
    path = Path(wanted.checkpoint)
    return DistillationTeacher(model_from_checkpoint(path) if path.suffix == ".ckpt" else load(path))


def _from_weights(name: str, path: str, channels: int, classes: int) -> DistillationTeacher:
    """A model of timm's registry with weights from a file of timm's."""
    create_model(name, num_classes=classes, in_chans=channels)  # an unknown name is said clearly there
    try:
        return DistillationTeacher(name, num_classes=classes, in_chans=channels, pretrained_path=path)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"objective.distillation.checkpoint={path} does not give the weights of {name} for {classes} classes: "
            f"{error or 'there is no such file'}; give a file of its state_dict, or leave out "
            "objective.distillation.teacher for a file of train.py or rb.save"
        ) from error


class Objective:
    """Mixed images and their targets, and the loss of their logits.

    It is no module: nothing of it is trained, averaged or part of a state dict. Random numbers are numpy's.

    Args:
        config: The group ``objective``.
        classes: Number of classes.
        teacher: As `make_teacher` gives it for the same group.

    Raises:
        ConfigurationError: An unknown key, a value out of range, fewer than two classes, or a teacher that is asked for
            and not given.

    Source: Zhang et al. 2018, "mixup", https://arxiv.org/abs/1710.09412; Yun et al. 2019, "CutMix",
    https://arxiv.org/abs/1905.04899; Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
    https://arxiv.org/abs/1503.02531; for hard distillation Touvron et al. 2021, "DeiT",
    https://arxiv.org/abs/2012.12877.
    """

    def __init__(self, config: Mapping[str, Any], classes: int, teacher: Teacher | None = None) -> None:
        self.config, self.classes, self.teacher = ObjectiveConfig.of(config), classes, teacher
        if classes < 2:
            raise ConfigurationError(
                f"objective.loss={self.config.loss} with {classes} class learns nothing; needed are at least 2 classes"
            )
        if self.config.distillation.is_wanted and teacher is None:
            raise ConfigurationError("objective.distillation names a teacher, which was not given; see make_teacher")
        self._mixup = self._make_mixup() if self.config.mixup or self.config.cutmix else None
        self._hard, self._soft = self._make_losses()

    def mix(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The batch to train on: mixed images and targets ``[N, classes]``, or the same images and labels ``[N]``.

        Image i is mixed with image N - 1 - i, so the last one of an odd batch stays as it is. The given tensors are
        not changed.

        Args:
            images: ``[N, C, H, W]``.
            labels: ``[N]``.
            epoch: From 0; without mixing from ``mixup_off_epoch`` on.
        """
        off = self.config.mixup_off_epoch
        if self._mixup is None or (off and epoch >= off):
            return images, labels
        even = len(images) - len(images) % 2
        targets = mixup_target(labels, self.classes, 1.0, self.config.label_smoothing)
        if even:
            mixed, targets[:even] = self._mixup(images[:even].clone(), labels[:even])
            images = torch.cat([mixed, images[even:]])
        # Binary cross-entropy rounds to the dtype of the targets.
        return images, targets.to(torch.promote_types(targets.dtype, images.dtype))

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The mean loss of a batch; with a teacher ``(1 - weight)`` times that, and ``weight`` times the distillation.

        Args:
            logits: ``[N, classes]`` of the images.
            targets: As `mix` gives them.
            images: As `mix` gives them; the teacher sees the same.
        """
        labelled = (self._soft if targets.is_floating_point() else self._hard)(logits, targets)
        if self.teacher is None:
            return labelled
        weight = self.config.distillation.weight
        return (1 - weight) * labelled + weight * self._distance(logits, self.teacher(images))

    def _distance(self, logits: Tensor, taught: Tensor) -> Tensor:
        about = self.config.distillation
        if about.kind == "hard":
            return nn.functional.cross_entropy(logits, taught.argmax(1))
        own, other = ((scores / about.temperature).log_softmax(1) for scores in (logits, taught))
        divergence = nn.functional.kl_div(own, other, reduction="batchmean", log_target=True)
        # A softer distribution has gradients smaller by the square of the temperature.
        return about.temperature**2 * divergence

    def _make_mixup(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        mixup = Mixup(
            mixup_alpha=self.config.mixup,
            cutmix_alpha=self.config.cutmix,
            prob=self.config.mixup_prob,
            switch_prob=self.config.mixup_switch_prob,
            label_smoothing=self.config.label_smoothing,
            num_classes=self.classes,
        )
        return cast("Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]", mixup)

    def _make_losses(self) -> tuple[nn.Module, nn.Module]:
        """For labels and for mixed targets, which are smoothed already."""
        smoothing = self.config.label_smoothing
        if self.config.loss == "bce":
            return BinaryCrossEntropy(smoothing), BinaryCrossEntropy(smoothing)
        return nn.CrossEntropyLoss(label_smoothing=smoothing), SoftTargetCrossEntropy()
