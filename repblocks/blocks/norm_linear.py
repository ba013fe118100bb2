"""A classifier behind its own BatchNorm, and the mean of two for training by distillation."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from repblocks.blocks.base import Children, RepBlock, as_module, folded
from repblocks.blocks.layers import Constant
from repblocks.errors import ConfigurationError
from repblocks.fusion import Sum


class NormLinear(RepBlock):
    """``linear(BN(x))``, or the mean of two of them; in deploy form one ``nn.Linear``.

    Args:
        in_features, out_features: As in ``nn.Linear``.
        heads: 1, or 2: the second one learns from a teacher.

    Attributes:
        distilled_training: Whether training mode gives the outputs of both heads instead of their mean; set it by
            `set_distilled_training`.

    Raises:
        ConfigurationError: ``heads`` is neither 1 nor 2.

    Source: Graham et al. 2021, "LeViT", https://arxiv.org/abs/2104.01136, section 4.1; RepViT's classifier.
    """

    branches: Sum
    mean: Constant
    linear: nn.Module

    def __init__(self, in_features: int, out_features: int, *, heads: Literal[1, 2] = 1) -> None:
        super().__init__()
        if heads not in (1, 2):
            raise ConfigurationError(f"heads={heads}: one, or a second one for distillation")
        self.in_features, self.out_features = in_features, out_features
        self.distilled_training = False
        names = ("main", "distilled")[:heads]
        self.branches = Sum({name: _normed_linear(in_features, out_features) for name in names})
        self.mean = Constant(1 / heads)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """``[N, in_features]`` to ``[N, out_features]``, twice that in distilled training."""
        if self.form == "deploy":
            return self.linear(x)
        if self.training and self.distilled_training:
            return tuple(head(x) for head in self.branches.values())
        return self.mean(self.branches(x))

    def set_distilled_training(self, enable: bool = True) -> None:  # noqa: FBT001, FBT002 - timm's signature
        """Whether training mode gives ``(main, distilled)``, for two losses, instead of their mean.

        Raises:
            ConfigurationError: There are not two heads to give.
        """
        if enable and (self.form == "deploy" or len(self.branches) < 2):
            raise ConfigurationError(
                f"distilled training needs two heads in train form; this classifier is in {self.form} form, with "
                "one: make it with heads=2, or its model with distillation=True"
            )
        self.distilled_training = enable

    def deploy_children(self) -> Children:
        """The heads as one linear layer."""
        chain = nn.Sequential(self.branches, self.mean)
        return {"branches": None, "mean": None, "linear": as_module(folded(chain), like=self.branches)}

    def _is_other_form(self, given: Sequence[Sequence[str]]) -> bool:
        """Whether the keys are heads for a deploy form, or one linear layer for a train form."""
        return super()._is_other_form(given) or (self.form == "train" and ["linear", "weight"] in given)


def _normed_linear(in_features: int, out_features: int) -> nn.Sequential:
    linear = nn.Linear(in_features, out_features)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(in_features), linear)
