import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from report.report_cases import Tree, small_model
from torch import nn

from repblocks.report import write_report
from repblocks.report.facts import Facts, gather
from repblocks.report.page import render
from repblocks.report.sources import Run

SECTIONS = ("summary", "blocks", "kernels", "border", "int8", "environment")
LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "image": "href", "use": "xlink:href"}


def test_the_page_is_well_formed_and_its_ids_are_unique(page: str) -> None:
    tree = Tree(page)
    assert tree.open == []
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > len(SECTIONS)


def test_every_link_and_reference_points_into_the_page(page: str) -> None:
    tree = Tree(page)
    ids = {attributes["id"] for _, attributes in tree.elements if "id" in attributes}
    targets = [str(link["href"]) for link in tree.named("a")] + re.findall(r"url\((#[^)]+)\)", page)
    targets += [str(attributes["xlink:href"]) for attributes in tree.named("use")]
    assert len(targets) > 20
    assert {target.removeprefix("#") for target in targets} <= ids


def test_the_page_loads_nothing_from_elsewhere(page: str) -> None:
    tree = Tree(page)
    for tag, attribute in LOADING.items():
        for attributes in tree.named(tag):
            assert str(attributes.get(attribute, "#")).startswith(("#", "data:"))
    namespaces = {"http://www.w3.org/1999/xlink"}  # a name, which no browser fetches
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= namespaces
    assert "@import" not in page


def test_the_page_has_a_section_for_each_question(page: str) -> None:
    ids = {attributes.get("id") for attributes in Tree(page).named("section")}
    assert set(SECTIONS) <= ids


def test_equal_facts_give_equal_pages(facts: Facts, page: str) -> None:
    assert render(facts) == page


def test_a_row_says_what_was_measured(facts: Facts, page: str) -> None:
    block = facts.blocks[1]
    row = next(row for row in Tree(page).rows if row[0] == block.name)
    assert row[1:3] == ["RepVGGConv", "2kxk, pointwise"]
    assert row[4:6] == [f"{block.train.params:,}", f"{block.deploy.params:,}"]
    assert row[3] == f"{max(block.error.border, block.error.interior):.1e}"


def test_figures_are_named_for_those_who_do_not_see_them(page: str) -> None:
    drawings = Tree(page).named("svg")
    assert len(drawings) >= 7
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)


def test_no_colour_of_the_page_is_left_a_placeholder(page: str) -> None:
    assert not re.search("#0[ab]000[0-9]", page)
    assert "fill: currentColor" in page
    assert "var(--series-0)" in page


def test_a_fold_that_is_wrong_is_marked(facts: Facts) -> None:
    wrong = replace(facts.blocks[0], error=replace(facts.blocks[0].error, border=0.3))
    assert facts.equivalence is not None
    report = replace(facts.equivalence, relative_error=0.2)
    shown = render(replace(facts, blocks=(wrong, *facts.blocks[1:]), equivalence=report))
    assert 'class="number bad"' in shown
    assert "The forms differ" in shown
    assert "Both forms give the same outputs" not in shown


class Odd(nn.Module):
    """Names that mean something in HTML, and in matplotlib's formulas."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.add_module("<script>alert(1)</script>", block)
        self.add_module("$x^{2$ & \"q'", nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


def test_names_are_text_whatever_they_contain(tmp_path: Path) -> None:
    block = small_model().get_submodule("stem")
    facts = gather(Odd(block), inputs=torch.randn(2, 1, 12, 9))
    hostile: dict[str, Any] = {"data": "<img src=x onerror=alert(1)>", "epochs": 1}
    page = render(replace(facts, title="</title><script>", run=Run(summary=hostile)))
    tree = Tree(page)
    assert tree.open == []
    assert len(tree.named("script")) == 1
    assert tree.named("img") == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.conv" in page


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    model = nn.Sequential()
    model.add_module("$x_$", small_model().get_submodule("stem"))
    assert "$x_$.conv" in render(gather(model, inputs=torch.randn(2, 1, 12, 9)))


def test_pictures_are_files_too(tmp_path: Path) -> None:
    model = small_model().get_submodule("stages.0")
    files = write_report(model, tmp_path / "report.html", figures=tmp_path / "figures", inputs=torch.randn(2, 8, 12, 9))
    names = {path.stem for path in files[1:]}
    assert names == {"block", "latency", "border", "shares", "taps", "spectra", "ranges"}
    assert sorted(path.suffix for path in files[1:]) == [".png"] * len(names) + [".svg"] * len(names)
    for path in files[1:]:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert b"0a000" not in content or path.suffix == ".png"


def test_writing_figures_twice_gives_the_same_bytes(facts: Facts, tmp_path: Path) -> None:
    from repblocks.report.figures import pictures
    from repblocks.report.figures.style import write_files

    for picture in pictures(facts).values():
        first, second = (write_files(picture.name, picture.draw, tmp_path / folder) for folder in "ab")
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_whoever_waits_can_see_how_far_it_is(tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def track(items: Sequence[Any], what: str) -> Iterable[Any]:
        for item in items:
            seen[what] = seen.get(what, 0) + 1
            yield item

    stage = small_model().get_submodule("stages.0")
    files = write_report(stage, tmp_path / "page.html", figures=tmp_path, inputs=torch.randn(2, 8, 12, 9), track=track)
    blocks = sum(1 for name, _ in stage.named_modules() if name.endswith(".conv"))
    assert seen == {"measuring blocks": blocks, "drawing": len(files) // 2, "writing figures": len(files) // 2}


@pytest.mark.parametrize("block", ["plain", "dbb", "qarepvgg", "orepa", "edge", "expand"])
def test_every_kind_of_block_has_a_page(block: str) -> None:
    stage = small_model(block).get_submodule("stages.0")
    page = render(gather(stage, inputs=torch.randn(2, 8, 12, 9)))
    assert Tree(page).open == []
    assert ">fold</text>" in page
