from dataclasses import replace
from typing import Any

import pytest

from repblocks.report import texts
from repblocks.report.blocks import Cost
from repblocks.report.facts import Facts
from repblocks.report.sources import Run


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (16_057_600, "16.1 M"), (999_900, "1,000 k"), (2.5e12, "2.5 T")],
)
def test_large_numbers_have_three_digits_and_a_letter(value: float, shown: str) -> None:
    assert texts.si(value) == shown


@pytest.mark.parametrize(
    ("show", "value", "shown"),
    [
        (texts.count, 1234567, "1,234,567"),
        (texts.ms, 1.234, "1.23 ms"),
        (texts.ms, 0.0123, "0.012 ms"),
        (texts.scientific, 0.0, "0"),
        (texts.scientific, 2.34e-7, "2.3e-07"),
        (texts.decibels, float("inf"), "no error"),
        (texts.percent, 0.125, "12.5%"),
        (texts.ratio, float("inf"), "∞"),
        (texts.short, -3.14159, "\N{MINUS SIGN}3.14"),
    ],
)
def test_numbers_read_well(show: Any, value: float, shown: str) -> None:
    assert show(value) == shown


def test_a_card_says_what_the_collapse_changes(facts: Facts) -> None:
    cards = {card.what: card for card in texts.cards(facts)}
    assert facts.train is not None
    change = 100 * (facts.deploy.params / facts.train.params - 1)
    assert cards["parameters"].change == f"\N{MINUS SIGN}{-change:.1f}%"
    assert cards["latency per image"].change.endswith("times as fast")
    assert "test accuracy" not in cards


def test_a_run_gives_accuracy_first_and_what_training_was(facts: Facts) -> None:
    summary = {
        "train": {"test_accuracy": 0.975},
        "deploy": {"test_accuracy": 0.97},
        "images": {"train": 1437, "val": 180},
        "epochs": 3,
        "checkpoint": {"val_accuracy": 0.5},
        "seconds": {"fit": 1234.4},
    }
    known = replace(facts, run=Run(summary=summary))
    (accuracy, *others) = texts.cards(known)
    assert (accuracy.train, accuracy.deploy, accuracy.change) == ("97.50%", "97.00%", "\N{MINUS SIGN}0.50 points")
    assert [card.what for card in others] == ["parameters", "MACs per image", "latency per image"]
    assert texts.training(known) == {
        "images": "1,437 train, 180 val",
        "epochs": "3",
        "best validation accuracy": "50.00%",
        "training time": "1,234 s",
    }


def test_what_does_not_change_is_called_the_same_and_speed_is_that_of_the_deploy_form(facts: Facts) -> None:
    cost = Cost(params=10, macs=20, latency_ms=1.0)
    known = replace(facts, train=replace(cost, latency_ms=3.0, macs=10), deploy=cost)
    changes = {card.what: card.change for card in texts.cards(known)}
    assert changes == {
        "parameters": "the same",
        "MACs per image": "+100.0%",
        "latency per image": "3.00 times as fast",
    }


def test_a_reader_is_told_where_blocks_are_from_before_batch_norm_was_estimated_again(facts: Facts) -> None:
    assert texts.notes(facts) == []
    again = replace(facts, run=Run(config={"config": {"reestimate_bn": 10}}))
    assert texts.notes(again)[0].startswith("The run re-estimated BatchNorm")


def test_what_is_special_about_a_file_is_said() -> None:
    int8 = {"opset": 20, "int8_accuracy": 0.97, "float_accuracy": 0.98, "labelled_images": 360}
    assert texts.remark(int8) == "opset 20, 97.00% right of 360 images, in float 98.00%"
    assert texts.remark({}) == ""
