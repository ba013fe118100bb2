"""A copy of a model, in which modules are put in the place of others."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from repblocks.graph.copies import duplicate

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


class Dropped(nn.Module):
    """Stands for a module that was not copied."""


class Surgery:
    """A copy of a model that is being edited.

    Args:
        model: Is copied, without the modules at ``dropped``.
        dropped: Paths of modules that are going to be replaced, or not needed.
    """

    def __init__(self, model: nn.Module, dropped: Iterable[str]) -> None:
        empty: dict[int, object] = {id(model.get_submodule(path)): Dropped() for path in dropped if path}
        self.model = duplicate(model, empty).eval()
        self.kept = list[nn.Module]()
        self.places = defaultdict[int, list[tuple[nn.Module, str]]](list)
        for parent in self.model.modules():
            for name, child in parent._modules.items():  # pyright: ignore[reportPrivateUsage]  # named_children hides repetitions
                self.places[id(child)].append((parent, name))

    def replace(self, path: str, new: nn.Module) -> None:
        """Put a module in the place of another, under every name that it has."""
        if not path:
            self.model = new
            return
        old = self.model.get_submodule(path)
        self.places[id(new)] = self.places[id(old)]
        for parent, name in self.places[id(old)]:
            parent._modules[name] = new  # pyright: ignore[reportPrivateUsage]
        self.kept.append(old)  # so that no other object gets its id


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Give the plain attributes and the hooks of a module to the one in its place, which other code may read."""
    plain = {name: value for name, value in vars(old).items() if not name.startswith("_") and name not in vars(new)}
    for name, value in plain.items():
        setattr(new, name, value)
    inherit_hooks(new, old)


def inherit_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let the hooks of a module be called around the one in its place."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; the model at none."""
    return model.get_submodule(path) if path else model
