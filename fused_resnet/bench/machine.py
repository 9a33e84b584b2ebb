"""The machine in a file of figures: `collect_meta`. And its measured ceilings: `measure_ceilings`."""

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from .. import native
from .._version import __version__
from .schema import DATE_FORMAT, Meta
from .timing import Times, measure

#: nvidia-smi's name of each entry of `Meta.clocks`.
CLOCKS = {"sm": "clocks.sm", "memory": "clocks.mem", "sm_max": "clocks.max.sm", "memory_max": "clocks.max.mem"}


LIMIT_S = 5.0  #: for measuring one copy or product


def collect_meta(device: torch.device, commit: str, load: float | None = None) -> Meta:
    """The machine as it is now, and the commit of this repository. Call it right after measuring, while the clocks are up.

    `load`: the load average before measuring, of a CPU.
    """
    on_gpu = device.type == "cuda"
    of_cpu = {} if on_gpu else {"cpu": _cpu(), "isa": _isa(), "threads": torch.get_num_threads(), "onednn": _onednn(), "load": load}
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
        **of_cpu,
    )


def load_average() -> float | None:
    """The load average of the last minute; None where the system does not report it."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _cpu() -> str | None:
    """The model as the system names it, and by numbers, since a virtual machine may hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    numbers = [f"{name} {told[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in told]
    name = told.get("model name") or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _isa() -> str:
    """What PyTorch's kernels use, whether there are matrix units, and what this package's kernels use."""
    found = [torch.backends.cpu.get_cpu_capability()]
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        found.append("AMX")
    if native.CPU.why_not() is None:
        found.append(f"kernels {native.cpu_instruction_set()}")
    return ", ".join(found)


def _onednn() -> str | None:
    found = re.search(r"MKL-DNN v([0-9.]+)", torch.__config__.show())
    return found and found[1]


def current_commit() -> str:
    """The package's commit, with "-dirty" where tracked files were changed. Without a commit its version, as "v0.1.0".

    The commit is that of the checkout whose own files these are, and of no other that an installed package happens to lie in.
    """
    root = Path(__file__).resolve().parents[2]
    own = _git(root, "rev-parse", "--show-toplevel") == str(root) and _git(root, "ls-files", "fused_resnet/_version.py")
    commit = _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if own else ""
    return commit or f"v{__version__}"


def _git(root: Path, *command: str) -> str:
    """The output of git; empty where git fails or is missing."""
    try:
        return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


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
    """The device's measured ceilings: a large copy, a large matrix product.

    The rates are those of the fastest tenth of many calls: what else a machine does only makes a call slower, and a ceiling that a layer
    passes is none.
    """

    copy: Times
    copy_bytes: int  #: read and written by one such call
    matmul: Times
    matmul_flops: int

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth of the copy."""
        return self.copy_bytes / (self.copy.p10_ms * 1e-3)

    @property
    def flops_per_s(self) -> float:
        """Rate of the matrix product."""
        return self.matmul_flops / (self.matmul.p10_ms * 1e-3)

    def best(self, other: "Ceilings") -> "Ceilings":
        """The faster of two measurements each, such as the one before a suite and the one behind it."""
        faster, quicker = (max((self, other), key=rate) for rate in (lambda c: c.bytes_per_s, lambda c: c.flops_per_s))
        return Ceilings(faster.copy, faster.copy_bytes, quicker.matmul, quicker.matmul_flops)


#: (megabytes of a copy, extent of a square matrix). Which is fastest depends on caches, and on how many cores are free.
SIZES = {"cuda": ((1024,), (8192, 4096)), "cpu": ((64, 16), (512, 1024))}
#: Megabytes of a copy that a CPU's caches hold.
CACHED = (4, 1, 0.5, 0.25)
REPEATED = 16  #: megabytes that such copies copy in all, one after the other
#: 3x3 convolutions on a CPU, whose products oneDNN may make faster than those of matrices: images, channels, extent.
CONVOLUTIONS = ((16, 128, 28), (16, 256, 14))


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 50, cached: bool = False) -> Ceilings:
    """Copy a tensor that no cache holds, and multiply two square matrices of `dtype`, in several sizes; of each the fastest.

    On a CPU also what a convolution multiplies; and with `cached` copies that stay in its caches, where a layer's tensors may be found.
    float32 is multiplied as convolutions multiply it: in TF32 where cuDNN may.
    """
    megabytes, extents = SIZES["cuda" if device.type == "cuda" else "cpu"]
    if cached and device.type == "cpu":
        megabytes = (*megabytes, *CACHED)
    calls, work = {}, {}
    for size in megabytes:
        source = torch.randn(int(size * 2**20) // 4, device=device)
        target = torch.empty_like(source)
        times = int(REPEATED / size) if size in CACHED else 1  # what ran before has filled the caches
        calls[f"copy of {size} MiB"] = lambda source=source, target=target, times=times: [target.copy_(source) for _ in range(times)]
        work[f"copy of {size} MiB"] = 2 * source.nbytes * times
    for extent in extents:
        a, b = (torch.randn(extent, extent, device=device).to(dtype) for _ in range(2))
        calls[f"product of {extent}"] = lambda a=a, b=b: a @ b
        work[f"product of {extent}"] = 2 * extent**3
    for images, channels, extent in CONVOLUTIONS if device.type == "cpu" else ():
        x, weight = (
            torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((images, channels, extent, extent), (channels, channels, 3, 3))
        )
        calls[f"product of a convolution of {channels}"] = lambda x=x, weight=weight: torch.conv2d(x, weight, padding=1)
        work[f"product of a convolution of {channels}"] = 2 * images * extent**2 * channels**2 * 9
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        times = measure(calls, device, repeats, limit_s=LIMIT_S)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    best = {}
    for kind in ("copy", "product"):
        timed = {name: value for name, value in times.items() if name.startswith(kind) and isinstance(value, Times)}
        if not timed:
            raise RuntimeError(f"the ceiling of a {kind} can't be measured: {next(v for n, v in times.items() if n.startswith(kind))}")
        best[kind] = max(timed, key=lambda name: work[name] / timed[name].p10_ms)
    copy, product = best["copy"], best["product"]
    return Ceilings(times[copy], work[copy], times[product], work[product])
