from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from repblocks import benchmark


def test_benchmark_times_both_forms_in_each_runtime(command: Any, trained: Path, tmp_path: Path) -> None:
    options = ("--runtimes", "eager,onnxruntime,openvino", "--repeats", "2", "--plot", tmp_path / "plot.png", "--json")
    said = command("benchmark", trained, *options)
    assert said.code == 0, said.err
    rows = said.json["rows"]
    assert [row["runtime"] for row in rows] == ["eager", "onnxruntime", "openvino"]
    for row in rows:
        assert row["train_over_deploy"] == pytest.approx(row["train_ms"] / row["deploy_ms"])
        assert row["timm_ms"] is None
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size[0] > 300
    assert "eager" in command("benchmark", trained, "--runtimes", "eager", "--repeats", "1").out


def test_the_compiler_is_a_runtime(command: Any, trained: Path) -> None:
    rows = command("benchmark", trained, "--runtimes", "compile", "--repeats", "1", "--json").json["rows"]
    assert [row["runtime"] for row in rows] == ["compile"]


def test_models_whose_shortcuts_can_be_absorbed_are_measured_both_ways(command: Any) -> None:
    said = command("benchmark", "rb_repnext_cifar", "--runtimes", "eager", "--repeats", "1", "--json")
    (row,) = said.json["shortcuts"]
    assert row["keep_over_absorb"] == pytest.approx(row["keep_ms"] / row["absorb_ms"])
    assert "recommended" in command("benchmark", "rb_repnext_cifar", "--runtimes", "eager", "--repeats", "1").out
    said = command("benchmark", "rb_repvgg_cifar", "--runtimes", "eager", "--repeats", "1")
    assert "recommended" not in said.out


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    command: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repblocks.benchmark.compare_forms", lambda *args, **options: pytest.fail("measured"))  # pyright: ignore[reportUnknownLambdaType]
    said = command("benchmark", trained, "--plot", tmp_path / "plot.txt")
    assert said.code == 1
    assert ".svg" in said.err


@pytest.mark.parametrize(("name", "twin"), [("rb_repvgg_a0", True), ("rb_repvit_m0_9", True), ("resnet18", False)])
def test_the_twin_is_timms_model_of_the_same_layout(name: str, twin: bool) -> None:  # noqa: FBT001
    found = benchmark.twin_of(name)
    assert (found is not None) == twin


def test_unknown_runtimes_are_refused(command: Any, trained: Path) -> None:
    said = command("benchmark", trained, "--runtimes", "tensorrt")
    assert said.code == 1
    assert "tensorrt" in said.err


def test_report_writes_one_page_and_figures(command: Any, trained: Path, tmp_path: Path) -> None:
    said = command("report", trained, "-o", tmp_path / "page.html", "--figures", tmp_path / "figures", "--json")
    assert said.code == 0, said.err
    assert str(tmp_path / "page.html") in said.json["written"]
    assert "http://" not in (tmp_path / "page.html").read_text().replace("http://www.w3.org", "")
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".svg"}
