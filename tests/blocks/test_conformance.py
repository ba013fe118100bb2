"""What every linear block in BLOCKS must do; a new block is tested by being registered."""

import copy
import itertools
import pickle

import pytest
import torch
from support import randomise_batch_norms
from torch import nn

import repblocks as rb
from repblocks.verification import TOLERANCES

DOUBLE = TOLERANCES[torch.float64]["block"]
GEOMETRIES = [
    {"stride": stride, "dilation": dilation, "groups": groups}
    for stride, dilation, groups in itertools.product((1, 2, (2, 1)), (1, 2), (1, 2, 6))
]
every_block = pytest.mark.parametrize("name", sorted(rb.BLOCKS))


def made(name, *args, dtype=torch.float64, **geometry):
    block = rb.BLOCKS[name](*args, **{"groups": 1, **geometry}).to(dtype)
    return randomise_batch_norms(block, torch.Generator().manual_seed(0)).eval()


def image(channels, *size, batch=3, dtype=torch.float64):
    return torch.randn(batch, channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_equal_in_deploy_form(block, x, tolerance=DOUBLE):
    before = block(x)
    error = (rb.deployed(block)(x) - before).abs().max() / before.abs().max()
    assert error <= tolerance


@every_block
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_deploy_form_equals_train_form(name, geometry):
    assert_equal_in_deploy_form(made(name, 6, 12, 3, **geometry), image(6, 11, 14))


@every_block
@pytest.mark.parametrize("kernel_size", [1, 2, 4, 5, (3, 1), (2, 5)], ids=str)
def test_deploy_form_equals_train_form_for_every_kernel_shape(name, kernel_size):
    assert_equal_in_deploy_form(made(name, 6, 6, kernel_size, dilation=(2, 1)), image(6, 13, 10))


@every_block
@pytest.mark.parametrize("padding", [0, 1, 3, (2, 0), ((1, 0), (0, 2))], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_deploy_form_equals_train_form_for_every_padding(name, padding, stride):
    assert_equal_in_deploy_form(made(name, 4, 6, 3, padding=padding, stride=stride), image(4, 9, 12))


@every_block
@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [None, 2], ids=str)
def test_deploy_form_keeps_the_padding_mode(name, padding_mode, padding):
    block = made(name, 4, 4, 3, padding=padding, padding_mode=padding_mode)
    assert_equal_in_deploy_form(block, image(4, 9, 12))
    assert rb.deployed(block).conv.padding_mode == padding_mode


@every_block
def test_deploy_form_equals_train_form_in_float32(name):
    block = made(name, 8, 8, 3, dtype=torch.float32)
    assert_equal_in_deploy_form(block, image(8, 12, 9, dtype=torch.float32), TOLERANCES[torch.float32]["block"])


@every_block
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deploy_form_is_no_worse_than_twice_the_train_form_in_half_precision(name, dtype):
    block = made(name, 8, 8, 3, dtype=dtype)
    x = image(8, 12, 9, dtype=dtype)
    truth = copy.deepcopy(block).double()(x.double())
    collapsed = rb.deployed(block)
    assert {parameter.dtype for parameter in collapsed.parameters()} == {dtype}
    report = rb.verify(block, collapsed, x, scope="block")
    assert report.passed, (report, truth.abs().max())


@every_block
def test_switching_twice_is_switching_once(name):
    block = made(name, 6, 6, 3)
    block.switch_to_deploy()
    weights = copy.deepcopy(block.state_dict())
    block.switch_to_deploy()
    assert block.form == "deploy"
    assert all(torch.equal(weights[key], tensor) for key, tensor in block.state_dict().items())


@every_block
def test_deploy_form_is_one_plain_convolution(name):
    block = made(name, 6, 12, 3, stride=2)
    block.switch_to_deploy()
    assert [type(module) for module in block.children()] == [nn.Conv2d]
    assert set(block.state_dict()) == {"conv.weight", "conv.bias"}
    assert not list(block.buffers())


@every_block
def test_the_attributes_describe_the_collapsed_convolution(name):
    block = made(name, 4, 6, 3, stride=2, dilation=2, groups=2)
    conv = rb.deployed(block).conv
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"):
        assert getattr(block, attribute) == getattr(conv, attribute)
    assert block.padding == tuple((p, p) for p in conv.padding)


@every_block
def test_gradients_reach_every_parameter(name):
    block = made(name, 6, 6, 3).train()
    block(image(6, 9, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@every_block
def test_fold_is_differentiable_down_to_every_parameter(name):
    block = made(name, 6, 6, 3)
    value = rb.fold(block)
    (value.weight.square().sum() + value.bias.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@every_block
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_state_dict_round_trips(name, form):
    block, other = made(name, 6, 6, 3), rb.BLOCKS[name](6, 6, 3, groups=1).double().eval()
    if form == "deploy":
        block.switch_to_deploy()
        other.switch_to_deploy()
    other.load_state_dict(block.state_dict())
    x = image(6, 8, 9)
    assert torch.equal(other(x), block(x))


@every_block
def test_copies_and_pickles_compute_the_same(name):
    block, x = made(name, 6, 6, 3), image(6, 8, 9)
    for form in (block, rb.deployed(block)):
        for twin in (copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
            assert torch.equal(twin(x), form(x))


@every_block
def test_channels_last_images_give_the_same(name):
    block, x = made(name, 16, 16, 3, stride=2), image(16, 8, 9)
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), block(x))


@every_block
def test_torch_compile_gives_the_same_in_both_forms(name):
    block, x = made(name, 6, 6, 3), image(6, 8, 9)
    for form in (block, rb.deployed(block)):
        compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), form(x))


@every_block
def test_the_representation_tells_channels_kernel_and_form(name):
    shown = repr(made(name, 6, 12, 3, groups=2)).splitlines()
    assert type(made(name, 6, 12, 3)).__name__ in shown[0]
    assert "6, 12, kernel_size=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), groups=2, form=train" in shown[1]


@every_block
def test_groups_that_do_not_divide_the_channels_are_refused_at_construction(name):
    with pytest.raises(rb.ConfigurationError, match="groups must divide"):
        rb.BLOCKS[name](6, 6, 3, groups=4)
