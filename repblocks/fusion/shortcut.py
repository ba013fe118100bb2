"""Shortcuts without an add: dirac-expanded convolutions that carry the input along."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from repblocks.errors import FoldError
from repblocks.fusion.affine_conv import AffineConv, grow
from repblocks.fusion.faithful import is_faithful
from repblocks.fusion.kernels import ungroup

ELEMENTWISE: set[type[nn.Module]] = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
}  # fmt: skip


def absorb_shortcut(convs: Sequence[AffineConv], activations: Sequence[nn.Module]) -> tuple[AffineConv, ...]:
    """Turn a shortcut beside a chain into channels of the chain: ``new_chain(x) == a_n(..a_1(x)) + chain(x)``.

    ``chain`` is ``convs[0]``, ``activations[0]``, ``convs[1]``, ... ``convs[-1]``, and the shortcut passes through the
    same activations (``nn.Identity()`` where there is none; so with identities only it is ``x + chain(x)``). Every
    convolution but the last writes the input's channels in addition, by dirac kernels; the last adds them. Groups are
    kept: carried channels are spread over the groups, and groups that do not divide their number merge.

    Args:
        convs: The chain, each of stride 1 and keeping the grid, the last writing as many channels as the first reads.
        activations: One between each two convolutions: elementwise, the same for all channels, and registered in
            ``ELEMENTWISE``.

    Returns:
        The convolutions of the new chain, between which the same activations run.

    Raises:
        FoldError: A convolution strides or changes the grid, channels do not fit, or an activation is unknown or
            differs between channels.

    Source: seed of the project, "Shortcut re-parameterization", 6a and 6b.
    """
    rank = max((conv.rank for conv in convs), default=0)
    chain = [_centred(conv.promote(rank)) for conv in convs]
    _require_chain(chain, activations)
    carried = chain[0].in_channels
    chain = [ungroup(conv, math.gcd(conv.groups, carried)) for conv in chain]
    blocks = [math.lcm(a.groups, b.groups) for a, b in itertools.pairwise(chain)]
    entries = [None, *(_Layout(conv.in_channels, carried, n) for conv, n in zip(chain[1:], blocks, strict=True))]
    exits = [*(_Layout(conv.out_channels, carried, n) for conv, n in zip(chain, blocks, strict=False)), None]
    return tuple(_expanded(*link) for link in zip(chain, entries, exits, strict=True))


class _Layout:
    """Where a widened feature map keeps the chain's own channels and the carried ones.

    It alternates block by block, so that every group on either side finds its share of both in one stretch.
    """

    def __init__(self, own: int, carried: int, blocks: int) -> None:
        width = (own + carried) // blocks
        places = torch.arange(own + carried).reshape(blocks, width)
        self.own, self.carried = places[:, : own // blocks].flatten(), places[:, own // blocks :].flatten()
        self.channels = own + carried


def _expanded(conv: AffineConv, entry: _Layout | None, exit_: _Layout | None) -> AffineConv:
    """One convolution between widened maps; no layout at the ends, where the map is the input or the output."""
    own_in = torch.arange(conv.in_channels) if entry is None else entry.own
    own_out = torch.arange(conv.out_channels) if exit_ is None else exit_.own
    carried_in = own_in if entry is None else entry.carried
    carried_out = own_out if exit_ is None else exit_.carried
    reads = (conv.in_channels if entry is None else entry.channels) // conv.groups
    writes = conv.out_channels if exit_ is None else exit_.channels
    weight = conv.weight.new_zeros(writes, reads, *conv.kernel_size)
    weight = weight.index_put(_own_index(conv, own_out, own_in), conv.weight)
    one = weight.new_ones(())
    centre = tuple(torch.tensor(before // d) for (before, _), d in zip(conv.padding, conv.dilation, strict=True))
    weight = weight.index_put((carried_out, carried_in % reads, *centre), one, accumulate=True)
    return replace(conv, weight=weight, bias=_expanded_bias(conv, own_out, writes))


def _own_index(conv: AffineConv, own_out: Tensor, own_in: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the original weights inside the widened kernel: the columns are those of the first group."""
    columns = own_in[: conv.weight.shape[1]].expand(conv.out_channels, -1)
    return own_out[:, None].expand_as(columns), columns


def _expanded_bias(conv: AffineConv, own_out: Tensor, writes: int) -> Tensor | None:
    if conv.bias is None:
        return None
    return conv.bias.new_zeros(writes).index_put((own_out,), conv.bias)


def _centred(conv: AffineConv) -> AffineConv:
    """A kernel with a tap on the output pixel itself, densifying a dilation that steps over it."""
    margin = tuple(
        (d - before % d, 0) if before % d else (0, 0)
        for (before, _), d in zip(conv.padding, conv.dilation, strict=True)
    )
    return conv if not any(map(any, margin)) else grow(conv, margin)


def _require_chain(chain: Sequence[AffineConv], activations: Sequence[nn.Module]) -> None:
    if len(activations) != len(chain) - 1:
        raise FoldError(
            f"got {len(chain)} convolutions and {len(activations)} activations; needed one between each two"
        )
    for conv in chain:
        if any(s != 1 for s in conv.stride) or any(
            before + after != reach for (before, after), reach in zip(conv.padding, conv.reach, strict=True)
        ):
            raise FoldError(f"{conv!r} changes the grid, so the input cannot be carried along; keep the shortcut")
    read, written = [c.in_channels for c in chain], [c.out_channels for c in chain]
    if read != [written[-1], *written[:-1]]:
        raise FoldError(
            f"the chain reads {read} and writes {written} channels; each must fit the next, the last the first"
        )
    for activation in activations:
        _require_elementwise(activation)


def _require_elementwise(activation: nn.Module) -> None:
    classes = (
        *ELEMENTWISE,
        *([nn.PReLU] if isinstance(activation, nn.PReLU) and activation.num_parameters == 1 else []),
    )
    known = any(is_faithful(activation, cls) for cls in classes if isinstance(activation, cls))
    if not known:
        raise FoldError(
            f"{activation!r} is hooked, or not known to act on every element and channel alike, so carried channels "
            "would not pass as the shortcut does; keep the shortcut, or add the class to ELEMENTWISE"
        )
