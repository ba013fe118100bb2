from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from support import calibrate
from timm.layers import DropPath
from torch import nn

from repblocks.blocks import RepVGGConv, deployed, form_of
from repblocks.convert import convert, detect
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models import create_model, list_models
from repblocks.verification import verify

# Parameters of training and deploy form. The training form has the numbers of the authors' logs; the deploy form has
# those of their collapsed network, without the BatchNorm behind each token mixer, which they keep.
PARAMETERS = {
    "rb_repnextm_m1": (5_323_316, 4_820_056),
    "rb_repnextm_m2": (7_049_082, 6_462_112),
    "rb_repnextm_m3": (8_466_560, 7_807_272),
    "rb_repnextm_m4": (14_080_480, 13_321_512),
    "rb_repnextm_m5": (22_708_860, 21_707_000),
}
# The authors' collapsed network.
WITH_NORMS = {
    "rb_repnextm_m1": 4_829_560,
    "rb_repnextm_m2": 6_473_200,
    "rb_repnextm_m3": 7_818_920,
    "rb_repnextm_m4": 13_342_120,
    "rb_repnextm_m5": 21_737_560,
}
SMALL = {"depths": (1, 1, 2, 1), "widths": (8, 16, 32, 64), "num_classes": 7}


def skeleton(name: str = "rb_repnextm_m1", **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return calibrate(create_model("rb_repnextm_m1", **SMALL, **options).double(), images()).eval()


# A reference network with the modules that the authors' names tell, in plain torch.


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))


def depthwise(channels: int, height: int, width: int, stride: tuple[int, int], **options) -> nn.Conv2d:
    padding = (height // 2, width // 2)
    return nn.Conv2d(channels, channels, (height, width), stride, padding, groups=channels, **options)


class ReferenceSmall(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.in_series = stride == 2
        self.conv_3_3 = depthwise(channels, 3, 3, (stride, stride))
        self.conv_3_w = depthwise(channels, 1, 3, (1, stride), bias=not self.in_series)
        self.conv_3_h = depthwise(channels, 3, 1, (stride, 1), bias=not self.in_series)
        self.conv_2_2 = nn.Conv2d(channels, channels, 2, stride, padding=1, dilation=2, groups=channels)

    def forward(self, x):
        lines = self.conv_3_h(self.conv_3_w(x)) if self.in_series else self.conv_3_h(x) + self.conv_3_w(x)
        return self.conv_3_3(x) + lines + self.conv_2_2(x)


class ReferenceMedium(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv_7_7 = depthwise(channels, 7, 7, (stride, stride))
        self.conv_5_3 = depthwise(channels, 5, 3, (stride, stride))
        self.conv_3_5 = depthwise(channels, 3, 5, (stride, stride))
        self.conv_7_w = depthwise(channels, 1, 7, (1, stride), bias=False)
        self.conv_7_h = depthwise(channels, 7, 1, (stride, 1), bias=False)
        self.conv_5_w = depthwise(channels, 1, 5, (1, stride), bias=False)
        self.conv_5_h = depthwise(channels, 5, 1, (stride, 1), bias=False)

    def forward(self, x):
        in_series = self.conv_7_h(self.conv_7_w(x)) + self.conv_5_h(self.conv_5_w(x))
        return self.conv_7_7(x) + self.conv_5_3(x) + self.conv_3_5(x) + in_series


class ReferenceChunk(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        self.conv_s, self.conv_m = ReferenceSmall(quarter, 1), ReferenceMedium(quarter, 1)
        self.conv_l = nn.Sequential(depthwise(quarter, 1, 11, (1, 1)), depthwise(quarter, 11, 1, (1, 1)))

    def forward(self, x):
        identity, s, m, large = x.chunk(4, 1)
        return torch.cat([identity, self.conv_s(s), self.conv_m(m), self.conv_l(large)], 1)


class ReferenceCopy(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_s, self.conv_m = ReferenceSmall(channels, 2), ReferenceMedium(channels, 2)

    def forward(self, x):
        return torch.cat([self.conv_s(x), self.conv_m(x)], 1)


class ReferenceBlock(nn.Module):
    def __init__(self, channels: int, *, downsample: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.token_mixer = ReferenceCopy(channels // 2) if downsample else ReferenceChunk(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.channel_mixer = nn.Sequential(
            conv_norm(channels, 2 * channels, 1), nn.GELU(), conv_norm(2 * channels, channels, 1)
        )

    def forward(self, x):
        y = self.norm(self.token_mixer(x))
        return (y if self.downsample else x) + self.channel_mixer(y)


class ReferenceNormLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(in_features), nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.linear(self.norm(x))


class Reference(nn.Module):
    def __init__(self, *, depths, widths, num_classes: int) -> None:
        super().__init__()
        first = widths[0]
        stem = nn.Sequential(conv_norm(3, first // 2, 3, 2), nn.GELU(), conv_norm(first // 2, first, 3, 2))
        self.stem = nn.ModuleDict({"stem": stem})
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.ModuleDict({"downsample": ReferenceBlock(width, downsample=True)} if i else {})
            stage["blocks"] = nn.Sequential(*(ReferenceBlock(width, downsample=False) for _ in range(depth)))
            self.stages.append(stage)
        heads = {name: ReferenceNormLinear(widths[-1], num_classes) for name in ("head", "head_dist")}
        self.head = nn.ModuleDict(heads)

    def forward(self, x):
        x = self.stem["stem"](x)
        for stage in self.stages:
            for layer in stage.values():
                x = layer(x)
        x = x.mean((2, 3))
        return (self.head["head"](x) + self.head["head_dist"](x)) / 2


def collapsed(model: Reference) -> dict[str, torch.Tensor]:
    """The weights of the authors' collapsed form, by the algebra of kernels written out."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and [*dict(module.named_children())] == ["conv", "norm"]:
            scale = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
            weights[f"{name}.weight"] = module.conv.weight * scale[:, None, None, None]
            weights[f"{name}.bias"] = module.norm.bias - module.norm.running_mean * scale
        elif isinstance(module, ReferenceSmall):
            weights |= {f"{name}.weight": small_kernel(module), f"{name}.bias": small_bias(module)}
        elif isinstance(module, ReferenceMedium):
            parts = (module.conv_7_7, module.conv_5_3, module.conv_3_5)
            weights |= {f"{name}.weight": medium_kernel(module), f"{name}.bias": sum(part.bias for part in parts)}
        elif isinstance(module, ReferenceBlock):
            weights |= {f"{name}.norm.{key}": tensor for key, tensor in module.norm.state_dict().items()}
    weights |= {key: tensor for key, tensor in model.state_dict().items() if ".conv_l." in key}
    heads = [affine(head) for head in model.head.values()]
    weights["head.weight"], weights["head.bias"] = (sum(parts) / 2 for parts in zip(*heads, strict=True))
    return weights


def small_kernel(unit: ReferenceSmall) -> torch.Tensor:
    kernel = unit.conv_3_3.weight.clone()
    kernel[:, :, ::2, ::2] += unit.conv_2_2.weight
    if unit.in_series:
        return kernel + unit.conv_3_h.weight * unit.conv_3_w.weight
    kernel[:, :, 1:2] += unit.conv_3_w.weight
    kernel[:, :, :, 1:2] += unit.conv_3_h.weight
    return kernel


def small_bias(unit: ReferenceSmall) -> torch.Tensor:
    lines = 0 if unit.in_series else unit.conv_3_w.bias + unit.conv_3_h.bias
    return unit.conv_3_3.bias + unit.conv_2_2.bias + lines


def medium_kernel(unit: ReferenceMedium) -> torch.Tensor:
    tall, wide = F.pad(unit.conv_5_3.weight, (2, 2, 1, 1)), F.pad(unit.conv_3_5.weight, (1, 1, 2, 2))
    five = F.pad(unit.conv_5_h.weight * unit.conv_5_w.weight, (1, 1, 1, 1))
    return unit.conv_7_7.weight + tall + wide + unit.conv_7_h.weight * unit.conv_7_w.weight + five


def affine(head: ReferenceNormLinear) -> tuple[torch.Tensor, torch.Tensor]:
    scale = head.norm.weight / (head.norm.running_var + head.norm.eps).sqrt()
    shift = head.norm.bias - head.norm.running_mean * scale
    return head.linear.weight * scale, head.linear.bias + head.linear.weight @ shift


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.manual_seed(0)
    return calibrate(Reference(**SMALL).double(), images()).eval()


@pytest.fixture(scope="module", params=PARAMETERS)
def named(request) -> tuple[str, nn.Module]:
    return request.param, skeleton(request.param)


def test_parameters_of_both_forms_are_the_published_ones(named):
    name, model = named
    assert (count(model), count(skeleton(name, form="deploy"))) == PARAMETERS[name]
    # Theirs has a weight and a bias per channel more, behind each token mixer.
    kept = sum(2 * layer.channel_mixer.project.out_channels for stage in model.stages for layer in stage)
    assert PARAMETERS[name][1] + kept == WITH_NORMS[name]


def test_the_table_covers_every_name():
    assert set(PARAMETERS) == set(WITH_NORMS) == set(list_models("rb_repnextm_*"))


def test_the_authors_names_and_shapes_are_ours(named):
    name, model = named
    sizes = {"depths": [sum(n != "downsample" for n, _ in stage.named_children()) for stage in model.stages]}
    sizes["widths"] = [info["num_chs"] for info in model.feature_info]
    with torch.device("meta"):
        theirs = Reference(**sizes, num_classes=1000)
    assert count(theirs) == PARAMETERS[name][0]
    convert(theirs.state_dict(), model=name, source="repnextm")


@torch.no_grad()
def test_the_authors_weights_give_their_outputs(reference):
    converted = convert(reference.state_dict(), model="rb_repnextm_m1", source="repnextm", **SMALL)
    ours = create_model("rb_repnextm_m1", **SMALL).double()
    ours.load_state_dict(converted)
    verify(reference, ours.eval(), images()).raise_if_different("the converted model")
    verify(reference, deployed(ours), images()).raise_if_different("its deploy form")


@torch.no_grad()
def test_the_authors_collapsed_weights_give_their_outputs(reference):
    converted = convert(collapsed(reference), model="rb_repnextm_m1", source="repnextm", **SMALL)
    ours = create_model("rb_repnextm_m1", form="deploy", **SMALL).double()
    ours.load_state_dict(converted)
    verify(reference, ours.eval(), images()).raise_if_different("the converted model")


def test_every_weight_of_the_training_form_arrives_once(reference):
    theirs = reference.state_dict()
    ours = convert(theirs, model="rb_repnextm_m1", source="repnextm", **SMALL)
    assert sum(t.numel() for key, t in ours.items() if "num_batches" not in key) == sum(
        t.numel() for key, t in theirs.items() if "num_batches" not in key
    )


def test_the_repository_is_told_by_the_authors_weights(reference):
    assert detect(reference.state_dict(), model="rb_repnextm_m1", **SMALL) == ("rb_repnextm_m1", "repnextm")


def test_there_is_no_way_back_and_the_reason_is_told():
    with pytest.raises(ConfigurationError, match="keeps the BatchNorm"):
        convert(small().state_dict(), model="rb_repnextm_m1", target="repnextm", **SMALL)


def test_unknown_keys_are_refused(reference):
    theirs = {**reference.state_dict(), "stages.0.blocks.0.gamma": torch.ones(8)}
    with pytest.raises(CheckpointError, match="gamma"):
        convert(theirs, model="rb_repnextm_m1", source="repnextm", **SMALL)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("block", ["repnextm", "repvgg", "plain"])
def test_every_variant_collapses_exactly_and_keeps_its_weights_under_dilation(output_stride, block):
    model = small(output_stride=output_stride, block=block, drop_path_rate=0.3)
    verify(model, deployed(model), images()).raise_if_different("the deploy form")
    assert model.state_dict().keys() == skeleton(**SMALL, block=block).state_dict().keys()


def test_dilation_reaches_every_kernel_behind_the_output_stride():
    model = skeleton(output_stride=8)
    dilations = [
        {m.dilation[0] for n, m in stage.named_modules() if isinstance(m, nn.Conv2d) and ".token_mixer." in f".{n}"}
        for stage in model.stages
    ]
    # The corners of the small unit are dilated twice as far.
    assert dilations == [{1, 2}, {1, 2}, {2, 4}, {4, 8}]
    assert (model.stages[3].downsample.small.dilation, model.stages[3].downsample.medium.dilation) == ((2, 2), (2, 2))


def test_the_medium_unit_can_be_swapped():
    model = skeleton(block="repvgg")
    swapped = [m for m in model.modules() if isinstance(m, RepVGGConv)]
    assert len(swapped) == 3 + 3 + 15 + 2 + 3
    assert {unit.kernel_size for unit in swapped} == {(7, 7)}
    assert all(unit.groups == unit.in_channels == unit.out_channels for unit in swapped)


def test_stochastic_depth_grows_linearly_and_leaves_the_deploy_form():
    model = create_model("rb_repnextm_m1", **SMALL, drop_path_rate=0.4)
    rates = [(name, layer.drop_path.drop_prob) for stage in model.stages for name, layer in stage.named_children()]
    assert [rate for name, rate in rates if name != "downsample"] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [rate for name, rate in rates if name == "downsample"] == pytest.approx([0.1, 0.2, 0.4])
    assert not any(isinstance(module, DropPath) for module in deployed(model).modules())


def test_the_last_quarter_keeps_both_strips_in_deploy_form():
    block = skeleton(form="deploy").stages[0][0]
    assert [layer.kernel_size for layer in block.token_mixer.large] == [(1, 11), (11, 1)]
    assert not [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_downsampling_layer_takes_its_shortcut_behind_the_norm():
    layer = small().stages[1].downsample
    x = torch.randn(2, 8, 10, 12, dtype=torch.float64)
    y = torch.cat([layer.small(x), layer.medium(x)], 1)
    torch.testing.assert_close(layer(x), y + layer.channel_mixer(y))


def test_two_heads_train_by_distillation_and_one_can_do_without():
    model = small().train()
    assert model(images()).shape == (2, 7)
    model.set_distilled_training()
    assert [logits.shape for logits in model(images())] == [(2, 7), (2, 7)]
    assert model.eval()(images()).shape == (2, 7)
    single = skeleton(**SMALL, distillation=False)
    assert [*dict(single.get_classifier().branches.named_children())] == ["main"]
    with pytest.raises(ConfigurationError, match="two heads"):
        single.set_distilled_training()
    single.reset_classifier(0)
    with pytest.raises(ConfigurationError, match="two heads"):
        single.set_distilled_training()
    single.reset_classifier(5, distillation=True)
    assert len(single.get_classifier().branches) == 2
    assert single.model_args["distillation"] is True
    assert form_of(single) == "train"


@pytest.mark.parametrize("widths", [(8, 16, 32, 48), (6, 12, 24, 48)])
def test_widths_that_do_not_double_or_divide_are_refused(widths):
    with pytest.raises(ConfigurationError, match="multiples of 4, twice as many"):
        skeleton(widths=widths)
