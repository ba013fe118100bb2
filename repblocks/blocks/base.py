"""What every block is: `RepBlock`, `RepConv`, and the switch from train form to deploy form."""

import copy
from abc import ABC
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from repblocks.blocks.copying import copied, in_float64, on_meta
from repblocks.blocks.merged import choice as merged
from repblocks.blocks.merged.choice import Execution
from repblocks.errors import CheckpointError, ConfigurationError, FoldError
from repblocks.fusion import AffineConv, Sum, fold

Form = Literal["train", "deploy"]
Children = Mapping[str, nn.Module | None]

OTHER_FORM: Mapping[Form, str] = {
    "deploy": (
        "the model is in deploy form and expects deploy-form weights, but these are of a train form; load them into "
        "create_model(..., form='train') and collapse that by repblocks.deployed(model)"
    ),
    "train": (
        "the model is in train form and expects train-form weights, but these are of a deploy form, which cannot be "
        "undone; load them into create_model(..., form='deploy'), or load the weights from before the collapse"
    ),
}
"""What to say of a model in this form that is given the weights of the other."""


class RepBlock(nn.Module, ABC):
    """Abstract: a module with a train form, of many branches, and an equal deploy form without them.

    A subclass says in `deploy_children` which children take the place of which; blocks inside it switch by themselves.
    """

    form: Form = "train"

    def deploy_children(self) -> Children:
        """New children of the deploy form by name, None where a child goes; changes nothing.

        Raises:
            FoldError: The branches are not exactly convolutions, or fold to values that are not finite.
        """
        return {}

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]  # the rest is torch's, passed on
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        """Recognise the weights of the other form, instead of listing every key of both.

        Raises:
            CheckpointError: The weights of this block are those of its other form.
        """
        given = [key.removeprefix(prefix).split(".") for key in state_dict if key.startswith(prefix)]
        if self._is_other_form(given):
            raise CheckpointError(OTHER_FORM[self.form])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_other_form(self, given: Sequence[Sequence[str]]) -> bool:
        """Whether keys (split at the dots) hold branches that this form does not have."""
        return _have_branches(given) and not _have_branches([key.split(".") for key in self.state_dict()])

    def switch_to_deploy(self) -> None:
        """Collapse this block in place; does nothing in deploy form.

        Raises:
            ConfigurationError: The block is in training mode.
            FoldError: It does not fold; it is left as it was.
        """
        switch_to_deploy(self)


class RepConv(RepBlock, ABC):
    """Abstract: a linear block ``[N, in, H, W] -> [N, out, H', W']``, which collapses into one ``nn.Conv2d``.

    Subclasses only build branches, and ``block.switch_to_deploy()`` leaves what ``block.eval()`` computes.

    Train form has one child ``branches``, deploy form one child ``conv``. Whether the branches fold is found out at
    construction, on the meta device. The attributes named as in ``nn.Conv2d`` describe what the branches amount to,
    ``padding`` as ``(before, after)`` per dim; ``conv`` has a larger kernel where the two differ.

    Args:
        branches: A module that `fold` understands.
        in_channels: Channels of the input, where the branches cannot tell.

    Raises:
        FoldError: The branches are not one convolution.
    """

    branches: nn.Module
    conv: nn.Module
    execution: Execution = "auto"

    def __init__(self, branches: nn.Module, in_channels: int | None = None) -> None:
        super().__init__()
        value = fold(copied(branches, on_meta).eval(), in_channels).promote(2)
        self.in_channels, self.out_channels = value.in_channels, value.out_channels
        self.kernel_size, self.stride, self.padding = value.kernel_size, value.stride, value.padding
        self.dilation, self.groups, self.padding_mode = value.dilation, value.groups, value.padding_mode
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        if self.form == "deploy":
            return self.conv(x)
        return merged.run(self, x) if self.training else self.branches(x)

    def deploy_children(self) -> Children:
        """The branches as one convolution."""
        value = folded(self.branches, self.in_channels).promote(2)
        return {"branches": None, "conv": as_module(value, like=self.branches)}

    def _is_other_form(self, given: Sequence[Sequence[str]]) -> bool:
        """Whether the keys are branches for a deploy form, or one convolution for a train form."""
        one_conv = ["conv", "weight"] in given or ["weight"] in given
        return super()._is_other_form(given) or (self.form == "train" and one_conv and not _have_branches(given))

    def extra_repr(self) -> str:
        """What the branches amount to; the deploy form's convolution shows itself."""
        if self.form == "deploy":
            return "form=deploy"
        groups = f", groups={self.groups}" if self.groups != 1 else ""
        geometry = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        dilation = f", dilation={self.dilation}" if any(d != 1 for d in self.dilation) else ""
        return f"{self.in_channels}, {self.out_channels}, {geometry}{dilation}{groups}, form=train"


@fold.register(RepConv, reads=lambda block: block.in_channels)
def _fold_rep_conv(module: RepConv, in_channels: int | None) -> AffineConv:
    return fold(module.branches if module.form == "train" else module.conv, module.in_channels)


@final
class BranchConv(RepConv):
    """Any mixture: ``BranchConv([a, b])(x) == a(x) + b(x)``, collapsing into one convolution.

    Args:
        branches: Modules over one input that `fold` understands, chains as ``nn.Sequential``; named, or in order.
        in_channels: Channels of the input, where no branch can tell.

    Raises:
        FoldError: A branch is not a convolution, or their outputs differ in shape.
    """

    def __init__(
        self, branches: Mapping[str, nn.Module] | Sequence[nn.Module], *, in_channels: int | None = None
    ) -> None:
        super().__init__(Sum(branches), in_channels)


def _have_branches(keys: Iterable[Sequence[str]]) -> bool:
    """Whether a block, or a block right inside it, has its branches among these keys."""
    return any("branches" in key[:2] for key in keys)


def folded(module: nn.Module, in_channels: int | None = None) -> AffineConv:
    """Fold an eval-mode copy in float64 on the CPU; the module is not touched."""
    return fold(copied(module, in_float64).eval(), in_channels)


def as_module(value: AffineConv, *, like: nn.Module) -> nn.Module:
    """The plain torch module of a value, cast once to the dtype and device of another module; frozen if that is.

    Raises:
        FoldError: A weight is not finite, or not in that dtype.
    """
    tensors = [tensor for tensor in (*like.parameters(), *like.buffers()) if tensor.is_floating_point()]
    model = tensors[0] if tensors else torch.empty(0)
    module = value.to_module(device=model.device, dtype=model.dtype)
    require_finite(module, value, remedy="deploy in a wider dtype")
    frozen = not any(parameter.requires_grad for parameter in like.parameters())
    return module.train(like.training).requires_grad_(not frozen)


def require_finite(module: nn.Module, value: object, *, remedy: str) -> None:
    """Check the weights that a value was folded to.

    Raises:
        FoldError: One is NaN or infinite.
    """
    unsound = [p for p in module.parameters() if not p.is_meta and not _is_finite(p.detach())]
    if unsound:
        raise FoldError(
            f"{value!r} folds to values that are not finite in {unsound[0].dtype}; "
            f"look for NaN or infinite weights and BatchNorm statistics, or {remedy}"
        )


def _is_finite(tensor: Tensor) -> bool:
    return all(extreme.isfinite() for extreme in tensor.aminmax())


def require_collapsible(block: RepBlock) -> None:
    """Try the switch on the meta device, so that what cannot be folded raises before it is trained.

    Raises:
        FoldError: The block would not fold.
    """
    copied(block, on_meta).eval().deploy_children()  # pyright: ignore[reportCallIssue]


def switch_to_deploy(model: nn.Module) -> None:
    """Collapse every block of a model in place, so that it computes what it did: ``after(x) == before(x)``.

    All blocks are folded before the first is changed; blocks in deploy form stay as they are.

    Raises:
        ConfigurationError: The model is in training mode, where BatchNorm follows the batch.
        FoldError: A block does not fold; the model is left as it was.
    """
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ConfigurationError(
            f"{type(model).__name__}{training and f' (at {training!r})'} is in training mode; collapsed weights equal "
            "the eval-mode model only: call eval() first, or take a copy by repblocks.deployed(model)"
        )
    for _, block, children in list(_switches(model)):
        _install(block, children)


def deployed(model: nn.Module) -> nn.Module:
    """A deploy-form copy in eval mode: ``deployed(model)(x) == model.eval()(x)``; the model is not touched.

    Raises:
        FoldError: A block does not fold.
    """
    switches = list(_switches(model))
    # A child that the copy drops is not copied, unless it is used elsewhere too.
    uses = Counter(id(child) for module in model.modules() for child in module.children())
    dropped = (dict(block.named_children()).get(name) for _, block, children in switches for name in children)
    memo: dict[int, object] = {
        id(child): nn.Module() for child in dropped if child is not None and uses[id(child)] == 1
    }
    duplicate = copy.deepcopy(model, memo)
    for name, _, children in switches:
        _install(duplicate.get_submodule(name), children)
    return duplicate.eval()


def form_of(model: nn.Module) -> Form:
    """Whether any block inside is still in train form: "train", else "deploy"."""
    forms = {module.form for module in model.modules() if isinstance(module, RepBlock)}
    return "train" if "train" in forms else "deploy"


def _switches(module: nn.Module, name: str = "") -> Iterator[tuple[str, RepBlock, Children]]:
    """Every block in train form with its deploy children, outermost first, skipping what those replace."""
    children: Children = {}
    if isinstance(module, RepBlock) and module.form == "train":
        children = _named_errors(module, name)
        yield name, module, children
    for child_name, child in module.named_children():
        if child_name not in children:
            yield from _switches(child, f"{name}.{child_name}".lstrip("."))


def _named_errors(block: RepBlock, name: str) -> Children:
    try:
        return block.deploy_children()
    except FoldError as error:
        raise FoldError(f"{name or type(block).__name__} does not collapse: {error}") from error


def _install(block: nn.Module, children: Children) -> None:
    assert isinstance(block, RepBlock)
    if block.form == "deploy":  # one block in two places
        return
    for name, child in children.items():
        if child is None:
            delattr(block, name)
        else:
            setattr(block, name, child)
    block.form = "deploy"
