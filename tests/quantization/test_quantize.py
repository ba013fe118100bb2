import errno
import json
import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support import calibrate
from torch import nn

import repblocks as rb
from repblocks.errors import CheckpointError, ConfigurationError, DataError, VerificationError
from repblocks.export import FORMATS, load_deploy
from repblocks.quantization import bias_corrected, equalized, quantize
from repblocks.quantization.rounding import rounded_by_channel
from repblocks.quantization.static import FILENAME


def images(count=12):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = rb.create_model("rb_repvgg_cifar", num_classes=4, in_chans=1, depths=(1, 1, 1), widths=(8, 8, 8))
    return calibrate(net, images())


@pytest.fixture(scope="module")
def labels(model):
    with torch.no_grad():
        return model(images()).argmax(1)


@pytest.fixture(scope="module")
def written(model, labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    report = quantize(model, images(), folder, labelled=[(images(), labels)], max_drop=0.5)
    return report, onnx.load(report.path)


def initializers(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_the_file_runs_at_other_batch_sizes_and_is_near_the_float_model(model, written):
    run = FORMATS["onnx"].open(written[0].path)
    x = images(5)
    with torch.no_grad():
        expected = model(x)
    got = torch.cat([run(x[:1]), run(x[1:])])
    assert got.shape == expected.shape
    assert 0 < (got - expected).norm() / expected.norm() < 0.2


def test_the_report_holds_what_was_measured(model, labels, written):
    report, _ = written
    got = FORMATS["onnx"].open(report.path)(images())
    assert report.int8_accuracy == pytest.approx((got.argmax(1) == labels).float().mean().item())
    assert (report.float_accuracy, report.labelled_images, report.calibration_images) == (1.0, 12, 12)
    assert report.drop == 1 - report.int8_accuracy
    assert report.agreement == pytest.approx(report.int8_accuracy)
    assert report.bytes == report.path.stat().st_size
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["path"] == FILENAME
    assert facts["versions"]["onnxruntime"]
    assert "accuracy 100.00% in float" in str(report)


def test_every_convolution_and_linear_layer_is_int8_by_channel_and_no_batch_norm_is_left(model, written):
    tensors = initializers(written[1])
    deploy = rb.deployed(model)
    layers = {name: layer for name, layer in deploy.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for name, layer in layers.items():
        assert tensors[f"{name}.weight_quantized"].dtype == np.int8
        assert tensors[f"{name}.weight_scale"].shape == (len(layer.weight),)
    kinds = {node.op_type for node in written[1].graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "BatchNormalization" not in kinds


def test_weights_in_the_file_are_those_that_the_reports_calculate_with(model, written):
    tensors = initializers(written[1])
    for name, layer in rb.deployed(model).named_modules():
        if isinstance(layer, nn.Conv2d):
            levels, scale = tensors[f"{name}.weight_quantized"], tensors[f"{name}.weight_scale"]
            stored = torch.from_numpy(levels * scale.reshape(-1, 1, 1, 1))
            assert stored.allclose(rounded_by_channel(layer.weight.detach()), atol=1e-6)


def test_seven_bits_are_half_as_many_levels(model, tmp_path):
    report = quantize(model, images(), tmp_path, weight_bits=7)
    levels = initializers(onnx.load(report.path))["stem.conv.conv.weight_quantized"]
    assert abs(levels).max() in (63, 64)
    assert report.weight_bits == 7


def test_layers_that_are_named_stay_in_float(model, written, tmp_path):
    report = quantize(model, images(), tmp_path, in_float=["stem", "head.*"])
    assert report.in_float == ("stem.conv.conv", "head.fc")
    tensors, deploy = initializers(onnx.load(report.path)), rb.deployed(model)
    assert torch.from_numpy(tensors["stem.conv.conv.weight"].copy()).equal(deploy.stem.conv.conv.weight)
    assert "head.fc.weight_quantized" not in tensors
    assert "stages.0.0.conv.conv.weight_quantized" in tensors
    assert report.output_sqnr_db > written[0].output_sqnr_db


def test_a_name_of_no_module_to_keep_in_float_is_refused(model, tmp_path):
    with pytest.raises(ConfigurationError, match="'nothing' matches no module"):
        quantize(model, images(), tmp_path, in_float="nothing")


def test_a_maximum_that_is_padded_by_minus_infinity_stays_what_it_is(tmp_path):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x):
            padded = nn.functional.pad(self.first(x), (0, 1, 0, 1), value=-torch.inf)
            return self.second(nn.functional.max_pool2d(padded, 2))

    assert quantize(Padded().eval(), images(), tmp_path).output_sqnr_db > 30


def test_percentiles_cut_off_outliers_without_a_word(model, written, tmp_path, capfd):
    report = quantize(model, images(), tmp_path, method="percentile")
    before, after = (initializers(proto) for proto in (written[1], onnx.load(report.path)))
    scales = [name for name, values in before.items() if name.endswith("_scale") and values.ndim == 0]
    assert any(after[name] < before[name] for name in scales)
    assert all(after[name] <= before[name] * 1.001 for name in scales)
    assert report.float_accuracy is None
    assert report.drop is None
    assert "accuracy not measured" in str(report)
    assert capfd.readouterr().out == ""


@pytest.fixture(scope="module")
def fragile():
    """A plain RepVGG-like trouble: one activation channel is so loud that the others vanish in 8 bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net.append(nn.Flatten()).append(nn.Linear(8, 4))
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = net[0].weight[3] * 1e5, 0
        net[2].weight[:, 3] /= 1e5
        loud = net[:6](images())
        net[6].weight /= loud.std(0)
        net[6].bias -= (loud @ net[6].weight.T + net[6].bias).mean(0)
    return net.eval()


def test_an_accuracy_that_drops_too_far_writes_no_file_and_says_both(fragile, tmp_path):
    with torch.no_grad():
        labels = fragile(images(64)).argmax(1)
    with pytest.raises(VerificationError, match=r"float 100\.00%: a drop of .*no file was written") as raised:
        quantize(fragile, images(64), tmp_path, labelled=(images(64), labels))
    assert "best_prepared(model, images).model" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_refused_file_leaves_the_one_of_before(fragile, tmp_path):
    (tmp_path / FILENAME).write_bytes(b"before")
    with torch.no_grad():
        labels = fragile(images(64)).argmax(1)
    with pytest.raises(VerificationError):
        quantize(fragile, images(64), tmp_path, labelled=(images(64), labels))
    assert [path.name for path in tmp_path.iterdir()] == [FILENAME]
    assert (tmp_path / FILENAME).read_bytes() == b"before"


def test_equalization_saves_what_int8_would_lose(fragile, tmp_path):
    with torch.no_grad():
        labels = fragile(images(64)).argmax(1)
    report = quantize(equalized(fragile).model, images(64), tmp_path, labelled=(images(64), labels), max_drop=0.1)
    assert report.drop <= 0.1
    assert report.path.is_file()


def test_a_corrected_model_is_measured_against_the_one_it_was_corrected_from(model, labels, tmp_path):
    corrected = bias_corrected(model, images()).model
    with torch.no_grad():
        for parameter in corrected.head.parameters():
            parameter.zero_()  # so that it classifies badly by itself
    report = quantize(corrected, images(), tmp_path, reference=model, labelled=(images(), labels), max_drop=1.0)
    assert report.float_accuracy == 1.0
    assert report.int8_accuracy < 1.0


def test_a_deploy_folder_describes_the_file_and_opens_it(model, tmp_path):
    rb.export(model, tmp_path, formats=["safetensors"], inputs=images())
    for bits in (7, 8):  # the second one takes the place of the first
        report = quantize(model, images(), tmp_path, weight_bits=bits)
    deploy = load_deploy(tmp_path, runtime="int8")
    assert deploy(images()).equal(FORMATS["onnx"].open(report.path)(images()))
    entry = json.loads((tmp_path / "deploy.json").read_text())["files"]["int8"]
    assert (entry["file"], entry["weight_bits"], entry["agreement"]) == (FILENAME, 8, report.agreement)


def test_one_image_is_enough_to_write_a_file_for_any_batch(model, tmp_path):
    report = quantize(model, images(1), tmp_path)
    assert len(FORMATS["onnx"].open(report.path)(images(3))) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "magic"}, "method='magic'; needed one of minmax"),
        ({"max_drop": 5}, r"max_drop=5; needed a share .* such as 0\.01"),
        ({"weight_bits": 4}, "weight_bits=4; needed 8"),
    ],
)
def test_wrong_arguments_are_named(model, tmp_path, options, said):
    with pytest.raises(ConfigurationError, match=said):
        quantize(model, images(), tmp_path, **options)


def test_half_precision_is_refused_with_the_way_out(model, tmp_path):
    half = rb.deployed(model).half()
    for given in ({}, {"reference": half}):
        with pytest.raises(ConfigurationError, match=r"quantize model\.float\(\)"):
            quantize(model if given else half, images(), tmp_path, **given)


def test_labels_without_any_image_that_counts_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="no labelled images"):
        quantize(model, images(), tmp_path, labelled=(images(), torch.full((12,), -100)))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_reported(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        quantize(model, images(), tmp_path / "file")


def test_a_map_of_scores_has_no_accuracy(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3)).eval()
    with pytest.raises(ConfigurationError, match=r"class scores \[N, classes\]"):
        quantize(net, images(), tmp_path, labelled=(images(), torch.zeros(12, dtype=torch.int64)))
    assert not list(tmp_path.iterdir())
    report = quantize(net, images(), tmp_path)
    got = FORMATS["onnx"].open(report.path)(images())
    assert report.output_sqnr_db > 20
    assert report.agreement == pytest.approx((got.argmax(1) == net(images()).argmax(1)).double().mean().item())


def test_a_full_disk_leaves_nothing_behind(model, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="space left"):
            quantize(model, images(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_the_model_is_not_changed(model, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantize(model.train(), images(), tmp_path)
    assert model.training
    assert rb.form_of(model.eval()) == "train"
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_outputs_without_classes_are_refused_and_nothing_is_written(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 1, 16), nn.Flatten(0)).eval()
    with pytest.raises(ConfigurationError, match=r"gives \[12\]; needed outputs \[N, classes, \.\.\.\]"):
        quantize(net, images(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_float_model_that_gives_nan_is_named_as_the_cause(model, tmp_path):
    spoiled = rb.deployed(model)
    with torch.no_grad():
        spoiled.head.fc.bias[0] = torch.nan
    for given in ((spoiled, None), (model, spoiled)):
        with pytest.raises(VerificationError, match="the float model gives NaN"):
            quantize(given[0], images(), tmp_path, reference=given[1])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def deploy_folder(model, tmp_path):
    """With an earlier int8 file."""
    rb.export(model, tmp_path, formats=["safetensors"], inputs=images())
    quantize(model, images(), tmp_path, weight_bits=7)
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_description_that_cannot_be_written_leaves_the_earlier_file_that_it_describes(
    model, deploy_folder, monkeypatch
):
    before, written = contents(deploy_folder), Path.write_text

    def full(path, text, **kwargs):
        if path.suffix == ".json":
            written(path, text[:100], **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"cannot write .* space left"):
        quantize(model, images(), deploy_folder)
    assert contents(deploy_folder) == before


@pytest.mark.parametrize("limit", [0, 4096])
def test_a_full_disk_leaves_the_earlier_file(model, deploy_folder, limit):
    before, (soft, hard) = contents(deploy_folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="space left"):
            quantize(model, images(), deploy_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(deploy_folder) == before


def test_a_refused_file_leaves_the_earlier_one(fragile, deploy_folder):
    before = contents(deploy_folder)
    with torch.no_grad():
        labels = fragile(images(64)).argmax(1)
    with pytest.raises(VerificationError):
        quantize(fragile, images(64), deploy_folder, labelled=(images(64), labels), max_drop=0.01)
    assert contents(deploy_folder) == before


def test_a_damaged_description_is_reported_before_any_file_is_written(model, deploy_folder):
    (deploy_folder / "deploy.json").write_text("{")
    before = contents(deploy_folder)
    with pytest.raises(CheckpointError, match=r"deploy\.json is damaged"):
        quantize(model, images(), deploy_folder)
    assert contents(deploy_folder) == before


def test_an_export_into_the_same_folder_takes_the_int8_file_of_before_with_it(model, deploy_folder):
    """It would be int8 of another model."""
    rb.export(model, deploy_folder, formats=["safetensors"], inputs=images())
    assert contents(deploy_folder).keys() == {"deploy.json", "model.safetensors"}
    assert "int8" not in json.loads((deploy_folder / "deploy.json").read_text())["files"]


def test_an_int8_file_that_was_changed_since_stays_where_it_is(model, deploy_folder):
    (deploy_folder / FILENAME).write_bytes(b"tuned by hand")
    rb.export(model, deploy_folder, formats=["safetensors"], inputs=images())
    assert (deploy_folder / FILENAME).read_bytes() == b"tuned by hand"
    with pytest.raises(ConfigurationError, match="has no 'int8' file"):
        load_deploy(deploy_folder, runtime="int8")
