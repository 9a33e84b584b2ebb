"""The environment variables of the package, parsed here and nowhere else.

| variable | meaning |
|---|---|
| `FUSED_RESNET_BACKEND` | the backend to use: auto (the default), off, eager, passes, triton, cudnn, tuned, … (`backends.choices()`) |
| `FUSED_RESNET_CACHE` | folder for downloads and tuned tables; default `$XDG_CACHE_HOME/fused_resnet`, else `~/.cache/fused_resnet` |
| `FUSED_RESNET_CPU_ISA` | the instruction set of the kernels for CPUs: portable, avx2, avx512; default: the best that the machine has |
| `FUSED_RESNET_DATA` | folder that is searched first for data sets |
| `LOCAL_RANK` | set by torchrun: which of its machine's processes this is |

Each is read when it is asked for, so a change in `os.environ` counts at once.
"""

import os
from pathlib import Path


def backend_name() -> str:
    """The backend that `FUSED_RESNET_BACKEND` names, "auto" where it is unset or empty. Not validated here."""
    return os.environ.get("FUSED_RESNET_BACKEND", "").strip() or "auto"


def cpu_instruction_set() -> str | None:
    """The instruction set that `FUSED_RESNET_CPU_ISA` names, None where it is unset or empty. Not validated here."""
    return os.environ.get("FUSED_RESNET_CPU_ISA", "").strip() or None


def cache_dir() -> Path:
    """The cache folder. It is not created here."""
    if named := os.environ.get("FUSED_RESNET_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_resnet"


def local_rank() -> int:
    """This process's number on its machine, 0 where torchrun did not start it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def data_dir() -> Path | None:
    """The folder of data sets that the user named, or None."""
    named = os.environ.get("FUSED_RESNET_DATA")
    return Path(named).expanduser() if named else None
