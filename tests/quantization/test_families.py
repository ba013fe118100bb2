"""Every family of the zoo in int8, by its smallest network, cut to a block per stage where tracing takes long."""

import onnx
import pytest
import torch
from onnx import numpy_helper
from support import calibrate
from torch import nn

import repblocks as rb
from repblocks.models.registry import FAMILIES
from repblocks.quantization import quantize
from repblocks.quantization.layers import weighted_layers
from repblocks.quantization.rounding import rounded_by_channel

SHORT = {"depths": (1, 1, 1, 1)}
SMALLEST = {
    "rb_mobileone_s0": SHORT,
    "rb_repghostnet_050": {},
    "rb_repnext_cifar": {},
    "rb_repnextm_m1": SHORT,
    "rb_repvgg_cifar": {},
    "rb_repvit_m0_9": SHORT,
    "rb_resnet20_cifar": {},
    "rb_unireplknet_a": SHORT,
    "rb_vgg16_cifar": {},
}


def test_no_family_is_left_out():
    assert {FAMILIES[name] for name in SMALLEST} == {FAMILIES[name] for name in rb.list_models()}


def named(name):
    # a trace of 95 convolutions and as many pads and slices
    return pytest.param(name, marks=pytest.mark.slow) if name == "rb_repghostnet_050" else name


@pytest.mark.parametrize("name", [named(name) for name in SMALLEST])
def test_every_layer_of_a_family_is_stored_as_the_reports_round_it_and_nothing_else_is_lost(name, tmp_path):
    torch.manual_seed(0)
    model, images = rb.create_model(name, num_classes=6, **SMALLEST[name]), torch.randn(6, 3, 32, 32)
    report = quantize(calibrate(model, images), images, tmp_path)
    proto = onnx.load(report.path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    layers = weighted_layers(rb.deployed(model))
    for layer, module in layers.items():
        levels, scale = (torch.from_numpy(stored[f"{layer}.weight_{part}"].copy()) for part in ("quantized", "scale"))
        expected = rounded_by_channel(module.weight.detach())
        got = levels * scale.view(-1, *(1,) * (levels.ndim - 1))
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max(), layer
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Conv") == sum(isinstance(layer, nn.Conv2d) for layer in layers.values())
    assert "BatchNormalization" not in kinds
    assert report.output_sqnr_db > 5
