"""The backends, and the choice of one. No other module chooses.

`auto` is the default. On a GPU it takes `tuned`, else `passes`; on a CPU `passes_cpu`. Where these can't run, and for float64, it takes
PyTorch's own modules ("off"). `passes` is the native library's kernels for the device where the library loads, else the Triton kernels.
`tuned` is `passes` with each convolution that was measured to be faster as a Triton kernel or as cuDNN's graph. Any other name forces that
backend; where it can't run, an error says why.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .. import environment
from ..reference import Reference
from ..tuning.table import table_of
from .convolutions import FusedConvolutions
from .cudnn import Cudnn
from .passes_cpu import PassesCpu
from .passes_cuda import PassesCuda
from .passes_triton import PassesTriton
from .triton import Triton
from .tuned import TunedCuda, TunedTriton

#: The backends by name.
BACKENDS: dict[str, Reference] = {
    b.name: b for b in (Reference(), PassesCuda(), PassesCpu(), PassesTriton(), Triton(), Cudnn(), TunedCuda(), TunedTriton())
}
#: What the choices "passes" and "tuned" stand for: the first of these that can run.
PASSES = (PassesCuda.name, PassesCpu.name, PassesTriton.name)
TUNED = (TunedCuda.name, TunedTriton.name)
FAMILIES = {"passes": PASSES, "tuned": TUNED}


def automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What the choice "auto" stands for there: the first of these that can run, else "off"."""
    if dtype == torch.float64:
        return ()
    return (PassesCpu.name,) if device.type == "cpu" else (*TUNED, *PASSES)


def choices() -> tuple[str, ...]:
    """The names that may be asked for: every backend, and "auto", "off", "passes" and "tuned"."""
    return ("auto", "off", "passes", "tuned", *BACKENDS)


class _Forced(threading.local):
    """The choice of the thread that asks. Not a ContextVar, which the compilers of PyTorch up to 2.13 can't trace; this they guard."""

    name: str | None = None


_forced = _Forced()
#: Where the threads of autograd find the choice of the thread that called backward: PyTorch hands them what is under such keys.
_KEY = "fused_resnet.backend"


def _inherited() -> str | None:
    """The choice in force where backward was called, asked from within it: a checkpoint's second forward runs there."""
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls(_KEY):
        return None
    name: str | None = torch._C._get_obj_in_tls(_KEY)
    return name


def _checked(name: str, origin: str) -> str:
    if name not in choices():
        raise ValueError(f"{origin}: unknown backend {name!r}; expected one of {', '.join(choices())}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block: one of `choices()`; it goes before `FUSED_RESNET_BACKEND`.

    The choice is made when an operator's forward runs, and its backward keeps it, wherever that runs. It holds for the thread that makes
    it, and for autograd's threads while a backward runs that was called from there; any other thread makes its own, or takes that of the
    variable. Raises ValueError for an unknown name; a backend that can't run where the tensors are raises RuntimeError at the
    first operator.
    """
    before = _forced.name
    _force(_checked(name, "backend(name)"))
    try:
        yield
    finally:
        _force(before)


def _force(name: str | None) -> None:
    _forced.name = name
    torch._C._stash_obj_in_tls(_KEY, name)


@cache  # asked at every call of an operator; what the answer depends on stays as it is while a process runs
def _remembered(name: str, device: torch.device, dtype: torch.dtype, by_auto: bool) -> str | None:
    implementation = BACKENDS[name]
    return implementation.why_not(device, dtype) or (implementation.why_not_by_auto(device, dtype) if by_auto else None)


def _why_not(name: str, device: torch.device, dtype: torch.dtype, by_auto: bool = False) -> str | None:
    """Why the backend can't take such tensors, or why "auto" passes it over; None where it takes them."""
    return _remembered(name, device, dtype, by_auto)


# A compiler asks, too, and does not look inside. torch.compiler.assume_constant_result does this, and imports the compiler.
_why_not.__dict__["_dynamo_marked_constant"] = True


def _choice() -> str:
    """One of `choices()`."""
    choice = _forced.name
    if choice is None and not torch.compiler.is_compiling():
        choice = _inherited()
    return choice or _checked(environment.backend_name(), "FUSED_RESNET_BACKEND")


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of `dtype` on `device`: a key of `BACKENDS`, or "off" for PyTorch's own modules.

    Raises RuntimeError where a forced backend can't run there, and ValueError where `FUSED_RESNET_BACKEND` names none.
    """
    choice = _choice()
    if choice == "off":
        return choice
    candidates = automatic(device, dtype) if choice == "auto" else FAMILIES.get(choice, (choice,))
    for name in candidates:
        if _why_not(name, device, dtype, choice == "auto") is None:
            return name
    if choice == "auto":
        return "off"
    reasons = {name: _why_not(name, device, dtype) for name in candidates}
    why = next(iter(reasons.values())) if len(reasons) == 1 else "; ".join(f"{name}: {why}" for name, why in reasons.items())
    raise RuntimeError(f"backend {choice!r} was asked for and can't run here: {why}")


def why_off(device: torch.device, dtype: torch.dtype) -> str:
    """Why `resolve` answers "off" there, in words: the choice that was made, or why none of the backends that "auto" asks runs."""
    if (choice := _choice()) != "auto":
        return f"the backend {choice!r} was asked for"
    candidates = automatic(device, dtype)
    if not candidates:
        return f"{str(dtype).removeprefix('torch.')} is left to them; use float32 or less, or force a backend by fused_resnet.backend(...)"
    return "; ".join(f"{name}: {_why_not(name, device, dtype, True)}" for name in candidates)


def forget_choices() -> None:
    """Read the tables of measured choices again, since a file has changed."""
    table_of.cache_clear()
    for implementation in BACKENDS.values():
        if isinstance(implementation, FusedConvolutions):
            implementation.forget()
