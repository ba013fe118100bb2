import pytest
import timm
import torch
from support import calibrate
from timm.models import reparameterize_model

from repblocks.blocks.base import form_of
from repblocks.convert import convert, detect
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.foreign import Names
from repblocks.models import RepNeXt, RepVGG, create_model
from repblocks.verification import verify


@pytest.fixture(scope="module")
def timms():
    """timm's RepVGG-A0 in float64 with calibrated statistics, and its collapsed copy."""
    return trained("repvgg_a0")


def trained(name: str, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs).double()
    calibrate(model, images())
    return model.eval(), reparameterize_model(model.eval())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_converted_weights_give_timms_outputs(timms, form):
    theirs = timms[form == "deploy"]
    ours = create_model("rb_repvgg_a0", num_classes=7, form=form).double()
    ours.load_state_dict(convert(theirs.state_dict(), model="rb_repvgg_a0", num_classes=7))
    assert form_of(ours) == form
    verify(theirs, ours.eval(), images()).raise_if_different("the converted model")


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_networks_are_timms_too(timms, output_stride):
    options = {"num_classes": 7, "output_stride": output_stride}
    theirs = timm.create_model("repvgg_a0", **options).double()
    theirs.load_state_dict(timms[0].state_dict())
    ours = create_model("rb_repvgg_a0", **options).double()
    ours.load_state_dict(convert(theirs.state_dict(), model="rb_repvgg_a0", **options))
    verify(theirs.eval(), ours.eval(), images()).raise_if_different("the converted model")


@pytest.mark.parametrize(("name", "widths"), [("repvgg_d2se", (40, 80, 160, 640)), ("repvgg_b1g4", (32, 64, 128, 512))])
def test_squeeze_excitation_and_groups_survive_the_conversion(name, widths):
    theirs, collapsed = trained(name, width_factor=0.25, stem_chs=widths[0] * 4)
    options = {"num_classes": 7, "widths": widths}
    ours = create_model(f"rb_{name}", **options).double()
    ours.load_state_dict(convert(theirs.state_dict(), model=f"rb_{name}", **options))
    verify(theirs, ours.eval(), images()).raise_if_different("the converted model")
    verify(collapsed, ours, images()).raise_if_different("timm's collapsed model")


@pytest.mark.parametrize("name", timm.list_models("repvgg_*"))
def test_every_timm_model_has_all_our_names_and_shapes(name):
    with torch.device("meta"):
        theirs = timm.create_model(name).state_dict()
    converted = convert(theirs, model=f"rb_{name}")
    assert [id(tensor) for tensor in converted.values()] == [id(tensor) for tensor in theirs.values()]


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_conversion_and_back_is_the_identity(timms, form):
    theirs = timms[form == "deploy"].state_dict()
    ours = convert(theirs, model="rb_repvgg_a0", num_classes=7)
    back = convert(ours, model="rb_repvgg_a0", source="repblocks", target="timm", num_classes=7)
    assert back.keys() == theirs.keys()
    assert all(back[key] is theirs[key] for key in theirs)


def test_foreign_keys_are_named(timms):
    with pytest.raises(CheckpointError, match=r"1 of \d+ keys are not keys of timm's counterpart .*: blocks.0.weight;"):
        convert({**timms[0].state_dict(), "blocks.0.weight": torch.zeros(1)}, model="rb_repvgg_a0", num_classes=7)


def test_weights_under_a_wrapping_key_are_explained(timms):
    with pytest.raises(CheckpointError, match="'state_dict' or 'model'"):
        convert({"state_dict": timms[0].state_dict()}, model="rb_repvgg_a0", num_classes=7)


def test_shapes_of_another_model_are_named(timms):
    with pytest.raises(CheckpointError, match=r"head.fc.weight is \[7, 1280\] instead of \[1000, 1280\].*num_classes"):
        convert(timms[0].state_dict(), model="rb_repvgg_a0")


def test_missing_and_superfluous_weights_are_named(timms):
    state = dict(timms[0].state_dict())
    state["stages.9.9.conv_kxk.conv.weight"] = state.pop("head.fc.bias")
    with pytest.raises(CheckpointError, match=r"head.fc.bias is missing, stages.9.9.conv.branches.kxk.0.weight is unk"):
        convert(state, model="rb_repvgg_a0", num_classes=7)


def test_our_own_weights_are_checked_before_they_leave(timms):
    with pytest.raises(CheckpointError, match="not the weights of rb_repvgg_a0 in deploy form"):
        convert(timms[0].state_dict(), model="rb_repvgg_a0", source="repblocks", target="timm", num_classes=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "elsewhere"}, r"cannot convert from or to 'elsewhere'; there are rules for mobileone, .*timm"),
        ({"source": "timm", "target": "timm"}, "one of them, and only one, is 'repblocks'"),
        ({"source": "repblocks"}, "one of them, and only one, is 'repblocks'"),
        (
            {"model": "rb_repnext_cifar", "source": "timm"},
            "no rules between timm and RepNeXt, only for MobileOne, RepGhostNet, RepVGG, RepViT",
        ),
        ({"model": "rb_repvg_a0"}, "did you mean .*rb_repvgg_a0"),
    ],
)
def test_conversions_without_rules_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        convert({}, **{"model": "rb_repvgg_a0", **options})


def test_sources_that_rename_the_weights_alike_are_not_ambiguous(timms):
    """The collapsed blocks of RepVGG and of QARepVGG have the same names in their repositories."""
    options = {"model": "rb_repvgg_a0", "num_classes": 7}
    ours = convert(timms[1].state_dict(), source="timm", **options)
    official = convert(ours, target="repvgg", **options)
    assert official.keys() == convert(ours, target="qarepvgg", **options).keys()
    assert detect(official, **options) == ("rb_repvgg_a0", "repvgg")
    assert all(tensor is ours[key] for key, tensor in convert(official, **options).items())


def test_collapsed_blocks_without_a_name_elsewhere_are_refused_unless_a_norm_alone_was_folded(monkeypatch):
    without_collapsed = tuple(rule for rule in RepVGG.foreign["timm"].rules(None) if "reparam" not in rule[0])
    monkeypatch.setitem(RepVGG.foreign, "elsewhere", Names(rules=lambda network: without_collapsed))
    with torch.device("meta"):
        ours = create_model("rb_repvgg_a0", form="deploy").state_dict()
    with pytest.raises(ConfigurationError, match=r"no place for the collapsed stem.conv, .* weights of the train form"):
        convert(ours, model="rb_repvgg_a0", target="elsewhere")


def test_a_norm_in_front_of_its_convolution_is_not_taken_out_again(monkeypatch):
    monkeypatch.setitem(RepNeXt.foreign, "elsewhere", Names(rules=lambda network: (("head.*", "head.*"),)))
    with torch.device("meta"):
        ours = create_model("rb_repnext_cifar", form="deploy").state_dict()
    with pytest.raises(ConfigurationError, match=r"no place for the collapsed stages.0.downsample, "):
        convert(ours, model="rb_repnext_cifar", target="elsewhere")
