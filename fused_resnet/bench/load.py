"""A network by its name: this package's, torchvision's, timm's, or a user's function."""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch import nn

from .. import models
from ..words import meant

OTHERS = ("torchvision:NAME", "timm:NAME", "MODULE:FUNCTION")
EXPECTED = "one of list_models(), torchvision:NAME, timm:NAME, or MODULE:FUNCTION that returns a torch.nn.Module"

NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


class LoadError(ValueError):
    """A name names no network. The message says why."""


def builder(name: str, num_classes: int | None = None, in_channels: int | None = None) -> Callable[[], nn.Module]:
    """What makes the network `name`, untrained: "resnet50", "torchvision:resnet50", "timm:resnet50d", "my.module:make" (also from the
    folder at hand).

    A user's function is told of the classes and channels that are given where it has parameters of these names (timm's `in_chans`, too).
    Raises LoadError where there is no such network; what is returned, where it can't be made.
    """
    source, colon, function = name.partition(":")
    options = {"num_classes": num_classes, "in_channels": in_channels, "in_chans": in_channels}
    options = {option: value for option, value in options.items() if value is not None}
    if not colon:
        if name not in models.list_models():
            raise LoadError(f"expected {EXPECTED}; got {name!r}{meant(name, models.list_models())}")
        taken = _taken(getattr(models, name), options)
        # All of ours take it; those that are torchvision's too hand it on by **kwargs.
        return partial(models.get_model, name, **taken | ({} if num_classes is None else {"num_classes": num_classes}))
    if source == "torchvision":
        found, library = _function("torchvision.models", function, lambda library: library.list_models())
        # A builder of torchvision's takes what it hands on by **kwargs.
        options = {} if num_classes is None else {"num_classes": num_classes}
        return partial(_made, found, name, options)
    if source == "timm":
        found, library = _function("timm", "create_model", lambda _: ())
        if not library.is_model(function):
            raise LoadError(f"expected {EXPECTED}; timm has no {function!r}{meant(function, library.list_models())}")
        options = {option: value for option, value in options.items() if option != "in_channels"}
        return partial(_made, partial(found, function), name, options)
    found, _ = _function(source, function, dir)
    return partial(_made, found, name, _taken(found, options))


def _function(module: str, name: str, known: Callable[[Any], Sequence[str]]) -> tuple[Callable, Any]:
    """The function of that name in a module, which is imported, and the module."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        library = importlib.import_module(module)
    # RuntimeError: torchvision's library beside another PyTorch. ValueError: a name that can't be a module's.
    except (ImportError, RuntimeError, ValueError) as error:
        raise LoadError(f"expected {EXPECTED}; {module or 'no module'} does not import: {error}") from error
    if not callable(found := getattr(library, name, None)):
        raise LoadError(f"expected {EXPECTED}; {module} has no function {name!r}{meant(name, known(library))}")
    return found, library


def _taken(function: Callable, options: dict[str, int]) -> dict[str, int]:
    """The `options` that a function has parameters for."""
    try:
        named = {p.name for p in signature(function).parameters.values() if p.kind in NAMED}
    except (TypeError, ValueError):  # of what is written in C there may be none
        named = set()
    return {option: value for option, value in options.items() if option in named}


def _made(function: Callable, name: str, options: dict[str, int]) -> nn.Module:
    model = function(**options)
    if not isinstance(model, nn.Module):
        raise LoadError(f"expected {EXPECTED}; {name} returned {type(model).__name__}")
    return model
