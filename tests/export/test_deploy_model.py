import importlib.util
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from export.cases import pictures, small
from PIL import Image
from support import calibrate
from timm.data import create_transform

from repblocks.blocks import deployed
from repblocks.errors import CheckpointError, ConfigurationError, DataError
from repblocks.export import DeployModel, add_file, export, load_deploy
from repblocks.models import create_model
from repblocks.verification import verify

RUNTIMES = ["onnx", "openvino", "safetensors", "timm", "pt2"]


def photos(count=3):
    """Pictures of several sizes, with structure."""
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (6, 5 + i, 3), dtype=np.uint8) for i in range(count)]
    return [Image.fromarray(pixels).resize((40 + 7 * i, 50)) for i, pixels in enumerate(pictures)]


def expected(model, images):
    """Probabilities, by the training's own way from an image to an input."""
    config = model.pretrained_cfg
    keys = ("interpolation", "mean", "std", "crop_pct")
    transform = create_transform(tuple(config["input_size"]), **{key: config[key] for key in keys})
    with torch.no_grad():
        return model(torch.stack([transform(image) for image in images])).softmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "deploy"
    export(small(), path, formats=RUNTIMES)
    return path


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "deploy"
    export(small(), path, formats=["onnx"], pixels="uint8")
    return path


@pytest.fixture
def own_folder(tmp_path):
    """A folder that a test may spoil."""
    export(small(), tmp_path, formats=["safetensors"])
    return tmp_path


@pytest.mark.parametrize("runtime", [None, *RUNTIMES])
def test_a_folder_predicts_what_the_trained_model_predicts(folder, runtime):
    probabilities = expected(small(), photos())
    for row, best in zip(probabilities, load_deploy(folder, runtime=runtime).predict(photos(), top=5), strict=True):
        assert [prediction.index for prediction in best] == row.argsort(descending=True).tolist()
        assert [prediction.label for prediction in best] == ["abcde"[prediction.index] for prediction in best]
        got = torch.tensor([prediction.probability for prediction in best])
        torch.testing.assert_close(got, row.sort(descending=True).values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_images_are_resized_as_the_description_says(own_folder, interpolation):
    path = own_folder / "deploy.json"
    path.write_text(settings_with(path.read_text(), interpolation=interpolation, crop_pct=0.75))
    settings = json.loads(path.read_text())["preprocessing"]
    keys = ("interpolation", "mean", "std", "crop_pct")
    transform = create_transform(tuple(settings["input_size"]), **{key: settings[key] for key in keys})
    torch.testing.assert_close(
        load_deploy(own_folder).preprocess(photos()), torch.stack(list(map(transform, photos())))
    )


@pytest.mark.parametrize("pixels", ["uint8", "unit"])
def test_a_graph_that_normalises_predicts_the_same(tmp_path, pixels):
    export(small(), tmp_path, formats=["pt2"], pixels=pixels)
    model = load_deploy(tmp_path, runtime="pt2")
    given = model.preprocess(photos())
    assert given.dtype == (torch.uint8 if pixels == "uint8" else torch.float32)
    torch.testing.assert_close(model(given).softmax(1), expected(small(), photos()), rtol=1e-4, atol=1e-6)


def test_onnx_is_preferred_and_safetensors_serves_without_onnxruntime(folder, monkeypatch):
    assert load_deploy(folder).file.name == "onnx"
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith(("onnx", "openvino")) else found(name)
    )
    assert load_deploy(folder).file.name == "safetensors"
    with pytest.raises(ConfigurationError, match=r"the onnx format needs onnx, .*pip install"):
        load_deploy(folder, runtime="onnx")


def test_a_folder_that_nothing_here_runs_is_explained(of_bytes, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"has onnx, none of which runs here; .*pip install"):
        load_deploy(of_bytes)


def test_a_prediction_needs_neither_lightning_nor_training_code(folder, tmp_path):
    photos(1)[0].save(tmp_path / "photo.png")
    code = (
        "import sys\n"
        "from repblocks.export import load_deploy\n"
        f"print(len(load_deploy({str(folder)!r}).predict([{str(tmp_path / 'photo.png')!r}])[0]))\n"
        "print([name for name in sys.modules if name.startswith(('pytorch_lightning', 'hydra', 'repblocks.training'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "5\n[]\n"


def test_paths_and_pillow_images_are_the_same(folder, tmp_path):
    model = load_deploy(folder)
    for place, image in enumerate(photos()):
        image.save(tmp_path / f"{place}.png")
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    assert torch.equal(model.preprocess(paths), model.preprocess(photos()))
    assert torch.equal(model.preprocess(map(str, paths)), model.preprocess(photos()))


def test_a_gray_model_reads_gray(tmp_path):
    model = create_model("rb_repvgg_cifar", num_classes=3, in_chans=1, depths=(1, 1, 1), widths=(8, 12, 16))
    export(calibrate(model, torch.randn(4, 1, 32, 32)), tmp_path, formats=["safetensors"])
    loaded = load_deploy(tmp_path)
    assert loaded.preprocess(photos()).shape == (3, 1, 32, 32)
    assert loaded.predict(photos())[0][0].label in ("0", "1", "2")  # it has no class names


def test_top_is_how_many(folder):
    model = load_deploy(folder)
    assert [len(best) for best in model.predict(photos(2), top=2)] == [2, 2]
    assert len(model.predict(photos(1), top=99)[0]) == 5
    with pytest.raises(ConfigurationError, match="got top=0; at least one class is needed"):
        model.predict(photos(), top=0)


def test_predictions_read_well_and_go_into_json(folder):
    best = load_deploy(folder).predict(photos(1), top=1)[0][0]
    assert str(best) == f"{best.label} ({best.probability:.1%})"
    assert json.loads(json.dumps(best.to_dict())) == best.to_dict()


def test_a_model_without_class_scores_is_run_but_does_not_predict(tmp_path):
    model = create_model("rb_repvgg_cifar", features_only=True, depths=(1, 1, 1), widths=(8, 12, 16))
    export(calibrate(model, pictures(4, 32, 32)), tmp_path, formats=["onnx"])
    loaded = load_deploy(tmp_path)
    assert len(loaded(loaded.preprocess(photos()))) > 1
    with pytest.raises(
        ConfigurationError, match=r"gives list of several tensors, .*model\(model\.preprocess\(images\)\)"
    ):
        loaded.predict(photos())


def test_outputs_are_the_deploy_forms(folder):
    verify(small(), load_deploy(folder), pictures(3)).raise_if_different("the folder")


def test_the_deploy_json_itself_may_be_given(folder):
    assert isinstance(load_deploy(folder / "deploy.json"), DeployModel)


def png(width, height, pixels=b""):
    """A picture of one bit per pixel; how much of it there is, is another thing."""
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0),
        b"IDAT": zlib.compress(pixels),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_picture_that_unpacks_to_gigabytes_is_refused_without_unpacking_it(folder, tmp_path):
    (tmp_path / "photo.png").write_bytes(png(30_000, 30_000, bytes(30_000 * 3_751)))
    assert (tmp_path / "photo.png").stat().st_size < 10**6
    with pytest.raises(DataError, match=r"photo\.png cannot be read as an image .*900000000 pixels"):
        load_deploy(folder).predict([tmp_path / "photo.png"])


def test_a_truncated_picture_that_pillow_has_only_opened_is_named_by_its_place(folder, tmp_path):
    path = tmp_path / "photo.jpg"
    photos(1)[0].resize((300, 300)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with (
        Image.open(path) as picture,
        pytest.raises(DataError, match=r"image 1 cannot be decoded \(image file is truncated"),
    ):
        load_deploy(folder).predict([photos(1)[0], picture])


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40), png(0, 0), png(9, 9)])
def test_a_file_that_is_no_image_is_named(folder, tmp_path, content):
    (tmp_path / "photo.png").write_bytes(content)
    photos(1)[0].save(tmp_path / "good.png")
    with pytest.raises(DataError, match=r"photo\.png cannot be read as an image"):
        load_deploy(folder).predict([tmp_path / "good.png", tmp_path / "photo.png"])


def test_a_truncated_image_is_named(folder, tmp_path):
    path = tmp_path / "photo.jpg"
    photos(1)[0].resize((300, 300)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"photo\.jpg cannot be read as an image"):
        load_deploy(folder).predict([path])


def test_missing_images_no_images_and_images_without_a_range_are_refused(folder, tmp_path):
    model = load_deploy(folder)
    with pytest.raises(DataError, match=r"nowhere\.png cannot be read"):
        model.predict([tmp_path / "nowhere.png"])
    with pytest.raises(DataError, match="got no images to predict"):
        model.predict([])
    with pytest.raises(DataError, match=r"image 0 has pixels of mode 'F'"):
        model.predict([Image.new("F", (8, 8))])


@pytest.mark.parametrize("runtime", ["onnx", "openvino", "safetensors"])
def test_a_swapped_file_is_refused(tmp_path, folder, runtime):
    copy_of(folder, tmp_path)
    about = json.loads((tmp_path / "deploy.json").read_text())["files"][runtime]
    name = about["beside"][0]["file"] if "beside" in about else about["file"]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that was exported: its SHA-256 is "):
        load_deploy(tmp_path, runtime=runtime)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        load_deploy(tmp_path, runtime=runtime)


def copy_of(folder, target):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_file_of_another_export_is_refused(own_folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    model = small()
    with torch.no_grad():
        model.head.fc.bias.add_(1)
    export(model, other, formats=["safetensors"])
    (own_folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is not the file that was exported"):
        load_deploy(own_folder)


def test_a_folder_without_the_runtime_asked_for_says_what_it_has(own_folder):
    with pytest.raises(ConfigurationError, match="has no 'onnx' file; it has safetensors: choose one of them"):
        load_deploy(own_folder, runtime="onnx")


def test_a_folder_that_is_none_is_explained(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"there is no /.*deploy\.json; give a folder that repblocks.export wrote"
    ):
        load_deploy(tmp_path)


def spoiled(content, **changes):
    return json.dumps({**json.loads(content), **changes})


def settings_with(content, **changes):
    return spoiled(content, preprocessing={**json.loads(content)["preprocessing"], **changes})


def entry_with(content, **changes):
    about = json.loads(content)
    about["files"]["safetensors"] |= changes
    return json.dumps(about)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content[:100], "is damaged: JSONDecodeError"),
        (lambda content: "[" * 100_000, "is damaged: RecursionError"),
        (lambda content: "[]", r"it is \[\], not an object"),
        (lambda content: spoiled(content, deploy_version=99), "has version 99, and this repblocks reads up to 1"),
        (lambda content: spoiled(content, deploy_version="1"), "deploy_version is '1'"),
        (lambda content: spoiled(content, files=[]), r"files is \[\]"),
        (lambda content: spoiled(content, classes={"a": 1}), "classes is {'a': 1}"),
        (lambda content: spoiled(content, preprocessing=None), "preprocessing is None"),
        (lambda content: spoiled(content, files={"onnx": 3}), r"files\['onnx'\] is 3"),
        (lambda content: entry_with(content, file="../../etc/passwd"), r"files\['safetensors'\] is "),
        (lambda content: entry_with(content, file="/etc/passwd"), r"files\['safetensors'\] is "),
        (lambda content: entry_with(content, file=".."), r"files\['safetensors'\] is "),
        (lambda content: entry_with(content, beside=[{"file": "../x", "sha256": ""}]), r"files\['safetensors'\] is "),
        (lambda content: entry_with(content, sha256=None), r"files\['safetensors'\] is "),
        (lambda content: spoiled(content, preprocessing={}), "input_size=None, needed are channels, height and width"),
        (
            lambda content: spoiled(content, preprocessing={"input_size": [3, 24, 16]}),
            "says preprocessing.mean=None, std=None",
        ),
        (lambda content: settings_with(content, interpolation="magic"), "says preprocessing.interpolation='magic'"),
        (lambda content: settings_with(content, crop_pct=0), "says preprocessing.crop_pct=0"),
        (lambda content: settings_with(content, crop_pct=1e-320), "says preprocessing.crop_pct=1e-320"),
        (lambda content: settings_with(content, mean=["a", 0, 0]), r"says preprocessing.mean=\['a', 0, 0\]"),
        (lambda content: settings_with(content, mean=[float("nan"), 0, 0]), r"says preprocessing.mean=\[nan, 0, 0\]"),
        (lambda content: settings_with(content, std=[1, 0, 1]), r"says preprocessing.std=\[1, 0, 1\]"),
        (lambda content: settings_with(content, std=[1, 1, float("inf")]), r"says preprocessing.std=\[1, 1, inf\]"),
        (lambda content: settings_with(content, input_size=[3, 0, 16]), r"input_size=\[3, 0, 16\], needed are"),
        (lambda content: settings_with(content, input_size=[3, 24]), r"input_size=\[3, 24\], needed are"),
        (lambda content: spoiled(content, deploy_version=0), "deploy_version is 0"),
        (lambda content: "{}", "is damaged: deploy_version is 'missing'"),
        (lambda content: settings_with(content, input_size=[3, 24.5, 16]), r"input_size=\[3, 24.5, 16\], needed are"),
        (lambda content: spoiled(content, dtype="Module"), "dtype is 'Module'"),
        (lambda content: entry_with(content, input={"pixels": "any"}), r"files\['safetensors'\] is "),
    ],
)
def test_a_spoiled_description_is_refused(own_folder, spoil, said):
    path = own_folder / "deploy.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(CheckpointError, match=said):
        load_deploy(own_folder)


def test_a_huge_description_is_not_read(own_folder):
    with (own_folder / "deploy.json").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(CheckpointError, match="has 67,108,865 bytes, which no export writes"):
        load_deploy(own_folder)


def test_a_file_of_ones_own_can_be_described_and_used(folder, tmp_path):
    copy_of(folder, tmp_path)
    (tmp_path / "model.int8.onnx").write_bytes((tmp_path / "model.onnx").read_bytes())
    add_file(tmp_path, "onnx-int8", tmp_path / "model.int8.onnx", format="onnx", accuracy_drop=0.002)
    model = load_deploy(tmp_path, runtime="onnx-int8")
    assert model.file.facts["accuracy_drop"] == 0.002
    assert model.predict(photos()) == load_deploy(folder, runtime="onnx").predict(photos())
    assert load_deploy(tmp_path).file.name == "onnx"


def test_a_fact_that_json_has_no_number_for_is_refused_and_the_description_stays(own_folder):
    before = (own_folder / "deploy.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        add_file(own_folder, "tuned", own_folder / "model.safetensors", format="safetensors", drop=float("nan"))
    assert (own_folder / "deploy.json").read_bytes() == before
    load_deploy(own_folder)


def test_the_source_is_recorded(tmp_path):
    source = tmp_path / "best.ckpt"
    source.write_bytes(b"checkpoint")
    report = export(deployed(small()), tmp_path / "deploy", formats=["safetensors"], source=source)
    assert json.loads(report.manifest.read_text())["source"] == {
        "file": "best.ckpt",
        "sha256": "47320987f9a49d5b00119b960f247a956773f57543982b8bfcb6da5bb3afd9ef",
    }
    with pytest.raises(CheckpointError, match=r"cannot read /.*nowhere\.ckpt"):
        export(small(), tmp_path / "other", formats=["safetensors"], source=tmp_path / "nowhere.ckpt")
    assert not (tmp_path / "other").exists()
