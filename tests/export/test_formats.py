"""Each format, opened by its own library and not by ours."""

import collections
import importlib.util
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import onnx
import openvino
import pytest
import timm
import torch
from export.cases import pictures, session, small
from support import calibrate
from timm.utils.model import reparameterize_model

from repblocks.blocks import deployed
from repblocks.errors import CheckpointError, ConfigurationError, VerificationError
from repblocks.export import FORMATS, export, onnx_graph
from repblocks.models import create_model
from repblocks.verification import verify

EXECUTORCH = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason='ExecuTorch is no part of dev, because its wheel pins much: pip install "repblocks[executorch]"',
)
GRAPHS = ["onnx", "pt2", "openvino"]
SIZES = [(24, 16), (56, 40)]


def runner(name, path):
    """What runs a file, by nothing but the library of its format."""
    if name == "onnx":
        return lambda x: torch.from_numpy(session(path).run(["output"], {"images": x.numpy()})[0])
    if name == "pt2":
        return torch.export.load(path).module()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    with ThreadPoolExecutor(1) as aside:  # as repblocks.runtimes does, and why
        compiled = aside.submit(lambda: openvino.Core().compile_model(path, "CPU", settings)).result()
    return lambda x: torch.from_numpy(np.array(compiled({"images": x.numpy()})["output"]))


def entry(report, name):
    return json.loads(report.manifest.read_text())["files"][name]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    return export(small(), tmp_path_factory.mktemp("fixed"), formats=GRAPHS, inputs=pictures(6))


@pytest.fixture(scope="module")
def resizable(tmp_path_factory):
    """Graphs of bytes in any size."""
    folder = tmp_path_factory.mktemp("dynamic")
    return export(small(), folder, formats=GRAPHS, inputs=pictures(3), sizes="dynamic", pixels="uint8", opset=18)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_graph_equals_the_train_form_at_every_batch_size(fixed, name, count):
    verify(small(), runner(name, fixed.files[name]), pictures(count)).raise_if_different(name)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("size", SIZES)
def test_a_graph_of_open_size_that_normalises_equals_the_train_form_on_normalised_images(resizable, name, size):
    model, pixels = small(), torch.randint(256, (3, 3, *size), dtype=torch.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    run = runner(name, resizable.files[name])
    verify(model, lambda _: run(pixels), (pixels / 255 - mean) / std).raise_if_different(name)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_description_says_what_a_graph_takes_and_on_what_it_was_compared(fixed, resizable, name):
    given, taken = entry(fixed, name), entry(resizable, name)
    normalized, bytes_ = {"pixels": "normalized", "dtype": "float32"}, {"pixels": "uint8", "dtype": "uint8"}
    both = {"name": "images", "layout": "NCHW"}
    assert given["input"] == {**both, "shape": ["batch", 3, 24, 16], **normalized}
    assert taken["input"] == {**both, "shape": ["batch", 3, "height", "width"], **bytes_}
    assert given["compared"] == {"batch_sizes": [1, 2, 3], "image_sizes": [[24, 16]]}
    assert taken["compared"]["image_sizes"] == [[24, 16], [56, 16], [56, 80]]


def test_a_unit_graph_takes_pixels_from_0_to_1(tmp_path):
    model, pixels = small(), torch.rand(2, 3, 24, 16)
    report = export(model, tmp_path, formats=["pt2"], pixels="unit")
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    run = runner("pt2", report.files["pt2"])
    verify(model, lambda _: run(pixels), (pixels - mean) / std).raise_if_different("the graph")


@pytest.mark.parametrize("name", GRAPHS)
def test_equal_models_give_equal_files_that_say_nothing_about_this_machine(tmp_path, fixed, name):
    again = export(small(), tmp_path, formats=[name], inputs=pictures(6))
    content = again.files[name].read_bytes()
    assert b"site-packages" not in content
    assert b"repblocks/" not in content
    if name != "pt2":  # torch numbers the symbols of a trace, and archives, from export to export
        assert entry(again, name)["sha256"] == entry(fixed, name)["sha256"]


def test_a_dynamic_graph_names_its_axes_and_its_opset(resizable):
    proto = onnx.load(resizable.files["onnx"])
    axes = [dimension.dim_param for dimension in proto.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", "", "height", "width"]
    assert [opset.version for opset in proto.opset_import if not opset.domain] == [18]
    assert entry(resizable, "onnx")["opset"] == 18


def test_an_onnx_graph_has_only_what_inference_runs(resizable):
    """Four convolutions and the classifier; normalisation is two operations and a cast."""
    kinds = collections.Counter(node.op_type for node in onnx.load(resizable.files["onnx"]).graph.node)
    assert (kinds["Conv"], kinds["Gemm"], kinds["Cast"], kinds["Sub"], kinds["Mul"]) == (4, 1, 1, 1, 1)
    assert not {"BatchNormalization", "Dropout", "Identity"} & kinds.keys()
    assert entry(resizable, "onnx")["batch_norms"] == 0


def test_the_batch_norms_of_a_plain_model_are_folded_into_its_onnx_graph(tmp_path):
    model = calibrate(create_model("test_resnet", num_classes=3), pictures(4, 32, 32))
    report = export(model, tmp_path, formats=["onnx"], inputs=pictures(2, 32, 32))
    assert entry(report, "onnx")["batch_norms"] == 0


@pytest.mark.parametrize("leftover", ["Dropout", "BatchNormalization", "weight"])
def test_leftovers_of_training_are_refused(leftover):
    weight = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "weight")
    attributes = {"training_mode": 1} if leftover == "BatchNormalization" else {}
    node = onnx.helper.make_node("Relu" if leftover == "weight" else leftover, ["x"], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "g", [], [], [weight] if leftover == "weight" else [])
    with pytest.raises(VerificationError, match=f"1 leftovers of training .*{leftover}"):
        onnx_graph._require_no_leftovers(onnx.helper.make_model(graph))


def test_an_exporter_that_leaves_dropout_in_the_graph_is_found_out(tmp_path, monkeypatch):
    exporter = torch.onnx.export

    def export_with_dropout(*args, **kwargs):
        proto = exporter(*args, **kwargs).model_proto
        proto.graph.node.append(onnx.helper.make_node("Dropout", [proto.graph.output[0].name], ["dropped"]))
        return SimpleNamespace(model_proto=proto)

    monkeypatch.setattr(torch.onnx, "export", export_with_dropout)
    with pytest.raises(VerificationError, match=r"keeps 1 leftovers of training \(such as 'Dropout'\)"):
        export(small(), tmp_path, formats=["onnx"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [17, 99])
def test_an_opset_that_torch_does_not_write_is_refused(tmp_path, opset):
    with pytest.raises(ConfigurationError, match=rf"opset={opset} is not one that torch writes; choose from 18 to"):
        export(small(), tmp_path, formats=["onnx"], opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("sizes", "any"), ("pixels", "rgb")])
def test_unknown_options_are_answered_with_the_known_ones(tmp_path, option, value):
    with pytest.raises(ConfigurationError, match=f"{option}='{value}' is unknown; choose from"):
        export(small(), tmp_path, **{option: value})


def test_a_model_that_fixes_its_size_cannot_be_dynamic(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 16, 5))
    with pytest.raises(ConfigurationError, match=r"takes images of other sizes than 24x16, .*sizes='fixed'"):
        export(model, tmp_path, formats=["pt2"], sizes="dynamic", inputs=pictures(2))


def test_a_graph_whose_code_fixes_an_axis_is_not_dynamic(tmp_path):
    class Fixing(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * (2 if x.shape[3] == 16 else 3)

    with pytest.raises(ConfigurationError, match=r"fixes the width of its images.*sizes='fixed'"):
        export(Fixing(), tmp_path, formats=["pt2"], sizes="dynamic", inputs=pictures(2))


def test_normalisation_needs_mean_and_std(tmp_path):
    model = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(ConfigurationError, match="has no mean and std for it"):
        export(model, tmp_path, formats=["onnx"], pixels="uint8", inputs=pictures(2))


def test_a_float16_model_is_float16_in_openvino(tmp_path):
    report = export(small().half(), tmp_path, formats=["openvino"])
    assert openvino.Core().read_model(report.files["openvino"]).input().element_type == openvino.Type.f16


@pytest.fixture(scope="module")
def vgg():
    return calibrate(create_model("rb_repvgg_a0", num_classes=5), pictures(4, 64, 64))


def test_plain_timm_loads_the_train_form_of_a_network_that_it_has_too(tmp_path, vgg):
    report = export(vgg, tmp_path, formats=["timm"], inputs=pictures(2, 64, 64))
    theirs = timm.create_model("repvgg_a0", num_classes=5, checkpoint_path=str(report.files["timm"])).eval()
    verify(vgg, theirs, pictures(2, 64, 64)).raise_if_different("timm's model")
    verify(vgg, reparameterize_model(theirs), pictures(2, 64, 64)).raise_if_different("timm's collapsed model")
    assert entry(report, "timm")["load"] == (
        "timm.utils.reparameterize_model(timm.create_model('repvgg_a0', in_chans=3, num_classes=5, "
        "checkpoint_path='model.timm.safetensors').eval())"
    )


def test_plain_timm_loads_a_deploy_form_into_its_reparameterized_network(tmp_path, vgg):
    report = export(deployed(vgg), tmp_path, formats=["timm"], inputs=pictures(2, 64, 64))
    theirs = reparameterize_model(timm.create_model("repvgg_a0", num_classes=5).eval())
    timm.models.load_checkpoint(theirs, str(report.files["timm"]))
    verify(vgg, theirs, pictures(2, 64, 64)).raise_if_different("timm's model")
    assert entry(report, "timm")["load"].startswith("timm.models.load_checkpoint(timm.utils.reparameterize_model(")


@pytest.mark.parametrize("name", ["rb_repnext_cifar", "rb_repvgg_a0"])
def test_a_network_without_a_counterpart_is_loaded_by_our_name(tmp_path, name):
    args = {"block": "dbb"} if name == "rb_repvgg_a0" else {}
    model = calibrate(create_model(name, num_classes=5, **args), pictures(2, 32, 32))
    report = export(model, tmp_path, formats=["timm"], inputs=pictures(2, 32, 32))
    path = str(report.files["timm"])
    theirs = timm.create_model(name, num_classes=5, form="deploy", checkpoint_path=path, **args).eval()
    verify(model, theirs, pictures(2, 32, 32)).raise_if_different("timm's model")
    assert entry(report, "timm")["load"].startswith(f"import repblocks; timm.create_model('{name}', ")


def test_our_own_file_is_one_that_timm_loads_too(tmp_path):
    report = export(small(), tmp_path, formats=["safetensors"])
    args = {"num_classes": 5, "depths": (1, 1, 1), "widths": (8, 12, 16), "form": "deploy"}
    theirs = timm.create_model("rb_repvgg_cifar", checkpoint_path=str(report.files["safetensors"]), **args).eval()
    verify(small(), theirs, pictures(2)).raise_if_different("timm's model")


def test_a_model_of_timms_own_is_loaded_by_its_name(tmp_path):
    model = calibrate(create_model("test_resnet", num_classes=3), pictures(4, 32, 32))
    report = export(model, tmp_path, formats=["timm"], inputs=pictures(2, 32, 32))
    theirs = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(report.files["timm"])).eval()
    verify(model, theirs, pictures(2, 32, 32)).raise_if_different("timm's model")


def test_a_timm_file_of_a_float16_model_is_float16(tmp_path):
    report = export(small().half(), tmp_path, formats=["timm"])
    assert report.equivalence["timm"].dtype == "float16"
    assert {value.dtype for value in FORMATS["timm"].open(report.files["timm"]).parameters()} == {torch.float16}


def test_a_deploy_form_in_float16_is_opened_in_float16(tmp_path, vgg):
    report = export(deployed(vgg).half(), tmp_path, formats=["timm"], inputs=pictures(2, 64, 64))
    assert {value.dtype for value in FORMATS["timm"].open(report.files["timm"]).parameters()} == {torch.float16}


def test_timm_does_not_build_a_net_of_ones_own(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no registered name builds this Conv2d .*formats=\('onnx',\)"):
        export(torch.nn.Conv2d(3, 4, 3), tmp_path, formats=["timm"], inputs=pictures(2))
    assert list(tmp_path.iterdir()) == []


@EXECUTORCH
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # its imports warn
def test_an_executorch_program_equals_the_train_form_at_every_batch_size(tmp_path):
    from executorch.runtime import Runtime

    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    report = export(small(), tmp_path, formats=["executorch"], inputs=pictures(9))
    program = Runtime.get().load_program(report.files["executorch"])
    method = program.load_method("forward")
    for count in (1, 2, 8):
        verify(small(), lambda x: method.execute([x])[0].clone(), pictures(count)).raise_if_different("the program")
    assert entry(report, "executorch")["largest_batch"] == 8
    run = FORMATS["executorch"].open(report.files["executorch"])
    verify(small(), run, pictures(17)).raise_if_different("the program in several steps")
    (tmp_path / "broken.pte").write_bytes(report.files["executorch"].read_bytes()[:200])
    with pytest.raises(CheckpointError, match="not a program that ExecuTorch runs"):
        FORMATS["executorch"].open(tmp_path / "broken.pte")


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch"])
def test_a_missing_extra_is_answered_with_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigurationError, match=rf'the {name} format needs .* pip install "repblocks\[\w+\]"'):
        export(small(), tmp_path, formats=[name])
    assert list(tmp_path.iterdir()) == []
