"""The values of single layers of a traced model."""

from typing import Any

from torch import fx, nn

from repblocks.blocks.copying import copied, in_float64
from repblocks.fusion import fold
from repblocks.graph.analysis import Analysis
from repblocks.graph.lazy import FLOAT64, Lazy


def layer_value(analysis: Analysis, path: str, channels: int) -> Lazy:
    """The value of the layer at ``path``, over a map of so many channels.

    Raises:
        FoldError: It does not fold.
    """
    layer = analysis.shadow.get_submodule(path)

    def numbers() -> Any:
        plain = analysis.model.get_submodule(path)
        exact = copied(plain, in_float64).eval() if has_tensors(plain) else layer
        return fold.constant(exact, channels).to("cpu", FLOAT64)

    return Lazy(fold.constant(layer, channels).to("meta", FLOAT64), numbers)


def has_tensors(layer: nn.Module) -> bool:
    """Whether a layer has parameters or buffers."""
    return any(True for _ in (*layer.parameters(), *layer.buffers()))


def called_layer(analysis: Analysis, node: fx.Node) -> nn.Module | None:
    """The layer that a node calls, on the meta device; None if it calls a function."""
    return analysis.shadow.get_submodule(str(node.target)) if node.op == "call_module" else None
