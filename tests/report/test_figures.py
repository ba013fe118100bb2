"""What is drawn is what was measured."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from repblocks.report.facts import Facts
from repblocks.report.figures import charts
from repblocks.report.figures.pictures import KERNELS_SHOWN, curves_in, featured, pictures, shares_in
from repblocks.report.figures.style import LIGHT


def points(axes: Any, label: str) -> list[list[float]]:
    """Where the marks of a series are."""
    (found,) = [collection for collection in axes.collections if collection.get_label() == label]
    return found.get_offsets().tolist()


def test_latency_is_of_each_form_and_the_first_block_is_on_top(facts: Facts) -> None:
    (axes,) = charts.draw_latency(facts.blocks, LIGHT).axes
    for form in ("train", "deploy"):
        expected = [[getattr(block, form).latency_ms, row] for row, block in enumerate(facts.blocks)]
        assert points(axes, f"{form} form") == expected
    bottom, top = axes.get_ylim()
    assert bottom > top
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [block.name for block in facts.blocks]


def test_shares_fill_the_line(facts: Facts) -> None:
    blocks = [block for block in facts.blocks if len(block.shares) > 1]
    (axes,) = charts.draw_shares(blocks, LIGHT).axes
    ends = [0.0] * len(blocks)
    for bars in axes.containers:
        for row, bar in enumerate(bars):
            assert bar.get_x() == pytest.approx(ends[row])
            assert bar.get_width() == pytest.approx(blocks[row].shares.get(bars.get_label(), 0.0))
            ends[row] += bar.get_width()
    assert ends == pytest.approx([1.0] * len(blocks))


def test_errors_are_shown_where_they_are_and_none_as_the_smallest(facts: Facts) -> None:
    error = replace(facts.blocks[0].error, interior=0.0, border=2e-3)
    blocks = [replace(facts.blocks[0], error=error, padding_effect=0.25)]
    (axes,) = charts.draw_border(blocks, LIGHT).axes
    assert points(axes, "fold, interior") == [[charts.NO_ERROR, 0]]
    assert points(axes, "fold, border") == [[2e-3, 0]]
    assert points(axes, "other padding, border") == [[0.25, 0]]


def test_singular_values_are_relative_to_the_largest(facts: Facts) -> None:
    kernel = replace(facts.kernels[0], singular_values=(4.0, 2.0, 1.0, 0.0))
    (axes,) = charts.draw_spectra([kernel], LIGHT).axes
    (line,) = axes.lines
    assert line.get_ydata().tolist() == [1.0, 0.5, 0.25]
    assert line.get_xdata().tolist() == [0.125, 0.375, 0.625]


def test_ranges_are_those_of_the_channels(facts: Facts) -> None:
    layer = replace(facts.ranges.layers[0], channel_ranges=[4.0, 1.0, 2.0, 0.0, 3.0, 5.0])
    (axes,) = charts.draw_ranges([layer], LIGHT).axes
    ends = {lines.get_label(): lines.get_segments()[0][:, 0].tolist() for lines in axes.collections[:2]}
    assert ends == {"all channels": [1.0, 5.0], "middle half": [2.0, 4.0]}
    assert points(axes, "median") == [[3.0, 0]]
    assert points(axes, "largest") == [[5.0, 0]]


def test_the_first_epoch_is_one_and_epochs_without_a_value_are_left_out() -> None:
    curves: dict[str, dict[str, Sequence[float | None]]] = {
        "loss": {"train": [3.0, 2.0, 1.0], "val": [None, 2.5, None]}
    }
    (axes,) = charts.draw_curves(curves, LIGHT).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"train": [[1, 3], [2, 2], [3, 1]], "val": [[2, 2.5]]}


def test_shares_over_time_are_of_their_block(facts: Facts) -> None:
    history: dict[str, dict[str, Sequence[float | None]]] = {"a": {"kxk": [0.5, 0.75]}, "b": {"kxk": [0.25, 0.5]}}
    drawn = charts.draw_share_history(history, LIGHT).axes
    titles = {axes.get_title(): [line.get_ydata().tolist() for line in axes.lines] for axes in drawn[:2]}
    assert titles == {"a": [[0.5, 0.75]], "b": [[0.25, 0.5]]}


def test_shades_of_taps_are_roots_of_their_energy(facts: Facts) -> None:
    kernel = replace(facts.kernels[0], taps=((0.64, 0.0), (0.16, 0.2)))
    (axes,) = charts.draw_taps([kernel], LIGHT).axes
    (cells,) = axes.collections
    assert cells.get_facecolor()[:, 3].tolist() == pytest.approx([1.0, 0.0, 0.5, (0.2 / 0.64) ** 0.5])
    assert [text.get_text() for text in axes.texts] == ["64", "0", "16", "20"]


def test_the_block_that_is_drawn_has_the_most_branches_and_is_the_first_of_those(facts: Facts) -> None:
    few, many = ([replace(block, anatomy=replace(block.anatomy, branches=block.anatomy.branches * times))
                  for block in facts.blocks] for times in (1, 2))  # fmt: skip
    assert featured([few[0], many[1], many[2], few[3]]) is many[1]


def test_pictures_are_left_out_where_there_is_nothing_to_see(facts: Facts) -> None:
    alone = [replace(block, shares={"kxk": 1.0}) for block in facts.blocks]
    assert "shares" not in pictures(replace(facts, blocks=tuple(alone)))
    mixed = (alone[0], *facts.blocks[1:])
    drawn = pictures(replace(facts, blocks=mixed))["shares"].draw(LIGHT)
    assert len(drawn.axes[0].get_yticks()) == len(mixed) - 1


def test_many_kernels_are_cut_off_and_pointwise_ones_left_out(facts: Facts) -> None:
    point = replace(facts.kernels[0], taps=((1.0,),))
    many = (point, *[facts.kernels[0]] * (KERNELS_SHOWN + 5))
    drawn = pictures(replace(facts, kernels=many))["taps"].draw(LIGHT)
    assert sum(bool(axes.collections) for axes in drawn.axes) == KERNELS_SHOWN
    assert "taps" not in pictures(replace(facts, kernels=(point,)))


def test_shares_of_three_branches_lie_behind_each_other(facts: Facts) -> None:
    block = replace(facts.blocks[0], shares={"a": 0.2, "b": 0.3, "c": 0.5})
    (axes,) = charts.draw_shares([block], LIGHT).axes
    assert [bars[0].get_x() for bars in axes.containers] == pytest.approx([0.0, 0.2, 0.5])
    assert axes.xaxis.get_major_formatter()(0.25, 0) == "25%"


def test_a_line_joins_both_latencies_and_starts_at_zero(facts: Facts) -> None:
    (axes,) = charts.draw_latency(facts.blocks, LIGHT).axes
    expected = [[block.deploy.latency_ms, block.train.latency_ms] for block in facts.blocks]
    assert [segment[:, 0].tolist() for segment in axes.collections[0].get_segments()] == expected
    assert axes.get_xlim()[0] == 0


def test_the_limit_is_the_tolerance_and_no_effect_of_padding_no_mark(facts: Facts) -> None:
    error = replace(facts.blocks[0].error, tolerance=7e-4)
    (axes,) = charts.draw_border([replace(facts.blocks[0], error=error, padding_effect=0.0)], LIGHT).axes
    assert axes.lines[0].get_xdata() == [7e-4, 7e-4]
    assert points(axes, "other padding, border") == []
    ticks = axes.xaxis.get_major_formatter()
    assert [ticks(value, 0) for value in (1e-6, 1e-3, 0.5, 1e4)] == ["10⁻⁶", "0.001", "0.5", "10⁴"]


def test_the_first_row_of_taps_is_on_top_and_empty_places_stay_empty(facts: Facts) -> None:
    kernel = replace(facts.kernels[0], name="stages.0.very.long.name.of.conv")
    axes = charts.draw_taps([kernel] * 9, LIGHT).axes
    bottom, top = axes[0].get_ylim()
    assert bottom > top == 0
    assert axes[0].get_title().startswith("…")
    assert axes[0].get_title().endswith("name.of.conv")
    assert [one.axison for one in axes] == [True] * 9 + [False] * 7


def test_later_kernels_are_darker_and_ends_are_named(facts: Facts) -> None:
    kernels = [replace(facts.kernels[0], name=name, singular_values=(2.0, 1.0)) for name in ("a", "b", "c")]
    axes: Any = charts.draw_spectra(kernels, LIGHT).axes[0]
    assert [line.get_alpha() for line in axes.lines] == pytest.approx([0.2, 0.6, 1.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "c"]


def test_ranges_are_drawn_by_their_size_and_accuracies_in_percent(facts: Facts) -> None:
    (axes,) = charts.draw_ranges(facts.ranges.layers, LIGHT).axes
    assert axes.get_xscale() == "log"
    curves: dict[str, dict[str, Sequence[float | None]]] = {"accuracy": {"val": [0.5]}, "loss": {"val": [0.5]}}
    accuracy, loss = charts.draw_curves(curves, LIGHT).axes[:2]
    assert accuracy.yaxis.get_major_formatter()(0.5, 0) == "50%"
    assert loss.yaxis.get_major_formatter()(0.5, 0) != "50%"


def test_columns_become_curves_by_kind_and_shares_by_block_in_the_order_of_the_network() -> None:
    metrics: dict[str, Sequence[float | None]] = {
        "epoch": [1, 2],
        "train/loss": [2.0, 1.0],
        "val/loss": [None, 1.5],
        "val/accuracy": [None, None],
        "lr": [0.1, None],
        "share/late/kxk": [0.5, 0.6],
        "share/early/kxk": [0.4, 0.3],
        "share/early/none": [None, None],
    }
    assert curves_in(metrics) == {
        "loss": {"train": [2.0, 1.0], "val": [None, 1.5]},
        "learning rate": {"lr": [0.1, None]},
    }
    shares = shares_in(metrics, ["early", "absent", "late"])
    assert list(shares.items()) == [("early", {"kxk": [0.4, 0.3]}), ("late", {"kxk": [0.5, 0.6]})]


def test_a_kernel_of_zeros_has_no_spectrum(facts: Facts) -> None:
    zeros = replace(facts.kernels[0], singular_values=(0.0, 0.0))
    assert "spectra" not in pictures(replace(facts, kernels=(zeros,)))
