import pytest

from repblocks.blocks import RepConv
from repblocks.errors import ConfigurationError
from repblocks.training import build, run


def test_the_execution_of_the_configuration_reaches_every_block(monkeypatch, tiny, tmp_path):
    seen = set()

    def spied(config, model, *rest):
        seen.update(block.execution for block in model.modules() if isinstance(block, RepConv))
        return build.make_task(config, model, *rest)

    monkeypatch.setattr("repblocks.training.pipeline.make_task", spied)
    run(tiny("model.execution=outputs"), tmp_path)
    assert seen == {"outputs"}


def test_an_unknown_execution_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(ConfigurationError, match="fast"):
        run(tiny("model.execution=fast"), tmp_path)
