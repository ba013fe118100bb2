"""Models to export, and ways to open what was written."""

import copy
import functools
import sys

import onnxruntime
import torch
from support import calibrate

from repblocks.models import create_model

EXPORTING = sys.modules["repblocks.export.exporting"]
ZOO = ["rb_repvgg_cifar", "rb_repnext_cifar"]


def trained(name="rb_repvgg_cifar"):
    return copy.deepcopy(_trained(name))


def small():
    """Four blocks: what takes long is tracing, layer by layer."""
    return copy.deepcopy(_trained("rb_repvgg_cifar", depths=(1, 1, 1), widths=(8, 12, 16)))


@functools.cache
def _trained(name, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 24, 16), "label_names": tuple("abcde")}
    return calibrate(model, pictures(8))


def pictures(count, *size):
    return torch.randn(count, 3, *(size or (24, 16)), generator=torch.Generator().manual_seed(1))


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def wrong(model, block):
    """A copy with one block slightly wrong."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.get_submodule(block).parameters():
            parameter.mul_(1.01)
    return changed
