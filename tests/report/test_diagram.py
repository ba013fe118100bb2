"""A block's picture shows what is in the block, in the order of the data."""

from dataclasses import replace
from typing import Any

import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch, Rectangle

from repblocks.report.anatomy import Anatomy, Branch
from repblocks.report.facts import Facts
from repblocks.report.figures.diagram import APART, draw_block
from repblocks.report.figures.style import LIGHT

FORM = Anatomy(
    before=("3x3 conv",),
    branches=(
        Branch(name="a", layers=("1x1 conv", "BatchNorm", "5x5 conv")),
        Branch(name="b", layers=()),
        Branch(name="c", layers=("average", "BatchNorm")),
    ),
    after=("BatchNorm", "scale"),
    joined="+",
)


def drawn(facts: Facts, form: Anatomy = FORM) -> Any:
    (axes,) = draw_block(replace(facts.blocks[0], anatomy=form, result=("7x7 conv", "ReLU")), LIGHT).axes
    return axes


def words_at(axes: Any, x: float) -> list[str]:
    """From top to bottom."""
    texts = [text for text in axes.texts if text.get_text() and text.get_position()[0] == pytest.approx(x)]
    return [text.get_text() for text in sorted(texts, key=lambda text: -text.get_position()[1])]


def boxes(axes: Any) -> list[FancyBboxPatch]:
    return [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]


def test_layers_stand_in_their_branch_in_the_order_of_the_data(facts: Facts) -> None:
    axes = drawn(facts)
    assert words_at(axes, 0.5 * APART) == ["1x1 conv", "BatchNorm", "5x5 conv"]
    assert words_at(axes, 2.5 * APART) == ["average", "BatchNorm"]
    assert words_at(axes, 1.5 * APART) == ["train form", "3x3 conv", "+", "BatchNorm", "scale"]
    assert "identity" in [text.get_text() for text in axes.texts]


def test_both_forms_have_a_box_for_each_layer_and_one_where_branches_join(facts: Facts) -> None:
    layers = 1 + 3 + 2 + 2
    assert len(boxes(drawn(facts))) == layers + len(("7x7 conv", "ReLU")) + 1
    alone = replace(FORM, branches=FORM.branches[:1])
    assert len(boxes(drawn(facts, alone))) == 1 + 3 + 2 + 2


def test_nothing_stands_outside_of_the_picture_or_upon_another_box(facts: Facts) -> None:
    axes = drawn(facts)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    places = [patch.get_bbox() for patch in boxes(axes)]
    assert all(left <= at.x0 < at.x1 <= right and low <= at.y0 < at.y1 <= high for at in places)
    assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])


def test_norms_and_convolutions_differ_in_colour(facts: Facts) -> None:
    edges = [
        patch.get_edgecolor()
        for patch in boxes(drawn(facts, replace(FORM, before=(), after=(), branches=FORM.branches[:1])))
    ]
    assert edges[:3] == [to_rgba(LIGHT.series[at]) for at in (0, 2, 0)]


def test_the_line_of_a_branch_is_hidden_behind_its_boxes(facts: Facts) -> None:
    axes = drawn(facts)
    hidden = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(hidden) == 5
    assert {patch.get_zorder() for patch in hidden} == {1.5}
    assert all(line.get_zorder() < 1.5 for line in axes.lines)


def test_slices_are_joined_by_the_word(facts: Facts) -> None:
    assert "concat" in words_at(drawn(facts, replace(FORM, joined="concat")), 1.5 * APART)
