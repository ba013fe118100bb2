"""The pictures of a report: drawn once for the page, whose colours they take, and once for files of their own."""

from repblocks.report.figures.pictures import Picture, pictures

__all__ = ["Picture", "pictures"]
