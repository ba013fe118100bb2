"""What is built alike folds alike, so without numbers it is folded once."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from blocks.claims import BUILDERS
from timm.layers import LayerScale2d
from torch import nn

import repblocks as rb
from repblocks.fusion.containers import Sum
from repblocks.fusion.fold import Fold, fold
from repblocks.fusion.structure import meta_structure


@dataclass
class Spec:
    sizes: list[int]


def chain(channels=4, *, bias=False, eps=1e-5, **geometry):
    with torch.device("meta"):
        conv = nn.Conv2d(channels, 6, 3, bias=bias, **geometry)
        return nn.Sequential(conv, nn.BatchNorm2d(6, eps)).eval()


def with_attribute(value):
    module = chain()
    module.note = value
    return module


def hooked():
    module = chain()
    module[0].register_forward_hook(lambda *_: None)
    return module


def replaced():
    module = chain()
    module[0].forward = lambda x: x
    return module


@pytest.mark.parametrize("value", [1, "a", None, (1, (2.5, "b")), [1, 2], torch.float32, Spec([1, 2])], ids=str)
def test_modules_that_are_built_alike_have_one_structure(value):
    assert meta_structure(with_attribute(value)) == meta_structure(with_attribute(value)) is not None


OTHERS = {
    "channels": lambda: chain(8),
    "bias": lambda: chain(bias=True),
    "geometry": lambda: chain(padding=1),
    "padding mode": lambda: chain(padding_mode="reflect"),
    "epsilon": lambda: chain(eps=1e-3),
    "mode": lambda: chain().train(),
    "dtype": lambda: chain().double(),
    "frozen": lambda: chain().requires_grad_(requires_grad=False),
    "class": lambda: Sum(list(chain())).eval(),
    "names": lambda: nn.Sequential(OrderedDict(zip("ab", chain(), strict=True))).eval(),
    "nesting": lambda: nn.Sequential(*[nn.Sequential(child) for child in chain()]).eval(),
    "attribute": lambda: with_attribute(1),
    "nested attribute": lambda: with_attribute(Spec([1, 3])),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_every_difference_counts(other):
    assert meta_structure(other()) != meta_structure(chain()) is not None
    assert meta_structure(other()) == meta_structure(other()) is not None


def test_the_shapes_of_tensors_count_where_no_attribute_tells_them():
    with torch.device("meta"):
        assert meta_structure(LayerScale2d(3)) != meta_structure(LayerScale2d(4)) is not None


class Tagged(nn.Parameter):
    """May compute anything."""


def tagged():
    module = chain()
    module[0].weight = Tagged(module[0].weight.detach())
    return module


UNKNOWN = {
    "a tensor of another class": tagged,
    "numbers": lambda: nn.Conv2d(3, 4, 3),
    "some numbers": lambda: nn.Sequential(*chain(), nn.BatchNorm2d(6)),
    "no tensors": nn.Identity,
    "a hook": hooked,
    "a forward of its own": replaced,
    "an object": lambda: with_attribute(object()),
    "a function": lambda: with_attribute(len),
    "a tensor": lambda: with_attribute(torch.ones(2)),
    "a dict": lambda: with_attribute({"a": 1}),
    "a nested object": lambda: with_attribute((1, Spec([object()]))),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_compared_has_no_structure(make):
    assert meta_structure(make()) is None


def test_alike_modules_share_their_value_on_the_meta_device_only():
    assert fold(chain()) is fold(chain())
    assert fold(chain()) is not fold(chain(eps=1e-3))
    live = nn.Conv2d(3, 4, 3)
    assert fold(live).weight is live.weight


def test_a_value_that_is_remembered_keeps_no_graph_alive():
    assert fold(chain()).weight.grad_fn is None
    assert fold(chain()).bias.grad_fn is None


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_block_of_the_zoo_has_a_structure(name):
    with torch.device("meta"):
        blocks = [BUILDERS[name](8, 8, 3).eval() for _ in range(2)]
    assert meta_structure(blocks[0]) == meta_structure(blocks[1]) is not None


def test_the_channels_of_the_input_count():
    with torch.device("meta"):
        branches = [Sum([nn.AvgPool2d(1), nn.BatchNorm2d(4)]).eval() for _ in range(2)]
    assert fold(branches[0], 4) is fold(branches[1], 4)
    assert fold(branches[0]) is not fold(branches[1], 4)


def test_a_new_rule_holds_for_structures_that_were_seen_before():
    class Doubled(nn.Conv2d):
        pass

    with torch.device("meta"):
        doubled = Doubled(3, 4, 3)
    folds = Fold()
    folds.register(nn.Conv2d)(lambda module, in_channels: rb.AffineConv.from_module(module))
    assert folds(doubled).weight.shape == (4, 3, 3, 3)
    folds.register(Doubled)(lambda module, in_channels: rb.AffineConv(weight=module.weight[:2]))
    assert folds(doubled).weight.shape == (2, 3, 3, 3)


def test_what_does_not_fold_raises_every_time():
    for _ in range(2):
        with pytest.raises(rb.FoldError, match="training mode"):
            fold(chain().train())


def test_only_so_many_values_are_remembered(monkeypatch):
    monkeypatch.setattr(Fold, "most_meta_values", 2)
    folds = Fold()
    folds.register(nn.Conv2d)(lambda module, in_channels: rb.AffineConv.from_module(module))
    with torch.device("meta"):
        convs = [nn.Conv2d(3, channels, 1) for channels in (1, 2, 3, 4, 5)]
    assert [folds(conv).out_channels for conv in convs] == [1, 2, 3, 4, 5]
    assert len(folds._on_meta) <= 2
