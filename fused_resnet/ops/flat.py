"""Values as a schema's flat arguments and back: what passes PyTorch's dispatcher is tensors and numbers, one after the other.

All of it follows from the fields of a NamedTuple and their annotations, so that no position of an argument is written down.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_type_hints

from torch import Tensor

_WORDS = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", int: "int", str: "str", Sequence[int]: "int[]"}


@cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
    return tuple(get_type_hints(cls).items())


def schema(cls: type, suffix: str = "") -> list[str]:
    """A schema's words for a value of `cls`, each name with a suffix: "Tensor weight2", …"""
    words = []
    for name, kind in _fields(cls):
        words += [f"{_WORDS[kind]} {name}{suffix}"] if kind in _WORDS else schema(kind, suffix)
    return words


def flatten(value: tuple) -> list:
    """The arguments for `schema(type(value))`."""
    flat = []
    for part in value:
        flat += flatten(part) if isinstance(part, tuple) and hasattr(part, "_fields") else [part]
    return flat


def unflatten(cls: type, arguments: Iterator[Any]) -> Any:
    """The value of `cls` that the next of these arguments stand for."""
    return cls(*[next(arguments) if kind in _WORDS else unflatten(kind, arguments) for _, kind in _fields(cls)])
