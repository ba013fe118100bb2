import pytest
import torch
from support import calibrate

from repblocks.blocks import RepNeXtBlock
from repblocks.blocks.base import deployed
from repblocks.models import create_model
from repblocks.verification import verify


def blocks_of(model) -> list[RepNeXtBlock]:
    return [module for module in model.modules() if isinstance(module, RepNeXtBlock)]


@pytest.mark.parametrize(
    ("name", "depths", "widths"),
    [
        ("rb_repnext_u3_tiny", (3, 3, 9, 3), (96, 192, 384, 768)),
        ("rb_repnext_u3_small", (3, 3, 27, 3), (96, 192, 384, 768)),
        ("rb_repnext_u3_base", (3, 3, 27, 3), (128, 256, 512, 1024)),
    ],
)
def test_layout_is_the_published_one(name, depths, widths):
    with torch.device("meta"):
        model = create_model(name)
        maps = model.forward_intermediates(torch.empty(1, 3, 64, 96), intermediates_only=True)
    assert [len(blocks_of(stage)) for stage in model.stages] == list(depths)
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 64 // r, 96 // r) for c, r in zip(widths, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(("output_stride", "dilations"), [(32, [1, 1, 1, 1]), (16, [1, 1, 1, 2]), (8, [1, 1, 2, 4])])
def test_dilated_stages_dilate_their_token_mixers(output_stride, dilations):
    with torch.device("meta"):
        model = create_model("rb_repnext_u3_tiny", output_stride=output_stride)
    for stage, dilation in zip(model.stages, dilations, strict=True):
        assert {block.token_mixer.dilation for block in blocks_of(stage)} == {(dilation, dilation)}


def test_stochastic_depth_grows_linearly_over_the_blocks():
    rates = [
        getattr(b.drop_path, "drop_prob", 0.0) for b in blocks_of(create_model("rb_repnext_cifar", drop_path_rate=0.5))
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("shortcut", ["absorb", "keep"])
@pytest.mark.parametrize("pointwise", ["conv", "linear"])
@pytest.mark.parametrize("output_stride", [32, 8])
def test_every_variant_collapses_exactly(shortcut, pointwise, output_stride):
    torch.manual_seed(0)
    options = {"shortcut": shortcut, "pointwise": pointwise, "output_stride": output_stride, "drop_path_rate": 0.2}
    model = create_model("rb_repnext_u3_tiny", depths=(1, 1, 2, 1), widths=(8, 12, 16, 24), **options).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    calibrate(model, images)
    verify(model.eval(), deployed(model), images).raise_if_different("the deploy form")


def test_model_for_small_images_is_small():
    model = create_model("rb_repnext_cifar")
    assert 200_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.stem(torch.randn(2, 3, 32, 32)).shape[2:] == (32, 32)
    assert len(model.stages) == 3
