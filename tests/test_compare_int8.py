"""`scripts/compare_int8.py` trains, quantizes and says what is noise."""

import json
import warnings
from pathlib import Path

import pytest
from support import loaded_script

from repblocks.training.console import quiet_lightning

script = loaded_script(Path(__file__).parents[1] / "scripts" / "compare_int8.py")
TINY = (
    "+model.args.depths=[1,1,1]",
    "+model.args.widths=[8,8,8]",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
)


def rows(*costs):
    results = [{"float": 1.0, "int8": 1 - cost, "cost": cost} for cost in costs]
    return script.summarised(results)


def test_the_interval_is_students_over_the_seeds():
    row = rows(0.01, 0.02, 0.03)
    assert row["cost"] == pytest.approx(0.02)
    assert row["cost_half_width"] == pytest.approx(4.302653 * 0.01 / 3**0.5)
    assert rows(0.01)["cost_half_width"] is None


@pytest.mark.parametrize(("costs", "said"), [((0.01, 0.02, 0.03), True), ((0.019, 0.02, 0.021), False), ((0, 0), True)])
def test_a_cost_whose_interval_holds_zero_is_called_noise(costs, said):
    figures = dict.fromkeys(("output_sqnr_db", "lowest_sqnr_db", "lowest_whole_sqnr_db", "most_zeroed"), 0.1)
    cost = script.cells("x", {**rows(*costs), **figures})[3]
    assert ("within noise" in cost) == said
    assert cost.startswith(f"{100 * sum(costs) / len(costs):+.2f} ± ")


@pytest.mark.slow
def test_both_blocks_are_trained_and_quantized_in_every_way_and_written_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "PREPARATIONS", ("none", "equalized-corrected"))
    with warnings.catch_warnings():
        quiet_lightning()
        script.main(["--seeds", "1", "--json", str(tmp_path / "found.json"), *TINY])
    names = ["RepVGG", "RepVGG, equalized-corrected", "QARepVGG", "QARepVGG, equalized-corrected"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["models"]) == names
    assert found["overrides"] == list(TINY)
    for row in found["models"].values():
        assert row["cost"] == pytest.approx(row["float"] - row["int8"])
        assert row["output_sqnr_db"] > 10
    assert found["models"][names[0]]["float"] == found["models"][names[1]]["float"]  # one training for both
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == names
