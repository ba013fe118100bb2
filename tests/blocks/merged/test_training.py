"""Two hundred steps on digits: both executions go down the same path.

A path is only one where rounding does not grow. At the usual start, deep stacks of ReLU and BatchNorm over small maps
make 1e-1 of 1e-15 within three steps, in one execution compared with itself. So these nets start quietly, each block
close to its identity branch, keep maps of 2x2 to the end, and clip their gradients: the same perturbation is then
below 1e-13 after two hundred steps.
"""

import pytest
import torch
from blocks.merged.cases import saved_bytes
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import repblocks as rb

STEPS, BATCH = 200, 16
FOR_DIGITS = {"num_classes": 10, "in_chans": 1, "stem_stride": 1, "strides": (1, 2, 2, 1)}
# A quarter of the channels: depthwise convolutions in float64 run channel by channel on CPUs. Half of the long stages.
MODELS = {
    "rb_mobileone_s0": {"widths": (12, 32, 64, 256), "depths": (2, 4, 4, 1)},
    "rb_repvgg_a0": {"widths": (12, 24, 48, 320), "depths": (2, 4, 7, 1)},
}


def batches():
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images / 8 - 1)[:, None], torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).repeat(3)
    for chosen in order[: STEPS * BATCH].split(BATCH):
        yield images[chosen], labels[chosen]


def quiet_start(model):
    """Branches beside an identity start at a tenth of it."""
    for block in (module for module in model.modules() if isinstance(module, rb.RepConv)):
        branches = dict(block.branches.named_children())
        for branch in branches.values() if "identity" in branches else ():
            if branch is not branches["identity"]:
                torch.nn.init.constant_(branch[-1].weight, 0.1)


def made(name):
    torch.manual_seed(0)
    model = rb.create_model(name, **FOR_DIGITS, **MODELS[name]).double().train()
    quiet_start(model)
    return model


def losses(name, execution):
    model = made(name)
    rb.set_execution(model, execution)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for images, labels in batches():
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_both_executions_have_the_same_losses_at_every_step(name):
    plan = rb.execution_plan(in_merged_execution(name), (1, 8, 8), batch_size=BATCH)
    assert {row.method for row in plan.blocks} <= {"patches", "outputs"}
    separate, merged = (list(losses(name, execution)) for execution in ("separate", "merged"))
    assert len(merged) == STEPS
    for i, (expected, got) in enumerate(zip(separate, merged, strict=True)):
        assert abs(got - expected) <= 1e-4 * expected, f"step {i}: {got} and {expected}"
    assert sum(merged[-20:]) < 0.8 * sum(merged[:20])


def in_merged_execution(name):
    model = made(name)
    rb.set_execution(model, "merged")
    return model


@pytest.mark.parametrize("name", ["rb_mobileone_s0", "rb_mobileone_s1", "rb_repvgg_a0", "rb_repvit_m1_0"])
def test_whole_models_keep_no_more_for_backward(name):
    model = rb.create_model(name, num_classes=10).train().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    kept = {}
    for execution in ("separate", "auto", "merged"):
        rb.set_execution(model, execution)
        model(x)  # the choice itself keeps nothing
        kept[execution] = saved_bytes(model, x)
    assert kept["auto"] <= kept["separate"]
    assert kept["merged"] <= kept["separate"]
