import json
import struct
from pathlib import Path

import pytest
import timm
import torch
from checkpoint_cases import header, images, rewrite, trained
from safetensors.torch import save_file
from torch import nn

from repblocks.checkpoint import load, load_weights, save
from repblocks.errors import CheckpointError
from repblocks.header import FORMAT_VERSION, built, checked, describe
from repblocks.models import create_model


def test_the_header_tells_what_the_model_is(tmp_path):
    model = trained(block="acb", drop_rate=0.25)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "b", "c", "d", "é"], "mean": (0.25, 0.5)}
    save(model, tmp_path / "model.safetensors")
    about = header(tmp_path / "model.safetensors")
    assert about["format_version"] == FORMAT_VERSION
    assert about["model"] == "rb_repvgg_cifar"
    assert about["args"] == {"num_classes": 5, "in_chans": 2, "block": "acb", "drop_rate": 0.25}
    assert about["form"] == "train"
    assert about["dtype"] == "float32"
    assert about["versions"].keys() == {"repblocks", "torch", "timm"}
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.pretrained_cfg["label_names"] == ("a", "b", "c", "d", "é")
    assert loaded.pretrained_cfg["mean"] == loaded.default_cfg["mean"] == (0.25, 0.5)
    assert loaded.pretrained_cfg["input_size"] == tuple(model.pretrained_cfg["input_size"])
    assert loaded.drop_rate == 0.25


@pytest.mark.parametrize("arguments", [(9,), (9, "max"), (9, "catavgmax"), (0,), (0, "")])
def test_the_model_is_saved_as_it_is_after_reset_classifier(tmp_path, arguments):
    model = trained()
    model.reset_classifier(*arguments)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.num_classes == loaded.pretrained_cfg["num_classes"] == arguments[0]
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize(
    ("name", "built_pool", "pool"), [("test_vit", "avg", "token"), ("vit_tiny_patch16_224", "token", "avg")]
)
def test_a_pooling_that_is_no_layer_is_never_lost(tmp_path, name, built_pool, pool):
    size = {"depth": 1, "embed_dim": 24, "img_size": 32}
    model = create_model(name, num_classes=4, global_pool=built_pool, fc_norm=False, **size).eval()
    model.reset_classifier(4, pool)
    pictures = torch.randn(2, 3, 32, 32)
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors")(pictures), model(pictures))
    rewrite(tmp_path / "model.safetensors", args={**header(tmp_path / "model.safetensors")["args"], "global_pool": "x"})
    with pytest.raises(CheckpointError, match="does not build"):
        load(tmp_path / "model.safetensors")


def test_a_pooling_that_needs_other_layers_is_refused(tmp_path):
    model = create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, img_size=32)
    model.reset_classifier(10, "avg")
    with pytest.raises(CheckpointError, match=r"'global_pool': 'avg'.* does not rebuild this model: 'norm'"):
        save(model, tmp_path / "model.safetensors")


def test_class_names_that_do_not_fit_the_classes_are_not_saved(tmp_path):
    model = trained()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "b"]}
    with pytest.raises(CheckpointError, match=r"5 classes and 2 class names; set model\.pretrained_cfg"):
        save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def edited_activation(model):
    model.stages[0][0].act = nn.GELU()


def edited_layer(model):
    model.head.fc = nn.Sequential(nn.Linear(128, 5))


def edited_stride(model):
    model.stages[0][0].conv.branches.kxk[0].stride = (1, 2)


def half_collapsed(model):
    model.stages[1].eval()[0].switch_to_deploy()


def another_epsilon(model):
    model.stages[1][0].conv.branches.kxk[1].eps = 0.1


def own_forward(model):
    model.stages[0][0].forward = lambda x: x


def own_forward_features(model):
    model.forward_features = lambda x: x


EDITS = [
    edited_activation,
    edited_layer,
    edited_stride,
    half_collapsed,
    another_epsilon,
    own_forward,
    own_forward_features,
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_model_that_its_name_does_not_rebuild_is_refused(tmp_path, edit):
    model = trained()
    edit(model)
    with pytest.raises(CheckpointError, match=r"rb_repvgg_cifar .* does not rebuild this model: .*torch\.export"):
        save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [None, "hf-hub:someone/model", "my_net"])
def test_a_model_without_a_registered_name_is_refused(tmp_path, name):
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    model.model_name = name
    with pytest.raises(CheckpointError, match=r"Sequential carries no registered .*create_model .*torch\.export"):
        save(model, tmp_path / "model.safetensors")


def test_a_model_with_arguments_that_no_file_holds_is_refused(tmp_path):
    model = trained()
    model.model_args = {**model.model_args, "act_layer": nn.GELU}
    with pytest.raises(CheckpointError, match=r"is not rebuilt by .*not JSON serializable.*torch\.export"):
        save(model, tmp_path / "model.safetensors")


def test_a_model_with_arguments_that_it_does_not_take_is_refused(tmp_path):
    model = trained()
    model.model_args = {**model.model_args, "sparsity": 2}
    with pytest.raises(CheckpointError, match=r"is not rebuilt by .*sparsity"):
        save(model, tmp_path / "model.safetensors")


def test_a_name_that_was_registered_elsewhere_is_refused(tmp_path):
    save(trained(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", model="my_net")
    with pytest.raises(CheckpointError, match="'my_net', which is not registered here; import the module"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp"])
def test_a_file_cannot_ask_for_a_download(tmp_path, name):
    save(trained(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", model=name)
    with pytest.raises(CheckpointError, match="not registered here"):
        load(tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", model="resnet10t", args={"checkpoint_path": "other.pth"})
    with pytest.raises(CheckpointError, match="asks to fetch other files"):
        load(tmp_path / "model.safetensors")


def test_arguments_of_another_version_are_named(tmp_path):
    save(trained(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", args={"num_classes": 5, "in_chans": 2, "sparsity": 2})
    with pytest.raises(CheckpointError, match=r"which this version does not build: .*sparsity"):
        load(tmp_path / "model.safetensors")


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    save(trained(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", without=["args"], format_version=FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match=r"format version 2, .* up to 1; upgrade with pip install --upgrade"):
        load(tmp_path / "model.safetensors")


DAMAGES = [
    {"without": ["args"]},
    {"without": ["format_version"]},
    {"format_version": "new"},
    {"args": [1]},
    {"args": None},
    {"args": {"num_classes": -3}},
    {"args": {"widths": "wide"}},
    {"model": None},
    {"model": "rb_repvgg_cifar.foo"},
    {"form": "x"},
    {"form": []},
    {"classes": 3},
    {"without": ["classes"]},
    {"preprocessing": None},
    {"shared": ["a"]},
    {"shared": {"a": "b"}},
    {"shared": {"a": [1]}},
]


@pytest.mark.parametrize("changes", DAMAGES, ids=str)
def test_a_damaged_header_is_named(tmp_path, changes):
    save(trained(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", **changes)
    with pytest.raises(CheckpointError, match=r"model\.safetensors (is damaged|is for .* does not build)"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", ["", "3", "[1]", "null", "[" * 100_000])
def test_a_header_that_is_no_dict_is_named(tmp_path, content):
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"repblocks": content})
    with pytest.raises(CheckpointError, match=r"header of .*model\.safetensors is damaged"):
        load(tmp_path / "model.safetensors")


def test_other_files_are_checked_and_built_by_the_same_description():
    model = trained(block="acb")
    about = json.loads(json.dumps(describe(model)))
    again = built(Path("best.ckpt"), checked(Path("best.ckpt"), about))
    load_weights(again, model.state_dict(), assign=True)
    assert torch.equal(again.eval()(images()), model(images()))


@pytest.mark.parametrize("left", [0.999, 0.5, 0.001])
def test_a_truncated_file_is_named(tmp_path, left):
    path = tmp_path / "model.safetensors"
    save(trained(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged .* use another copy"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"12", b"epoch,loss\n1,0.5\n", struct.pack("<Q", 5) + b"hello" * 10])
def test_another_kind_of_file_is_named(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metrics\.csv is not a safetensors file .* repblocks\.save"):
        load(tmp_path / "metrics.csv")


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_is_not_read(tmp_path, archive):
    torch.save(trained().state_dict(), tmp_path / "model.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"pickle or archive of torch\.save.* weights_only=True.*load_weights"):
        load(tmp_path / "model.pth")


def test_someone_elses_safetensors_are_sent_to_convert(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "theirs.safetensors")
    with pytest.raises(CheckpointError, match=r"repblocks\.save did not write it.* repblocks\.convert"):
        load(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize("path", ["nothing.safetensors", "."])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(CheckpointError, match="there is no file /"):
        load(tmp_path / path)
