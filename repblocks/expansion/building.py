"""One block in the place of one convolution and its BatchNorm."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from repblocks.blocks import RepConv
from repblocks.blocks.base import folded
from repblocks.calibration import batch_norms
from repblocks.errors import ConfigurationError, FoldError, VerificationError
from repblocks.expansion.expanded import ExpandedConv, Norm, Original, after_norm, normalisation_of, on_meta
from repblocks.expansion.fitting import deviation
from repblocks.expansion.preserve import CannotExpandError, preserve
from repblocks.expansion.report import ExpandedRow, Init, Preserved
from repblocks.expansion.sites import Site
from repblocks.fusion import AffineConv, Sum, fold
from repblocks.verification import HALF_PRECISION, TOLERANCES

Make = Callable[..., RepConv]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Built:
    """A block that is ready, what goes where by the id of the module there now, and the row of the report."""

    replaced: dict[int, nn.Module]
    row: ExpandedRow


def attempt(site: Site | str, make: Make, init: Init, *, useful: bool) -> Built | str:
    """Build the block of a site, or say why not.

    Args:
        site: Where; a reason is handed through.
        make: Class of the block.
        init: Whose weights it starts with.
        useful: Whether to leave convolutions alone to which the block would add copies only.

    Raises:
        VerificationError: The block would compute something else.
    """
    if isinstance(site, str):
        return site
    try:
        block = _made(make, site)
        if useful and _only_copies(block, site.conv):
            raise CannotExpandError(f"{type(block).__name__} would only add copies of its kernel; ask for it by where=")
        return _built(site, block, init)
    except (ConfigurationError, FoldError, CannotExpandError) as error:
        return str(error)


def _made(make: Make, site: Site) -> RepConv:
    """A block with the settings of a convolution and its norm, in float64 on the CPU."""
    value = AffineConv.from_module(site.conv)
    geometry: dict[str, Any] = {
        name: getattr(value, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")
    }
    block = make(value.in_channels, value.out_channels, value.kernel_size, **geometry)
    block = block.double().train(site.conv.training).requires_grad_(site.conv.weight.requires_grad)
    return block if site.norm is None else _with_norms_like(site.norm, block)


def _with_norms_like(norm: Norm, block: RepConv) -> RepConv:
    if isinstance(norm, nn.SyncBatchNorm):
        nn.SyncBatchNorm.convert_sync_batchnorm(block, norm.process_group)  # in place below the block itself
    for own in batch_norms(block):
        own.eps, own.momentum = norm.eps, norm.momentum
        own.train(norm.training)
    return block


def _only_copies(block: RepConv, conv: nn.Conv2d) -> bool:
    branches = block.branches.values() if isinstance(block.branches, Sum) else [block.branches]
    plain = [conv.weight.shape, (conv.out_channels,), (conv.out_channels,)]
    return all([parameter.shape for parameter in branch.parameters()] == plain for branch in branches)


def _built(site: Site, block: RepConv, init: Init) -> Built:
    conv, norm = _exact(site.conv), None if site.norm is None else _exact(normalisation_of(site.norm))
    before = folded(conv if norm is None else nn.Sequential(conv, norm))
    if before.bias is None and fold(on_meta(block).eval()).bias is not None:
        raise CannotExpandError(
            f"has no bias and no BatchNorm of its own behind it, so no place for the shift of {type(block).__name__}"
        )
    behind = None if batch_norms(block) else norm
    if init == "fresh" and behind is not None:
        behind.reset_parameters()
    preserved = preserve(block, conv, norm) if init == "preserve" else "nothing"
    expanded = ExpandedConv(_placed(site, block, norm), behind, _original(site))
    if preserved != "nothing":
        _require_equal(site, before, expanded)
    replaced: dict[int, nn.Module] = {id(site.conv): expanded}
    if expanded.original.place is not None:
        replaced[id(site.norm)] = expanded.original.place
    return Built(replaced=replaced, row=_row(site, expanded, preserved))


def _exact(module: Module) -> Module:
    return copy.deepcopy(module).cpu().double()


def _placed(site: Site, block: RepConv, norm: Norm | None) -> RepConv:
    """The block where the convolution was, its norm where the norm was: devices and dtypes."""
    exact = None if norm is None else {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    placed = block.to(site.conv.weight.device, site.conv.weight.dtype)
    if norm is not None and exact is not None:
        assert site.norm is not None
        assert site.norm.running_mean is not None
        norm.to(site.norm.running_mean.device, site.norm.running_mean.dtype).load_state_dict(exact)
    return placed


def _original(site: Site) -> Original:
    counted = None if site.norm is None else site.norm.num_batches_tracked
    return Original(
        conv=on_meta(site.conv),
        norm=None if site.norm is None else on_meta(site.norm),
        place=None if site.norm is None else after_norm(site.norm),
        batches=0 if counted is None else int(counted),
    )


def _require_equal(site: Site, before: AffineConv, expanded: ExpandedConv) -> None:
    error, dtype = deviation(before, expanded.value()), site.conv.weight.dtype
    if dtype in HALF_PRECISION and error > TOLERANCES[torch.float64]["block"]:
        raise CannotExpandError(f"{dtype} cannot hold the sum of all branches exactly; expand in float32, then convert")
    if not error <= TOLERANCES.get(dtype, TOLERANCES[torch.float64])["block"]:
        raise VerificationError(
            f"{site.name or type(site.conv).__name__} would change by {error:.1e} as {type(expanded.block).__name__}; "
            "look for weights that are not finite, or leave it out by where="
        )


def _row(site: Site, expanded: ExpandedConv, preserved: Preserved) -> ExpandedRow:
    normed = [] if site.norm is None else [*normalisation_of(site.norm).parameters()]
    return ExpandedRow(
        name=site.name,
        norm=site.norm_name,
        before=_description(site.conv),
        after=type(expanded.block).__name__,
        params_before=sum(parameter.numel() for parameter in (*site.conv.parameters(), *normed)),
        params_after=sum(parameter.numel() for parameter in expanded.parameters()),
        preserves=preserved,
    )


def _description(conv: nn.Conv2d) -> str:
    groups = f" in {conv.groups} groups" if conv.groups > 1 else ""
    return f"{conv.kernel_size[0]}x{conv.kernel_size[1]} convolution {conv.in_channels} -> {conv.out_channels}{groups}"
