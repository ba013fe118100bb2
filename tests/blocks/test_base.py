import copy
import gc

import pytest
import torch
from support import randomise_batch_norms
from torch import nn

import repblocks as rb
from repblocks.blocks.base import as_module
from repblocks.blocks.copying import copied, in_float64
from repblocks.blocks.registry import resolve_block


def random_net(*layers):
    net = nn.Sequential(*layers).double()
    return randomise_batch_norms(net, torch.Generator().manual_seed(0)).eval()


def image(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    return random_net(rb.RepVGGBlock(3, 8, stride=2), rb.RepNeXtBlock(8, 5), rb.BNConv(8, 4), nn.ReLU())


def test_deployed_equals_the_model_and_leaves_it_alone(net):
    x, weights = image(3, 3, 12, 16), copy.deepcopy(net.state_dict())
    collapsed = rb.deployed(net)
    torch.testing.assert_close(collapsed(x), net(x), rtol=1e-11, atol=1e-11)
    assert rb.form_of(net) == "train"
    assert rb.form_of(collapsed) == "deploy"
    assert list(weights) == list(net.state_dict())
    assert all(torch.equal(weights[key], tensor) for key, tensor in net.state_dict().items())


def test_deployed_takes_a_model_in_training_mode_and_gives_its_eval_form(net):
    x = image(3, 3, 12, 16)
    expected = net(x)
    collapsed = rb.deployed(net.train())
    assert net.training
    assert not any(module.training for module in collapsed.modules())
    torch.testing.assert_close(collapsed(x), expected, rtol=1e-11, atol=1e-11)


def test_deployed_shares_no_tensor_with_the_model(net):
    collapsed = rb.deployed(net)
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in collapsed.parameters()}


def test_deployed_keeps_hooks_and_attributes_of_the_rest(net):
    seen = []
    net.register_forward_hook(lambda *_: seen.append("called"))
    net.note = {"trained": "today"}
    collapsed = rb.deployed(net)
    collapsed(image(1, 3, 12, 16))
    assert seen == ["called"]
    assert collapsed.note == net.note


def test_a_model_without_blocks_is_copied():
    net = random_net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    collapsed = rb.deployed(net)
    x = image(2, 3, 8, 9)
    assert torch.equal(collapsed(x), net(x))
    assert collapsed[0] is not net[0]


def test_switching_in_training_mode_is_refused_and_says_what_to_do(net):
    with pytest.raises(rb.ConfigurationError, match=r"training mode.*eval\(\)"):
        rb.switch_to_deploy(net.train())
    assert rb.form_of(net) == "train"


def test_one_block_in_training_mode_is_named(net):
    net[1].token_mixer.train()
    with pytest.raises(rb.ConfigurationError, match=r"1\.token_mixer"):
        rb.switch_to_deploy(net)


def test_the_root_itself_may_be_a_block():
    block = randomise_batch_norms(rb.RepVGGConv(4, 4).double(), torch.Generator().manual_seed(0)).eval()
    x = image(2, 4, 7, 9)
    expected = block(x)
    rb.switch_to_deploy(block)
    assert isinstance(block.conv, nn.Conv2d)
    assert not any(module.training for module in block.modules())
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda block: block], ids=["in two parents", "in one"])
def test_one_block_in_two_places_is_switched_once(wrap):
    shared = rb.RepVGGConv(4, 4)
    net = random_net(wrap(shared), nn.ReLU(), wrap(shared))
    x = image(2, 4, 7, 9)
    expected = net(x)
    collapsed = rb.deployed(net)
    assert [type(m) for m in collapsed.modules()].count(rb.RepVGGConv) == 1
    rb.switch_to_deploy(net)
    for model in (net, collapsed):
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_a_failed_switch_leaves_the_whole_model_trainable(net):
    with torch.no_grad():
        net[2].branches[1].weight[0] = torch.nan
    before = list(net.state_dict())
    for switch in (rb.switch_to_deploy, rb.deployed):
        with pytest.raises(rb.FoldError, match="not finite"):
            switch(net)
    assert rb.form_of(net) == "train"
    assert list(net.state_dict()) == before
    net.train()(image(3, 3, 12, 16)).sum().backward()


def test_weights_beyond_half_precision_are_refused():
    block = rb.RepVGGConv(2, 2).eval()
    nn.init.constant_(block.branches["identity"].weight, 70000.0)
    with pytest.raises(rb.FoldError, match=r"not finite in torch\.float16.*wider dtype"):
        rb.deployed(block.half())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_of_branches_beyond_half_precision_is_refused(sign):
    block = rb.BranchConv([nn.Conv2d(2, 2, 1, bias=False) for _ in range(2)]).half().eval()
    for branch in block.branches.values():
        nn.init.constant_(branch.weight[0, 1], sign * 40000.0)
    with pytest.raises(rb.FoldError, match=r"not finite in torch\.float16"):
        rb.deployed(block)


def test_a_model_of_both_forms_is_in_train_form_and_loads_its_own_weights():
    net = random_net(rb.RepVGGConv(3, 4), rb.RepVGGConv(4, 4))
    net[0].switch_to_deploy()
    assert rb.form_of(net) == "train"
    net.load_state_dict(net.state_dict())


def test_only_a_block_that_is_frozen_as_a_whole_collapses_into_a_frozen_convolution():
    block = rb.RepVGGConv(4, 4).eval()
    block.branches["identity"].requires_grad_(requires_grad=False)
    assert all(p.requires_grad for p in rb.deployed(block).parameters())
    block.requires_grad_(requires_grad=False)
    assert not any(p.requires_grad for p in rb.deployed(block).parameters())


def test_a_copy_in_another_place_keeps_what_is_frozen_integers_and_calculated_attributes():
    norm = nn.BatchNorm2d(4)
    norm.bias.requires_grad_(requires_grad=False)
    norm.doubled = 2 * norm.weight
    twin = copied(norm, in_float64)
    assert (twin.weight.requires_grad, twin.bias.requires_grad) == (True, False)
    assert twin.num_batches_tracked.dtype == torch.int64
    assert twin.weight.dtype == twin.running_var.dtype == twin.doubled.dtype == torch.float64


def test_a_deploy_form_is_made_where_the_branches_are():
    value = rb.fold(nn.Conv2d(2, 3, 1))
    assert as_module(value, like=nn.Conv2d(2, 3, 1, device="meta")).weight.is_meta


def test_a_hooked_branch_is_refused_because_folding_would_lose_the_hook(net):
    net[0].conv.branches["kxk"][0].register_forward_hook(lambda *_: None)
    with pytest.raises(rb.FoldError, match="hooks"):
        rb.deployed(net)


def test_deploying_holds_no_copy_of_the_branches():
    block = rb.RepVGGConv(64, 64).eval()
    collapsed = rb.deployed(block)
    gc.collect()
    assert sum(p.numel() for p in collapsed.parameters()) == 64 * 64 * 9 + 64


def test_sync_batch_norm_collapses_too(net):
    x = image(2, 3, 12, 16)
    expected = net(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    torch.testing.assert_close(rb.deployed(synced)(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_other_form_are_recognised(net, strict):
    train, deploy = net.state_dict(), rb.deployed(net).state_dict()
    with pytest.raises(rb.CheckpointError, match=r"expects train-form weights.*form='deploy'"):
        net.load_state_dict(deploy, strict=strict)
    with pytest.raises(rb.CheckpointError, match=r"expects deploy-form weights.*repblocks\.deployed"):
        rb.deployed(net).load_state_dict(train, strict=strict)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_kind_of_block_recognises_weights_of_its_train_form(net, index):
    with pytest.raises(rb.CheckpointError, match="expects deploy-form weights"):
        rb.deployed(net[index]).load_state_dict(net[index].state_dict())


def test_weights_of_one_plain_convolution_are_recognised():
    with pytest.raises(rb.CheckpointError, match="expects train-form weights"):
        rb.RepVGGConv(4, 4).load_state_dict(nn.Conv2d(4, 4, 3).state_dict())


def test_weights_of_both_forms_together_hold_those_of_the_train_form():
    block, other = rb.RepVGGConv(4, 4).eval(), rb.RepVGGConv(4, 4).eval()
    both = {**block.state_dict(), **rb.deployed(block).state_dict()}
    assert other.load_state_dict(both, strict=False).unexpected_keys == ["conv.weight", "conv.bias"]
    assert torch.equal(other.branches["kxk"][0].weight, block.branches["kxk"][0].weight)


def test_weights_of_other_parts_load_without_the_blocks(net):
    weight = {"3.scale": torch.ones(1)}
    assert net.load_state_dict(weight, strict=False).unexpected_keys == ["3.scale"]


def test_a_block_collapses_on_the_meta_device():
    with torch.device("meta"):
        block = rb.RepVGGConv(8, 8).eval()
    block.switch_to_deploy()
    assert block.conv.weight.is_meta
    assert block.conv.weight.shape == (8, 8, 3, 3)


def test_a_users_own_mixture_collapses():
    pooled = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.AvgPool2d(3, 1, 1))
    block = rb.BranchConv({"wide": nn.Conv2d(4, 4, 5, padding=2), "pooled": pooled, "shortcut": nn.Identity()})
    block = block.double().eval()
    x = image(2, 4, 9, 12)
    torch.testing.assert_close(rb.deployed(block)(x), block(x), rtol=1e-12, atol=1e-12)
    assert rb.deployed(block).conv.kernel_size == (5, 5)


def test_blocks_nest_in_mixtures_in_either_form():
    block = rb.BranchConv([nn.Identity(), rb.RepVGGConv(4, 4), rb.ACConv(4, 4), nn.BatchNorm2d(4)]).double()
    randomise_batch_norms(block, torch.Generator().manual_seed(0)).eval()
    x = image(2, 4, 9, 12)
    expected = block(x)
    torch.testing.assert_close(rb.deployed(block)(x), expected, rtol=1e-12, atol=1e-12)
    block.branches["1"].switch_to_deploy()
    torch.testing.assert_close(rb.fold(block)(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rb.fold(rb.deployed(block))(x), expected, rtol=1e-12, atol=1e-12)


def test_a_mixture_of_maps_over_channels_is_a_pointwise_convolution():
    block = random_net(rb.BranchConv([nn.BatchNorm2d(4), nn.Identity()]))[0]
    assert (block.kernel_size, block.stride, block.padding) == ((1, 1), (1, 1), ((0, 0), (0, 0)))
    x, collapsed = image(2, 4, 5, 6), rb.deployed(block)
    assert isinstance(collapsed.conv, nn.Conv2d)
    torch.testing.assert_close(collapsed(x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("branches", "reason"),
    [
        ([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)], "output grids"),
        ([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1)], "out_channels"),
        ([nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))], "zero padding after a bias"),
        ([nn.Conv2d(4, 4, 1), nn.ReLU()], "no rule folds ReLU"),
        ([nn.Identity()], "in_channels"),
        ([], "at least one branch"),
    ],
)
def test_mixtures_that_do_not_fold_are_refused_at_construction(branches, reason):
    with pytest.raises(rb.FoldError, match=reason):
        rb.BranchConv(branches)


def test_an_unknown_block_name_suggests_the_nearest():
    with pytest.raises(rb.ConfigurationError, match="block=repvg is unknown; did you mean one of: repvgg"):
        resolve_block("repvg")


def test_a_block_name_is_not_taken_twice():
    with pytest.raises(rb.ConfigurationError, match="registered already, as RepVGGConv"):
        rb.register_block("repvgg")(rb.ACConv)
    assert rb.BLOCKS["repvgg"] is rb.RepVGGConv
