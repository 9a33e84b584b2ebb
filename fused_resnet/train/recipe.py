"""Recipes: settings of a run in a TOML file, this package's or yours. A key is a field of `TrainConfig`."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..words import meant
from .config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"
SUFFIX = ".toml"


class RecipeError(ValueError):
    """There is no such recipe, or it can't be read. The message names it and says what was expected."""


def recipes() -> tuple[str, ...]:
    """The names of this package's recipes."""
    return tuple(sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}")))


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, by its name or as the path of a TOML file: arguments of `TrainConfig`, which says whether they can be.

    Raises `RecipeError` for an unknown name or key, which it says the nearest known one of, and for a file that can't be read.
    """
    is_file = name.endswith(SUFFIX) or "/" in name
    if not is_file and name not in recipes():
        raise RecipeError(f"expected one of {', '.join(recipes())}, or a file NAME{SUFFIX}; got {name!r}{meant(name, recipes())}")
    try:
        found = tomllib.loads((Path(name) if is_file else FOLDER / f"{name}{SUFFIX}").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not TOML
        raise RecipeError(f"{name}: expected a file of TOML ({error})") from error
    known = [field.name for field in fields(TrainConfig)]
    for key in found:
        if key not in known:
            raise RecipeError(f"{name}: unknown key {key!r}{meant(key, known) or '; expected one of ' + ', '.join(known)}")
    return found
