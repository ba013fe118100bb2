import pytest
import torch
from support import calibrate
from timm.layers import DropPath
from torch import nn

from repblocks.blocks import ConvBN, deployed
from repblocks.models import create_model
from repblocks.models.resnet_cifar import ResidualBlock
from repblocks.verification import verify


def skeleton(name, **arguments):
    with torch.device("meta"):
        return create_model(name, **arguments)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# He et al. 2016, table 6: 0.27 and 0.85 million, of which two projections (option B) are 2,752.
@pytest.mark.parametrize(
    ("name", "millions", "layers"), [("rb_resnet20_cifar", 0.27, 20), ("rb_resnet56_cifar", 0.85, 56)]
)
def test_size_and_depth_are_the_papers(name, millions, layers):
    model = skeleton(name)
    assert round((count(model) - 2752) / 1e6, 2) == millions
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(spatial) + 1 == layers
    assert [m.out_channels for m in spatial[:: len(spatial) - 1]] == [16, 64]


def test_only_shortcuts_between_different_shapes_have_weights():
    model = skeleton("rb_resnet20_cifar", block="acb")
    projections = {name: m for name, m in model.named_modules() if name.endswith("shortcut") and isinstance(m, ConvBN)}
    assert {name: (m.kernel_size, m.stride) for name, m in projections.items()} == {
        "stages.1.0.shortcut": ((1, 1), (2, 2)),
        "stages.2.0.shortcut": ((1, 1), (2, 2)),
    }


def test_the_block_takes_the_place_of_every_3x3_layer():
    model = skeleton("rb_resnet20_cifar", block="acb")
    kinds = [type(block.conv1.conv).__name__ for block in model.modules() if isinstance(block, ResidualBlock)]
    kinds += [type(block.conv2).__name__ for block in model.modules() if isinstance(block, ResidualBlock)]
    assert set(kinds) == {"ACConv"} == {type(model.stem.conv).__name__}
    assert len(kinds) == 18


def test_whatever_it_was_trained_with_the_deploy_form_is_the_same_network():
    shapes = [
        {key: value.shape for key, value in deployed(skeleton("rb_resnet20_cifar", block=block)).state_dict().items()}
        for block in ("plain", "acb", "dbb", "repvgg")
    ]
    assert all(other == shapes[0] for other in shapes[1:])


def test_block_adds_its_shortcut_before_the_last_activation():
    torch.manual_seed(0)
    block = ResidualBlock(4, 4).double().eval()
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    inner = block.conv2(torch.relu(block.conv1.conv(x)))
    torch.testing.assert_close(block(x), torch.relu(x + inner), rtol=0, atol=0)


def test_drop_path_leaves_the_shortcut_and_is_gone_from_the_deploy_form():
    torch.manual_seed(0)
    block = ResidualBlock(4, 4, drop_path=1 - 1e-12)
    x = torch.randn(3, 4, 5, 7)
    torch.testing.assert_close(block(x), torch.relu(x))
    model = create_model("rb_resnet20_cifar", drop_path_rate=0.4)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx(
        [0.4 * i / 8 for i in range(9)]
    )
    assert not [m for m in deployed(model).modules() if isinstance(m, DropPath)]


@pytest.mark.parametrize("block", ["acb", "dbb", "repvgg"])
def test_other_blocks_collapse_exactly(block):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 48, dtype=torch.float64)
    model = create_model("rb_resnet20_cifar", block=block, depths=(1, 2, 1), drop_path_rate=0.2).double()
    calibrate(model, images)
    verify(model.eval(), deployed(model), images).raise_if_different("the deploy form")


@pytest.mark.parametrize("block", ["plain", "repvgg"])
def test_dilation_changes_no_weight(block):
    options = {"block": block, "widths": (16, 16, 16), "strides": (1, 2, 2)}
    plain = skeleton("rb_resnet20_cifar", stem_stride=4, **options)
    dilated = skeleton("rb_resnet20_cifar", stem_stride=4, output_stride=8, **options)
    assert dict(dilated.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert dilated.stages[2][0].conv2.dilation == (2, 2)
    images = torch.empty(2, 3, 32, 64, device="meta")
    assert [model.forward_features(images).shape[2:] for model in (plain, dilated)] == [(2, 4), (4, 8)]
