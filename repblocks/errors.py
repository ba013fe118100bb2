"""The errors of repblocks: every message says what was got, what was needed, and what to call."""


class RepblocksError(Exception):
    """Base of every error that repblocks raises on purpose."""


class FoldError(RepblocksError, ValueError):
    """A piece of a network is not exactly one convolution, or not as asked."""


class ConfigurationError(RepblocksError, ValueError):
    """A name, an argument or a combination of arguments that cannot be built."""


class CheckpointError(RepblocksError):
    """A file that is truncated, foreign, too new, or holds the other form."""


class VerificationError(RepblocksError):
    """Two models that were to be equal are not."""


class DataError(RepblocksError):
    """A dataset that is missing, empty, or does not fit the model."""


class NonFiniteError(RepblocksError):
    """A loss or a weight became NaN or infinite."""
