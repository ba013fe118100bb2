"""MobileOne's names in timm, and in its authors' repository."""

from torch import nn

from repblocks.foreign.repvgg import numbered_stages
from repblocks.foreign.rules import Names, Rules


def _timm(network: nn.Module) -> Rules:
    return (
        ("*.conv_kxk.*.conv.*", "*.conv.branches.kxk*.0.*"),
        ("*.conv_kxk.*.bn.*", "*.conv.branches.kxk*.1.*"),
        ("*.conv_scale.conv.*", "*.conv.branches.pointwise.0.*"),
        ("*.conv_scale.bn.*", "*.conv.branches.pointwise.1.*"),
        ("*.identity.*", "*.conv.branches.identity.*"),
        ("*.reparam_conv.*", "*.conv.conv.*"),
        ("*.attn.*", "*.se.*"),
        ("head.fc.*", "head.fc.*"),
    )


def _official(network: nn.Module) -> Rules:
    inside = {
        "rbr_conv.*.conv.*": "conv.branches.kxk*.0.*",
        "rbr_conv.*.bn.*": "conv.branches.kxk*.1.*",
        "rbr_scale.conv.*": "conv.branches.pointwise.0.*",
        "rbr_scale.bn.*": "conv.branches.pointwise.1.*",
        "rbr_skip.*": "conv.branches.identity.*",
        "reparam_conv.*": "conv.conv.*",
        "se.reduce.*": "se.fc1.*",
        "se.expand.*": "se.fc2.*",
    }
    return (*numbered_stages(network, inside), ("linear.*", "head.fc.*"))


NAMES: dict[str, Names] = {
    "timm": Names(rules=_timm),
    "mobileone": Names(rules=_official),
}
