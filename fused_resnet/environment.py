"""The environment variables of the package, parsed here and nowhere else. README has them in one table, with setup.py's.

| variable | meaning |
|---|---|
| `FUSED_RESNET_BACKEND` | the backend to use: auto (the default), off, eager, passes, triton, cudnn, tuned, … (`backends.choices()`) |
| `FUSED_RESNET_CACHE` | folder for downloads and tuned tables; default `$XDG_CACHE_HOME/fused_resnet`, else `~/.cache/fused_resnet` |
| `FUSED_RESNET_CPU_ISA` | the instruction set of the kernels for CPUs: portable, avx2, avx512, avx512_bf16, amx; default: the best |
| `FUSED_RESNET_DATA` | folder that is searched first for data sets |
| `LOCAL_RANK` | set by torchrun: which of its machine's processes this is |

Each is read when it is asked for, so a change in `os.environ` counts at once.
"""

import os
from pathlib import Path

#: The variables of this package; `FUSED_RESNET_NATIVE` is setup.py's.
VARIABLES = ("FUSED_RESNET_BACKEND", "FUSED_RESNET_CACHE", "FUSED_RESNET_CPU_ISA", "FUSED_RESNET_DATA", "FUSED_RESNET_NATIVE")


class VariableError(ValueError):
    """An environment variable has a value that can't be used. The message names it and says what was expected."""


def backend_name() -> str:
    """The backend that `FUSED_RESNET_BACKEND` names, "auto" where it is unset or empty. Not validated here."""
    return os.environ.get("FUSED_RESNET_BACKEND", "").strip() or "auto"


def cpu_instruction_set() -> str | None:
    """The instruction set that `FUSED_RESNET_CPU_ISA` names, None where it is unset or empty. Not validated here."""
    return os.environ.get("FUSED_RESNET_CPU_ISA", "").strip() or None


def cache_dir() -> Path:
    """The cache folder. It is not created here. Raises `VariableError` where `FUSED_RESNET_CACHE` is something else than a folder."""
    if named := _path("FUSED_RESNET_CACHE"):
        if named.exists() and not named.is_dir():
            raise VariableError(f"FUSED_RESNET_CACHE: expected a folder, or the name of a new one; got {named}")
        return named
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_resnet"


def local_rank() -> int:
    """This process's number on its machine, 0 where torchrun did not start it. Raises `VariableError` for no number."""
    value = os.environ.get("LOCAL_RANK", "0")
    if not value.isdecimal():
        raise VariableError(f"LOCAL_RANK: expected a number, as torchrun sets it; got {value!r}")
    return int(value)


def data_dir() -> Path | None:
    """The folder of data sets that the user named, or None. Raises `VariableError` where there is no such folder."""
    named = _path("FUSED_RESNET_DATA")
    if named and not named.is_dir():
        raise VariableError(f"FUSED_RESNET_DATA: expected a folder that exists; got {named}")
    return named


def check() -> None:
    """Raises `VariableError` where one of the folders can't be used, whether anything asks for it or not."""
    cache_dir()
    data_dir()


def _path(variable: str) -> Path | None:
    """The path that a variable names; None where it is unset or empty."""
    if not (named := os.environ.get(variable)):
        return None
    try:
        path = Path(named).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long; ~somebody who does not exist
        raise VariableError(f"{variable}: expected a folder; got {named!r}: {error}") from None
    return path
