"""A network by its name: this package's, torchvision's, timm's, or a user's function."""

import copy
import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .. import models

EXPECTED = "one of list_models(), torchvision:NAME, timm:NAME, or MODULE:FUNCTION that returns a torch.nn.Module"


class LoadError(ValueError):
    """A name stands for no network. The message says why."""


def builder(name: str) -> Callable[[], nn.Module]:
    """What makes the network `name`, untrained: "resnet50", "torchvision:resnet50", "timm:resnet50", "my.module:make".

    A module is also found in the folder at hand. A user's network is copied, so that what becomes of it is not seen in one that exists.
    Raises LoadError where there is none; what is returned raises it where a function returns something else.
    """
    if ":" not in name:
        if name not in models.list_models():
            near = difflib.get_close_matches(name, models.list_models(), 1)
            raise LoadError(f"expected {EXPECTED}; got {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return lambda: models.get_model(name)
    module, _, function = name.partition(":")
    if module == "timm":
        return _timms(function)
    if module == "torchvision":
        module = "torchvision.models"
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    found = getattr(_imported(module), function, None)
    if not callable(found):
        raise LoadError(f"expected {EXPECTED}; {module} has no function {function!r}")

    def make() -> nn.Module:
        model = found()
        if not isinstance(model, nn.Module):
            raise LoadError(f"expected {EXPECTED}; {name} returned {type(model).__name__}")
        return copy.deepcopy(model)

    return make


def _timms(name: str) -> Callable[[], nn.Module]:
    timm = _imported("timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise LoadError(f"expected {EXPECTED}; timm has no model {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return lambda: timm.create_model(name)


def _imported(module: str):
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision's library raises RuntimeError beside another PyTorch
        raise LoadError(f"expected {EXPECTED}; {module} does not import: {error}") from error
