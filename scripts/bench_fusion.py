"""Speed of the algebra as ratios measured in one interleaved run: python scripts/bench_fusion.py [section ...]."""

import argparse
from collections.abc import Callable, Sequence

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor

import repblocks as rb
from repblocks.fusion import AffineConv
from repblocks.fusion.matrix import output_size, to_matrix
from repblocks.profiling import latency_ms


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of which the median counts")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"got section {unknown[0]!r}; needed some of {', '.join(SECTIONS)}")
    for name in options.sections or SECTIONS:
        print("\n".join(SECTIONS[name](options.repeats)))


def bench_to_matrix(repeats: int) -> list[str]:
    """CSR of 16->16 3x3 on 32x32 against a loop over the rows, and against copying the three arrays of the result."""
    conv = AffineConv(weight=torch.randn(16, 16, 3, 3), bias=torch.randn(16), padding=((1, 1), (1, 1)))
    size = (32, 32)
    matrix, by_rows = to_matrix(conv, size), matrix_by_rows(conv, size)
    arrays = csr_arrays(matrix)
    assert all(map(torch.equal, arrays, csr_arrays(by_rows)))
    runs: dict[str, Callable[[Tensor], object]] = {
        "to_matrix": lambda _: to_matrix(conv, size),
        "row loop": lambda _: matrix_by_rows(conv, size),
        "copying the arrays": lambda _: [array.clone() for array in arrays],
    }
    times = latency_ms(runs, conv.weight, repeats=repeats)
    return [
        f"to_matrix, 16->16 3x3 on 32x32, {len(arrays[1])} entries",
        *(f"  {name:<20} {time:8.2f} ms" for name, time in times.items()),
        f"  faster than the loop {times['row loop'] / times['to_matrix']:.1f}x (needed: 30)",
        f"  times the copying    {times['to_matrix'] / times['copying the arrays']:.2f}x (allowed: 4)",
    ]


def bench_fold(repeats: int) -> list[str]:
    """A deployed copy of RepVGG-B3, in float64 inside, against timm's reparameterized one, in float32 inside."""
    ours, theirs = rb.create_model("rb_repvgg_b3").eval(), timm.create_model("repvgg_b3").eval()
    runs = {"deployed": lambda _: rb.deployed(ours), "timm": lambda _: reparameterize_model(theirs)}
    times = latency_ms(runs, torch.empty(0), repeats=repeats, warmup=1)
    return [
        "a deploy copy of repvgg_b3",
        *(f"  {name:<20} {time:8.0f} ms" for name, time in times.items()),
        f"  times timm's         {times['deployed'] / times['timm']:.2f}x (allowed: 1)",
    ]


def csr_arrays(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return matrix.crow_indices(), matrix.col_indices(), matrix.values()


def matrix_by_rows(conv: AffineConv, size: tuple[int, int]) -> Tensor:
    """What one writes first, for stride 1, dilation 1, one group and zero padding: the matrix row by row."""
    assert conv.bias is not None
    kernel_height, kernel_width = conv.kernel_size
    height, width = output_size(conv, size)
    (top, bottom), (left, right) = conv.padding
    inputs = torch.arange(conv.in_channels * size[0] * size[1]).reshape(conv.in_channels, *size)
    padded = torch.nn.functional.pad(inputs, (left, right, top, bottom), value=-1)
    bias_column = torch.tensor([inputs.numel()])
    starts, columns, values = [0], list[Tensor](), list[Tensor]()
    for channel in range(conv.out_channels):
        kernel, bias = conv.weight[channel].flatten(), conv.bias[channel : channel + 1]
        for y in range(height):
            for x in range(width):
                pixels = padded[:, y : y + kernel_height, x : x + kernel_width].flatten()
                stored = pixels >= 0
                columns += [pixels[stored], bias_column]
                values += [kernel[stored], bias]
                starts.append(starts[-1] + len(columns[-2]) + 1)
    shape = (len(starts) - 1, inputs.numel() + 1)
    arrays = torch.tensor(starts), torch.cat(columns), torch.cat(values)
    return torch.sparse_csr_tensor(*arrays, shape, check_invariants=False)


#: Each takes the number of rounds and returns the lines to print.
SECTIONS: dict[str, Callable[[int], list[str]]] = {"to_matrix": bench_to_matrix, "fold": bench_fold}


if __name__ == "__main__":
    main()
