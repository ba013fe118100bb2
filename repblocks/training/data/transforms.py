"""From an image to a network's input: what travels with the model, and augmentation in training."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL.Image import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomAffine, RandomCrop, Resize
from torchvision.transforms.functional import InterpolationMode

from repblocks.errors import ConfigurationError
from repblocks.names import known_name
from repblocks.training.data.batches import Size

Transform = Callable[[Image], Tensor]

INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
"""What both timm and torchvision know."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the input of a network; its fields are those of timm's ``pretrained_cfg``.

    Attributes:
        input_size: ``(channels, height, width)``.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        interpolation: ``"bilinear"``, ``"bicubic"``, ...
        crop_pct: The centre crop's side as a fraction of the resized image's.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        known_name("data.interpolation", str(self.interpolation), INTERPOLATIONS)
        channels = self.input_size[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ConfigurationError(
                f"data.mean and data.std have {len(self.mean)} and {len(self.std)} values, "
                f"data.in_chans={channels} needs {channels} of each"
            )

    def eval_transform(self) -> Transform:
        """Resize, centre crop, normalise."""
        return _timm_transform(
            self.input_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )

    def train_transform(self, augment: Mapping[str, Any], size: Size | None = None) -> Transform:
        """Shift, rotate and zoom (ours), then timm's augmentation, then normalise, then cut out (ours).

        Args:
            augment: ``degrees``, ``translate``, ``zoom`` (fractions), ``padding`` (pixels of a padded random
                crop) and ``cutout`` (pixels of a square's side) are ours; every other key is an argument of timm's
                ``create_transform``.
            size: Height and width of training images, where they are not those of the evaluation.

        Raises:
            ConfigurationError: A key that neither knows.
        """
        ours = {**_STILL, **{key: value for key, value in augment.items() if key in _STILL}}
        timms = {key: value for key, value in augment.items() if key not in _STILL}
        for key in timms:
            known_name("data.augment", key, [*_STILL, *inspect.signature(create_transform).parameters])
        settings: dict[str, Any] = {"interpolation": self.interpolation, "mean": self.mean, "std": self.std, **timms}
        channels, *own_size = self.input_size
        height, width = own_size if size is None else size
        holes = [Cutout(ours.pop("cutout"))]
        moves = self._moves(height_width=[height, width], **ours)
        return Compose([*moves, _timm_transform((channels, height, width), is_training=True, **settings), *holes])

    def _moves(
        self, *, height_width: list[int], degrees: float, translate: float, zoom: float, padding: int
    ) -> list[nn.Module]:
        moves: list[nn.Module] = []
        if degrees or translate or zoom:
            shift, scale = (translate, translate), (1 - zoom, 1 + zoom)
            moves.append(RandomAffine(degrees, shift, scale, interpolation=InterpolationMode.BILINEAR))
        if padding:
            moves.append(RandomCrop(height_width, padding))
        # Small images are enlarged before they are moved, so that moves can be finer than their pixels.
        return [Resize(height_width, InterpolationMode(self.interpolation)), *moves] if moves else []


class Cutout(nn.Module):
    """Set a square to zero, the mean colour of normalised images; its centre is anywhere, so it may be cut off.

    Args:
        side: Of the square, in pixels; 0 leaves images as they are.

    Source: DeVries and Taylor 2017, "Cutout", https://arxiv.org/abs/1708.04552, section 3.2.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        """The image ``[C, H, W]`` with a hole."""
        if not self.side:
            return image
        rows, columns = (outside(torch.randint(length, ()), self.side, length) for length in image.shape[1:])
        return image * (rows[:, None] | columns)


def outside(centre: Tensor, side: int, length: int) -> Tensor:
    """Which places of a row of ``length`` pixels are not in a hole ``side`` wide around ``centre`` (broadcast)."""
    first = centre - side // 2
    places = torch.arange(length, device=centre.device)
    return (places < first) | (places >= first + side)


def _timm_transform(input_size: tuple[int, int, int], **settings: Any) -> Transform:
    return cast("Transform", create_transform(input_size, **settings))


_STILL: Mapping[str, Any] = {"degrees": 0.0, "translate": 0.0, "zoom": 0.0, "padding": 0, "cutout": 0}
