"""The statistics that other tests rely on: none is left where a mistake would not show."""

import pytest
import torch
from timm.layers import LayerScale2d
from torch import nn

from repblocks.calibration import batch_norms, calibrate, randomise, reestimate

NORMS = [nn.BatchNorm1d(64), nn.BatchNorm2d(64), nn.BatchNorm3d(64), nn.SyncBatchNorm(64)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images():
    return 3 + 2 * torch.randn(32, 3, 12, 12, generator=seeded())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64, momentum=0.3), LayerScale2d(64), nn.Dropout(0.9))


def within(tensor, low, high):
    """Drawn from all of the range, not from a part of it, and never the same number twice."""
    margin = 0.1 * (high - low)
    return low <= tensor.min() < low + margin and high - margin < tensor.max() <= high and _all_differ(tensor)


def _all_differ(tensor):
    return len(tensor.unique()) == tensor.numel()


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_every_statistic_and_affine_parameter_is_drawn(norm):
    randomise(norm, seeded())
    assert within(norm.weight, 0.5, 1.5)
    assert within(norm.running_var, 0.3, 3.0)
    assert _all_differ(norm.running_mean)
    assert norm.running_mean.std().item() == pytest.approx(1, rel=0.3)
    assert _all_differ(norm.bias)
    assert norm.bias.std().item() == pytest.approx(0.3, rel=0.3)


def test_norms_without_statistics_or_affine_parameters_are_drawn_as_far_as_they_have_any():
    plain, frozen = nn.BatchNorm2d(64, affine=False), nn.BatchNorm2d(64, track_running_stats=False)
    randomise(nn.Sequential(plain, frozen), seeded())
    assert within(plain.running_var, 0.3, 3.0)
    assert within(frozen.weight, 0.5, 1.5)
    assert plain.weight is frozen.running_mean is None


@pytest.mark.parametrize(
    "draw", [lambda net, seed: randomise(net, seeded(seed)), lambda net, seed: calibrate(net, images(), seed)]
)
def test_layer_scales_are_drawn_and_a_seed_decides_all(draw):
    first, same, other = draw(net(), 0), draw(net(), 0), draw(net(), 1)
    assert within(first[2].gamma, 0.5, 1.5)
    for key, value in first.state_dict().items():
        assert value.equal(same.state_dict()[key])
    assert not first[2].gamma.equal(other[2].gamma)
    assert not first[1].running_var.equal(other[1].running_var)


def test_one_batch_gives_the_statistics_and_nothing_else_changes():
    model = net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = model[0](images()).detach()
    assert reestimate(model, images()) is model
    norm = model[1]
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)))
    assert norm.momentum == 0.3
    assert not any(module.training for module in model.modules())
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_layers_between_run_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    reestimate(model, images())
    torch.testing.assert_close(model[1].running_mean, images().mean((0, 2, 3)))


def test_norms_without_statistics_stay_without():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).train()
    calibrate(model, images())
    assert model[0].running_mean is None
    assert not model[0].training


def test_calibrated_statistics_are_near_those_of_a_batch_but_not_the_same():
    batch, drawn = reestimate(net(), images())[1], calibrate(net(), images())[1]
    off = (drawn.running_mean - batch.running_mean) / batch.running_var.sqrt()
    assert _all_differ(off)
    assert off.std().item() == pytest.approx(0.1, rel=0.3)
    assert within(drawn.running_var / batch.running_var.clamp(min=0.1 * batch.running_var.mean().item()), 0.8, 1.25)
    assert within(drawn.weight, 0.5, 1.5)
    assert not any(norm.training for norm in batch_norms(drawn))


def test_a_dead_channel_gets_a_tenth_of_the_mean_variance():
    drawn = calibrate(net_with_a_dead_channel(), images())[1]
    mean = reestimate(net_with_a_dead_channel(), images())[1].running_var.mean().item()
    assert 0.08 * mean <= drawn.running_var[7].item() <= 0.125 * mean


def net_with_a_dead_channel():
    model = net()
    model[0].weight.data[7] = 0
    return model
