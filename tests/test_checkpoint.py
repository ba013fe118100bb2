import copy
import os
import stat
from pathlib import Path

import pytest
import torch
from checkpoint_cases import ZOO, header, images, in_form, rewrite, trained
from torch import nn

from repblocks.blocks import deployed, form_of
from repblocks.checkpoint import load, load_weights, save
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.files import replacing
from repblocks.models import create_model
from repblocks.verification import verify


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
    with pytest.raises(CheckpointError, match=r"cannot write /.*model\.safetensors .*No space left") as caught:
        save(deployed(trained()), path)
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["folder", "file/model.safetensors", "file/deeper/model.safetensors"])
def test_a_place_where_no_file_can_be_is_named(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"cannot write /.*{place} .*; give a path in a folder"):
        save(trained(), tmp_path / place)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_weights_without_values_are_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.safetensors: the weights are on the meta device"):
        save(trained().to("meta"), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_parameters_is_refused_like_others(tmp_path):
    with pytest.raises(CheckpointError, match="this ReLU carries no registered model name"):
        save(nn.ReLU(), tmp_path / "model.safetensors")


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


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save(trained(), tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save(trained(), path)
    loaded = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded(images()), trained()(images()))
