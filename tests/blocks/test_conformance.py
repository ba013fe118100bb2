"""What every linear block in BLOCKS must do, and any mixture; a new block is tested by being registered."""

import copy
import itertools

import pytest
import torch
from blocks.claims import BUILDERS, REFUSES, over, refused
from support import randomise_batch_norms
from torch import nn

import repblocks as rb
from repblocks.conformance import PROMISES, border_of, check_block, form_error
from repblocks.verification import TOLERANCES

GEOMETRIES = [
    {"stride": stride, "dilation": dilation, "groups": groups}
    for stride, dilation, groups in itertools.product((1, 2, (2, 1)), (1, 2), (1, 2, 6))
]
MODES = ["reflect", "replicate", "circular"]
every_block = pytest.mark.parametrize("name", sorted(BUILDERS))


def made(name, *args, dtype=torch.float64, **geometry):
    torch.manual_seed(0)
    block = BUILDERS[name](*args, **{"groups": 1, **geometry}).to(dtype)
    return randomise_batch_norms(block, torch.Generator().manual_seed(0)).eval()


def image(channels, *size, batch=3, dtype=torch.float64):
    return torch.randn(batch, channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_equal_in_deploy_form(block, x):
    error = form_error(block, x, torch.float64)
    assert error.border <= error.tolerance
    assert error.interior <= error.tolerance


@over([(6, 12, 3), (6, 6, 3)], GEOMETRIES)
def test_deploy_form_equals_train_form(name, shape, geometry):
    assert_equal_in_deploy_form(made(name, *shape, **geometry), image(6, 11, 14))


@over([(6, 6, kernel_size) for kernel_size in (1, 2, 4, 5, 7, (3, 1), (2, 5))], [{"dilation": (2, 1)}])
def test_deploy_form_equals_train_form_for_every_kernel_shape(name, shape, geometry):
    assert_equal_in_deploy_form(made(name, *shape, **geometry), image(6, 13, 10))


@over(
    [(4, 6, 3), (4, 4, 3)],
    [{"padding": p, "stride": s} for p in (0, 1, 3, (2, 0), ((1, 0), (0, 2))) for s in (1, 2)],
)
def test_deploy_form_equals_train_form_for_every_padding(name, shape, geometry):
    assert_equal_in_deploy_form(made(name, *shape, **geometry), image(4, 9, 12))


@over([(4, 4, 3)], [{"padding": p, "padding_mode": mode} for p in (None, 2) for mode in MODES])
def test_deploy_form_keeps_the_padding_mode(name, shape, geometry):
    block = made(name, *shape, **geometry)
    assert_equal_in_deploy_form(block, image(4, 9, 12))
    assert rb.deployed(block).conv.padding_mode == geometry["padding_mode"]


@pytest.mark.parametrize("name", sorted(REFUSES))
def test_what_a_block_does_not_take_is_refused_at_construction(name):
    shapes = [(6, 12, 3), (6, 6, 3), (6, 6, 1), (6, 6, (3, 1))]
    cases = [(shape, geometry) for shape in shapes for geometry in GEOMETRIES if refused(name, shape, geometry)]
    assert cases
    for shape, geometry in cases:
        with pytest.raises(rb.ConfigurationError, match=r"shape of the map|kernel_size of at least"):
            made(name, *shape, **geometry)


@every_block
def test_a_block_keeps_every_promise(name):
    report = check_block(BUILDERS[name](8, 8, 3, groups=2), image(8, 12, 9))
    assert [error.dtype for error in report.errors] == ["float64", "float32", "bfloat16", "float16"]
    report.raise_if_failed()


@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deploy_form_keeps_the_dtype(name, dtype):
    assert {parameter.dtype for parameter in rb.deployed(made(name, 8, 8, 3, dtype=dtype)).parameters()} == {dtype}


@every_block
def test_deploy_form_is_one_plain_convolution(name):
    block = made(name, 6, 6, 3)
    block.switch_to_deploy()
    assert [type(module) for module in block.children()] == [nn.Conv2d]
    assert set(block.state_dict()) == {"conv.weight", "conv.bias"}
    assert not list(block.buffers())


@over([(4, 6, 3), (6, 6, 3)], [{"stride": 2, "dilation": 2, "groups": 2}, {}])
def test_the_attributes_describe_the_collapsed_convolution(name, shape, geometry):
    block = made(name, *shape, **geometry)
    conv = rb.deployed(block).conv
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"):
        assert getattr(block, attribute) == getattr(conv, attribute)
    assert block.padding == tuple((p, p) for p in conv.padding)


@every_block
def test_a_fresh_block_can_be_deployed(name):
    block = BUILDERS[name](6, 6, 3, groups=1).double().eval()
    assert_equal_in_deploy_form(block, image(6, 9, 7))


@every_block
def test_fold_is_differentiable_down_to_every_parameter(name):
    block = made(name, 6, 6, 3)
    value = rb.fold(block)
    (value.weight.square().sum() + value.bias.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@every_block
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_state_dict_loads_into_a_new_block(name, form):
    block, other = made(name, 6, 6, 3), BUILDERS[name](6, 6, 3, groups=1).double().eval()
    if form == "deploy":
        block.switch_to_deploy()
        other.switch_to_deploy()
    other.load_state_dict(block.state_dict())
    x = image(6, 8, 9)
    assert torch.equal(other(x), block(x))


@over([(6, 6, 3), (3, 6, 3)], [{"stride": 1}, {"stride": 2}])
def test_training_on_channels_last_images_gives_the_same_gradients(name, shape, geometry):
    block, x = made(name, *shape, **geometry).train(), image(shape[0], 8, 9)
    gradients = []
    for given in (x, x.to(memory_format=torch.channels_last)):
        leaf = given.detach().requires_grad_()
        copy.deepcopy(block)(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@every_block
def test_torch_compile_gives_the_same_in_both_forms(name):
    block, x = made(name, 6, 6, 3), image(6, 8, 9)
    torch.compiler.reset()  # the blocks share their forward, and torch gives up on one that it compiled too often
    for form in (block, rb.deployed(block)):
        compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), form(x))


@every_block
def test_torch_export_gives_the_same_in_both_forms(name):
    block, x = made(name, 6, 6, 3), image(6, 8, 9)
    for form in (block, rb.deployed(block)):
        program = torch.export.export(form, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x[:2]), form(x[:2]))


@every_block
@pytest.mark.slow
def test_onnx_files_compute_the_same(name, tmp_path):
    block, x = made(name, 6, 6, 3, dtype=torch.float32), image(6, 8, 9, dtype=torch.float32)
    report = rb.export(nn.Sequential(block, nn.ReLU()), tmp_path, formats=("onnx",), inputs=x)
    assert report.equivalence["onnx"].passed
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["deploy.json", "model.onnx"]


@every_block
def test_the_representation_tells_channels_kernel_and_form(name):
    block = made(name, 6, 6, 3, groups=2)
    shown = repr(block).splitlines()
    assert type(block).__name__ in shown[0]
    assert "6, 6, kernel_size=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), groups=2, form=train" in shown[1]
    assert repr(rb.deployed(block)).splitlines()[1].strip() == "form=deploy"


@every_block
def test_groups_that_do_not_divide_the_channels_are_refused_at_construction(name):
    with pytest.raises(rb.ConfigurationError, match="groups must divide"):
        BUILDERS[name](6, 6, 3, groups=4)


def test_the_border_is_where_the_kernel_reads_padding():
    block = rb.ConvBN(1, 1, (3, 5), stride=(2, 1), padding=((1, 0), (2, 1)), dilation=(1, 1)).double()
    ones = torch.ones(1, 1, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        block.branches[0].weight.fill_(1)
        sums = block.branches[0](ones)
    assert torch.equal(border_of(block, (6, 8), sums), sums[0, 0] < 15)


def test_a_block_that_breaks_a_promise_is_told():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = rb.RepVGGConv(4, 4), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.conv(x) * (1.0 if self.conv.form == "train" else 1.001)

    report = check_block(Forgetful(), image(4, 6, 7))
    assert report.promises["gradients reach every parameter"] == "none for unused"
    assert "does not pickle" in report.promises["copies and pickles compute the same"]
    assert not report.errors[0].passed
    assert set(report.promises) == set(PROMISES)
    with pytest.raises(rb.VerificationError, match=r"(?s)Forgetful: does not conform.*FAIL float64.*none for unused"):
        report.raise_if_failed()


def test_a_block_in_deploy_form_cannot_be_checked_any_more():
    with pytest.raises(rb.VerificationError, match="before switch_to_deploy"):
        check_block(rb.deployed(rb.RepVGGConv(4, 4)), image(4, 6, 7))


def test_tolerances_are_those_of_the_one_table():
    error = form_error(made("repvgg", 4, 4, 3), image(4, 6, 7), torch.float32)
    assert error.tolerance == TOLERANCES[torch.float32]["block"]
