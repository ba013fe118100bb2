import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from report.report_cases import small_model, small_repnext
from torch import nn

import repblocks as rb
from repblocks.blocks.shares import branch_shares
from repblocks.conformance import form_error
from repblocks.errors import ConfigurationError
from repblocks.report.anatomy import Branch, anatomy
from repblocks.report.blocks import measure_blocks
from repblocks.report.facts import Facts, environment, gather
from repblocks.report.kernels import in_words, kernel_facts, patch_spectrum
from repblocks.report.page import render


def test_every_block_with_branches_is_measured_in_order(facts: Facts) -> None:
    blocks = {name: module for name, module in small_model().named_modules() if isinstance(module, rb.RepConv)}
    assert [block.name for block in facts.blocks] == list(blocks)
    for fact in facts.blocks:
        assert fact.shares == branch_shares(blocks[fact.name])
        assert fact.train.params == sum(parameter.numel() for parameter in blocks[fact.name].parameters())


def test_costs_are_those_of_both_forms(facts: Facts) -> None:
    model = small_model()
    assert facts.train is not None
    assert facts.train.params == rb.profile(model, (1, 32, 32)).params
    assert facts.deploy.macs == rb.profile(rb.deployed(model), (1, 32, 32)).macs
    assert sum(block.deploy.macs for block in facts.blocks) < facts.deploy.macs


def test_folds_of_the_zoo_are_exact_inside_and_at_the_border(facts: Facts) -> None:
    assert facts.equivalence is not None
    assert facts.equivalence.passed
    assert all(block.error.passed for block in facts.blocks)
    assert all(0 < max(block.error.border, block.error.interior) < 1e-5 for block in facts.blocks)


def test_a_border_fault_shows_at_the_border_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reflected(nn.Module):
        """What a fold with the wrong padding would be."""

        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            assert isinstance(conv, nn.Conv2d)
            self.conv = copy.deepcopy(conv)
            self.conv.padding_mode = "reflect"
            self.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    def wrong(block: nn.Module) -> nn.Module:
        return Reflected(rb.deployed(block).conv)

    monkeypatch.setattr("repblocks.conformance.deployed", wrong)
    block = small_model().get_submodule("stages.0.0.conv")
    (fact,) = measure_blocks(block, torch.randn(2, 8, 12, 9), repeats=1)
    assert fact.error.border > 0.01
    assert fact.error.interior < fact.error.tolerance


def test_what_padding_says_is_said_at_the_border(facts: Facts) -> None:
    assert all(block.padding_effect is not None and block.padding_effect > 0.01 for block in facts.blocks)
    pointwise = rb.ConvBN(4, 4, 1).eval()
    (fact,) = measure_blocks(pointwise, torch.randn(2, 4, 5, 5), repeats=1)
    assert fact.padding_effect is None


def test_the_size_of_a_padding_effect_is_that_of_zeros_instead_of_the_nearest_pixels() -> None:
    block = small_model().get_submodule("stages.0.0.conv")
    x = torch.randn(2, 8, 12, 9)
    (fact,) = measure_blocks(block, x, repeats=1)
    conv = rb.deployed(block).conv
    with torch.no_grad():
        zeros = conv(x)
        nearest = nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), conv.weight, conv.bias, 2)
    expected = (nearest - zeros).abs().max() / zeros.abs().max()
    assert fact.padding_effect == pytest.approx(expected.item(), rel=1e-3)


def test_a_block_is_measured_on_what_it_reads_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        """Runs its block on two sizes and destroys what it read; another block is never run."""

        def __init__(self) -> None:
            super().__init__()
            self.block = small_model().get_submodule("stages.0.0.conv")
            self.unused = rb.ConvBN(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.block(x) + 0
            x.zero_()
            return self.block(y[..., :4])

    read: list[torch.Tensor] = []

    def noted(block: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Any:
        read.append(x)
        assert dtype == torch.float32
        return form_error(block, x, dtype)

    monkeypatch.setattr("repblocks.report.blocks.form_error", noted)
    x = torch.randn(2, 8, 12, 9)
    (fact,) = measure_blocks(Twice().eval(), x.clone(), repeats=1)
    assert fact.name == "block"
    assert torch.equal(read[0], x.double())
    assert fact.deploy.macs == 8 * 8 * 9 * 6 * 5


def test_each_form_of_a_block_has_its_own_latency_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def latency_ms(forms: dict[str, nn.Module], x: torch.Tensor, **_: Any) -> dict[str, float]:
        assert len(x) == 1
        assert rb.form_of(forms["train"]) == "train"
        assert rb.form_of(forms["deploy"]) == "deploy"
        return {"train": 3.0, "deploy": 2.0}

    monkeypatch.setattr("repblocks.report.blocks.latency_ms", latency_ms)
    monkeypatch.setattr("repblocks.report.facts.latency_ms", latency_ms)
    block = small_model().get_submodule("stages.0.0.conv")
    facts = gather(block, inputs=torch.randn(2, 8, 12, 9))
    assert facts.train is not None
    for costs in (facts, facts.blocks[0]):
        assert (costs.train.latency_ms, costs.deploy.latency_ms) == (3.0, 2.0)
        assert costs.train.params > costs.deploy.params == 8 * 8 * 9 + 8


def test_kernels_of_a_block_that_is_several_are_told_apart() -> None:
    blocks = {block.name: block for block in gather(small_repnext()).blocks}
    assert list(blocks) == ["stem", *(f"stages.{i}.{part}" for i in range(3) for part in ("downsample", "0"))]
    fact = blocks["stages.1.0"]
    assert [kernel.name for kernel in fact.kernels] == [
        f"stages.1.0.{part}" for part in ("token_mixer", "pointwise1", "pointwise2")
    ]
    assert [kernel.name for kernel in blocks["stem"].kernels] == ["stem"]


def test_facts_are_of_both_forms_of_the_same_images(facts: Facts) -> None:
    assert facts.equivalence is not None
    assert facts.equivalence.relative_error > 0
    assert facts.equivalence.samples == 2
    model = small_model()
    torch.manual_seed(1)
    again = gather(model)
    assert again.equivalence == facts.equivalence
    assert [block.error for block in again.blocks] == [block.error for block in facts.blocks]
    assert any(layer.outlier and layer.outlier.branch for layer in facts.ranges.layers)


def test_images_of_another_precision_are_read_in_float32() -> None:
    block = small_model().get_submodule("stem")
    assert gather(block, inputs=torch.randn(2, 1, 12, 9).double()).equivalence is not None


def test_the_model_stays_as_it_was() -> None:
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gather(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_in_half_precision_is_measured_in_float32() -> None:
    facts = gather(small_model().half())
    assert facts.equivalence is not None
    assert facts.equivalence.dtype == "float32"


def test_the_deploy_form_of_an_expanded_model_is_that_of_the_original() -> None:
    plain, images = timm.create_model("test_resnet", num_classes=4), torch.randn(2, 3, 32, 32)
    wide, _ = rb.expand(plain, "acb", where="layer1.0.*")
    facts = gather(wide, inputs=images)
    assert {block.kind for block in facts.blocks} == {"ExpandedConv"}
    original = rb.collapse(plain.eval(), images).model
    assert facts.deploy.params == sum(parameter.numel() for parameter in original.parameters())
    assert "Beside the blocks" in render(facts)


def test_a_foreign_model_is_collapsed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    facts = gather(model, inputs=torch.randn(2, 3, 9, 8))
    assert facts.collapsed is not None
    assert len(facts.collapsed.regions) == 1
    assert [kernel.text for kernel in facts.kernels] == ["3\u00d73 conv, 3 → 4", "1\u00d71 conv, 4 → 5"]
    assert facts.train is not None


def test_a_foreign_model_with_nothing_to_collapse_has_one_form() -> None:
    facts = gather(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), inputs=torch.randn(2, 3, 9, 8))
    assert facts.train is None
    assert facts.collapsed is not None
    assert facts.equivalence is None


def test_a_deploy_form_has_kernels_and_one_column_of_costs() -> None:
    facts = gather(rb.deployed(small_model()))
    assert facts.train is None
    assert facts.equivalence is None
    assert facts.blocks == ()
    assert len(facts.kernels) == 4


def test_a_model_that_does_not_say_its_size_needs_images() -> None:
    with pytest.raises(ConfigurationError, match=r"pass some with inputs=images"):
        gather(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_spectrum_is_that_of_the_kernel_on_one_patch(groups: int) -> None:
    conv = rb.AffineConv(weight=torch.randn(8, 4 // groups, 3, 2, dtype=torch.float64), groups=groups)
    expected = rb.spectrum(conv, (3, 2), k=8)
    assert patch_spectrum(conv)[:8] == pytest.approx(expected, abs=1e-7)


def test_a_kernel_has_no_more_singular_values_than_weights_per_pixel() -> None:
    conv = rb.AffineConv(weight=torch.randn(8, 1, 3, 1, dtype=torch.float64))
    assert patch_spectrum(conv) == pytest.approx(rb.spectrum(conv, (3, 1), k=3), abs=1e-7)


def test_tap_energy_adds_up_and_is_where_the_weights_are() -> None:
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0, 1, 1], weight[1, 0, 0, 2] = 3.0, 1.0
    taps = kernel_facts("conv", rb.AffineConv(weight=weight)).taps
    assert taps[1][1] == pytest.approx(0.9)
    assert taps[0][2] == pytest.approx(0.1)
    assert sum(map(sum, taps)) == pytest.approx(1)


def test_a_kernel_of_zeros_has_no_energy() -> None:
    facts = kernel_facts("conv", rb.AffineConv(weight=torch.zeros(2, 2, 3, 3)))
    assert sum(map(sum, facts.taps)) == 0


def test_a_convolution_is_described_by_what_is_special_about_it() -> None:
    plain = rb.AffineConv.from_module(nn.Conv2d(4, 6, (3, 1)))
    special = rb.AffineConv.from_module(nn.Conv2d(4, 4, 3, stride=(2, 1), dilation=2, groups=4))
    assert in_words(plain) == "3\u00d71 conv, 4 → 6"
    wider, narrower = (rb.AffineConv.from_module(nn.Conv2d(*sides, 1, groups=4)) for sides in ((4, 8), (8, 4)))
    assert in_words(wider) == "depthwise 1\u00d71 conv, 4 → 8"
    assert in_words(narrower) == "4 groups 1\u00d71 conv, 8 → 4"
    assert in_words(special) == "depthwise 3\u00d73 conv, 4 → 4, stride 2\u00d71, dilation 2"


def test_the_anatomy_of_a_block_is_its_branches_and_what_surrounds_them() -> None:
    found = anatomy(rb.QARepVGGConv(4, 4))
    assert found.branches == (
        Branch(name="kxk", layers=("conv 3\u00d73", "BatchNorm")),
        Branch(name="pointwise", layers=("conv 1\u00d71",)),
        Branch(name="identity", layers=()),
    )
    assert found.before == ()
    assert found.after == ("BatchNorm",)


def test_a_chain_is_one_branch() -> None:
    found = anatomy(rb.ConvBN(4, 4))
    assert [branch.layers for branch in found.branches] == [("conv 3\u00d73", "BatchNorm")]


def test_long_chains_are_cut_in_the_middle() -> None:
    chain = nn.Sequential(*(nn.Conv2d(1, 1, size) for size in (1, 2, 3, 4, 5, 6, 7)))
    (branch,) = anatomy(chain).branches
    assert branch.layers == ("conv 1\u00d71", "conv 2\u00d72", "3 more", "conv 6\u00d76", "conv 7\u00d77")
    assert len(anatomy(chain[:5]).branches[0].layers) == 5


def test_branches_come_together_by_a_sum_or_side_by_side() -> None:
    parts = {"a": nn.Conv2d(2, 2, 1), "b": nn.Identity()}
    assert anatomy(nn.Sequential(rb.Sum(parts))).joined == "+"
    assert anatomy(nn.Sequential(rb.Concat(parts))).joined == "concat"


def test_fixed_filters_and_pools_have_names() -> None:
    words = {layer for branch in anatomy(rb.EdgeConv(4, 4)).branches for layer in branch.layers}
    assert "dw conv 3\u00d73 fixed" in words
    assert "scale" in words
    assert "average pool" in {layer for branch in anatomy(rb.DBBConv(4, 4)).branches for layer in branch.layers}


def test_environment_names_no_machine(facts: Facts) -> None:
    assert {"python", "torch", "system"} <= facts.environment.keys()
    assert Path("/etc/hostname").read_text().strip() not in facts.environment.values()


def test_environment_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, facts: Facts) -> None:
    assert "openvino" in facts.environment
    monkeypatch.setattr("repblocks.report.facts.find_spec", lambda name: None if name == "openvino" else name)
    found = environment()
    assert "openvino" not in found
    assert found["torch"] == torch.__version__.partition("+")[0]
