"""A plain network with multiplied gradients trains as its branches do, and nothing comes between."""

import copy
import itertools
import pickle

import pytest
import timm
import torch
from optim_cases import GEOMETRIES, LINEAR, SETTINGS, after_backward, batches, difference, loss_of, net, sgd, train
from support import randomise_batch_norms
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils import clip_grad_norm_

import repblocks as rb
from repblocks.blocks.branches import conv, conv_bn, scaled
from repblocks.blocks.csla import ConstantScale2d, CSLAConv
from repblocks.blocks.layers import AlignedAvgPool2d
from repblocks.blocks.spec import ConvSpec
from repblocks.optim import RepOptimizer, gradient_multipliers, plain_twin


class TestEquality:
    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_kernels_stay_equal_over_100_steps(self, geometry):
        branched = net(**geometry)
        start = rb.fold(branched[2].branches[0]).weight.clone()
        plain, optimizer = RepOptimizer.for_plain(branched, sgd)
        train(plain, optimizer, 100)
        train(branched, sgd(branched), 100)
        assert difference(branched, plain) <= 1e-10
        assert (rb.fold(branched[2].branches[0]).weight - start).abs().max() > 0.1

    @pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
    def test_every_optimizer_that_is_linear_in_the_gradient_is_served(self, make):
        branched = net()
        plain, optimizer = RepOptimizer.for_plain(branched, lambda model: make(model.parameters()))
        train(plain, optimizer, 30)
        train(branched, make(branched.parameters()), 30)
        assert difference(branched, plain) <= 1e-10

    def test_maximising_is_served(self):
        branched = net()
        plain, optimizer = RepOptimizer.for_plain(
            branched, lambda model: torch.optim.SGD(model.parameters(), **SETTINGS, maximize=True)
        )
        train(plain, optimizer, 30, sign=-1)
        train(branched, sgd(branched), 30)
        assert difference(branched, plain) <= 1e-10

    def test_a_schedule_and_groups_with_rates_and_decays_of_their_own_are_followed(self):
        def make(model):
            blocks, head = list(model[:-1].parameters()), list(model[-1].parameters())
            groups = [{"params": blocks, "weight_decay": 0.05}, {"params": head, "lr": 0.01}]
            return torch.optim.SGD(groups, **SETTINGS)

        def run(model, optimizer):
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
            for _ in range(3):
                train(model, optimizer, 5)
                schedule.step()
            assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.005]

        branched = net()
        plain, optimizer = RepOptimizer.for_plain(branched, make)
        run(plain, optimizer)
        run(branched, make(branched))
        assert difference(branched, plain) <= 1e-10

    def test_gradients_accumulated_over_two_passes_are_served(self):
        branched = net()
        plain, optimizer = RepOptimizer.for_plain(branched, sgd)
        for model, stepper in ((plain, optimizer), (branched, sgd(branched))):
            for first, second in itertools.pairwise(batches(10)):
                loss_of(model, first).backward()
                loss_of(model, second).backward()
                stepper.step()
                stepper.zero_grad(set_to_none=False)
        assert difference(branched, plain) <= 1e-10

    def test_without_the_multipliers_the_kernels_differ(self):
        branched = net()
        plain, _ = plain_twin(branched)
        train(plain, sgd(plain), 100)
        train(branched, sgd(branched), 100)
        assert difference(branched, plain) > 1e-2

    def test_multipliers_behind_the_decay_are_another_training(self):
        branched = net()
        plain, multipliers = plain_twin(branched)
        optimizer = sgd(plain)
        for batch in batches(100):
            optimizer.zero_grad()
            loss_of(plain, batch).backward()
            for parameter, multiplier in multipliers.items():  # SGD adds decay * parameter, to be multiplied as well
                parameter.grad = multiplier * (parameter.grad + 0.01 * parameter.detach()) - 0.01 * parameter.detach()
            optimizer.step()
        train(branched, sgd(branched), 100)
        assert difference(branched, plain) > 1e-3


class TestOtherOptimizers:
    def test_for_adam_no_equality_holds(self):
        branched = net()
        plain, multipliers = plain_twin(branched)
        adam = torch.optim.Adam(plain.parameters(), lr=0.01)
        for parameter, multiplier in multipliers.items():
            parameter.register_hook(multiplier.mul)
        train(plain, adam, 20)
        train(branched, torch.optim.Adam(branched.parameters(), lr=0.01), 20)
        assert difference(branched, plain) > 1e-3

    @pytest.mark.parametrize("name", ["adam", "adamw", "lion", "rmsprop", "lars", "sgdp", "csgdw", "lookahead_sgd"])
    def test_what_is_not_linear_in_the_gradient_is_refused(self, name):
        with pytest.raises(rb.ConfigurationError, match=r"step is not linear in the gradient.*use torch\.optim\.SGD"):
            RepOptimizer.for_plain(net(), lambda model: create_optimizer_v2(model, name, lr=0.1))

    def test_a_subclass_of_sgd_may_step_in_another_way_and_is_refused(self):
        class Mine(torch.optim.SGD):
            pass

        with pytest.raises(rb.ConfigurationError, match="got Mine, whose step"):
            RepOptimizer.for_plain(net(), lambda model: Mine(model.parameters()))

    def test_multipliers_of_other_parameters_or_shapes_are_refused(self):
        plain, multipliers = plain_twin(net())
        with pytest.raises(rb.ConfigurationError, match="which the optimizer does not train"):
            RepOptimizer(sgd(plain[-1]), multipliers)
        with pytest.raises(rb.ConfigurationError, match=r"got a multiplier \(1,\) for a parameter \(3, 8\)"):
            RepOptimizer(sgd(plain), {plain[-1].weight: torch.ones(1)})


class TestMultipliers:
    def test_they_are_those_of_the_paper(self):
        block = randomise_batch_norms(CSLAConv(4, 4).double(), torch.Generator().manual_seed(0))
        s, t = (block.branches[0][name][1].gamma for name in ("kxk", "pointwise"))
        expected = (s**2)[:, None, None, None].repeat(1, 4, 3, 3)
        expected[:, :, 1, 1] += (t**2)[:, None]
        expected[:, :, 1, 1] += torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(gradient_multipliers(block.branches[0]).weight, expected, rtol=1e-14, atol=0)

    def test_biases_have_multipliers_of_their_own(self):
        spec = ConvSpec.of(2, 2, 3)
        branches = rb.Sum(
            [nn.Sequential(conv(spec, bias=True), ConstantScale2d(2, 3.0)), conv(spec, (1, 1), bias=True)]
        )
        value = gradient_multipliers(branches)
        assert value.bias.tolist() == [10.0, 10.0]
        assert value.weight.unique().tolist() == [9.0, 10.0]

    @pytest.mark.parametrize(
        ("branch", "why"),
        [
            (lambda spec: conv_bn(spec), "a factor in front of a parameter is learned too"),
            (lambda spec: scaled(conv(spec), 4, 1.0), "a factor in front of a parameter is learned too"),
            (lambda spec: nn.Identity(), "a part of the kernel or bias is constant"),
            (lambda spec: conv(spec).requires_grad_(requires_grad=False), "a part of the kernel or bias is constant"),
            (
                lambda spec: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), AlignedAvgPool2d(spec)),
                "a parameter feeds several entries",
            ),
        ],
    )
    def test_branches_without_multipliers_are_refused(self, branch, why):
        torch.manual_seed(0)
        spec = ConvSpec.of(4, 4, 3)
        branches = rb.Sum([conv(spec), branch(spec)])
        with pytest.raises(rb.ConfigurationError, match=f"no multipliers make one convolution .*: {why}"):
            gradient_multipliers(branches)

    def test_frozen_branches_are_refused(self):
        with pytest.raises(rb.ConfigurationError, match="no learned parameter"):
            plain_twin(net().requires_grad_(requires_grad=False))


class TestTwin:
    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    def test_it_starts_as_the_same_function_and_the_model_stays_as_it_was(self, geometry):
        branched, x = net(**geometry), next(batches(1))[0]
        before, random = copy.deepcopy(branched.state_dict()), torch.get_rng_state()
        plain, _ = plain_twin(branched)
        assert torch.equal(torch.get_rng_state(), random)
        assert {key: value.tolist() for key, value in branched.state_dict().items()} == {
            key: value.tolist() for key, value in before.items()
        }
        assert [type(module).__name__ for module in plain[:3]] == ["ConvBN", "ReLU", "ConvBN"]
        torch.testing.assert_close(plain(x), branched(x), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(plain.eval()(x), branched.eval()(x), rtol=1e-11, atol=1e-11)

    def test_it_has_the_mode_and_dtype_of_the_model(self):
        plain, multipliers = plain_twin(net().float().eval())
        assert not any(module.training for module in plain.modules())
        assert {tensor.dtype for tensor in (*plain.parameters(), *multipliers.values())} == {torch.float32}

    def test_a_block_in_two_places_stays_one(self):
        block = CSLAConv(4, 4)
        plain, multipliers = plain_twin(nn.Sequential(block, nn.ReLU(), block))
        assert plain[0] is plain[2]
        assert len(multipliers) == 1

    def test_a_block_alone_is_converted_too(self):
        plain, _ = plain_twin(CSLAConv(4, 4))
        assert isinstance(plain, rb.ConvBN)

    def test_of_a_network_of_the_zoo_it_is_the_plain_one(self, tmp_path):
        branched = rb.create_model("rb_repnext_cifar", block="csla", num_classes=4)
        plain, multipliers = plain_twin(branched)
        assert branched.model_args["block"] == "csla"
        assert timm.create_model("rb_repnext_cifar", block="plain", num_classes=4).load_state_dict(plain.state_dict())
        assert len(multipliers) == sum(isinstance(module, CSLAConv) for module in branched.modules())
        rb.save(plain.eval(), tmp_path / "plain.safetensors")
        assert rb.load(tmp_path / "plain.safetensors").model_args["block"] == "plain"

    def test_a_model_without_such_blocks_or_branches_is_refused(self):
        with pytest.raises(rb.ConfigurationError, match=r"ConvBN has no CSLAConv.*block=\"csla\""):
            plain_twin(rb.ConvBN(3, 4))
        with pytest.raises(rb.ConfigurationError, match="deploy form"):
            plain_twin(rb.deployed(net()))


class TestState:
    @pytest.mark.parametrize("known", [True, False], ids=["with multipliers", "without"])
    def test_training_continues_bit_by_bit_from_the_state(self, known, tmp_path):
        plain, optimizer = RepOptimizer.for_plain(net(), sgd)
        train(plain, optimizer, 7)
        torch.save([plain.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
        model, multipliers = plain_twin(net())
        again = RepOptimizer(sgd(model), multipliers if known else {})
        weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
        model.load_state_dict(weights)
        again.load_state_dict(state)
        train(plain, optimizer, 5)
        train(model, again, 5)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))

    def test_loaded_multipliers_take_the_place_of_those_before(self):
        plain, optimizer = RepOptimizer.for_plain(net(), sgd)
        state = optimizer.state_dict()
        wrong = RepOptimizer(sgd(plain), {plain[0].branches[0].weight: torch.zeros(8, 4, 3, 3)})
        wrong.load_state_dict(state)
        assert wrong.state[plain[0].branches[0].weight]["multiplier"].min() > 0

    def test_the_state_of_an_ordinary_optimizer_is_refused(self):
        plain, optimizer = RepOptimizer.for_plain(net(), sgd)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(rb.CheckpointError, match="no multipliers for 2 parameters"):
            optimizer.load_state_dict(sgd(plain).state_dict())
        torch.testing.assert_close(optimizer.state_dict(), before)

    def test_a_state_of_other_groups_is_refused_as_torch_does(self):
        plain, optimizer = RepOptimizer.for_plain(net(), sgd)
        with pytest.raises(ValueError, match="parameter group"):
            RepOptimizer(sgd(plain[-1]), {}).load_state_dict(optimizer.state_dict())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    def test_a_copy_with_its_model_trains_the_same_and_watches_too(self, copied):
        plain, optimizer = RepOptimizer.for_plain(net(), sgd)
        train(plain, optimizer, 3)
        model, again = copied((plain, optimizer))
        train(model, again, 3)
        train(plain, optimizer, 3)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        loss_of(model, next(batches(1))).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(rb.ConfigurationError, match="gradients changed"):
            again.step()

    def test_a_step_leaves_the_gradients_as_they_were_and_runs_hooks_once(self):
        plain, optimizer = after_backward()
        calls = []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        before = {parameter: (parameter.grad, parameter.grad.clone()) for parameter in plain.parameters()}
        optimizer.step()
        assert calls == [1]
        assert all(parameter.grad is grad and torch.equal(grad, was) for parameter, (grad, was) in before.items())

    def test_a_closure_is_run_before_gradients_are_multiplied(self):
        branched = net()
        plain, optimizer = RepOptimizer.for_plain(branched, sgd)
        ordinary = sgd(branched)
        for batch in batches(5):

            def closure(model, stepper, batch=batch):
                stepper.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            losses = [
                stepper.step(lambda model=model, stepper=stepper: closure(model, stepper))
                for model, stepper in ((plain, optimizer), (branched, ordinary))
            ]
            torch.testing.assert_close(*losses)
        assert difference(branched, plain) <= 1e-10
