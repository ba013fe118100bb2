"""The smallest model of each family in every runtime, in both forms: torch.compile, torch.export and ONNX."""

import copy

import pytest
import torch
from models.families import SMALLEST_OF_EACH
from support import calibrate

import repblocks as rb
from repblocks.models.registry import FAMILIES
from repblocks.verification import verify

pytestmark = pytest.mark.slow
every_form = pytest.mark.parametrize("form", ["train", "deploy"])


def images(count=2):
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=SMALLEST_OF_EACH.values())
def trained(request):
    torch.manual_seed(0)
    return calibrate(rb.create_model(request.param, num_classes=5), images())


def in_form(model, form):
    return copy.deepcopy(model) if form == "train" else rb.deployed(model)


def test_every_family_is_here():
    assert set(SMALLEST_OF_EACH) == {family.__name__ for family in FAMILIES.values()}


@every_form
def test_torch_compile_gives_the_same(trained, form):
    torch.compiler.reset()
    model = in_form(trained, form)
    verify(model, torch.compile(model, backend="aot_eager", fullgraph=True), images()).raise_if_different("compiled")


@every_form
def test_torch_export_gives_the_same_for_other_batches(trained, form):
    model = in_form(trained, form)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    verify(model, program.module(), images(2)).raise_if_different("exported")


def test_onnx_and_safetensors_files_equal_the_train_form(trained, tmp_path):
    report = rb.export(trained, tmp_path, formats=("onnx", "safetensors"), inputs=images())
    assert all(equivalence.passed for equivalence in report.equivalence.values())


def test_inductor_trains_the_stem_that_could_crash():
    """On 3 channels it picks channels_last, where torch's strided 1x1 backward corrupts memory (see AlignedConv2d)."""
    torch.compiler.reset()
    torch.manual_seed(0)
    stem = rb.create_model("rb_mobileone_s0").stem.conv.double()
    x = images().double().requires_grad_()
    expected = torch.autograd.grad(copy.deepcopy(stem)(x).square().sum(), x)[0]
    got = torch.autograd.grad(torch.compile(stem)(x).square().sum(), x)[0]
    torch.testing.assert_close(got, expected)
