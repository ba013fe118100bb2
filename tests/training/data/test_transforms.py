import pytest
import torch
from PIL import Image

from repblocks.errors import ConfigurationError
from repblocks.training.data.transforms import INTERPOLATIONS, Preprocessing

GRAY = Preprocessing(input_size=(1, 24, 32), mean=(0.25,), std=(0.5,))
COLOUR = Preprocessing(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def picture(width: int, height: int) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height))


def test_evaluation_resizes_and_normalises() -> None:
    image = Image.new("RGB", (51, 40), (255, 0, 51))
    out = COLOUR.eval_transform()(image)
    expected = torch.tensor([(1 - 0.1) / 0.4, -0.2 / 0.5, (0.2 - 0.3) / 0.6])
    torch.testing.assert_close(out, expected[:, None, None].expand(3, 32, 32))


@pytest.mark.parametrize("moves", [{"degrees": 10.0, "translate": 0.1, "zoom": 0.1}, {"padding": 4}, {}])
def test_training_images_have_the_input_size_whatever_the_moves(moves: dict[str, float]) -> None:
    out = GRAY.train_transform({**moves, "hflip": 0.0, "color_jitter": None})(picture(9, 8))
    assert out.shape == (1, 24, 32)


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    still = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": None}
    square = Preprocessing(input_size=(1, 32, 32), mean=(0.3,), std=(0.4,))
    torch.testing.assert_close(square.train_transform(still)(picture(8, 8)), square.eval_transform()(picture(8, 8)))


def test_moves_differ_from_draw_to_draw() -> None:
    torch.manual_seed(0)
    moved = GRAY.train_transform({"degrees": 20, "hflip": 0.0, "color_jitter": None, "scale": [1, 1]})
    assert not torch.equal(moved(picture(9, 8)), moved(picture(9, 8)))


def test_an_unknown_augmentation_names_near_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.augment=hflipp is unknown.*hflip"):
        COLOUR.train_transform({"hflipp": 0.5})


def test_an_unknown_interpolation_names_near_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.interpolation=bicubi is unknown.*bicubic"):
        Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(1.0,), interpolation="bicubi")


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_works_with_and_without_moves(interpolation: str) -> None:
    settings = Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(1.0,), interpolation=interpolation)
    still = {"hflip": 0.0, "color_jitter": None}
    transforms = (settings.eval_transform(), *(settings.train_transform({**still, "padding": pad}) for pad in (0, 1)))
    assert all(transform(picture(9, 7)).shape == (1, 8, 8) for transform in transforms)


def test_mean_and_std_need_a_value_per_channel() -> None:
    with pytest.raises(ConfigurationError, match=r"1 and 3 values, data\.in_chans=3 needs 3"):
        Preprocessing(input_size=(3, 8, 8), mean=(0.5,), std=(1.0, 1.0, 1.0))


def test_cutout_makes_a_square_zero_that_may_be_cut_off_at_the_border() -> None:
    still = {"hflip": 0.0, "color_jitter": None, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    cut = COLOUR.train_transform({**still, "cutout": 8})
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    torch.manual_seed(0)
    holes = [(cut(white) == 0).all(0) for _ in range(50)]
    assert {int(hole.sum()) for hole in holes} >= {64}
    assert all(hole.sum() == hole.any(0).sum() * hole.any(1).sum() for hole in holes)
    assert len({int(hole.flatten().float().argmax()) for hole in holes}) > 30
