import pytest
import torch

from repblocks.errors import DataError
from repblocks.quantization.batches import BATCH_SIZE, image_batches, labelled_batches

IMAGES = torch.rand(5, 1, 4, 6)
LABELS = torch.tensor([0, 1, -100, 2, 0])


def test_images_come_as_a_tensor_as_batches_and_as_what_loaders_yield():
    indices = torch.arange(5)
    for given in (IMAGES, [IMAGES[:2], IMAGES[2:]], [(IMAGES, LABELS, indices)], (IMAGES, LABELS), iter([[IMAGES]])):
        assert torch.cat(image_batches(given)).equal(IMAGES)


def test_a_large_tensor_is_cut_into_batches():
    sizes = [len(batch) for batch in image_batches(torch.zeros(2 * BATCH_SIZE + 1, 1, 2, 2))]
    assert sizes == [BATCH_SIZE, BATCH_SIZE, 1]


def test_two_batches_of_images_are_no_labelled_pair():
    assert [len(batch) for batch in image_batches((IMAGES, IMAGES))] == [5, 5]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "0 sizes"),
        (torch.zeros(0, 1, 2, 2), "0 sizes"),
        ([IMAGES, IMAGES[..., 1:]], "2 sizes"),
        (IMAGES[0], r"needed images \[N, C, H, W\]"),
        ((IMAGES * 255).to(torch.uint8), "torch.uint8"),
        (IMAGES / 0 * 0, "NaN"),
        (["cat.png"], "a str"),
    ],
)
def test_what_are_no_images_is_refused_in_words(images, said):
    with pytest.raises(DataError, match=said):
        image_batches(images)


def test_labels_that_only_pad_an_evaluation_are_left_out():
    for given in ([(IMAGES, LABELS, torch.arange(5))], (IMAGES, LABELS)):
        [(images, labels)] = labelled_batches(given)
        assert labels.tolist() == [0, 1, 2, 0]
        assert images.equal(IMAGES[[0, 1, 3, 4]])


def test_a_batch_that_is_all_padding_is_left_out():
    batches = [(IMAGES[:1], LABELS[:1]), (IMAGES, torch.full((5,), -100))]
    assert [len(labels) for _, labels in labelled_batches(batches)] == [1]


@pytest.mark.parametrize("given", [IMAGES, [IMAGES], [(IMAGES,)], [(IMAGES, LABELS[1:])], [(IMAGES, [0, 1, 2, 3, 4])]])
def test_images_without_a_label_each_are_refused(given):
    with pytest.raises(DataError, match=r"labels \[N\]"):
        list(labelled_batches(given))
