import pytest
import torch
from support import calibrate
from timm.layers import DropPath
from torch import nn

from repblocks.blocks import deployed
from repblocks.errors import ConfigurationError
from repblocks.models import create_model
from repblocks.models.vgg_cifar import MaxPool
from repblocks.verification import verify


def skeleton(**arguments):
    with torch.device("meta"):
        return create_model("rb_vgg16_cifar", **arguments)


def plain_vgg(model: nn.Module) -> nn.Sequential:
    """The layers of a collapsed model written out as in the paper, with five max poolings and two linear layers."""
    layers = [model.stem.conv.conv, nn.ReLU()]
    for stage in model.stages:
        for name, layer in stage.named_children():
            layers += [nn.MaxPool2d(2)] if name == "downsample" else [layer.conv.conv, nn.ReLU()]
    hidden = model.head.neck[0]
    linear = nn.utils.skip_init(nn.Linear, hidden.in_channels, hidden.out_channels, dtype=hidden.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(hidden.weight.flatten(1))
        linear.bias.copy_(hidden.bias)
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), linear, nn.ReLU(), model.head.fc)


def test_thirteen_convolutions_with_the_papers_widths():
    convs = [m for m in skeleton().modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [m.out_channels for m in convs] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert all(m.stride == (1, 1) for m in convs)


@torch.no_grad()
def test_on_images_of_32_pixels_it_is_vgg_with_five_poolings():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = deployed(calibrate(create_model("rb_vgg16_cifar", widths=(8, 8, 16, 16, 16)).double(), images))
    torch.testing.assert_close(model(images), plain_vgg(model)(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", ["acb", "dbb", "repvgg"])
def test_other_blocks_collapse_exactly_into_the_same_network(block):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 64, dtype=torch.float64)
    thin = {"widths": (8, 8, 16, 16, 16), "depths": (1, 1, 2, 1, 1)}
    model = create_model("rb_vgg16_cifar", block=block, **thin).double()
    calibrate(model, images)
    collapsed = deployed(model)
    verify(model.eval(), collapsed, images).raise_if_different("the deploy form")
    plain = create_model("rb_vgg16_cifar", form="deploy", **thin)
    assert {k: v.shape for k, v in collapsed.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


def test_the_block_takes_the_place_of_every_convolution_of_the_body():
    model = skeleton(block="dbb")
    layers = [model.stem, *(layer for stage in model.stages for layer in stage if not isinstance(layer, MaxPool))]
    assert [type(layer.conv).__name__ for layer in layers] == ["DBBConv"] * 13


@pytest.mark.parametrize("dilation", [1, 2])
def test_pooling_without_stride_gives_the_strided_maxima_and_those_between(dilation):
    x = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    dense = MaxPool(stride=1, dilation=dilation)(x)
    assert dense.shape == x.shape
    if dilation == 1:
        torch.testing.assert_close(dense[..., ::2, ::2], MaxPool()(x), rtol=0, atol=0)
    assert torch.equal(dense[..., 0, 0], x[..., ::dilation, ::dilation][..., :2, :2].amax((-2, -1)))
    assert torch.equal(dense[..., -1, -1], x[..., -1, -1])


def test_stochastic_depth_needs_blocks_with_an_identity_branch():
    with pytest.raises(ConfigurationError, match="block='repvgg'"):
        skeleton(drop_path_rate=0.1)
    rates = [m.drop_prob for m in skeleton(block="repvgg", drop_path_rate=0.11).modules() if isinstance(m, DropPath)]
    # The first layer of three stages changes the number of channels, so nothing would remain of it.
    assert rates == pytest.approx([0.01 * i for i in (0, 2, 4, 5, 7, 8, 9, 10, 11) for _ in ("kxk", "pointwise")])
