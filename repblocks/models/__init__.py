"""The zoo: importing this package registers every ``rb_*`` model with timm."""

from repblocks.models.mobileone import MobileOne
from repblocks.models.registry import create_model, list_models, register
from repblocks.models.repghost import RepGhostNet
from repblocks.models.repnext import RepNeXt
from repblocks.models.repnextm import RepNeXtM
from repblocks.models.repvgg import RepVGG
from repblocks.models.repvit import RepViT
from repblocks.models.resnet_cifar import ResNetCifar
from repblocks.models.staged import StagedNet
from repblocks.models.unireplknet import UniRepLKNet
from repblocks.models.vgg_cifar import VGGCifar

__all__ = [
    "MobileOne",
    "RepGhostNet",
    "RepNeXt",
    "RepNeXtM",
    "RepVGG",
    "RepViT",
    "ResNetCifar",
    "StagedNet",
    "UniRepLKNet",
    "VGGCifar",
    "create_model",
    "list_models",
    "register",
]
