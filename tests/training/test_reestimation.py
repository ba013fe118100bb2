import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import repblocks as rb
from repblocks.blocks.base import RepConv
from repblocks.calibration import batch_norms
from repblocks.errors import ConfigurationError, DataError
from repblocks.training.reestimation import reestimate
from tests.support import randomise_batch_norms

SIZE = {"depths": [1, 1, 1], "widths": [8, 8, 8]}


def network(**args: Any) -> nn.Module:
    torch.manual_seed(0)
    model = rb.create_model("rb_repvgg_cifar", num_classes=3, **SIZE, **args).double()
    for norm in batch_norms(randomise_batch_norms(model, torch.Generator().manual_seed(1))):
        norm.num_batches_tracked.fill_(7)  # pyright: ignore
    return model


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As the loaders give them: images, labels and indices."""
    generator = torch.Generator().manual_seed(2)
    sizes = range(4, 4 + count)
    images = [torch.randn(size, 3, 13, 10, dtype=torch.float64, generator=generator) for size in sizes]
    return [(x.to(dtype), torch.zeros(len(x)), torch.arange(len(x))) for x in images]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("execution", ["auto", "separate", "patches", "outputs"])
@pytest.mark.parametrize("block", ["repvgg", "dbb", "qarepvgg", "expand"])
def test_it_is_the_plain_average_over_separate_branches_however_blocks_run(block: str, execution: Any) -> None:
    model = network(block=block)
    expected = copy.deepcopy(model)
    rb.set_execution(expected, "separate")
    update_bn(batches(), expected)
    rb.set_execution(model, execution)
    assert reestimate(model, batches(), 3) == 3
    assert_same(buffers(model), buffers(expected))


def test_blocks_run_merged_where_they_do_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    forward = RepConv.forward
    monkeypatch.setattr(RepConv, "forward", lambda block, x: modes.append(block.training) or forward(block, x))
    reestimate(network(), batches(1), 1)
    assert modes
    assert all(modes)


def test_norms_with_activations_are_averaged_too() -> None:
    model = timm.create_model("test_efficientnet", num_classes=3).double()
    expected = copy.deepcopy(model)
    update_bn(batches(), expected)
    reestimate(model, batches(), 3)
    assert_same(buffers(model), buffers(expected))


def test_dropout_and_stochastic_depth_are_off() -> None:
    args = {"num_classes": 3, "depths": [1, 1, 1], "widths": [8, 8, 8]}
    torch.manual_seed(0)
    sure = rb.create_model("rb_repnext_cifar", **args).double()
    random = rb.create_model("rb_repnext_cifar", **args, drop_rate=0.5, drop_path_rate=0.5).double()
    random.load_state_dict(sure.state_dict())
    update_bn(batches(), sure)
    reestimate(random, batches(), 3)
    assert_same(buffers(random), buffers(sure))


def test_only_the_first_batches_count() -> None:
    model, expected = network(), network()
    assert reestimate(model, batches(5), 2) == 2
    update_bn(batches(2), expected)
    assert_same(buffers(model), buffers(expected))


def test_one_pass_over_the_loader_is_the_most() -> None:
    assert reestimate(network(), batches(2), 100) == 2


def test_images_alone_are_a_batch_and_take_the_dtype_of_the_model() -> None:
    model, expected = network(), network()
    reestimate(model, [images for images, _, _ in batches(3, torch.float32)], 3)
    update_bn([images.double() for images, _, _ in batches(3, torch.float32)], expected)
    assert_same(buffers(model), buffers(expected))


@pytest.mark.parametrize("training", [True, False])
def test_modes_momenta_and_weights_stay_as_they_are(*, training: bool) -> None:
    model = network().train(training)
    norms = batch_norms(model)
    norms[0].momentum, norms[1].momentum = 0.3, None
    norms[2].train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    momenta = [norm.momentum for norm in norms]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reestimate(model, batches(), 2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [norm.momentum for norm in norms] == momenta
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_failing_batch_leaves_the_old_statistics() -> None:
    def failing() -> Iterator[Any]:
        yield batches(1)[0]
        raise OSError("the disk is gone")

    model = network().train()
    before = buffers(model)
    with pytest.raises(OSError, match="the disk is gone"):
        reestimate(model, failing(), 5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(norm.training and norm.momentum == 0.1 for norm in batch_norms(model))


def test_an_empty_loader_is_an_error_and_leaves_the_old_statistics() -> None:
    model = network()
    before = buffers(model)
    with pytest.raises(DataError, match="no training batch to re-estimate"):
        reestimate(model, [], 5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_norms_that_keep_no_statistics_are_left_alone() -> None:
    fixed = nn.BatchNorm2d(4)
    fixed.track_running_stats = False
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), fixed).double()
    assert reestimate(model, batches(), 3) == 0
    model.append(nn.BatchNorm2d(4).double())
    assert reestimate(model, batches(), 3) == 3
    assert torch.equal(fixed.running_mean, torch.zeros(4))  # pyright: ignore
    assert model[3].running_mean.any()


@pytest.mark.parametrize("wrong", [0, -3])
def test_no_batches_are_refused(wrong: int) -> None:
    with pytest.raises(ConfigurationError, match=r"reestimate_bn=\S+ needs to be at least 1"):
        reestimate(network(), batches(), wrong)


def test_the_collapsed_model_sees_the_new_statistics() -> None:
    model = network()
    images = batches(1)[0][0]
    stale = rb.deployed(model)(images)
    reestimate(model, batches(), 3)
    with torch.no_grad():
        torch.testing.assert_close(rb.deployed(model)(images), model.eval()(images), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(stale, model(images), rtol=0.01)
