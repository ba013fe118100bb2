"""UniRepLKNet's names in its authors' repository."""

from torch import nn

from repblocks.foreign.rules import Names, Rules

_SHARED: Rules = (
    ("downsample_layers.0.0.*", "stem.conv1.*"),
    ("downsample_layers.0.1.*", "stem.norm1.*"),
    ("downsample_layers.0.3.*", "stem.conv2.*"),
    ("downsample_layers.0.4.*", "stem.norm2.*"),
    ("downsample_layers.*.0.*", "stages.*.downsample.0.*"),
    ("downsample_layers.*.1.*", "stages.*.downsample.1.*"),
    ("stages.*.se.down.*", "stages.*.se.fc1.*"),
    ("stages.*.se.up.*", "stages.*.se.fc2.*"),
    ("stages.*.pwconv1.1.*", "stages.*.pointwise1.*"),
    ("stages.*.act.1.gamma", "stages.*.response.weight"),
    ("head.*", "head.fc.*"),
)


def _train(network: nn.Module) -> Rules:
    mixer, pointwise = "stages.*.token_mixer.branches.kxk", "stages.*.pointwise2.branches.pointwise"
    return (
        *_SHARED,
        ("stages.*.dwconv.weight", f"{mixer}.0.weight"),
        ("stages.*.dwconv.lk_origin.*", f"{mixer}.0.branches.large.0.*"),
        ("stages.*.dwconv.origin_bn.*", f"{mixer}.0.branches.large.1.*"),
        ("stages.*.dwconv.dil_conv_k*.weight", f"{mixer}.0.branches.small*.0.weight"),
        ("stages.*.dwconv.dil_bn_k*.*", f"{mixer}.0.branches.small*.1.*"),
        ("stages.*.norm.*", f"{mixer}.1.*"),
        ("stages.*.act.1.beta", f"{pointwise}.0.bias"),
        ("stages.*.pwconv2.0.*", f"{pointwise}.1.*"),
        ("stages.*.pwconv2.2.*", f"{pointwise}.2.*"),
        ("stages.*.gamma", f"{pointwise}.3.gamma"),
        ("norm.*", "head.neck.*"),
    )


def _deploy(network: nn.Module) -> Rules:
    return (
        *_SHARED,
        ("stages.*.dwconv.lk_origin.*", "stages.*.token_mixer.conv.*"),
        ("stages.*.dwconv.*", "stages.*.token_mixer.conv.*"),
        ("stages.*.pwconv2.0.*", "stages.*.pointwise2.conv.*"),
        ("norm.*", "head.neck.*"),
    )


NAMES: dict[str, Names] = {
    "unireplknet": Names(
        rules=_train,
        deploy_rules=_deploy,
        one_way="its pointwise layers and response norms are linear layers over the last dimension, ours over channels",
    ),
}
