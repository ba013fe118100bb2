"""What int8 costs RepVGG, QARepVGG and equalized RepVGG, trained alike: python scripts/compare_int8.py [override ...].

Trains the network once per block and seed, quantizes its deploy form by ONNX Runtime, as it is and prepared, and prints
the test accuracy in float and in int8, the accuracy that int8 costs (mean and 95% interval over the seeds, Student's
t), and what is finer than accuracy on few images: the signal-to-noise ratio of the outputs; of the worst kernel,
rounded with a scale per channel and with one; and the largest share of a kernel's weights that become 0. Ranges are
calibrated on the validation images, accuracy is measured on the test images. Overrides are those of train.py. A cost
counts only where its interval excludes 0.

Chu et al. 2022, "Make RepVGG Greater Again", https://arxiv.org/abs/2212.01593, reports for ImageNet that RepVGG-A0
falls from 72.4% to 52.2% and that QARepVGG-A0 keeps 70.4%. Ten digits are an easier task: look at the decibel too.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich import get_console
from rich.progress import track
from scipy import stats
from torch import Tensor, nn

from repblocks.quantization import PREPARATIONS, prepared, quantize, range_report
from repblocks.training import DataConfig, ImageData, model_from_checkpoint, run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECIPE = ("trainer=cpu", "export.formats=[]", "trainer.enable_progress_bar=false")
BLOCKS = {"RepVGG": "repvgg", "QARepVGG": "qarepvgg"}
COLUMNS = ("model", "float", "int8", "int8 costs, 95%", "outputs (dB)", "kernels (dB)", "one scale (dB)", "zeroed")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as for train.py")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each block (default 5)")
    parser.add_argument("--json", type=Path, help="write what was found here as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = compared(options.seeds, options.overrides)
    print(f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", sep="\n")
    print("\n".join(f"| {' | '.join(cells(name, row))} |" for name, row in rows.items()))
    if options.json:
        found = {"seeds": options.seeds, "overrides": options.overrides, "models": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def compared(seeds: int, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each network came to, prepared in each way."""
    runs = [(name, seed) for seed in range(seeds) for name in BLOCKS]
    found: dict[str, list[dict[str, float]]] = {title(name, how): [] for name in BLOCKS for how in PREPARATIONS}
    for name, seed in track(runs, "training", transient=True, disable=not get_console().is_terminal):
        for how, result in measured(BLOCKS[name], seed, overrides).items():
            found[title(name, how)].append(result)
    return {name: summarised(results) for name, results in found.items()}


def title(name: str, how: str) -> str:
    return name if how == "none" else f"{name}, {how}"


def measured(block: str, seed: int, overrides: Sequence[str]) -> dict[str, dict[str, float]]:
    """Train a network, and quantize it in every way."""
    config = composed(f"+model.args.block={block}", f"seed={seed}", *overrides)
    data = ImageData(DataConfig.of(config["data"]), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        model = trained(config, Path(folder))
        images = [batch for batch, *_ in data.val_dataloader()]
        return {how: quantized(prepared(model, images, how), model, images, data, Path(folder)) for how in PREPARATIONS}


def trained(config: dict[str, Any], folder: Path) -> nn.Module:
    """The best checkpoint of a run."""
    with get_console().capture():
        summary = run(config, folder)
    assert summary is not None
    return model_from_checkpoint(folder / summary.details["checkpoint"]["file"]).float().eval()


def quantized(
    candidate: nn.Module, model: nn.Module, images: list[Tensor], data: ImageData, folder: Path
) -> dict[str, float]:
    """Figures of one int8 file, whatever its accuracy."""
    labelled = data.test_dataloader()
    report = quantize(candidate, images, folder, reference=model, labelled=labelled, max_drop=1.0)
    assert report.float_accuracy is not None
    assert report.int8_accuracy is not None
    kernels = range_report(candidate).layers
    return {
        "float": report.float_accuracy,
        "int8": report.int8_accuracy,
        "cost": report.float_accuracy - report.int8_accuracy,
        "output_sqnr_db": report.output_sqnr_db,
        "lowest_sqnr_db": min(layer.sqnr_db for layer in kernels),
        "lowest_whole_sqnr_db": min(layer.whole_sqnr_db for layer in kernels),
        "most_zeroed": max(layer.zeroed for layer in kernels),
    }


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train", [*RECIPE, *overrides]), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def summarised(results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over the seeds, and the half-width of Student's 95% interval of the cost; None for a single seed."""
    costs = [result["cost"] for result in results]
    means = {key: statistics.fmean(result[key] for result in results) for key in results[0]}
    count = len(costs)
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(costs) / count**0.5 if count > 1 else None
    return {**means, "cost_half_width": half, "by_seed": list(results)}


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    half = row["cost_half_width"]
    spread = "" if half is None else f" ± {100 * half:.2f}"
    noise = " (within noise)" if half is not None and abs(row["cost"]) <= half else ""
    return [
        name,
        f"{row['float']:.2%}",
        f"{row['int8']:.2%}",
        f"{100 * row['cost']:+.2f}{spread} points{noise}",
        *(f"{row[key]:.1f}" for key in ("output_sqnr_db", "lowest_sqnr_db", "lowest_whole_sqnr_db")),
        f"{row['most_zeroed']:.1%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
