"""What is tested at length, and with which arguments."""

SMALLEST_OF_EACH = {
    "MobileOne": "rb_mobileone_s0",
    "RepGhostNet": "rb_repghostnet_050",
    "RepNeXt": "rb_repnext_cifar",
    "RepNeXtM": "rb_repnextm_m1",
    "RepVGG": "rb_repvgg_cifar",
    "RepViT": "rb_repvit_m0_9",
    "ResNetCifar": "rb_resnet20_cifar",
    "UniRepLKNet": "rb_unireplknet_a",
    "VGGCifar": "rb_vgg16_cifar",
}

# Half precision takes long where every layer sees whole maps, so the layers are fewer or thinner. Their
# blocks have branches, because the two forms of a plain pair of convolution and norm round about alike, and a rule of
# maxima then fails by chance.
SLIM = {
    "rb_resnet20_cifar": {"block": "acb", "depths": (1, 2, 1)},
    "rb_resnet56_cifar": {"block": "acb", "depths": (2, 3, 2)},
    "rb_vgg16_cifar": {"block": "acb", "widths": (8, 16, 16, 32, 32)},
}

# Stochastic depth needs something that remains: here the identity branch of another block than the default one.
WITHOUT_IDENTITY = {"rb_vgg16_cifar": {"block": "repvgg"}}
