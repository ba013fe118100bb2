import json
import shutil
from pathlib import Path

import pytest
import torch
from report.report_cases import Tree, small_model

import repblocks as rb
from repblocks.errors import CheckpointError
from repblocks.report import write_report
from repblocks.report.facts import gather
from repblocks.report.figures.pictures import curves_in, shares_in
from repblocks.report.page import render
from repblocks.report.sources import read_source


def test_the_report_of_a_run_shows_what_the_run_recorded(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert write_report(run_folder, path) == [path]
    page = path.read_text(encoding="utf-8")
    sections = {attributes.get("id") for attributes in Tree(page).named("section")}
    assert {"training", "files"} <= sections
    summary = json.loads((run_folder / "summary.json").read_text())
    assert f"{100 * summary['deploy']['test_accuracy']:.2f}%" in page
    manifest = json.loads((run_folder / "deploy" / "deploy.json").read_text())
    assert manifest["files"]["safetensors"]["sha256"][:16] in page
    assert 'id="figure-share_history"' in page
    assert "max_epochs: 2" in page
    assert f"{summary['images']['train']:,} train" in page


def test_the_model_of_a_run_is_its_best_checkpoint(run_folder: Path) -> None:
    source = read_source(run_folder)
    deploy = rb.load(run_folder / "deploy" / "model.safetensors")
    assert rb.verify(source.model, deploy, torch.randn(2, 1, 32, 32)).passed
    assert source.title == "rb_repvgg_cifar"
    assert rb.form_of(source.model) == "train"


def test_columns_of_metrics_are_curves_and_shares(run_folder: Path) -> None:
    metrics = read_source(run_folder).run.metrics
    curves = curves_in(metrics)
    assert curves.keys() == {"loss", "accuracy", "learning rate"}
    assert curves["loss"].keys() == {"train", "val"}
    assert len(curves["loss"]["val"]) == 2
    order = ["stem.conv", "stages.0.0.conv"]
    shares = shares_in(metrics, order)
    assert list(shares)[:2] == order
    assert sum(values[-1] or 0 for values in shares["stem.conv"].values()) == pytest.approx(1, abs=1e-5)


def test_an_epoch_without_a_value_has_none(tmp_path: Path) -> None:
    rb.save(small_model(), tmp_path / "deploy" / "model.safetensors")
    (tmp_path / "metrics.csv").write_text("train/loss,val/loss\n0.5,\n0.25,0\n")
    assert read_source(tmp_path).run.metrics == {"train/loss": [0.5, 0.25], "val/loss": [None, 0.0]}


def test_a_checkpoint_and_a_file_are_sources(run_folder: Path, tmp_path: Path) -> None:
    model = small_model()
    rb.save(model, tmp_path / "model.safetensors")
    assert len(gather(tmp_path / "model.safetensors").blocks) == 4
    assert len(read_source(run_folder / "checkpoints" / "last.ckpt").run.metrics) == 0


def test_a_deploy_folder_is_a_source(run_folder: Path) -> None:
    facts = gather(run_folder / "deploy")
    assert facts.blocks == ()
    assert "The model has one form only" in render(facts)


def test_a_run_without_its_checkpoints_still_has_its_deploy_form(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    source = read_source(folder)
    assert rb.form_of(source.model) == "deploy"
    assert source.run.summary


def test_an_unfinished_run_is_reported_without_what_it_lacks(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run_folder / "checkpoints" / "best.ckpt", tmp_path / "checkpoints")
    page = render(gather(tmp_path))
    assert "test accuracy" not in page
    assert 'id="training"' not in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[1]"),
        ("summary.json", '{"train": 3}'),
        ("deploy/deploy.json", '{"deploy_version": 1, "files": [1]}'),
        ("run.yaml", "a: [b"),
        ("run.yaml", "!!python/object/apply:os.system ['true']"),
        ("metrics.csv", "loss\nmany\n"),
    ],
)
def test_damaged_files_are_named(run_folder: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{Path(name).name}.* damaged"):
        read_source(folder)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model: needed is the folder of a run"):
        read_source(tmp_path)


def test_nothing_is_written_where_the_source_is_bad(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        write_report(tmp_path / "model.safetensors", tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_report(
            small_model().get_submodule("stem"), tmp_path / "file" / "report.html", inputs=torch.randn(2, 1, 9, 9)
        )
