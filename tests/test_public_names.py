"""What `import repblocks as rb` gives, what its texts promise, and what it costs."""

import inspect
import json
import re
import resource
import subprocess
import sys
from typing import Any

import pytest

import repblocks as rb

VALUES = {"AffineConv", "AffineConvTranspose"}
KERNELS = {
    *("fold", "add", "concat", "interleave", "split_concat", "compose", "pad_kernel", "ungroup", "absorb_shortcut"),
    "to_matrix",
}
NUMBERS = {"linear_operator", "spectrum", "spectral_norm", "kernel_report", "macs", "profile", "branch_shares"}
VERBS = {"switch_to_deploy", "deployed", "collapse", "expand", "contract"}
MODELS = {
    "create_model",
    "list_models",
    "save",
    "load",
    "convert",
    "export",
    "load_deploy",
    "half_range",
    "DeployModel",
}
TRAINING = {"set_execution", "execution_plan", "ExecutionPlan", "RepOptimizer"}
CHECKS = {"verify", "check_block", "form_of", "BlockReport", "EquivalenceReport"}
RESULTS = {"Collapsed", "CollapseReport", "Expanded", "ExpandedConv"}
OWN_BLOCKS = {"RepConv", "RepBlock", "BranchConv", "BLOCKS", "register_block", "Sum", "Concat", "SplitConcat"}
BLOCKS = {
    *(
        "ACConv",
        "BNConv",
        "ConvBN",
        "CSLAConv",
        "DBBConv",
        "DilatedRepConv",
        "EdgeConv",
        "ExpandConv",
        "LargeKernelConv",
    ),
    *("MobileOneConv", "NormLinear", "OREPAConv", "QARepVGGConv", "RepGhostModule", "RepMixer", "RepNeXtBlock"),
    *("RepNeXtMConv", "RepNeXtMSmallConv", "RepUnit", "RepVGGBlock", "RepVGGConv", "RepViTConv"),
}
ERRORS = {
    *("RepblocksError", "CheckpointError", "ConfigurationError", "DataError", "FoldError", "NonFiniteError"),
    "VerificationError",
}
HEAVY = ("pytorch_lightning", "lightning", "hydra", "onnx", "onnxruntime", "openvino", "matplotlib", "scipy", "typer")
WITHOUT_ERRORS = {"form_of", "list_models", "profile", "execution_plan", "half_range"}
"""Functions that refuse nothing themselves: what fails there fails in the model or in torch."""

FUNCTIONS = sorted(name for name in rb.__all__ if inspect.isfunction(getattr(rb, name)))
CLASSES = sorted(name for name in rb.__all__ if inspect.isclass(getattr(rb, name)))


def doc(name: str) -> str:
    """The text of a name itself: a class does not inherit that of its base."""
    found = getattr(rb, name)
    return inspect.cleandoc((vars(found)["__doc__"] if inspect.isclass(found) else found.__doc__) or "")


def test_the_public_names_are_those_of_the_design() -> None:
    groups = [VALUES, KERNELS, NUMBERS, VERBS, MODELS, TRAINING, CHECKS, RESULTS, OWN_BLOCKS, BLOCKS, ERRORS]
    assert sorted(rb.__all__) == sorted(set().union(*groups))
    assert sum(map(len, groups)) == len(rb.__all__)
    assert {cls.__name__ for cls in rb.BLOCKS.values()} <= BLOCKS


@pytest.mark.parametrize("name", sorted({*CLASSES, *FUNCTIONS}))
def test_every_public_name_says_what_it_is_in_one_line(name: str) -> None:
    summary = doc(name).partition("\n")[0]
    assert 20 <= len(summary) <= 120
    assert summary.endswith((".", ":"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_every_argument_and_what_they_raise(name: str) -> None:
    text = doc(name)
    arguments = [argument for argument in inspect.signature(getattr(rb, name)).parameters if argument != "kwargs"]
    assert all(re.search(rf"\b{re.escape(argument)}\b", text) for argument in arguments) or len(arguments) == 1
    assert ("Raises:" in text) == (name not in WITHOUT_ERRORS)


@pytest.mark.parametrize("name", sorted(KERNELS | VERBS))
def test_kernels_and_verbs_state_their_law(name: str) -> None:
    assert "==" in doc(name)


@pytest.mark.parametrize(
    "name", sorted(KERNELS | {"expand", "collapse", "spectrum", "kernel_report"} | BLOCKS | VALUES)
)
def test_what_comes_from_a_paper_says_from_where(name: str) -> None:
    assert "Source:" in doc(name)


@pytest.mark.parametrize(
    "name", ["to_matrix", "verify", "export", "half_range", "spectrum", "fold", "RepConv", *sorted(VALUES)]
)
def test_what_takes_or_gives_tensors_says_their_shape(name: str) -> None:
    assert re.search(r"\[[\w, ./*'()+]+\]", doc(name))


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_name_their_own_arguments(name: str) -> None:
    arguments = inspect.signature(getattr(rb, name)).parameters
    assert all(re.search(rf"\b{argument}\b", doc(name)) for argument in arguments)


def test_importing_the_library_imports_no_trainer_runtime_or_plotter() -> None:
    code = f"import repblocks, sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.slow
def test_importing_the_library_takes_little_longer_than_importing_timm() -> None:
    """Processor seconds of whole processes in turns, of each the least: other work on the machine adds to them."""
    names = ("timm", "repblocks")
    seconds = [{name: _processor_seconds(name) for name in names} for _ in range(4)]
    least = {name: min(turn[name] for turn in seconds) for name in names}
    assert least["repblocks"] < 1.2 * least["timm"], least


def _processor_seconds(package: str) -> float:
    before = _used()
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True)
    return _used() - before


def _used() -> float:
    used: Any = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
