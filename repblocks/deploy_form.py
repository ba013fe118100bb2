"""The deploy form of any model, whatever it is made of."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # base of every BatchNorm

from repblocks.blocks.base import RepBlock, deployed, form_of
from repblocks.expansion.contract import contracted
from repblocks.graph import CollapseReport, collapse


class DeployForm(NamedTuple):
    """What ships.

    Attributes:
        model: In eval mode.
        report: What `repblocks.collapse` did; None where it was not needed.
    """

    model: nn.Module
    report: CollapseReport | None

    def differs_from(self, model: nn.Module) -> bool:
        """Whether the model that it was made of has another form than the one that ships."""
        return form_of(model) == "train" or bool(self.report and self.report.regions)


def deploy_form_of(model: nn.Module, images: Tensor) -> DeployForm:
    """``deploy_form_of(model, images).model(x) == model(x)``, without what only training needs.

    Blocks in train form are collapsed, and what `repblocks.expand` put in is contracted. What `repblocks.collapse` can
    merge beyond that is merged where the model has no blocks of ours, or has BatchNorms beside them; a model that is
    in deploy form already is returned as it is.

    Args:
        model: In eval mode; it is not changed.
        images: ``[N, C, H, W]``, of which `repblocks.collapse` reads the size, in the model's dtype and on its device.

    Returns:
        The model and the report of the collapse; it unpacks.

    Raises:
        ConfigurationError: A model with layers that are not ours is in training mode, or fails on the images.
        FoldError: A block or region does not fold; it is named.
        VerificationError: What `repblocks.collapse` made of it differs from the model.
    """
    plain = deployed(contracted(model)) if form_of(model) == "train" else model
    return (
        DeployForm(plain, None) if has_blocks(plain) and not _has_norms(plain) else DeployForm(*collapse(plain, images))
    )


def _has_norms(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def has_blocks(model: nn.Module) -> bool:
    """Whether there are blocks of ours inside, in either form."""
    return any(isinstance(module, RepBlock) for module in model.modules())
