"""What ships of a model, whatever it is made of."""

import timm
import torch
from report.report_cases import small_model
from torch import nn

import repblocks as rb
from repblocks.deploy_form import deploy_form_of, has_blocks


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_blocks_in_train_form_are_collapsed_by_themselves() -> None:
    model, images = small_model(), torch.randn(2, 1, 32, 32)
    plain, report = deploy_form_of(model, images)
    assert report is None
    assert rb.form_of(plain) == "deploy"
    assert rb.form_of(model) == "train"
    assert rb.verify(model, plain, images).passed


def test_a_model_in_deploy_form_is_what_ships() -> None:
    model = rb.deployed(small_model())
    assert deploy_form_of(model, torch.randn(2, 1, 32, 32)) == (model, None)


def test_a_model_without_blocks_is_collapsed_by_its_graph() -> None:
    model, images = timm.create_model("test_resnet").eval(), torch.randn(2, 3, 32, 32)
    plain, report = deploy_form_of(model, images)
    assert not has_blocks(model)
    assert report is not None
    assert report.regions
    assert norms(plain) == 0 < norms(model)
    assert rb.verify(model, plain, images).passed


def test_what_was_expanded_is_contracted_and_then_collapsed() -> None:
    original, images = timm.create_model("test_resnet").eval(), torch.randn(2, 3, 32, 32)
    wide, _ = rb.expand(original, "acb")
    plain, report = deploy_form_of(wide.eval(), images)
    assert has_blocks(wide)
    assert not has_blocks(plain)
    assert report is not None
    assert rb.profile(plain, (3, 32, 32)) == rb.profile(rb.collapse(original, images).model, (3, 32, 32))
    assert rb.verify(wide, plain, images).passed


def test_batch_norms_beside_the_blocks_go_too() -> None:
    block = small_model().get_submodule("stem")
    model, images = nn.Sequential(block, nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).eval(), torch.randn(2, 1, 32, 32)
    plain, report = deploy_form_of(model, images)
    assert report is not None
    assert norms(plain) == 0
    assert rb.verify(model, plain, images).passed
