from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from report.report_cases import Tree, small_model, small_repnext

import repblocks as rb
from repblocks.errors import VerificationError
from repblocks.report import texts
from repblocks.report.facts import Facts, gather
from repblocks.report.page import render
from repblocks.report.shortcuts import ShortcutFacts, measure_shortcuts

SIZE = (1, 32, 32)


def section(page: str) -> str:
    _, _, rest = page.partition('<section id="shortcuts"')
    return rest.partition("</section>")[0]


def test_a_row_for_each_installed_runtime_but_the_compiler(repnext_facts: Facts) -> None:
    assert repnext_facts.shortcuts is not None
    rows = repnext_facts.shortcuts.rows
    assert [row["runtime"] for row in rows] == ["eager", "onnxruntime", "openvino"]
    assert all(row["absorb_ms"] > 0 and row["keep_ms"] > 0 for row in rows)


def test_the_page_recommends_by_runtime(repnext_facts: Facts) -> None:
    rows = (
        {"runtime": "eager", "absorb_ms": 2.0, "keep_ms": 1.0, "keep_over_absorb": 0.5, "faster": "keep"},
        {"runtime": "openvino", "absorb_ms": 0.05, "keep_ms": 0.05, "keep_over_absorb": 1.0, "faster": "tie"},
    )
    page = render(replace(repnext_facts, shortcuts=ShortcutFacts(rows=rows, repeats=7)))
    assert Tree(page).open == []
    found = [row for row in Tree(page).rows if row[0] in ("eager", "openvino")]
    assert found == [
        ["eager", "2.000", "1.000", "0.50", 'shortcut="keep"'],
        ["openvino", "0.050", "0.050", "1.00", "a tie: either"],
    ]
    assert "Medians of 7 rounds" in section(page)
    assert "within 2% of each other are a tie" in section(page)
    assert '<a href="#shortcuts">' in page


@pytest.mark.parametrize("faster", ["absorb", "keep"])
def test_a_recommendation_is_an_argument_of_the_model(faster: str) -> None:
    assert texts.recommendation({"faster": faster}) == f'shortcut="{faster}"'


def test_models_without_a_choice_have_no_such_section(page: str) -> None:
    assert section(page) == ""
    assert "#shortcuts" not in page
    assert measure_shortcuts(small_model(), SIZE) is None
    assert measure_shortcuts(rb.deployed(small_repnext()), SIZE) is None


def test_forms_that_differ_are_said_to_and_not_timed(monkeypatch: pytest.MonkeyPatch, repnext_facts: Facts) -> None:
    def differing(*args: Any, **kwargs: Any) -> None:
        raise VerificationError("the deploy form differs by <0.3>")

    monkeypatch.setattr("repblocks.report.shortcuts.compare_shortcuts", differing)
    found = measure_shortcuts(small_repnext(), SIZE)
    assert found is not None
    assert found.rows == ()
    page = section(render(replace(repnext_facts, shortcuts=found)))
    assert 'class="verdict bad"' in page
    assert "differs by &lt;0.3&gt;" in page
    assert "<table" not in page


def test_a_model_that_is_no_graph_is_timed_in_pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refused)
    found = measure_shortcuts(small_repnext(), SIZE, repeats=1)
    assert found is not None
    assert [row["runtime"] for row in found.rows] == ["eager"]


def test_whoever_waits_sees_the_runtimes_pass_and_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repblocks.report.shortcuts.usable_runtimes", lambda: ["eager", "compile"])
    seen: list[tuple[str, list[Any]]] = []

    def track(items: Sequence[Any], what: str) -> Iterable[Any]:
        seen.append((what, list(items)))
        return items

    model = small_repnext("keep")
    facts = gather(model, track=track)
    assert facts.shortcuts is not None
    assert ("comparing shortcuts", ["eager"]) in seen
    assert {m.shortcut for m in model.modules() if isinstance(m, rb.RepNeXtBlock)} == {"keep"}
    assert rb.form_of(model) == "train"
