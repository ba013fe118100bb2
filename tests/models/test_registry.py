import json

import pytest
import timm
import torch
from torch import nn

from repblocks.blocks.base import form_of
from repblocks.errors import ConfigurationError
from repblocks.models import create_model, list_models


def test_zoo_is_in_timms_registry_under_its_prefix():
    sizes = {
        "mobileone": "s0 s1 s2 s3 s4",
        "repghostnet": "050 058 080 100 111 130 150 200",
        "repnext": "cifar u3_base u3_small u3_tiny",
        "repnextm": "m1 m2 m3 m4 m5",
        "repvgg": "a0 a1 a2 b0 b1 b1g2 b1g4 b2 b2g2 b2g4 b3 b3g2 b3g4 cifar d2se",
        "repvit": "m0_9 m1_0 m1_1 m1_5 m2_3",
        "resnet20": "cifar",
        "resnet56": "cifar",
        "unireplknet": "a f n p",
        "vgg16": "cifar",
    }
    names = [f"rb_{family}_{size}" for family, listed in sizes.items() for size in listed.split()]
    assert list_models() == timm.list_models("rb_*") == names


def test_listing_takes_timms_filters():
    assert "resnet18" in list_models("*")
    assert list_models("rb_*", module="repnext", exclude_filters="*u3*") == ["rb_repnext_cifar"]


def test_entry_points_are_importable():
    from repblocks.models import repvgg

    assert timm.models.model_entrypoint("rb_repvgg_cifar") is repvgg.rb_repvgg_cifar
    assert set(repvgg.__all__) >= set(list_models("rb_repvgg_*"))


def test_timm_creates_a_deploy_form_with_its_arguments():
    model = timm.create_model("rb_repvgg_a0", num_classes=10, in_chans=1, form="deploy")
    assert form_of(model) == "deploy"
    assert model.training
    assert model(torch.randn(2, 1, 64, 96)).shape == (2, 10)
    assert model.model_name == "rb_repvgg_a0"
    assert model.model_args == {"num_classes": 10, "in_chans": 1}


def test_both_ways_of_creating_a_model_agree():
    for form in ("train", "deploy"):
        ours = create_model("rb_repvgg_cifar", form=form, block="acb", num_classes=3)
        timms = timm.create_model("rb_repvgg_cifar", form=form, block="acb", num_classes=3)
        assert ours.model_args == timms.model_args == {"num_classes": 3, "in_chans": 3, "block": "acb"}
        assert ours.state_dict().keys() == timms.state_dict().keys()


def test_timms_models_note_what_builds_them_again():
    model = create_model("resnet10t", num_classes=4)
    assert model.model_name == "resnet10t"
    assert model.model_args == {"num_classes": 4, "in_chans": 3}
    backbone = create_model("resnet10t", features_only=True, out_indices=(1, 2))
    assert json.loads(json.dumps(backbone.model_args)) == {"in_chans": 3, "features_only": True, "out_indices": [1, 2]}


def test_preprocessing_is_not_an_argument_of_the_architecture():
    model = create_model("rb_repvgg_cifar", pretrained_cfg_overlay={"input_size": (1, 28, 28)}, in_chans=1)
    assert model.model_args == {"num_classes": 10, "in_chans": 1}
    assert model.pretrained_cfg["input_size"] == (1, 28, 28)


def test_preprocessing_follows_the_channels_of_the_image():
    config = create_model("rb_repvgg_cifar", in_chans=1).pretrained_cfg
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == (pytest.approx((0.4914 + 0.4822 + 0.4465) / 3),)
    assert len(config["std"]) == 1


def test_an_argument_that_the_model_does_not_have_is_refused():
    with pytest.raises(ConfigurationError, match=r"rb_repvgg_cifar refuses the arguments.*drop_rat"):
        create_model("rb_repvgg_cifar", drop_rat=0.1)


def test_unknown_name_suggests_near_ones():
    with pytest.raises(ConfigurationError, match=r"model=rb_repvg_a0 is unknown; did you mean .*rb_repvgg_a0"):
        create_model("rb_repvg_a0")
    with pytest.raises(ConfigurationError, match=r"model=qqqqq is unknown; there are \d+: "):
        create_model("qqqqq")


def test_an_unknown_tag_is_refused():
    with pytest.raises(ConfigurationError, match=r"no weights tagged 'foo' \(rb_repvgg_a0\.rvgg_in1k\)"):
        create_model("rb_repvgg_a0.foo")
    with pytest.raises(ConfigurationError, match=r"rb_repvgg_cifar has no weights tagged 'foo' \(none .*leave the tag"):
        create_model("rb_repvgg_cifar.foo")
    with pytest.raises(ConfigurationError, match=r"resnet18 has no weights tagged 'foo' \(.*resnet18\.a1_in1k"):
        create_model("resnet18.foo")
    assert create_model("resnet18.a1_in1k").model_name == "resnet18.a1_in1k"


def test_unknown_form_is_refused():
    with pytest.raises(ConfigurationError, match="unknown form 'merged'; use 'train' or 'deploy'"):
        create_model("rb_repvgg_cifar", form="merged")


def test_unknown_block_names_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"(?s)no_such_block.*repvgg"):
        create_model("rb_repvgg_cifar", block="no_such_block")


def test_plain_model_has_no_deploy_form():
    with pytest.raises(ConfigurationError, match=r"resnet10t has no blocks that collapse.*reparameterize_model"):
        create_model("resnet10t", form="deploy")


def test_models_own_deploy_form_needs_repblocks_not_a_name():
    @timm.models.register_model
    def someones_net(*, pretrained: bool, **kwargs) -> nn.Module:
        return create_model("rb_repvgg_cifar", **kwargs)

    assert form_of(create_model("someones_net", form="deploy")) == "deploy"


def test_weights_from_a_file_load_through_timm(tmp_path):
    torch.manual_seed(0)
    model = create_model("rb_repvgg_cifar")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    loaded = create_model("rb_repvgg_cifar", pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_arguments_that_no_checkpoint_can_hold_are_refused():
    with pytest.raises(ConfigurationError, match="by name"):
        create_model("resnet10t", norm_layer=nn.BatchNorm2d)


def test_output_stride_that_is_not_supported_is_refused():
    with pytest.raises(ConfigurationError, match=r"output_stride=4 .* \(8, 16, 32\)"):
        create_model("rb_repnext_cifar", output_stride=4)


def test_stages_described_unevenly_are_refused():
    with pytest.raises(ConfigurationError, match="2 depths, 3 widths and 3 strides"):
        create_model("rb_repnext_cifar", depths=(1, 1))
