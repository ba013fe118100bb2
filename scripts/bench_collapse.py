"""What collapse leaves of timm's models, and how fast it is: python scripts/bench_collapse.py [model ...].

Prints the table of the README. Ratios are of interleaved runs on one thread: time before over time after, and the time
of a collapse over that of timm's reparameterize_model, or of a trace and a copy where that has nothing to do.
OpenVINO is used where it is installed. Weights are random, BatchNorms have statistics as after training.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.proxy import TraceError

import repblocks as rb
from repblocks.calibration import calibrate, reestimate
from repblocks.graph.collapse import collapse_unverified
from repblocks.profiling import count_ops, latency_ms, profile
from repblocks.runtimes import Run, opened, usable_runtimes

MODELS = (
    "repvgg_a0",
    "repvgg_d2se",
    "mobileone_s0",
    "mobileone_s4",
    "fastvit_t8",
    "fastvit_sa12",
    "repvit_m1",
    "repghostnet_100",
    "levit_128s",
    "efficientformer_l1",
    "ghostnetv2_100",
    "inception_v3",
    "resnet18",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "fasternet_t0",
    "starnet_s1",
    "shvit_s1",
    "convnext_tiny",
)
#: Models whose collapse is mostly tracing.
SMALL_MODELS = ("efficientnet_b0", "mobilenetv4_conv_small", "resnet18", "starnet_s1", "fasternet_t0", "convnext_tiny")
ALLOWED = {
    "repvgg_b3": " (allowed: 1.5 times)",
    "mobileone_s0": " (allowed: 5 s)",
    **dict.fromkeys(SMALL_MODELS, " (allowed: 3 times)"),
}
COLUMNS = (
    "model",
    "convs",
    "BNs",
    "params (M)",
    "MACs (G)",
    "error in float64",
    "eager",
    "ONNX Runtime",
    "OpenVINO",
    "collapse / baseline",
)
COPIES = 4
"""Images of which BatchNorm's statistics are calculated, and on which the two models are compared."""

RUNTIMES = ("eager", "onnxruntime", "openvino")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help="timm's names; those of the README by default")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="all by default")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of which the median counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.sections:
        SECTIONS[name](options.models, options.repeats)


def table(names: Sequence[str], repeats: int) -> None:
    """One row for each model; the runtimes' columns say how many times faster the collapsed model is."""
    print(f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", sep="\n")
    for name in names or MODELS:
        print(f"| {' | '.join(row(name, repeats))} |", flush=True)


def row(name: str, repeats: int) -> list[str]:
    before, images = prepared(name)
    after = collapse_unverified(before, images[:1])
    error = error_in_float64(before, images)
    size = tuple(images.shape[1:])
    ops, costs = [count_ops(m, images[:1]) for m in (before, after)], [profile(m, size) for m in (before, after)]
    faster = speedups(before, after, images[:1], repeats)
    _, ratio, baseline = time_of_collapse(before, images[:1], repeats=3)
    return [
        f"`{name}`",
        " -> ".join(str(op.convs) for op in ops),
        " -> ".join(str(op.norms) for op in ops),
        " -> ".join(f"{cost.params / 1e6:.2f}" for cost in costs),
        " -> ".join(f"{cost.macs / 1e9:.2f}" for cost in costs),
        f"{error:.0e}",
        *(f"{faster[runtime]:.2f}" if runtime in faster else "-" for runtime in RUNTIMES),
        f"{ratio:.2f} {baseline}" if baseline else "-",
    ]


def error_in_float64(model: nn.Module, images: Tensor) -> float:
    """The relative error of a collapsed copy; in float32, two roundings of a deep random network would be compared."""
    exact, inputs = copy.deepcopy(model).double(), images.double()
    report = rb.verify(exact, collapse_unverified(exact, inputs[:1]), inputs)
    report.raise_if_different("the collapsed model")
    return report.relative_error


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    """The model with BatchNorm statistics as after training, and images of its own size."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(COPIES, *vars(model)["pretrained_cfg"]["input_size"])
    reestimate(calibrate(model, images), images)  # off by a little in each layer, deep models lose all digits
    return model, images


def speedups(before: nn.Module, after: nn.Module, images: Tensor, repeats: int) -> dict[str, float]:
    """Time before over time after, in each runtime, all of them taking turns."""
    usable = [runtime for runtime in RUNTIMES if runtime in usable_runtimes()]
    with opened({"before": before, "after": after}, images) as runs_in:
        try:
            runs = {runtime: runs_in(runtime) for runtime in usable}
        except torch.onnx.OnnxExporterError as error:
            print(f"no ONNX file: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            runs = {"eager": runs_in("eager")}
        sides = {f"{runtime} {side}": run for runtime, pair in runs.items() for side, run in pair.items()}
        times = latency_ms(sides, images, repeats=repeats)
    return {runtime: times[f"{runtime} before"] / times[f"{runtime} after"] for runtime in runs}


def speed(names: Sequence[str], repeats: int) -> None:
    """The time of a collapse, its verification excluded, and how much of it is allowed."""
    print("speed of collapse, without its verification")
    for name in names or ("repvgg_b3", "mobileone_s0", *SMALL_MODELS):
        model, images = prepared(name)
        seconds, ratio, baseline = time_of_collapse(model, images[:1], repeats=min(repeats, 7))
        print(f"  {name:<24} {seconds:5.2f} s, {ratio:.2f} times {baseline}{ALLOWED.get(name, '')}", flush=True)


def time_of_collapse(model: nn.Module, images: Tensor, *, repeats: int) -> tuple[float, float, str]:
    """Seconds, verification excluded; their ratio to a baseline measured in turns with it, and the name of that."""
    baselines: dict[str, Callable[[nn.Module], nn.Module]] = {"timm": reparameterize_model, "trace + copy": traced_copy}
    name = "timm" if parameters(reparameterize_model(model)) < parameters(model) else "trace + copy"
    ours = partial(collapse_unverified, model)
    runs: dict[str, Run] = {"ours": ours, "theirs": lambda _: baselines[name](model)}
    try:
        runs["theirs"](images)
    except (TraceError, TypeError, RuntimeError):  # code that torch.fx does not trace
        return latency_ms({"ours": ours}, images, repeats=repeats, warmup=1)["ours"] / 1e3, float("nan"), ""
    times = latency_ms(runs, images, repeats=repeats, warmup=1)
    return times["ours"] / 1e3, times["ours"] / times["theirs"], name


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def traced_copy(model: nn.Module) -> nn.Module:
    """What any pass over the graph needs: the traced model, and a copy of it."""
    torch.fx.symbolic_trace(model)
    return copy.deepcopy(model)


#: Each takes names of models, those of the issue if there are none, and the number of rounds.
SECTIONS: Mapping[str, Callable[[Sequence[str], int], None]] = {"table": table, "speed": speed}


if __name__ == "__main__":
    main()
