import pytest
import timm
import torch
from support import calibrate
from timm.layers import DropPath
from timm.models import reparameterize_model
from torch import nn

from repblocks.blocks import RepVGGBlock, deployed
from repblocks.errors import ConfigurationError
from repblocks.models import create_model, list_models
from repblocks.models.layers import SqueezeExcite
from repblocks.verification import verify

# Parameters of training and deploy form, the same as timm's model without the prefix.
PARAMETERS = {
    "rb_repvgg_a0": (9_108_968, 8_309_384),
    "rb_repvgg_a1": (14_092_264, 12_789_864),
    "rb_repvgg_a2": (28_210_600, 25_499_944),
    "rb_repvgg_b0": (15_817_960, 14_339_048),
    "rb_repvgg_b1": (57_415_016, 51_829_480),
    "rb_repvgg_b1g4": (39_966_056, 36_125_416),
    "rb_repvgg_b2": (89_022_376, 80_315_112),
    "rb_repvgg_b2g4": (61_758_376, 55_777_512),
    "rb_repvgg_b3": (123_085_288, 110_960_872),
    "rb_repvgg_b3g4": (83_825_128, 75_626_728),
    "rb_repvgg_d2se": (133_334_836, 120_387_572),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_both_forms_equal_timms(name):
    with torch.device("meta"):
        ours = count(create_model(name)), count(create_model(name, form="deploy"))
        timms = timm.create_model(name.removeprefix("rb_")).eval()
        theirs = count(timms), count(reparameterize_model(timms))
    assert ours == theirs == PARAMETERS[name]


def test_table_covers_every_name_that_timm_has_too():
    assert set(PARAMETERS) == {name for name in list_models("rb_repvgg_*") if timm.is_model(name.removeprefix("rb_"))}


@pytest.mark.parametrize("name", ["rb_repvgg_b1g2", "rb_repvgg_b2g2", "rb_repvgg_b3g4"])
def test_every_second_block_of_a_stage_is_grouped(name):
    groups = int(name[-1])
    with torch.device("meta"):
        model = create_model(name)
    for stage in model.stages:
        assert [block.conv.groups for block in stage] == [groups if i % 2 else 1 for i in range(len(stage))]


def test_model_for_small_images_is_small():
    model = create_model("rb_repvgg_cifar")
    assert 200_000 < count(model) < 1_000_000
    assert model.stem(torch.randn(2, 3, 32, 32)).shape[2:] == (32, 32)
    assert len(model.stages) == 3


def test_squeeze_excitation_weighs_the_sum_before_the_activation():
    with torch.device("meta"):
        model = create_model("rb_repvgg_d2se")
    blocks = [module for module in model.modules() if isinstance(module, RepVGGBlock)]
    assert len(blocks) == 1 + 8 + 14 + 24 + 1
    assert all(isinstance(block.se, SqueezeExcite) for block in blocks)
    assert model.stages[0][0].se.fc1.out_channels == 10


@pytest.mark.parametrize("block", ["repvgg", "acb"])
def test_block_family_can_be_swapped(block):
    model = create_model("rb_repvgg_cifar", block=block)
    kinds = {type(module.conv).__name__ for module in model.modules() if isinstance(module, RepVGGBlock)}
    assert kinds == {{"repvgg": "RepVGGConv", "acb": "ACConv"}[block]}


def test_stochastic_depth_drops_convolutions_beside_an_identity():
    model = create_model("rb_repvgg_cifar", drop_path_rate=0.6)
    rates = {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert {name.split(".conv.")[0]: rate for name, rate in rates.items()} == pytest.approx(
        {"stages.0.1": 0.1, "stages.1.1": 0.3, "stages.1.2": 0.4, "stages.2.1": 0.6}
    )
    assert {name.split(".branches.")[1] for name in rates} == {"kxk.2", "pointwise.2"}
    assert model.state_dict().keys() == create_model("rb_repvgg_cifar").state_dict().keys()


def test_collapse_ignores_stochastic_depth():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    model = calibrate(create_model("rb_repvgg_cifar", drop_path_rate=0.6).double(), images)
    verify(model.eval(), deployed(model), images).raise_if_different("the deploy form")


def test_stochastic_depth_without_any_identity_branch_is_refused():
    with pytest.raises(ConfigurationError, match="drop_path_rate=0"):
        create_model("rb_repvgg_cifar", block="acb", drop_path_rate=0.1)


@pytest.mark.parametrize("block", ["repvgg", "qarepvgg"])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilation_adds_no_identity_where_a_stride_was(block, output_stride):
    options = {"block": block, "widths": (16, 16, 16, 16), "depths": (1, 2, 2, 1)}
    plain = create_model("rb_repvgg_a0", **options)
    dilated = create_model("rb_repvgg_a0", **options, output_stride=output_stride)
    assert dict(dilated.named_modules()).keys() == dict(plain.named_modules()).keys()
