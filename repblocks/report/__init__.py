"""What a model became, as one HTML page: both forms, every block, every kernel, in numbers and pictures."""

from repblocks.report.page import write_report

__all__ = ["write_report"]
