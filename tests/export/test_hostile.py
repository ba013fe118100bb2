"""Full disks, and files that were made to harm."""

import io
import json
import pickle
import resource
import struct
import zipfile
from contextlib import contextmanager

import pytest
import torch
from export.cases import small
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from repblocks.errors import CheckpointError
from repblocks.export import FORMATS, export, load_deploy
from repblocks.export.manifest import sha256

RUNTIMES = ["safetensors", "timm", "onnx", "pt2", "openvino"]


class Trap:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@contextmanager
def disk_full_beyond(limit):
    """Files of this process cannot grow beyond some bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    export(small(), folder, formats=RUNTIMES)
    return folder


@pytest.fixture
def folder(tmp_path, exported):
    """A folder to be spoiled."""
    target = tmp_path / "deploy"
    target.mkdir()
    for path in exported.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def replaced(folder, name, content):
    """Put a file into a folder, with a description that vouches for it."""
    about = json.loads((folder / "deploy.json").read_text())
    path = folder / about["files"][name]["file"]
    path.write_bytes(content)
    about["files"][name]["sha256"] = sha256(path)
    (folder / "deploy.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("limit", [0, 3000])
def test_a_full_disk_leaves_an_earlier_export_and_nothing_half_written(folder, name, limit):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"cannot write /.* on a disk with space left"), disk_full_beyond(limit):
        export(small(), folder, formats=[name])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_leaves_no_new_folder_with_halves(tmp_path):
    with pytest.raises(CheckpointError), disk_full_beyond(12_000):  # the weights do not fit, the graph's XML does
        export(small(), tmp_path / "deploy", formats=["openvino"])
    assert list((tmp_path / "deploy").iterdir()) == []


@pytest.mark.parametrize("name", ["safetensors", "timm", "onnx", "openvino"])
def test_a_pickle_in_a_files_place_is_not_run(folder, tmp_path, name):
    for content in (pickle.dumps(Trap(tmp_path / "trap")), saved_by_torch(Trap(tmp_path / "trap"))):
        replaced(folder, name, content)
        with pytest.raises(CheckpointError):
            load_deploy(folder, runtime=name)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("record", ["data/sample_inputs/model.pt", "data/weights/weight_0", "code.so", "twice"])
def test_a_pickle_inside_a_pt2_is_not_run(folder, tmp_path, record):
    harmful, spoiled = saved_by_torch(Trap(tmp_path / "trap")), io.BytesIO()
    with zipfile.ZipFile(folder / "model.pt2") as before, zipfile.ZipFile(spoiled, "w") as after:
        for entry in before.infolist():
            content = harmful if entry.filename.endswith(record) else before.read(entry)
            if record.endswith("weight_0") and entry.filename.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
                content = content.replace(b'"use_pickle":false', b'"use_pickle":true')
            after.writestr(entry, content)
        if record == "code.so":
            after.writestr("archive/data/aotinductor/code.so", b"")
        if record == "twice":
            with pytest.warns(UserWarning, match="Duplicate name"):
                after.writestr("archive/data/sample_inputs/model.pt", harmful)
    replaced(folder, "pt2", spoiled.getvalue())
    with pytest.raises(CheckpointError, match=r"is not a torch\.export file that repblocks wrote"):
        load_deploy(folder, runtime="pt2")
    assert not (tmp_path / "trap").exists()


def saved_by_torch(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize("name", ["safetensors", "timm"])
@pytest.mark.parametrize("length", [2**62, 10**8 + 1, 10**8 - 1])
def test_a_huge_header_is_refused_without_memory_for_it(folder, name, length):
    replaced(folder, name, struct.pack("<Q", length) + b"{" + bytes(100))
    with pytest.raises(CheckpointError):
        load_deploy(folder, runtime=name)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("content", [b"", b"\x00" * 64])
def test_garbage_is_refused_in_every_format(folder, name, content):
    replaced(folder, name, content)
    with pytest.raises(CheckpointError):
        load_deploy(folder, runtime=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"args": {"checkpoint_path": "/etc/passwd"}}, "args are {'checkpoint_path'"),
        ({"args": {"pretrained": True}}, "args are {'pretrained'"),
        ({"args": []}, r"args are \[\]"),
        ({"model": "hf-hub:someone/something"}, "model is 'hf-hub:someone/something'"),
        ({"model": 3}, "does not say which model timm has to build"),
        ({"dtype": "nn"}, "does not say which model timm has to build"),
        ({"form": "sideways"}, "form is 'sideways'"),
        ({"args": {"depths": "x"}}, "timm does not build 'rb_repvgg_cifar' from"),
    ],
)
def test_a_timm_file_may_not_ask_for_other_files_or_nonsense(folder, changes, said):
    path = folder / "model.timm.safetensors"
    with safe_open(path, framework="pt") as file:
        recipe = json.loads(file.metadata()["timm"])
    save_file(load_file(path), path, metadata={"timm": json.dumps({**recipe, **changes})})
    with pytest.raises(CheckpointError, match=said):
        FORMATS["timm"].open(path)


def test_an_onnx_file_may_not_read_files_elsewhere(folder, tmp_path):
    import onnx

    (tmp_path / "secret").write_bytes(bytes(4096))
    proto = onnx.load(folder / "model.onnx")
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "../secret", "offset": "0", "length": "864"}.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    replaced(folder, "onnx", proto.SerializeToString())
    with pytest.raises(CheckpointError, match="is not a model that onnxruntime runs"):
        load_deploy(folder, runtime="onnx")
