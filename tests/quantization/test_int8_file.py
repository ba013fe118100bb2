"""What the quantizer is told, read from the file that it wrote."""

import logging

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from repblocks.quantization.int8_file import write_int8


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 98 * 198, 3)).eval()


def input_scale(path):
    """The step in which the images are rounded."""
    proto = onnx.load(path)
    reader = next(node for node in proto.graph.node if "images" in node.input)
    assert reader.op_type == "QuantizeLinear"
    return next(numpy_helper.to_array(t).item() for t in proto.graph.initializer if t.name == reader.input[1])


def images(largest):
    x = torch.rand(1, 1, 100, 200, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[0, 0, 50, 60] = largest
    return x


@pytest.mark.parametrize("largest", [[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
def test_every_batch_counts_for_the_ranges(tmp_path, largest):
    write_int8(net(), [images(value) for value in largest], tmp_path / "model.onnx")
    assert input_scale(tmp_path / "model.onnx") == pytest.approx((3 + 1) / 255, rel=1e-2)


@pytest.mark.parametrize(("method", "span"), [("minmax", 1 + 100), ("percentile", 1 + 1)], ids=["minmax", "percentile"])
def test_a_percentile_leaves_out_a_pixel_in_twenty_thousand(tmp_path, method, span):
    """At ONNX Runtime's own percentile, 99.999, the pixel would count."""
    write_int8(net(), [images(100.0)], tmp_path / "model.onnx", method=method)
    assert input_scale(tmp_path / "model.onnx") == pytest.approx(span / 255, rel=0.06)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_nothing_is_printed_or_logged(tmp_path, method, caplog, capfd):
    caplog.set_level(logging.INFO)
    with_norm = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(198), nn.Conv2d(2, 2, 3)).eval()
    write_int8(with_norm, [images(1.0)], tmp_path / "model.onnx", method=method)
    assert logging.getLogger().level == logging.INFO
    assert [record for record in caplog.records if record.name == "root" and record.levelno > logging.INFO] == []
    assert capfd.readouterr() == ("", "")
