"""Convolutions as linear operators: singular values without a matrix, and what a collapsed kernel looks like."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import grad

from repblocks.errors import ConfigurationError, FoldError
from repblocks.fusion.affine_conv import AffineConv
from repblocks.fusion.kernels import add
from repblocks.fusion.matrix import matrix_shape, output_size, padded_pixels, to_matrix

if TYPE_CHECKING:  # importing scipy takes longer than most uses of repblocks need
    from scipy.sparse.linalg import LinearOperator

#: Up to this many rows or columns, a dense decomposition is faster than Lanczos.
DENSE_SIDE = 512
#: Beyond this many rows and columns, the whole spectrum would take minutes.
WHOLE_SPECTRUM_SIDE = 4096
#: Lanczos vectors kept: with few, the close singular values of a convolution take many restarts.
LANCZOS_VECTORS = 64


def linear_operator(conv: AffineConv, input_size: Sequence[int]) -> "LinearOperator":
    """The linear part as a scipy operator: ``linear_operator(c, size) @ vec(x) == vec(c(x)) - bias``.

    It applies the convolution and its exact adjoint, in every padding mode, in float64 on the CPU, with a copy of the
    weight. It multiplies vectors and, in one batch, the columns of matrices.

    Args:
        conv: The convolution; its bias is left out.
        input_size: Spatial size of the input, without batch and channels.

    Returns:
        An operator of ``[out_channels * prod(output_size), in_channels * prod(input_size)]``, both sides in C order of
        ``[channels, *size]``.

    Raises:
        FoldError: The convolution is not defined on the size, or its weight is not finite.
    """
    from scipy.sparse.linalg import LinearOperator

    size = tuple(input_size) or (1,)
    linear = _linear_part(conv, input_size).promote(len(size))
    written = (linear.out_channels, *output_size(linear, size))

    def apply(x: Any) -> Any:
        return _as_columns(linear(_as_batch(x, (linear.in_channels, *size))), x)

    def apply_adjoint(y: Any) -> Any:
        return _as_columns(_adjoint(linear, size, _as_batch(y, written)), y)

    return LinearOperator(
        shape=_shape(linear, size),
        matvec=apply,  # pyright: ignore[reportCallIssue]  # __new__ hands these to a subclass that takes them
        rmatvec=apply_adjoint,  # pyright: ignore[reportCallIssue]
        matmat=apply,  # pyright: ignore[reportCallIssue]
        rmatmat=apply_adjoint,  # pyright: ignore[reportCallIssue]
        dtype=np.dtype(np.float64),
    )


def spectrum(conv: AffineConv, input_size: Sequence[int], k: int = 6, *, tolerance: float = 1e-8) -> Tensor:
    """The ``k`` largest singular values of the linear part, descending: float64 ``[k]``.

    Operators with few rows or columns (``DENSE_SIDE``, or ``4 k``) are decomposed densely, which is exact; the others
    by restarted Lanczos on the operator times its adjoint, without a matrix. The more the largest values differ, the
    fewer products it needs: some hundreds for random kernels, whose largest values lie close together.

    Args:
        conv: The convolution.
        input_size: Spatial size of the input, without batch and channels.
        k: How many.
        tolerance: Of Lanczos, relative to the square of the largest singular value. A loose one is faster.

    Raises:
        ConfigurationError: There are not ``k`` singular values.
        FoldError: The convolution is not defined on the size, or its weight is not finite.

    Source: Lehoucq et al. 1998, "ARPACK users' guide", https://doi.org/10.1137/1.9780898719628.
    """
    linear = _linear_part(conv, input_size)
    side = min(_shape(linear, input_size))
    if not 1 <= k <= side:
        raise ConfigurationError(
            f"got k={k}; {conv!r} on {tuple(input_size)} has {side} singular values: ask for 1 to {side}"
        )
    if side <= max(DENSE_SIDE, 4 * k):
        return _dense_spectrum(linear, input_size)[:k]
    return _lanczos_spectrum(linear, input_size, k, tolerance)


def spectral_norm(conv: AffineConv, input_size: Sequence[int], *, tolerance: float = 1e-8) -> float:
    """The largest singular value: the most by which the linear part can stretch an input.

    Args:
        conv: The convolution.
        input_size: Spatial size of the input, without batch and channels.
        tolerance: As for `spectrum`.

    Raises:
        FoldError: The convolution is not defined on the size, or its weight is not finite.
    """
    return spectrum(conv, input_size, 1, tolerance=tolerance).item()


def condition(conv: AffineConv, input_size: Sequence[int]) -> float:
    """The largest singular value divided by the smallest; infinite where the linear part has not full rank.

    The smallest counts as zero up to ``largest * max(rows, columns) * eps``, as in ``numpy.linalg.matrix_rank``.

    Raises:
        FoldError: There are more than ``WHOLE_SPECTRUM_SIDE`` singular values, the convolution is not defined on the
            size, or its weight is not finite.
    """
    values = _whole_spectrum(conv, input_size)
    largest, smallest = values[0].item(), values[-1].item()
    noise = largest * max(matrix_shape(conv, input_size)) * torch.finfo(values.dtype).eps
    return largest / smallest if smallest > noise else math.inf


def effective_rank(conv: AffineConv, input_size: Sequence[int]) -> float:
    """How many singular values matter: ``exp(entropy(s / sum(s)))``, from 1 to their number; 0 for the zero map.

    Raises:
        FoldError: There are more than ``WHOLE_SPECTRUM_SIDE`` singular values, the convolution is not defined on the
            size, or its weight is not finite.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 2.
    """
    values = _whole_spectrum(conv, input_size)
    if not values[0]:
        return 0.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """What a collapsed kernel looks like.

    Attributes:
        conv: The convolution, as text.
        input_size: Spatial size on which the singular values hold.
        kernel_size: Taps per spatial dim.
        tap_energy: Per tap, in C order of ``kernel_size``, its share of the squared weights: 0 to 1, in total 1
            (all 0 for a zero kernel). A kernel that learned a skeleton has most of it on a cross.
        branch_norms: Frobenius norm of the kernel of each branch before the collapse, by name.
        singular_values: The largest ones, descending.
        identity_distance: Frobenius norm of kernel minus identity kernel, divided by that of the identity kernel; None
            where no kernel of this shape and geometry is the identity.
    """

    conv: str
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    tap_energy: tuple[float, ...]
    branch_norms: dict[str, float]
    singular_values: tuple[float, ...]
    identity_distance: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        distance = "none has this shape" if self.identity_distance is None else f"{self.identity_distance:.3g}"
        lines = [
            f"{self.conv} on {'x'.join(map(str, self.input_size)) or 'no spatial dims'}",
            "energy per tap (%):",
            *self._energy_lines(),
            *self._branch_lines(),
            f"largest singular values: {' '.join(f'{value:.4g}' for value in self.singular_values)}",
            f"distance from the identity: {distance}",
        ]
        return "\n".join(lines)

    def _energy_lines(self) -> list[str]:
        """One line per row of taps, and an empty one between the planes of a 3d kernel."""
        width, height = (*reversed(self.kernel_size), 1, 1)[:2]
        cells = [f"{100 * share:6.1f}" for share in self.tap_energy]
        rows = [" ".join(cells[start : start + width]) for start in range(0, len(cells), width)]
        return [
            line for index, row in enumerate(rows) for line in ([""] if index and index % height == 0 else []) + [row]
        ]

    def _branch_lines(self) -> list[str]:
        if not self.branch_norms:
            return []
        width = max(map(len, self.branch_norms))
        norms = [f"  {name:<{width}}  {norm:.4g}" for name, norm in self.branch_norms.items()]
        return ["Frobenius norm per branch before the collapse:", *norms]


def kernel_report(
    conv: AffineConv | Mapping[str, AffineConv], input_size: Sequence[int], k: int = 6, *, tolerance: float = 1e-4
) -> KernelReport:
    """Describe a kernel: energy per tap, norm per branch, singular values, distance from the identity.

    Args:
        conv: One convolution, or parallel branches by name, which are added.
        input_size: Spatial size of the input, without batch and channels.
        k: How many singular values, or all if there are fewer.
        tolerance: As for `spectrum`.

    Raises:
        FoldError: The branches cannot be added, the convolution is not defined on the size, or a weight is not finite.

    Source: Ding et al. 2019, "ACNet", https://arxiv.org/abs/1908.03930, section 4.4, for the energy per tap.
    """
    branches = {} if isinstance(conv, AffineConv) else dict(conv)
    whole = conv if isinstance(conv, AffineConv) else add(*branches.values())
    linear = _linear_part(whole, input_size)
    values = spectrum(linear, input_size, min(k, *_shape(linear, input_size)), tolerance=tolerance)
    return KernelReport(
        conv=repr(whole),
        input_size=tuple(input_size),
        kernel_size=whole.kernel_size,
        tap_energy=tuple(_tap_energy(linear.weight).tolist()),
        branch_norms={name: branch.weight.detach().double().norm().item() for name, branch in branches.items()},
        singular_values=tuple(values.tolist()),
        identity_distance=_identity_distance(linear),
    )


def _linear_part(conv: AffineConv, input_size: Sequence[int]) -> AffineConv:
    output_size(conv, input_size)
    if not conv.weight.isfinite().all():
        raise FoldError(f"the weight of {conv!r} has infinite or NaN entries; singular values need finite ones")
    weight = conv.weight.detach().to("cpu", torch.float64, copy=True)
    return replace(conv, weight=weight, bias=None).promote(len(input_size))


def _shape(conv: AffineConv, input_size: Sequence[int]) -> tuple[int, int]:
    rows, columns = matrix_shape(conv, input_size)
    return rows, columns - 1


def _as_batch(columns: Any, size: tuple[int, ...]) -> Tensor:
    """A vector, or a matrix with vectors as columns, as a batch of ``[*size]``."""
    vectors = columns.reshape(len(columns), -1).T.astype(np.float64, order="C", casting="same_kind")
    return torch.from_numpy(vectors).reshape(-1, *size)


def _as_columns(batch: Tensor, like: Any) -> Any:
    """The inverse of `_as_batch`, with as many dims as ``like``."""
    return batch.flatten(1).T.numpy().reshape(-1, *like.shape[1:])


def _adjoint(conv: AffineConv, input_size: tuple[int, ...], y: Tensor) -> Tensor:
    """The adjoint of the convolution of the padded input, then the adjoint of the padding."""
    padded = (
        len(y),
        conv.in_channels,
        *(side + sum(pair) for side, pair in zip(input_size, conv.padding, strict=True)),
    )
    backward: Any = (grad.conv1d_input, grad.conv2d_input, grad.conv3d_input)[conv.rank - 1]
    x = backward(padded, conv.weight, y, conv.stride, 0, conv.dilation, conv.groups)
    for dim, side in enumerate(input_size):
        x = _unpadded(x, dim + 2, padded_pixels(conv, dim, side), side)
    return x


def _unpadded(x: Tensor, dim: int, pixels: Tensor, side: int) -> Tensor:
    """Add every padded pixel to the input pixel that it repeats."""
    repeating = (pixels >= 0).nonzero().squeeze(1)
    shape = (*x.shape[:dim], side, *x.shape[dim + 1 :])
    return x.new_zeros(shape).index_add(dim, pixels[repeating], x.index_select(dim, repeating))


def _whole_spectrum(conv: AffineConv, input_size: Sequence[int]) -> Tensor:
    linear = _linear_part(conv, input_size)
    side = min(_shape(linear, input_size))
    if side > WHOLE_SPECTRUM_SIDE:
        raise FoldError(
            f"{conv!r} on {tuple(input_size)} has {side} singular values, and all of them are needed; at most "
            f"{WHOLE_SPECTRUM_SIDE} are computed: give a smaller input_size, or call spectrum for the largest ones"
        )
    return _dense_spectrum(linear, input_size)


def _dense_spectrum(linear: AffineConv, input_size: Sequence[int]) -> Tensor:
    return torch.linalg.svdvals(to_matrix(linear, input_size, layout="dense")[:, :-1])


def _lanczos_spectrum(linear: AffineConv, input_size: Sequence[int], k: int, tolerance: float) -> Tensor:
    """Values come from the operator on the singular vectors: roots of its square would lose half the digits."""
    scale = linear.weight.norm().item() or 1.0  # ARPACK's test of convergence is not invariant to scale
    operator = linear_operator(replace(linear, weight=linear.weight / scale), input_size)
    tall = operator if operator.shape[0] >= operator.shape[1] else operator.T
    start = np.random.default_rng(0).standard_normal(tall.shape[1])
    shift = np.linalg.norm(tall.rmatvec(tall @ start)) / np.linalg.norm(start)
    if not shift:
        return torch.zeros(k, dtype=torch.float64)
    basis = np.linalg.qr(_largest_eigenvectors(_shifted(tall.T @ tall, shift), k, tolerance, start, shift)).Q
    return scale * torch.linalg.svdvals(torch.from_numpy(tall @ basis))[:k]


def _largest_eigenvectors(shifted: "LinearOperator", k: int, tolerance: float, start: Any, shift: Any) -> Any:
    """At least ``k``: one start vector reaches one copy of a multiple value, and further copies by rounding only."""
    values, vectors = _lanczos(shifted, k, tolerance, start)
    while k > 1:
        value, vector = _lanczos(_deflated(shifted, values - shift, vectors), 1, tolerance, start)
        if value[0] <= np.sort(values)[-k] * (1 + tolerance):
            break
        values, vectors = np.append(values, value), np.column_stack([vectors, vector])
    return vectors


def _lanczos(operator: "LinearOperator", k: int, tolerance: float, start: Any) -> tuple[Any, Any]:
    from scipy.sparse.linalg import eigsh

    pairs: Any = eigsh(
        operator,
        k=k,
        v0=start,
        ncv=min(len(start), max(2 * k + 1, LANCZOS_VECTORS)),
        tol=tolerance,  # pyright: ignore[reportArgumentType]  # inferred from the default, 0
    )
    return pairs


def _shifted(gram: "LinearOperator", shift: Any) -> "LinearOperator":
    """Add ``shift`` to every eigenvalue: ARPACK fails where its vectors fall into the null space of a low rank."""
    from scipy.sparse import eye_array
    from scipy.sparse.linalg import aslinearoperator

    return gram + aslinearoperator(shift * eye_array(gram.shape[0]))


def _deflated(operator: "LinearOperator", values: Any, vectors: Any) -> "LinearOperator":
    """The same operator with the eigenvalues that were found lowered by ``values``."""
    from scipy.sparse.linalg import aslinearoperator

    return operator - aslinearoperator(vectors * values) @ aslinearoperator(vectors.T)


def _tap_energy(weight: Tensor) -> Tensor:
    energy = weight.square().sum(dim=(0, 1)).flatten()
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)


def _identity_distance(conv: AffineConv) -> float | None:
    """The identity has its tap on the output pixel, so the padding before it must end on a tap."""
    grown = tuple(sum(pair) for pair in conv.padding)
    taps = [divmod(before, d) for (before, _), d in zip(conv.padding, conv.dilation, strict=True)]
    keeps_grid = math.prod(conv.stride) == 1 and grown == conv.reach
    if conv.in_channels != conv.out_channels or not keeps_grid or any(between for _, between in taps):
        return None
    out = torch.arange(conv.out_channels)
    difference = conv.weight.clone()
    difference[(out, out % conv.weight.shape[1], *(tap for tap, _ in taps))] -= 1
    return difference.norm().item() / math.sqrt(conv.out_channels)
