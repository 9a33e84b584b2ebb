"""A network by its name: this package's, torchvision's, or a user's function."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .. import models

EXPECTED = "one of list_models(), torchvision:NAME, or MODULE:FUNCTION that returns a torch.nn.Module"


class LoadError(ValueError):
    """A name stands for no network. The message says why."""


def builder(name: str) -> Callable[[], nn.Module]:
    """What makes the network `name`, untrained: "resnet50", "torchvision:resnet50", "my.module:make" (also from the folder at hand).

    Raises LoadError where there is none.
    """
    if ":" not in name:
        if name not in models.list_models():
            raise LoadError(f"expected {EXPECTED}; got {name!r}")
        return lambda: models.get_model(name)
    module, _, function = name.partition(":")
    if module == "torchvision":
        module = "torchvision.models"
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, RuntimeError) as error:  # torchvision's library raises RuntimeError beside another PyTorch
        raise LoadError(f"expected {EXPECTED}; {module} does not import: {error}") from error
    if not callable(found):
        raise LoadError(f"expected {EXPECTED}; {module} has no function {function!r}")

    def make() -> nn.Module:
        model = found()
        if not isinstance(model, nn.Module):
            raise LoadError(f"expected {EXPECTED}; {name} returned {type(model).__name__}")
        return model

    return make
