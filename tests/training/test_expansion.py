import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from repblocks.blocks import BLOCKS
from repblocks.blocks.base import deployed, form_of
from repblocks.calibration import calibrate
from repblocks.checkpoint import load, save
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.expansion.contract import contract
from repblocks.expansion.expand import expand
from repblocks.expansion.expanded import ExpandedConv
from repblocks.expansion.recipe import recipe_of
from repblocks.header import describe
from repblocks.models.registry import create_model
from repblocks.training.checkpoints.restore import model_from_checkpoint
from repblocks.training.expansion import expanded, remarks_on
from repblocks.training.pipeline import run
from repblocks.verification import TOLERANCES, verify

BRIEF = ("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "export.formats=[safetensors]")


def expanded_convs(model: nn.Module) -> dict[str, str]:
    """The blocks of a model by the names of the convolutions that they replaced."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ExpandedConv)}
    return {name: type(module.block).__name__ for name, module in found.items()}


def settings(**changes: Any) -> dict[str, Any]:
    return {"block": "acb", "where": None, "init": "preserve", **changes}


@pytest.fixture(scope="module")
def finished(configure: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained a small ResNet with DBB blocks; not to be changed."""
    folder = tmp_path_factory.mktemp("expanded")
    with warnings.catch_warnings():
        run(configure("model.name=test_resnet", "model.expand.block=dbb", "branch_shares=true", *BRIEF), folder)
    return folder


@pytest.fixture
def digits_like() -> torch.Tensor:
    return torch.randn(3, 1, 32, 40, generator=torch.Generator().manual_seed(0))


def test_the_checkpoint_gives_the_expanded_model_back(finished: Path) -> None:
    model = model_from_checkpoint(finished / "checkpoints" / "best.ckpt")
    weights = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert set(expanded_convs(model).values()) == {"DBBConv"}
    assert form_of(model) == "train"
    assert not model.training
    assert all(torch.equal(value, weights[f"model.{key}"]) for key, value in model.state_dict().items())


def test_what_is_exported_loads_strictly_into_the_plain_model_and_gives_the_same(
    finished: Path, digits_like: torch.Tensor
) -> None:
    plain = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    plain.load_state_dict(load_file(finished / "deploy" / "model.safetensors"), strict=True)
    trained = model_from_checkpoint(finished / "checkpoints" / "best.ckpt")
    verify(trained, plain, digits_like).raise_if_different("the exported model")
    verify(load(finished / "deploy" / "model.safetensors"), plain, digits_like).raise_if_different("the loaded file")


def test_training_moved_every_branch(finished: Path) -> None:
    trained = model_from_checkpoint(finished / "checkpoints" / "best.ckpt")
    norms = [m for block in trained.modules() if isinstance(block, ExpandedConv) for m in block.modules()]
    scales = [norm.weight for norm in norms if isinstance(norm, nn.BatchNorm2d)]
    assert scales
    assert all(scale.abs().max() > 0 for scale in scales)


def test_the_summary_compares_the_expanded_model_with_the_plain_one(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    plain = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    assert summary["deploy"]["params"] == sum(parameter.numel() for parameter in plain.parameters())
    assert summary["train"]["params"] > summary["deploy"]["params"]
    assert summary["train"]["macs"] > summary["deploy"]["macs"]
    assert summary["train"]["test_accuracy"] == summary["deploy"]["test_accuracy"]
    assert summary["equivalence"]["passed"]
    (step,) = summary["expansions"]
    assert (step["block"], step["init"]) == ("dbb", "preserve")
    trained = model_from_checkpoint(finished / "checkpoints" / "best.ckpt")
    assert step["convolutions"] == list(expanded_convs(trained))


def test_the_shares_of_expanded_convolutions_are_logged(finished: Path) -> None:
    columns = (finished / "metrics.csv").read_text().splitlines()[0].split(",")
    trained = model_from_checkpoint(finished / "checkpoints" / "best.ckpt")
    name = next(iter(expanded_convs(trained)))
    assert {f"share/{name}.block/{branch}" for branch in ("kxk", "pointwise", "pointwise_kxk", "average")} <= {*columns}


def test_a_run_says_what_is_expanded_and_what_is_not(
    configure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(configure("model.name=test_resnet", "model.expand.block=acb", *BRIEF, "export.formats=[]"), tmp_path)
    said = capsys.readouterr().out
    assert "convolutions are trained as 'acb' blocks, and exported as the convolutions that they were" in said
    assert "ACConv would only add copies of its kernel" in said
    assert "no block of this model collapses" not in said


@pytest.mark.parametrize(
    ("where", "expected"),
    [("layer1.*", {"layer1"}), ("[layer1.*,layer3.0.conv2]", {"layer1", "layer3"})],
)
def test_the_command_line_chooses_convolutions_by_name(configure: Any, where: str, expected: set[str]) -> None:
    config = configure("model.expand.block=acb", f"model.expand.where={where}")["model"]["expand"]
    model, report = expanded(timm.create_model("resnet10t"), config)
    assert report is not None
    assert {name.split(".")[0] for name in expanded_convs(model)} == expected


def test_without_a_block_the_model_is_trained_as_it_is(configure: Any) -> None:
    model = nn.Conv2d(3, 4, 3)
    assert expanded(model, configure()["model"]["expand"]) == (model, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block": "abc"}, r"model\.expand\.block=abc is unknown; did you mean .*acb"),
        ({"block": 3}, r"model\.expand\.block=3 is unknown"),
        ({"init": "random"}, r"model\.expand\.init=random is unknown"),
        ({"where": 3}, r"model\.expand\.where=3 needs to be a name with wildcards"),
        ({"where": ["conv1", 3]}, r"model\.expand\.where=\['conv1', 3\] needs to be"),
        ({"where": []}, r"model\.expand\.where=\[\] needs to be"),
        ({"where": "stage9.*"}, r"'stage9\.\*' matches none of the"),
        ({"block": None, "where": "conv1"}, r"model\.expand\.where=conv1 needs model\.expand\.block"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        expanded(create_model("test_resnet"), settings(**changes))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), r"1 stay \(0\): ACConv would only add copies"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3)), r"2 stay \(0, 1\): is a Conv1d"),
        (nn.Linear(3, 4), "the model has no convolution"),
    ],
)
def test_a_model_in_which_nothing_expands_is_refused_with_the_reasons(model: nn.Module, words: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"expand\.block=acb expands nothing in \w+: {words}"):
        expanded(model, settings())


def test_many_reasons_are_summed_up() -> None:
    plain = [nn.Conv2d(3, 3, size) for size in (1, 3, 3, 3, 3)]
    odd = [nn.Conv1d(3, 3, 3), nn.Conv3d(3, 3, 3)]
    model = nn.ModuleDict(
        {"seen": nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), *plain), "never": nn.ModuleList(odd)}
    )
    lines = remarks_on(expand(model, "acb").report)
    assert len(lines) <= 6
    assert ", ..." in "".join(lines)


class TestFiles:
    @pytest.fixture
    def model(self, digits_like: torch.Tensor) -> nn.Module:
        """An expanded model in float64, with statistics as after training."""
        plain = create_model("test_resnet", num_classes=10, in_chans=1).double()
        first = expand(calibrate(plain, digits_like.double()), "dbb", where="layer1.*").model
        second = expand(first, "acb", where="layer2.*").model
        return calibrate(second, digits_like.double(), seed=1)

    def test_a_saved_model_comes_back_expanded_by_several_blocks(
        self, model: nn.Module, tmp_path: Path, digits_like: torch.Tensor
    ) -> None:
        save(model, tmp_path / "model.safetensors")
        back = load(tmp_path / "model.safetensors")
        assert expanded_convs(back) == expanded_convs(model)
        assert {"DBBConv", "ACConv"} == set(expanded_convs(back).values())
        assert torch.equal(back(digits_like.double()), model(digits_like.double()))

    def test_a_loaded_model_contracts_to_the_named_one(
        self, model: nn.Module, tmp_path: Path, digits_like: torch.Tensor
    ) -> None:
        save(model, tmp_path / "model.safetensors")
        plain = create_model("test_resnet", num_classes=10, in_chans=1).double().eval()
        plain.load_state_dict(contract(load(tmp_path / "model.safetensors")).state_dict(), strict=True)
        report = verify(model, plain, digits_like.double())
        assert report.relative_error <= TOLERANCES[torch.float64]["model"]

    def test_its_deploy_form_is_saved_too(self, model: nn.Module, tmp_path: Path, digits_like: torch.Tensor) -> None:
        save(deployed(model), tmp_path / "model.safetensors")
        back = load(tmp_path / "model.safetensors")
        assert form_of(back) == "deploy"
        verify(model, back, digits_like.double()).raise_if_different("the deploy form")

    def test_a_contracted_model_is_described_as_never_expanded(self, model: nn.Module) -> None:
        plain = contract(model)
        assert recipe_of(plain) == []
        assert describe(plain)["expansions"] == []
        again = expand(plain, "repvgg", where="layer3.*").model
        assert [step["block"] for step in recipe_of(again)] == ["repvgg"]

    @pytest.mark.parametrize("block", sorted(BLOCKS))
    def test_every_block_that_expands_something_comes_back(
        self, block: str, tmp_path: Path, digits_like: torch.Tensor
    ) -> None:
        torch.manual_seed(1)
        model, report = expand(create_model("test_resnet", num_classes=10, in_chans=1), block)
        calibrate(model, digits_like)
        save(model, tmp_path / "model.safetensors")
        back = load(tmp_path / "model.safetensors")
        assert list(expanded_convs(back)) == [row.name for row in report.expanded]
        assert torch.equal(back(digits_like), model(digits_like))

    def test_fresh_blocks_and_biases_come_back(self, tmp_path: Path) -> None:
        plain = create_model("vgg11_bn", num_classes=3, mlp_ratio=0.01).eval()  # its convolutions have biases
        for init in ("preserve", "fresh"):
            model = expand(plain, "acb", where=["features.0", "features.4"], init=init).model
            save(model, tmp_path / f"{init}.safetensors")
            back = load(tmp_path / f"{init}.safetensors").state_dict()
            torch.testing.assert_close(back, dict(model.state_dict()), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("expansions", "words"),
        [
            (3, "expansions is 3"),
            (["dbb"], r"expansions is \['dbb'\]"),
            ([{"block": "dbb", "init": "preserve"}], "expansions is "),
            ([{"block": "dbb", "init": "preserve", "convolutions": [3]}], "expansions is "),
            ([{"block": "abc", "init": "preserve", "convolutions": ["conv1"]}], "block=abc is unknown"),
            ([{"block": "dbb", "init": "x", "convolutions": ["conv1"]}], "init=x is unknown"),
            (
                [{"block": "dbb", "init": "preserve", "convolutions": ["conv99"]}],
                "'conv99' is not expanded by 'dbb': the model has no convolution of that name",
            ),
        ],
    )
    def test_nonsense_in_a_checkpoint_is_refused(
        self, finished: Path, tmp_path: Path, expansions: object, words: str
    ) -> None:
        content = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
        content["repblocks"]["expansions"] = expansions
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(CheckpointError, match=words) as refused:
            model_from_checkpoint(tmp_path / "bad.ckpt")
        assert str(tmp_path / "bad.ckpt") in str(refused.value)

    def test_expanded_weights_for_a_plain_model_are_refused(self, finished: Path, tmp_path: Path) -> None:
        content = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
        del content["repblocks"]["expansions"]
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(CheckpointError, match="are not those of test_resnet"):
            model_from_checkpoint(tmp_path / "bad.ckpt")
