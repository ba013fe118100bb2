import copy

import pytest
import torch
from support import randomise_batch_norms
from torch import nn

import repblocks as rb
from repblocks.blocks import NormLinear
from repblocks.errors import CheckpointError, ConfigurationError
from repblocks.verification import TOLERANCES

HEADS = (1, 2)
every_count = pytest.mark.parametrize("heads", HEADS)


def trained(heads: int) -> NormLinear:
    torch.manual_seed(0)
    layer = NormLinear(6, 5, heads=heads).double()
    for head in layer.branches.values():
        nn.init.normal_(head[1].bias)
    return randomise_batch_norms(layer, torch.Generator().manual_seed(heads)).eval()


def features() -> torch.Tensor:
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_count
def test_deploy_form_equals_eval_form(heads):
    layer, x = trained(heads), features()
    error = (rb.deployed(layer)(x) - layer(x)).abs().max() / layer(x).abs().max()
    assert error <= TOLERANCES[torch.float64]["block"]


def test_output_is_the_mean_of_the_heads_behind_their_own_norms():
    layer, x = trained(2), features()
    each = []
    for norm, linear in layer.branches.values():
        normalised = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        each.append(normalised @ linear.weight.T + linear.bias)
    torch.testing.assert_close(layer(x), sum(each) / 2)
    assert not torch.allclose(each[0], each[1])


def test_single_head_is_the_main_one_of_two():
    two, one = trained(2), trained(1)
    for name, parameter in one.branches["main"].state_dict().items():
        two.branches["main"].state_dict()[name].copy_(parameter)
    torch.testing.assert_close(one(features()), two.branches["main"](features()))


@every_count
def test_deploy_form_holds_one_linear_layer(heads):
    deploy = rb.deployed(trained(heads))
    assert [type(module) for module in deploy.modules()] == [NormLinear, nn.Linear]
    assert list(deploy.state_dict()) == ["linear.weight", "linear.bias"]
    assert deploy.linear.weight.shape == (5, 6)


@every_count
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_weights_of_the_other_form_are_recognised(heads, form):
    train = trained(heads)
    forms = {"train": train, "deploy": rb.deployed(train)}
    other = forms.pop("deploy" if form == "train" else "train")
    with pytest.raises(CheckpointError, match=f"the model is in {form} form"):
        forms[form].load_state_dict(other.state_dict())


@every_count
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_weights_of_the_same_form_load(heads, form):
    given = trained(heads) if form == "train" else rb.deployed(trained(heads))
    other = copy.deepcopy(given)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(given.state_dict())
    torch.testing.assert_close(other(features()), given(features()), rtol=0, atol=0)


def test_weights_of_two_heads_do_not_pass_for_one():
    with pytest.raises(RuntimeError, match=r"branches\.distilled"):
        trained(1).load_state_dict(trained(2).state_dict())


def test_distilled_training_gives_both_heads_in_training_mode_only():
    layer, x = trained(2), features()
    layer.set_distilled_training()
    mean = layer(x)
    assert isinstance(mean, torch.Tensor)
    main, distilled = layer.train()(x)
    torch.testing.assert_close(main, layer.branches["main"](x))
    torch.testing.assert_close(distilled, layer.branches["distilled"](x))
    layer.set_distilled_training(False)
    torch.testing.assert_close(layer(x), (main + distilled) / 2)


def test_collapsed_copy_of_distilled_training_gives_the_mean():
    layer, x = trained(2), features()
    layer.set_distilled_training()
    deploy = rb.deployed(layer)
    torch.testing.assert_close(deploy(x), layer(x))
    torch.testing.assert_close(deploy.train()(x), layer(x))


@pytest.mark.parametrize("make", [lambda: trained(1), lambda: rb.deployed(trained(2))], ids=["one head", "deploy form"])
def test_distilled_training_without_a_second_head_is_refused(make):
    layer = make()
    with pytest.raises(ConfigurationError, match="heads=2"):
        layer.set_distilled_training()
    layer.set_distilled_training(False)


@pytest.mark.parametrize("heads", [0, 3])
def test_other_numbers_of_heads_are_refused(heads):
    with pytest.raises(ConfigurationError, match=f"heads={heads}"):
        NormLinear(6, 5, heads=heads)


def test_switch_needs_eval_mode():
    with pytest.raises(ConfigurationError, match="training mode"):
        trained(1).train().switch_to_deploy()


@every_count
def test_frozen_heads_give_a_frozen_layer(heads):
    deploy = rb.deployed(trained(heads).requires_grad_(requires_grad=False))
    assert not any(parameter.requires_grad for parameter in deploy.parameters())


@every_count
def test_gradients_reach_every_parameter(heads):
    layer = trained(heads).train()
    layer(features()).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())


def test_new_heads_start_as_the_papers_do():
    torch.manual_seed(0)
    layer = NormLinear(200, 300, heads=2)
    for _, linear in layer.branches.values():
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()


@pytest.mark.parametrize("distillation", [False, True])
def test_new_classifier_of_a_collapsed_model_is_a_plain_linear_layer(distillation):
    model = rb.create_model("rb_repvit_m0_9", num_classes=4, form="deploy").eval()
    model.reset_classifier(3, distillation=distillation)
    classifier = model.get_classifier()
    assert [type(module) for module in classifier.modules()] == [NormLinear, nn.Linear]
    assert classifier.form == rb.form_of(model) == "deploy"
    assert classifier.linear.weight.shape == (3, 384)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
