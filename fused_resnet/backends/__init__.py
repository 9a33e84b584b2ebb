"""The implementations of the operators, and the one place where one of them is chosen.

`auto`, the default, takes PyTorch's own modules ("off") on a CPU and for float64, and `passes` on a GPU that can run it,
else "off". Any other name forces that backend: where it can't run, an error says why.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import environment
from ..reference import Reference
from .passes import Passes

#: The backends by name. "off" and "auto" are choices, not backends.
BACKENDS: dict[str, Reference] = {b.name: b for b in (Reference(), Passes())}
CHOICES = ("auto", "off", *BACKENDS)

_forced: str | None = None


def _checked(name: str, origin: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{origin}: unknown backend {name!r}; expected one of {', '.join(CHOICES)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block: one of `CHOICES`; it goes before `FUSED_RESNET_BACKEND`.

    The choice is made when an operator's forward runs, and its backward keeps it, wherever that runs. It holds for the whole
    process, since autograd runs in threads of its own. Raises ValueError for an unknown name; a backend that can't run where
    the tensors are raises RuntimeError at the first operator.
    """
    global _forced
    before, _forced = _forced, _checked(name, "backend(name)")
    try:
        yield
    finally:
        _forced = before


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of `dtype` on `device`: a key of `BACKENDS`, or "off" for PyTorch's own modules.

    Raises RuntimeError where a forced backend can't run there, and ValueError where `FUSED_RESNET_BACKEND` names none.
    """
    choice = _forced or _checked(environment.backend_name(), "FUSED_RESNET_BACKEND")
    if choice == "auto":
        if device.type == "cpu" or dtype == torch.float64 or BACKENDS["passes"].declines(device, dtype):
            return "off"
        return "passes"
    if choice != "off" and (reason := BACKENDS[choice].declines(device, dtype)):
        raise RuntimeError(f"backend {choice!r} was asked for and can't run here: {reason}")
    return choice
