from collections.abc import Iterator

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import calibrate
from timm.layers import DropPath
from timm.models import reparameterize_model
from torch import Tensor, nn

from repblocks.blocks import NormLinear, deployed
from repblocks.blocks.base import form_of
from repblocks.convert import convert, detect
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.foreign import ours_from_theirs, theirs_from_ours
from repblocks.foreign.repvit import NAMES
from repblocks.models import create_model, list_models
from repblocks.models.layers import SqueezeExcite
from repblocks.verification import verify

# Parameters of training and deploy form, the same as timm's model without the prefix, which folds every BatchNorm too.
PARAMETERS = {
    "rb_repvit_m0_9": (5_489_328, 5_067_056),
    "rb_repvit_m1_0": (7_302_796, 6_810_312),
    "rb_repvit_m1_1": (8_802_912, 8_244_312),
    "rb_repvit_m1_5": (14_644_432, 14_049_992),
    "rb_repvit_m2_3": (23_688_792, 22_926_792),
}
both_forms = pytest.mark.parametrize("form", ["train", "deploy"])

# Of the authors' flat list "features": its length, and the indices of the strided layers and of those with
# squeeze-and-excitation.
FEATURES = {
    "rb_repvit_m0_9": (27, (4, 8, 24), (1, 5, 9, 11, 13, 15, 17, 19, 21, 25)),
    "rb_repvit_m1_0": (27, (4, 8, 24), (1, 5, 9, 11, 13, 15, 17, 19, 21, 25)),
    "rb_repvit_m1_1": (25, (4, 8, 22), (1, 5, 9, 11, 13, 15, 17, 19, 23)),
    "rb_repvit_m1_5": (43, (6, 12, 38), (1, 3, 7, 9, *range(13, 36, 2), 39, 41)),
    "rb_repvit_m2_3": (55, (8, 16, 52), (1, 3, 5, 9, 11, 13, *range(17, 50, 2), 53)),
    "small": (14, (3, 7, 12), (1, 4, 8, 10, 13)),
}

# A network small enough for float64, with odd depths: for timm, and for us.
DEPTHS, WIDTHS = (1, 2, 3, 1), (8, 16, 24, 32)
THEIR_SMALL = {"depth": DEPTHS, "embed_dim": WIDTHS, "num_classes": 7}
OUR_SMALL = {"depths": DEPTHS, "widths": WIDTHS, "num_classes": 7}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def small(**options) -> nn.Module:
    """Ours in float64 with the statistics of a trained model."""
    torch.manual_seed(0)
    return calibrate(create_model("rb_repvit_m0_9", **OUR_SMALL, **options).double(), images())


def timms_small(**options) -> nn.Module:
    """timm's in float64 with the statistics of a trained model."""
    torch.manual_seed(0)
    return calibrate(timm.create_model("repvit_m0_9", **THEIR_SMALL, **options).double(), images())


@pytest.fixture(scope="module")
def timms():
    """timm's small network and its collapsed copy."""
    model = timms_small()
    return {"train": model, "deploy": collapsed_in_float64(model)}


def collapsed_in_float64(model: nn.Module) -> nn.Module:
    """timm's collapsed copy, whose new convolutions have the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        return reparameterize_model(model)
    finally:
        torch.set_default_dtype(torch.float32)


def converted(weights, form="train", **options) -> nn.Module:
    options = {**OUR_SMALL, **options}
    ours = create_model("rb_repvit_m0_9", form=form, **options).double()
    ours.load_state_dict(convert(weights, model="rb_repvit_m0_9", **options))
    return ours.eval()


def test_tables_cover_every_name():
    assert set(PARAMETERS) == set(FEATURES) - {"small"} == set(list_models("rb_repvit_*"))


@both_forms
def test_converted_weights_give_timms_outputs(timms, form):
    ours = converted(timms[form].state_dict(), form)
    assert form_of(ours) == form
    verify(timms[form], ours, images()).raise_if_different("the converted model")


def test_collapsed_converted_weights_give_timms_outputs(timms):
    verify(timms["train"], deployed(converted(timms["train"].state_dict())), images()).raise_if_different("ours")


def test_published_architecture_gives_timms_outputs():
    torch.manual_seed(0)
    theirs = calibrate(timm.create_model("repvit_m0_9").double(), images())
    ours = create_model("rb_repvit_m0_9").double()
    ours.load_state_dict(convert(theirs.state_dict(), model="rb_repvit_m0_9", source="timm"))
    verify(theirs, ours.eval(), images()).raise_if_different("the converted model")


@torch.no_grad()
def test_features_are_timms(timms):
    expected = timms["train"].forward_intermediates(images(), intermediates_only=True)
    found = converted(timms["train"].state_dict()).forward_intermediates(images(), intermediates_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(found) == 4


def test_model_without_a_second_head_is_timms():
    theirs = timms_small(distillation=False)
    ours = converted(theirs.state_dict(), distillation=False)
    verify(theirs.eval(), ours, images()).raise_if_different("the converted model")
    assert list(ours.get_classifier().branches) == ["main"]


@torch.no_grad()
def test_distilled_training_gives_timms_pair():
    theirs = timms_small()
    ours = converted(theirs.state_dict())
    for model in (theirs, ours):
        model.set_distilled_training()
    verify(theirs.eval(), ours.eval(), images()).raise_if_different("the mean in eval mode")
    expected, found = theirs.train()(images()), ours.train()(images())
    assert isinstance(found, tuple)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    ours.set_distilled_training(False)
    assert isinstance(ours(images()), Tensor)


@both_forms
@pytest.mark.parametrize("source", ["timm", "repvit"])
def test_conversion_and_back_is_the_identity(timms, source, form):
    theirs = timms[form].state_dict()
    if source == "repvit":
        theirs = in_official_names(theirs, "small", form)
    ours = convert(theirs, model="rb_repvit_m0_9", source=source, **OUR_SMALL)
    back = convert(ours, model="rb_repvit_m0_9", source="repblocks", target=source, **OUR_SMALL)
    assert back.keys() == theirs.keys()
    assert all(back[key] is theirs[key] for key in theirs)


@pytest.fixture(scope="module", params=PARAMETERS)
def outlines(request) -> dict[str, nn.Module]:
    """Ours in both forms and timm's in both forms, without memory for the weights."""
    with torch.device("meta"):
        ours = create_model(request.param).eval()
        theirs = timm.create_model(request.param.removeprefix("rb_")).eval()
        return {
            "train": ours,
            "deploy": deployed(ours),
            "timm train": theirs,
            "timm deploy": reparameterize_model(theirs),
        }


def test_parameters_of_both_forms_equal_timms(outlines):
    ours = count(outlines["train"]), count(outlines["deploy"])
    theirs = count(outlines["timm train"]), count(outlines["timm deploy"])
    assert ours == theirs == PARAMETERS[outlines["train"].model_name]


@both_forms
def test_every_name_and_shape_of_timm_and_of_the_authors_is_ours(outlines, form):
    network, weights = outlines["train"], outlines[f"timm {form}"].state_dict()
    official = in_official_names(weights, network.model_name, form)
    for source, theirs in (("timm", weights), ("repvit", official)):
        rules = NAMES[source].rules(network)
        ours = ours_from_theirs(theirs, rules, source)
        assert {key: id(tensor) for key, tensor in ours.items()} == {
            key: id(tensor) for key, tensor in ours_from_theirs(weights, NAMES["timm"].rules(network), "timm").items()
        }
        assert shapes(ours) == shapes(outlines[form].state_dict())
        back = theirs_from_ours(ours, rules, source)
        assert {key: id(tensor) for key, tensor in back.items()} == {key: id(theirs[key]) for key in theirs}


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


@both_forms
def test_authors_weights_give_the_same_outputs(timms, form):
    weights = in_official_names(timms[form].state_dict(), "small", form)
    verify(timms[form], converted(weights, form), images()).raise_if_different("the converted model")


@both_forms
def test_source_is_told_by_the_weights(timms, form):
    theirs = timms[form].state_dict()
    options = {"model": "rb_repvit_m0_9", **OUR_SMALL}
    assert detect(theirs, **options) == ("rb_repvit_m0_9", "timm")
    assert detect(in_official_names(theirs, "small", form), **options) == ("rb_repvit_m0_9", "repvit")


def test_weights_of_another_size_are_refused(outlines):
    weights = outlines["timm train"].state_dict()
    others = {"rb_repvit_m0_9": "rb_repvit_m1_0"}
    with pytest.raises(CheckpointError, match=r"not the weights of|keys are not keys"):
        convert(weights, model=others.get(outlines["train"].model_name, "rb_repvit_m0_9"), source="timm")


def in_official_names(weights: dict[str, Tensor], name: str, form: str) -> dict[str, Tensor]:
    """The authors' state dict: the same tensors, which timm's model holds in the same order."""
    return dict(zip(official_keys(name, form), weights.values(), strict=True))


def official_keys(name: str, form: str) -> Iterator[str]:
    """The keys of the authors' model in order, written down from their repository."""
    length, strided, excited = FEATURES[name]
    yield from official_conv("features.0.0", form)
    yield from official_conv("features.0.2", form)
    for i in range(1, length):
        if i in strided:
            yield from official_conv(f"features.{i}.token_mixer.0", form)
            yield from official_conv(f"features.{i}.token_mixer.2", form)
        else:
            yield from official_mixer(f"features.{i}.token_mixer.0", form)
        if i in excited:
            yield from (f"features.{i}.token_mixer.1.{fc}.{leaf}" for fc in ("fc1", "fc2") for leaf in AFFINE)
        yield from official_conv(f"features.{i}.channel_mixer.m.0", form)
        yield from official_conv(f"features.{i}.channel_mixer.m.2", form)
    if form == "deploy":
        yield from (f"classifier.{leaf}" for leaf in AFFINE)
    else:
        for head in ("classifier", "classifier_dist"):
            yield from (f"classifier.{head}.bn.{leaf}" for leaf in NORM)
            yield from (f"classifier.{head}.l.{leaf}" for leaf in AFFINE)


AFFINE = ("weight", "bias")
NORM = (*AFFINE, "running_mean", "running_var", "num_batches_tracked")


def official_conv(path: str, form: str) -> list[str]:
    if form == "deploy":
        return [f"{path}.{leaf}" for leaf in AFFINE]
    return [f"{path}.c.weight", *(f"{path}.bn.{leaf}" for leaf in NORM)]


def official_mixer(path: str, form: str) -> list[str]:
    if form == "deploy":
        return official_conv(path, form)
    norm = [f"{path}.bn.{leaf}" for leaf in NORM]
    return [*official_conv(f"{path}.conv", form), *(f"{path}.conv1.{leaf}" for leaf in AFFINE), *norm]


def test_published_weights_fit_another_number_of_classes_and_channels(tmp_path):
    theirs = timm.create_model("repvit_m0_9").state_dict()
    save_file(theirs, tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    model = create_model("rb_repvit_m0_9", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert model.default_cfg["tag"] == "dist_300e_in1k"
    stem = theirs["stem.conv1.c.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.conv1.branches[0].weight, stem, check_device=False)
    own = model.state_dict()
    torch.testing.assert_close(own["head.fc.branches.main.0.bias"], theirs["head.head.bn.bias"])
    assert own["head.fc.branches.distilled.1.weight"].shape == (5, 384)


def test_squeeze_excitation_is_in_every_second_block_from_the_first():
    with torch.device("meta"):
        model = create_model("rb_repvit_m1_0")
    for stage in model.stages:
        blocks = [block for name, block in stage.named_children() if name != "downsample"]
        assert [isinstance(block.se, SqueezeExcite) for block in blocks] == [i % 2 == 0 for i in range(len(blocks))]
    assert all(stage.downsample.pre_block.se is None for stage in model.stages[1:])
    assert [stage.get_submodule("0").se.fc1.out_channels for stage in model.stages] == [16, 32, 56, 112]


def test_new_channel_mixers_are_the_identity():
    model = create_model("rb_repvit_m0_9").eval()
    x = torch.randn(2, 48, 5, 6)
    torch.testing.assert_close(model.stages[0].get_submodule("0").channel_mixer(x), x)


# Stage, block, and tenths of the rate.
RATES = ((0, 0, 0), (1, 0, 1), (1, 1, 2), (2, 0, 3), (2, 1, 4), (2, 2, 5), (3, 0, 6))


def test_stochastic_depth_grows_from_the_first_channel_mixer_to_the_last():
    model = small(drop_path_rate=0.6)
    rates = {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert list(rates.values()) == sorted(rates.values())
    assert {
        name.removesuffix(".channel_mixer.drop_path"): rate for name, rate in rates.items() if "down" not in name
    } == (pytest.approx({f"stages.{i}.{j}": rate / 10 for i, j, rate in RATES}))
    assert rates["stages.2.downsample.pre_block.channel_mixer.drop_path"] == pytest.approx(0.3)
    assert rates["stages.2.downsample.ffn.drop_path"] == pytest.approx(0.3)


def test_stochastic_depth_leaves_the_block_without_its_channel_mixer():
    mixer = small(drop_path_rate=1.0).stages[3].get_submodule("0").channel_mixer.train()
    x = torch.randn(3, 32, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), x)
    assert not torch.allclose(mixer.eval()(x), x)


def test_collapse_ignores_stochastic_depth():
    model = small(drop_path_rate=0.6)
    collapsed = deployed(model)
    verify(model, collapsed, images()).raise_if_different("the deploy form")
    assert not any(isinstance(module, DropPath) for module in collapsed.modules())
    verify(model, collapsed.train(), images()).raise_if_different("the deploy form in training mode")


@pytest.mark.parametrize("block", ["repvit", "repvgg", "acb", "plain"])
def test_token_mixer_can_be_swapped(block):
    model = small(block=block)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("token_mixer")}
    assert kinds == {{"repvit": "RepViTConv", "repvgg": "RepVGGConv", "acb": "ACConv", "plain": "ConvBN"}[block]}
    verify(model, deployed(model), images()).raise_if_different("the deploy form")


def test_unknown_token_mixer_is_refused():
    with pytest.raises(ConfigurationError, match="repvit"):
        create_model("rb_repvit_m0_9", block="repvitt")


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [8, 16])
@both_forms
def test_dilated_network_gives_the_strided_one_at_every_nth_pixel(output_stride, form):
    strided, dilated = small(), small(output_stride=output_stride)
    dilated.load_state_dict(strided.state_dict())
    for model in (strided, dilated):
        for stage in model.stages:
            for block in stage:
                block.se = None  # it averages over another set of pixels
    if form == "deploy":
        strided, dilated = deployed(strided), deployed(dilated)
    step = 32 // output_stride
    found = dilated.forward_features(images())
    assert found.shape[2:] == (64 // output_stride, 96 // output_stride)
    torch.testing.assert_close(found[:, :, ::step, ::step], strided.forward_features(images()), rtol=1e-9, atol=1e-9)


def test_replaced_classifier_has_one_head_unless_told_otherwise():
    model = small()
    assert list(model.get_classifier().branches) == ["main", "distilled"]
    for options, heads in (({}, ["main"]), ({"distillation": True}, ["main", "distilled"])):
        model.reset_classifier(3, **options)
        classifier = model.get_classifier()
        assert isinstance(classifier, NormLinear)
        assert list(classifier.branches) == heads
        assert classifier.out_features == 3
        assert model.model_args["distillation"] == (len(heads) == 2)
        again = create_model("rb_repvit_m0_9", **model.model_args)
        again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("options", [{"distillation": False}, {"form": "deploy"}, {"num_classes": 0}], ids=str)
def test_distilled_training_without_a_second_head_is_refused(options):
    with torch.device("meta"):
        model = create_model("rb_repvit_m0_9", **options)
    with pytest.raises(ConfigurationError, match="two heads"):
        model.set_distilled_training()
    model.set_distilled_training(False)
