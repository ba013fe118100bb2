import pytest
import torch
from torch import nn

from repblocks.errors import ConfigurationError
from repblocks.expansion.statistics import estimate_statistics


def batches(mean=0.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 5, 7, generator=generator) + mean for count in (4, 1, 9)]


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
    nn.init.uniform_(model[1].weight)
    nn.init.normal_(model[1].bias)
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model.train()


def estimated(model, images):
    estimate_statistics(model, [(model[0], model[1])], images)
    return model[1]


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_statistics_are_those_of_all_batches_together_also_far_from_zero(mean):
    model = net()
    read = torch.cat([model[0](images).detach().double() for images in batches(mean)])
    norm = estimated(model, batches(mean))
    torch.testing.assert_close(norm.running_mean, read.mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var, read.var((0, 2, 3)).float(), rtol=1e-5, atol=0)


def test_the_function_in_eval_mode_stays():
    model = net().double()
    images = [batch.double() for batch in batches()]
    before = model.eval()(images[0])
    estimated(model, images)
    torch.testing.assert_close(model(images[0]), before, rtol=1e-12, atol=1e-12)


def test_modes_and_hooks_are_as_they_were_also_after_an_error():
    model = net()
    model[1].eval()
    estimated(model, batches())
    with pytest.raises(RuntimeError):
        estimated(model, [torch.randn(1, 4, 5, 7)])
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training
    assert not any(module._forward_hooks for module in model)


def test_nothing_but_the_norm_is_changed():
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    estimated(model, batches())
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_a_norm_without_affine_parameters_keeps_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False))
    assert estimated(model, batches()).running_mean.equal(torch.zeros(6))


def test_a_norm_behind_a_layer_that_was_not_called_stays():
    model = net()
    before = {key: value.clone() for key, value in model[1].state_dict().items()}
    estimate_statistics(model, [(nn.Conv2d(3, 6, 3), model[1])], batches())
    assert all(value.equal(before[key]) for key, value in model[1].state_dict().items())


def test_no_batches_are_refused():
    with pytest.raises(ConfigurationError, match="got no batches"):
        estimated(net(), [])
