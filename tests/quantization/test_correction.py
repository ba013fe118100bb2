import json

import pytest
import torch
from support import calibrate
from torch import nn

import repblocks as rb
from repblocks.errors import ConfigurationError, DataError
from repblocks.quantization import bias_corrected, equalized
from repblocks.quantization.layers import with_rounded_weights
from repblocks.verification import TOLERANCES

EXACT = TOLERANCES[torch.float64]["block"]


def images(count=6, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, 7, 9, dtype=torch.float64, generator=generator) + 0.5


def model():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 3 * 4, 5),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net.double().eval()


def test_rounding_the_weights_shifts_no_layer_of_the_corrected_model_on_the_images():
    net, x = model(), images()
    corrected, _ = bias_corrected(net, x)
    shifted = with_rounded_weights(net)
    repaired = with_rounded_weights(corrected)
    with torch.no_grad():
        for at in (0, 2, 5):
            read, axes = net[:at](x), (0,) if at == 5 else (0, 2, 3)
            exact = net[at](read).mean(axes)
            assert (repaired[at](read).mean(axes) - exact).abs().max() < EXACT * exact.abs().max()
            assert (shifted[at](read).mean(axes) - exact).abs().max() > 1e3 * EXACT * exact.abs().max()


def test_only_biases_change_and_only_in_the_copy():
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    corrected, _ = bias_corrected(net, images())
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())
    for key, value in corrected.state_dict().items():
        assert value.equal(before[key]) == key.endswith("weight"), key


def test_the_report_says_how_far_the_float_function_moved_and_what_int8_gains():
    net, x = model(), images()
    corrected, report = bias_corrected(net, x)
    with torch.no_grad():
        expected = net(x)
        moved = (corrected(x) - expected).norm() / expected.norm()
        before = (with_rounded_weights(net)(x) - expected).norm() / expected.norm()
    assert report.float_change == pytest.approx(moved.item())
    assert report.error_before == pytest.approx(before.item())
    assert 0 < report.error_after < report.error_before
    assert [layer.name for layer in report.layers] == ["0", "2", "5"]
    assert report.images == 6
    assert json.loads(json.dumps(report.to_dict()))["images"] == 6


def test_batches_of_any_size_and_labelled_ones_give_what_all_images_together_give():
    net, x = model(), images()
    expected = bias_corrected(net, x).model.state_dict()
    for batches in ([x[:1], x[1:]], [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))]):
        found = bias_corrected(net, batches).model.state_dict()
        assert all(value.allclose(expected[key], rtol=1e-12) for key, value in found.items())


def test_layers_without_a_bias_are_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)).double().eval()
    report = bias_corrected(net, images()).report
    assert report.without_bias == ["0"]
    assert [layer.name for layer in report.layers] == ["2"]
    assert "0: has no bias" in str(report)


def test_a_trained_like_repvgg_is_corrected_in_its_deploy_form():
    net = rb.create_model("rb_repvgg_cifar", num_classes=5)
    x = images().float()
    calibrate(net, x)
    corrected, report = bias_corrected(net, x)
    assert rb.form_of(net) == "train"
    assert rb.form_of(corrected) == "deploy"
    assert report.error_after < report.error_before


def test_a_model_that_returns_several_tensors_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x), x

    with pytest.raises(ConfigurationError, match="returns a tuple"):
        bias_corrected(Two().eval(), images().float())


def test_without_images_there_is_nothing_to_correct_by():
    with pytest.raises(DataError, match="0 sizes"):
        bias_corrected(model(), [])


def test_a_bias_that_two_layers_share_stays():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)).double().eval()
    net[2].bias = net[0].bias
    corrected, report = bias_corrected(net, images())
    assert report.without_bias == ["0", "2"]
    assert report.layers == []
    assert corrected[0].bias.equal(net[0].bias)
    assert report.error_after == report.error_before > 0


def test_a_layer_that_is_called_twice_is_corrected_by_both():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    net, x = nn.Sequential(conv, nn.ReLU(), conv).double().eval(), images()
    corrected, _ = bias_corrected(net, x)
    with torch.no_grad():
        read = torch.cat([x, net[:2](x)])
        exact, repaired = (layer(read).mean((0, 2, 3)) for layer in (conv, with_rounded_weights(corrected)[0]))
    assert (repaired - exact).abs().max() < EXACT * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_where_corrections_are_not_rounded_away(dtype):
    net = model().to(dtype)
    copies = [bias_corrected(net, images()).model, equalized(net).model]
    assert {parameter.dtype for copy in copies for parameter in copy.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}
