"""UniRepLKNet against a network written after the paper's description, with the authors' names of weights."""

import pytest
import torch
from models.unireplknet_reference import Reference, ReferenceBlock
from support import calibrate
from timm.layers import DropPath
from torch import Tensor, nn

import repblocks as rb
from repblocks.blocks import BranchConv, DilatedRepConv, deployed, form_of
from repblocks.blocks.layers import FixedConv2d, Shift
from repblocks.convert import convert, detect
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.models import create_model, list_models
from repblocks.models.layers import SqueezeExcite
from repblocks.models.unireplknet import ResponseNorm, UniRepLKNetBlock
from repblocks.verification import verify

# Parameters of training and deploy form, counted from the shapes of the authors' code; rounded, the deploy counts are
# the published ones (4.4M, 6.2M, 10.7M, 18.3M).
PARAMETERS = {
    "rb_unireplknet_a": (4_649_060, 4_437_300),
    "rb_unireplknet_f": (6_489_328, 6_235_216),
    "rb_unireplknet_p": (11_080_520, 10_741_704),
    "rb_unireplknet_n": (18_818_880, 18_318_560),
}
# Entries of the authors' state dicts in both forms.
ENTRIES = {"a": (626, 156), "f": (626, 156), "p": (626, 156), "n": (738, 178)}

SMALL = {"depths": (1, 2, 2, 1), "widths": (8, 16, 24, 32), "num_classes": 7}
FORMS = ["train", "deploy"]


@torch.no_grad()
def reference(form: str, **options) -> nn.Module:
    """With random values of everything, and in train form with statistics of images."""
    torch.manual_seed(0)
    model = Reference(form=form, **{**SMALL, **options}).double()
    for parameter in (model.norm.weight, model.norm.bias):
        parameter.uniform_(0.5, 1.5)
    return calibrate(model, images())


def images(*, seed: int = 1) -> Tensor:
    return torch.randn(3, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ours_with(weights, form: str, **options) -> nn.Module:
    model = create_model("rb_unireplknet_a", form=form, **{**SMALL, **options}).double()
    model.load_state_dict(convert(weights, model="rb_unireplknet_a", source="unireplknet", **{**SMALL, **options}))
    assert form_of(model) == form
    return model.eval()


def scale_of(norm: nn.BatchNorm2d) -> Tensor:
    return norm.weight / (norm.running_var + norm.eps).sqrt()


@torch.no_grad()
def collapsed(block: ReferenceBlock) -> dict[str, Tensor]:
    """What the authors' folding makes of a block, after its description, tap by tap."""
    mixer = block.dwconv
    if isinstance(mixer, nn.Conv2d):
        kernel, bias, name = mixer.weight, torch.zeros(len(mixer.weight), dtype=torch.float64), "dwconv"
    else:
        name, size = "dwconv.lk_origin", mixer.lk_origin.kernel_size[0]
        kernel = mixer.lk_origin.weight * scale_of(mixer.origin_bn)[:, None, None, None]
        bias = mixer.origin_bn.bias - mixer.origin_bn.running_mean * scale_of(mixer.origin_bn)
        for small, dilation in mixer.small:
            conv, norm = (mixer.get_submodule(f"dil_{part}_k{small}_{dilation}") for part in ("conv", "bn"))
            first = (size - 1 - dilation * (small - 1)) // 2
            for i in range(small):
                for j in range(small):
                    taps = conv.weight[:, 0, i, j] * scale_of(norm)
                    kernel[:, 0, first + dilation * i, first + dilation * j] += taps
            bias = bias + norm.bias - norm.running_mean * scale_of(norm)
    linear, last, scale = block.pwconv2[0].weight, block.pwconv2[2], scale_of(block.norm)
    shift = linear @ block.act[1].beta.flatten() - last.running_mean
    return {
        f"{name}.weight": kernel * scale[:, None, None, None],
        f"{name}.bias": block.norm.bias + (bias - block.norm.running_mean) * scale,
        "pwconv2.0.weight": (scale_of(last) * block.gamma)[:, None] * linear,
        "pwconv2.0.bias": (last.bias + shift * scale_of(last)) * block.gamma,
    }


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def blocks_of(model: nn.Module) -> list[UniRepLKNetBlock]:
    return [module for module in model.modules() if isinstance(module, UniRepLKNetBlock)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_both_forms_are_the_authors(name):
    with torch.device("meta"):
        counts = count(create_model(name)), count(create_model(name, form="deploy"))
    assert counts == PARAMETERS[name]


def test_table_covers_every_name():
    assert set(PARAMETERS) == set(list_models("rb_unireplknet_*"))


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_name_takes_the_weights_of_the_authors(name, form):
    with torch.device("meta"):
        ours = create_model(name, form=form)
        depths = [len(blocks_of(stage)) for stage in ours.stages]
        widths = [info["num_chs"] for info in ours.feature_info]
        theirs = Reference(depths, widths, 1000, form).state_dict()
    assert len(theirs) == ENTRIES[name[-1]][form == "deploy"]
    converted = convert(theirs, model=name, source="unireplknet")
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_outputs_equal_the_references(form):
    theirs = reference(form)
    ours = ours_with(theirs.state_dict(), form)
    verify(theirs, ours, images(seed=2)).raise_if_different("the converted model")


@pytest.mark.parametrize("kernel_sizes", [(5, 7, 9, 11), (3, 15, 17, 13)])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_equal_the_references_for_every_kernel_size(form, kernel_sizes):
    theirs = reference(form, kernel_sizes=kernel_sizes)
    ours = ours_with(theirs.state_dict(), form, kernel_sizes=kernel_sizes)
    verify(theirs, ours, images(seed=2)).raise_if_different("the converted model")


def test_collapsing_gives_the_authors_deploy_weights():
    theirs = reference("train")
    own = theirs.state_dict()
    ours = deployed(ours_with(own, "train"))
    names = Reference(**SMALL, form="deploy").state_dict()
    fused = {key: own[key] for key in names if key in own}
    for path, block in theirs.named_modules():
        if isinstance(block, ReferenceBlock):
            fused |= {f"{path}.{key}": tensor for key, tensor in collapsed(block).items()}
    assert fused.keys() == names.keys()
    expected = ours_with(fused, "deploy").state_dict()
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-11, atol=1e-13, msg=key)
    verify(theirs, ours, images(seed=2)).raise_if_different("the deploy form")


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_tell_their_repository(form):
    with torch.device("meta"):
        theirs = Reference((2, 2, 6, 2), (48, 96, 192, 384), 1000, form).state_dict()
    assert detect(theirs, model="rb_unireplknet_f") == ("rb_unireplknet_f", "unireplknet")


def test_weights_are_not_converted_back():
    with torch.device("meta"):
        ours = create_model("rb_unireplknet_a").state_dict()
    with pytest.raises(ConfigurationError, match="converted from unireplknet only"):
        convert(ours, model="rb_unireplknet_a", source="repblocks", target="unireplknet")


@pytest.mark.parametrize("form", FORMS)
def test_missing_weights_are_named(form):
    theirs = reference(form).state_dict()
    del theirs["stages.1.0.pwconv1.1.bias"]
    with pytest.raises(CheckpointError, match=r"stages.1.0.pointwise1.bias is missing"):
        convert(theirs, model="rb_unireplknet_a", source="unireplknet", **SMALL)


def test_only_large_kernels_have_small_ones_inside():
    with torch.device("meta"):
        model = create_model("rb_unireplknet_n")
    assert [len(stage) for stage in model.stages] == [2, 1 + 2, 1 + 8, 1 + 2]
    sizes = [{block.token_mixer.kernel_size for block in blocks_of(stage)} for stage in model.stages]
    assert sizes == [{(3, 3)}, {(13, 13)}, {(13, 13)}, {(13, 13)}]
    dilated = [len([m for m in stage.modules() if isinstance(m, DilatedRepConv)]) for stage in model.stages]
    assert dilated == [0, 2, 8, 2]


def test_every_block_gates_its_channels_behind_both_norms():
    with torch.device("meta"):
        model = create_model("rb_unireplknet_a")
    for block in blocks_of(model):
        assert isinstance(block.se, SqueezeExcite)
        assert block.se.fc1.out_channels == block.token_mixer.out_channels // 4
        assert isinstance(block.token_mixer.branches["kxk"][1], nn.BatchNorm2d)


@pytest.mark.parametrize(("output_stride", "dilations"), [(32, [1, 1, 1, 1]), (16, [1, 1, 1, 2]), (8, [1, 1, 2, 4])])
def test_dilated_stages_dilate_their_token_mixers(output_stride, dilations):
    with torch.device("meta"):
        model = create_model("rb_unireplknet_a", output_stride=output_stride)
    firsts = [1, *dilations[:-1]]
    for stage, dilation, first in zip(model.stages, dilations, firsts, strict=True):
        assert {block.token_mixer.dilation for block in blocks_of(stage)} == {(dilation, dilation)}
        convs = [stage.downsample[0]] if hasattr(stage, "downsample") else []
        assert all(conv.dilation == conv.padding == (first, first) for conv in convs)
    small = model.stages[3][1].token_mixer.branches["kxk"][0].branches["small7_2"][0]
    assert small.dilation == (2 * dilations[3], 2 * dilations[3])


def dense(convs, x: Tensor, step: int) -> Tensor:
    """A strided network's layer on every grid that it skips, put side by side: what dilation computes."""
    out = [[convs(x[:, :, i::step, j::step]) for j in range(step)] for i in range(step)]
    rows = [torch.stack(row, dim=-1).flatten(-2) for row in out]
    return torch.stack(rows, dim=-2).flatten(-3, -2)


def test_dilation_by_two_is_the_token_mixer_on_each_of_four_grids():
    block = UniRepLKNetBlock(8, 13, dilation=2).double()
    plain = UniRepLKNetBlock(8, 13).double()
    x = torch.randn(2, 8, 20, 28, dtype=torch.float64)
    calibrate(plain, x)
    block.load_state_dict(plain.state_dict())
    expected = dense(plain.token_mixer, x, 2)
    torch.testing.assert_close(block.eval().token_mixer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(deployed(block).token_mixer(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def randomise_responses(model: nn.Module) -> nn.Module:
    """What starts at 0 and that calibration leaves there."""
    for module in model.modules():
        if isinstance(module, ResponseNorm):
            module.weight.normal_()
        if isinstance(module, Shift):
            module.bias.normal_()
    return model


@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("layer_scale_init_value", [1e-6, 0.0])
def test_every_variant_collapses_exactly(output_stride, layer_scale_init_value):
    torch.manual_seed(0)
    options = {"output_stride": output_stride, "layer_scale_init_value": layer_scale_init_value}
    model = create_model("rb_unireplknet_a", drop_path_rate=0.2, **SMALL, **options).double()
    calibrate(randomise_responses(model), images())
    verify(model.eval(), deployed(model), images(seed=2)).raise_if_different("the deploy form")


def test_layer_scale_can_be_left_out():
    names = {key.rpartition(".")[2] for key in create_model("rb_unireplknet_a", **SMALL).state_dict()}
    without = create_model("rb_unireplknet_a", **SMALL, layer_scale_init_value=0.0).state_dict()
    assert "gamma" in names
    assert "gamma" not in {key.rpartition(".")[2] for key in without}


def test_stochastic_depth_grows_linearly_over_the_blocks_and_leaves_with_the_branches():
    with torch.device("meta"):
        model = create_model("rb_unireplknet_a", drop_path_rate=0.5, **SMALL)
        collapsed_model = create_model("rb_unireplknet_a", drop_path_rate=0.5, form="deploy", **SMALL)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert not any(isinstance(module, DropPath) for module in collapsed_model.modules())


def test_stochastic_depth_drops_the_whole_residual_branch():
    torch.manual_seed(0)
    block = UniRepLKNetBlock(8, 7, layer_scale=0.0, drop_path=0.5).train()
    x = torch.randn(32, 8, 5, 6)
    kept = (block(x) - x).abs().amax((1, 2, 3)) > 0
    assert 0 < kept.sum() < len(kept)


@pytest.mark.parametrize("block", ["largekernel", "plain", "dbb"])
def test_large_kernels_can_be_another_block(block):
    torch.manual_seed(0)
    model = create_model("rb_unireplknet_a", block=block, **SMALL).double()
    assert not any(isinstance(module, DilatedRepConv) for module in model.modules())
    assert isinstance(model.stages[3][1].token_mixer.branches["kxk"][0], rb.BLOCKS[block])
    assert not isinstance(model.stages[0][0].token_mixer.branches["kxk"][0], rb.BLOCKS[block])
    calibrate(randomise_responses(model), images())
    verify(model.eval(), deployed(model), images(seed=2)).raise_if_different("the deploy form")


def test_fixed_filters_of_a_block_are_not_drawn_anew():
    model = create_model("rb_unireplknet_a", block="edge", **SMALL)
    block = rb.BLOCKS["edge"](16, 16, 13, groups=16)
    for path in (name for name, module in block.named_modules() if isinstance(module, FixedConv2d)):
        drawn = model.stages[1][1].token_mixer.branches["kxk"][0].get_submodule(path)
        assert torch.equal(drawn.weight, block.get_submodule(path).weight)


def test_weights_start_as_the_authors_do():
    torch.manual_seed(0)
    model = create_model("rb_unireplknet_a")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is None or not module.bias.any()
    large = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000]
    assert all(0.018 < conv.weight.std() < 0.022 for conv in large)
    for block in blocks_of(model):
        scale = block.pointwise2.branches["pointwise"][3].gamma
        torch.testing.assert_close(scale, torch.full_like(scale, 1e-6))
    assert all(not block.response.weight.any() for block in blocks_of(model))


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = randomise_responses(create_model("rb_unireplknet_a", **SMALL).double())
    model(images()).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_response_norm_of_an_empty_map_has_a_gradient():
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    norm = ResponseNorm(4)
    (norm(x) + x).sum().backward()
    assert x.grad.isfinite().all()
    assert norm.weight.grad.isfinite().all()


def test_shift_folds_with_what_surrounds_it():
    torch.manual_seed(0)
    shift = Shift(4)
    nn.init.normal_(shift.bias)
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), shift, nn.Conv2d(4, 5, 1)).double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(rb.fold(chain)(x), chain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rb.fold(shift)(chain[0](x)), shift(chain[0](x)), rtol=1e-12, atol=1e-12)
    block = BranchConv([chain]).eval()
    torch.testing.assert_close(deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("feature_cls", ["list", "hook", "getter"])
@pytest.mark.parametrize("strides", [(1, 2, 2, 2), (2, 2, 2, 1)])
def test_feature_backbones_give_the_intermediates(form, feature_cls, strides):
    options = {**SMALL, "strides": strides, "form": form}
    plain = create_model("rb_unireplknet_a", **options).eval()
    backbone = create_model("rb_unireplknet_a", features_only=True, feature_cls=feature_cls, **options).eval()
    own = plain.state_dict()
    names = {key: key.removeprefix("model.").replace("stages_", "stages.") for key in backbone.state_dict()}
    backbone.load_state_dict({key: own[name] for key, name in names.items()})
    x = images().float()
    torch.testing.assert_close(backbone(x), plain.forward_intermediates(x, intermediates_only=True), rtol=0, atol=0)


@pytest.mark.parametrize("kernel_sizes", [(3, 13, 13), (3, 13, 12, 13)])
def test_kernel_sizes_are_odd_and_one_per_stage(kernel_sizes):
    with pytest.raises(ConfigurationError, match="give 4 odd ones"):
        create_model("rb_unireplknet_a", kernel_sizes=kernel_sizes)


def test_pooling_that_widens_the_map_is_refused():
    with pytest.raises(ConfigurationError, match="use avg, max or avgmax"):
        create_model("rb_unireplknet_a", global_pool="catavgmax")
