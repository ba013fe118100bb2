"""Networks whose classifier has a second head that can learn from a teacher."""

from functools import partial

from repblocks.blocks import NormLinear
from repblocks.errors import ConfigurationError
from repblocks.models.staged import StagedNet


class DistilledNet(StagedNet):
    """Base of the networks with a `normed_classifier`: ``reset_classifier`` and training follow its two heads."""

    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | None = None,
        distillation: bool = False,  # noqa: FBT001, FBT002 - timm's signature
    ) -> None:
        """Replace the classifier, by one of a single head unless told otherwise, and, if given, the pooling."""
        self.head.make_classifier = normed_classifier(distillation=distillation)
        super().reset_classifier(num_classes, global_pool)
        self.model_args = {**self.model_args, "distillation": distillation}

    def set_distilled_training(self, enable: bool = True) -> None:  # noqa: FBT001, FBT002 - timm's signature
        """Whether training mode gives the logits of both heads as a tuple, instead of their mean.

        Raises:
            ConfigurationError: The classifier has no second head.
        """
        classifier = self.get_classifier()
        if isinstance(classifier, NormLinear):
            classifier.set_distilled_training(enable)
        elif enable:
            raise ConfigurationError(
                "distilled training needs a classifier of two heads; build it with num_classes > 0"
            )


def normed_classifier(*, distillation: bool) -> partial[NormLinear]:
    """Makes a classifier behind its own BatchNorm from its in and out features, of two heads or of one."""
    return partial(NormLinear, heads=2 if distillation else 1)
