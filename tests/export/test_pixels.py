import pytest
import torch

from repblocks.export.pixels import FromPixels, denormalized

CONFIG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def normalized(unit):
    mean, std = (torch.tensor(CONFIG[key])[:, None, None] for key in ("mean", "std"))
    return (unit - mean) / std


def test_the_pixels_of_a_normalised_image_are_those_that_it_was_made_of():
    """Rounded: float32 gives 253.99998 where 254 was."""
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    assert denormalized(normalized(pixels / 255), "uint8", CONFIG).equal(pixels)
    torch.testing.assert_close(denormalized(normalized(pixels / 255), "unit", CONFIG), pixels / 255)


@pytest.mark.parametrize(("pixels", "white"), [("unit", 1), ("uint8", 255)])
def test_what_no_pixel_can_hold_becomes_black_or_white(pixels, white):
    images = torch.tensor([-100.0, 100.0]).expand(3, 1, 2)
    assert denormalized(images, pixels, CONFIG).equal(
        torch.tensor([0, white]).expand(3, 1, 2).to(denormalized(images, pixels, CONFIG))
    )


def test_normalised_images_stay_what_they_are():
    images = torch.tensor([-100.0, 100.0]).expand(3, 1, 2)
    assert denormalized(images, "normalized", {}) is images


def test_a_graph_that_normalises_gives_the_network_what_it_was_trained_on():
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    norm = FromPixels(torch.nn.Identity(), mean=CONFIG["mean"], std=CONFIG["std"], white=255.0)
    torch.testing.assert_close(norm(pixels), normalized(pixels / 255))
