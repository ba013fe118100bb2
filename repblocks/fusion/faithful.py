"""Whether a module still computes what its base class says."""

from torch import nn

_DEFINING_METHODS = ("forward", "_conv_forward", "__call__")


def is_faithful(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` runs exactly ``cls.forward``: not overridden in a subclass or on the instance, not hooked."""
    return not overridden_methods(module, cls) and not has_forward_hooks(module)


def overridden_methods(module: nn.Module, cls: type[nn.Module]) -> list[str]:
    """Names of the methods that define ``cls``'s function and that ``module`` replaces."""
    return [
        name
        for name in _DEFINING_METHODS
        if getattr(type(module), name, None) is not getattr(cls, name, None) or name in vars(module)
    ]


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks may change what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]  # no public reader
