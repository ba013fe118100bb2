"""Images, and images with labels, however they are batched."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from repblocks.errors import DataError

Batches = Tensor | Iterable[Any]
BATCH_SIZE = 32
"""Images that run at once, of those that come as one tensor."""


def image_batches(images: Batches) -> list[Tensor]:
    """The images, in batches, on the CPU.

    Args:
        images: ``[N, C, H, W]``, or an iterable of such tensors or of sequences that begin with one, as loaders yield.

    Raises:
        DataError: There are none, they differ in size, are not finite, or are no images.
    """
    batches = [_images(batch) for batch in _batches(images)]
    sizes = {tuple(batch.shape[1:]) for batch in batches}
    if len(sizes) != 1:
        raise DataError(f"got images of {len(sizes)} sizes {sorted(sizes)}; needed some, all of one size [C, H, W]")
    return batches


def labelled_batches(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and the class of each; those with a negative label, such as PyTorch's -100, are left out.

    Args:
        batches: An iterable of ``(images, labels, ...)``, or one such pair.

    Raises:
        DataError: A batch has no labels, or not one per image.
    """
    for batch in [batches] if _is_pair(batches) else batches:
        if not _is_pair(batch):
            raise DataError(f"got {_kind(batch)}; needed batches (images [N, C, H, W], labels [N]) with a class each")
        images, labels = _images(batch), batch[1].cpu()
        if (counted := labels >= 0).any():
            yield images[counted], labels[counted]


def _batches(images: Batches) -> Iterable[Any]:
    if isinstance(images, Tensor):
        return images.split(BATCH_SIZE) if len(images) else []
    return [images] if _is_pair(images) else images


def _is_pair(batch: Any) -> TypeGuard[Sequence[Any]]:
    """Whether this is ``(images, labels, ...)``; two batches of images are none."""
    if not isinstance(batch, Sequence) or len(batch) < 2:
        return False
    images, labels = batch[:2]
    return isinstance(images, Tensor) and isinstance(labels, Tensor) and labels.shape == images.shape[:1]


def _images(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, Sequence) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise DataError(f"got {_kind(images)}; needed images [N, C, H, W] of real numbers, preprocessed, N at least 1")
    if not images.isfinite().all():
        raise DataError("got images with NaN or infinite pixels; look at what preprocesses them")
    return images.detach().cpu()


def _kind(value: Any) -> str:
    shape = f" of shape {list(value.shape)} ({value.dtype})" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
