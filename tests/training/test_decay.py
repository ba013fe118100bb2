import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import repblocks as rb
from repblocks.blocks.base import RepConv
from repblocks.blocks.registry import resolve_block
from repblocks.errors import ConfigurationError
from repblocks.optim import plain_twin
from repblocks.training.decay import block_parameters, decay_loss, folded_decay
from repblocks.training.optimization import make_optimizer
from tests.support import randomise_batch_norms

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def trained(name: str, **options: Any) -> RepConv:
    """A block in training mode with the numbers of a trained one, depthwise where it has to be."""
    torch.manual_seed(0)
    groups = {"groups": 4} if name in DEPTHWISE else {}
    block = resolve_block(name)(4, 4, 3, **groups, **options).double()
    randomise_batch_norms(block, torch.Generator().manual_seed(1))
    return block.train()


DEPTHWISE = ("dilated", "largekernel", "repmixer", "repnextm", "repunit", "repvit")


def network(**args: Any) -> nn.Module:
    torch.manual_seed(0)
    model = rb.create_model("rb_repvgg_cifar", depths=[1, 1, 1], widths=[4, 4, 8], num_classes=3, **args).double()
    return randomise_batch_norms(model, torch.Generator().manual_seed(1))


def squared_norm(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors)


@pytest.mark.parametrize("name", sorted(rb.BLOCKS))
def test_it_is_the_squared_norm_of_the_deployed_kernel(name: str) -> None:
    block = trained(name)
    deployed = rb.deployed(block)
    assert isinstance(deployed, RepConv)
    assert isinstance(deployed.conv, nn.Conv2d)
    assert folded_decay(block).item() == pytest.approx(squared_norm([deployed.conv.weight]), rel=1e-12)
    assert folded_decay(deployed).item() == pytest.approx(folded_decay(block).item(), rel=1e-12)


@pytest.mark.parametrize("name", sorted(rb.BLOCKS))
def test_its_gradient_reaches_every_kernel_of_every_branch(name: str) -> None:
    block, step = trained(name), 1e-5
    learned = dict(block.named_parameters())
    grads = torch.autograd.grad(folded_decay(block), list(learned.values()), allow_unused=True, materialize_grads=True)
    for (key, parameter), grad in zip(learned.items(), grads, strict=True):
        direction = torch.randn_like(parameter)
        ahead, behind = (moved(block, parameter, sign * step * direction) for sign in (1, -1))
        assert (grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-6, abs=1e-7), key
        assert parameter.ndim == 1 or grad.any(), key


@torch.no_grad()
def moved(block: RepConv, parameter: Tensor, by: Tensor) -> float:
    """The value with one parameter elsewhere."""
    before = parameter.clone()
    parameter.add_(by)
    value = folded_decay(block).item()
    parameter.copy_(before)
    return value


def test_a_model_adds_up_its_blocks_and_leaves_other_layers_out() -> None:
    model = network()
    deployed = rb.deployed(model)
    kernels = [block.conv.get_parameter("weight") for block in deployed.modules() if isinstance(block, RepConv)]
    assert len(kernels) > 3
    assert folded_decay(model).item() == pytest.approx(squared_norm(kernels), rel=1e-12)


def test_every_block_counts_once_however_it_is_nested_or_shared() -> None:
    inner = trained("repvgg")
    once = folded_decay(inner).item()
    nested = rb.BranchConv([inner])
    assert folded_decay(nested).item() == pytest.approx(once, rel=1e-12)
    assert folded_decay(nn.Sequential(nested, nn.Sequential(nested))).item() == pytest.approx(once, rel=1e-12)
    assert folded_decay(nn.Sequential(inner, trained("repvgg"))).item() == pytest.approx(2 * once, rel=1e-12)


def test_modes_stay_as_they_are() -> None:
    model = network().train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before = {name: module.training for name, module in model.named_modules()}
    buffers = copy.deepcopy(dict(model.named_buffers()))
    folded_decay(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not frozen.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_autocast_does_not_round_it() -> None:
    model = network(block="dbb").float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = folded_decay(model)
    assert inside.dtype == torch.float32
    assert inside.item() == folded_decay(model).item()


def test_the_loss_pulls_a_plain_kernel_as_weight_decay_does() -> None:
    conv = nn.Conv2d(3, 5, 3)
    decay_loss(rb.BranchConv([conv]), {"folded_decay": 0.02}).backward()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(conv.weight.grad, 0.02 * conv.weight.detach())
    assert conv.bias is not None
    assert conv.bias.grad is None or not conv.bias.grad.any()


def test_without_the_option_the_loss_costs_nothing() -> None:
    hooked = trained("repvgg")
    next(hooked.branches.children()).register_forward_hook(print)  # does not fold
    assert decay_loss(hooked, {"folded_decay": 0.0}) == 0
    assert decay_loss(hooked, {}) == 0


def decayed(model: nn.Module, **options: Any) -> dict[str, float]:
    """The weight decay of each parameter."""
    optimizer = make_optimizer(model, {**SGD, **options})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(names)
    return dict(found)


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.9}, {"filter_bias_and_bn": False}])
def test_the_optimizer_does_not_decay_what_the_loss_decays(options: dict[str, Any]) -> None:
    model = network()
    inside = {id(parameter) for parameter in block_parameters(model)}
    without, with_it = decayed(model, **options), decayed(model, folded_decay=0.01, **options)
    for name, parameter in model.named_parameters():
        assert with_it[name] == (0 if id(parameter) in inside else without[name]), name
    assert with_it["head.fc.weight"] == 0.01
    assert sum(decay > 0 for decay in without.values()) > 5


def test_one_step_shrinks_every_folded_kernel_towards_zero() -> None:
    model = nn.Sequential(rb.BranchConv([nn.Conv2d(3, 5, 3, padding=1)]), nn.BatchNorm2d(5))
    optimizer = make_optimizer(model, {**SGD, "name": "momentum", "momentum": 0.0, "folded_decay": 0.01})
    kernel = next(model.parameters())
    before = kernel.detach().clone()
    (0 * model(torch.randn(2, 3, 4, 4)).sum() + decay_loss(model, {"folded_decay": 0.01})).backward()
    optimizer.step()
    torch.testing.assert_close(kernel.detach(), (1 - 0.1 * 0.01) * before)


def test_blocks_that_do_not_fold_are_refused_before_training() -> None:
    model = nn.Sequential(trained("repvgg"), trained("acb"))
    next(model[1].branches.children()).register_forward_hook(print)  # pyright: ignore
    with pytest.raises(ConfigurationError, match=r"folded_decay needs blocks that fold in training, and 1 does not"):
        make_optimizer(model, {**SGD, "folded_decay": 0.01})


def test_parametrized_kernels_fold_with_their_gradients() -> None:
    conv = weight_norm(nn.Conv2d(3, 5, 3))
    block = rb.BranchConv([conv])
    folded_decay(block).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in conv.named_parameters() if name != "bias")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="is for blocks with branches, and Conv2d has none"):
        make_optimizer(nn.Conv2d(3, 4, 3), {**SGD, "folded_decay": 0.01})


@pytest.mark.parametrize("wrong", [-0.1, True, "much", None, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"optimizer\.folded_decay=\S+ needs to be a number, at least 0"):
        make_optimizer(network(), {**SGD, "folded_decay": wrong})


def test_gradient_re_parameterization_trains_as_the_branches_do() -> None:
    torch.manual_seed(0)
    branches = nn.Sequential(rb.CSLAConv(3, 4, scale=0.7, pointwise_scale=1.3), rb.CSLAConv(4, 4)).double()
    config = {**SGD, "weight_decay": 0.0, "folded_decay": 0.3}
    plain, multipliers = plain_twin(branches)
    optimizers = {branches: make_optimizer(branches, config)}
    optimizers[plain] = make_optimizer(plain, {**config, "name": "repsgd"}, multipliers)
    images = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    for _ in range(3):
        for model, optimizer in optimizers.items():
            optimizer.zero_grad()
            (model(images).sigmoid().mean() + decay_loss(model, config)).backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), branches.eval()(images), rtol=1e-9, atol=1e-10)
