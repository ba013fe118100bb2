import copy
import functools
import json
import struct
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import calibrate
from torch import nn

from repblocks.blocks import deployed, form_of
from repblocks.checkpoint import FORMAT_VERSION, load, load_weights, replacing, save
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models import create_model
from repblocks.verification import verify

ZOO = ["rb_repvgg_cifar", "rb_repnext_cifar"]


def trained(name="rb_repvgg_cifar", **kwargs):
    return copy.deepcopy(_trained(name, **kwargs))


@functools.cache
def _trained(name, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, **{"num_classes": 5, "in_chans": 2, **kwargs})
    return calibrate(model, images())


def images(dtype=torch.float32):
    return torch.randn(3, 2, 24, 20, generator=torch.Generator().manual_seed(1)).to(dtype)


def in_form(model, form):
    return model if form == "train" else deployed(model)


def header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["repblocks"])


def rewrite(path, without=(), **changes):
    """Change and remove entries of the header."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = {key: value for key, value in {**header(path), **changes}.items() if key not in without}
    save_file(weights, path, metadata={"repblocks": json.dumps(about)})


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", ZOO)
def test_a_loaded_model_is_the_saved_one(tmp_path, name, form):
    model = in_form(trained(name), form)
    save(model, tmp_path / "model.safetensors")
    loaded = load(str(tmp_path / "model.safetensors"))
    assert form_of(loaded) == form
    assert not any(module.training for module in loaded.modules())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded(images()), model(images()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_a_train_form_file_loads_collapsed_on_demand(tmp_path, name):
    model = trained(name)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", form="deploy")
    assert form_of(loaded) == "deploy"
    verify(model, loaded, images()).raise_if_different("the loaded model")
    assert form_of(load(tmp_path / "model.safetensors", form="train")) == "train"


def test_a_loaded_train_form_trains_on(tmp_path):
    save(trained(), tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors").train()
    loaded(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_the_train_form_of_a_deploy_file_is_refused_with_a_way_out(tmp_path):
    save(deployed(trained()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds the deploy form .* cannot be undone; load .* before"):
        load(tmp_path / "model.safetensors", form="train")


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="unknown form 'fused'"):
        load(tmp_path / "model.safetensors", form="fused")


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


def test_class_names_that_do_not_fit_the_classes_are_not_saved(tmp_path):
    model = trained()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "b"]}
    with pytest.raises(CheckpointError, match=r"5 classes and 2 class names; set model\.pretrained_cfg"):
        save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back(tmp_path, dtype, form):
    model = in_form(trained().to(dtype), form)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(images(dtype)), model(images(dtype)))


def test_mixed_dtypes_and_channels_last_weights_come_back(tmp_path):
    model = deployed(trained()).to(memory_format=torch.channels_last)
    model.stem.to(torch.float64)
    save(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(load(tmp_path / "model.safetensors").state_dict(), model.state_dict(), rtol=0, atol=0)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = trained()
    first, second = model.stages[0][1].conv.branches, model.stages[1][1].conv.branches
    first.kxk[1].bias = first.pointwise[1].bias
    second.kxk[1].running_mean = second.pointwise[1].running_mean
    save(model, tmp_path / "model.safetensors")
    assert len(header(tmp_path / "model.safetensors")["shared"]) == 2
    loaded = load(tmp_path / "model.safetensors")
    again = loaded.stages[0][1].conv.branches
    assert again.kxk[1].bias is again.pointwise[1].bias
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert torch.equal(loaded(images()), model(images()))


def test_views_of_one_storage_are_saved_by_value(tmp_path):
    model = trained()
    storage = torch.randn(2, 5)
    model.head.fc.bias = nn.Parameter(storage[1])
    model.stem.conv.branches.kxk[1].bias = nn.Parameter(storage.flatten()[:1].expand(32))
    save(model, tmp_path / "model.safetensors")
    torch.testing.assert_close(load(tmp_path / "model.safetensors").state_dict(), model.state_dict(), rtol=0, atol=0)


def test_synchronised_batch_norms_are_saved_as_batch_norms(tmp_path):
    model = trained()
    save(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors")(images()), model(images()))


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_vit"])
def test_timms_own_models_are_saved_too(tmp_path, name):
    model = create_model(name, num_classes=3).eval()
    save(model, tmp_path / "model.safetensors")
    pictures = torch.randn(2, *model.pretrained_cfg["input_size"])
    for form in (None, "train", "deploy"):
        assert torch.equal(load(tmp_path / "model.safetensors", form=form)(pictures), model(pictures))


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_a_feature_backbone_comes_back(tmp_path, form):
    model = in_form(create_model("rb_repvgg_cifar", features_only=True, out_indices=(0, 2)), form).eval()
    save(model, tmp_path / "model.safetensors")
    pictures = torch.randn(2, 3, 20, 28)
    for ours, theirs in zip(load(tmp_path / "model.safetensors")(pictures), model(pictures), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_with_values_beside_its_weights_comes_back(tmp_path):
    model = create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(2,), num_heads=(2,), img_size=56).eval()
    assert set(dict(model.named_buffers())) - set(model.state_dict())
    save(model, tmp_path / "model.safetensors")
    pictures = torch.randn(2, 3, 56, 56)
    assert torch.equal(load(tmp_path / "model.safetensors")(pictures), model(pictures))


def test_saving_and_loading_draw_no_random_numbers(tmp_path):
    model = trained()
    torch.manual_seed(3)
    save(model, tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors")
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))


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


@pytest.mark.parametrize("edit", [edited_activation, edited_layer, edited_stride, half_collapsed, another_epsilon])
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


@pytest.mark.parametrize("changes", [{"without": ["args"]}, {"without": ["format_version"]}, {"format_version": "new"}])
def test_a_damaged_header_is_named(tmp_path, changes):
    save(trained(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", **changes)
    with pytest.raises(CheckpointError, match=r"header of .* is damaged"):
        load(tmp_path / "model.safetensors")


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


def test_weights_that_do_not_fit_their_model_are_named(tmp_path):
    save(trained(), tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", args={"num_classes": 6, "in_chans": 2})
    with pytest.raises(CheckpointError, match=r"2 of another shape \(such as 'head\.fc\.bias'\); .*num_classes"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ZOO)
def test_train_form_weights_are_recognised_by_a_deploy_model(name):
    model = deployed(trained(name))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"is in deploy form .* these are of a train form; .*repblocks\.deployed"):
        load_weights(model, trained(name).state_dict())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ZOO)
def test_deploy_form_weights_are_recognised_by_a_train_model(name):
    with pytest.raises(CheckpointError, match=r"is in train form .* these are of a deploy form.*form='deploy'"):
        load_weights(trained(name), deployed(trained(name)).state_dict())


def test_forms_are_recognised_in_models_of_the_users_own():
    model = nn.Sequential(trained().stages[0][1], nn.Conv2d(32, 4, 1))
    with pytest.raises(CheckpointError, match="these are of a deploy form"):
        load_weights(model, deployed(model).state_dict())
    with pytest.raises(CheckpointError, match="these are of a train form"):
        load_weights(deployed(model), model.state_dict())
    with pytest.raises(CheckpointError, match="these are of a train form"):
        load_weights(deployed(model[0].conv), model[0].conv.state_dict())


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_weights_of_another_model_are_not_taken_for_another_form(form):
    with pytest.raises(CheckpointError, match=r"do not fit the model: \d+ missing \(such as .*\d+ unexpected"):
        load_weights(in_form(trained(), form), in_form(trained("rb_repnext_cifar"), form).state_dict())
    with pytest.raises(CheckpointError, match=r"do not fit the model: \d+ missing .*\d+ unexpected .*branches"):
        load_weights(trained(), trained(block="acb").state_dict())


def test_weights_are_copied_into_the_models_dtype():
    model = create_model("rb_repvgg_cifar", num_classes=5, in_chans=2).double()
    load_weights(model, trained().state_dict())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model.state_dict(), trained().state_dict(), rtol=0, atol=0, check_dtype=False)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(trained(), path)
    before = path.read_bytes()

    def full_disk(weights, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("repblocks.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(deployed(trained()), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "new folder" / "notes.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
    with replacing(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save(trained(), path)
    loaded = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded(images()), trained()(images()))
