"""Networks drawn at random: steps over the tensors so far, linear or not, in blocks of many inputs and outputs."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fusion.modules import prepared
from strategies import randn
from torch import Tensor, nn

SIZES = ((3, 4, 9, 12), (2, 4, 12, 7))


@dataclass(frozen=True)
class Step:
    """``results += run(module, *reads)``, where the reads are positions among the tensors so far."""

    name: str
    reads: tuple[int, ...]
    run: Callable[..., list[Tensor]]


class Block(nn.Module):
    """Takes and returns the tensors that are still needed, by their positions."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start, self.steps, self.kept = start, list[Step](), list[int]()
        self.layers = nn.ModuleDict()

    def forward(self, tensors):
        tensors, position, layers = dict(tensors), self.start, dict(self.layers.items())
        for at, step in enumerate(self.steps):
            results = step.run(layers.get(f"{step.name}{at}"), *(tensors[read] for read in step.reads))
            tensors |= dict(enumerate(results, position))
            position += len(results)
        return {kept: tensors[kept] for kept in self.kept}


class RandomNet(nn.Module):
    """Returns the tensors that no step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    def forward(self, x):
        tensors = {0: x}
        for block in self.blocks:
            tensors = block(tensors)
        return list(tensors.values())


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(shape))


def _conv(rng, c):
    kernel_size = rng.choice([1, 1, 3, 3, 2, (1, 3), (3, 1)])
    padding = rng.choice([0, 1, 1]) if kernel_size == 3 else 0 if isinstance(kernel_size, int) else rng.choice([0, 1])
    if kernel_size == 1:
        padding = rng.choice([0, 0, 0, 1])
    if isinstance(kernel_size, tuple):
        padding = tuple(k // 2 * padding for k in kernel_size)
    written = rng.choice([c, c, 4, 6, 8])
    groups = rng.choice([g for g in (1, 1, 1, 2, c) if not c % g and not written % g])
    stride, mode = rng.choice([1, 1, 1, 1, 2]), rng.choice(["zeros"] * 7 + ["replicate"])
    geometry = {"stride": stride, "padding": padding, "groups": groups, "padding_mode": mode}
    return nn.Conv2d(c, written, kernel_size, **geometry, bias=rng.random() < 0.5)


def _functional_conv(layer, x):
    return [F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)]


def _call(layer, x):
    return [layer(x)]


def _plain(function):
    return lambda _, *tensors: [function(*tensors)]


def _scaled(layer, x):
    return [x * layer.gain]


def _shifted(layer, x):
    return [layer.gain + x]


#: Name to a function of (rng, channels) that gives a layer (or None) and what to run.
UNARY = {
    "conv": lambda rng, c: (_conv(rng, c), _call),
    "conv_again": lambda rng, c: (_conv(rng, c), _call),
    "functional": lambda rng, c: (nn.Conv2d(c, 4, 3, padding=1), _functional_conv),
    "norm": lambda rng, c: (nn.BatchNorm2d(c, affine=rng.random() < 0.8), _call),
    "norm_again": lambda rng, c: (nn.BatchNorm2d(c), _call),
    "relu": lambda rng, c: (nn.ReLU(), _call),
    "relu_in_place": lambda rng, c: (nn.ReLU(inplace=True), _call),
    "pool": lambda rng, c: (nn.AvgPool2d(3, 1, 1, count_include_pad=rng.random() < 0.7), _call),
    "pool_valid": lambda rng, c: (nn.AvgPool2d(2, rng.choice([1, 2])), _call),
    "pad": lambda rng, c: (nn.ZeroPad2d(rng.choice([1, (1, 0, 0, 1)])), _call),
    "identity": lambda rng, c: (nn.Identity(), _call),
    "dropout": lambda rng, c: (nn.Dropout(), _call),
    "scale": lambda rng, c: (Scale(c, 1, 1), _scaled),
    "scale_all": lambda rng, c: (Scale(1), _scaled),
    "shift": lambda rng, c: (Scale(1, c, 1, 1), _shifted),
    "half": lambda rng, c: (None, _plain(lambda x: 0.5 * x)),
    "rest": lambda rng, c: (None, _plain(lambda x: 1 - x)),
    "double_in_place": lambda rng, c: (None, _plain(lambda x: x.mul_(2))),
    "chunk": lambda rng, c: (None, lambda _, x: list(x.chunk(2, 1))),
    "slice": lambda rng, c: (None, _plain(lambda x: x[:, 1:3])),
    "view": lambda rng, c: (None, _plain(lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))),
    "sigmoid": lambda rng, c: (None, _plain(torch.sigmoid)),
}
BINARY = {
    "add": _plain(lambda x, y: x + y),
    "add_more": _plain(lambda x, y: torch.add(x, y, alpha=0.5)),
    "add_in_place": _plain(lambda x, y: x.add_(y)),
    "subtract": _plain(lambda x, y: x - y),
    "multiply": _plain(lambda x, y: x * y),
    "cat": _plain(lambda x, y: torch.cat([x, y], 1)),
}


def random_net(seed: int, steps: int = 9) -> nn.Module:
    """A network of that many steps, each of which runs on both `SIZES`; every other seed writes in place as well."""
    rng = random.Random(seed)
    unary, binary = (
        [name for name in names if seed % 2 or "in_place" not in name]
        for names in ([*UNARY, "conv", "conv", "norm"], BINARY)
    )
    net = prepared(RandomNet())
    samples = [[randn(seed, *shape)] for shape in SIZES]
    net.blocks.append(Block(1))
    while sum(len(block.steps) for block in net.blocks) < steps:
        if net.blocks[-1].steps and rng.random() < 0.25:
            net.blocks.append(Block(len(samples[0])))
        draw, names = (_binary, binary) if rng.random() < 0.35 else (_unary, unary)
        _append(net.blocks[-1], *draw(rng, rng.choice(names), samples[0]), samples)
    _keep_what_is_needed(net, len(samples[0]))
    if not seed % 3:
        _share_a_layer(rng, net)
    if not seed % 5:
        _hook_a_layer(rng, net)
    return net.eval()


def _share_a_layer(rng: random.Random, net: RandomNet) -> None:
    """Call one layer in the place of another like it as well."""
    places = [(block.layers, name) for block in net.blocks for name in block.layers]
    twins = [(a, b) for a in places for b in places if a != b and repr(a[0][a[1]]) == repr(b[0][b[1]])]
    twins = [(a, b) for a, b in twins if not isinstance(a[0][a[1]], Scale)]
    if twins:
        (layers, name), (others, other) = rng.choice(twins)
        others[other] = layers[name]


def _hook_a_layer(rng: random.Random, net: RandomNet) -> None:
    layers = [layer for block in net.blocks for layer in block.layers.values() if not isinstance(layer, Scale)]
    if layers:
        rng.choice(layers).register_forward_hook(lambda _, args, output: 0.5 * output)


def _keep_what_is_needed(net: RandomNet, count: int) -> None:
    read = {at for block in net.blocks for step in block.steps for at in step.reads}
    needed = set(range(count)) - read
    for block in reversed(net.blocks):
        block.kept = sorted(needed)
        reads = {at for step in block.steps for at in step.reads}
        needed = {at for at in needed | reads if at < block.start}


def _unary(rng: random.Random, name: str, tensors: list[Tensor]) -> tuple[Step, nn.Module | None]:
    read = _recent(rng, tensors)
    layer, run = UNARY[name](rng, tensors[read].shape[1])
    return Step(name, (read,), run), layer and prepared(layer, rng.randint(0, 999))


def _binary(rng: random.Random, name: str, tensors: list[Tensor]) -> tuple[Step, nn.Module | None]:
    return Step(name, (_recent(rng, tensors), _recent(rng, tensors)), BINARY[name]), None


def _recent(rng: random.Random, tensors: list[Tensor]) -> int:
    return max(0, len(tensors) - 1 - rng.choice([0, 0, 0, 1, 1, 2, 3, 4]))


def _append(block: Block, step: Step, layer: nn.Module | None, samples: list[list[Tensor]]) -> None:
    """Add the step if it fits the samples."""
    if (results := _results(step, layer, samples)) is None:
        return
    for tensors, added in zip(samples, results, strict=True):
        tensors += added
    if layer is not None:
        block.layers[f"{step.name}{len(block.steps)}"] = layer
    block.steps.append(step)


def _results(step: Step, layer: nn.Module | None, samples: list[list[Tensor]]) -> list[list[Tensor]] | None:
    """What the step gives for every sample, None where it does not fit one."""
    reads = [[tensors[read] for read in step.reads] for tensors in samples]
    if len(step.reads) == 2 and not all(_fit(step.name, *pair) for pair in reads):
        return None
    try:
        with torch.no_grad():
            results = [step.run(layer, *pair) for pair in reads]
    except (RuntimeError, ValueError):  # too small a map
        return None
    least = min(min(result.shape) for added in results for result in added)
    return results if least > 1 and max(result.shape[1] for added in results for result in added) <= 16 else None


def _fit(name: str, x: Tensor, y: Tensor) -> bool:
    return x is not y and x.shape[2:] == y.shape[2:] and (name == "cat" or x.shape[1] == y.shape[1])
