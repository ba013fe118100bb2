import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support import calibrate
from torch import nn

from repblocks.blocks import deployed
from repblocks.errors import ConfigurationError
from repblocks.models import create_model
from repblocks.profiling import Profile, count_ops, latency_ms, profile


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 1), padding=(1, 0), groups=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=4)
    )


def test_counts_match_arithmetic():
    cost = profile(net(), (3, 5, 7))
    params = 8 * 3 * 3 + 8 + 16 + 8 * 2 + 8
    assert cost == Profile(
        params=params, macs=5 * 7 * (8 * 3 * 3 + 8 * 2), weight_bytes=4 * (params + 16) + 8
    )  # two running statistics, and an int64 counter
    assert cost.to_dict() == {"params": cost.params, "macs": cost.macs, "weight_bytes": cost.weight_bytes}


def test_macs_of_timms_repvgg_are_the_published_ones():
    model = timm.models.reparameterize_model(timm.create_model("repvgg_a0").eval())
    cost = profile(model, (3, 224, 224))
    assert cost.macs == pytest.approx(1.36e9, rel=0.01)
    assert cost.params == pytest.approx(8.31e6, rel=0.001)


@pytest.mark.parametrize("name", ["rb_repvgg_cifar", "rb_repnext_cifar"])
def test_profiling_leaves_the_model_as_it_was(name):
    model = calibrate(create_model(name), torch.randn(4, 3, 32, 32)).train()
    before = copy.deepcopy(model.state_dict())
    assert profile(model, (3, 32, 32)) == profile(model.eval(), (3, 32, 32))
    assert profile(model.train(), (3, 32, 32)).params == sum(p.numel() for p in model.parameters())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_deploy_form_of_repvgg_costs_less():
    model = create_model("rb_repvgg_cifar").eval()
    train, deploy = profile(model, (3, 32, 32)), profile(deployed(model), (3, 32, 32))
    assert deploy.params < train.params
    assert deploy.macs < train.macs
    assert deploy.weight_bytes == 4 * deploy.params


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_take_the_models_dtype(dtype):
    cost = profile(net().to(dtype), (3, 5, 7))
    assert cost.macs == profile(net(), (3, 5, 7)).macs


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    model[1].weight = model[0].weight
    assert profile(model, (3, 4, 5)) == Profile(params=9, macs=2 * 9 * 20, weight_bytes=36)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.unused = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 3, 2)

    def forward(self, x, scale=1.0):
        x = self.conv(self.conv(x))
        x = F.conv2d(x, self.conv.weight)
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var)
        return scale * self.up(self.norm(x))


@pytest.mark.parametrize("grad", [True, False])
def test_layers_are_counted_as_often_as_they_run(grad):
    model = Calls()
    before = copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(grad):
        assert count_ops(model, torch.randn(1, 3, 11, 13)) == (4, 2)
        assert count_ops(model, (torch.randn(1, 3, 11, 13), 2.0)) == (4, 2)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_deploy_form_runs_one_convolution_for_each_block():
    model = create_model("rb_repvgg_cifar", depths=[1, 1, 1], widths=[8, 8, 8]).eval()
    images = torch.randn(1, 3, 32, 32)
    assert count_ops(deployed(model), images) == (4, 0)
    assert count_ops(model, images).norms == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_slower_functions_take_longer():
    inputs = torch.ones(1)
    work = torch.ones(200, 200)
    once = {"one": lambda x: work @ work, "eight": lambda x: [work @ work for _ in range(8)]}
    times = latency_ms(once, inputs, repeats=15)
    assert list(times) == ["one", "eight"]
    assert 0 < times["one"] < times["eight"]


def test_callables_take_turns_on_one_thread_without_gradients():
    calls = []

    def record(name):
        calls.append((name, torch.get_num_threads(), torch.is_grad_enabled()))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    latency_ms({"a": lambda x: record("a"), "b": lambda x: record("b")}, torch.ones(1), repeats=3, warmup=1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert [name for name, *_ in calls] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert {tuple(rest) for _, *rest in calls} == {(1, False)}


def test_a_model_in_train_mode_is_not_measured():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"'net' in train mode.*call eval\(\)"):
        latency_ms({"net": model}, torch.randn(1, 3, 5, 7))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_measuring_nothing_is_an_error():
    with pytest.raises(ConfigurationError, match="repeats=0"):
        latency_ms({"net": net().eval()}, torch.randn(1, 3, 5, 7), repeats=0)
