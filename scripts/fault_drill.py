"""Kill training runs at random moments, resume them, and compare what comes out with a run that was never stopped.

Half of the kills come from outside, in the middle of an epoch; the other half strike inside the writing of a
checkpoint. A run survives if weights, optimizer, metrics and deploy file are those of the undisturbed run, bit by bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich import get_console
from rich.progress import track

from repblocks import files
from repblocks.training import run
from repblocks.training.checkpoints import files as checkpoint_files
from repblocks.training.checkpoints.files import FOLDER, last_checkpoint, read_checkpoint
from repblocks.training.task import ClassificationTask

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUN = (
    *("trainer=cpu", "trainer.deterministic=true", "trainer.max_epochs=3", "trainer.limit_train_batches=6"),
    *("trainer.limit_val_batches=2", "trainer.enable_progress_bar=false", "trainer.num_sanity_val_steps=0"),
    *("data.batch_size=32", "data.workers=2", "+model.args.depths=[1,1,1]", "+model.args.widths=[8,8,8]"),
    *("+model.args.drop_rate=0.1", "objective.mixup=0.2", "ema=on", "ema.decay=0.9", "checkpoint.every_steps=2"),
    *("resume=auto", "export.formats=[safetensors]"),
)
"""A run of about two seconds with everything in it that has a state."""

BATCHES, WRITES = 18, 9
"""Training batches and checkpoints of that run."""

POINTS = ("before write", "half-written", "before rename", "after rename")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed once and resumed (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for train.py")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config, rng = composed([*RUN, *options.overrides]), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        in_child(lambda: trained(config, undisturbed))
        expected, survived = outcome(undisturbed), 0
        for i in track(range(options.kills), "kills", transient=True, disable=not get_console().is_terminal):
            disturbed = Path(folder) / str(i)
            moment = kill_within_an_epoch(config, disturbed, rng) if i % 2 else kill_in_a_write(config, disturbed, rng)
            in_child(lambda at=disturbed: trained(config, at))
            differences = differing(expected, outcome(disturbed))
            survived += not differences
            print(f"{moment}: {said(differences)}", flush=True)
    print(f"survived {survived}/{options.kills}")
    return 0 if survived == options.kills else 1


def said(differences: list[str]) -> str:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"differs in {', '.join(differences[:3])}{more}" if differences else "the same outcome"


def composed(overrides: list[str]) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train", overrides), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def trained(config: Mapping[str, Any], folder: Path) -> None:
    run(config, folder)


def in_child(work: Callable[[], None], *, killed: bool = False) -> None:
    """Run in a forked process, quietly; importing torch once is enough."""
    child = forked(work)
    _, status = os.waitpid(child, 0)
    wanted = (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) if killed else status == 0
    if not wanted:
        raise RuntimeError(f"the run ended with status {status}, killed was {killed}")


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        work()
        code = 0
    except BaseException as error:  # a child must never return into the parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def kill_within_an_epoch(config: Mapping[str, Any], folder: Path, rng: random.Random) -> str:
    """Kill from outside, some milliseconds after a random batch."""
    after, delay = rng.randrange(1, BATCHES), rng.random() * 0.05
    reader, writer = os.pipe()

    def reporting() -> None:
        def report(*_: Any) -> None:
            os.write(writer, b".")

        ClassificationTask.on_train_batch_end = report  # pyright: ignore[reportAttributeAccessIssue]
        trained(config, folder)

    child = forked(reporting)
    os.close(writer)
    for _ in range(after):
        os.read(reader, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return f"killed {1000 * delay:.0f} ms after batch {after}"


def kill_in_a_write(config: Mapping[str, Any], folder: Path, rng: random.Random) -> str:
    """Kill from inside, at one of the `POINTS` of a random checkpoint."""
    point, write = rng.choice(POINTS), rng.randrange(1, WRITES + 1)

    def dying() -> None:
        die_at(point, write)
        trained(config, folder)

    in_child(dying, killed=True)
    return f"killed {point}, checkpoint {write}"


def die_at(point: str, write: int) -> None:
    """Make this process kill itself at ``point`` of its ``write``-th checkpoint."""
    save, replace, started = checkpoint_files.write_checkpoint, Path.replace, 0

    def counted(content: Mapping[str, Any], path: Path) -> None:
        nonlocal started
        started += 1
        if started == write:
            if point == "before write":
                die()
            if point == "half-written":
                checkpoint_files.torch.save = half_saved
        save(content, path)

    def replaced(source: Path, target: Path) -> Path:
        last = started == write and target.suffix == ".ckpt"
        if last and point == "before rename":
            die()
        result = replace(source, target)
        if last and point == "after rename":
            die()
        return result

    checkpoint_files.write_checkpoint = counted
    files.Path.replace = replaced  # pyright: ignore[reportAttributeAccessIssue]


def half_saved(content: Any, file: Any) -> None:
    """Write half of the bytes of a checkpoint to the disk, and die."""
    whole = bytearray()

    class Memory:
        def write(self, data: bytes) -> int:
            whole.extend(data)
            return len(data)

        def flush(self) -> None:
            pass

    save(content, Memory())
    file.write(bytes(whole[: len(whole) // 2]))
    file.flush()
    die()


save: Any = torch.save


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def outcome(folder: Path) -> dict[str, Any]:
    """What a run has to give again: its last and best checkpoint, its metrics, its deploy file, its accuracies."""
    last = last_checkpoint(folder / FOLDER)
    assert last is not None
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "last checkpoint": read_checkpoint(last),
        "best checkpoint": read_checkpoint(folder / FOLDER / "best.ckpt"),
        "metrics": (folder / "metrics.csv").read_text(),
        "deploy file": (folder / "deploy" / "model.safetensors").read_bytes(),
        "accuracies": [summary[form]["test_accuracy"] for form in ("train", "deploy")],
    }


def differing(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """The places where two outcomes are not the same."""
    return [place for key in expected for place in _differing(key, expected[key], got[key])]


def _differing(place: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(map(str, one.keys() ^ other.keys()))
        return keys + [
            d for key in one.keys() & other.keys() for d in _differing(f"{place} {key}", one[key], other[key])
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in _differing(f"{place} {i}", *pair)]
    return [] if one == other else [place]


if __name__ == "__main__":
    sys.exit(main())
