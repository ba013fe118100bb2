"""The smallest model of each family: what is tested at length."""

SMALLEST_OF_EACH = {
    "MobileOne": "rb_mobileone_s0",
    "RepGhostNet": "rb_repghostnet_050",
    "RepNeXt": "rb_repnext_cifar",
    "RepNeXtM": "rb_repnextm_m1",
    "RepVGG": "rb_repvgg_cifar",
    "RepViT": "rb_repvit_m0_9",
    "UniRepLKNet": "rb_unireplknet_a",
}
