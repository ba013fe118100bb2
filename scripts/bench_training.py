"""What a training step of many branches costs beside a plain network: python scripts/bench_training.py [model ...].

Up to four sides take turns, step by step, on one thread (a step is forward, cross-entropy, backward and SGD):

  plain     the deploy architecture with one convolution and BatchNorm in the place of each block
  timm      timm's own multi-branch model
  separate  our model, every branch by itself
  ours      our model, each block executed as `rb.set_execution(model, "auto")` chooses

Every side runs in NCHW and in channels_last first, by itself in a fresh process: the faster layout takes part, and the
memory is that of this process (peak RSS) and of the tensors its forward pass saved for backward. Times are medians of
the ratios within a round. Linux only.
"""

import argparse
import json
import re
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repblocks as rb
from repblocks.blocks import ConvBN, RepConv

Result = TypeVar("Result")


class Case(NamedTuple):
    """timm's model of the same layout, and the largest ratios that issue 7 allows, by column."""

    timm: str | None
    allowed: Mapping[str, float]


def _case(timms: str | None, plain: float, timm: float | None, saved: float) -> Case:
    beside_timm = {} if timm is None else {"ours / timm": timm}
    return Case(timms, {"ours / plain": plain, **beside_timm, "saved, ours / plain": saved})


CASES: Mapping[str, Case] = {
    "rb_mobileone_s0": _case("mobileone_s0", plain=1.5, timm=0.30, saved=1.0),
    "rb_mobileone_s1": _case("mobileone_s1", plain=1.5, timm=0.75, saved=1.0),
    # timm calls this layout m1 where its 1x1 has a BatchNorm of its own, as in the first version of the paper.
    "rb_repvit_m0_9": _case("repvit_m1", plain=1.15, timm=0.70, saved=1.0),
    "rb_repvgg_a0": _case("repvgg_a0", plain=1.35, timm=1.0, saved=1.15),
    "rb_repnext_u3_tiny": _case(None, plain=1.35, timm=None, saved=1.2),
}
RATIOS = "timm / plain | separate / plain | ours / plain | ours / timm | saved, ours / plain | RSS, ours / plain"
COLUMNS = f"model | batch | {RATIOS} | layouts"
PROFILE_COLUMNS = (
    "side | images/s | in convolutions and products | images/s if nothing else took time | most of the rest"
)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
WARMUP, ALONE_MS = 2, 1500
"""Rounds that are not measured; how long a side runs by itself at most, if that is more than two steps."""
PRODUCT = re.compile(r"conv|(mm|mv|dot)_?$|matmul|^linear")
"""Operations whose time is arithmetic that the network cannot do without."""


class Size(NamedTuple):
    """Images of a step and their height and width; written ``8@128``."""

    batch: int
    pixels: int

    @classmethod
    def of(cls, text: str) -> "Size":
        batch, pixels = map(int, text.split("@"))
        return cls(batch, pixels)

    def __str__(self) -> str:
        return f"{self.batch}@{self.pixels}"


SIZES = (Size(8, 128), Size(32, 224))


class Side(NamedTuple):
    """One of the networks that are compared: a name of `SIDES`, for a model and a size."""

    name: str
    model: str
    size: Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """What a side costs in a process of its own.

    Attributes:
        layout: A key of `LAYOUTS`.
        step_ms: The fastest step.
        saved_bytes: Of the tensors that the forward pass keeps for backward, without parameters and buffers.
        rss_bytes: The peak of the process.
        rss_bytes_before: Of the process before it made the network.
        profile: Of a step, where it was asked for.
    """

    layout: str
    step_ms: float
    saved_bytes: int
    rss_bytes: int
    rss_bytes_before: int
    profile: Mapping[str, Any] | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = sorted({*options.models} - {*rb.list_models()})
    if unknown:
        parser.error(f"got model {unknown[0]!r}; needed names of rb.list_models()")
    rows: list[dict[str, Any]] = []
    print(*header(COLUMNS), sep="\n", flush=True)
    for model in options.models or CASES:
        for size in options.sizes:
            rows.append(measure(model, size, options))
            print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
    if options.profile:
        print(*(line for row in rows for line in profile_table(row)), sep="\n")
    if options.json:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        found = {**versions, "threads": options.threads, "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help="of rb.list_models(); those of issue 7 by default")
    parser.add_argument("--sizes", nargs="+", type=Size.of, default=SIZES, metavar="BATCH@PIXELS", help="8@128 32@224")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=8, metavar="GIB", help="a side that needs more is left out")
    parser.add_argument("--profile", action="store_true", help="also images/s, and the share of the arithmetic in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    return parser


def measure(model: str, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """A row: each side alone, then all that fit into memory in turns."""
    alone = {
        name: found
        for name in SIDES
        if (name != "timm" or timms_name(model)) and (found := _faster_alone(Side(name, model, size), options))
    }
    layouts = {Side(name, model, size): found.layout for name, found in alone.items()}
    times = in_a_child(options, in_turns, layouts, options.rounds) or {}
    return {
        "model": model,
        "timm": timms_name(model),
        "size": size._asdict(),
        "alone": {name: asdict(found) for name, found in alone.items()},
        "step_ms": {name: statistics.median(values) for name, values in times.items()},
        "ratios": ratios(times, alone),
        "allowed": CASES[model].allowed if model in CASES else {},
    }


def _faster_alone(side: Side, options: argparse.Namespace) -> Alone | None:
    found = [in_a_child(options, alone, side, layout, options) for layout in LAYOUTS]
    return min((one for one in found if one), key=lambda one: one.step_ms, default=None)


def in_a_child(options: argparse.Namespace, function: Callable[..., Result], *args: object) -> Result | None:
    """What a function returns in a fresh process; None, and a line on stderr, if it crashes or runs out of memory.

    This process runs no network, so that its copies start alike and autograd works in them.
    """
    limits = (options.threads, int(options.memory * 2**30))
    with ProcessPoolExecutor(1, get_context("fork"), _limit, limits) as pool:
        try:
            return pool.submit(function, *args).result()
        except RuntimeError as error:
            if not isinstance(error, BrokenProcessPool) and "DefaultCPUAllocator" not in str(error):
                raise
            print(f"left out: {function.__name__} of {args[0]}: {error}", file=sys.stderr)
            return None


def _limit(threads: int, memory_bytes: int) -> None:
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def alone(side: Side, layout: str, options: argparse.Namespace) -> Alone:
    """Steps of one side, in this process."""
    before = rss_bytes("VmRSS")
    step = Step(side, layout)
    step()
    times = [milliseconds(step)]
    while len(times) < options.rounds and (len(times) == 1 or sum(times) < ALONE_MS):
        times.append(milliseconds(step))
    return Alone(
        layout=layout,
        step_ms=min(times),
        rss_bytes=rss_bytes("VmHWM"),
        rss_bytes_before=before,
        saved_bytes=saved_bytes(step.model, step.images),
        profile=profile_of(step) if options.profile else None,
    )


def in_turns(layouts: Mapping[Side, str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each side's steps, which take turns."""
    steps = {side.name: Step(side, layout) for side, layout in layouts.items()}
    turns = [{name: milliseconds(step) for name, step in steps.items()} for _ in range(WARMUP + rounds)]
    return {name: [turn[name] for turn in turns[WARMUP:]] for name in steps}


class Step:
    """A training step of a side on random images: forward, cross-entropy, backward, SGD with momentum."""

    def __init__(self, side: Side, layout: str) -> None:
        torch.manual_seed(0)
        self.model = SIDES[side.name](side.model).train().to(memory_format=LAYOUTS[layout])
        batch, pixels = side.size
        self.images = torch.randn(batch, 3, pixels, pixels).to(memory_format=LAYOUTS[layout])
        self.labels = torch.randint(1000, (batch,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def our_model(name: str, method: Literal["auto", "separate"]) -> nn.Module:
    model = rb.create_model(name)
    rb.set_execution(model, method)
    return model


def plain_twin(model: nn.Module) -> nn.Module:
    """Puts one convolution and BatchNorm in the place of each block that collapses into a convolution."""
    _put_plain_blocks(model)
    rb.set_execution(model, "separate")
    return model


def _put_plain_blocks(model: nn.Module) -> None:
    for name, child in list(model.named_children()):
        if isinstance(child, RepConv):
            setattr(model, name, _conv_bn(child))
        else:
            _put_plain_blocks(child)


def _conv_bn(block: RepConv) -> ConvBN:
    shape: Any = (block.in_channels, block.out_channels, block.kernel_size)
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return ConvBN(*shape, **{name: getattr(block, name) for name in names})


def timms_name(model: str) -> str | None:
    name = CASES[model].timm if model in CASES else model.removeprefix("rb_")
    return name if name in timm.list_models() else None


def timms(model: str) -> nn.Module:
    """timm's model, made to survive channels_last.

    torch corrupts memory in the backward pass of strided 1x1 convolutions of 3 or 4 channels there. Reading every
    second pixel first is the same convolution without a stride.
    """
    name = timms_name(model)
    assert name is not None
    network = timm.create_model(name)
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) != conv.stride and conv.in_channels <= 4:
            down, right = conv.stride
            conv.register_forward_pre_hook(lambda _, inputs, down=down, right=right: inputs[0][..., ::down, ::right])
            conv.stride = (1, 1)
    return network


SIDES: Mapping[str, Callable[[str], nn.Module]] = {
    "plain": lambda name: plain_twin(rb.create_model(name)),
    "timm": timms,
    "separate": lambda name: our_model(name, "separate"),
    "ours": lambda name: our_model(name, "auto"),
}


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def rss_bytes(field: str) -> int:
    """``VmRSS``, the memory of this process now, or ``VmHWM``, its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the storages that a forward pass saves for backward, each once, without parameters and buffers."""
    own = {
        tensor.untyped_storage().data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors
    }
    # The storages themselves are kept: another could take the address of one that is freed.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


class OpTimes(TorchDispatchMode):
    """Seconds in each of the operations that torch dispatches, forward and backward; those inside one count as its."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = defaultdict[str, float](float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.perf_counter() - start
        return result


def profile_of(step: Callable[[], object]) -> dict[str, Any]:
    """Shares in the time of all operations: of convolutions and matrix products, and of the others, slowest first."""
    with OpTimes() as times:
        step()
    total = sum(times.seconds.values())
    others = {name: seconds / total for name, seconds in times.seconds.items() if not PRODUCT.search(name)}
    return {"products": 1 - sum(others.values()), "others": dict(sorted(others.items(), key=lambda other: -other[1]))}


def ratios(times: Mapping[str, Sequence[float]], alone: Mapping[str, Alone]) -> dict[str, float]:
    """Medians of the ratios of two steps of one round, and ratios of memory, of the sides that are there."""
    pairs = [("timm", "plain"), ("separate", "plain"), ("ours", "plain"), ("ours", "timm")]
    found: dict[str, float] = {}
    for a, b in pairs:
        if a in times and b in times:
            found[f"{a} / {b}"] = statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        if a in alone and b in alone:
            found[f"saved, {a} / {b}"] = alone[a].saved_bytes / alone[b].saved_bytes
            found[f"RSS, {a} / {b}"] = alone[a].rss_bytes / alone[b].rss_bytes
    return found


def cells(row: Mapping[str, Any]) -> list[str]:
    """A line of the table; in brackets what the issue allows."""
    layouts = {name: found["layout"] for name, found in row["alone"].items()}
    figures = [
        (f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-")
        + (f" ({row['allowed'][name]:.2f})" if name in row["allowed"] else "")
        for name in RATIOS.split(" | ")
    ]
    used = {*layouts.values()}
    said = used.pop() if len(used) == 1 else ", ".join(f"{name} {layout}" for name, layout in layouts.items())
    return [f"`{row['model']}`", str(Size(**row["size"])), *figures, said]


def header(columns: str) -> list[str]:
    return [f"| {columns} |", "|---" * (columns.count(" | ") + 1) + "|"]


def profile_table(row: Mapping[str, Any]) -> list[str]:
    """How far each side of a row is from the arithmetic it cannot do without."""
    title = f"\n`{row['model']}`, {Size(**row['size'])}\n"
    lines = [title, *header(PROFILE_COLUMNS)]
    for name, step_ms in row["step_ms"].items():
        found = row["alone"][name]["profile"]
        speed, share = 1e3 * row["size"]["batch"] / step_ms, found["products"]
        rest = ", ".join(f"{op} {part:.0%}" for op, part in list(found["others"].items())[:3])
        lines.append(f"| {name} | {speed:.1f} | {share:.0%} | {speed / share:.1f} | {rest} |")
    return lines


if __name__ == "__main__":
    main()
