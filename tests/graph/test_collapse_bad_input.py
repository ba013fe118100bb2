"""What cannot be collapsed is refused, saying what was got, what is needed and what to do; nothing is changed."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from fusion.modules import prepared
from graph.checks import assert_same_outputs, assert_unchanged, run, snapshot
from graph.hazards import Three
from graph.user_nets import YoloRepConv, conv_bn
from strategies import randn
from torch import nn

from repblocks.errors import ConfigurationError, FoldError, VerificationError
from repblocks.graph.collapse import collapse


class Plain(Three):
    def forward(self, x):
        return F.relu(self.bn(self.a(x)) + self.b(x))


def pictures(count=3, dtype=torch.float64):
    return randn(0, count, 8, 13, 17).to(dtype)


def refused(error, match, model, *args, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=match) as info:
        collapse(model, *args, **kwargs)
    assert_unchanged(model, before)
    return str(info.value)


@pytest.mark.parametrize("part", ["", "bn"])
def test_batch_norm_in_training_mode_is_refused_and_named(part):
    model = prepared(Plain())
    model.get_submodule(part).train()
    message = refused((ConfigurationError, VerificationError), "train", model, pictures())
    assert "eval()" in message
    assert "bn" in message


def test_a_model_in_training_mode_without_batch_norm_or_chance_is_not_refused():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1)).double().train()
    result, _ = collapse(model, pictures())
    assert model.training
    assert not result.training


def test_no_example_input_is_refused():
    message = refused(ConfigurationError, "example_input", prepared(Plain()), None)
    assert "None" in message


@pytest.mark.parametrize("example", [(8, 13, 17), "image", 3, [1, 2], {"x": 1}, ()], ids=repr)
def test_an_example_that_is_no_tensor_is_refused(example):
    refused(ConfigurationError, "example_input", prepared(Plain()), example)


@pytest.mark.parametrize(
    "example",
    [
        randn(0, 3, 5, 13, 17),
        randn(0, 8),
        randn(0, 3, 8, 1, 1)[:, :, :0],
        pictures(dtype=torch.float32),
        pictures()[:0],
    ],
    ids=["channels", "rank", "no rows", "dtype", "no images"],
)
def test_an_example_that_the_model_does_not_take_is_refused(example):
    refused((ConfigurationError, VerificationError), "example_input|no inputs", prepared(Plain()), example)


def test_an_example_on_another_device_is_refused():
    refused(ConfigurationError, "meta", prepared(Plain()), pictures().to("meta"))


def test_too_many_examples_are_refused():
    refused(ConfigurationError, "example_input", prepared(Plain()), (pictures(), pictures()))


class Noisy(Plain):
    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x):
        return super().forward(self.noise(x))


NOISES = {
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "dropout of channels": lambda x: F.dropout2d(x, 0.5, training=True),
    "randn": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "rand_like": lambda x: x * torch.rand_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "in place": lambda x: x + torch.empty_like(x).uniform_(),
    "permutation": lambda x: x[:, torch.randperm(8)],
}


@pytest.mark.parametrize("noise", NOISES)
def test_a_model_that_draws_random_numbers_in_eval_is_refused(noise):
    message = refused((ConfigurationError, VerificationError), "random", prepared(Noisy(NOISES[noise])), pictures())
    assert len(message) > 40


def test_a_part_that_drops_at_random_in_training_mode_is_collapsed_as_in_eval_mode():
    model = prepared(nn.Sequential(nn.Dropout(0.5), Plain()))
    model[0].train()
    result, _ = collapse(model, pictures())
    assert model[0].training
    assert_same_outputs(run(copy.deepcopy(model).eval(), pictures()), run(result, pictures()))


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, pictures())])
def test_scripted_models_are_refused(make):
    with pytest.warns(FutureWarning, match=r"torch.jit"):
        model = make(prepared(conv_bn(8, 8, 3)))
    with pytest.raises(ConfigurationError, match=r"(?i)script"):
        collapse(model, pictures())


def test_a_model_with_a_scripted_part_is_refused_and_the_part_named():
    with pytest.warns(FutureWarning, match=r"torch.jit"):
        scripted = torch.jit.script(prepared(conv_bn(8, 8, 3)))
    with pytest.raises(ConfigurationError, match=r"^1 is scripted"):
        collapse(nn.Sequential(prepared(Plain()), scripted), pictures())


def test_a_compiled_model_is_refused():
    """The model inside collapses; compile the result."""
    with pytest.raises(ConfigurationError, match=r"compile"):
        collapse(torch.compile(prepared(Plain()), backend="eager"), pictures())


def test_an_exported_program_is_refused():
    program = torch.export.export(prepared(Plain()), (pictures(),))
    with pytest.raises(ConfigurationError, match=r"nn\.Module"):
        collapse(program, pictures())


@pytest.mark.parametrize(
    "model", [None, "resnet18", F.relu, nn.Conv2d, {"a": 1}, torch.zeros(3)], ids=lambda given: type(given).__name__
)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ConfigurationError, match=r"nn\.Module"):
        collapse(model, pictures())


def test_models_on_the_meta_device_are_refused():
    message = refused(ConfigurationError, "meta", Plain().double().eval().to("meta"), pictures())
    assert "to_empty" in message or "load" in message


def test_a_model_partly_on_the_meta_device_is_refused_and_the_part_named():
    model = prepared(Plain())
    model.b.to("meta")
    refused(ConfigurationError, "^b .*meta", model, pictures())


def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)).eval()


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_without_weights_are_refused():
    with pytest.raises(ConfigurationError, match=r"no weights yet"):
        collapse(lazy(), pictures(dtype=torch.float32))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a.weight", "b.bias", "bn.running_mean", "bn.weight"])
def test_a_region_of_weights_that_are_not_finite_is_refused_and_named(where, number):
    model = prepared(nn.Sequential(YoloRepConv(8, 8), Plain()))
    with torch.no_grad():
        model.state_dict()[f"1.{where}"].view(-1)[0] = number
    message = refused((FoldError, VerificationError), "finite", model, pictures())
    assert "1" in message


def test_a_region_that_overflows_its_precision_is_refused_and_named():
    model = prepared(nn.Sequential(nn.ReLU(), conv_bn(8, 8, 1))).half()
    with torch.no_grad():
        model[1].conv.weight.fill_(1e-2)
        model[1].bn.running_mean.zero_()
        model[1].bn.running_var.zero_()
        model[1].bn.weight.fill_(6e4)
    x = 1e-5 * pictures(dtype=torch.float16)
    assert model(x).isfinite().all()
    assert "1" in refused((FoldError, VerificationError), "finite", model, x)


@pytest.mark.parametrize("where", ["nothing.*", ["stem", "nothing.*"], lambda name, module: False])
def test_a_where_that_matches_nothing_is_refused(where):
    model = prepared(nn.Sequential())
    model.add_module("stem", prepared(conv_bn(8, 8, 3)))
    message = refused(ConfigurationError, "where", model, pictures(), where=where)
    if not callable(where):
        assert "nothing.*" in message


@pytest.mark.parametrize("where", [3, [3], ["stem", None], ()], ids=repr)
def test_a_where_that_is_neither_globs_nor_a_predicate_is_refused(where):
    refused(ConfigurationError, "where", prepared(Plain()), pictures(), where=where)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), "small"])
def test_a_tolerance_that_is_no_number_above_zero_is_refused(tolerance):
    refused(ConfigurationError, "tolerance", prepared(Plain()), pictures(), tolerance=tolerance)


def test_a_tolerance_that_rounding_exceeds_raises_and_names_the_region():
    model = prepared(nn.Sequential(nn.ReLU(), Plain()))
    message = refused(VerificationError, "tolerance|counts as equal", model, pictures(), tolerance=1e-30)
    assert "1" in message


class MovingAverage(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(1, 8, 1, 1))

    def forward(self, x):
        self.average.mul_(0.9).add_(0.1 * x.mean((0, 2, 3), keepdim=True))
        return super().forward(x) * self.average


class CountedCalls(Plain):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("cls", [MovingAverage, CountedCalls])
def test_a_model_whose_answers_depend_on_earlier_calls_is_refused(cls):
    refused(ConfigurationError, "another output for the same input", prepared(cls()), pictures())


class Locked(Plain):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_refused():
    refused(ConfigurationError, r"cop(y|ied)", prepared(Locked()), pictures())


class Failing(Plain):
    def forward(self, x):
        raise KeyError("weights of the neck")


def test_the_error_of_a_model_that_fails_by_itself_is_passed_on():
    refused(ConfigurationError, "weights of the neck", prepared(Failing()), pictures())


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
def test_quantized_models_are_refused():
    model = quantized(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval())
    with pytest.raises(ConfigurationError, match="quanti"):
        collapse(model, torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.filterwarnings("ignore")
def test_statically_quantized_models_are_refused():
    layers = torch.ao.quantization.QuantStub(), nn.Conv2d(8, 8, 3), nn.ReLU(), torch.ao.quantization.DeQuantStub()
    model = nn.Sequential(*layers).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    prepared_model = torch.ao.quantization.prepare(model)
    prepared_model(pictures(dtype=torch.float32))
    with pytest.raises(ConfigurationError, match="quanti"):
        collapse(torch.ao.quantization.convert(prepared_model), pictures(dtype=torch.float32))
