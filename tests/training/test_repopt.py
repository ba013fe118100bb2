import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from repblocks.blocks.base import deployed
from repblocks.blocks.conv_bn import ConvBN
from repblocks.blocks.csla import CSLAConv
from repblocks.checkpoint import load
from repblocks.errors import ConfigurationError
from repblocks.models.registry import create_model
from repblocks.optim import RepOptimizer
from repblocks.training.build import make_model, make_task
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.data import DataConfig, ImageData
from repblocks.training.optimization import make_optimizer, trained_as
from repblocks.training.pipeline import run
from repblocks.training.task import ClassificationTask
from repblocks.training.trainer import make_trainer
from repblocks.verification import verify

CSLA = ("+model.args.block=csla", "optimizer.weight_decay=0")  # timm's groups would not decay the identity's scale
REPSGD = {"name": "repsgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def fitted(
    config: dict[str, Any], folder: Path, checkpoint: Path | None = None, *, callback: pl.Callback | None = None
) -> ClassificationTask:
    """The task of a run that has ended."""
    pl.seed_everything(0, verbose=False)
    data = ImageData(DataConfig(**config["data"]))
    trainer = make_trainer(config, folder)
    trainer.callbacks += [callback] if callback else []
    dtype = torch.float64 if config["trainer"]["precision"] == "64-true" else torch.float32
    task = make_task(config, make_model(config["model"], data).to(dtype), data, trainer)
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
    return task


def images() -> torch.Tensor:
    return torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def blocks(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_a_plain_network_is_trained_to_what_the_branches_are_trained_to(tiny: Any, tmp_path: Path) -> None:
    settings = (*CSLA, "trainer.precision=64-true", "scheduler=none", "trainer.limit_train_batches=5")
    branched = fitted(tiny("optimizer=sgd", *settings), tmp_path / "branches").model
    plain = fitted(tiny("optimizer=repsgd", *settings), tmp_path / "plain").model
    assert blocks(branched, CSLAConv) == blocks(plain, ConvBN) == 4
    assert blocks(plain, CSLAConv) == 0
    kernels = [dict(deployed(model).named_parameters()) for model in (branched, plain)]
    torch.testing.assert_close(kernels[1], kernels[0], rtol=1e-9, atol=1e-10)


def test_a_run_ships_the_plain_network(tiny: Any, tmp_path: Path) -> None:
    run(tiny("optimizer=repsgd", "+model.args.block=csla"), tmp_path)
    best = tmp_path / "checkpoints" / "best.ckpt"
    model: Any = model_from_checkpoint(best)
    assert model.model_args["block"] == "plain"
    verify(model, load(tmp_path / "deploy" / "model.safetensors"), images()).raise_if_different("the exported model")
    assert json.loads((tmp_path / "summary.json").read_text())["equivalence"]["passed"]
    states = torch.load(best, weights_only=True)["optimizer_states"][0]["state"].values()
    assert sum("multiplier" in state for state in states) == blocks(model, ConvBN)


def test_a_run_that_is_resumed_takes_the_multipliers_of_its_checkpoint(tiny: Any, tmp_path: Path) -> None:
    settings = ("optimizer=repsgd", "+model.args.block=csla")
    fitted(tiny(*settings), tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "earlier")
    content = torch.load(tmp_path / "earlier" / "last.ckpt", weights_only=True)
    for state in content["optimizer_states"][0]["state"].values():
        state.update({key: 3 * value for key, value in state.items() if key == "multiplier"})
    torch.save(content, tmp_path / "marked.ckpt")
    task = fitted(tiny(*settings, "trainer.max_epochs=2"), tmp_path, tmp_path / "marked.ckpt")
    assert task.multipliers is not None
    state = task.trainer.optimizers[0].state
    for parameter, multiplier in task.multipliers.items():
        torch.testing.assert_close(state[parameter]["multiplier"], 3 * multiplier)


def test_kernels_are_decayed_and_multiplied_and_the_rest_is_not() -> None:
    model, multipliers = trained_as(create_model("rb_repvgg_cifar", block="csla"), REPSGD)
    optimizer = make_optimizer(model, REPSGD, multipliers)
    assert isinstance(optimizer, RepOptimizer)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(parameter)] for parameter in multipliers} == {1e-4}
    assert all(decays[id(p)] == 0 for p in model.parameters() if p.ndim == 1)


def test_for_any_other_optimizer_the_model_is_trained_as_it_is() -> None:
    model = create_model("rb_repvgg_cifar", block="csla")
    assert trained_as(model, {"name": "sgd"}) == (model, {})


def test_clipping_by_the_trainer_is_refused(tiny: Any, tmp_path: Path) -> None:
    config = tiny("optimizer=repsgd", "+model.args.block=csla", "trainer.gradient_clip_val=1.0")
    with pytest.raises(ConfigurationError, match=r"trainer\.gradient_clip_val=1\.0 would clip by a norm"):
        fitted(config, tmp_path)


class Norms(pl.Callback):
    """The norm of all gradients after each optimizer step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen += [torch.nn.utils.get_total_norm(gradients).item()] if gradients else []


def test_for_other_optimizers_gradients_are_clipped_as_before(tiny: Any, tmp_path: Path) -> None:
    norms = Norms()
    fitted(tiny("optimizer=sgd", "trainer.gradient_clip_val=0.001", "trainer.max_epochs=2"), tmp_path, callback=norms)
    assert norms.seen
    assert norms.seen == pytest.approx([0.001] * len(norms.seen), rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), r"RepVGG has no CSLAConv.*\+model\.args\.block=csla"),
        (("model.name=test_resnet", "model.expand.block=csla"), r"nothing to expand; leave out model\.expand"),
    ],
)
def test_a_model_that_has_no_multipliers_is_refused(
    configure: Any, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        run(configure("optimizer=repsgd", "trainer=cpu", "export.formats=[]", *overrides), tmp_path)


def test_an_optimizer_without_its_multipliers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="repsgd got no multipliers"):
        make_optimizer(create_model("rb_repvgg_cifar"), REPSGD)
