"""Full disks, and files that were made to harm."""

import errno
import io
import json
import pickle
import resource
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path

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
@pytest.mark.parametrize("length", [2**64 - 1, 2**62, 10**8 + 1, 10**8 - 1])
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


def test_a_description_that_cannot_be_written_leaves_an_earlier_export(folder, monkeypatch):
    before, write_text = {path.name: path.read_bytes() for path in folder.iterdir()}, Path.write_text

    def full(path, text, **kwargs):
        write_text(path, text[:100], **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"cannot write /.* on a disk with space left"):
        export(small(), folder, formats=["safetensors", "onnx"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def rewritten(path, change=lambda name, content: content, **options):
    """The archive again, record by record."""
    written = io.BytesIO()
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(written, "w", **options) as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
    return written.getvalue()


def test_a_pickle_in_a_second_directory_of_a_pt2_is_not_run(folder, tmp_path):
    """Python's reader takes the directory before the end of the file, torch's the one that the end points to."""
    path, pickled = folder / "model.pt2", saved_by_torch(Trap(tmp_path / "trap"))
    harmless = rewritten(path)
    harmful = rewritten(path, lambda name, content: pickled if name.endswith("sample_inputs/model.pt") else content)
    size, at, ours = *END.unpack(harmful[-END.size :])[5:7], END.unpack(harmless[-END.size :])[6]
    directory, offset = bytearray(harmless[ours : -END.size]), 0
    while offset < len(directory):  # Python adds to every offset what it finds the directory to be off
        [place] = struct.unpack_from("<L", directory, offset + 42)
        struct.pack_into("<L", directory, offset + 42, place + at - ours)
        offset += 46 + sum(struct.unpack_from("<3H", directory, offset + 28))
    records = len(zipfile.ZipFile(path).namelist())
    end = END.pack(b"PK\5\6", 0, 0, records, records, size, at, 0)
    replaced(folder, "pt2", harmful[: -END.size] + harmless[:ours] + directory + end)
    assert not zipfile.ZipFile(path).testzip()
    assert load_deploy(folder, runtime="pt2")(torch.zeros(1, 3, 24, 16)).shape == (1, 5)
    assert not (tmp_path / "trap").exists()


END = struct.Struct("<4s4H2LH")


def test_a_pt2_that_unpacks_to_more_than_it_is_is_refused(folder):
    def grown(name, content):
        return content + b" " * 10**7 if name.endswith("model.json") else content

    bomb = rewritten(folder / "model.pt2", grown, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10**5
    replaced(folder, "pt2", bomb)
    with pytest.raises(CheckpointError, match="records unpack to more than the file has bytes"):
        load_deploy(folder, runtime="pt2")


@pytest.mark.parametrize(
    ("name", "runtime"), [("onnx", "onnx"), ("onnx", None), ("safetensors", None), ("int8", "int8")]
)
def test_a_program_is_not_run_under_a_name_that_hides_it(folder, name, runtime):
    about = json.loads((folder / "deploy.json").read_text())
    about["files"] = {name: about["files"]["pt2"]}
    (folder / "deploy.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=rf"calls a pt2 program '{name}', .*rename the entry to 'pt2-{name}'"):
        load_deploy(folder, runtime=runtime)
    about["files"] = {f"pt2-{name}": about["files"][name]}
    (folder / "deploy.json").write_text(json.dumps(about))
    assert load_deploy(folder, runtime=f"pt2-{name}").file.format == "pt2"


@pytest.mark.parametrize("filename", ["model.pth", "model.ckpt", "safetensors"])
def test_a_timm_file_under_the_name_of_a_pickle_does_not_reach_timm(folder, filename):
    path = folder / filename
    path.write_bytes((folder / "model.timm.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"needed is '\.safetensors'"):
        FORMATS["timm"].open(path)


def test_a_folder_of_an_older_repblocks_is_called_that(folder):
    about = json.loads((folder / "deploy.json").read_text())
    del about["deploy_version"]
    (folder / "deploy.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"has no deploy_version: an older repblocks wrote it.*export the model"):
        load_deploy(folder)
    export(small(), folder, formats=["safetensors"])
    assert load_deploy(folder).file.name == "safetensors"
