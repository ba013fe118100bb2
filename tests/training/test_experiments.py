import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from repblocks.blocks.base import deployed, form_of
from repblocks.models import create_model
from repblocks.training import run
from repblocks.training.data.batch_augment import BatchAugmentation
from repblocks.training.data.config import DataConfig
from repblocks.training.optimization import make_optimizer, make_scheduler, scaled_lr

FOLDER = Path(__file__).parents[2] / "configs" / "experiment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# Processes, images per step and learning rate of the papers.
PAPERS = {
    "cifar10_repvgg": (1, 128, 0.1),
    "cifar100_repvgg": (1, 128, 0.1),
    "cifar10_acnet_resnet56": (1, 128, 0.2),
    "cifar10_dbb_vgg16": (1, 128, 0.1),
    "cifar10_repnext": (1, 128, 1e-3),
    "imagenet_repvgg_a0": (1, 256, 0.1),
    "imagenet_mobileone_s0": (1, 256, 0.1),
    "imagenet_repnext_u3_tiny": (8, 4096, 4e-3),
    "imagenet_repnext_u3_small": (8, 4096, 4e-3),
    "imagenet_repnext_u3_base": (8, 4096, 4e-3),
}
REPNEXTS = [name for name in PAPERS if "u3" in name]


def images_per_step(config, processes):
    return config["data"]["batch_size"] * processes * config["trainer"]["accumulate_grad_batches"]


def test_the_table_of_papers_is_complete():
    assert set(NAMES) == {"digits_repvgg", *PAPERS}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_where_it_comes_from_and_what_to_expect(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    header = " ".join(line.removeprefix("# ") for line in lines[1 : lines.index("defaults:")])
    paper, accuracy, differs = re.fullmatch(r".* Paper: (.*) Accuracy: (.*) Differs(.*)", header).groups()
    assert "https://" in paper
    assert re.search(r"\d+(\.\d+)?%", accuracy)
    assert "measured here" in accuracy
    assert differs
    assert len(max(lines, key=len)) <= 120


def test_digits_is_what_runs_without_a_word(configure):
    config = configure()
    assert config == configure("experiment=digits_repvgg")
    assert config["model"]["name"] == "rb_repvgg_cifar"
    assert config["data"]["name"] == "digits"
    assert config["trainer"]["max_epochs"] == 16
    optimizer = config["optimizer"]
    assert (optimizer["name"], optimizer["lr"], optimizer["weight_decay"]) == ("adamw", 3e-3, 0.05)
    assert config["ema"]["decay"] is None


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_batch_gets_the_papers_learning_rate_and_a_half_gets_half(configure, name):
    processes, images, lr = PAPERS[name]
    config = configure(f"experiment={name}")
    assert images_per_step(config, processes) == images
    assert scaled_lr(config["optimizer"], images) == pytest.approx(lr)
    assert scaled_lr(config["optimizer"], images // 2) == pytest.approx(lr / 2)


@pytest.mark.parametrize("name", PAPERS)
def test_the_rate_falls_from_its_peak_to_nothing(configure, name):
    config = configure(f"experiment={name}")
    _, images, lr = PAPERS[name]
    epochs = config["trainer"]["max_epochs"]
    optimizer = make_optimizer(nn.Linear(2, 2), config["optimizer"], images_per_step=images)
    scheduler = make_scheduler(optimizer, config["scheduler"], epochs=epochs, updates_per_epoch=10)
    rates = []
    for update in range(epochs * 10):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(lr, rel=0.01)  # timm's cosine begins to fall during the warm-up
    assert np.argmax(rates) == config["scheduler"]["warmup_epochs"] * 10
    assert rates[-1] < 2e-3 * lr


@pytest.mark.parametrize("name", NAMES)
def test_the_model_takes_the_images_of_training_and_of_evaluation(configure, name):
    config = configure(f"experiment={name}")
    data = config["data"]
    classes = 1000 if name.startswith("imagenet") else 100
    with torch.device("meta"):
        model = create_model(
            config["model"]["name"], num_classes=classes, in_chans=data["in_chans"], **config["model"]["args"]
        )
        assert form_of(model) == "train"
        for size in {data["image_size"], data.get("eval_size") or data["image_size"]}:
            images = torch.empty(2, data["in_chans"], size, size)
            assert model(images).shape == deployed(model)(images).shape == (2, classes)


@pytest.mark.parametrize("name", [name for name in PAPERS if name.startswith("cifar")])
def test_images_of_cifar_are_augmented_in_memory(configure, name):
    data = configure(f"experiment={name}")["data"]
    assert data["in_memory"]
    preprocessing = DataConfig.of(data).preprocessing()
    augmentation = BatchAugmentation.of(data["augment"], preprocessing=preprocessing, images=8, seed=0)
    assert (augmentation.padding, augmentation.flip) == (4, 0.5)
    assert augmentation.cutout == (8 if "repnext" in name else 0)


def test_repnext_has_the_recipe_of_its_authors(configure):
    for name, drop_path in zip(REPNEXTS, (0.1, 0.2, 0.3), strict=True):
        config = configure(f"experiment={name}")
        assert config["model"] == configure()["model"] | {
            "name": f"rb_{name.removeprefix('imagenet_')}",
            "args": {"drop_path_rate": drop_path},
        }
        assert (config["trainer"]["max_epochs"], config["scheduler"]["warmup_epochs"]) == (450, 20)
        assert (config["optimizer"]["name"], config["optimizer"]["weight_decay"]) == ("adamw", 0.05)
        objective = config["objective"]
        assert [objective[key] for key in ("label_smoothing", "mixup", "cutmix")] == [0.1, 0.8, 1.0]
        augment = config["data"]["augment"]
        assert augment["auto_augment"] == "rand-m9-mstd0.5-inc1"
        assert (augment["color_jitter"], augment["re_prob"]) == (0.4, 0.25)
        assert (config["data"]["image_size"], config["data"]["eval_size"]) == (224, 256)
        assert config["ema"]["decay"] == 0.9999


def test_the_other_papers_differ_where_their_files_say(configure):
    repvgg, mobileone = (configure(f"experiment=imagenet_{name}") for name in ("repvgg_a0", "mobileone_s0"))
    acnet, dbb = configure("experiment=cifar10_acnet_resnet56"), configure("experiment=cifar10_dbb_vgg16")
    assert [c["trainer"]["max_epochs"] for c in (repvgg, mobileone, acnet, dbb)] == [120, 300, 400, 400]
    assert {c["optimizer"]["weight_decay"] for c in (repvgg, mobileone, acnet, dbb)} == {1e-4}
    assert {c["optimizer"]["name"] for c in (repvgg, mobileone, acnet, dbb)} == {"momentum"}
    assert [c["ema"]["decay"] for c in (repvgg, mobileone)] == [None, 0.9995]
    assert [c["objective"]["label_smoothing"] for c in (repvgg, mobileone)] == [0.0, 0.1]
    assert [c["model"]["args"]["block"] for c in (acnet, dbb)] == ["acb", "dbb"]


def test_the_command_line_has_the_last_word(configure):
    config = configure("experiment=cifar10_repvgg", "data=cifar100", "optimizer=adamw", "trainer.max_epochs=3")
    assert config["data"]["name"] == "cifar100"
    assert config["optimizer"]["name"] == "adamw"
    assert config["trainer"]["max_epochs"] == 3
    assert configure("data=cifar10")["data"]["name"] == "cifar10"
    assert configure("optimizer=sgd")["optimizer"]["name"] == "sgd"
    assert configure("experiment=imagenet_repnext_u3_small", "ema=off")["ema"]["decay"] is None


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Images of noise on disk, of two classes."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("noise")
    for part, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(
                    root / part / label / f"{i}.png"
                )
    return root


TINY = (
    "data=imagefolder",
    "data.image_size=32",
    "data.workers=0",
    "data.batch_size=4",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "scheduler.warmup_epochs=0",
    "export.formats=[safetensors]",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_run_of_it_trains_collapses_and_exports(configure, noise, tmp_path, name):
    config = configure(f"experiment={name}", f"data.root={noise}", *TINY)
    config["data"]["eval_size"] = 64 if config["data"].get("eval_size") else None
    stages = 5 if "vgg16" in name else 4 if name.startswith("imagenet") else 3
    config["model"]["args"] |= {"depths": [1] * stages, "widths": [8] * stages}
    summary = run(config, tmp_path)
    assert summary is not None
    assert summary.equivalence.passed
    assert (tmp_path / "deploy" / "model.safetensors").is_file()
