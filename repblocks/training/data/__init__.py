"""Images in batches: what a dataset holds, which images make up a batch, and what becomes of them on the way."""

from repblocks.training.data.batches import IGNORED, Batch, Loader
from repblocks.training.data.config import DataConfig
from repblocks.training.data.module import ImageData

__all__ = ["IGNORED", "Batch", "DataConfig", "ImageData", "Loader"]
