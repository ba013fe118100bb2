"""Forms, twins and shortcuts in several runtimes, and the picture of it."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from report.report_cases import small_model, small_repnext
from support import calibrate
from torch import nn

import repblocks as rb
from repblocks import benchmark, runtimes
from repblocks.deploy_form import DeployForm
from repblocks.errors import CheckpointError, ConfigurationError, VerificationError

SIZE = (1, 32, 32)
LAYOUT: dict[str, Any] = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8]}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was timed, by name, in the place of the times: these are 1, 2, 4, ... milliseconds in the order given."""
    seen: list[dict[str, Any]] = []

    def latency_ms(runs: dict[str, Any], inputs: torch.Tensor, *, repeats: int) -> dict[str, float]:
        seen.append({**runs, "inputs": inputs, "repeats": repeats})
        return {name: float(2**place) for place, name in enumerate(runs)}

    monkeypatch.setattr(benchmark, "latency_ms", latency_ms)
    return seen


def compared(model: nn.Module, size: tuple[int, int, int] = SIZE, **options: Any) -> dict[str, Any]:
    (row,) = benchmark.compare_forms("shown", model, size, runtimes=["eager"], repeats=1, **options)
    return row


def test_a_row_has_both_forms_and_their_ratio(timed: list[dict[str, Any]]) -> None:
    model = small_model()
    row = compared(model, batch=3)
    assert row == {
        "model": "shown",
        "runtime": "eager",
        "train_ms": 1.0,
        "deploy_ms": 2.0,
        "timm_ms": None,
        "train_over_deploy": 0.5,
        "timm_over_deploy": None,
    }
    assert rb.form_of(timed[0]["train"]) == "train"
    assert rb.form_of(timed[0]["deploy"]) == "deploy"
    assert timed[0]["inputs"].shape == (3, *SIZE)
    assert timed[0]["repeats"] == 1


def test_the_model_stays_as_it_was() -> None:
    model = small_model().train()
    before = copy.deepcopy(model.state_dict())
    compared(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_in_deploy_form_has_no_train_form(timed: list[dict[str, Any]]) -> None:
    row = compared(rb.deployed(small_model()))
    assert row["train_ms"] is None
    assert row["train_over_deploy"] is None
    assert row["deploy_ms"] == 1.0


def test_a_model_without_our_blocks_is_collapsed_by_its_graph(timed: list[dict[str, Any]]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    row = compared(model)
    assert row["train_over_deploy"] == 0.5
    kinds = [type(module) for module in timed[0]["deploy"].modules()]
    assert nn.Conv2d in kinds
    assert nn.BatchNorm2d not in kinds
    assert nn.BatchNorm2d in [type(module) for module in timed[0]["train"].modules()]


def test_a_model_that_nothing_collapses_in_has_one_form(timed: list[dict[str, Any]]) -> None:
    assert compared(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))["train_ms"] is None


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_the_twin_goes_by_the_registered_name_and_arguments(timed: list[dict[str, Any]], form: str) -> None:
    model = rb.create_model("rb_mobileone_s0", form=form, num_classes=7, in_chans=1)
    row = compared(model)
    twin, images = timed[0]["timm"], torch.randn(2, *SIZE)
    assert row["timm_over_deploy"] == row["timm_ms"] / row["deploy_ms"] == 2
    assert twin(images).shape == (2, 7)
    assert rb.profile(twin, SIZE).params == rb.profile(timed[0]["deploy"], SIZE).params
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())


@pytest.mark.slow
def test_the_twin_of_a_checkpoint_is_found_by_what_is_in_it(timed: list[dict[str, Any]], tmp_path: Path) -> None:
    rb.save(rb.create_model("rb_mobileone_s0", num_classes=7), tmp_path / "best.safetensors")
    model = rb.load(tmp_path / "best.safetensors")
    (row,) = benchmark.compare_forms(str(tmp_path), model, (3, 32, 32), runtimes=["eager"])
    assert row["model"] == str(tmp_path)
    assert row["timm_ms"] is not None


def test_a_network_of_another_layout_is_no_twin(timed: list[dict[str, Any]]) -> None:
    assert compared(rb.create_model("rb_repvgg_a0", in_chans=1, **LAYOUT))["timm_ms"] is None


def test_timms_own_model_has_what_timm_makes_of_it(timed: list[dict[str, Any]]) -> None:
    model = calibrate(rb.create_model("mobileone_s0", in_chans=1, num_classes=3), torch.randn(4, *SIZE)).eval()
    row = compared(model)
    assert row["train_ms"] == 1.0
    assert rb.verify(model, timed[0]["timm"], torch.randn(2, *SIZE)).passed
    assert timed[0]["timm"] is not timed[0]["train"]


def test_timms_models_that_timm_changes_nothing_in_have_no_twin(timed: list[dict[str, Any]]) -> None:
    row = compared(rb.create_model("test_resnet", in_chans=1).eval())
    assert row["timm_ms"] is None
    assert row["train_ms"] is not None


def test_methods_of_a_users_model_are_not_called_in_search_of_a_twin(timed: list[dict[str, Any]]) -> None:
    class Own(nn.Sequential):
        def reparameterize(self) -> None:
            raise AssertionError

    assert compared(Own(Own(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))))["timm_ms"] is None


def test_both_shortcuts_come_from_the_same_weights_and_are_the_same_function(timed: list[dict[str, Any]]) -> None:
    model, images = small_repnext(), torch.randn(3, *SIZE)
    benchmark.compare_shortcuts(model, SIZE, runtimes=["eager"], batch=2, repeats=5)
    forms = {name: timed[0][name] for name in ("absorb", "keep")}
    for name, form in forms.items():
        blocks = [module for module in form.modules() if isinstance(module, rb.RepNeXtBlock)]
        assert {(block.shortcut, block.form) for block in blocks} == {(name, "deploy")}
        assert rb.verify(model, form, images).passed
    assert rb.profile(forms["absorb"], SIZE).macs > rb.profile(forms["keep"], SIZE).macs
    assert timed[0]["inputs"].shape == (2, *SIZE)
    assert timed[0]["repeats"] == 5


def test_forms_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, images: torch.Tensor) -> DeployForm:
        form = rb.deployed(model)
        if any(getattr(module, "shortcut", "") == "keep" for module in form.modules()):
            torch.nn.init.ones_(form.get_parameter("head.fc.bias"))
        return DeployForm(form, None)

    monkeypatch.setattr(benchmark, "deploy_form_of", wrong)
    with pytest.raises(VerificationError, match='shortcut="keep" differs'):
        benchmark.compare_shortcuts(small_repnext(), SIZE, runtimes=["eager"])


@pytest.mark.parametrize(
    ("absorb", "keep", "faster"),
    [(10.0, 10.3, "absorb"), (10.3, 10.0, "keep"), (10.0, 10.19, "tie"), (10.19, 10.0, "tie"), (5.0, 5.0, "tie")],
)
def test_medians_within_two_percent_are_a_tie(
    monkeypatch: pytest.MonkeyPatch, absorb: float, keep: float, faster: str
) -> None:
    monkeypatch.setattr(benchmark, "latency_ms", lambda *_, **__: {"absorb": absorb, "keep": keep})
    rows = benchmark.compare_shortcuts(small_repnext(), SIZE, runtimes=["eager"])
    assert rows == [
        {
            "model": "rb_repnext_cifar",
            "runtime": "eager",
            "absorb_ms": absorb,
            "keep_ms": keep,
            "keep_over_absorb": keep / absorb,
            "faster": faster,
        }
    ]


def test_blocks_that_cannot_absorb_leave_no_choice() -> None:
    one, per_channel = nn.PReLU, lambda: nn.PReLU(4)
    assert benchmark.has_shortcuts(rb.RepNeXtBlock(4, expansion=1, shortcut="keep", act_layer=one))
    assert not benchmark.has_shortcuts(rb.RepNeXtBlock(4, expansion=1, shortcut="keep", act_layer=per_channel))
    assert not benchmark.has_shortcuts(small_model())


def test_every_runtime_computes_the_model_from_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    export, written = torch.onnx.export, []
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kw: written.append(args[0]) or export(*args, **kw))
    models = {"a": small_model(), "b/..": rb.deployed(small_model("acb"))}
    images = torch.randn(2, *SIZE)
    expected = {name: model(images).detach() for name, model in models.items()}
    assert not torch.allclose(*expected.values(), rtol=0.1)
    with runtimes.opened(models, images) as runs_in:
        for runtime in ("eager", "onnxruntime", "openvino"):
            for name, run in runs_in(runtime).items():
                output = run(images) if runtime == "eager" else torch.as_tensor(run(images)[0])
                assert (output - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
    assert written == list(models.values())


def test_onnx_runtime_and_openvino_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime
    import openvino

    made: list[Any] = []
    for module, name in ((onnxruntime, "InferenceSession"), (openvino, "compile_model")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, make=make, **kw: made.append(make(*args, **kw)) or made[-1])
    with runtimes.opened({"net": nn.Conv2d(1, 2, 3).eval()}, torch.randn(1, *SIZE)) as runs_in:
        runs_in("onnxruntime")
        runs_in("openvino")
    options = made[0].get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert [int(made[1].get_property(name)) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")] == [1, 1]


SIGNALLED = """
import gc, os, signal, sys
from repblocks.runtimes import compiled_by_openvino

first, second = compiled_by_openvino(sys.argv[1]), compiled_by_openvino(sys.argv[1])
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_process_that_used_openvino_still_handles_signals(tmp_path: Path) -> None:
    """OpenVINO takes stacks for signals from threads in the order in which models go, not in that of their coming."""
    torch.onnx.export(nn.Conv2d(1, 2, 3).eval(), (torch.randn(1, *SIZE),), tmp_path / "net.onnx", verbose=False)
    command = [sys.executable, "-X", "faulthandler", "-c", SIGNALLED, str(tmp_path / "net.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_the_compiler_has_compiled_before_anything_is_timed() -> None:
    model, images = nn.Conv2d(1, 2, 3).eval(), torch.randn(1, *SIZE)
    frames = torch._dynamo.utils.counters["frames"]
    at_first = frames["total"]
    with runtimes.opened({"net": model}, images) as runs_in, torch.no_grad():
        run = runs_in("compile")["net"]
        compiled = frames["total"]
        assert compiled > at_first
        torch.testing.assert_close(run(images), model(images))
    assert frames["total"] == compiled


def test_runtimes_that_are_not_installed_are_left_out_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtimes.usable_runtimes() == list(runtimes.RUNTIMES)
    assert runtimes.usable_runtimes(["openvino", "eager"]) == ["openvino", "eager"]
    find = runtimes.importlib.util.find_spec
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    assert runtimes.usable_runtimes() == ["eager", "compile", "onnxruntime"]
    with pytest.raises(ConfigurationError, match=r'openvino needs openvino; run: pip install "repblocks\[export,openv'):
        runtimes.usable_runtimes(["eager", "openvino"])


ROWS = [
    {"model": model, "runtime": runtime, "train_ms": train, "deploy_ms": deploy, "timm_ms": twin}
    for model, train, deploy, twin in (
        ("$x^{2$", 30.0, 12.5, 12.0),
        ("b", 200.0, 1234.5, None),
        ("c" * 99, None, 1.0, None),
    )
    for runtime in ("eager", "compile", "onnxruntime", "openvino")
]


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Any:
    """The figure, laid out, that `draw` writes."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: figures.append(figure) or figure.draw_without_rendering()
    )
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "replacing", nullcontext)
        benchmark.draw(rows, Path("unused.png"))
    (figure,) = figures
    return figure


def test_what_was_not_measured_has_no_bar_and_what_was_has_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    charts = drawn(monkeypatch, ROWS).axes
    lengths = [[bar.get_width() for bar in chart.patches] for chart in charts]
    assert lengths == [[30.0, 12.5, 12.0] * 4, [200.0, 1234.5] * 4, [1.0] * 4]
    assert [text.get_text() for text in charts[1].texts] == ["200", "1,234"] * 4
    train, deploy, twin = (patch.get_facecolor() for patch in charts[0].figure.legends[0].get_patches())
    assert len({train, deploy, twin}) == 3
    assert [bar.get_facecolor() for bar in charts[0].patches] == [train, deploy, twin] * 4
    assert [bar.get_facecolor() for bar in charts[2].patches] == [deploy] * 4
    assert [chart.get_title(loc="left") for chart in charts] == ["$x^{2$", "b", "\u2026" + "c" * 69]


def test_no_label_of_the_picture_covers_another_or_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, ROWS)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "train form",
        "deploy form",
        "timm, reparameterized",
    ]
    texts = [text for chart in figure.axes for text in (*chart.texts, *chart.get_yticklabels(), chart._left_title)]
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(chart.get_window_extent()) for chart in figure.axes)
    boxes = [text.get_window_extent() for text in texts] + [figure.legends[0].get_window_extent()]
    boxes += [bar.get_window_extent() for chart in figure.axes for bar in chart.patches]
    inside = figure.bbox.padded(1)
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-0.5).overlaps(b.padded(-0.5))]
    assert pairs == []


@pytest.mark.parametrize("rows", [ROWS, ROWS[8:9]])
def test_the_picture_is_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    benchmark.draw(rows, tmp_path / "plot.png")
    benchmark.draw(rows, tmp_path / "plot.svg")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] == 1050
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()


def test_what_cannot_be_drawn_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"plot\.txt: needed is a name that ends in \.png, \.svg, \.pdf"):
        benchmark.draw(ROWS, tmp_path / "plot.txt")
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "repblocks\[report\]"'):
        benchmark.require_drawable(tmp_path / "plot.png")


def test_a_full_disk_leaves_no_half_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(figure: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(CheckpointError, match="No space left"):
        benchmark.draw(ROWS, tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_names_of_timm_are_those_of_its_registry() -> None:
    assert all(timm.is_model(name) for name in benchmark.TIMMS_NAMES.values())
    assert benchmark.twin_of("resnet18") is None
    assert benchmark.twin_of("rb_resnet20_cifar") is None
