"""`fused-resnet info`: what a bug report needs."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from .. import __version__, backends, environment, native, versions

DESCRIPTION = """Prints versions, GPUs, whether the native libraries loaded, which backends can
run here, and which one a network takes."""
EXAMPLES = """example:
  fused-resnet info
  fused-resnet info --json > info.json
"""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("info", help="print what a bug report needs", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=info)


def info(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def collect() -> dict[str, Any]:
    """All facts, as JSON values. A version is null where the thing is not there."""
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    device = torch.device("cuda" if gpus else "cpu")
    return {
        "versions": {
            "fused_resnet": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "torchvision": _version("torchvision"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        },
        "untested": versions.untested_triton(),
        "gpus": gpus,
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "native_libraries": {name: _library(library) for name, library in (("GPU", native.CUDA), ("CPU", native.CPU))},
        "device": device.type,
        "backends": {
            name: {str(dtype).removeprefix("torch."): backend.why_not(device, dtype) for dtype in DTYPES}
            for name, backend in backends.BACKENDS.items()
        },
        "left_by_auto": {
            name: reason
            for name, backend in backends.BACKENDS.items()
            if not backend.why_not(device, torch.float32) and (reason := backend.why_not_by_auto(device, torch.float32))
        },
        "active": {str(dtype).removeprefix("torch."): _active(device, dtype) for dtype in DTYPES},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FUSED_RESNET_")},
        "cache": str(environment.cache_dir()),
    }


def text(found: dict[str, Any]) -> str:
    """The facts for people: one a line."""
    lines = [(name, value or "not there") for name, value in found["versions"].items()]
    if found["untested"]:
        lines.append(("untested", found["untested"]))
    for i, gpu in enumerate(found["gpus"]):
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append((f"GPU {i}", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['multiprocessors']} SMs, {memory}"))
    if not found["gpus"]:
        lines.append(("GPU", "none that PyTorch sees"))
    lines.append(("CPU", f"{found['cpu']['cores']} cores, {found['cpu']['threads']} threads"))
    for name, library in found["native_libraries"].items():
        loaded = f"loaded, {library['instruction_set']}" if library["instruction_set"] else "loaded"
        lines.append((f"native library, {name}", loaded if library["loaded"] else f"not loaded: {library['reason']}"))
    active: dict[str, list[str]] = {}
    for dtype, name in found["active"].items():
        active.setdefault(name, []).append(dtype)
    chosen = "; ".join(f"{name} for {', '.join(dtypes)}" for name, dtypes in active.items())
    lines.append(("active backend", f"{chosen} on {found['device']}"))
    lines.append(("backend off", "PyTorch's own modules; runs everywhere"))
    for name, reasons in found["backends"].items():
        able = [dtype for dtype, reason in reasons.items() if reason is None]
        parts = [f"runs on {found['device']} in {', '.join(able)}"] if able else []
        # Most reasons are the same for all dtypes, and told once.
        parts += [f"can't run here: {reason}" for reason in dict.fromkeys(filter(None, reasons.values()))]
        parts += [f"auto leaves it: {found['left_by_auto'][name]}"] if name in found["left_by_auto"] else []
        lines.append((f"backend {name}", "; ".join(parts)))
    for name, value in found["environment"].items():
        lines.append((name, value if name in environment.VARIABLES else f"{value} (unknown, ignored)"))
    lines.append(("cache folder", found["cache"]))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def _library(library: native.Library) -> dict[str, Any]:
    reason = library.why_not()
    used = native.cpu_instruction_set() if library is native.CPU and reason is None else None
    return {"loaded": reason is None, "reason": reason, "instruction_set": used}


def _active(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that a network takes now, with the choice in force; or why none can."""
    try:
        return backends.resolve(device, dtype)
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"


def _version(distribution: str) -> str | None:
    # Asked of the metadata: an import may fail, or take seconds.
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _driver() -> str | None:
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None
