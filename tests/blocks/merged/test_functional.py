"""Derivatives by differences, by functorch and of derivatives."""

import pytest
import torch
from blocks.claims import BUILDERS
from blocks.merged.cases import METHODS, SMALL, cotangent, in_execution, made, method_of, small_block
from blocks.merged.mixtures import make_mixture
from support import batch_norms
from torch.func import functional_call

import repblocks as rb

over_methods = pytest.mark.parametrize("method", METHODS)
over_places = pytest.mark.parametrize("place", SMALL)


def untracking(block):
    for norm in batch_norms(block):
        norm.track_running_stats = False
    return block


@over_methods
@over_places
@pytest.mark.parametrize("name", ["repvgg", "repvit", "norms_of_all_kinds"])
def test_gradcheck_over_input_and_parameters(name, place, method):
    make = BUILDERS.get(name) or make_mixture(name)
    block = in_execution(made(make, SMALL[place]), method)
    untracking(block)  # as gradcheck calls it again and again
    names, parameters = zip(*block.named_parameters(), strict=True)
    inputs = (SMALL[place].image(), *(p.detach().requires_grad_() for p in parameters))

    def call(x, *given):
        return functional_call(block, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@over_methods
@over_places
def test_input_gradients_by_differences(place, method):
    block, x = small_block(place, method)
    untracking(block)
    assert method_of(block, x, method) == method
    assert torch.autograd.gradcheck(block, (x,))


@over_methods
@over_places
def test_a_second_derivative_is_refused(place, method):
    """A merged backward pass has no derivative of its own; the choice is to run separately."""
    block, x = small_block(place, method)
    (slope,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()
    rb.set_execution(block, "separate")
    assert torch.autograd.gradgradcheck(untracking(block), (x,), atol=1e-4)


@over_methods
@over_places
def test_functional_calls_use_the_given_parameters(place, method):
    block, x = small_block(place, method)
    other = {name: (p.detach() * 1.5 + 0.1).requires_grad_() for name, p in block.named_parameters()}
    y = functional_call(block, other, (x,))
    found = torch.autograd.grad(y, list(other.values()), cotangent(y))
    separate, _ = small_block(place, "separate")
    expected_y = functional_call(separate, other, (x,))
    expected = torch.autograd.grad(expected_y, list(other.values()), cotangent(y))
    torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-10)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


def untracked(place, method):
    """functorch does not let a function change the buffers that it closes over."""
    block, x = small_block(place, method)
    for norm in batch_norms(untracking(block)):
        norm.running_mean = norm.running_var = None
    return block, x


@over_methods
@over_places
def test_functorch_gradients_are_those_of_separate_branches(place, method):
    found = []
    for execution in ("separate", method):
        block, x = untracked(place, execution)
        parameters = {name: p.detach() for name, p in block.named_parameters()}
        loss = lambda given, x, block=block: (functional_call(block, given, (x,)) ** 3).sum()  # noqa: E731
        found.append(torch.func.grad(loss, argnums=(0, 1))(parameters, x.detach()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at the first jvp
@over_methods
@over_places
def test_functorch_jvp_and_forward_mode_are_those_of_separate_branches(place, method):
    direction = SMALL[place].image().detach().cos()
    found = []
    for execution in ("separate", method):
        block, x = untracked(place, execution)
        found.append(torch.func.jvp(block, (x.detach(),), (direction,)))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
            found[-1] += tuple(torch.autograd.forward_ad.unpack_dual(block(dual)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@over_methods
@over_places
def test_functorch_vmap_is_that_of_separate_branches(place, method):
    images = torch.stack([SMALL[place].image().detach() * factor for factor in (1.0, 2.0, -1.0)])
    found = [torch.vmap(untracked(place, execution)[0])(images) for execution in ("separate", method)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
