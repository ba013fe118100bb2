"""Models to save, and ways to change what a file says about them."""

import copy
import functools
import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import calibrate

from repblocks.blocks import deployed
from repblocks.models import create_model

ZOO = ["rb_repvgg_cifar", "rb_repnext_cifar"]


def trained(name="rb_repvgg_cifar", **kwargs):
    return copy.deepcopy(_trained(name, **kwargs))


@functools.cache
def _trained(name, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, **{"num_classes": 5, "in_chans": 2, **kwargs})
    return calibrate(model, images())


def images(dtype=torch.float32):
    return torch.randn(3, 2, 24, 20, generator=torch.Generator().manual_seed(1)).to(dtype)


def in_form(model, form):
    return model if form == "train" else deployed(model)


def header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["repblocks"])


def rewrite(path, without=(), **changes):
    """Change and remove entries of the header."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = {key: value for key, value in {**header(path), **changes}.items() if key not in without}
    save_file(weights, path, metadata={"repblocks": json.dumps(about)})
