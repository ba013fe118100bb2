"""Networks that no one prepared collapse into the same function with less in it."""

import copy
import functools
import io
import json

import graph.chain_user_nets
import graph.odd_user_nets  # noqa: F401  # these add their networks to NETS
import onnx
import onnxruntime
import pytest
import torch
from graph.checks import assert_unchanged, cost, count_operators, snapshot
from graph.user_nets import NETS
from torch import nn
from torch.utils import _pytree as pytree

from repblocks.graph.collapse import collapse
from repblocks.profiling import profile
from repblocks.verification import TOLERANCES, verify

TOLERANCE = TOLERANCES[torch.float64]["model"]
every_net = pytest.mark.parametrize("name", NETS)


@functools.cache
def collapsed(name):
    """The network, what became of it, and the report."""
    net = NETS[name]
    model = net.model()
    result, report = collapse(model, net.inputs())
    return model, result, report


def tensors_of(model):
    return [*model.parameters(), *model.buffers()]


@every_net
def test_the_outputs_stay_the_same(name):
    model, result, _ = collapsed(name)
    verify(model, result, NETS[name].inputs()).raise_if_different(name)


@every_net
def test_the_outputs_stay_the_same_at_another_size_and_batch(name):
    model, result, _ = collapsed(name)
    verify(model, result, NETS[name].other_inputs()).raise_if_different(name)
    verify(model, result, NETS[name].other_inputs()[:1]).raise_if_different(name)


@every_net
def test_single_precision_stays_within_its_own_rule(name):
    net = NETS[name]
    model, x = net.model().float(), net.inputs().float()
    result, report = collapse(model, x)
    verify(model, result, net.other_inputs().float()).raise_if_different(name)
    assert {parameter.dtype for parameter in result.parameters()} <= {torch.float32}
    assert all(row.error <= TOLERANCES[torch.float32]["model"] for row in report.regions)


@every_net
def test_what_is_left_runs_as_few_convolutions_and_norms_as_possible(name):
    net, (_, result, _) = NETS[name], collapsed(name)
    assert count_operators(result, net.inputs()) == (net.convs, net.norms)


@every_net
def test_every_layer_is_in_eval_mode(name):
    assert not any(module.training for module in collapsed(name)[1].modules())


@every_net
@pytest.mark.parametrize("size", ["shape", "other"])
def test_neither_macs_nor_parameters_grow(name, size):
    model, result, _ = collapsed(name)
    before, after = (profile(form, getattr(NETS[name], size)) for form in (model, result))
    assert after.macs <= before.macs
    assert after.params <= before.params


@every_net
def test_the_report_adds_up_to_what_was_saved(name):
    model, result, report = collapsed(name)
    (macs, params), (macs_after, params_after) = (cost(form, NETS[name].inputs()) for form in (model, result))
    assert sum(row.macs_before - row.macs_after for row in report.regions) == macs - macs_after
    # A parameter that several regions read counts in each of them.
    assert sum(row.params_before - row.params_after for row in report.regions) >= params - params_after


@every_net
def test_every_region_of_the_report_is_exact_and_no_dearer(name):
    model, result, report = collapsed(name)
    names = dict(model.named_modules())
    for row in report.regions:
        assert 0 <= row.error <= TOLERANCE
        assert row.macs_after <= row.macs_before
        assert row.params_after <= row.params_before
        assert row.result
        assert isinstance(row.result, str)
        layers = [module for module in row.modules if module in names]
        assert layers or type(result) is not type(model)
    assert all(row.reason for row in report.skipped)


@every_net
def test_the_report_reads_as_text_and_as_json(name):
    *_, report = collapsed(name)
    text, fields = str(report), json.loads(json.dumps(report.to_dict(), allow_nan=False))
    for kind in ("regions", "skipped"):
        rows = getattr(report, kind)
        assert [row["name"] for row in fields[kind]] == [row.name for row in rows]
        assert all(row.name in text for row in rows)
    assert all(row.reason in text for row in report.skipped)


@every_net
def test_collapsing_leaves_the_network_untouched(name):
    net = NETS[name]
    model, x = net.model(), net.inputs()
    expected, given = model(x), x.clone()
    before, state = snapshot(model), torch.get_rng_state()
    grad_enabled = torch.is_grad_enabled()
    collapse(model, x)
    assert_unchanged(model, before)
    assert torch.equal(x, given)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled() == grad_enabled
    same = zip(pytree.tree_leaves(expected), pytree.tree_leaves(model(x)), strict=True)
    assert all(torch.equal(old, new) for old, new in same)


@every_net
def test_the_result_is_a_model_of_its_own_in_eval_mode(name):
    model, result, _ = collapsed(name)
    assert not any(module.training for module in result.modules())
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(model)}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors_of(result)}
    assert not {*map(id, model.modules())} & {*map(id, result.modules())}
    assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in result.parameters())


@every_net
def test_collapsing_again_changes_nothing(name):
    _, result, _ = collapsed(name)
    again, report = collapse(result, NETS[name].inputs())
    assert report.regions == [] or report.regions == ()
    assert list(again.state_dict()) == list(result.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in result.state_dict().items())
    assert count_operators(again, NETS[name].inputs()) == count_operators(result, NETS[name].inputs())


@every_net
def test_a_copy_takes_the_weights_of_the_result(name):
    _, result, _ = collapsed(name)
    duplicate = copy.deepcopy(result)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    stored = io.BytesIO()
    torch.save(result.state_dict(), stored)
    stored.seek(0)
    duplicate.load_state_dict(torch.load(stored), strict=True)
    verify(result, duplicate, NETS[name].inputs()).raise_if_different(name)


@every_net
def test_the_result_holds_no_module_or_parameter_that_it_does_not_run(name):
    _, result, _ = collapsed(name)
    outputs = pytree.tree_leaves(result(NETS[name].inputs().requires_grad_()))
    used = [parameter for parameter in result.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad([output.sum() for output in outputs], used, allow_unused=True)
    assert not [grad for grad in grads if grad is None]


EDITED = (
    "diverse_branches",
    "yolo",
    "asymmetric",
    "activated_residuals",
    "inception",
    "separable",
    "inverted_bottleneck",
    "depthwise_beside_dense",
    "wide_chain",
    "narrow_chain",
    "padded_unevenly",
    "perceptron",
    "token_mlp",
    "waves",
    "norm_behind_global_pooling",
    "norm_behind_the_mean",
    "two_heads",
    "ghosts",
    "squeeze_excited",
    "timm_like",
    "reflected",
)


@pytest.mark.parametrize("name", EDITED)
def test_a_network_keeps_its_class_where_only_modules_change(name):
    model, result, _ = collapsed(name)
    assert type(result) is type(model)


EXPORTED = ("diverse_branches", "functional", "split_halves", "token_mlp", "channels_last_scale", "two_heads")


@pytest.mark.parametrize("name", EXPORTED)
def test_the_result_goes_through_torch_export(name):
    model, result, _ = collapsed(name)
    x = NETS[name].inputs()
    program = torch.export.export(result, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    verify(model, program.module(), x).raise_if_different(name)


@pytest.mark.parametrize("name", ["yolo", "partial_conv"])
def test_the_result_goes_through_onnx(name, tmp_path):
    model, result, _ = collapsed(name)
    single, path = copy.deepcopy(result).float(), tmp_path / "net.onnx"
    x = NETS[name].inputs().float()
    torch.onnx.export(single, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    single_model = copy.deepcopy(model).float()
    run = functools.partial(run_onnx, session)
    verify(single_model, run, x).raise_if_different(name)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert (kinds.count("Conv"), kinds.count("BatchNormalization")) == (NETS[name].convs, 0)


def run_onnx(session, images):
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])
