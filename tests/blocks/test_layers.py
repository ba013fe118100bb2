import pytest
import torch
from support import randomise_batch_norms
from timm.layers import DropPath, LayerScale2d
from torch import nn
from torchvision.ops import StochasticDepth

import repblocks as rb
from repblocks.blocks.branches import conv, conv_bn, kernel_chain, serial
from repblocks.blocks.layers import (
    AlignedAvgPool2d,
    AlignedConv2d,
    BorderedNorm,
    Constant,
    FixedConv2d,
    Shift,
    Squeezed,
)
from repblocks.blocks.spec import ConvSpec
from repblocks.fusion import Sum


def image(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), **options)


def test_a_plain_convolution_is_built_where_one_can_express_it():
    spec = ConvSpec.of(4, 6, 3, stride=2, dilation=2, groups=2, padding_mode="reflect")
    assert type(conv(spec)) is nn.Conv2d
    assert type(conv(spec, (1, 3))) is nn.Conv2d
    assert type(conv(spec, (1, 1))) is AlignedConv2d


def test_a_strided_pointwise_branch_never_reaches_the_kernel_that_corrupts_memory():
    pointwise = conv(ConvSpec.of(3, 8, 3, stride=2), (1, 1)).double()
    plain = nn.Conv2d(3, 8, 1, stride=2, bias=False).double()
    plain.load_state_dict(pointwise.state_dict())
    x = image(2, 3, 9, 10, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    pointwise(x.to(memory_format=torch.channels_last)).square().sum().backward()
    plain(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    torch.testing.assert_close(pointwise.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("padding", [0, 1, 4, ((2, 0), (0, 3)), ((0, 4), (8, 0))], ids=str)
@pytest.mark.parametrize("kernel_size", [(1, 1), (1, 5), (3, 2)], ids=str)
def test_a_smaller_kernel_reads_the_centre_of_the_large_one(mode, padding, kernel_size):
    spec = ConvSpec.of(2, 2, 5, padding=padding, stride=(2, 1), dilation=(1, 2), padding_mode=mode)
    small, large = conv(spec, kernel_size).double(), conv(spec).double()
    rows, columns = ((5 - size) // 2 for size in kernel_size)
    with torch.no_grad():
        large.weight.zero_()
        large.weight[:, :, rows : rows + kernel_size[0], columns : columns + kernel_size[1]] = small.weight
    x = image(2, 2, 11, 14)
    torch.testing.assert_close(small(x), large(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rb.fold(small)(x), large(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [None, 0, ((1, 4), (0, 2))], ids=str)
@pytest.mark.parametrize(("kernel_size", "rows", "columns"), [((3, 3), 1, 0), ((2, 1), 2, 2)], ids=str)
def test_a_dilated_small_kernel_reads_every_other_tap_of_the_large_one(padding, kernel_size, rows, columns):
    spec = ConvSpec.of(2, 3, (7, 5), padding=padding, stride=(2, 1))
    small, norm = conv_bn(spec, kernel_size, dilation=(2, 2), eps=0.1).double()
    large = conv(spec).double()
    with torch.no_grad():
        large.weight.zero_()
        large.weight[:, :, rows::2, columns::2][:, :, : kernel_size[0], : kernel_size[1]] = small.weight
    x = image(3, 2, 11, 14)
    torch.testing.assert_close(small(x), large(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rb.fold(small)(x), large(x), rtol=1e-12, atol=1e-12)
    assert norm.eps == 0.1


def test_the_kernels_of_a_serial_branch_have_no_bias():
    assert all(layer.bias is None for layer in serial(ConvSpec.of(4, 6, 5, groups=2), (3, 3)))


def test_a_bordered_norm_without_a_border_is_the_norm():
    bordered, x = BorderedNorm(3, ((0, 0), (0, 0))).double(), image(4, 3, 5, 6)
    randomise_batch_norms(bordered, torch.Generator().manual_seed(0))
    assert torch.equal(bordered.eval()(x), bordered.norm(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_bordered_norm_pads_by_what_it_makes_of_zero(training):
    norm = BorderedNorm(3, ((1, 0), (0, 2))).double()
    randomise_batch_norms(norm, torch.Generator().manual_seed(0)).train(training)
    x = image(4, 3, 5, 6) + 2
    mean, variance = norm.norm.running_mean.clone(), norm.norm.running_var.clone()
    if training:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    zero = norm.norm.bias - norm.norm.weight * mean / torch.sqrt(variance + norm.norm.eps)
    y = norm(x)
    assert y.shape == (4, 3, 6, 8)
    for border in (y[:, :, 0], y[:, :, :, -1], y[:, :, :, -2]):
        torch.testing.assert_close(border, zero[:, None].expand_as(border))


def test_a_bordered_norm_without_running_statistics_follows_the_batch_in_eval_mode_too():
    layer, x = BorderedNorm(3, ((1, 0), (0, 2))).double(), image(4, 3, 5, 6) + 2
    layer.norm.running_mean = layer.norm.running_var = None
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=1e-12, atol=1e-12)


def test_a_bordered_norm_before_a_convolution_folds_into_a_padded_one():
    chain = nn.Sequential(BorderedNorm(3, ((1, 1), (2, 2))), nn.Conv2d(3, 5, 3)).double()
    randomise_batch_norms(chain, torch.Generator().manual_seed(0)).eval()
    x = image(2, 3, 7, 8)
    assert rb.fold(chain).padding == ((1, 1), (2, 2))
    torch.testing.assert_close(rb.fold(chain)(x), chain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("drop", [DropPath(0.3), StochasticDepth(0.3, "row")], ids=str)
def test_drop_path_folds_to_the_identity_in_eval_mode_only(drop):
    x = image(2, 3, 4, 5)
    chain = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), drop)
    torch.testing.assert_close(rb.fold(chain.eval())(x), chain(x))
    with pytest.raises(rb.FoldError, match="training mode"):
        rb.fold(chain.train())
    with pytest.raises(rb.FoldError, match="in_channels"):
        rb.fold(drop.eval())


@pytest.mark.parametrize("drop", [DropPath(0.0), StochasticDepth(0.0, "row")], ids=str)
def test_drop_path_that_drops_nothing_folds_in_training_mode(drop):
    assert torch.equal(rb.fold(drop.train(), 3).weight, torch.ones(3, 1))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"padding": -1}, "padding >= 0"),
        ({"stride": 0}, "positive"),
        ({"groups": 3}, "groups must divide"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of zeros"),
    ],
)
def test_geometry_that_is_no_convolution_is_refused(arguments, reason):
    with pytest.raises(rb.ConfigurationError, match=reason):
        ConvSpec.of(4, 4, 3, **arguments)


@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_an_average_reads_the_blocks_window(dilation, mode):
    spec = ConvSpec.of(3, 3, (3, 2), stride=2, dilation=dilation, padding=((1, 2), (0, 1)), padding_mode=mode)
    pool, x = AlignedAvgPool2d(spec), image(2, 3, 9, 10)
    padded = nn.functional.pad(x, (0, 1, 1, 2), "constant" if mode == "zeros" else mode)
    kernel = torch.full((3, 1, 3, 2), 1 / 6, dtype=torch.float64)
    expected = nn.functional.conv2d(padded, kernel, stride=2, dilation=dilation, groups=3)
    torch.testing.assert_close(pool(x), expected, rtol=1e-12, atol=1e-12)
    chain = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64, bias=False), pool)
    torch.testing.assert_close(rb.fold(chain)(x), chain(x), rtol=1e-12, atol=1e-12)


def test_fixed_filters_are_a_copy_of_those_given():
    given = torch.ones(4, 3, 3)
    layer = FixedConv2d(ConvSpec.of(4, 4, 3, groups=4), given)
    given.zero_()
    assert layer.weight.all()


def test_fixed_filters_are_saved_but_not_learned():
    filters = torch.tensor([[1.0, 2.0, 3.0]])
    layer = FixedConv2d(ConvSpec.of(4, 4, 3, groups=4), filters).double()
    assert not list(layer.parameters())
    assert torch.equal(layer.state_dict()["weight"][2, 0], filters.double())
    x = image(2, 4, 5, 6)
    kernel = filters.double().expand(4, 1, 1, 3)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, kernel, padding=(0, 1), groups=4))
    torch.testing.assert_close(rb.fold(layer)(x), layer(x))


@pytest.mark.parametrize(
    "layer", [Constant(-1 / 3), Shift(3), LayerScale2d(3, 0.7)], ids=lambda layer: type(layer).__name__
)
def test_scales_and_shifts_fold(layer):
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    chain, x = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), layer), image(2, 3, 4, 5)
    torch.testing.assert_close(rb.fold(chain)(x), chain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        Shift(3),
        LayerScale2d(3),
        Squeezed(nn.Conv2d(3, 2, 1)),
        BorderedNorm(3, ((1, 0), (0, 2))).eval(),
        AlignedConv2d(ConvSpec.of(3, 2, 5), (1, 1)),
        rb.RepVGGConv(3, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_tells_its_channels_to_those_that_do_not_know(layer):
    assert rb.fold(nn.Sequential(nn.Identity(), layer).eval()).in_channels == 3


def test_squeezed_branches_that_do_not_tell_their_channels_take_those_of_the_input():
    squeezed, x = Squeezed(Sum([nn.Identity(), nn.AvgPool2d(3, 1, 1)])), image(2, 3, 4, 5)
    expected = x + nn.functional.avg_pool2d(x, 3, 1, 1)
    torch.testing.assert_close(rb.fold(squeezed, 3)(x.float()), expected.float())
    torch.testing.assert_close(squeezed(x.float()), expected.float())


def test_squeezed_branches_may_not_depend_on_the_batch():
    squeezed = Squeezed(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(rb.FoldError, match="training mode"):
        squeezed(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (4, 5), (6, 1)], ids=str)
def test_a_chain_of_kernels_reaches_as_far_as_one(kernel_size):
    spec = ConvSpec.of(2, 5, kernel_size, stride=(2, 1), dilation=(1, 2), padding_mode="circular")
    chain, x = nn.Sequential(*kernel_chain(spec, 8)).double(), image(2, 2, 13, 14)
    value = rb.fold(chain)
    assert (value.kernel_size, value.stride, value.padding) == (spec.kernel_size, spec.stride, spec.padding)
    torch.testing.assert_close(value(x), chain(x), rtol=1e-12, atol=1e-12)
