"""The weights of RepNeXt-U3's repository, against a network in plain torch with its module names."""

import itertools

import pytest
import torch
from support import calibrate
from torch import nn

from repblocks.blocks import deployed
from repblocks.convert import convert, detect
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models import create_model
from repblocks.verification import verify

SMALL = {"depths": (1, 2, 2, 1), "widths": (6, 8, 12, 16), "num_classes": 7}
OPTIONS = {"model": "rb_repnext_u3_tiny", "source": "repnext", **SMALL}


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Unit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_repara = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.dwconv1 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.dwconv2 = nn.Conv2d(channels, channels, (1, 5), padding=(0, 2), groups=channels, bias=False)
        self.dwconv3 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), groups=channels, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(channels, eps=1e-6) for _ in range(3))

    def forward(self, x):
        return self.norm1(self.dwconv1(x)) + self.norm2(self.dwconv2(x)) + self.norm3(self.dwconv3(x))

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel and bias of the 7x7 that they collapse into."""
        kernel, bias = torch.zeros_like(self.dwconv1.weight), 0
        for conv, norm in ((self.dwconv1, self.norm1), (self.dwconv2, self.norm2), (self.dwconv3, self.norm3)):
            rows, columns = conv.kernel_size
            top, left = (7 - rows) // 2, (7 - columns) // 2
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel[:, :, top : top + rows, left : left + columns] += conv.weight * scale[:, None, None, None]
            bias = bias + norm.bias - norm.running_mean * scale
        return kernel, bias


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.feature = Unit(channels)
        self.pwconv1 = nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.GELU()
        self.pwconv2 = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x):
        return self.act(x) + self.pwconv2(self.act(self.pwconv1(self.feature(x))))

    def absorbed(self) -> nn.Sequential:
        """Their chain without a shortcut: carried and own channels alternate, the carried ones first.

        Only the first C of the 4C hidden channels alternate with carried ones; the others follow.
        """
        channels = self.pwconv1.in_channels
        kernel, bias = self.feature.merged()
        mixer = zeros(nn.Conv2d(channels, 2 * channels, 7, padding=3, groups=channels))
        mixer.weight[0::2, 0, 3, 3] = 1
        mixer.weight[1::2], mixer.bias[1::2] = kernel, bias
        carried = torch.arange(0, 2 * channels, 2)
        hidden = torch.cat([carried + 1, torch.arange(2 * channels, 5 * channels)])
        first = zeros(nn.Conv2d(2 * channels, 5 * channels, 1))
        first.weight[carried, carried] = 1
        first.weight[hidden[:, None], carried + 1] = self.pwconv1.weight
        first.bias[hidden] = self.pwconv1.bias
        last = zeros(nn.Conv2d(5 * channels, channels, 1))
        last.weight[torch.arange(channels), carried] = 1
        last.weight[:, hidden] = self.pwconv2.weight
        last.bias.copy_(self.pwconv2.bias)
        return nn.Sequential(mixer, first, self.act, last)


def zeros(conv: nn.Conv2d) -> nn.Conv2d:
    for parameter in conv.double().parameters():
        parameter.zero_()
    return conv


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = SMALL["widths"]
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4, bias=False), nn.BatchNorm2d(widths[0]))
        downs = [nn.Sequential(nn.BatchNorm2d(a), nn.Conv2d(a, b, 2, 2)) for a, b in itertools.pairwise(widths)]
        self.downsample_layers = nn.ModuleList([stem, *downs])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(depth)))
            for width, depth in zip(widths, SMALL["depths"], strict=True)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], SMALL["num_classes"]))

    def forward(self, x):
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(x)

    def collapsed(self) -> dict[str, torch.Tensor]:
        """The weights of their collapsed form."""
        weights = {key: tensor for key, tensor in self.state_dict().items() if key.startswith("head.")}
        for i, down in enumerate(self.downsample_layers):
            kernel, bias = fused(down)
            weights |= {f"downsample_layers.{i}.weight": kernel, f"downsample_layers.{i}.bias": bias}
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage):
                chain = block.absorbed().state_dict()
                weights |= {f"stages.{i}.{j}.block.{key}": tensor for key, tensor in chain.items()}
        return weights


def fused(down: nn.Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    norm = next(module for module in down if isinstance(module, nn.BatchNorm2d))
    conv = next(module for module in down if isinstance(module, nn.Conv2d))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    if norm is down[1]:
        return conv.weight * scale[:, None, None, None], shift
    return conv.weight * scale[:, None, None], conv.bias + (conv.weight * shift[:, None, None]).sum((1, 2, 3))


@pytest.fixture(scope="module")
def theirs() -> Network:
    torch.manual_seed(0)
    return calibrate(Network().double(), images()).eval()


@torch.no_grad()
@pytest.mark.parametrize("pointwise", ["conv", "linear"])
@pytest.mark.parametrize("shortcut", ["absorb", "keep"])
def test_their_training_weights_give_their_outputs(theirs, pointwise, shortcut):
    form = {"pointwise": pointwise, "shortcut": shortcut}
    ours = create_model("rb_repnext_u3_tiny", **SMALL, **form).double()
    ours.load_state_dict(convert(theirs.state_dict(), **OPTIONS, **form))
    verify(theirs, ours.eval(), images()).raise_if_different("the converted model")
    verify(theirs, deployed(ours), images()).raise_if_different("its deploy form")


@torch.no_grad()
def test_small_variances_give_their_outputs_too(theirs):
    """Their unit's BatchNorms have an epsilon of 1e-6, which counts where a channel hardly varies."""
    quiet = {
        key: tensor * 1e-5 if "norm1.running_var" in key else tensor for key, tensor in theirs.state_dict().items()
    }
    theirs_quiet = Network().double().eval()
    theirs_quiet.load_state_dict(quiet)
    ours = create_model("rb_repnext_u3_tiny", **SMALL).double()
    ours.load_state_dict(convert(quiet, **OPTIONS))
    verify(theirs_quiet, ours.eval(), images()).raise_if_different("the converted model")


@torch.no_grad()
@pytest.mark.parametrize("pointwise", ["conv", "linear"])
def test_their_collapsed_weights_give_their_outputs(theirs, pointwise):
    ours = create_model("rb_repnext_u3_tiny", form="deploy", pointwise=pointwise, **SMALL).double()
    ours.load_state_dict(convert(theirs.collapsed(), **OPTIONS, pointwise=pointwise))
    verify(theirs, ours.eval(), images()).raise_if_different("the converted model")


@torch.no_grad()
def test_linear_layers_in_their_pointwise_places_are_taken(theirs):
    flat = {key: t.flatten(1) if "pwconv" in key and t.ndim > 1 else t for key, t in theirs.state_dict().items()}
    converted, plain = (convert(weights, **OPTIONS) for weights in (flat, theirs.state_dict()))
    assert converted.keys() == plain.keys()
    assert all(torch.equal(converted[key], plain[key]) for key in plain)


@torch.no_grad()
def test_collapsed_weights_do_not_fit_a_model_that_keeps_its_shortcuts(theirs):
    with pytest.raises(CheckpointError, match=r"token_mixer.weight is \[12, 1, 7, 7\] instead of \[6, 1, 7, 7\]"):
        convert(theirs.collapsed(), **OPTIONS, shortcut="keep")


def test_a_unit_that_is_collapsed_by_itself_is_refused(theirs):
    weights = {key: t for key, t in theirs.state_dict().items() if "dwconv" not in key and ".feature.norm" not in key}
    with pytest.raises(CheckpointError, match=r"token_mixer.branches.0.0.weight is missing"):
        convert(weights, **OPTIONS)


def test_keys_of_their_other_unit_are_refused(theirs):
    with pytest.raises(CheckpointError, match=r"feature\.norm\.weight"):
        convert({**theirs.state_dict(), "stages.0.0.feature.norm.weight": torch.ones(6)}, **OPTIONS)


def test_there_is_no_way_back_and_the_reason_is_told():
    with pytest.raises(ConfigurationError, match="a convolution that it does not use"):
        convert({}, model="rb_repnext_u3_tiny", source="repblocks", target="repnext")


def test_the_repository_is_told_by_the_weights(theirs):
    assert detect(theirs.state_dict(), model="rb_repnext_u3_tiny", **SMALL) == ("rb_repnext_u3_tiny", "repnext")
