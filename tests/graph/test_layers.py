"""The layers that `collapse` writes where torch has none."""

import pytest
import torch
from torch import nn

import repblocks as rb
from repblocks.graph.layers import ScaleShift


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_channels_are_scaled_and_shifted_where_they_are(axis, bias):
    x, weight, shift = torch.randn(5, 5, 5, 5), torch.randn(5), torch.randn(5) if bias else None
    expected = x.movedim(axis, -1) * weight + (0 if shift is None else shift)
    torch.testing.assert_close(ScaleShift(weight, shift, axis)(x), expected.movedim(-1, axis))


def test_it_folds_where_convolutions_have_their_channels():
    x, layer = torch.randn(2, 5, 4, 3), ScaleShift(torch.randn(5), torch.randn(5))
    torch.testing.assert_close(rb.fold(layer).to_module()(x.flatten(2)[..., 0]), layer(x[..., 0, 0]))
    with pytest.raises(rb.FoldError, match="does not have its channels where convolutions have them"):
        rb.fold(nn.Sequential(ScaleShift(torch.randn(5), None, axis=2)))
