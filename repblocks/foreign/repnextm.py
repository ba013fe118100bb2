"""RepNeXt-M's names in its authors' repository, suous/RepNeXt."""

from torch import nn

from repblocks.foreign.rules import Names, Rules

_SMALL = {
    "conv_3_3.*": "branches.square.*",
    "conv_2_2.*": "branches.corners.*",
}
_CROSSED = {
    "blocks": {"conv_3_w.*": "branches.row.*", "conv_3_h.*": "branches.column.*"},
    "downsample": {"conv_3_w.*": "branches.serial.0.*", "conv_3_h.*": "branches.serial.1.*"},
}
_MEDIUM = {
    "conv_7_7.*": "branches.square.*",
    "conv_5_3.*": "branches.tall.*",
    "conv_3_5.*": "branches.wide.*",
    "conv_7_w.*": "branches.serial.0.*",
    "conv_7_h.*": "branches.serial.1.*",
    "conv_5_w.*": "branches.small_serial.0.*",
    "conv_5_h.*": "branches.small_serial.1.*",
}
_COLLAPSED = {"*": "conv.*"}


def _official(network: nn.Module) -> Rules:
    return (
        *_conv_norm("stem.stem.0", "stem.conv1"),
        *_conv_norm("stem.stem.2", "stem.conv2"),
        *_units("stages.*.blocks.*.token_mixer", "stages.*.*.token_mixer", "", _CROSSED["blocks"]),
        ("stages.*.blocks.*.token_mixer.conv_l.*", "stages.*.*.token_mixer.large.*"),
        *_conv_norm("stages.*.blocks.*.channel_mixer.0", "stages.*.*.channel_mixer.expand.branches.chain.1"),
        *_conv_norm("stages.*.blocks.*.channel_mixer.2", "stages.*.*.channel_mixer.project"),
        ("stages.*.blocks.*.norm.*", "stages.*.*.channel_mixer.expand.branches.chain.0.*"),
        *_units("stages.*.downsample.token_mixer", "stages.*.downsample", ".branches.chain.0", _CROSSED["downsample"]),
        *_conv_norm("stages.*.downsample.channel_mixer.0", "stages.*.downsample.channel_mixer.expand"),
        *_conv_norm("stages.*.downsample.channel_mixer.2", "stages.*.downsample.channel_mixer.project"),
        (
            "stages.*.downsample.norm.*",
            ("stages.*.downsample.small.branches.chain.1.*", "stages.*.downsample.medium.branches.chain.1.*"),
        ),
        ("head.head.norm.*", "head.fc.branches.main.0.*"),
        ("head.head.linear.*", "head.fc.branches.main.1.*"),
        ("head.head_dist.norm.*", "head.fc.branches.distilled.0.*"),
        ("head.head_dist.linear.*", "head.fc.branches.distilled.1.*"),
        ("head.*", "head.fc.linear.*"),
    )


def _conv_norm(theirs: str, ours: str) -> Rules:
    """A convolution and its norm, and the one that they collapse into."""
    return (
        (f"{theirs}.conv.*", f"{ours}.branches.0.*"),
        (f"{theirs}.norm.*", f"{ours}.branches.1.*"),
        (f"{theirs}.*", f"{ours}.conv.*"),
    )


def _units(theirs: str, ours: str, inside: str, crossed: dict[str, str]) -> Rules:
    """The small and the medium unit of a token mixer."""
    small = _SMALL | crossed | _COLLAPSED
    rules = [(f"{theirs}.conv_s.{key}", f"{ours}.small{inside}.{name}") for key, name in small.items()]
    medium = _MEDIUM | _COLLAPSED
    return (*rules, *((f"{theirs}.conv_m.{key}", f"{ours}.medium{inside}.{name}") for key, name in medium.items()))


NAMES: dict[str, Names] = {
    "repnextm": Names(
        rules=_official,
        one_way="their collapsed form keeps the BatchNorm behind each token mixer, which ours folds",
    ),
}
