"""RepNeXt-U3's names in its authors' repository."""

from torch import nn

from repblocks.foreign.rules import Names, Rules


def _official(network: nn.Module) -> Rules:
    branches = [
        pair
        for i in range(3)
        for pair in (
            (f"stages.*.feature.dwconv{i + 1}.*", f"stages.*.token_mixer.branches.{i}.0.*"),
            (f"stages.*.feature.norm{i + 1}.*", f"stages.*.token_mixer.branches.{i}.1.*"),
        )
    ]
    return (
        ("downsample_layers.0.0.*", "stem.branches.0.*"),
        ("downsample_layers.0.1.*", "stem.branches.1.*"),
        ("downsample_layers.0.*", "stem.conv.*"),
        ("downsample_layers.*.0.*", "stages.*.downsample.branches.0.norm.*"),
        ("downsample_layers.*.1.*", "stages.*.downsample.branches.1.*"),
        ("downsample_layers.*.*", "stages.*.downsample.conv.*"),
        *branches,
        # Filled by their collapse, and part of their train form before it.
        ("stages.*.feature.conv_repara.*", ()),
        ("stages.*.pwconv1.*", "stages.*.pointwise1.*"),
        ("stages.*.pwconv2.*", "stages.*.pointwise2.*"),
        # Their collapsed blocks hold carried and own channels in another order than ours, which is all the same to a
        # chain of convolutions and elementwise activations.
        ("stages.*.block.0.*", "stages.*.token_mixer.*"),
        ("stages.*.block.1.*", "stages.*.pointwise1.*"),
        ("stages.*.block.3.*", "stages.*.pointwise2.*"),
        ("head.2.*", "head.fc.*"),
    )


NAMES: dict[str, Names] = {
    "repnext": Names(
        rules=_official,
        one_way="their train form also holds a convolution that it does not use, and our weights lack it",
    ),
}
