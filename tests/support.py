"""What several tests share."""

from repblocks.calibration import batch_norms, calibrate, randomise

# The name that most tests know it by.
randomise_batch_norms = randomise

__all__ = ["batch_norms", "calibrate", "randomise_batch_norms"]
