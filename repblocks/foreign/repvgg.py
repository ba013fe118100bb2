"""RepVGG's names in timm, in its authors' repository, and QARepVGG's in its own."""

from collections.abc import Mapping

from torch import nn

from repblocks.foreign.rules import Names, Rules


def _timm(network: nn.Module) -> Rules:
    return (
        ("*.conv_kxk.conv.*", "*.conv.branches.kxk.0.*"),
        ("*.conv_kxk.bn.*", "*.conv.branches.kxk.1.*"),
        ("*.conv_1x1.conv.*", "*.conv.branches.pointwise.0.*"),
        ("*.conv_1x1.bn.*", "*.conv.branches.pointwise.1.*"),
        ("*.identity.*", "*.conv.branches.identity.*"),
        ("*.reparam_conv.*", "*.conv.conv.*"),
        ("*.attn.*", "*.se.*"),
        ("head.fc.*", "head.fc.*"),
    )


def _official(network: nn.Module) -> Rules:
    inside = {
        "rbr_dense.conv.*": "conv.branches.kxk.0.*",
        "rbr_dense.bn.*": "conv.branches.kxk.1.*",
        "rbr_1x1.conv.*": "conv.branches.pointwise.0.*",
        "rbr_1x1.bn.*": "conv.branches.pointwise.1.*",
        "rbr_identity.*": "conv.branches.identity.*",
        "rbr_reparam.*": "conv.conv.*",
        "se.down.*": "se.fc1.*",
        "se.up.*": "se.fc2.*",
    }
    return (*numbered_stages(network, inside), ("linear.*", "head.fc.*"))


def _quantization_aware(network: nn.Module) -> Rules:
    inside = {
        "rbr_dense.conv.*": "conv.branches.0.kxk.0.*",
        "rbr_dense.bn.*": "conv.branches.0.kxk.1.*",
        "rbr_1x1.*": "conv.branches.0.pointwise.*",
        "bn.*": "conv.branches.1.*",
        "rbr_reparam.*": "conv.conv.*",
    }
    return (*numbered_stages(network, inside), ("linear.*", "head.fc.*"))


def numbered_stages(network: nn.Module, inside: Mapping[str, str]) -> Rules:
    """Rules for blocks that are called ``stage0`` (the stem) and ``stage1.0``, ``stage1.1``, ... elsewhere."""
    stages = range(len(list(network.get_submodule("stages").children())))
    rules = [(f"stage0.{theirs}", f"stem.{ours}") for theirs, ours in inside.items()]
    rules += [(f"stage{i + 1}.*.{theirs}", f"stages.{i}.*.{ours}") for i in stages for theirs, ours in inside.items()]
    return rules


NAMES: dict[str, Names] = {
    "timm": Names(rules=_timm),
    "repvgg": Names(rules=_official),
    "qarepvgg": Names(rules=_quantization_aware),
}
