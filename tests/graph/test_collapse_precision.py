"""Half precision, mixed precision and autocast survive a collapse."""

import pytest
import torch
from fusion.modules import prepared
from graph.checks import collapse_unbroken, count_operators, pictures
from graph.hazards import Parallel, Three
from graph.user_nets import YoloRepConv, conv_bn
from support import calibrate
from torch import nn

from repblocks.graph.collapse import collapse
from repblocks.verification import verify


class Mixed(nn.Module):
    """A body in one precision, a head in another, casts in between."""

    def __init__(self, body, head):
        super().__init__()
        self.stem, self.body = YoloRepConv(8, 8), prepared(Parallel()).to(body)
        self.inner, self.norm = nn.Conv2d(8, 8, 3, padding=1).to(body), nn.BatchNorm2d(8)
        self.point, self.head = nn.Conv2d(8, 8, 1), prepared(conv_bn(8, 4, 1)).to(head)

    def forward(self, x):
        x = self.stem(x)
        low = self.body(x.to(self.inner.weight.dtype))
        x = self.norm(self.inner(low).to(x.dtype)) + self.point(x)
        return self.head(x.to(self.head.conv.weight.dtype))


@pytest.mark.parametrize(("body", "head"), [(torch.float64, torch.float64), (torch.float32, torch.float64)])
def test_casts_and_layers_of_other_precision_are_respected(body, head):
    torch.manual_seed(0)
    model = Mixed(body, head)
    calibrate(model, pictures().float())
    x = pictures().float()
    result, _ = collapse(model, x)
    verify(model, result, x).raise_if_different("the collapsed model")
    assert result(x).dtype == head
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert all(tensor.dtype == dtypes.get(name, tensor.dtype) for name, tensor in result.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_collapses_within_its_rule(dtype):
    model = calibrate(nn.Sequential(YoloRepConv(8, 8), Parallel(), conv_bn(8, 4, 1)), pictures().float()).to(dtype)
    x = pictures(7).to(dtype)
    result, _ = collapse(model, x)
    verify(model, result, x).raise_if_different("the collapsed model")
    assert {parameter.dtype for parameter in result.parameters()} == {dtype}
    assert count_operators(result, x) == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_in_a_single_precision_model_stay_within_the_rule(dtype):
    torch.manual_seed(0)
    model = calibrate(Mixed(torch.float32, torch.float32), pictures().float())
    model.body.to(dtype)
    model.inner.to(dtype)
    x = pictures(7).float()
    verify(model, collapse(model, x).model, x).raise_if_different("the collapsed model")


class Autocast(Three):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        return self.bn(y.float()) + self.b(x)


def test_a_block_under_autocast_keeps_its_precision():
    model, x = prepared(Autocast()).float(), pictures().float()
    collapse_unbroken(model, x)


class FromBytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.linspace(0.4, 0.6, 8).view(1, 8, 1, 1), persistent=False)
        self.conv, self.bn = nn.Conv2d(8, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        x = (x.to(self.conv.weight.dtype) / 255 - self.mean) / 0.25
        return self.bn(self.conv(x)).argmax(1)


def test_images_of_bytes_are_normalised_by_the_merged_convolution():
    model = FromBytes().double().eval()
    model.conv.load_state_dict(prepared(nn.Conv2d(8, 4, 3, bias=False)).state_dict())
    images = torch.randint(0, 256, (3, 8, 13, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result, _ = collapse_unbroken(model, images)
    assert count_operators(result, images) == (1, 0)
