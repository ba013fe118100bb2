"""The way into timm's registry, and out of it: register, create and list models.

timm overwrites on a name clash and owns names such as ``repvgg_a0``, so the zoo's names start with ``rb_``.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from repblocks.blocks.base import Form, form_of, switch_to_deploy
from repblocks.errors import ConfigurationError
from repblocks.models.published import build_pretrained, published_weights
from repblocks.models.staged import StagedNet
from repblocks.names import known_name

Model = TypeVar("Model", bound=nn.Module)

IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "classifier": "head.fc",
}
CIFAR: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}

#: The class of every name of the zoo.
FAMILIES: dict[str, type[StagedNet]] = {}

# What says where weights and preprocessing come from, not what the network is.
_NOT_ARCHITECTURE = frozenset(
    {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path", "scriptable", "exportable", "no_jit"}
)


def create_model(name: str, *, form: Form = "train", pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build any model of timm's registry, ours (``rb_*``) or timm's.

    The model carries ``model_name`` and ``model_args``: the name and the JSON-able arguments that build it again.

    Args:
        name: A registered name; ``list_models()`` gives the zoo's.
        form: ``deploy`` gives the collapsed architecture, for models that are made of ``RepBlock``s.
        pretrained: Load the weights that timm publishes under that name, or under ours without its prefix.
        kwargs: The model's arguments, such as ``num_classes`` and ``in_chans``, or timm's, such as ``features_only``.

    Raises:
        ConfigurationError: An unknown name, tag, form or block, a deploy form of a model that has none, or an argument
            that cannot be written to a checkpoint.
        CheckpointError: Published weights that could not be fetched or do not fit.
    """
    if ":" not in name and not timm.is_model(name):
        known_name("model", name, timm.list_models())
    if ":" not in name and not kwargs.get("pretrained_cfg"):
        _require_known_tag(name)
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ConfigurationError(f"{name} refuses the arguments {kwargs}: {error}") from error
    return _in_form(_remember(model, name, kwargs), form)


def _require_known_tag(name: str) -> None:
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none is published"
        raise ConfigurationError(
            f"{name}: {architecture} has no weights tagged {tag!r} ({known}); leave the tag out for an untrained model"
        ) from error


def list_models(pattern: str = "rb_*", **filters: Any) -> list[str]:
    """Registered names that match ``pattern``; by default the zoo's, with ``"*"`` timm's as well.

    Args:
        pattern: Shell-style wildcard.
        filters: Further arguments of ``timm.list_models``.
    """
    return timm.list_models(pattern, **filters)


def configs(names: Iterable[str], common: Mapping[str, Any], **special: Mapping[str, Any]) -> dict[str, DefaultCfg]:
    """The ``default_cfgs`` of a family: ImageNet's, with what is ``common`` to it and ``special`` to one name.

    A name that timm has too, but for the prefix, gets one entry for each of the weights that timm publishes.
    """
    entries: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for name in names:
        for tag, published in published_weights(name).items() or [("", {})]:
            key = f"{name}.{tag}" if tag else name
            entries[key] = {**IMAGENET, **published, **common, **special.get(name, {})}
    return generate_default_cfgs(entries)


def register(name: str, family: type[StagedNet], architecture: Mapping[str, Any]) -> None:
    """Put ``family(**architecture)`` into timm's registry, with the ``default_cfgs[name]`` of the family's module.

    The entry point takes what the family's constructor takes, ``form`` and timm's own arguments.
    """

    def entrypoint(*, pretrained: bool = False, form: Form = "train", **kwargs: Any) -> nn.Module:
        settings = {**architecture, **kwargs}
        features = 1 + sum(stride > 1 for stride in settings["strides"])
        feature_cfg = {"flatten_sequential": True, "out_indices": tuple(range(features))}
        build = partial(build_model_with_cfg, family, name, feature_cfg=feature_cfg, **settings)
        model = build_pretrained(build, name, kwargs) if pretrained else build(pretrained=False)
        return _in_form(_remember(model, name, kwargs), form)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = family.__module__
    FAMILIES[name] = family
    # register_model adds the name to the module's __all__.
    setattr(sys.modules[family.__module__], name, register_model(entrypoint))


def _remember(model: Model, name: str, kwargs: Mapping[str, Any]) -> Model:
    """Note on the model what builds it again."""
    config: dict[str, Any] = vars(model)["pretrained_cfg"]
    args = {"in_chans": config["input_size"][0]}
    if "num_classes" in config:  # timm removes it from feature backbones
        args["num_classes"] = config["num_classes"]
    args |= {key: value for key, value in kwargs.items() if value is not None and key not in _NOT_ARCHITECTURE}
    try:
        json.dumps(args)
    except TypeError as error:
        raise ConfigurationError(
            f"{name} cannot be built again from {args}: {error}; give arguments as numbers, strings, lists or "
            f"dicts (timm takes activation and norm layers by name)"
        ) from error
    vars(model).update(model_name=name, model_args=args)
    if args["in_chans"] != config["input_size"][0]:
        carry(model, _for_channels(args["in_chans"], config))
    return model


def carry(model: Model, facts: Mapping[str, Any]) -> Model:
    """Put facts (timm's names: ``input_size``, ``mean``, ``label_names``, ...) where timm and export look for them."""
    config = {**(vars(model).get("pretrained_cfg") or {}), **facts}
    vars(model).update(pretrained_cfg=config, default_cfg=config)
    return model


def _for_channels(in_chans: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing of images with other channels than the default ones: each gets the average statistics."""
    average = {key: (sum(config[key]) / len(config[key]),) * in_chans for key in ("mean", "std")}
    return {"input_size": (in_chans, *config["input_size"][1:]), **average}


def _in_form(model: Model, form: Form) -> Model:
    """The freshly built model, collapsed if ``form`` is ``deploy``; in training mode, as timm gives it."""
    if form == "train":
        return model
    if form != "deploy":
        raise ConfigurationError(f"unknown form {form!r}; use 'train' or 'deploy'")
    if form_of(model) == "deploy":
        raise ConfigurationError(
            f"{vars(model)['model_name']} has no blocks that collapse, so it has no deploy form; "
            "timm's own multi-branch models are fused by timm.utils.reparameterize_model"
        )
    switch_to_deploy(model.eval())
    return model.train()
