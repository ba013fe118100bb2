"""Preprocessing inside a graph: pixels in, normalised by the network file itself."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repblocks.errors import ConfigurationError
from repblocks.header import dtype_of

Pixels = Literal["normalized", "unit", "uint8"]

#: The value of a white pixel, where the graph normalises.
WHITE: Mapping[Pixels, float] = {"unit": 1.0, "uint8": 255.0}


class FromPixels(nn.Module):
    """``network((pixels / white - mean) / std)``: a network that normalises its images.

    Folding this into the first convolution instead would change the border, where zero padding means the mean colour.

    Args:
        network: Takes normalised images; its dtype is computed in.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        white: The largest value of a pixel.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], white: float) -> None:
        super().__init__()
        dtype = dtype_of(network)
        self.network = network
        self.register_buffer("mean", (white * torch.tensor(mean, dtype=torch.float64)).to(dtype)[:, None, None])
        self.register_buffer("scale", (white * torch.tensor(std, dtype=torch.float64)).pow(-1).to(dtype)[:, None, None])

    def forward(self, pixels: Tensor) -> Any:
        """The network's output for pixels ``[N, C, H, W]`` of any dtype."""
        return self.network((pixels.to(self.mean.dtype) - self.mean) * self.scale)


def taking(network: nn.Module, pixels: Pixels, config: Mapping[str, Any]) -> nn.Module:
    """The network itself, or with the normalisation in front that such pixels need.

    Args:
        network: Takes normalised images.
        pixels: What is to be taken.
        config: Its ``pretrained_cfg``, with mean and std.

    Raises:
        ConfigurationError: Unknown pixels, or no mean and std.
    """
    if pixels == "normalized":
        return network
    _require_statistics(pixels, config)
    return FromPixels(network, mean=config["mean"], std=config["std"], white=WHITE[pixels]).eval()


def denormalized(images: Tensor, pixels: Pixels, config: Mapping[str, Any]) -> Tensor:
    """The pixels that normalised images were made of, clipped and rounded to what such pixels can hold."""
    if pixels == "normalized":
        return images
    mean, std = (torch.tensor(config[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
    values = ((images.double() * std + mean) * WHITE[pixels]).clamp(0, WHITE[pixels])
    return values.round().to(torch.uint8) if pixels == "uint8" else values.to(images.dtype)


def require_pixels(pixels: str) -> None:
    """Check what graphs are to take.

    Raises:
        ConfigurationError: It is no name of pixels.
    """
    known = ("normalized", *WHITE)
    if pixels not in known:
        raise ConfigurationError(f"pixels={pixels!r} is unknown; choose from {', '.join(known)}")


def _require_statistics(pixels: Pixels, config: Mapping[str, Any]) -> None:
    if missing := [key for key in ("mean", "std") if key not in config]:
        raise ConfigurationError(
            f"pixels={pixels!r} puts the normalisation into the graph, and the model has no {' and '.join(missing)} "
            "for it; set model.pretrained_cfg = {'mean': ..., 'std': ...}, or use pixels='normalized'"
        )
