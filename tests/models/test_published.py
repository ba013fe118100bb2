"""Weights that timm publishes: found by our names, loaded through timm's code, or a clear word on what to do."""

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from support import calibrate
from timm.models import _builder

from repblocks.blocks import form_of
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models import create_model, list_models
from repblocks.models.published import place_of, published_weights
from repblocks.verification import verify

HUB_ID = "timm/repvgg_a0.rvgg_in1k"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return calibrate(timm.create_model("repvgg_a0"), images())


def images(channels=3):
    return torch.randn(2, channels, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    return tmp_path


@pytest.fixture
def file(hub, theirs):
    """The weights of timm's file, where the message says to place them."""
    path = hub / "checkpoints" / "repvgg_a0.rvgg_in1k.safetensors"
    path.parent.mkdir()
    save_file({key: tensor.clone() for key, tensor in theirs.state_dict().items()}, path)
    return path


def test_published_weights_load_under_our_name(file, theirs):
    ours = create_model("rb_repvgg_a0", pretrained=True).eval()
    assert set(ours.state_dict()) == set(create_model("rb_repvgg_a0").state_dict())
    verify(theirs, ours, images()).raise_if_different("the pretrained model")
    assert (ours.pretrained_cfg["tag"], ours.pretrained_cfg["interpolation"]) == ("rvgg_in1k", "bilinear")


def test_published_weights_collapse(file, theirs):
    ours = create_model("rb_repvgg_a0.rvgg_in1k", pretrained=True, form="deploy").eval()
    assert form_of(ours) == "deploy"
    verify(theirs, ours, images()).raise_if_different("the pretrained deploy form")


def test_other_classes_and_channels_keep_the_rest(file, theirs):
    ours = create_model("rb_repvgg_a0", pretrained=True, num_classes=7, in_chans=1).eval()
    assert ours(images(1)).shape == (2, 7)
    own, given = ours.state_dict(), theirs.state_dict()
    assert torch.equal(own["stages.2.3.conv.branches.kxk.0.weight"], given["stages.2.3.conv_kxk.conv.weight"])
    summed = given["stem.conv_kxk.conv.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(own["stem.conv.branches.kxk.0.weight"], summed)


def test_feature_backbones_are_pretrained_too(file, theirs):
    features = create_model("rb_repvgg_a0", pretrained=True, features_only=True).eval()
    assert torch.equal(
        features.state_dict()["stem.conv.branches.kxk.0.weight"], theirs.state_dict()["stem.conv_kxk.conv.weight"]
    )


def test_a_file_may_lie_anywhere_and_have_our_names(tmp_path, hub, theirs):
    ours = create_model("rb_repvgg_a0")
    torch.save(ours.state_dict(), tmp_path / "ours.pth")
    again = create_model("rb_repvgg_a0", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "ours.pth")})
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in ours.state_dict().items())


def test_timms_own_code_fetches_the_file(hub, theirs, monkeypatch):
    fetched = []

    def load_from_hub(hub_id, **options):
        fetched.append(hub_id)
        return dict(theirs.state_dict())

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", load_from_hub)
    ours = create_model("rb_repvgg_a0", pretrained=True).eval()
    assert fetched == [HUB_ID]
    verify(theirs, ours, images()).raise_if_different("the pretrained model")


def test_offline_the_file_to_place_and_its_place_are_named(hub):
    place = hub / "checkpoints" / "repvgg_a0.rvgg_in1k.safetensors"
    with pytest.raises(CheckpointError) as raised:
        create_model("rb_repvgg_a0", pretrained=True)
    assert f"https://huggingface.co/{HUB_ID}/resolve/main/model.safetensors at {place}" in str(raised.value)


def test_a_file_of_another_model_is_refused(file):
    save_file({"stem.conv.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"1 of 1 keys are not keys of timm's weights for this model"):
        create_model("rb_repvgg_a0", pretrained=True)


@pytest.mark.parametrize("name", ["rb_repvgg_b1g2", "rb_repvgg_cifar", "rb_repnext_u3_tiny"])
def test_names_without_published_weights_say_so(name):
    with pytest.raises(ConfigurationError, match=f"no weights are published under {name}; .*convert"):
        create_model(name, pretrained=True)


@pytest.mark.parametrize("name", [name for name in list_models() if published_weights(name)])
def test_every_tag_of_timms_is_ours(name):
    theirs = name.removeprefix("rb_")
    assert [full.removeprefix("rb_") for full in timm.list_pretrained(f"{name}.*")] == timm.list_pretrained(
        f"{theirs}.*"
    )
    ours, timms = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(theirs)
    for key in ("tag", "hf_hub_id", "input_size", "crop_pct", "interpolation", "mean", "std", "license"):
        assert getattr(ours, key) == getattr(timms, key), key
    assert place_of(ours).name == f"{theirs}.{timms.tag}.safetensors"
