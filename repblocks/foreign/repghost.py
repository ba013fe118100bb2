"""RepGhostNet's names in timm and in its authors' repository, which are the same."""

from collections.abc import Iterator

from torch import nn

from repblocks.foreign.rules import Names, Rules

# The collapsed form has a bare `cheap_operation`; everything else keeps its BatchNorm in it.
_BOTTLENECK = {
    "ghost*.primary_conv.0.*": "ghost*.primary.branches.kxk.0.*",
    "ghost*.primary_conv.1.*": "ghost*.primary.branches.kxk.1.*",
    "ghost*.cheap_operation.0.*": "ghost*.cheap.branches.depthwise.0.*",
    "ghost*.cheap_operation.1.*": "ghost*.cheap.branches.depthwise.1.*",
    "ghost*.fusion_bn.0.*": "ghost*.cheap.branches.identity.*",
    "ghost*.cheap_operation.*": "ghost*.cheap.conv.*",
    "conv_dw.*": "conv_dw.branches.0.*",
    "bn_dw.*": "conv_dw.branches.1.*",
    "se.*": "se.*",
    "shortcut.0.*": "shortcut.0.branches.0.*",
    "shortcut.1.*": "shortcut.0.branches.1.*",
    "shortcut.2.*": "shortcut.1.branches.0.*",
    "shortcut.3.*": "shortcut.1.branches.1.*",
}
_LAST = {"conv.*": "conv.branches.0.*", "bn1.*": "conv.branches.1.*"}


def _rules(network: nn.Module) -> Rules:
    places = list(_places(network))
    *bottlenecks, last = places
    layers = [(place, _BOTTLENECK) for place in bottlenecks] + [(last, _LAST)]
    return (
        ("conv_stem.*", "stem.conv.branches.0.*"),
        ("bn1.*", "stem.conv.branches.1.*"),
        *((f"{theirs}.{a}", f"{ours}.{b}") for (theirs, ours), inside in layers for a, b in inside.items()),
        ("conv_head.*", "head.neck.0.*"),
        ("classifier.*", "head.fc.*"),
    )


def _places(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Their name and ours of each layer.

    A group of theirs holds the first bottleneck of a stage, or all the others of it, or the last convolution.
    """
    depths = [len(list(stage.children())) for stage in network.get_submodule("stages").children()]
    depths[-1] -= 1
    group = 0
    for stage, depth in enumerate(depths):
        yield f"blocks.{group}.0", f"stages.{stage}.0"
        yield from ((f"blocks.{group + 1}.{i - 1}", f"stages.{stage}.{i}") for i in range(1, depth))
        group += 1 + (depth > 1)
    yield f"blocks.{group}.0", f"stages.{len(depths) - 1}.{depths[-1]}"


NAMES: dict[str, Names] = {"timm": Names(rules=_rules), "repghost": Names(rules=_rules)}
