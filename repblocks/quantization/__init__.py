"""Int8: what it will do to a model layer by layer, what helps, and the quantized file behind an accuracy gate.

``range_report`` looks; ``equalized`` and ``bias_corrected`` prepare, ``best_prepared`` tries all their combinations;
``quantize`` writes.
"""

from repblocks.quantization.correction import BiasCorrected, CorrectionReport, bias_corrected
from repblocks.quantization.equalization import EqualizationReport, Equalized, equalized
from repblocks.quantization.preparation import PREPARATIONS, BestPrepared, best_prepared, prepared
from repblocks.quantization.ranges import RangeReport, range_report
from repblocks.quantization.static import QuantizationReport, quantize

__all__ = [
    "PREPARATIONS",
    "BestPrepared",
    "BiasCorrected",
    "CorrectionReport",
    "EqualizationReport",
    "Equalized",
    "QuantizationReport",
    "RangeReport",
    "best_prepared",
    "bias_corrected",
    "equalized",
    "prepared",
    "quantize",
    "range_report",
]
