"""`expand`: plain convolutions become multi-branch blocks, in a copy that computes the same."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from repblocks.blocks import resolve_block
from repblocks.errors import ConfigurationError
from repblocks.expansion.building import Built, attempt
from repblocks.expansion.recipe import recipe_of, remember
from repblocks.expansion.report import ExpansionReport, Init, SkippedRow
from repblocks.expansion.sites import Site, convolutions, find_sites
from repblocks.graph.copies import duplicate
from repblocks.names import known_name

Where = Callable[[str, nn.Conv2d], bool] | str | Sequence[str] | None


class Expanded(NamedTuple):
    """What `expand` returns: the expanded copy, and what was done to it."""

    model: nn.Module
    report: ExpansionReport


def expand(model: nn.Module, block: str = "acb", *, where: Where = None, init: Init = "preserve") -> Expanded:
    """Replace convolutions, each with the BatchNorm behind it, by multi-branch blocks, in a copy; undo by `contract`.

    With ``init="preserve"`` the copy computes the same, ``expand(model).model(x) == model(x)``, in eval mode and, but
    where the report says "eval only", in train mode too, running statistics included. Geometry, dtype, device,
    training mode, ``requires_grad``, and the norms' eps and momentum stay as they are. What BatchNorm reads is found
    by following the data, not by the order of registration; where the model's code cannot be traced symbolically,
    this is done inside each of its modules, taken to be called as they are declared.

    Args:
        model: Any model; not touched.
        block: Short name of a block in ``BLOCKS``.
        where: Which convolutions: a predicate ``(name, conv)``, or globs of names (``"layer1.*"``). None means all to
            which the block adds more than copies of their own kernel: a 3x3, 1x3 and 3x1 over 1x1 are three 1x1s, say.
        init: "preserve", or "fresh" for the block's own weights.

    Returns:
        The copy, and a report of what was expanded, and what was not and why.

    Raises:
        ConfigurationError: An unknown block or ``init``, a glob that matches no convolution, or a model that cannot be
            copied, or is without weights (on the meta device, lazy) or modules (a compiled script).
        VerificationError: A block computes something else than what it replaced, as with weights that are not finite.

    Source: Ding et al. 2019, "ACNet", https://arxiv.org/abs/1908.03930, section 3: blocks in the place of plain layers.
    """
    make = resolve_block(block)
    known_name("init", init, ("preserve", "fresh"))
    _require_weights(model)
    twin = duplicate(model)
    sites = chosen(find_sites(twin), dict(convolutions(twin)), where)
    outcome = {name: attempt(site, make, init, useful=where is None) for name, site in sites.items()}
    built = [result for result in outcome.values() if isinstance(result, Built)]
    report = ExpansionReport(
        block=block,
        init=init,
        expanded=tuple(result.row for result in built),
        skipped=tuple(SkippedRow(name=name, reason=why) for name, why in outcome.items() if isinstance(why, str)),
    )
    replaced = {key: module for result in built for key, module in result.replaced.items()}
    expanded = substitute(twin, replaced)
    remember(expanded, recipe_of(model), report)
    return Expanded(expanded, report)


def chosen(sites: Mapping[str, Site | str], convs: Mapping[str, nn.Module], where: Where) -> dict[str, Site | str]:
    """The sites that ``where`` means.

    Raises:
        ConfigurationError: A glob matches no convolution.
    """
    if where is None:
        return dict(sites)
    if callable(where):
        return {name: sites[name] for name, conv in convs.items() if isinstance(conv, nn.Conv2d) and where(name, conv)}
    globs = [where] if isinstance(where, str) else list(where)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in sites):
            some = ", ".join(list(sites)[:10])
            raise ConfigurationError(f"where={glob!r} matches none of the {len(sites)} convolutions: {some}, ...")
    return {name: site for name, site in sites.items() if any(fnmatchcase(name, glob) for glob in globs)}


def _require_weights(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigurationError(f"{type(model).__name__} is a compiled script; expand the model it was made from")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ConfigurationError(
                f"{name} has no values yet (it is lazy or on the meta device); load the weights before expanding"
            )


def substitute(model: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Put modules in the places of others, given by their ids, wherever they are registered; in place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # pyright: ignore[reportPrivateUsage]  # a module may be in two places
            if id(child) in replaced:
                parent._modules[name] = replaced[id(child)]  # pyright: ignore[reportPrivateUsage]
    return replaced.get(id(model), model)
