"""RepVGG and QARepVGG by their authors' names, against small networks written by those names alone."""

from collections import OrderedDict

import pytest
import timm
import torch
from support import calibrate
from timm.models import reparameterize_model
from torch import nn

from repblocks.blocks import deployed
from repblocks.convert import convert, detect
from repblocks.errors import CheckpointError
from repblocks.models import create_model
from repblocks.verification import verify

both_forms = pytest.mark.parametrize("form", ["train", "deploy"])


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def conv_bn(inputs, outputs, kernel, stride, groups) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class OfficialSE(nn.Module):
    """The authors' squeeze-and-excitation, by their names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 16, 1)
        self.up = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class RepVGGs(nn.Module):
    """RepVGG's block: three branches with a BatchNorm each."""

    def __init__(self, inputs, outputs, stride, groups, *, se, form) -> None:
        super().__init__()
        self.se = OfficialSE(outputs) if se else nn.Identity()
        if form == "deploy":
            self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups)
            return
        self.rbr_identity = nn.BatchNorm2d(outputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)

    def forward(self, x):
        return torch.relu(self.se(self.rbr_reparam(x) if hasattr(self, "rbr_reparam") else self.branches(x)))

    def branches(self, x):
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.rbr_dense(x) + self.rbr_1x1(x) + identity


class QARepVGGs(RepVGGs):
    """QARepVGG's default block, V2: a bare 1x1, a bare identity, a BatchNorm after the sum."""

    def __init__(self, inputs, outputs, stride, groups, *, se, form) -> None:
        super().__init__(inputs, outputs, stride, groups, se=se, form=form)
        if form == "train":
            self.keeps = self.rbr_identity is not None
            self.rbr_identity = nn.Identity() if self.keeps else None
            self.rbr_1x1 = nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)
            self.bn = nn.BatchNorm2d(outputs)

    def branches(self, x):
        return self.bn(super().branches(x))


class Official(nn.Module):
    """The authors' network: ``stage0`` is the stem, every second layer of the whole network may be grouped."""

    def __init__(self, block, depths, widths, *, groups=1, se=False, form="train", classes=7) -> None:
        super().__init__()
        channels, layer = min(64, widths[0]), 1
        self.stage0 = block(3, channels, 2, 1, se=se, form=form)
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = []
            for index in range(depth):
                own_groups = groups if layer % 2 == 0 else 1
                blocks.append(block(channels, width, 1 if index else 2, own_groups, se=se, form=form))
                channels, layer = width, layer + 1
            setattr(self, f"stage{number}", nn.ModuleList(blocks))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.stage0(x)
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            for block in stage:
                x = block(x)
        return self.linear(x.mean((2, 3)))


# Ours, theirs, and what both are built with.
CASES = {
    "repvgg": ("rb_repvgg_a0", RepVGGs, {}),
    "repvgg grouped": ("rb_repvgg_b1g2", RepVGGs, {"groups": 2}),
    "repvgg d2se": ("rb_repvgg_d2se", RepVGGs, {"se": True}),
    "qarepvgg": ("rb_repvgg_a0", QARepVGGs, {}),
    "qarepvgg grouped": ("rb_repvgg_b1g4", QARepVGGs, {"groups": 4}),
}
# Even depths but for the last, as in all grouped RepVGGs: then the second block of each stage is an even layer.
DEPTHS, WIDTHS = (2, 4, 2, 1), (32, 32, 48, 64)


def pair(case: str, form: str) -> tuple[Official, str, dict]:
    """Their network, calibrated where it trains, our source, and the arguments of our model."""
    name, block, options = CASES[case]
    torch.manual_seed(0)
    theirs = calibrate(Official(block, DEPTHS, WIDTHS, form=form, **options).double(), images())
    source = case.split()[0]
    ours = {"model": name, "num_classes": 7, "depths": DEPTHS, "widths": WIDTHS}
    return theirs, source, {**ours, "block": source} if source == "qarepvgg" else ours


def built(model: str, **arguments) -> nn.Module:
    return create_model(model, **arguments).double().eval()


@pytest.mark.parametrize("case", CASES)
@both_forms
def test_converted_official_weights_give_the_official_outputs(case, form):
    theirs, source, options = pair(case, form)
    ours = built(**options, form=form)
    ours.load_state_dict(convert(theirs.state_dict(), source=source, **options))
    verify(theirs, ours, images()).raise_if_different("the converted model")
    verify(theirs, deployed(ours), images()).raise_if_different("its deploy form")


@pytest.mark.parametrize("case", CASES)
@both_forms
def test_conversion_to_official_names_and_back_is_the_identity(case, form):
    theirs, source, options = pair(case, form)
    weights = theirs.state_dict()
    converted = convert(weights, source=source, **options)
    back = convert(converted, target=source, **options)
    assert back.keys() == weights.keys()
    assert all(back[key] is weights[key] for key in weights)


@pytest.mark.parametrize("case", CASES)
def test_our_collapsed_weights_run_in_the_official_deploy_form(case):
    theirs, source, options = pair(case, "train")
    ours = built(**options)
    ours.load_state_dict(convert(theirs.state_dict(), source=source, **options))
    collapsed, _, _ = pair(case, "deploy")
    collapsed.load_state_dict(convert(deployed(ours).state_dict(), target=source, **options))
    verify(theirs, collapsed, images()).raise_if_different("the official deploy form")


@pytest.mark.parametrize("name", ["rb_repvgg_b0", "rb_repvgg_b1g4", "rb_repvgg_d2se"])
@both_forms
def test_official_networks_of_the_published_sizes_have_all_our_names_and_shapes(name, form):
    depths, factors, options = {
        "rb_repvgg_b0": ((4, 6, 16, 1), (1, 1, 1, 2.5), {}),
        "rb_repvgg_b1g4": ((4, 6, 16, 1), (2, 2, 2, 4), {"groups": 4}),
        "rb_repvgg_d2se": ((8, 14, 24, 1), (2.5, 2.5, 2.5, 5), {"se": True}),
    }[name]
    widths = [int(base * factor) for base, factor in zip((64, 128, 256, 512), factors, strict=True)]
    with torch.device("meta"):
        theirs = Official(RepVGGs, depths, widths, form=form, classes=1000, **options).state_dict()
    converted = convert(theirs, model=name, source="repvgg")
    assert {id(tensor) for tensor in converted.values()} == {id(tensor) for tensor in theirs.values()}


@both_forms
def test_timms_and_the_authors_names_mean_the_same_weights(form):
    torch.manual_seed(0)
    timms = calibrate(timm.create_model("repvgg_a0", num_classes=7).double(), images())
    timms = timms if form == "train" else reparameterize_model(timms)
    options = {"model": "rb_repvgg_a0", "num_classes": 7}
    ours = convert(timms.state_dict(), source="timm", **options)
    theirs = Official(RepVGGs, (2, 4, 14, 1), (48, 96, 192, 1280), form=form).double().eval()
    theirs.load_state_dict(convert(ours, target="repvgg", **options))
    verify(timms, theirs, images()).raise_if_different("the official network")


@pytest.mark.parametrize("case", ["repvgg", "repvgg d2se", "qarepvgg"])
def test_the_source_is_told_by_the_weights(case):
    theirs, source, options = pair(case, "train")
    weights = theirs.state_dict()
    assert detect(weights, **options) == (options["model"], source)
    named = convert(weights, source=source, **options)
    assert {key: id(tensor) for key, tensor in convert(weights, **options).items()} == {
        key: id(tensor) for key, tensor in named.items()
    }


@pytest.mark.parametrize(
    ("name", "source", "form"),
    [
        ("rb_repvgg_a0", "timm", "train"),
        ("rb_repvgg_a1", "timm", "deploy"),
        ("rb_repvgg_a0", "repvgg", "train"),
        ("rb_repvgg_a1", "repvgg", "deploy"),
    ],
)
@pytest.mark.slow
def test_model_and_source_are_told_by_the_weights(name, source, form):
    widths = {"rb_repvgg_a0": (48, 96, 192, 1280), "rb_repvgg_a1": (64, 128, 256, 1280)}[name]
    with torch.device("meta"):
        if source == "timm":
            model = timm.create_model(name.removeprefix("rb_"))
            model = model if form == "train" else reparameterize_model(model)
        else:
            model = Official(RepVGGs, (2, 4, 14, 1), widths, form=form, classes=1000)
    assert detect(model.state_dict()) == (name, source)
    assert convert(model.state_dict()).keys() == create_model(name, form=form).state_dict().keys()


def test_weights_of_qarepvgg_are_not_taken_for_repvggs():
    theirs, _, options = pair("qarepvgg", "train")
    with pytest.raises(CheckpointError, match=r"keys are not keys of repvgg's counterpart .*rbr_1x1\.weight"):
        convert(theirs.state_dict(), source="repvgg", **options)
    plain = {key: value for key, value in options.items() if key != "block"}
    with pytest.raises(CheckpointError, match="these are not the weights of rb_repvgg_a0 in train form"):
        convert(theirs.state_dict(), source="qarepvgg", **plain)
