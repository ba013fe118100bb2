import pytest
import torch
from support import randomise_batch_norms

import repblocks as rb


def random(block):
    return randomise_batch_norms(block.double(), torch.Generator().manual_seed(0)).eval()


def image(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 1}, {"stride": 1, "dilation": 2}, {"kernel_size": 3, "padding": 1}, {"padding": ((1, 0), (0, 2))}],
    ids=str,
)
def test_norm_then_convolution_folds_at_the_border_too(geometry):
    block = random(rb.BNConv(4, 6, **geometry))
    x = image(3, 4, 10, 12)
    torch.testing.assert_close(rb.deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_downsampling_halves_the_map_and_its_dilated_form_keeps_it():
    halving, dilated = random(rb.BNConv(4, 6)), random(rb.BNConv(4, 6, stride=1, dilation=1))
    dilated.load_state_dict(halving.state_dict())
    x = image(2, 4, 10, 12)
    assert halving(x).shape == (2, 6, 5, 6)
    assert dilated(x).shape == (2, 6, 10, 12)
    torch.testing.assert_close(dilated(x)[:, :, ::2, ::2], halving(x))
