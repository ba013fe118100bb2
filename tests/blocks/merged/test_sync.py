"""Synchronised norms on two CPU processes: what one process leaves on the whole batch."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from blocks.claims import BUILDERS
from blocks.merged.cases import (
    METHODS,
    cotangent,
    differences,
    image,
    left_by,
    made,
    over,
    scales,
    small_net,
    step,
    stepped,
    training,
)
from blocks.merged.mixtures import make_mixture
from support import batch_norms
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import repblocks as rb

PLACES = {
    "dense": over(4, 4, 3, size=(5, 6), batch=5),
    "stem": over(3, 8, 3, stride=2, size=(7, 6), batch=5, channels_last=True),
    "pointwise": over(6, 6, 1, size=(3, 4), batch=5),
    "depthwise": over(4, 4, 3, groups=4, size=(5, 6), batch=5),
    "depthwise_channels_last": over(4, 4, 3, groups=4, size=(5, 4), batch=5, channels_last=True),
    "depthwise_stride_2": over(4, 4, 5, groups=4, stride=2, size=(7, 6), batch=5),
}
NAMES = ["repvgg", "mobileone", "repvit", "norms_of_all_kinds", "norm_first"]
MAKERS = {**BUILDERS, **{name: make_mixture(name) for name in ("norms_of_all_kinds", "norm_first")}}
EXECUTIONS = ("separate", "auto", "merged", *METHODS)
PIXELS = over(6, 6, 1, size=(1, 1), batch=3)
TEN_SECONDS = timedelta(seconds=10)


def part(x, rank):
    """Unequal parts of a batch: of 5 images 3 and 2, of a large one all but one and one."""
    first = (len(x) + 1) // 2 if len(x) < 100 else len(x) - 1
    return x[:first] if rank == 0 else x[first:]


def in_two_processes(work, folder):
    """Run ``work(rank)`` in two processes that are connected, and give what each returns."""
    mp.start_processes(joined, (work, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def joined(rank, work, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TEN_SECONDS)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def synchronised(block, execution):
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    rb.set_execution(twin, execution)
    return twin


def step_on_part(block, x, rank):
    leaf = part(x, rank).detach().requires_grad_(x.requires_grad)
    y = block(leaf)
    if y.requires_grad:
        y.backward(part(cotangent(torch.empty(len(x), *y.shape[1:], dtype=y.dtype)), rank))
    return {"output": y.detach()} | left_by(block, leaf)


def whole(parts):
    """What two processes left, as one: outputs and input gradients side by side, parameter gradients summed."""
    found = {}
    for name, first in parts[0].items():
        second = parts[1][name]
        if name in ("output", "gradient of input"):
            found[name] = torch.cat([first, second])
        elif name.startswith("gradient"):
            found[name] = first + second
        else:
            assert torch.equal(first, second)
            found[name] = first
    return found


def cases():
    for name in NAMES:
        for place, geometry in PLACES.items():
            yield f"{name} {place}", made(MAKERS[name], geometry), geometry.image()
    stem = PLACES["stem"]
    yield "input without gradient", made(BUILDERS["mobileone"], stem), stem.image().detach()
    frozen = made(BUILDERS["repvgg"], PLACES["dense"])
    for norm in batch_norms(frozen)[1:]:
        norm.eval()
    yield "all norms frozen but one", frozen, PLACES["dense"].image()
    fixed = made(BUILDERS["repvgg"], PLACES["depthwise"])
    for norm in batch_norms(fixed):
        norm.eval()
    yield "all norms frozen", fixed, PLACES["depthwise"].image()


ALL = [case for case, _, _ in cases()]
# Where a way has to suit, so that the norms are synchronised. No way merges a norm in front of a convolution.
MERGED = [case for case in ALL if "norm_first" not in case]
MERGING = {"separate": [], "patches": [case for case in MERGED if "dense" not in case]}


@pytest.fixture(scope="module", params=EXECUTIONS)
def left_by_two(request, tmp_path_factory):
    """Every case in one execution, in one pair of processes."""

    def work(rank):
        return {name: attempted(synchronised(block, request.param), x, rank) for name, block, x in cases()}

    parts = in_two_processes(work, tmp_path_factory.mktemp("sync"))
    return request.param, {name: [left[name] for left in parts] for name in parts[0]}


def attempted(block, x, rank):
    """Torch's own SyncBatchNorm raises on the CPU, on both processes alike."""
    try:
        return step_on_part(block, x, rank)
    except ValueError as error:
        return error


@pytest.mark.parametrize("case", ALL)
def test_two_processes_leave_what_one_leaves_on_the_whole_batch(case, left_by_two):
    execution, left = left_by_two
    if any(isinstance(part, ValueError) for part in left[case]):
        # Separate branches run torch's own norms.
        assert all("SyncBatchNorm expected input tensor to be on GPU" in str(part) for part in left[case])
        assert case not in MERGING.get(execution, MERGED)
        return
    block, x = next((block, x) for name, block, x in cases() if name == case)
    expected = stepped(block, x, "separate")
    wrong = differences(whole(left[case]), expected, scales(block, x, expected))
    assert not wrong, wrong


@pytest.mark.parametrize("execution", ["auto", *METHODS])
@pytest.mark.parametrize("name", ["mobileone", "repvit"])
def test_one_process_may_have_a_single_value_per_channel(name, execution, tmp_path):
    block, x = made(BUILDERS[name], PIXELS), PIXELS.image()
    parts = in_two_processes(lambda rank: step_on_part(synchronised(block, execution), x, rank), tmp_path)
    expected = stepped(block, x, "separate")
    wrong = differences(whole(parts), expected, scales(block, x, expected))
    assert not wrong, wrong


def test_both_processes_choose_alike_whatever_their_parts(tmp_path):
    """Two ways on two processes would wait for each other's sums for ever: neither has the other's batch to go by."""
    blocks = [
        (training(rb.MobileOneConv(8, 8, 3, groups=8)), image(257, 8, 6, 6)),
        (training(rb.RepVGGConv(3, 8, 3, stride=2)), image(257, 3, 8, 8)),
        (training(rb.MobileOneConv(32, 32, 1)), image(257, 32, 2, 2)),
    ]

    def work(rank):
        return [step_on_part(synchronised(block, how), x, rank) for block, x in blocks for how in ("auto", "merged")]

    parts = in_two_processes(work, tmp_path)
    for i, (block, x) in enumerate(blocks):
        expected = stepped(block, x, "separate")
        for k in (2 * i, 2 * i + 1):
            wrong = differences(whole([left[k] for left in parts]), expected, scales(block, x, expected))
            assert not wrong, wrong


def test_norms_keep_to_their_process_group(tmp_path):
    """One process in each group: as if each were alone."""
    block, x = made(BUILDERS["mobileone"], PLACES["pointwise"]), PLACES["pointwise"].image()

    def work(rank):
        groups = [dist.new_group([0]), dist.new_group([1])]
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block), groups[rank])
        rb.set_execution(twin, "patches")
        return step_on_part(twin, x, rank)

    for rank, left in enumerate(in_two_processes(work, tmp_path)):
        alone = step_on_part(copy.deepcopy(block), x, rank)
        for name, value in alone.items():
            torch.testing.assert_close(left[name], value, rtol=1e-9, atol=1e-9)


def three_steps(model, x, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("execution", ["auto", "patches", "outputs"])
def test_a_model_under_ddp_trains_as_on_one_process(execution, tmp_path):
    """Wrapped first and converted then: DDP refuses SyncBatchNorm on the CPU when it is built."""
    x, labels = image(6, 3, 9, 8).detach(), torch.arange(6) % 5

    def work(rank):
        model = DistributedDataParallel(small_net())
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        rb.set_execution(model, execution)
        return three_steps(model, part(x, rank), part(labels, rank))

    expected = three_steps(small_net(), x, labels)
    for left in in_two_processes(work, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(left[name], value, rtol=1e-9, atol=1e-9)


def test_plain_norms_under_ddp_keep_to_their_process(tmp_path):
    x, labels = image(6, 3, 9, 8).detach(), torch.arange(6) % 5

    def work(rank):
        left = []
        for execution in ("separate", "merged"):
            model = DistributedDataParallel(small_net())
            rb.set_execution(model, execution)
            left.append(three_steps(model, part(x, rank), part(labels, rank)))
        return left

    for separate, merged in in_two_processes(work, tmp_path):
        for name, value in separate.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-9, atol=1e-9)


def test_a_converted_block_by_itself_needs_no_processes():
    block, x = made(BUILDERS["mobileone"], PLACES["depthwise"]), PLACES["depthwise"].image()
    expected = stepped(block, x, "separate")
    for execution in EXECUTIONS:
        left = step(synchronised(block, execution), x)
        for name, value in expected.items():
            torch.testing.assert_close(left[name], value, rtol=1e-9, atol=1e-9)
