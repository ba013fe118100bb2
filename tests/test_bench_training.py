"""The command that measures what a training step of many branches costs."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from support import loaded_script
from torch import nn

import repblocks as rb
from repblocks.blocks import RepConv
from repblocks.profiling import profile

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_training.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return loaded_script(SCRIPT)


@pytest.mark.slow
def test_a_row_holds_every_figure_of_each_side_and_a_size_beyond_the_memory_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ["--sizes", "2@32", "1@60000", "--rounds", "2", "--memory", "2", "--profile", "--json", str(file)]
    command = [sys.executable, str(SCRIPT), "rb_repvgg_a0", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row, too_large = json.loads(file.read_text())["rows"]
    sides = {"plain", "timm", "separate", "ours"}
    assert row["alone"].keys() == row["step_ms"].keys() == sides
    assert all(found["rss_bytes"] > found["rss_bytes_before"] > 0 for found in row["alone"].values())
    assert all(0 < found["profile"]["products"] < 1 for found in row["alone"].values())
    assert len(row["ratios"]) == 12
    assert all(ratio > 0 for ratio in row["ratios"].values())
    assert row["ratios"]["saved, separate / plain"] > 1
    assert (too_large["alone"], too_large["ratios"]) == ({}, {})
    assert done.stderr.count("left out") == 8
    head, rule, line, line_of_too_large, *profiles = done.stdout.splitlines()
    assert len({text.count("|") for text in (head, rule, line, line_of_too_large)}) == 1
    assert f"{row['ratios']['ours / plain']:.2f} (1.35)" in line
    assert "- (1.35)" in line_of_too_large
    assert sum(text.startswith(tuple(f"| {side} |" for side in sides)) for text in profiles) == 4


@pytest.mark.parametrize("name", ["rb_repvgg_a0", "rb_mobileone_s0"])
def test_the_plain_twin_is_the_deploy_form_with_batch_norms(bench: ModuleType, name: str) -> None:
    model = rb.create_model(name, num_classes=10)
    channels = sum(block.out_channels for block in model.modules() if isinstance(block, RepConv))
    deploy = profile(rb.create_model(name, num_classes=10, form="deploy"), (3, 32, 32))
    twin = profile(bench.plain_twin(model), (3, 32, 32))
    assert twin.params == deploy.params + channels  # weight and bias of a norm for the bias of a convolution
    assert twin.macs == deploy.macs


def test_saved_bytes_count_each_storage_once_and_no_parameter_or_buffer(bench: ModuleType) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    images, maps, statistics = 2 * 3 * 8 * 8, 2 * 4 * 8 * 8, 2 * 4
    # The map behind the ReLU is saved twice, by itself and by the linear layer.
    assert bench.saved_bytes(net, torch.randn(2, 3, 8, 8)) == 4 * (images + 2 * maps + statistics)


def test_timms_model_computes_the_same_without_the_convolutions_that_crash(bench: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("repvgg_a0").eval()
    torch.manual_seed(0)
    ours = bench.timms("rb_repvgg_a0").eval()
    images = torch.randn(2, 3, 33, 35)
    torch.testing.assert_close(ours(images), theirs(images))
    convs = [module for module in ours.modules() if isinstance(module, nn.Conv2d)]
    assert not [conv for conv in convs if conv.kernel_size == (1, 1) != conv.stride and conv.in_channels == 3]


def test_a_ratio_is_the_median_of_the_rounds_ratios(bench: ModuleType) -> None:
    times = {"timm": [1.0, 10.0, 3.0], "plain": [1.0, 5.0, 1.0]}
    assert bench.ratios(times, {}) == {"timm / plain": 2.0}


def test_the_profile_tells_products_from_the_rest(bench: ModuleType) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    assert bench.profile_of(lambda: x.detach() @ x.detach())["others"].keys() == {"detach"}
    found = bench.profile_of(lambda: (x @ x).relu().sum().backward())
    assert {"relu", "sum", "threshold_backward"} <= found["others"].keys()
    assert found["products"] == pytest.approx(1 - sum(found["others"].values()))


@pytest.mark.parametrize("name", ["convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm_", "mv", "dot"])
def test_convolutions_and_matrix_products_are_arithmetic(bench: ModuleType, name: str) -> None:
    assert bench.PRODUCT.search(name)


@pytest.mark.parametrize("name", ["native_batch_norm", "add_", "copy_", "mul", "upsample_bilinear2d", "_foreach_add_"])
def test_everything_else_is_not(bench: ModuleType, name: str) -> None:
    assert not bench.PRODUCT.search(name)


def test_an_unknown_model_is_refused(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["rb_nothing"])
    assert "got model 'rb_nothing'" in capsys.readouterr().err
