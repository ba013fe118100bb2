from collections import OrderedDict

import pytest
import timm
import torch
from support import calibrate
from timm.layers import DropPath
from timm.models import reparameterize_model
from torch import nn

from repblocks.blocks import BLOCKS, MobileOneConv, RepVGGBlock, deployed, form_of
from repblocks.convert import convert, detect
from repblocks.errors import ConfigurationError
from repblocks.models import create_model, list_models
from repblocks.models.layers import SqueezeExcite
from repblocks.verification import verify

# Parameters of training and deploy form, the same as timm's model without the prefix.
PARAMETERS = {
    "rb_mobileone_s0": (5_293_272, 2_078_504),
    "rb_mobileone_s1": (4_825_192, 4_764_840),
    "rb_mobileone_s2": (7_884_648, 7_808_168),
    "rb_mobileone_s3": (10_170_600, 10_078_312),
    "rb_mobileone_s4": (14_951_248, 14_838_352),
}
# Width multipliers of 64, 128, 256 and 512 channels, convolution branches, and squeeze-and-excitation of table 3.
PUBLISHED = {
    "rb_mobileone_s0": ((0.75, 1, 1, 2), 4, (0, 0, 0, 0)),
    "rb_mobileone_s1": ((1.5, 1.5, 2, 2.5), 1, (0, 0, 0, 0)),
    "rb_mobileone_s2": ((1.5, 2, 2.5, 4), 1, (0, 0, 0, 0)),
    "rb_mobileone_s3": ((2, 2.5, 3, 4), 1, (0, 0, 0, 0)),
    "rb_mobileone_s4": ((3, 3.5, 3.5, 4), 1, (0, 0, 5, 1)),
}
SMALL = {"depths": (1, 2, 2, 1), "widths": (16, 32, 32, 64), "num_conv_branches": 2, "se_pairs": (0, 0, 1, 1)}
every_name = pytest.mark.parametrize("name", PARAMETERS)
both_forms = pytest.mark.parametrize("form", ["train", "deploy"])


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def small(**arguments) -> nn.Module:
    return create_model("rb_mobileone_s4", num_classes=7, **{**SMALL, **arguments}).double()


@every_name
def test_parameters_of_both_forms_equal_timms(name):
    with torch.device("meta"):
        ours = count(create_model(name)), count(create_model(name, form="deploy"))
        timms = timm.create_model(name.removeprefix("rb_")).eval()
        theirs = count(timms), count(reparameterize_model(timms))
    assert ours == theirs == PARAMETERS[name]


def test_table_covers_the_family():
    assert list(PARAMETERS) == list(PUBLISHED) == list_models("rb_mobileone_*")


@every_name
def test_layout_is_the_published_one(name):
    factors, branches, se_pairs = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name)
    for stage, pairs, base, factor, with_se in zip(
        model.stages, (2, 8, 10, 1), (64, 128, 256, 512), factors, se_pairs, strict=True
    ):
        assert len(stage) == 2 * pairs
        assert stage[-1].conv.out_channels == int(base * factor)
        assert [layer.conv.kernel_size for layer in stage] == [(3, 3), (1, 1)] * pairs
        assert [layer.conv.stride for layer in stage] == [(2, 2)] + [(1, 1)] * (2 * pairs - 1)
        assert all(layer.conv.groups == layer.conv.in_channels for layer in stage[::2])
        assert all(layer.conv.groups == 1 for layer in stage[1::2])
        assert all(conv_branches(layer) == branches for layer in stage)
        assert [isinstance(layer.se, SqueezeExcite) for layer in stage] == [
            index >= 2 * (pairs - with_se) for index in range(2 * pairs)
        ]
    assert model.stem.conv.out_channels == min(64, int(64 * factors[0]))
    assert conv_branches(model.stem) == 1


def conv_branches(layer: RepVGGBlock) -> int:
    return sum(key.startswith("kxk") for key, _ in layer.conv.branches.named_children())


def test_squeeze_excitation_has_a_sixteenth_of_the_channels():
    with torch.device("meta"):
        model = create_model("rb_mobileone_s4")
    assert model.stages[2][10].se.fc1.out_channels == 56
    assert model.stages[3][1].se.fc1.out_channels == 128


@pytest.mark.parametrize("se_pairs", [(1,), (0, 0, 0, 0, 1)])
def test_squeeze_excitation_is_given_for_every_stage(se_pairs):
    with pytest.raises(ConfigurationError, match=f"got {len(se_pairs)} se_pairs for 4 stages"):
        small(se_pairs=se_pairs)


@pytest.mark.parametrize(("output_stride", "dilations"), [(32, [1, 1, 1, 1]), (16, [1, 1, 1, 2]), (8, [1, 1, 2, 4])])
def test_dilated_stages_dilate_their_depthwise_layers(output_stride, dilations):
    with torch.device("meta"):
        model = create_model("rb_mobileone_s1", output_stride=output_stride)
    for stage, dilation in zip(model.stages, dilations, strict=True):
        assert {layer.conv.dilation for layer in stage[2::2]} <= {(dilation, dilation)}
    assert [stage[0].conv.dilation[0] for stage in model.stages] == [1, *dilations[:3]]


@pytest.mark.parametrize("output_stride", [16, 8])
@both_forms
def test_dilated_network_computes_the_plain_ones_features_on_a_finer_grid(output_stride, form):
    plain = calibrate(small(se_pairs=()), images())
    dilated = small(se_pairs=(), output_stride=output_stride).eval()
    dilated.load_state_dict(plain.state_dict())
    if form == "deploy":
        plain, dilated = deployed(plain), deployed(dilated)
    step = 32 // output_stride
    finer, expected = dilated.forward_features(images()), plain.forward_features(images())
    torch.testing.assert_close(finer[:, :, ::step, ::step], expected, rtol=1e-11, atol=1e-11 * expected.max().item())


def test_timms_dilated_network_is_another_one():
    """The reason why conversion promises timm's outputs for ``output_stride=32`` only."""
    theirs = timm.create_model("mobileone_s1", output_stride=16)
    assert {module.dilation for module in theirs.modules() if isinstance(module, nn.Conv2d)} == {(1, 1)}


@pytest.mark.parametrize("block", ["plain", "repvgg", "acb", "dbb", "orepa", "qarepvgg", "expand"])
@pytest.mark.parametrize("output_stride", [32, 8])
def test_block_family_can_be_swapped(block, output_stride):
    model = small(block=block, output_stride=output_stride)
    layers = [module for module in model.modules() if isinstance(module, RepVGGBlock)]
    assert {type(layer.conv) for layer in layers} == {BLOCKS[block]}
    assert len(layers) == 1 + 2 * sum(SMALL["depths"])
    calibrate(model, images())
    verify(model, deployed(model), images()).raise_if_different("the deploy form")


@pytest.mark.parametrize("block", ["mobileone", "repvgg", "qarepvgg"])
def test_identity_branches_do_not_depend_on_the_output_stride(block):
    layers = {stride: layers_with_identity(small(block=block, output_stride=stride)) for stride in (32, 16, 8)}
    assert layers[32] == layers[16] == layers[8]
    assert "stages.3.0.conv" not in layers[32]


def layers_with_identity(model: nn.Module) -> set[str]:
    return {name.partition(".branches")[0] for name, _ in model.named_modules() if name.endswith(".identity")}


def test_block_that_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="kernel_size"):
        small(block="edge")


def test_stochastic_depth_drops_convolutions_beside_an_identity():
    model = small(drop_path_rate=0.55)
    rates = {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert {name.split(".conv.")[0]: rate for name, rate in rates.items()} == pytest.approx(
        {
            "stages.0.1": 0.05,
            "stages.1.2": 0.2,
            "stages.1.3": 0.25,
            "stages.2.1": 0.35,
            "stages.2.2": 0.4,
            "stages.2.3": 0.45,
        }
    )
    assert {name.split(".branches.")[1] for name in rates} == {"kxk0.2", "kxk1.2", "pointwise.2"}
    assert model.state_dict().keys() == small().state_dict().keys()


def test_collapse_ignores_stochastic_depth():
    model = calibrate(small(drop_path_rate=0.6), images())
    verify(model, deployed(model), images()).raise_if_different("the deploy form")


def test_every_layer_is_made_of_mobileones_block():
    model = small()
    assert all(isinstance(layer.conv, MobileOneConv) for layer in model.modules() if isinstance(layer, RepVGGBlock))


@pytest.fixture(scope="module", params=["mobileone_s0", "mobileone_s4"])
def timms(request) -> dict[str, nn.Module]:
    """timm's model in float64 with calibrated statistics, in both forms.

    Statistics of fewer pixels than S4 has channels would make its last stages amplify all rounding.
    """
    torch.manual_seed(0)
    many = torch.randn(16, 3, 64, 96, dtype=torch.float64)
    model = calibrate(timm.create_model(request.param, num_classes=7).double(), many)
    return {"name": request.param, "train": model, "deploy": reparameterize_model(model)}


@both_forms
def test_converted_weights_give_timms_outputs(timms, form):
    name = f"rb_{timms['name']}"
    ours = create_model(name, num_classes=7, form=form).double()
    ours.load_state_dict(convert(timms[form].state_dict(), model=name, source="timm", num_classes=7))
    assert form_of(ours) == form
    verify(timms[form], ours.eval(), images()).raise_if_different("the converted model")


def test_collapsing_before_or_after_the_conversion_gives_the_same_weights(timms):
    name = f"rb_{timms['name']}"
    ours = create_model(name, num_classes=7).double()
    ours.load_state_dict(convert(timms["train"].state_dict(), model=name, source="timm", num_classes=7))
    theirs = convert(timms["deploy"].state_dict(), model=name, source="timm", num_classes=7)
    torch.testing.assert_close(deployed(ours).state_dict(), theirs, rtol=1e-12, atol=1e-14)


@every_name
@pytest.mark.parametrize("source", ["timm", "mobileone"])
@both_forms
def test_conversion_and_back_is_the_identity(name, source, form):
    with torch.device("meta"):
        theirs = (timms_model if source == "timm" else apples_model)(name, form).state_dict()
        ours = create_model(name, form=form).state_dict()
    converted = convert(theirs, model=name, source=source)
    assert {key: tensor.shape for key, tensor in converted.items()} == {key: ours[key].shape for key in ours}
    assert {id(tensor) for tensor in converted.values()} == {id(tensor) for tensor in theirs.values()}
    back = convert(converted, model=name, source="repblocks", target=source)
    assert back.keys() == theirs.keys()
    assert all(back[key] is theirs[key] for key in theirs)


def timms_model(name: str, form: str) -> nn.Module:
    model = timm.create_model(name.removeprefix("rb_"))
    return model if form == "train" else reparameterize_model(model)


def apples_model(name: str, form: str) -> nn.Module:
    factors, branches, se_pairs = PUBLISHED[name]
    widths = [int(base * factor) for base, factor in zip((64, 128, 256, 512), factors, strict=True)]
    return Apples((2, 8, 10, 1), widths, branches, se_pairs, form=form)


class ApplesSE(nn.Module):
    """The authors' squeeze-and-excitation, by their names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, int(channels * 0.0625), 1)
        self.expand = nn.Conv2d(int(channels * 0.0625), channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class ApplesBlock(nn.Module):
    """The authors' block, by their names."""

    def __init__(self, inputs, outputs, kernel, stride, groups, *, branches, se, form) -> None:
        super().__init__()
        self.se = ApplesSE(outputs) if se else nn.Identity()
        geometry = {"stride": stride, "groups": groups}
        self.reparam_conv = self.rbr_skip = self.rbr_scale = None
        if form == "deploy":
            self.reparam_conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **geometry)
            return
        if inputs == outputs and stride == 1:
            self.rbr_skip = nn.BatchNorm2d(outputs)
        self.rbr_conv = nn.ModuleList(self._conv_bn(inputs, outputs, kernel, geometry) for _ in range(branches))
        if kernel > 1:
            self.rbr_scale = self._conv_bn(inputs, outputs, 1, geometry)

    @staticmethod
    def _conv_bn(inputs, outputs, kernel, geometry) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **geometry)
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))

    def forward(self, x):
        if self.reparam_conv is not None:
            return torch.relu(self.se(self.reparam_conv(x)))
        branches = [*self.rbr_conv, *(b for b in (self.rbr_scale, self.rbr_skip) if b is not None)]
        return torch.relu(self.se(sum(branch(x) for branch in branches)))


class Apples(nn.Module):
    """The authors' network, by their names: ``stage0`` is the stem, ``stage1`` to ``stage4`` are flat."""

    def __init__(self, depths, widths, branches, se_pairs, *, form, classes=1000) -> None:
        super().__init__()
        channels = min(64, widths[0])
        self.stage0 = ApplesBlock(3, channels, 3, 2, 1, branches=1, se=False, form=form)
        for number, (depth, width, with_se) in enumerate(zip(depths, widths, se_pairs, strict=True), 1):
            layers = []
            for pair in range(depth):
                options = {"branches": branches, "se": pair >= depth - with_se, "form": form}
                layers.append(ApplesBlock(channels, channels, 3, 1 if pair else 2, channels, **options))
                layers.append(ApplesBlock(channels, width, 1, 1, 1, **options))
                channels = width
            setattr(self, f"stage{number}", nn.Sequential(*layers))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x):
        for stage in (self.stage0, self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module", params=["train", "deploy"])
def apples(request) -> Apples:
    """A small network of the authors' layout in float64, with calibrated statistics in the training form."""
    torch.manual_seed(0)
    model = Apples(*SMALL.values(), form=request.param, classes=7).double()
    return calibrate(model, images())


def test_converted_official_weights_give_the_official_outputs(apples):
    form = "deploy" if apples.stage0.reparam_conv is not None else "train"
    options = {"model": "rb_mobileone_s4", "num_classes": 7, **SMALL}
    converted = convert(apples.state_dict(), source="mobileone", **options)
    ours = small(form=form).eval()
    ours.load_state_dict(converted)
    verify(apples, ours, images()).raise_if_different("the converted model")
    verify(apples, deployed(ours), images()).raise_if_different("its deploy form")
    back = convert(ours.state_dict(), source="repblocks", target="mobileone", **options)
    assert back.keys() == apples.state_dict().keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in apples.state_dict().items())


@both_forms
def test_timms_weights_under_official_names_give_timms_outputs(timms, form):
    name = f"rb_{timms['name']}"
    ours = convert(timms[form].state_dict(), model=name, source="timm", num_classes=7)
    official = convert(ours, model=name, source="repblocks", target="mobileone", num_classes=7)
    factors, branches, se_pairs = PUBLISHED[name]
    widths = [int(base * factor) for base, factor in zip((64, 128, 256, 512), factors, strict=True)]
    theirs = Apples((2, 8, 10, 1), widths, branches, se_pairs, form=form, classes=7).double()
    theirs.load_state_dict(official)
    verify(timms[form], theirs.eval(), images()).raise_if_different("the official network")


@pytest.mark.parametrize(
    ("name", "source", "form"),
    [
        ("rb_mobileone_s0", "timm", "train"),
        ("rb_mobileone_s1", "timm", "deploy"),
        ("rb_mobileone_s3", "mobileone", "train"),
        ("rb_mobileone_s4", "mobileone", "deploy"),
    ],
)
@pytest.mark.slow
def test_model_and_source_are_told_by_the_weights(name, source, form):
    with torch.device("meta"):
        theirs = (timms_model if source == "timm" else apples_model)(name, form).state_dict()
    assert detect(theirs) == (name, source)
    converted, named = convert(theirs), convert(theirs, model=name, source=source)
    assert {key: id(tensor) for key, tensor in converted.items()} == {key: id(named[key]) for key in named}
