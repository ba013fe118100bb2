import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

import repblocks as rb
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.header import describe
from repblocks.models.registry import carry
from repblocks.training.checkpoints.restore import ENTRY
from repblocks.training.data.transforms import Preprocessing
from repblocks.training.objective import Objective, ObjectiveConfig, Teacher, make_teacher

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = 5
COLOUR = Preprocessing(input_size=(3, 32, 32), mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
MIXED = {"mixup": 0.8, "cutmix": 1.0}


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's mixup draws from it


def batch(count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and logits."""
    images = torch.randn(count, 3, 32, 32, dtype=dtype)
    return images, torch.arange(count) % CLASSES, torch.randn(count, CLASSES, dtype=dtype, requires_grad=True)


def one_hot(labels: Tensor, smoothing: float = 0.0) -> Tensor:
    return (1 - smoothing) * F.one_hot(labels, CLASSES).double() + smoothing / CLASSES


def test_the_default_configuration_is_plain_cross_entropy() -> None:
    assert ObjectiveConfig.of(group("default")) == ObjectiveConfig()
    objective = Objective(group("default"), CLASSES)
    images, labels, logits = batch()
    same, targets = objective.mix(images, labels, 0)
    assert same is images
    assert targets is labels
    assert torch.equal(objective.loss(logits, targets, images), F.cross_entropy(logits, labels))


def group(name: str) -> dict[str, Any]:
    """The group as train.py composes it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose(f"objective/{name}"), resolve=True)["objective"]  # pyright: ignore


def test_the_configuration_of_mixing_composes() -> None:
    objective = Objective(group("mixed"), CLASSES)
    config = objective.config
    assert (config.mixup, config.cutmix, config.label_smoothing, config.loss) == (0.8, 1.0, 0.1, "cross_entropy")
    images, labels, _ = batch()
    assert objective.mix(images, labels, 0)[1].shape == (6, CLASSES)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_labels_are_the_targets_of_either_loss(smoothing: float) -> None:
    images, labels, logits = batch()
    targets = one_hot(labels, smoothing)
    found = {
        loss: Objective({"loss": loss, "label_smoothing": smoothing}, CLASSES).loss(logits, labels, images)
        for loss in ("cross_entropy", "bce")
    }
    torch.testing.assert_close(found["cross_entropy"], -(targets * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(found["bce"], F.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("count", [6, 7, 1])
def test_without_an_effect_mixing_gives_the_loss_of_smoothed_labels(loss: str, count: int) -> None:
    config = {"loss": loss, "label_smoothing": 0.1}
    images, labels, logits = batch(count)
    mixing = Objective({**config, **MIXED, "mixup_prob": 0.0}, CLASSES)
    mixed, targets = mixing.mix(images, labels, 0)
    assert torch.equal(mixed, images)
    expected = Objective(config, CLASSES).loss(logits, labels, images)
    torch.testing.assert_close(mixing.loss(logits, targets, mixed), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_each_image_and_its_target_with_the_one_from_the_other_end(count: int, smoothing: float) -> None:
    objective = Objective({"mixup": 0.8, "label_smoothing": smoothing}, CLASSES)
    images, labels, _ = batch(count)
    before = images.clone()
    mixed, targets = objective.mix(images, labels, 0)
    even = 6
    other = images[:even].flip(0)
    share = ((mixed[:even] - other) / (images[:even] - other)).mean()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(mixed[:even], share * images[:even] + (1 - share) * other)
    expected = one_hot(labels, smoothing)
    expected[:even] = share * expected[:even] + (1 - share) * expected[:even].flip(0)
    torch.testing.assert_close(targets.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(mixed[even:], images[even:])
    assert torch.equal(images, before)


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels() -> None:
    objective = Objective({"cutmix": 1.0}, CLASSES)
    images, labels, _ = batch()
    mixed, targets = objective.mix(images, labels, 0)
    kept = (mixed == images).all(1)
    assert torch.equal(torch.where(kept[:, None], images, images.flip(0)), mixed)
    share = kept[0].double().mean()
    assert 0 < share < 1
    expected = share * one_hot(labels) + (1 - share) * one_hot(labels).flip(0)
    torch.testing.assert_close(targets.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("switch", "pasted"), [(0.0, False), (1.0, True)])
def test_the_switch_chooses_between_mixup_and_cutmix(switch: float, *, pasted: bool) -> None:
    objective = Objective({**MIXED, "mixup_switch_prob": switch}, CLASSES)
    images, labels, _ = batch()
    mixed, _ = objective.mix(images, labels, 0)
    assert bool(((mixed == images) | (mixed == images.flip(0))).all()) == pasted


def test_mixing_repeats_with_the_state_of_numpys_generator() -> None:
    objective = Objective(MIXED, CLASSES)
    images, labels, _ = batch()
    state = np.random.get_state()  # noqa: NPY002
    first = objective.mix(images, labels, 0)
    other = objective.mix(images, labels, 0)
    np.random.set_state(state)  # noqa: NPY002
    again = objective.mix(images, labels, 0)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("off", "mixed_epochs"), [(0, [0, 1, 2, 3]), (2, [0, 1])])
def test_mixing_ends_where_it_should(off: int, mixed_epochs: list[int]) -> None:
    objective = Objective({"mixup": 0.8, "mixup_off_epoch": off}, CLASSES)
    images, labels, _ = batch()
    assert [epoch for epoch in range(4) if objective.mix(images, labels, epoch)[1].ndim == 2] == mixed_epochs


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_gradients_in_float64_are_those_of_the_loss(loss: str) -> None:
    images, labels, logits = batch()
    objective = Objective({"loss": loss, "label_smoothing": 0.1, "mixup": 0.8}, CLASSES)
    _, targets = objective.mix(images, labels, 0)
    assert objective.loss(logits, targets, images).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda z: objective.loss(z, targets, images), logits)


def network(name: str = "rb_repvgg_cifar", preprocessing: Preprocessing = COLOUR, classes: int = CLASSES) -> nn.Module:
    size = {"depths": [1, 1, 1], "widths": [4, 4, 4]} if name == "rb_repvgg_cifar" else {}
    channels = preprocessing.input_size[0]
    model = rb.create_model(name, num_classes=classes, in_chans=channels, **size)
    return carry(model, {"mean": preprocessing.mean, "std": preprocessing.std}).eval()


def saved(model: nn.Module, path: Path) -> str:
    """As train.py, rb.save and timm write weights."""
    if path.suffix == ".ckpt":
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({ENTRY: describe(model), "state_dict": state}, path)
    else:
        rb.save(model, path)
    return str(path)


@pytest.mark.parametrize("file", ["best.ckpt", "teacher.safetensors"])
def test_a_file_of_ours_names_its_teacher_and_its_normalisation(tmp_path: Path, file: str) -> None:
    own = Preprocessing(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    model = network(preprocessing=own)
    teacher = make_teacher(distillation(checkpoint=saved(model, tmp_path / file)), COLOUR, CLASSES)
    assert teacher is not None
    pixels = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(teacher(normalised(pixels, COLOUR)), model(normalised(pixels, own)).detach())


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (pixels - mean) / std


def distillation(**values: Any) -> dict[str, Any]:
    return {"distillation": values}


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_a_model_of_timm_takes_its_weights_from_a_file(tmp_path: Path, file: str) -> None:
    model = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    path = tmp_path / file
    save_file(model.state_dict(), path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
    teacher = make_teacher(distillation(teacher="test_resnet", checkpoint=str(path)), COLOUR, CLASSES)
    assert teacher is not None
    pixels = torch.rand(2, 3, 32, 32)
    own = Preprocessing(input_size=(3, 32, 32), **{key: model.pretrained_cfg[key] for key in ("mean", "std")})
    expected = model(normalised(pixels, own)).detach()
    torch.testing.assert_close(teacher(normalised(pixels, COLOUR)), expected, rtol=1e-4, atol=1e-5)


def test_gray_images_meet_the_average_of_colour_statistics(tmp_path: Path) -> None:
    gray = Preprocessing(input_size=(1, 32, 32), mean=(0.3,), std=(0.4,))
    model = timm.create_model("mobilenetv3_small_050", num_classes=CLASSES, in_chans=1).eval()
    torch.save(model.state_dict(), tmp_path / "gray.pth")
    config = distillation(teacher="mobilenetv3_small_050", checkpoint=str(tmp_path / "gray.pth"))
    teacher = make_teacher(config, gray, CLASSES)
    assert teacher is not None
    mean, std = (sum(model.pretrained_cfg[key]) / 3 for key in ("mean", "std"))
    pixels = torch.rand(2, 1, 32, 32)
    expected = model((pixels - mean) / std).detach()
    torch.testing.assert_close(teacher(normalised(pixels, gray)), expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_is_looked_for_only_where_one_is_named() -> None:
    assert make_teacher({}, COLOUR, CLASSES) is None
    assert make_teacher({"distillation": {"teacher": None, "checkpoint": None}}, COLOUR, CLASSES) is None


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    found = make_teacher(distillation(checkpoint=saved(network(), tmp_path / "best.ckpt")), COLOUR, CLASSES)
    assert found is not None
    return found


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_soft_teacher_adds_the_divergence_from_its_probabilities(
    teacher: Teacher, weight: float, temperature: float
) -> None:
    images, labels, logits = batch()
    config = distillation(checkpoint="-", weight=weight, temperature=temperature)
    found = Objective(config, CLASSES, teacher).loss(logits, labels, images)
    taught, own = ((z / temperature).softmax(1) for z in (teacher(images), logits))
    divergence = (taught * (taught.log() - own.log())).sum(1).mean() * temperature**2
    torch.testing.assert_close(found, (1 - weight) * F.cross_entropy(logits, labels) + weight * divergence)


def test_a_hard_teacher_adds_the_cross_entropy_with_its_choices(teacher: Teacher) -> None:
    images, labels, logits = batch()
    found = Objective(distillation(checkpoint="-", kind="hard", weight=0.25), CLASSES, teacher).loss(
        logits, labels, images
    )
    hard = F.cross_entropy(logits, teacher(images).argmax(1))
    torch.testing.assert_close(found, 0.75 * F.cross_entropy(logits, labels) + 0.25 * hard)


def test_the_teacher_sees_the_mixed_images(teacher: Teacher) -> None:
    images, labels, logits = batch()
    objective = Objective({**distillation(checkpoint="-", weight=1.0), "mixup": 0.8}, CLASSES, teacher)
    mixed, targets = objective.mix(images, labels, 0)
    expected = F.kl_div(logits.log_softmax(1), teacher(mixed).softmax(1), reduction="batchmean")
    torch.testing.assert_close(objective.loss(logits, targets, mixed), expected)


def test_a_teacher_gives_the_same_in_training_and_keeps_its_numbers(teacher: Teacher) -> None:
    images, labels, logits = batch()
    before = copy.deepcopy(teacher.network.state_dict())
    holder = nn.Module()
    holder.objective = Objective(distillation(checkpoint="-"), CLASSES, teacher)  # pyright: ignore
    holder.train()
    holder.objective.loss(logits, labels, images).backward()
    after = teacher.network.state_dict()
    assert all(torch.equal(value, after[key].to(value)) for key, value in before.items())
    assert not holder.state_dict()
    assert not list(holder.modules())[1:]
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not any(module.training for module in teacher.network.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_follows_the_images_to_their_dtype(teacher: Teacher, dtype: torch.dtype) -> None:
    images, _, _ = batch(dtype=dtype)
    for _ in range(2):
        assert teacher(images).dtype == dtype
        assert {p.dtype for p in teacher.network.parameters()} == {dtype}


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    path = saved(network(classes=7), tmp_path / "best.ckpt")
    with pytest.raises(ConfigurationError, match=r"gives \(1, 7\) for one image, needed are scores of 5 classes"):
        make_teacher(distillation(checkpoint=path), COLOUR, CLASSES)


def test_a_teacher_of_other_channels_is_refused(tmp_path: Path) -> None:
    gray = Preprocessing(input_size=(1, 32, 32), mean=(0.3,), std=(0.4,))
    path = saved(network(preprocessing=gray), tmp_path / "best.ckpt")
    with pytest.raises(ConfigurationError, match=r"the teacher of objective\.distillation fails on images of \(3, 32"):
        make_teacher(distillation(checkpoint=path), COLOUR, CLASSES)


def test_a_named_teacher_with_weights_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "other.pth")
    config = distillation(teacher="test_resnet", checkpoint=str(tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match="does not give the weights of test_resnet for 5 classes"):
        make_teacher(config, COLOUR, CLASSES)


@pytest.mark.parametrize("teacher", [None, "test_resnet"])
@pytest.mark.parametrize("file", ["none.ckpt", "none.safetensors", "none.pth"])
def test_a_missing_file_of_a_teacher_is_named(tmp_path: Path, teacher: str | None, file: str) -> None:
    with pytest.raises(CheckpointError, match=file):
        make_teacher(distillation(teacher=teacher, checkpoint=str(tmp_path / file)), COLOUR, CLASSES)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("exploded"),)  # pyright: ignore


@pytest.mark.parametrize("teacher", [None, "test_resnet"])
def test_code_in_a_file_of_weights_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    with pytest.raises(CheckpointError):
        make_teacher(distillation(teacher=teacher, checkpoint="bomb.ckpt"), COLOUR, CLASSES)
    assert not Path("exploded").exists()


def test_an_unknown_teacher_names_near_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"resnet181.* is unknown.*resnet18"):
        make_teacher(distillation(teacher="resnet181"), COLOUR, CLASSES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"los": "bce"}, r"objective=los is unknown.*loss"),
        ({"loss": "bec"}, r"objective\.loss=bec is unknown.*bce"),
        ({"label_smoothing": 1.0}, r"objective\.label_smoothing=1\.0 needs to be from 0 to below 1"),
        ({"label_smoothing": "some"}, r"objective\.label_smoothing=some needs to be"),
        ({"label_smoothing": True}, r"objective\.label_smoothing=True needs to be"),
        ({"mixup": -0.1}, r"objective\.mixup=-0\.1 needs to be a number, at least 0"),
        ({"mixup": float("nan")}, r"objective\.mixup=nan needs to be a number, at least 0"),
        ({"cutmix": None}, r"objective\.cutmix=None needs to be a number, at least 0"),
        ({"mixup_prob": 1.5}, r"objective\.mixup_prob=1\.5 needs to be from 0 to 1"),
        ({"mixup_switch_prob": -1}, r"objective\.mixup_switch_prob=-1 needs to be from 0 to 1"),
        ({"mixup_off_epoch": 2.5}, r"objective\.mixup_off_epoch=2\.5 needs to be a number of epochs"),
        (distillation(kind="warm"), r"objective\.distillation\.kind=warm is unknown"),
        (distillation(weight=2), r"objective\.distillation\.weight=2 needs to be from 0 to 1"),
        (distillation(temperature=0), r"objective\.distillation\.temperature=0 needs to be a number above 0"),
        (distillation(temprature=1), r"objective\.distillation=temprature is unknown.*temperature"),
        (distillation(teacher="resnet18"), r"objective\.distillation names a teacher, which was not given"),
    ],
)
def test_an_impossible_configuration_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Objective(wrong, CLASSES)


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"objective\.loss=bce with 1 class learns nothing"):
        Objective({"loss": "bce"}, 1)
