"""Whatever stands in the way of merging, the function survives: the parts are merged around it, or left alone."""

import copy
import pickle
from fnmatch import fnmatch

import graph.shape_hazards  # noqa: F401  # adds its networks to HAZARDS
import pytest
import torch
import torch.nn.functional as F
from fusion.modules import prepared
from graph.checks import assert_same_outputs, collapse_unbroken, cost, count_operators, pictures, run
from graph.code_hazards import Attributed
from graph.hazards import HAZARDS, Parallel, Three
from graph.user_nets import YoloRepConv, conv_bn
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from repblocks.graph.collapse import collapse
from repblocks.verification import verify


@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_breaks_nothing(name):
    case = HAZARDS[name]
    inputs, *others = case.cases()
    model = case.model()
    before = count_operators(case.model(), *inputs)
    outcome = collapse_unbroken(model, *inputs, others=others, fresh=copy.deepcopy)
    after = count_operators(copy.deepcopy(outcome.model), *inputs)
    assert after[0] <= (before[0] if case.convs is None else case.convs)
    assert after[1] <= (before[1] if case.norms is None else case.norms)


@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_costs_nothing(name):
    case = HAZARDS[name]
    inputs, _ = case.cases()
    result = collapse(case.model(), inputs[0] if len(inputs) == 1 else inputs).model
    (macs, params), (macs_after, params_after) = cost(case.model(), *inputs), cost(result, *inputs)
    assert macs_after <= macs
    assert params_after <= params


def with_reason(report, *words):
    """The reasons that hold all the words, in any case."""
    return [row for row in report.skipped if all(word in f"{row.name} {row.reason}".lower() for word in words)]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("shared_weight", "shares its weight"),
        ("conv_called_twice", "called"),
        ("norm_called_twice", "called"),
        ("weight_read_elsewhere", "weight"),
        ("intermediate_returned", "a"),
        ("batch_statistics_in_eval", "statistic"),
        ("data_dependent_branch", "trac"),
        ("source_changed_between_two_reads", "place"),
    ],
)
def test_what_is_left_alone_is_listed_with_the_reason(name, word):
    case = HAZARDS[name]
    report = collapse(case.model(), case.cases()[0][0]).report
    assert with_reason(report, word), str(report)


@pytest.mark.parametrize("name", ["counts_its_calls", "remembers_its_input"])
def test_what_a_forward_remembers_it_still_remembers(name):
    case = HAZARDS[name]
    (inputs, others), model = case.cases(), case.model()
    result = collapse(copy.deepcopy(model), *inputs).model
    for x in (*inputs, *others):
        assert_same_outputs(run(model, x), run(result, x))
        assert_same_outputs(remembered(model), remembered(result))


def remembered(model):
    kept = ("calls", "seen", "steps", "last")
    return {name: getattr(model, name) for name in kept if hasattr(model, name)}


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = conv_bn(8, 8, 3, 1, 1), YoloRepConv(8, 8), conv_bn(8, 4, 1)

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


PLACES = ["stem.conv", "stem.bn", "stem", "block", "block.rbr_1x1", "block.rbr_identity", "block.act", "head", ""]


@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_the_same_values_as_before(place):
    model, seen = prepared(Watched()), []
    hooked = model.get_submodule(place)
    hooked.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    hooked.register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    result = collapse(model, pictures()).model
    records = []
    for form in (model, result):
        seen.clear()
        output = run(form, pictures())
        records.append([*seen, output])
    assert len(records[0]) == 3
    assert_same_outputs(*records)


@pytest.mark.parametrize("place", PLACES)
def test_hooks_that_change_values_still_do(place):
    model = prepared(Watched())
    hooked = model.get_submodule(place)
    hooked.register_forward_pre_hook(lambda _, args: (torch.tanh(args[0]),))
    hooked.register_forward_hook(lambda _, args, kwargs, output: output.abs() - args[0].mean(), with_kwargs=True)
    collapse_unbroken(model, pictures(), others=[(pictures(5, (10, 21), 1),)])


def test_what_has_no_hooks_still_merges_beside_a_hooked_layer():
    model = prepared(Watched())
    model.head.conv.register_forward_hook(lambda *_: None)
    result, _ = collapse_unbroken(model, pictures())
    assert count_operators(result, pictures()) == (3, 1)


def old_weight_norm(conv):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(conv)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(-1)


def custom_parametrization(conv):
    parametrize.register_parametrization(conv, "weight", Doubled())
    return conv


@pytest.mark.parametrize("wrapped", ["a", "b"])
@pytest.mark.parametrize(
    "wrap",
    [
        old_weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        custom_parametrization,
    ],
    ids=lambda wrap: f"{wrap.__module__}.{wrap.__name__}",
)
def test_normalised_weights_keep_their_function(wrap, wrapped):
    model = prepared(Parallel())
    wrap(model.get_submodule(wrapped))
    collapse_unbroken(model.eval(), pictures(), others=[(pictures(5, (10, 21), 1),)])


def test_a_parametrized_weight_next_to_a_mergeable_block_stays_parametrized_or_becomes_plain():
    model = prepared(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), YoloRepConv(8, 8)))
    result, _ = collapse_unbroken(model, pictures())
    assert count_operators(result, pictures()) == (2, 0)


def test_weights_normalised_by_a_hook_keep_their_function_after_a_pass_with_gradients():
    """Then the weight is a result of autograd, which ``copy.deepcopy`` refuses."""
    model = prepared(Parallel())
    old_weight_norm(model.a)
    model(pictures()).sum().backward()
    collapse_unbroken(model, pictures())


class Zoo(nn.Module):
    """A class with a life of its own."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        self.stem, self.block = conv_bn(8, 8, 3, 1, 1), nn.Sequential(YoloRepConv(8, 8), Parallel())
        self.norm, self.mlp = nn.GroupNorm(2, 8), nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
        self.meta, self.stage_names = {"name": "zoo"}, ["stem", "block"]
        self.register_buffer("table", torch.arange(5), persistent=True)

    def forward_features(self, x):
        return self.norm(self.block(F.relu(self.stem(x))))

    def forward(self, x):
        return self.mlp(self.forward_features(x).mean((2, 3)))

    def describe(self):
        return f"{self.meta['name']} of {self.num_classes}"


def test_classes_methods_attributes_and_names_outside_the_regions_survive():
    model = prepared(Zoo())
    result, _ = collapse_unbroken(model, pictures(), others=[(pictures(5, (10, 21), 1),)])
    assert type(result) is Zoo
    assert result.describe() == "zoo of 4"
    assert (result.meta, result.stage_names) == (model.meta, model.stage_names)
    assert result.meta is not model.meta
    assert_same_outputs(run_features(model), run_features(result))
    kept, given = result.state_dict(), model.state_dict()
    outside = [key for key in given if key.startswith(("norm.", "mlp.", "table"))]
    assert len(outside) == 7
    assert all(torch.equal(kept[key], given[key]) for key in outside)


def test_copies_of_the_result_keep_attributes_and_methods():
    model = prepared(nn.Sequential(Attributed(), conv_bn(8, 4, 1)))
    result = collapse(model, pictures()).model
    for form in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert vars(form[0]).keys() == vars(result[0]).keys()
        assert_same_outputs(run(model, pictures()), run(form, pictures()))


def run_features(model):
    with torch.no_grad():
        return model.forward_features(pictures())


def test_only_a_part_becomes_generic_where_its_code_is_functional():
    result, _ = collapse(prepared(Zoo()), pictures())
    assert type(result.mlp) is nn.Sequential
    assert type(result.norm) is nn.GroupNorm
    assert count_operators(result, pictures()) == (5, 0)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("block*", (3, 2)),
        (["block", "block.*"], (3, 2)),
        (["head*", "stem*"], (4, 3)),
        (lambda name, module: fnmatch(name, "head*"), (4, 4)),
        (None, (3, 0)),
        ("*", (3, 0)),
    ],
)
def test_where_limits_the_collapse_to_named_parts(where, expected):
    model = prepared(Watched())
    result, report = collapse_unbroken(model, pictures(), where=where)
    assert count_operators(model, pictures()) == (4, 5)
    assert count_operators(result, pictures()) == expected
    assert report.regions
    if expected == (3, 2):
        kept = {key for key in model.state_dict() if not key.startswith("block")}
        assert {key for key in result.state_dict() if not key.startswith("block")} == kept


def test_a_frozen_model_stays_frozen_and_a_trainable_one_trainable():
    for trainable in (True, False):
        model = prepared(Watched()).requires_grad_(trainable)
        flags = {parameter.requires_grad for parameter in collapse(model, pictures()).model.parameters()}
        assert flags == {trainable}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_result_does_not_depend_on_the_gradient_mode_around_the_collapse(context):
    model = prepared(Watched())
    with context():
        result, _ = collapse(model, pictures())
    assert not any(parameter.is_inference() for parameter in result.parameters())
    result(pictures()).sum().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())
    verify(model, result, pictures()).raise_if_different("the collapsed model")


def test_gradients_and_optimisers_of_the_model_are_left_alone():
    model = prepared(Watched())
    model(pictures()).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = {name: grad.clone() for name, grad in grads.items()}
    result, _ = collapse(model, pictures())
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(grad, values[name]) for name, grad in grads.items())
    assert count_operators(result, pictures()) == (3, 0)


def test_gradients_flow_through_the_result_as_through_the_model():
    model = prepared(Watched())
    result, _ = collapse(model, pictures())
    sources = [pictures().requires_grad_() for _ in range(2)]
    for form, source in zip((model, result), sources, strict=True):
        form(source).square().sum().backward()
    assert_same_outputs(*(source.grad for source in sources))


def test_a_model_of_two_inputs_takes_its_examples_as_a_tuple():
    case = HAZARDS["two_inputs"]
    model, examples = case.model(), case.cases()[0]
    result, _ = collapse(model, examples)
    assert_same_outputs(run(model, *examples), run(result, *examples))
    with torch.no_grad():
        x, y = examples
        assert_same_outputs(model(x, y=y, gain=2.0), result(x, y=y))
        assert_same_outputs(model(y=y, x=x), result(y=y, x=x))


class OfAList(Three):
    def forward(self, images):
        return [self.bn(self.a(image)) + self.b(image) for image in images]


def test_a_model_of_a_list_of_tensors_takes_the_list_inside_a_tuple():
    images = [pictures(), pictures(5, (10, 21), 1)]
    model = prepared(OfAList())
    result, _ = collapse(model, (images,))
    assert_same_outputs(run(model, images), run(result, images))


def test_a_collapsed_model_collapses_inside_another():
    inner, _ = collapse(prepared(Zoo()), pictures())
    outer = nn.Sequential(prepared(conv_bn(8, 8, 3, 1, 1)), inner)
    result, _ = collapse_unbroken(outer, pictures())
    assert count_operators(result, pictures()) == (6, 0)


def test_a_graph_module_collapses_as_well():
    model = torch.fx.symbolic_trace(prepared(Parallel()))
    result, _ = collapse_unbroken(model, pictures())
    assert count_operators(result, pictures()) == (1, 0)


def test_one_layer_alone_comes_back_as_it_is():
    for layer in (nn.Conv2d(8, 4, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Identity(), nn.Sequential()):
        model = prepared(layer)
        result, report = collapse_unbroken(model, pictures())
        assert not report.regions
        assert type(result) is type(model)
        assert list(result.state_dict()) == list(model.state_dict())


def test_a_channels_last_model_keeps_its_function():
    model = prepared(Watched()).to(memory_format=torch.channels_last)
    collapse_unbroken(model, pictures().to(memory_format=torch.channels_last))


class NamesItsLayers(nn.Module):
    """Every layer is reached through ``getattr`` by a name made in the forward."""

    def __init__(self):
        super().__init__()
        for at in range(2):
            setattr(self, f"conv{at}", nn.Conv2d(8, 8, 3, padding=1))
            setattr(self, f"bn{at}", nn.BatchNorm2d(8))

    def forward(self, x):
        for at in range(2):
            x = F.relu(getattr(self, f"bn{at}")(getattr(self, f"conv{at}")(x)))
        return [x, *(name for name, _ in self.named_children())]


def test_code_that_lists_its_children_gets_the_same_names():
    collapse_unbroken(prepared(NamesItsLayers()), pictures())
