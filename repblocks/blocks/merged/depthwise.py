"""Moments of depthwise 3x3 patches from the autocorrelation of the map, at the price of a few convolutions.

With stride 1 and one pixel of padding, ``sum_t u_t[a] u_t[b]`` over all integer t depends on the lag ``b - a`` only.
The patches outside the map, one row or column on each side, are then taken out again: of a row outside, only the taps
towards the map see anything, the outermost row of the map, and its autocorrelation along the row is what they add.
"""

import functools
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from repblocks.blocks.merged import cost
from repblocks.blocks.merged.layout import added, convolution_gradients, in_parts, parts_of, put, rows_of
from repblocks.blocks.merged.patches import Patches, convolution_backward, convolved
from repblocks.blocks.merged.statistics import Moments
from repblocks.fusion import AffineConv

OFFSETS = (-1, 0, 1)
TAPS = tuple(product(OFFSETS, OFFSETS))
LAGS = tuple(product(range(-2, 3), range(-2, 3)))


class Depthwise(Patches):
    """3x3, stride 1, one pixel of zeros around, each channel by itself."""

    @staticmethod
    def fits(geometry: AffineConv, size: Sequence[int]) -> bool:
        """Whether a geometry is of this kind, and a map is large enough to have four borders."""
        ones = geometry.stride == geometry.dilation == (1, 1) and geometry.padding == ((1, 1), (1, 1))
        single = geometry.groups == geometry.in_channels == geometry.out_channels
        return ones and single and geometry.kernel_size == (3, 3) and min(size) > 1

    def cost(self, x: Tensor) -> float:
        """Depthwise convolutions and small operations."""
        return cost.depthwise_cost(x)

    def moments(self, x: Tensor) -> Moments:
        """From lags, border strips and corners of the centred map; the padding then counts as minus the mean."""
        mean, count = rows_of(x).mean(0), x.numel() // x.shape[1]
        found = [_sums(x[part].permute(0, 2, 3, 1) - mean) for part in parts_of(x, x, x)]
        sums, over_batch = (added(pieces) for pieces in zip(*found, strict=True))
        layout = _layout(tuple(x.shape[2:]), x.dtype, x.device)
        first, crossed = layout.seen(over_batch / count)
        shift = mean.view(-1, 1, 1)
        covariance = (sums @ layout.assembly).view(-1, 9, 9) / count - first.unsqueeze(2) * first.unsqueeze(1)
        covariance += shift * (crossed + crossed.transpose(1, 2)) + shift * shift * layout.of_padding
        return Moments(torch.addcmul(first, mean.unsqueeze(1), layout.fraction), covariance, count)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One depthwise convolution."""
        return in_parts(lambda images: [convolved(self.geometry, images, weight, bias)], x)[0]

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """The convolution's own."""
        found = [convolution_backward(self.geometry, x[part], dy[part], None) for part in parts_of(x, dy)]
        return added(found).reshape(-1, 1, 9)

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor, curvature: Tensor, offset: Tensor) -> Tensor:
        """The convolution's own, a 5x5 convolution for the moments, and what the border has less of."""
        layout = _layout(tuple(x.shape[2:]), curvature.dtype, x.device)
        kernels = (curvature.flatten(1) @ layout.pulling).to(x.dtype)
        constants = (offset @ layout.pulling_offset).to(x.dtype)
        everywhere, constant = kernels[:, :25].reshape(-1, 1, 5, 5), constants[:, 0].contiguous()
        gradient = None
        for part in parts_of(x, x, x):
            dx = convolution_backward(self.geometry, x[part], dy[part], weight)
            dx += F.conv2d(x[part], everywhere, constant, padding=2, groups=x.shape[1])
            borders = kernels[:, 25:].t(), constants[:, 1:].t()
            _add_borders(dx.permute(0, 2, 3, 1), x[part].permute(0, 2, 3, 1), *borders)
            gradient = put(gradient, part, dx, len(x))
        assert gradient is not None
        return gradient


def _sums(centred: Tensor) -> tuple[Tensor, Tensor]:
    """What moments are assembled from, ``[C, 34]``: lags, strips and corners; and ``[H, W, C]`` summed over images."""
    borders = _borders(centred)
    sums = [_lags(centred), _strips(borders).t(), _corners(borders, centred.shape[2]).t()]
    return torch.cat(sums, 1), centred.sum(0)


def _lags(x: Tensor) -> Tensor:
    """``sum_s x_s x_(s + lag)`` of ``[N, H, W, C]``, rows 0 to 2, columns -2 to 2: ``[C, 18]``, two halves of 3 x 3.

    The gradient of a depthwise 3x3 kernel is nine lags at once; padding one operand moves them to one side.
    """
    return torch.cat([_nine_lags(x, F.pad(x, (0, 0, *side, 0, 2))) for side in ((0, 2), (2, 0))], 1)


def _nine_lags(x: Tensor, ahead: Tensor) -> Tensor:
    channels, one = x.shape[3], (1, 1)
    maps = (x.permute(0, 3, 1, 2), ahead.permute(0, 3, 1, 2), x.new_empty(channels, 1, 3, 3))
    return convolution_gradients(*maps, one, (0, 0), one, channels, (False, True, False))[1].reshape(channels, 9)


def _borders(x: Tensor) -> Tensor:
    """Outermost rows and columns of ``[N, H, W, C]``, top bottom left right, filled up: ``[N, 4, max(H, W), C]``."""
    height, width = x.shape[1:3]
    rows, columns = x[:, :: height - 1], x[:, :, :: width - 1].transpose(1, 2)
    if height != width:
        rows = F.pad(rows, (0, 0, 0, max(height - width, 0)))
        columns = F.pad(columns, (0, 0, 0, max(width - height, 0)))
    return torch.cat([rows, columns], 1)


def _strips(borders: Tensor) -> Tensor:
    """Autocorrelations along the borders at lags 0 to 2: ``[12, C]``."""
    length = borders.shape[2]
    lags = [(borders[:, :, lag:] * borders[:, :, : max(length - lag, 0)]).sum((0, 2)) for lag in range(3)]
    return torch.stack(lags, 1).flatten(0, 1)


def _corners(borders: Tensor, width: int) -> Tensor:
    """Squares of the corners, row by row: ``[4, C]``."""
    corners = borders[:, :2, : width : width - 1]
    return (corners * corners).sum(0).flatten(0, 1)


def _add_borders(dx: Tensor, x: Tensor, kernels: Tensor, constants: Tensor) -> None:
    """Add to the border pixels what 5 taps along each border give, and to the corners a multiple of theirs.

    Args:
        dx: ``[N, H, W, C]``, changed in place.
        x: ``[N, H, W, C]``.
        kernels: ``[4 * 5 + 4, C]``.
        constants: ``[4 + 4, C]``, added to each border and corner.
    """
    height, width = x.shape[1:3]
    borders = _borders(x)
    length, along = borders.shape[2], kernels[:20].reshape(4, 5, 1, -1)
    around = F.pad(borders, (0, 0, 2, 2))
    more = torch.addcmul(constants[:4].unsqueeze(1), around[:, :, :length], along[:, 0])
    for tap in range(1, 5):
        more.addcmul_(around[:, :, tap : tap + length], along[:, tap])
    corners = more[:, :2, : width : width - 1]
    corners.addcmul_(borders[:, :2, : width : width - 1], kernels[20:].reshape(2, 2, -1))
    corners += constants[4:].reshape(2, 2, -1)
    dx[:, :: height - 1] += more[:, :2, :width]
    dx[:, :, :: width - 1] += more[:, 2:, :height].transpose(1, 2)


class _Layout:
    """Constant matrices of one map size: from sums to moments, and from curvatures to kernels.

    Attributes:
        assembly: ``[34, 81]``, from lags, strips and corners to ``sum_t u_t[a] u_t[b]``.
        pulling: ``[81, 49]``, from a curvature to a 5x5 kernel, four border kernels of 5 taps, four corners.
        pulling_offset: ``[9, 9]``, from an offset of patches to that of pixels: everywhere, borders, corners.
        seen_rows, seen_columns: ``[9, H]`` and ``[9, W]``: whether pixel s is seen by tap a while tap b is on the map.
        fraction: ``[9]``, how much of the map each tap sees.
        of_padding: ``[9, 9]``, the covariance of "this tap is on the map".
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        rows, columns = (_seen(length) for length in size)
        both = torch.outer(rows.sum(0), columns.sum(0)).view(3, 3, 3, 3).permute(0, 2, 1, 3).reshape(9, 9)
        both /= size[0] * size[1]
        of_padding = both - torch.outer(both.diagonal(), both.diagonal())
        matrices = (_assembly(), _pulling(), _pulling_offset(), rows.t(), columns.t(), both.diagonal(), of_padding)
        placed = [matrix.to(device, dtype) for matrix in matrices]
        self.assembly, self.pulling, self.pulling_offset, self.seen_rows, self.seen_columns = placed[:5]
        self.fraction, self.of_padding = placed[5:]

    def seen(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """What each tap a sees of ``[H, W, C]``, and what of it while tap b is on the map, less b's share."""
        height, width, channels = sums.shape
        by_rows = (self.seen_rows @ sums.view(height, -1)).view(9, width, channels)
        inside = (self.seen_columns @ by_rows).view(3, 3, 3, 3, channels).permute(4, 0, 2, 1, 3).reshape(-1, 9, 9)
        first = inside.diagonal(dim1=1, dim2=2)
        return first, inside - first.unsqueeze(2) * self.fraction


@functools.lru_cache(maxsize=64)
def _layout(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Layout:
    return _Layout(size, dtype, device)


def _seen(length: int) -> Tensor:
    """``[length, 9]``: whether ``s - a`` and ``s - a + b`` are both on the map."""
    at = torch.arange(length, dtype=torch.float64)
    columns = [_on_map(at - a, length) * _on_map(at - a + b, length) for a, b in product(OFFSETS, OFFSETS)]
    return torch.stack(columns, 1)


def _on_map(at: Tensor, length: int) -> Tensor:
    return ((at >= 0) & (at < length)).double()


def _outside(tap: tuple[int, int]) -> list[int]:
    """Borders (top, bottom, left, right) beyond which a patch lies that sees them through this tap."""
    row, column = tap
    return [border for border, met in enumerate((row == 1, row == -1, column == 1, column == -1)) if met]


def _shared_borders(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    """Borders that both taps see from the same row or column outside, with the lag along them."""
    lag = (b[0] - a[0], b[1] - a[1])
    return [(border, lag[1] if border < 2 else lag[0]) for border in _outside(a) if border in _outside(b)]


def _corner(a: tuple[int, int], b: tuple[int, int]) -> int | None:
    """The corner (row by row) that a patch outside two borders sees through one tap."""
    borders = _outside(a)
    return 2 * borders[0] + borders[1] - 2 if a == b and len(borders) == 2 else None


def _assembly() -> Tensor:
    matrix = torch.zeros(34, 81, dtype=torch.float64)
    for entry, (a, b) in enumerate(product(TAPS, TAPS)):
        down, right = max((b[0] - a[0], b[1] - a[1]), (a[0] - b[0], a[1] - b[1]))
        matrix[down * 3 + right if right >= 0 else 9 + down * 3 + right + 2, entry] = 1
        for border, lag in _shared_borders(a, b):
            matrix[18 + border * 3 + abs(lag), entry] -= 1
        corner = _corner(a, b)
        if corner is not None:
            matrix[30 + corner, entry] += 1
    return matrix


def _pulling() -> Tensor:
    matrix = torch.zeros(81, 49, dtype=torch.float64)
    for entry, (a, b) in enumerate(product(TAPS, TAPS)):
        matrix[entry, LAGS.index((b[0] - a[0], b[1] - a[1]))] = 1
        for border, lag in _shared_borders(a, b):
            matrix[entry, 25 + border * 5 + lag + 2] -= 1
        corner = _corner(a, b)
        if corner is not None:
            matrix[entry, 45 + corner] += 1
    return matrix


def _pulling_offset() -> Tensor:
    matrix = torch.zeros(9, 9, dtype=torch.float64)
    matrix[:, 0] = 1
    for entry, tap in enumerate(TAPS):
        for border in _outside(tap):
            matrix[entry, 1 + border] -= 1
        corner = _corner(tap, tap)
        if corner is not None:
            matrix[entry, 5 + corner] += 1
    return matrix
