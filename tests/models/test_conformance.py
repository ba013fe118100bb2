"""One suite for every model of the zoo: timm's contract, and the exact collapse."""

import copy
import json
from dataclasses import dataclass
from functools import cached_property

import pytest
import timm
import torch
from models.families import SLIM, SMALLEST_OF_EACH, WITHOUT_IDENTITY
from support import calibrate
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from repblocks.blocks.base import deployed, form_of, switch_to_deploy
from repblocks.conformance import border_of, check_block, form_error
from repblocks.models import create_model, list_models
from repblocks.verification import TOLERANCES, verify

ZOO = list_models()
SMALLEST = ["rb_repvgg_cifar", "rb_repnext_cifar"]
SIZE = (64, 96)
SLOW = pytest.mark.slow
# Half precision is slow on a CPU: of each family the members of up to 30 million parameters.
_LARGE_REPVGG = ("rb_repvgg_b1*", "rb_repvgg_b2*", "rb_repvgg_b3*", "rb_repvgg_d2se")
HEAVY = (*_LARGE_REPVGG, "rb_repnext_u3_small", "rb_repnext_u3_base")
LIGHT = list_models("rb_*", exclude_filters=list(HEAVY))
HEAVIEST = {"rb_repnext_u3_small", "rb_repnext_u3_base", "rb_repvgg_b3", "rb_repvgg_d2se"}


def skeleton(name: str, **kwargs) -> nn.Module:
    """The model without memory for its weights: shapes, names and structure."""
    with torch.device("meta"):
        return create_model(name, **kwargs)


def meta_images(channels: int = 3) -> Tensor:
    return torch.empty(2, channels, *SIZE, device="meta")


def shapes(tensors) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def feature_shapes(info, size=SIZE) -> list[tuple[int, ...]]:
    return [
        (2, channels, *(n // reduction for n in size))
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]


# 48 blocks with squeeze-and-excitation under random statistics amplify rounding 1e4-fold; a few fold in the same way.
SHORTENED = {"rb_repvgg_d2se": {"depths": (2, 3, 4, 1)}}


@dataclass
class BothForms:
    name: str
    arguments: dict
    train: nn.Module
    deploy: nn.Module
    images: Tensor

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"train": self.train(self.images), "deploy": self.deploy(self.images)}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW) if name in HEAVIEST else name for name in ZOO])
def both_forms(request) -> BothForms:
    """A model in float64 with the statistics of a trained one, and its collapsed copy."""
    torch.manual_seed(0)
    # Fewer pixels than channels would give statistics under which deep networks grow without measure.
    images = torch.randn(16, 3, 32, 64, dtype=torch.float64)
    arguments = {"num_classes": 10, **SHORTENED.get(request.param, {})}
    model = create_model(request.param, **arguments).double()
    calibrate(model, images)
    return BothForms(request.param, arguments, model.eval(), deployed(model), images[:2])


def test_deploy_form_equals_eval_form(both_forms):
    verify(both_forms.train, both_forms.deploy, both_forms.images).raise_if_different("the deploy form")


def test_deploy_form_equals_eval_form_in_float32(both_forms):
    error = form_error(both_forms.train, both_forms.images, torch.float32, scope="model")
    assert error.passed, error


@pytest.fixture(scope="module", params=LIGHT)
def light(request) -> tuple[nn.Module, Tensor]:
    """A model in float64 with the statistics of a trained one, and its images."""
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32, dtype=torch.float64)  # the rule compares maxima: on a few it fails by chance
    model = create_model(request.param, num_classes=10, **SLIM.get(request.param, {}))
    return calibrate(model.double(), images), images


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_deploy_form_is_no_worse_than_twice_the_train_form_in_half_precision(light, dtype):
    error = form_error(*light, dtype, scope="model")
    assert error.passed, error


@torch.no_grad()
def test_border_and_interior_of_every_feature_map_are_equal(both_forms):
    maps = [form.forward_intermediates(both_forms.images)[1] for form in (both_forms.train, both_forms.deploy)]
    tolerance = TOLERANCES[torch.float64]["model"]
    for expected, got in zip(*maps, strict=True):
        border = border_of(both_forms.train, (), expected)
        error = (got - expected).abs().amax((0, 1)) / expected.abs().max()
        assert error[border].max() <= tolerance
        assert error[~border].numel() == 0 or error[~border].max() <= tolerance
    assert (~border_of(both_forms.train, (), maps[0][0])).any()


def test_deploy_form_holds_nothing_of_the_training_form(both_forms):
    leftovers = (nn.BatchNorm2d, nn.Identity, nn.Dropout, timm.layers.DropPath)
    for path, module in both_forms.deploy.named_modules():
        assert not isinstance(module, leftovers), path
        containers = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        assert not containers or list(module.children()), path
    assert form_of(both_forms.train) == "train"
    assert form_of(both_forms.deploy) == "deploy"


def test_switching_twice_changes_nothing(both_forms):
    before = dict(both_forms.deploy.state_dict())
    switch_to_deploy(both_forms.deploy)
    after = both_forms.deploy.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] or torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def test_weights_of_either_form_load_into_a_new_model_of_that_form(both_forms):
    for form, source in (("train", both_forms.train), ("deploy", both_forms.deploy)):
        with torch.device("meta"):
            model = create_model(both_forms.name, form=form, **both_forms.arguments)
        model.load_state_dict(source.state_dict(), assign=True)
        torch.testing.assert_close(model.eval()(both_forms.images), both_forms.outputs[form], rtol=0, atol=0)


@pytest.fixture(scope="module", params=ZOO)
def outline(request) -> nn.Module:
    """A model of default arguments without memory for its weights; tests copy it before they change it."""
    return skeleton(request.param)


def test_default_config_names_layers_of_the_training_form(outline):
    config = outline.default_cfg
    assert config is outline.pretrained_cfg
    for path in paths(config["classifier"]):
        assert outline.get_submodule(path) in outline.get_classifier().modules()
        assert outline.get_submodule(path).out_features == outline.num_classes
    for path in paths(config["first_conv"]):
        assert outline.get_submodule(path).in_channels == config["input_size"][0]
    assert outline.get_classifier().out_features == outline.num_classes == config["num_classes"]
    assert tuple(n // outline.feature_info[-1]["reduction"] for n in config["input_size"][1:]) == config["pool_size"]


def paths(named: str | tuple[str, ...]) -> tuple[str, ...]:
    return (named,) if isinstance(named, str) else named


def test_timm_resolves_the_preprocessing(outline):
    data = resolve_model_data_config(outline)
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        assert data[key] == outline.default_cfg[key]


def test_forward_is_features_then_head(outline):
    features = outline.forward_features(meta_images())
    assert tuple(features.shape) == (2, outline.num_features, *grid(outline))
    assert outline.forward_head(features, pre_logits=True).shape == (2, outline.head_hidden_size)
    assert outline.forward_head(features).shape == outline(meta_images()).shape == (2, outline.num_classes)


def test_classifier_and_pooling_can_be_replaced(outline):
    model = copy.deepcopy(outline)
    width = model.head_hidden_size
    features = torch.empty(2, model.num_features, 3, 4, device="meta")
    other, factor = richest_pooling(model)
    for classes, pool, pooled in ((5, None, width), (6, other, factor * width), (7, "max", width)):
        model.reset_classifier(classes, pool)
        assert model.num_classes == model.get_classifier().out_features == model.model_args["num_classes"] == classes
        assert model.head_hidden_size == pooled
        assert model.forward_head(features).shape == (2, classes)
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, width)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == (2, width, 3, 4)
    assert model.model_args["global_pool"] == ""


def richest_pooling(model: nn.Module) -> tuple[str, int]:
    """A pooling other than the default, and by how much it widens the map, which a neck does not allow."""
    return ("catavgmax", 2) if model.head.neck is None else ("avgmax", 1)


def test_parameters_are_grouped_from_stem_to_head(outline):
    for coarse in (False, True):
        layers = group_parameters(outline, outline.group_matcher(coarse=coarse), reverse=True)
        assert layers.keys() == dict(outline.named_parameters()).keys()
        assert {layer for key, layer in layers.items() if key.startswith("stem.")} == {0}
        last = max(layers.values())
        assert {key.split(".")[0] for key, layer in layers.items() if layer == last} == {"head"}
        blocks = len(outline.stages) if coarse else sum(map(is_block, dict(outline.named_modules())))
        assert last == blocks + 1
    rates = {group["lr_scale"] for group in param_groups_layer_decay(outline, layer_decay=0.9)}
    assert len(rates) == sum(map(is_block, dict(outline.named_modules()))) + 2


def is_block(path: str) -> bool:
    """Whether it is ``stages.i.j``."""
    parts = path.split(".")
    return len(parts) == 3 and parts[0] == "stages" and parts[2].isdecimal()


def grid(model: nn.Module) -> tuple[int, ...]:
    return tuple(n // model.feature_info[-1]["reduction"] for n in SIZE)


def test_arguments_of_timms_contract_are_taken_and_noted(outline):
    pool, factor = richest_pooling(outline)
    arguments = {
        **WITHOUT_IDENTITY.get(outline.model_name, {}),
        "num_classes": 7,
        "in_chans": 1,
        "global_pool": pool,
        "output_stride": 8,
        "drop_rate": 0.1,
        "drop_path_rate": 0.2,
    }
    model = skeleton(outline.model_name, **arguments)
    assert model.model_name == outline.model_name
    assert model.model_args == arguments
    assert model.in_chans == 1
    assert model.drop_rate == 0.1
    assert model.feature_info[-1]["reduction"] == min(8, outline.feature_info[-1]["reduction"])
    assert model.forward_features(meta_images(1)).shape[2:] == grid(model)
    assert model.get_classifier().in_features == model.head_hidden_size == factor * outline.head_hidden_size
    assert model.get_classifier().out_features == 7
    again = skeleton(model.model_name, **json.loads(json.dumps(model.model_args)))
    assert shapes(again.state_dict().values()) == shapes(model.state_dict().values())


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_timm_makes_a_feature_backbone(name, form):
    model = skeleton(name, form=form, features_only=True)
    assert shapes(model(meta_images())) == feature_shapes(model.feature_info)
    assert form_of(model) == form
    reductions = model.feature_info.reduction()
    assert reductions == sorted(set(reductions))


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("indices", [(0, 2), (1,), (-1,)])
def test_every_way_of_extracting_features_gives_the_same(name, form, indices):
    plain = create_model(name, form=form).eval()
    images = torch.randn(1, 3, 32, 48)
    expected = plain.forward_intermediates(images, indices=list(indices), intermediates_only=True)
    for feature_cls in ("list", "hook", "getter"):
        model = create_model(name, form=form, features_only=True, feature_cls=feature_cls, out_indices=indices).eval()
        own = plain.state_dict()
        model.load_state_dict({key: own[owner(key)] for key in model.state_dict()})
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


def owner(key: str) -> str:
    """The key in the whole model of a key in timm's wrapper, which flattens ``stages.0`` to ``stages_0``."""
    return key.removeprefix("model.").replace("stages_", "stages.")


@pytest.mark.parametrize("name", ["rb_repvgg_a0", "rb_repnext_u3_tiny"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dilation_takes_the_place_of_strides_beyond_the_output_stride(name, output_stride):
    plain, dilated = skeleton(name), skeleton(name, output_stride=output_stride)
    assert [info["reduction"] for info in dilated.feature_info] == [
        min(info["reduction"], output_stride) for info in plain.feature_info
    ]
    assert tuple(dilated.forward_features(meta_images()).shape[2:]) == tuple(n // output_stride for n in SIZE)
    assert shapes(dilated.state_dict().values()) == shapes(plain.state_dict().values())


@pytest.mark.parametrize("name", sorted(SMALLEST_OF_EACH.values()))
def test_the_smallest_of_each_family_keeps_every_promise_of_a_block(name):
    torch.manual_seed(0)
    images = torch.randn(17, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    check_block(create_model(name, num_classes=5, **SLIM.get(name, {})), images, scope="model").raise_if_failed()


@pytest.mark.parametrize("name", SMALLEST)
def test_gradients_reach_every_parameter(name):
    model = create_model(name).double()
    model(torch.randn(2, 3, 32, 48, dtype=torch.float64)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_checkpointing_recomputes_the_blocks_and_changes_nothing(name, form):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    plain = create_model(name, form=form).double()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    runs = count_block_runs(checkpointed)
    for model in (plain, checkpointed):
        model(images).square().sum().backward()
    blocks = sum(len(stage) for stage in checkpointed.stages)
    assert len(runs) == 2 * blocks
    for key, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(key).grad, rtol=1e-9, atol=1e-12)
    for key, buffer in checkpointed.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(key), rtol=0, atol=0, msg=key)


def count_block_runs(model: nn.Module) -> list[nn.Module]:
    runs = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_pre_hook(lambda module, args: runs.append(module))
    return runs


@pytest.mark.parametrize("name", SMALLEST)
def test_checkpointing_can_be_switched_off_again(name):
    model = create_model(name)
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    runs = count_block_runs(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(runs) == sum(len(stage) for stage in model.stages)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_intermediates_are_the_features(name, form):
    model = create_model(name, form=form).eval()
    images = torch.randn(1, 3, 32, 48)
    last, maps = model.forward_intermediates(images)
    torch.testing.assert_close(last, model.forward_features(images))
    torch.testing.assert_close(maps[-1], last)
    assert shapes(maps) == [
        (1, info["num_chs"], 32 // info["reduction"], 48 // info["reduction"]) for info in model.feature_info
    ]
    early, some = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    torch.testing.assert_close(some, maps[:2])
    torch.testing.assert_close(early, maps[1])
    torch.testing.assert_close(model.forward_intermediates(images, indices=1, intermediates_only=True), maps[-1:])


@pytest.mark.parametrize("name", SMALLEST)
def test_deep_copies_are_independent_and_equal(name):
    model = create_model(name).eval()
    images = torch.randn(1, 3, 32, 48)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(images), model(images), rtol=0, atol=0)
    copied.reset_classifier(2)
    assert model.num_classes == 10
    assert copied.model_args["num_classes"] == 2
    assert model.model_args["num_classes"] == 10


@pytest.mark.parametrize("name", SMALLEST)
def test_dropout_acts_before_the_classifier_in_training_only(name):
    model = create_model(name, drop_rate=0.5)
    features = torch.ones(4, model.num_features, 1, 1)
    assert set(model.forward_head(features, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert set(model.eval().forward_head(features, pre_logits=True).unique().tolist()) == {1.0}


@pytest.mark.parametrize("name", SMALLEST)
def test_new_deploy_form_gives_signals_of_the_training_forms_size(name):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    train = create_model(name).eval()(images)
    deploy = create_model(name, form="deploy").eval()(images)
    assert 0.3 < deploy.std() / train.std() < 3


@pytest.mark.parametrize("name", SMALLEST)
def test_replaced_classifier_follows_the_model(name):
    model = create_model(name).to(torch.bfloat16).eval()
    model.reset_classifier(3)
    assert not model.get_classifier().training
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
