"""The zoo: importing this package registers every ``rb_*`` model with timm."""

from repblocks.models.registry import create_model, list_models, register
from repblocks.models.repnext import RepNeXt
from repblocks.models.repvgg import RepVGG
from repblocks.models.staged import StagedNet

__all__ = ["RepNeXt", "RepVGG", "StagedNet", "create_model", "list_models", "register"]
