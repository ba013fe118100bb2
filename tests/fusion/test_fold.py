"""From modules to values: every rule, chains and branches of them, dtypes and devices."""

import pytest
import torch
from fusion.laws import assert_same, assert_value_is
from fusion.modules import conv_norm, prepared
from strategies import randn
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from repblocks.errors import FoldError
from repblocks.fusion import AffineConv, Concat, SplitConcat, Sum, compose, fold
from repblocks.verification import verify


def assert_folds(module: nn.Module, x: torch.Tensor) -> AffineConv:
    value = fold(module, x.shape[1])
    with torch.no_grad():
        assert_value_is(detached(value), x, module(x))
    return value


def detached(value: AffineConv) -> AffineConv:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


@pytest.mark.parametrize(
    ("module", "rank"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), 1),
        (nn.Conv2d(4, 6, (1, 3), stride=(2, 1), dilation=(1, 2), bias=False), 2),
        (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), padding_mode="circular"), 3),
        (nn.BatchNorm1d(4), 0),
        (nn.BatchNorm1d(4), 1),
        (nn.BatchNorm2d(4), 2),
        (nn.BatchNorm3d(4), 3),
        (nn.SyncBatchNorm(4), 2),
        (nn.Sequential(nn.AvgPool1d(2), nn.BatchNorm1d(4)), 1),
        (nn.Sequential(nn.AvgPool2d((2, 3), stride=1), nn.BatchNorm2d(4)), 2),
        (nn.Sequential(nn.AvgPool3d(2, padding=1), nn.BatchNorm3d(4)), 3),
        (nn.Linear(4, 6), 0),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)), 0),
        (conv_norm(4, 6, 3, padding=1), 2),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, stride=2)), 2),
        (nn.Sequential(conv_norm(4, 8, 1, bias=False), nn.Identity(), nn.Conv2d(8, 6, (5, 3), bias=False)), 2),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, bias=False), nn.AvgPool2d(3, stride=2, padding=1)), 2),
        (Sum([conv_norm(4, 4, 3, padding=1), conv_norm(4, 4, 1), nn.BatchNorm2d(4), nn.Identity()]), 2),
        (Concat([conv_norm(4, 4, (1, 3), padding=(0, 1)), nn.Identity(), conv_norm(4, 2, 1)]), 2),
        (SplitConcat([nn.Conv2d(1, 2, 3, padding=1), nn.Identity(), nn.Conv2d(2, 2, 5, padding=2)], (1, 1, 2)), 2),
        (nn.Sequential(Sum({"3x3": nn.Conv2d(4, 4, 3), "2x2": nn.Conv2d(4, 4, 2, dilation=2)}), nn.AvgPool2d(2)), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_value_of_a_module_computes_what_the_module_computes(module, rank):
    assert_folds(prepared(module), randn(1, 3, 4, *(9, 8, 7)[:rank]))


@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.Sequential(), nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AvgPool2d(1)],
    ids=repr,
)
def test_a_module_that_does_nothing_in_eval_mode_folds_to_the_identity(module):
    x = randn(1, 2, 3, 4, 5)
    assert torch.equal(fold(module.eval(), 3).to(dtype=x.dtype)(x), x)


def test_a_long_chain_of_many_kinds_folds_to_one_conv():
    chain = nn.Sequential(
        nn.Dropout2d(),
        conv_norm(4, 6, 1, bias=True),
        conv_norm(6, 6, (3, 2), groups=3, dilation=(1, 2)),
        nn.AvgPool2d(2),
        conv_norm(6, 2, 2, stride=2, padding_mode="reflect"),
    )
    value = assert_folds(prepared(chain), randn(1, 2, 4, 13, 17))
    assert (value.in_channels, value.out_channels, value.stride) == (4, 2, (4, 4))


def test_the_value_refers_to_live_parameters():
    module = nn.Conv2d(3, 4, 3)
    assert fold(module).weight is module.weight


def test_branches_learn_their_channels_from_each_other():
    assert fold(Sum([nn.Identity(), nn.AvgPool2d(1), nn.Conv2d(4, 4, 1)])).in_channels == 4
    assert fold(Sum([nn.Identity(), nn.BatchNorm2d(4)]).eval()).in_channels == 4
    assert fold(nn.Sequential(nn.Identity(), nn.Conv2d(5, 3, 1))).in_channels == 5
    assert fold(nn.Sequential(nn.Identity(), nn.ConvTranspose2d(5, 3, 1))).in_channels == 5
    assert fold(nn.Sequential(nn.Dropout(), nn.Linear(5, 4)).eval()).in_channels == 5
    assert fold(Sum([nn.Identity(), nn.Sequential(nn.Identity(), Sum([nn.Conv1d(4, 4, 1)]))])).in_channels == 4
    assert fold(nn.Sequential(nn.Conv2d(2, 6, 1), nn.AvgPool2d(2))).out_channels == 6
    assert fold(Sum([nn.Identity(), Concat([nn.Conv2d(4, 1, 1), nn.Conv2d(4, 3, 1)])])).in_channels == 4
    assert fold(Sum([nn.Identity(), SplitConcat([nn.Conv2d(1, 2, 1), nn.Conv2d(3, 2, 1)], (1, 3))])).in_channels == 4


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.AvgPool2d(2), nn.Dropout(0.0), nn.Sequential(), Sum([nn.Identity()])]
)
def test_a_module_that_does_not_tell_its_channels_needs_them_as_an_argument(module):
    with pytest.raises(FoldError, match=r"does not tell its channels; call fold\(module, in_channels=...\)"):
        fold(module)
    assert fold(module, in_channels=3).in_channels == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_constants_take_the_dtype_of_the_convs_beside_them(dtype):
    branches = Sum([nn.AvgPool2d(3, stride=1, padding=1), nn.Identity(), nn.Conv2d(4, 4, 1).to(dtype)])
    value = fold(branches)
    assert value.weight.dtype == value.bias.dtype == dtype
    assert fold(nn.Sequential(branches, nn.Identity())).weight.dtype == dtype
    assert fold(SplitConcat([nn.AvgPool2d(1), nn.Conv2d(3, 2, 1).to(dtype)], (1, 3))).weight.dtype == dtype
    norm = nn.BatchNorm2d(4, affine=False).eval().to(dtype)
    assert fold(norm).weight.dtype == fold(Sum([nn.AvgPool2d(1), norm])).weight.dtype == dtype


def test_complex_weights_stay_complex():
    conv, x = nn.Conv2d(4, 4, 1, dtype=torch.complex64), torch.randn(2, 4, 3, 5, dtype=torch.complex64)
    with torch.no_grad():
        torch.testing.assert_close(fold(conv)(x), conv(x))
        torch.testing.assert_close(fold(Sum([conv, nn.Identity()]))(x), conv(x) + x)


def test_constants_do_not_take_the_dtype_of_counters():
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("gamma", randn(5, 4))

    @fold.register(Counted)
    def _(module, in_channels):
        return AffineConv(weight=module.gamma[:, None], groups=in_channels)

    pools = Sum([Counted(), nn.AvgPool2d(3, stride=1, padding=1)])
    assert_same(torch.full((4, 1), 1 / 9, dtype=torch.float64), fold(pools, 4).weight[..., 0, 0])


def test_constants_keep_the_accuracy_of_the_convs_beside_them():
    silent = nn.Conv2d(4, 4, 5, bias=False).double()
    nn.init.zeros_(silent.weight)
    pools = nn.Sequential(nn.AvgPool2d(3, stride=1), nn.AvgPool2d(3, stride=1))
    value = fold(Sum([pools, silent]))
    assert value.weight.dtype == torch.float64
    assert abs(value.weight[2, 2, 2, 2].item() - 3 / 27) < 1e-15
    assert abs(value.weight[2, 2, 0, 0].item() - 1 / 81) < 1e-15


def test_constants_go_to_the_device_of_the_convs_beside_them():
    branches = Sum([nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(4, 4, 1, device="meta")])
    assert fold(branches).weight.device.type == "meta"


def test_constants_alone_have_the_default_dtype():
    assert fold(nn.AvgPool2d(2), 3).weight.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_convs_beside_float32_norms_fold_in_float32(half):
    module = prepared(conv_norm(4, 4, 3, padding=1))
    module[0].to(half)
    module[1].float()
    value = fold(module)
    assert value.weight.dtype == value.bias.dtype == torch.float32
    with torch.no_grad():
        assert_same(module.float()(randn(1, 2, 4, 6, 5).float()), value(randn(1, 2, 4, 6, 5).float()))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_folds_as_accurately_as_it_runs(half):
    module = prepared(Sum([conv_norm(8, 8, 3, padding=1), conv_norm(8, 8, 1), nn.BatchNorm2d(8)])).to(half)
    value = fold(module)
    assert value.weight.dtype == value.bias.dtype == half
    verify(module, value, randn(1, 4, 8, 9, 7).to(half), scope="block").raise_if_different("the folded block")


def test_a_parametrized_weight_folds_as_it_is_now():
    module = parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1).double())
    module.parametrizations.weight.original0.data.mul_(2.0)
    assert_folds(nn.Sequential(module, nn.BatchNorm2d(6).double()).eval(), randn(1, 2, 4, 5, 6))


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), Sum([nn.BatchNorm2d(4), nn.Identity()])],
)
def test_batch_norm_in_training_mode_is_refused(module):
    with pytest.raises(FoldError, match=r"in training mode and normalises by each batch; call eval\(\) first"):
        fold(module)


def test_folding_in_training_mode_would_have_been_wrong():
    module = prepared(conv_norm(4, 4, 3))
    x, value = randn(1, 2, 4, 6, 5), fold(module)
    with torch.no_grad():
        assert not torch.allclose(module.train()(x), value(x))


def test_dropout_in_training_mode_is_refused_unless_it_drops_nothing():
    with pytest.raises(FoldError, match=r"drops at random; call eval\(\) first"):
        fold(nn.Dropout(0.1), 4)
    assert fold(nn.Dropout(0.0), 4).in_channels == 4


def test_batch_norm_without_running_statistics_is_refused_in_both_modes():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    for training in (True, False):
        with pytest.raises(FoldError, match="no running statistics"):
            fold(norm.train(training))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 4)),
        nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Conv2d(4, 4, 1)),
        Sum([nn.Linear(4, 4), nn.Conv2d(4, 4, 1)]),
        Concat([nn.AvgPool2d(1), nn.Sequential(nn.Linear(4, 4))]),
        SplitConcat([nn.Linear(4, 4), nn.Conv2d(4, 4, 1)], (4, 4)),
    ],
)
def test_a_linear_layer_among_convs_is_refused_because_it_acts_on_the_last_dimension(module):
    with pytest.raises(FoldError, match=r"acts on the last dimension of the map.*use a 1x1 convolution"):
        fold(module, 4)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)])
def test_a_module_without_a_rule_is_refused_and_told_how_to_get_one(module):
    for wrapped in (module, nn.Sequential(nn.Conv2d(4, 4, 1), module), Sum([module])):
        with pytest.raises(FoldError, match=rf"no rule folds {type(module).__name__}.*@repblocks.fold.register"):
            fold(wrapped, 4)


def test_a_registered_rule_folds_a_users_own_module_anywhere():
    class LayerScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(randn(5, 6))

        def forward(self, x):
            return x * self.gamma[:, None, None]

    @fold.register(LayerScale)
    def _(module, in_channels):
        return AffineConv(weight=module.gamma[:, None], groups=in_channels)

    assert_folds(nn.Sequential(nn.Conv2d(4, 6, 3).double(), LayerScale()), randn(1, 2, 4, 5, 6))


def test_a_rule_for_a_class_holds_for_a_subclass_that_keeps_its_forward():
    class Named(nn.Conv2d):
        """Only the name differs."""

    assert_folds(Named(4, 2, 3).double(), randn(1, 2, 4, 5, 6))


def test_folding_changes_nothing_and_gives_the_same_value_twice():
    module = prepared(Sum([conv_norm(4, 4, 3, padding=1), conv_norm(4, 4, 1), nn.BatchNorm2d(4)]))
    before = {name: (tensor.clone(), tensor._version) for name, tensor in module.state_dict().items()}
    once, again = fold(module), fold(module)
    assert torch.equal(once.weight, again.weight)
    assert torch.equal(once.bias, again.bias)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor._version == before[name][1]


def test_chains_of_modules_and_of_values_agree():
    a, b = nn.Conv2d(2, 3, 3).double(), nn.Conv2d(3, 4, 2).double()
    assert torch.equal(fold(nn.Sequential(a, b)).weight, compose(fold(a), fold(b)).weight)
