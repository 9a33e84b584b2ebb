"""What a file of figures says of the machine: `collect_meta`. And its ceilings, measured: `measure_ceilings`."""

import importlib.metadata
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from .schema import DATE_FORMAT, Meta
from .timing import Times, measure

#: nvidia-smi's name of each entry of `Meta.clocks`.
CLOCKS = {"sm": "clocks.sm", "memory": "clocks.mem", "sm_max": "clocks.max.sm", "memory_max": "clocks.max.mem"}


def collect_meta(device: torch.device, commit: str) -> Meta:
    """The machine as it is now, and the commit of this repository. Call it right after measuring, while the clocks are up."""
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    driver, clocks = _nvidia_smi(str(properties.uuid)) if on_gpu else (None, None)
    cudnn = torch.backends.cudnn.version() if on_gpu else None
    return Meta(
        device=properties.name if on_gpu else "cpu",
        sm_count=properties.multi_processor_count if on_gpu else None,
        driver=driver,
        cuda=torch.version.cuda if on_gpu else None,
        cudnn=None if cudnn is None else f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
        torch=torch.__version__,
        triton=_version("triton"),
        commit=commit,
        date=datetime.now(timezone.utc).strftime(DATE_FORMAT),
        clocks=clocks,
    )


def current_commit() -> str:
    """The commit of the checkout that this file lies in, "-dirty" behind it where tracked files were changed.

    Raises RuntimeError where there is none.
    """
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise RuntimeError(f"commit: {root} is no git checkout with a commit; give the commit with --commit") from None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(uuid: str) -> tuple[str | None, dict[str, int] | None]:
    """(driver, clocks in MHz) of the GPU; None for what nvidia-smi does not tell."""
    query = ",".join(["driver_version", *CLOCKS.values()])
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None, None
    driver, *values = (value.strip() for value in output.split(","))
    return driver, {name: int(value) for name, value in zip(CLOCKS, values, strict=True) if value.isdigit()} or None


@dataclass(frozen=True)
class Ceilings:
    """What the device at hand reaches: a large copy, a large matrix product."""

    copy: Times
    copy_bytes: int  #: read and written by one copy
    matmul: Times
    matmul_flops: int

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth of the copy."""
        return self.copy_bytes / (self.copy.median_ms * 1e-3)

    @property
    def flops_per_s(self) -> float:
        """Rate of the matrix product."""
        return self.matmul_flops / (self.matmul.median_ms * 1e-3)


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 50) -> Ceilings:
    """Copy a tensor that no cache holds, and multiply two square matrices of `dtype`. On a CPU both are small."""
    megabytes, size = (1024, 8192) if device.type == "cuda" else (64, 512)
    source = torch.randn(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device, repeats)
    for name, value in times.items():
        if not isinstance(value, Times):
            raise RuntimeError(f"the ceiling of {name} can't be measured: {value}")
    return Ceilings(times["copy"], 2 * source.nbytes, times["matmul"], 2 * size**3)
