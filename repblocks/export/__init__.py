"""Deploy files of every format, each run in its own runtime before it is kept, and their use without training code."""

from repblocks.export.deploy_model import DeployModel, Prediction, load_deploy
from repblocks.export.exporting import ExportReport, export
from repblocks.export.formats import FORMATS, USUAL_FORMATS, Facts, Format, Run, check_formats, installed_formats
from repblocks.export.half_range import Extreme, HalfRange, half_range
from repblocks.export.jobs import Job, Sizes
from repblocks.export.manifest import add_file
from repblocks.export.pixels import Pixels

__all__ = [
    "FORMATS",
    "USUAL_FORMATS",
    "DeployModel",
    "ExportReport",
    "Extreme",
    "Facts",
    "Format",
    "HalfRange",
    "Job",
    "Pixels",
    "Prediction",
    "Run",
    "Sizes",
    "add_file",
    "check_formats",
    "export",
    "half_range",
    "installed_formats",
    "load_deploy",
]
