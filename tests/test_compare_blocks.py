"""`scripts/compare_blocks.py` trains the same network with other blocks, and says what is noise."""

import json
import math
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import integrate, stats
from support import loaded_script
from torch import nn

import repblocks as rb
from repblocks.training.console import quiet_lightning

script = loaded_script(Path(__file__).parents[1] / "scripts" / "compare_blocks.py")
TINY = (
    "+model.args.depths=[1,1,1]",
    "+model.args.widths=[8,8,8]",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
)
BLOCKS = ("plain", "dbb")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the script wrote and, in table.txt, what it printed, for two blocks and two seeds."""
    folder = tmp_path_factory.mktemp("compared")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        quiet_lightning()
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, sep=" ", **_: lines.append(sep.join(map(str, words))))
        files = ["--json", str(folder / "found.json"), "--plot", str(folder / "plot.png")]
        script.main(["--blocks", "dbb", "--seeds", "2", *files, *TINY])
    (folder / "table.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def rows(made: Path) -> dict[str, Any]:
    return json.loads((made / "found.json").read_text())["blocks"]


@pytest.fixture
def table(made: Path) -> list[list[str]]:
    lines = (made / "table.txt").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_table_has_a_row_for_each_block_with_the_plain_one_first(table: list[list[str]]) -> None:
    head, rule, *cells = table
    assert head == list(script.COLUMNS)
    assert set(rule) == {"---", ""} or set(rule) == {"---"}
    assert [row[0] for row in cells] == [f"`{block}`" for block in BLOCKS]
    assert all(len(row) == len(head) for row in cells)


def test_accuracies_are_given_by_seed_and_the_means_and_intervals_are_theirs(rows: dict[str, Any]) -> None:
    assert list(rows) == list(BLOCKS)
    for row in rows.values():
        assert len(row["accuracies"]) == 2
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracies"])
        against = [a - b for a, b in zip(row["accuracies"], rows["plain"]["accuracies"], strict=True)]
        for name, values in (("accuracy", row["accuracies"]), ("difference", against)):
            assert row[f"{name}_mean"] == pytest.approx(sum(values) / 2)
            error = stats.sem(values)
            low, high = stats.t.interval(0.95, 1, loc=sum(values) / 2, scale=error) if error else (sum(values) / 2,) * 2
            assert row[f"{name}_half_width"] == pytest.approx((high - low) / 2)
    assert len({accuracy for row in rows.values() for accuracy in row["accuracies"]}) > 1


def test_the_table_says_what_the_file_says(rows: dict[str, Any], table: list[list[str]]) -> None:
    for row, cells in zip(rows.values(), table[2:], strict=True):
        assert cells[1] == f"{100 * row['accuracy_mean']:.2f}%"
        assert cells[2] == f"± {100 * row['accuracy_half_width']:.2f}%"
        assert cells[4:6] == [f"{row['step_ratio']:.2f}", f"{row['kept_ratio']:.2f}"]
        assert cells[6:] == [f"{row['params']:,}", f"{row['macs']:,}"]


def test_within_noise_is_said_exactly_where_the_interval_of_differences_holds_zero(
    rows: dict[str, Any], table: list[list[str]]
) -> None:
    for name, cells in zip(BLOCKS[1:], table[3:], strict=True):
        mean, half = rows[name]["difference_mean"], rows[name]["difference_half_width"]
        assert ("(within noise)" in cells[3]) == (mean - half <= 0 <= mean + half)
    assert table[2][3] == "-"


def test_what_ships_costs_the_same_whatever_was_trained(rows: dict[str, Any]) -> None:
    plain = rb.deployed(
        rb.create_model("rb_repvgg_cifar", block="plain", depths=[1, 1, 1], widths=[8, 8, 8], in_chans=1)
    )
    cost = rb.profile(plain, (1, 32, 32))
    assert {(row["params"], row["macs"]) for row in rows.values()} == {(cost.params, cost.macs)}


def test_what_a_step_costs_is_that_of_the_trained_network(rows: dict[str, Any]) -> None:
    assert rows["plain"]["step_ratio"] == rows["plain"]["kept_ratio"] == 1
    assert rows["dbb"]["step_ratio"] > 1.2
    size = {"depths": [1, 1, 1], "widths": [8, 8, 8], "in_chans": 1}
    models = {block: rb.create_model("rb_repvgg_cifar", block=block, **size).train() for block in BLOCKS}
    batch = script.composed()["data"]["batch_size"]
    kept = {block: script.bytes_kept(model, torch.randn(batch, 1, 32, 32)) for block, model in models.items()}
    for block in BLOCKS:
        assert rows[block]["kept_ratio"] == pytest.approx(kept[block] / kept["plain"], rel=1e-3)


def test_the_plot_is_a_picture(made: Path) -> None:
    with Image.open(made / "plot.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size[0] == 1050
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_names_and_intervals_are_in_the_plot(rows: dict[str, Any], tmp_path: Path) -> None:
    script.plot(rows, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(re.search(rf"<!-- {block}  \(step \d+\.\d\d\) -->", drawn) for block in BLOCKS)


@pytest.mark.parametrize("values", [(0.9, 0.95), (0.91, 0.9, 0.95, 0.99, 0.93)])
def test_the_interval_holds_the_mean_of_students_distribution_in_95_percent(values: tuple[float, ...]) -> None:
    found = script.interval(values, "x")
    assert found["x_mean"] == pytest.approx(statistics.fmean(values))
    freedom, error = len(values) - 1, statistics.stdev(values) / math.sqrt(len(values))
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    reach = found["x_half_width"] / error
    inside, _ = integrate.quad(lambda t: scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2), -reach, reach)
    assert inside == pytest.approx(0.95)


def test_equal_values_have_no_width_and_one_value_has_no_interval() -> None:
    assert script.interval([0.5, 0.5, 0.5], "x") == {"x_mean": 0.5, "x_half_width": 0.0}
    assert script.interval([0.5], "x") == {"x_mean": 0.5, "x_half_width": None}


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.02, 0.01, "+2.00% ± 1.00%"),
        (-0.02, 0.01, "-2.00% ± 1.00%"),
        (0.01, 0.02, "+1.00% ± 2.00% (within noise)"),
        (-0.01, 0.01, "-1.00% ± 1.00% (within noise)"),
        (0.0, 0.0, "+0.00% ± 0.00% (within noise)"),
        (0.01, None, "+1.00% ± ? (within noise)"),
    ],
)
def test_a_difference_counts_where_its_interval_leaves_out_zero(mean: float, half: float | None, said: str) -> None:
    assert script.difference(mean, half) == said


def test_what_a_forward_pass_keeps_is_counted_once_and_without_weights() -> None:
    images = torch.randn(2, 3, 8, 5)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert script.bytes_kept(conv, images) == images.nbytes
    twice = nn.Sequential(conv, nn.Conv2d(4, 4, 1))
    assert script.bytes_kept(twice, images) == images.nbytes + 4 * 2 * 4 * 8 * 5

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x).sigmoid()  # which keeps its result
            return y.square() + self.conv(x)  # the square keeps the same memory again, and the layer the images

    assert script.bytes_kept(Shared(), images) == images.nbytes + 4 * 2 * 4 * 8 * 5


def test_a_step_learns_from_its_images_and_leaves_no_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    seen: list[torch.Tensor] = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    with torch.no_grad():
        script.stepping(model)(torch.randn(4, 1, 5, 5))
    assert len(seen) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
