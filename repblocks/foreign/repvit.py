"""RepViT's names in timm and in its authors' repository."""

from collections.abc import Iterator

from torch import nn

from repblocks.foreign.rules import Names, Rules

_Pairs = tuple[tuple[str, str], ...]


def _conv_bn(theirs: str, ours: str) -> _Pairs:
    """A convolution and its BatchNorm, which share a name with what they collapse into in either repository."""
    return (
        (f"{theirs}.c.*", f"{ours}.branches.0.*"),
        (f"{theirs}.bn.*", f"{ours}.branches.1.*"),
        (f"{theirs}.*", f"{ours}.conv.*"),
    )


def _token_mixer(theirs: str, ours: str) -> _Pairs:
    return (
        (f"{theirs}.conv.c.*", f"{ours}.branches.0.kxk.0.*"),
        (f"{theirs}.conv.bn.*", f"{ours}.branches.0.kxk.1.*"),
        (f"{theirs}.conv1.*", f"{ours}.branches.0.pointwise.*"),
        (f"{theirs}.bn.*", f"{ours}.branches.1.*"),
        (f"{theirs}.*", f"{ours}.conv.*"),
    )


def _timm(network: nn.Module) -> Rules:
    # Ours of a block, "stages.*.*", would match the inside of a downsampling layer too, so that comes first.
    return (
        *_conv_bn("stem.conv1", "stem.conv1"),
        *_conv_bn("stem.conv2", "stem.conv2"),
        *_timm_block("stages.*.downsample.pre_block", "stages.*.downsample.pre_block"),
        *(
            pair
            for layer in ("spatial_downsample", "channel_downsample", "ffn.conv1", "ffn.conv2")
            for pair in _conv_bn(f"stages.*.downsample.{layer}", f"stages.*.downsample.{layer}")
        ),
        *_timm_block("stages.*.blocks.*", "stages.*.*"),
        ("head.head.bn.*", "head.fc.branches.main.0.*"),
        ("head.head.l.*", "head.fc.branches.main.1.*"),
        ("head.head_dist.bn.*", "head.fc.branches.distilled.0.*"),
        ("head.head_dist.l.*", "head.fc.branches.distilled.1.*"),
        ("head.*", "head.fc.linear.*"),
    )


def _timm_block(theirs: str, ours: str) -> _Pairs:
    return (
        *_token_mixer(f"{theirs}.token_mixer", f"{ours}.token_mixer"),
        (f"{theirs}.se.*", f"{ours}.se.*"),
        *_conv_bn(f"{theirs}.channel_mixer.conv1", f"{ours}.channel_mixer.conv1"),
        *_conv_bn(f"{theirs}.channel_mixer.conv2", f"{ours}.channel_mixer.conv2"),
    )


def _official(network: nn.Module) -> Rules:
    features = [pair for i, layer in enumerate(_flat(network), 1) for pair in _official_layer(f"features.{i}", layer)]
    return (
        *_conv_bn("features.0.0", "stem.conv1"),
        *_conv_bn("features.0.2", "stem.conv2"),
        *features,
        ("classifier.classifier.bn.*", "head.fc.branches.main.0.*"),
        ("classifier.classifier.l.*", "head.fc.branches.main.1.*"),
        ("classifier.classifier_dist.bn.*", "head.fc.branches.distilled.0.*"),
        ("classifier.classifier_dist.l.*", "head.fc.branches.distilled.1.*"),
        ("classifier.*", "head.fc.linear.*"),
    )


def _flat(network: nn.Module) -> Iterator[str]:
    """Our paths of the layers that follow the stem in one row there, where a downsampling layer counts twice."""
    for i, stage in network.get_submodule("stages").named_children():
        for name, _ in stage.named_children():
            if name == "downsample":
                yield f"stages.{i}.downsample.pre_block"
            yield f"stages.{i}.{name}"


def _official_layer(theirs: str, ours: str) -> _Pairs:
    if ours.endswith(".downsample"):
        return (
            *_conv_bn(f"{theirs}.token_mixer.0", f"{ours}.spatial_downsample"),
            *_conv_bn(f"{theirs}.token_mixer.2", f"{ours}.channel_downsample"),
            *_conv_bn(f"{theirs}.channel_mixer.m.0", f"{ours}.ffn.conv1"),
            *_conv_bn(f"{theirs}.channel_mixer.m.2", f"{ours}.ffn.conv2"),
        )
    return (
        *_token_mixer(f"{theirs}.token_mixer.0", f"{ours}.token_mixer"),
        (f"{theirs}.token_mixer.1.*", f"{ours}.se.*"),
        *_conv_bn(f"{theirs}.channel_mixer.m.0", f"{ours}.channel_mixer.conv1"),
        *_conv_bn(f"{theirs}.channel_mixer.m.2", f"{ours}.channel_mixer.conv2"),
    )


NAMES: dict[str, Names] = {"timm": Names(rules=_timm), "repvit": Names(rules=_official)}
