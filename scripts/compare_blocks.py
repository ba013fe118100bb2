"""One network, one recipe, the same seeds, other blocks: python scripts/compare_blocks.py [override ...].

Trains the network once per block and seed, and prints the test accuracy of the deploy form (mean and 95% interval over
the seeds, Student's t), the time and kept memory of a training step beside the plain block's (interleaved, one thread),
and the cost of the deploy form, which is the same for all. Overrides are those of train.py. The difference of two means
counts only where the interval of the seed-wise differences excludes 0.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich import get_console
from rich.progress import track
from scipy import stats
from torch import Tensor, nn

import repblocks as rb
from repblocks.profiling import latency_ms
from repblocks.training import run

BLOCKS = ("plain", "acb", "repvgg", "dbb", "mobileone", "repunit")
COLUMNS = (
    "block",
    "test accuracy",
    "95%",
    "against plain",
    "step / plain",
    "kept / plain",
    "deploy params",
    "deploy MACs",
)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BRIEF = ("trainer=cpu", "trainer.max_epochs=4", "export.formats=[]", "trainer.enable_progress_bar=false")
"""Few epochs, because after all of the default recipe every block is near 100% on digits."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for train.py")
    parser.add_argument("--blocks", default=",".join(BLOCKS), help=f"names of rb.BLOCKS; by default {','.join(BLOCKS)}")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each block (default 5)")
    parser.add_argument("--json", type=Path, help="write what was found here as well")
    parser.add_argument("--plot", type=Path, help="draw accuracies and costs, as .png or .svg (needs matplotlib)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    blocks = list(dict.fromkeys(["plain", *options.blocks.split(",")]))
    found = {"blocks": compared(blocks, options.seeds, options.overrides), "seeds": options.seeds}
    print(f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", sep="\n")
    print("\n".join(f"| {' | '.join(cells(name, row))} |" for name, row in found["blocks"].items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.plot:
        plot(found["blocks"], options.plot)


def compared(blocks: Sequence[str], seeds: int, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each block came to."""
    runs = [(block, seed) for seed in range(seeds) for block in blocks]
    bar = track(runs, "training", transient=True, disable=not get_console().is_terminal)
    results = {(block, seed): trained(block, seed, overrides) for block, seed in bar}
    steps, kept = step_costs(blocks, overrides)
    rows: dict[str, dict[str, Any]] = {}
    for block in blocks:
        accuracies = [results[block, seed]["deploy"]["test_accuracy"] for seed in range(seeds)]
        against = [a - results["plain", seed]["deploy"]["test_accuracy"] for seed, a in enumerate(accuracies)]
        rows[block] = {
            "accuracies": accuracies,
            **interval(accuracies, "accuracy"),
            **interval(against, "difference"),
            "step_ratio": steps[block] / steps["plain"],
            "kept_ratio": kept[block] / kept["plain"],
            **{key: results[block, 0]["deploy"][key] for key in ("params", "macs")},
        }
    return rows


def trained(block: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The summary of one run."""
    config = composed(f"+model.args.block={block}", f"seed={seed}", *overrides)
    with tempfile.TemporaryDirectory() as folder, get_console().capture():
        summary = run(config, Path(folder))
    assert summary is not None
    return summary.to_dict()


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train", [*BRIEF, *overrides]), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def interval(values: Sequence[float], name: str) -> dict[str, float | None]:
    """Mean and half-width of Student's 95% interval: 0 for values that are all the same, None for a single one."""
    half = None
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return {f"{name}_mean": statistics.fmean(values), f"{name}_half_width": half}


def step_costs(blocks: Sequence[str], overrides: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds of a training step, measured in turns, and the bytes that its forward pass keeps."""
    config = composed(*overrides)
    data, name = config["data"], config["model"]["name"]
    args: dict[str, Any] = {"in_chans": data["in_chans"], **config["model"]["args"]}
    size = data["image_size"]
    images = torch.randn(data["batch_size"], data["in_chans"], size, size)
    models = {block: rb.create_model(name, **args, block=block).train() for block in blocks}
    steps = {block: stepping(model) for block, model in models.items()}
    with torch.enable_grad():
        kept = {block: bytes_kept(model, images) for block, model in models.items()}
    return latency_ms(steps, images, repeats=15, warmup=2), kept


def stepping(model: nn.Module) -> Callable[[Tensor], None]:
    """Forward, loss, backward and update of a model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(images: Tensor) -> None:
        with torch.enable_grad():
            model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bytes_kept(model: nn.Module, images: Tensor) -> int:
    """Of the tensors that a forward pass keeps for backward, each memory once, without the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    del output
    return sum(size for pointer, size in storages.items() if pointer not in own)


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    return [
        f"`{name}`",
        f"{row['accuracy_mean']:.2%}",
        margin(row["accuracy_half_width"]),
        "-" if name == "plain" else difference(row["difference_mean"], row["difference_half_width"]),
        f"{row['step_ratio']:.2f}",
        f"{row['kept_ratio']:.2f}",
        f"{row['params']:,}",
        f"{row['macs']:,}",
    ]


def difference(mean: float, half: float | None) -> str:
    """Within noise where the interval holds 0, or is not known."""
    noise = " (within noise)" if half is None or abs(mean) <= half else ""
    return f"{mean:+.2%} {margin(half)}{noise}"


def margin(half: float | None) -> str:
    return "± ?" if half is None else f"± {half:.2%}"


def plot(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy of each block with its interval; beside its name what a training step costs."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1 + 0.45 * len(rows)), layout="constrained")
    labels = [f"{name}  (step {row['step_ratio']:.2f})" for name, row in rows.items()]
    accuracies = [100 * row["accuracy_mean"] for row in rows.values()]
    halves = [100 * (row["accuracy_half_width"] or 0.0) for row in rows.values()]
    axes.errorbar(accuracies, range(len(rows)), xerr=halves, fmt="o", capsize=4)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy of the deploy form (%), mean and 95% interval")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
