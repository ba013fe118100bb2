"""Layers that read something else than a batch of maps: tokens, single images, and lines of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repblocks.quantization import bias_corrected, range_report
from repblocks.quantization.layers import by_channel, with_rounded_weights
from repblocks.quantization.rounding import rounded_by_channel, sqnr_db
from repblocks.verification import TOLERANCES

EXACT = TOLERANCES[torch.float64]["block"]


class Tokens(nn.Module):
    """A linear layer on ``[N, H, W, C]``, whose positions all count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 7)

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).mean((1, 2))


class OneByOne(nn.Module):
    """A convolution that is given images ``[C, H, W]`` without a batch axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 7, 3, padding=1)

    def forward(self, x):
        return torch.stack([self.layer(image).mean((1, 2)) for image in x])


class Lines(nn.Module):
    """A convolution on ``[C, positions]``, as channel attention has it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(3, 7, 5, padding=2)

    def forward(self, x):
        return torch.stack([self.layer(image.flatten(1)).mean(1) for image in x])


MODELS = {"tokens": Tokens, "one by one": OneByOne, "lines": Lines}


def images():
    return torch.rand(4, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


def test_rounding_shifts_no_output_channel_of_the_corrected_model(model):
    """Each of these gives the mean over all positions of its only layer."""
    x = images()
    corrected, report = bias_corrected(model, x)
    with torch.no_grad():
        expected = model(x).mean(0)
        repaired, shifted = (with_rounded_weights(each)(x).mean(0) for each in (corrected, model))
    assert (repaired - expected).abs().max() < EXACT * expected.abs().max()
    assert (shifted - expected).abs().max() > 1e3 * EXACT * expected.abs().max()
    assert len(report.layers) == 1


def test_errors_are_those_of_all_positions(model):
    seen, given = range_report(model, images()).layers[0].activations, list[torch.Tensor]()
    model.layer.register_forward_hook(lambda layer, args, output: given.append(output))
    with torch.no_grad():
        model(images())
        exact = torch.cat([by_channel(model.layer, output) for output in given], 1)
        model.layer.weight.copy_(rounded_by_channel(model.layer.weight))
        given.clear()
        model(images())
        rounded = torch.cat([by_channel(model.layer, output) for output in given], 1)
    assert exact.shape == (7, 4 * 30)
    assert (seen.output_low, seen.output_high) == (exact.min().item(), exact.max().item())
    assert seen.output_sqnr_db == pytest.approx(sqnr_db(exact, rounded))
    shift = (rounded - exact).mean(1).abs().max() / exact.std(correction=0)
    assert seen.largest_shift == pytest.approx(shift.item())


def test_the_channels_of_an_output_are_its_last_axis_or_come_before_the_maps():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    assert by_channel(nn.Linear(1, 5), x).equal(x.flatten(0, 2).T)
    assert by_channel(nn.Conv2d(1, 3, 1), x).equal(x.transpose(0, 1).flatten(1))
    assert by_channel(nn.Conv2d(1, 2, 1), F.relu(x[:, 0])).equal(x[:, 0].flatten(1))
