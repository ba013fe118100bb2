import copy
import hashlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch
from export.cases import EXPORTING, ZOO, pictures, session, small, trained, wrong
from support import calibrate
from torch import nn

from repblocks.blocks import RepVGGBlock, deployed, form_of
from repblocks.checkpoint import load, save
from repblocks.errors import CheckpointError, ConfigurationError, VerificationError
from repblocks.export import FORMATS, Format, add_file, check_formats, export, onnx_graph
from repblocks.models import create_model
from repblocks.verification import TOLERANCES, verify


@pytest.fixture(scope="module", params=ZOO)
def exported(request, tmp_path_factory):
    """A model of the zoo, its folder and the report."""
    folder = tmp_path_factory.mktemp("run") / "deploy"
    model = trained(request.param)
    return model, folder, export(model, folder)


def test_an_export_is_three_files(exported):
    _, folder, report = exported
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.onnx", "deploy.json"}
    assert report.files == {"safetensors": folder / "model.safetensors", "onnx": folder / "model.onnx"}
    assert report.manifest == folder / "deploy.json"


def test_the_safetensors_file_is_the_deploy_form(exported):
    model, folder, _ = exported
    loaded = load(folder / "model.safetensors")
    assert form_of(loaded) == "deploy"
    verify(model, loaded, pictures(3)).raise_if_different("the file")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_onnx_file_equals_the_train_form_at_every_batch_size(exported, count):
    model, folder, _ = exported
    runtime = session(folder / "model.onnx")
    report = verify(
        model, lambda x: torch.from_numpy(runtime.run(["output"], {"images": x.numpy()})[0]), pictures(count)
    )
    report.raise_if_different("the file")


def test_the_onnx_graph_is_plain(exported):
    model, folder, _ = exported
    graph = onnx.load(folder / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    convolutions = [module for module in deployed(model).modules() if isinstance(module, nn.Conv2d)]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == len(convolutions)
    assert [dimension.dim_param for dimension in graph.input[0].type.tensor_type.shape.dim] == ["batch", "", "", ""]
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_onnx_file_says_nothing_about_the_machine_that_wrote_it(exported):
    content = (exported[1] / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b"repblocks/" not in content


def test_the_manifest_describes_the_files(exported):
    model, folder, report = exported
    manifest = json.loads(report.manifest.read_text())
    assert manifest["model"] == model.model_name
    assert manifest["args"] == {"in_chans": 3, "num_classes": 5}
    assert manifest["form"] == "deploy"
    assert manifest["classes"] == ["a", "b", "c", "d", "e"]
    assert manifest["preprocessing"]["input_size"] == [3, 24, 16]
    assert {"mean", "std", "interpolation"} <= manifest["preprocessing"].keys()
    assert manifest["params"] == sum(parameter.numel() for parameter in deployed(model).parameters())
    assert {"repblocks", "torch", "timm", "onnx", "onnxruntime"} <= manifest["versions"].keys()
    assert manifest["files"]["onnx"]["opset"] == onnx.load(folder / "model.onnx").opset_import[0].version
    for name, entry in manifest["files"].items():
        content = (folder / entry["file"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["equivalence"] == report.equivalence[name].to_dict()
        assert entry["equivalence"]["passed"]
        assert entry["equivalence"]["tolerance"] == TOLERANCES[torch.float32]["model"]


def test_exports_of_equal_models_are_equal_files(tmp_path):
    first, second = export(small(), tmp_path / "first"), export(small(), tmp_path / "second")
    assert first.manifest.read_bytes() == second.manifest.read_bytes()


def test_an_export_is_silent_and_leaves_the_model_and_the_random_numbers_alone(tmp_path, capfd, caplog):
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    export(model, tmp_path)
    drawn = torch.rand(3)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert form_of(model) == "train"
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_real_images_are_compared_too_and_set_the_size(tmp_path):
    images = pictures(5, 20, 36)
    report = export(deployed(small()), tmp_path, inputs=images)
    assert {name: equivalence.samples for name, equivalence in report.equivalence.items()} == {
        "safetensors": 9,
        "onnx": 9,
    }
    assert json.loads(report.manifest.read_text())["files"]["onnx"]["input"]["shape"] == ["batch", 3, 20, 36]
    assert session(tmp_path / "model.onnx").run(None, {"images": images.numpy()})[0].shape == (5, 5)


def test_an_error_that_random_images_hide_is_found_on_the_real_ones(tmp_path, monkeypatch):
    def slightly_biased(model):
        changed = deployed(model)
        with torch.no_grad():
            changed[1].bias += 3e-6
        return changed

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 16, 5)).eval()
    with torch.no_grad():
        model[1].bias.zero_()
    model.pretrained_cfg = {"input_size": (3, 24, 16)}
    monkeypatch.setattr(EXPORTING, "deployed", slightly_biased)
    assert export(model, tmp_path, formats=[]).files == {}
    with pytest.raises(VerificationError, match="the deploy form differs"):
        export(model, tmp_path, formats=[], inputs=1e-3 * pictures(2))


def test_float16_models_are_exported_in_float16(tmp_path):
    report = export(small().half(), tmp_path)
    assert {equivalence.dtype for equivalence in report.equivalence.values()} == {"float16"}
    assert session(tmp_path / "model.onnx").get_inputs()[0].type == "tensor(float16)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_the_runtime_lacks_are_refused_and_nothing_is_written(tmp_path, dtype):
    model = small().to(dtype)
    with pytest.raises(ConfigurationError, match=rf"cannot hold {dtype}: .*model\.float\(\)"):
        export(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert export(model, tmp_path, formats=["safetensors"]).equivalence["safetensors"].passed


def test_what_an_onnx_file_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_LARGEST_ONNX_BYTES", 10_000)
    with pytest.raises(ConfigurationError, match=r"at most 2 GiB, the weights need .*formats=\('safetensors',\)"):
        export(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_feature_backbones_are_exported_with_all_their_outputs(tmp_path):
    model = create_model("rb_repvgg_cifar", features_only=True, depths=(1, 1, 1), widths=(8, 12, 16))
    calibrate(model, pictures(4, 32, 32))
    report = export(model, tmp_path)
    assert len(session(report.files["onnx"]).get_outputs()) == len(model(pictures(2))) > 1


def test_timms_own_models_are_exported(tmp_path):
    model = calibrate(create_model("test_resnet", num_classes=3), pictures(4, 32, 32))
    assert all(report.passed for report in export(model, tmp_path, inputs=pictures(2, 32, 48)).equivalence.values())


def test_a_net_of_ones_own_is_exported_to_onnx(tmp_path):
    model = nn.Sequential(RepVGGBlock(3, 8, stride=2), RepVGGBlock(8, 8), nn.Flatten())
    calibrate(model, pictures(4))
    report = export(model, tmp_path, formats=["onnx"], inputs=pictures(2))
    assert json.loads(report.manifest.read_text())["model"] is None
    with pytest.raises(CheckpointError, match="carries no registered model name"):
        export(model, tmp_path / "other", inputs=pictures(2))
    assert list((tmp_path / "other").iterdir()) == []
    with pytest.raises(ConfigurationError, match=r"no pretrained_cfg\['input_size'\].*inputs=images"):
        export(model, tmp_path / "other")


def test_a_manifest_that_cannot_be_written_takes_the_files_with_it(tmp_path):
    model = small()
    model.pretrained_cfg["label_names"] = ("a", "b")
    with pytest.raises(CheckpointError, match="5 classes and 2 class names"):
        export(model, tmp_path, formats=["onnx"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ZOO)
def test_a_wrong_collapse_writes_nothing_and_names_the_block(tmp_path, monkeypatch, name):
    block = "stages.1.0"
    monkeypatch.setattr(EXPORTING, "deployed", lambda model: wrong(deployed(model), block))
    with pytest.raises(VerificationError, match=rf"the deploy form differs .* most is '{block}.*; no file was written"):
        export(trained(name), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["safetensors", "onnx"])
def test_a_wrong_file_takes_the_others_with_it_and_keeps_an_earlier_export(tmp_path, monkeypatch, broken):
    format, earlier = FORMATS[broken], {"model.safetensors": b"1", "model.onnx": b"2", "deploy.json": b"3"}
    for name, content in earlier.items():
        (tmp_path / name).write_bytes(content)

    def write_wrong(job, path):
        model = wrong(job.deploy, "stages.2.0")
        return format.write(replace(job, deploy=model, graph=model), path)

    monkeypatch.setitem(FORMATS, broken, replace(format, write=write_wrong))
    with pytest.raises(VerificationError, match=rf"the {broken} file differs .* block that differs most is .*written"):
        export(small(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier


def test_the_wrong_block_of_a_wrong_file_is_named(tmp_path, monkeypatch):
    def write_wrong(job, path):
        save(wrong(job.deploy, "stages.2.0"), path)
        return {}

    monkeypatch.setitem(FORMATS, "safetensors", replace(FORMATS["safetensors"], write=write_wrong))
    with pytest.raises(VerificationError, match=r"most is 'stages\.2\.0.*\(relative error 0\.0"):
        export(small(), tmp_path)


def test_a_graph_with_more_layers_than_the_deploy_form_is_refused(tmp_path, monkeypatch):
    exporter = torch.onnx.export

    def export_with_one_more(*args, **kwargs):
        program = exporter(*args, **kwargs)
        proto = program.model_proto
        proto.graph.node.append(proto.graph.node[0])
        return SimpleNamespace(model_proto=proto, exported_program=program.exported_program)

    monkeypatch.setattr(torch.onnx, "export", export_with_one_more)
    with pytest.raises(VerificationError, match="graph has 5 convolutions and 0 BatchNorms, the deploy model 4 and 0"):
        export(small(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_format_is_two_functions(tmp_path, monkeypatch):
    def write(job, path):
        torch.save(job.deploy, path)
        return {"kind": "pickle"}

    pickled = Format(filename="model.pt", write=write, open=lambda path: torch.load(path, weights_only=False))
    monkeypatch.setitem(FORMATS, "pickle", pickled)
    report = export(small(), tmp_path, formats=["pickle"], inputs=pictures(3))
    assert report.equivalence["pickle"].passed
    assert json.loads(report.manifest.read_text())["files"]["pickle"]["kind"] == "pickle"


@pytest.mark.parametrize("formats", ["coreml", ["onnx", "coreml"]])
def test_an_unknown_format_is_answered_with_the_known_ones(tmp_path, formats):
    with pytest.raises(
        ConfigurationError, match="unknown export format 'coreml'; choose from safetensors, timm, onnx, pt2"
    ):
        export(small(), tmp_path, formats=formats)


def test_missing_packages_are_answered_with_the_command(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(
        ConfigurationError, match=r'needs onnx, onnxscript, onnxruntime, .*pip install "repblocks\[export\]"'
    ):
        check_formats(["safetensors", "onnx"])
    assert check_formats(["safetensors"]).keys() == {"safetensors"}


def test_the_packages_of_the_extras_are_not_imported_with_repblocks():
    packages = sorted({package for format in FORMATS.values() for package in format.packages})
    code = f"import sys, repblocks; print([name for name in {packages} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_files_of_an_earlier_export_do_not_stay_beside_a_description_of_others(tmp_path):
    (tmp_path / "notes.onnx").write_text("mine")
    for filename in ("model.onnx", "model.bin", "model.safetensors", ".model.0123abcd.onnx"):
        (tmp_path / filename).write_text("old")
    (tmp_path / ".bashrc.original.bak").write_text("mine")
    export(small(), tmp_path, formats=["safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.safetensors", "deploy.json", "notes.onnx", ".bashrc.original.bak")
    }


def test_what_an_earlier_description_added_goes_with_it_unless_it_was_changed(tmp_path):
    export(small(), tmp_path, formats=["safetensors"])
    for name in ("int8", "tuned"):
        (tmp_path / f"model.{name}.onnx").write_text(name)
        add_file(tmp_path, name, tmp_path / f"model.{name}.onnx", format="onnx")
    (tmp_path / "model.tuned.onnx").write_text("by hand")
    export(small(), tmp_path, formats=["safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "deploy.json", "model.tuned.onnx"}


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 1, 24, 16), (2, 3, 24), (0, 3, 24, 16)])
def test_inputs_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(ConfigurationError, match=r"needs inputs=images of shape \[N, 3, H, W\], and got \["):
        export(small(), tmp_path, inputs=torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_a_net_of_ones_own_does_not_take_are_refused(tmp_path):
    model = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1))
    with pytest.raises(ConfigurationError, match=r"of shape \[N, C, H, W\] that the model runs on; on \[1, 4, 8, 8\]"):
        export(model, tmp_path, formats=[], inputs=torch.zeros(1, 4, 8, 8))
    export(model, tmp_path, formats=[], inputs=torch.zeros(1, 3, 8, 8))


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write /.*file/deploy\.json "):
        export(small(), tmp_path / "file", formats=[])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_module_without_parameters_is_exported(tmp_path):
    report = export(nn.ReLU(), tmp_path, formats=["onnx"], inputs=pictures(2))
    assert json.loads(report.manifest.read_text())["dtype"] == "float32"
