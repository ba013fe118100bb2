import re

import pytest
import timm
import torch
from models.repghost_official import official_shapes, official_weights
from support import batch_norms, calibrate
from timm.layers import DropPath
from timm.models import reparameterize_model
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from repblocks.blocks import deployed, form_of
from repblocks.convert import convert, detect
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models import create_model, list_models
from repblocks.models.repghost import RepGhostBottleneck, Row
from repblocks.verification import verify

# Parameters of training and deploy form. timm's collapsed form keeps the BatchNorms behind its bias-free convolutions
# (the stem, the primary, strided depthwise, shortcut and last convolutions): each has a weight and a bias per channel,
# where ours has the bias of the convolution that it is folded into.
PARAMETERS = {
    "rb_repghostnet_050": (2_313_968, 2_302_956),
    "rb_repghostnet_058": (2_546_388, 2_533_576),
    "rb_repghostnet_080": (3_278_968, 3_261_420),
    "rb_repghostnet_100": (4_073_604, 4_051_648),
    "rb_repghostnet_111": (4_539_984, 4_515_684),
    "rb_repghostnet_130": (5_478_612, 5_450_052),
    "rb_repghostnet_150": (6_575_336, 6_542_368),
    "rb_repghostnet_200": (9_796_124, 9_752_212),
}
SMALLEST = "rb_repghostnet_050"
OPTIONS = {"num_classes": 7}
every_name = pytest.mark.parametrize("name", PARAMETERS)
every_form = pytest.mark.parametrize("form", ["train", "deploy"])
every_source = pytest.mark.parametrize("source", ["timm", "repghost"])


def skeleton(name: str = SMALLEST, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **kwargs)


def timms_skeletons(name: str) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        theirs = timm.create_model(name.removeprefix("rb_")).eval()
        return theirs, reparameterize_model(theirs)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


def assert_same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def timms() -> dict[str, nn.Module]:
    """timm's smallest RepGhostNet in float64 with calibrated statistics, and its collapsed copy."""
    torch.manual_seed(0)
    model = timm.create_model("repghostnet_050", **OPTIONS).double()
    calibrate(model, images())
    return {"train": model.eval(), "deploy": reparameterize_model(model.eval())}


@every_name
def test_parameters_of_both_forms(name):
    theirs, collapsed = timms_skeletons(name)
    kept = sum(norm.num_features for norm in batch_norms(collapsed))
    ours = count(skeleton(name)), count(skeleton(name, form="deploy"))
    assert ours == (count(theirs), count(collapsed) - kept) == PARAMETERS[name]


def test_table_covers_the_family_and_every_model_of_timm():
    assert list(PARAMETERS) == list_models("rb_repghostnet_*")
    assert list(PARAMETERS) == [f"rb_{name}" for name in timm.list_models("repghostnet_*")]


@pytest.fixture(scope="module")
def bottlenecks() -> dict[str, RepGhostBottleneck]:
    """Those of the network of width 1, by stage and position."""
    stages = skeleton("rb_repghostnet_100").stages
    return {path: module for path, module in stages.named_modules() if isinstance(module, RepGhostBottleneck)}


def test_stages_hold_the_papers_bottlenecks_and_the_last_one_a_1x1_convolution(bottlenecks):
    assert [sum(path.startswith(f"{stage}.") for path in bottlenecks) for stage in range(5)] == [1, 2, 2, 6, 5]
    widths = [16, 24, 24, 40, 40, 80, 80, 80, 80, 112, 112, 160, 160, 160, 160, 160]
    assert [block.ghost2.cheap.out_channels for block in bottlenecks.values()] == widths
    last = skeleton("rb_repghostnet_100").stages[4][5]
    assert (last.conv.in_channels, last.conv.out_channels, last.conv.kernel_size) == (160, 960, (1, 1))


def test_squeeze_excitation_stands_where_the_paper_has_it_with_a_quarter_of_the_channels(bottlenecks):
    gated = {path: block.se for path, block in bottlenecks.items() if block.se is not None}
    assert list(gated) == ["2.0", "2.1", "3.4", "3.5", "4.0", "4.2", "4.4"]
    assert all(isinstance(se, SqueezeExcite) and isinstance(se.gate, nn.Hardsigmoid) for se in gated.values())
    assert [se.conv_reduce.out_channels for se in gated.values()] == [12, 16, 60, 84, 84, 120, 120]
    assert [se.conv_expand.out_channels for se in gated.values()] == [36, 60, 240, 336, 336, 480, 480]


def test_strides_and_shortcuts_stand_where_the_shape_changes(bottlenecks):
    strided = {path: block.conv_dw for path, block in bottlenecks.items() if block.conv_dw is not None}
    assert {path: (conv.stride[0], conv.kernel_size[0]) for path, conv in strided.items()} == {
        "1.0": (2, 3), "2.0": (2, 5), "3.0": (2, 3), "4.0": (2, 5)
    }  # fmt: skip
    shortcuts = {path: block.shortcut for path, block in bottlenecks.items() if block.shortcut is not None}
    assert list(shortcuts) == ["1.0", "2.0", "3.0", "3.4", "4.0"]
    assert [shortcut[0].kernel_size[0] for shortcut in shortcuts.values()] == [3, 5, 3, 3, 5]
    assert all(shortcut[0].groups == shortcut[0].in_channels for shortcut in shortcuts.values())


def random_bottleneck(*args, **kwargs) -> RepGhostBottleneck:
    torch.manual_seed(0)
    block = RepGhostBottleneck(*args, **kwargs).double()
    return calibrate(block, torch.randn(3, args[0], 12, 15, dtype=torch.float64))


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (Row(3, 12, 8, 0.0), {"drop_path": 0.5}),
        (Row(3, 12, 16, 0.25), {}),
        (Row(5, 12, 8, 0.25), {"stride": 2, "strided": True}),
        (Row(5, 12, 8, 0.0), {"strided": True, "first_dilation": 2, "dilation": 4}),
    ],
    ids=str,
)
def test_bottleneck_collapses_into_plain_convolutions(row, options):
    block, x = random_bottleneck(8, row, **options), torch.randn(3, 8, 9, 13, dtype=torch.float64)
    collapsed = deployed(block)
    verify(block, collapsed, x, scope="block").raise_if_different("the deploy form")
    assert not batch_norms(collapsed)
    assert not any(isinstance(module, DropPath) for module in collapsed.modules())
    shortcut = 2 * (block.shortcut is not None)
    convolutions = 4 + (block.conv_dw is not None) + 2 * (block.se is not None) + shortcut
    assert sum(isinstance(module, nn.Conv2d) for module in collapsed.modules()) == convolutions


def test_bottleneck_gates_between_its_two_modules():
    block = random_bottleneck(8, Row(3, 12, 16, 0.25), strided=True, stride=2)
    x = torch.randn(3, 8, 9, 13, dtype=torch.float64)
    expected = block.ghost2(block.se(block.conv_dw(block.ghost1(x)))) + block.shortcut(x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_drop_path_drops_the_branch_and_never_the_shortcut():
    block = random_bottleneck(8, Row(3, 12, 8, 0.0), drop_path=0.999).train()
    x = torch.randn(64, 8, 5, 5, dtype=torch.float64)
    torch.manual_seed(0)
    assert ((block(x) - x).flatten(1).abs().amax(1) > 0).sum() < 8


def test_stochastic_depth_grows_over_the_bottlenecks_with_an_identity_shortcut():
    model = skeleton(drop_path_rate=0.3)
    rates = {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert {name.removesuffix(".drop_path"): rate for name, rate in rates.items() if rate} == pytest.approx(
        {"stages.1.1": 0.04, "stages.2.1": 0.08}
        | {f"stages.3.{i}": 0.02 * (5 + i) for i in (1, 2, 3, 5)}
        | {f"stages.4.{i}": 0.02 * (11 + i) for i in (1, 2, 3, 4)}
    )
    assert model.state_dict().keys() == skeleton().state_dict().keys()


def test_collapse_ignores_stochastic_depth():
    torch.manual_seed(0)
    model = calibrate(create_model(SMALLEST, drop_path_rate=0.3).double(), images())
    verify(model.eval(), deployed(model), images()).raise_if_different("the deploy form")


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_computes_the_strided_map_and_the_pixels_between(output_stride):
    """Without squeeze-and-excitation, whose means run over all pixels."""
    rows = [
        [(3, 8, 16, 0.0)],
        [(5, 36, 24, 0.0)] * 2,
        [(5, 60, 40, 0.0)] * 2,
        [(3, 80, 80, 0.0)] * 2,
        [(5, 90, 96, 0.0)] * 2,
    ]
    torch.manual_seed(0)
    strided = calibrate(create_model(SMALLEST, bottlenecks=rows).double(), images()).eval()
    dilated = create_model(SMALLEST, bottlenecks=rows, output_stride=output_stride).double().eval()
    dilated.load_state_dict(strided.state_dict())
    step = 32 // output_stride
    maps = dilated.forward_features(images())
    assert maps.shape[2:] == (64 // output_stride, 96 // output_stride)
    torch.testing.assert_close(maps[:, :, ::step, ::step], strided.forward_features(images()))
    verify(dilated, deployed(dilated), images()).raise_if_different("the deploy form")


@every_name
def test_pooling_that_widens_the_map_is_refused_as_the_hidden_layer_has_a_fixed_width(name):
    with pytest.raises(ConfigurationError, match=r"catavgmax widens the map.*use avg, max or avgmax"):
        skeleton(name, global_pool="catavgmax")
    model = skeleton(name)
    with pytest.raises(ConfigurationError, match="catavgmax"):
        model.reset_classifier(5, "catavgmax")
    assert model.num_classes == model.get_classifier().out_features == 1000
    assert model.head.global_pool.pool_type == "avg"
    assert model.head_hidden_size == model.get_classifier().in_features == 1280


def test_dropout_is_the_papers():
    assert skeleton().drop_rate == skeleton().head.drop_rate == timms_skeletons(SMALLEST)[0].drop_rate == 0.2


@every_form
@every_source
def test_converted_weights_give_timms_outputs(timms, form, source):
    ours = create_model(SMALLEST, form=form, **OPTIONS).double()
    ours.load_state_dict(convert(timms[form].state_dict(), model=SMALLEST, source=source, **OPTIONS))
    assert form_of(ours) == form
    verify(timms[form], ours.eval(), images()).raise_if_different("the converted model")
    verify(timms["train"], ours, images()).raise_if_different("the converted model")


def test_weights_collapsed_by_timm_and_converted_are_those_converted_and_collapsed(timms):
    ours = create_model(SMALLEST, **OPTIONS).double().eval()
    ours.load_state_dict(convert(timms["train"].state_dict(), model=SMALLEST, source="timm", **OPTIONS))
    converted = convert(timms["deploy"].state_dict(), model=SMALLEST, source="timm", **OPTIONS)
    torch.testing.assert_close(converted, dict(deployed(ours).state_dict()), rtol=1e-12, atol=1e-12)


@every_name
def test_every_timm_model_has_all_our_names_and_shapes(name):
    theirs, collapsed = (model.state_dict() for model in timms_skeletons(name))
    converted = convert(theirs, model=name, source="timm")
    assert [id(tensor) for tensor in converted.values()] == [id(tensor) for tensor in theirs.values()]
    assert shapes(convert(collapsed, model=name, source="timm")) == shapes(skeleton(name, form="deploy").state_dict())


@every_name
def test_collapsed_weights_have_all_of_timms_names_and_shapes(name):
    ours = skeleton(name, form="deploy").state_dict()
    assert shapes(convert(ours, model=name, target="timm")) == shapes(timms_skeletons(name)[1].state_dict())


@every_source
def test_conversion_and_back_is_the_identity(timms, source):
    theirs = timms["train"].state_dict()
    ours = convert(theirs, model=SMALLEST, source=source, **OPTIONS)
    back = convert(ours, model=SMALLEST, target=source, **OPTIONS)
    assert back.keys() == theirs.keys()
    assert all(back[key] is theirs[key] for key in theirs)


@every_source
def test_collapsed_weights_go_back_with_norms_that_only_add_a_bias(timms, source):
    ours = create_model(SMALLEST, form="deploy", **OPTIONS).double().eval()
    ours.load_state_dict(convert(timms["deploy"].state_dict(), model=SMALLEST, source="timm", **OPTIONS))
    back = convert(ours.state_dict(), model=SMALLEST, target=source, **OPTIONS)
    theirs = reparameterize_model(timm.create_model("repghostnet_050", **OPTIONS).double().eval())
    theirs.load_state_dict(back)
    verify(timms["deploy"], theirs, images()).raise_if_different("the collapsed model")
    norm, x = theirs.blocks[0][0].ghost1.primary_conv[1], torch.randn(2, 4, 5, 6, dtype=torch.float64)
    assert torch.equal(norm(x), x + norm.bias[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_collapsed_weights_return_from_timms_names_unchanged(dtype):
    torch.manual_seed(0)
    shapes = skeleton(form="deploy").state_dict()
    ours = {key: torch.randn(tensor.shape).to(dtype) for key, tensor in shapes.items()}
    theirs = convert(ours, model=SMALLEST, target="timm")
    assert all(tensor.dtype == dtype for key, tensor in theirs.items() if not key.endswith("num_batches_tracked"))
    assert_same(convert(theirs, model=SMALLEST, source="timm"), ours)


def test_collapsed_weights_of_other_shapes_are_named(timms):
    with pytest.raises(CheckpointError, match=r"deploy form.*head.fc.weight is \[7, 1280\] instead of \[1000, 1280\]"):
        convert(timms["deploy"].state_dict(), model=SMALLEST, source="timm")


@every_form
def test_two_sources_of_the_same_names_are_not_ambiguous(timms, form):
    weights = timms[form].state_dict()
    assert detect(weights, model=SMALLEST, **OPTIONS) == (SMALLEST, "timm")
    assert detect(weights, source="repghost", **OPTIONS) == (SMALLEST, "repghost")
    told = convert(weights, model=SMALLEST, source="repghost", **OPTIONS)
    assert_same(convert(weights, model=SMALLEST, **OPTIONS), told)


@every_form
@every_name
def test_official_repository_has_timms_names_and_shapes(name, form):
    width = int(re.sub(r"\D", "", name)) / 100
    expected = timms_skeletons(name)[form == "deploy"].state_dict()
    assert dict(official_shapes(width, form)) == shapes(expected)
    assert len(expected) == {"train": 672, "deploy": 384}[form]


@every_form
def test_official_weights_load_as_timms_do(form):
    weights = official_weights(0.5, form)
    theirs = timm.create_model("repghostnet_050").double().eval()
    theirs = theirs if form == "train" else reparameterize_model(theirs)
    theirs.load_state_dict(weights)
    assert_same(
        convert(weights, model=SMALLEST, source="repghost"),
        convert(theirs.state_dict(), model=SMALLEST, source="timm"),
    )
    ours = create_model(SMALLEST, form=form).double().eval()
    ours.load_state_dict(convert(weights, model=SMALLEST, source="repghost"))
    verify(theirs, ours, images()).raise_if_different("the official weights")
