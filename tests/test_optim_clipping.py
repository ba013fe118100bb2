"""What changes gradients between the backward pass and a step with multiplied gradients: refused, or exact."""

import copy

import pytest
import torch
import torch.distributed as dist
from optim_cases import after_backward, batches, difference, loss_of, net, sgd, train
from timm.utils import adaptive_clip_grad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import repblocks as rb
from repblocks.optim import RepOptimizer


def replace_gradients(parameters):
    for parameter in parameters:
        parameter.grad = parameter.grad * 0.5


CHANGES = {
    "norm": lambda parameters: clip_grad_norm_(parameters, 1.0),
    "norm, one by one": lambda parameters: clip_grad_norm_(parameters, 1.0, foreach=False),
    "norm beyond all gradients": lambda parameters: clip_grad_norm_(parameters, 1e9),
    "value": lambda parameters: clip_grad_value_(parameters, 1e-3),
    "adaptive": lambda parameters: adaptive_clip_grad(parameters, 1e-4),
    "replaced": replace_gradients,
}


class TestClipping:
    @pytest.mark.parametrize("clip", CHANGES.values(), ids=CHANGES)
    def test_clipping_between_backward_and_step_is_refused_and_nothing_is_stepped(self, clip):
        plain, optimizer = after_backward()
        before = copy.deepcopy([plain.state_dict(), optimizer.state_dict()])
        clip(list(plain.parameters()))
        with pytest.raises(rb.ConfigurationError, match=r"2 gradients changed between.*leave clipping out"):
            optimizer.step()
        torch.testing.assert_close([plain.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0)

    def test_clipping_after_the_last_of_several_passes_is_refused(self):
        plain, optimizer = after_backward()
        loss_of(plain, next(batches(1))).backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        with pytest.raises(rb.ConfigurationError, match="gradients changed"):
            optimizer.step()

    def test_clipping_inside_a_closure_is_refused(self):
        plain, optimizer = after_backward()

        def closure():
            loss_of(plain, next(batches(1))).backward()
            clip_grad_norm_(plain.parameters(), 1.0)

        with pytest.raises(rb.ConfigurationError, match="gradients changed"):
            optimizer.step(closure)

    def test_clipping_after_a_state_was_loaded_is_refused(self):
        plain, optimizer = after_backward()
        optimizer.load_state_dict(optimizer.state_dict())
        loss_of(plain, next(batches(1))).backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        with pytest.raises(rb.ConfigurationError, match="gradients changed"):
            optimizer.step()

    def test_a_change_that_is_accepted_is_stepped_once(self):
        plain, optimizer = after_backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.accept_gradients()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(plain, next(batches(1))).backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        with pytest.raises(rb.ConfigurationError, match="gradients changed"):
            optimizer.step()

    def test_gradients_from_elsewhere_or_set_to_zero_are_no_clipping(self):
        plain, optimizer = after_backward()
        optimizer.step()
        plain.zero_grad(set_to_none=False)
        optimizer.step()
        plain.zero_grad()
        for parameter in plain.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    @pytest.mark.parametrize("unscaled", [True, False])
    def test_a_grad_scaler_is_no_clipping(self, unscaled):
        branched = net()
        plain, optimizer = RepOptimizer.for_plain(branched, sgd)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for batch in batches(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(plain, batch)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        train(branched, sgd(branched), 5)
        assert difference(branched, plain) <= 1e-10

    def test_clipping_after_a_grad_scaler_is_refused(self):
        plain, optimizer = RepOptimizer.for_plain(net(), sgd)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(plain, next(batches(1)))).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(plain.parameters(), 1.0)
        with pytest.raises(rb.ConfigurationError, match="gradients changed"):
            scaler.step(optimizer)


@pytest.fixture
def _one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("as_view", [True, False])
def test_the_average_of_distributed_training_is_no_clipping_but_clipping_after_it_is(as_view):
    branched = net()
    plain, optimizer = RepOptimizer.for_plain(branched, sgd)
    train(DistributedDataParallel(plain, gradient_as_bucket_view=as_view), optimizer, 5)
    train(branched, sgd(branched), 5)
    assert difference(branched, plain) <= 1e-10
    parallel = DistributedDataParallel(plain, gradient_as_bucket_view=as_view)
    optimizer.zero_grad()
    loss_of(parallel, next(batches(1))).backward()
    clip_grad_norm_(parallel.parameters(), 1.0)
    with pytest.raises(rb.ConfigurationError, match="gradients changed"):
        optimizer.step()
