"""Runs on two processes, beside the same on one; importing torch once is enough for all of them.

``PYTHONPATH=tests python tests/training/checkpoints/distributed_drill.py FOLDER CASE`` leaves run folders for
``test_distributed.py``.
"""

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from support import loaded_script
from torch import nn

from repblocks.training import run
from repblocks.training.checkpoints.files import CheckpointFiles, steps_written

DRILL = loaded_script(Path(__file__).parents[3] / "scripts" / "fault_drill.py")
TINY = (
    *("trainer.max_epochs=1", "trainer.precision=64-true", "trainer.num_sanity_val_steps=0", "export.formats=[]"),
    *("optimizer=sgd", "optimizer.lr=0.02", "scheduler.warmup_epochs=0", "data.workers=0", "ema=on", "ema.decay=0.5"),
    *("+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]", "checkpoint.keep=99"),
)
ONE = ("trainer=cpu", "data.batch_size=32")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=16")

Config = dict[str, Any]


def composed(*overrides: str) -> Config:
    return DRILL.composed([*TINY, *overrides])


def on_one(config: Config, folder: Path) -> None:
    _wait([DRILL.forked(lambda: run(config, folder))])


def on_two(config: Config, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def as_rank(rank: int) -> None:
        # What torchrun sets.
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        join = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "drill"}
        os.environ.update({key: str(value) for key, value in {**place, **join}.items()})
        rank_zero_only.rank = rank
        run(config, folder)
        torch.distributed.destroy_process_group()

    _wait([DRILL.forked(lambda rank=rank: as_rank(rank)) for rank in range(2)])


def _wait(children: list[int]) -> None:
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"a process ended with status {status}")


def frozen(norm: nn.Module, mode: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 - torch's signature
    return nn.Module.train(norm, mode=False)


def same_weights(folder: Path) -> None:
    """20 steps with frozen norms."""
    nn.BatchNorm2d.train = frozen  # type: ignore[method-assign]
    limits = ("trainer.limit_train_batches=20", "trainer.limit_val_batches=2")
    on_one(composed(*ONE, *limits), folder / "one")
    on_two(composed(*TWO, *limits), folder / "two")


def other_world_size(folder: Path) -> None:
    """An epoch of 39 steps on two processes; one process goes on with it from step 12 on, and with its end."""
    nn.BatchNorm2d.train = frozen  # type: ignore[method-assign]
    two = composed(*TWO, "checkpoint.every_steps=12")
    on_two(two, folder / "two")
    for name, changes in MOVED.items():
        copy = shutil.copytree(folder / "two", folder / name, symlinks=True)
        for path in steps_written(copy / "checkpoints")[1:]:
            CheckpointFiles().remove_checkpoint(path)
        one = composed(*ONE, "checkpoint.every_steps=12", "resume=auto", *changes)
        on_one({**one, "trainer": {**two["trainer"], **one["trainer"], "strategy": "auto"}}, copy)


MOVED: Mapping[str, tuple[str, ...]] = {
    "one with the batches of two": (),
    "one with half the images per step": ("data.batch_size=16",),
}


def with_averages_and_collapsed_copies(folder: Path) -> None:
    """Three epochs with statistics of batches."""
    collapsed = ("validate_deployed=true", "trainer.max_epochs=3", "trainer.limit_train_batches=5")
    on_two(composed(*TWO, *collapsed, "export.formats=[safetensors]"), folder / "two")


def one_after_the_other(folder: Path) -> None:
    """A run of two epochs on two processes, and one that goes on after the first of them."""
    config = composed(*TWO, "trainer.max_epochs=2", "trainer.limit_train_batches=5", "checkpoint.every_steps=3")
    on_two(config, folder / "undisturbed")
    copy = shutil.copytree(folder / "undisturbed", folder / "resumed", symlinks=True)
    for path in steps_written(copy / "checkpoints")[1:]:
        CheckpointFiles().remove_checkpoint(path)
    on_two({**config, "resume": "auto"}, copy)


def main() -> None:
    torch.set_num_threads(1)
    case = {
        each.__name__: each
        for each in (same_weights, other_world_size, with_averages_and_collapsed_copies, one_after_the_other)
    }[sys.argv[2]]
    case(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
