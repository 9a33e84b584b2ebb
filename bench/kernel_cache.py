"""A cache of compiled Triton kernels for an H100 or H200, filled without a GPU and carried to one.

    python bench/kernel_cache.py fill CACHE --jobs 8      # the kernels of training steps and of inference; minutes of each core
    python bench/kernel_cache.py rehearse CACHE           # launch a training step by a driver without a GPU: is all of it found?
    python bench/kernel_cache.py adopt CACHE              # where it was carried to; then TRITON_CACHE_DIR=CACHE

Triton finds a kernel by its source, its arguments' types and divisibilities, its options, and by the files of Triton itself. So a cache
serves the same commit of this package and the same wheel of Triton, which is another one for another Python; `adopt` says whether the wheel
is the same, and writes the folder's new place into the cache. Exit status: 0; 1 where a kernel can't be compiled; 2 for wrong arguments;
3 where the cache is of another Triton; 4 where `rehearse` did not find all.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from fake_driver import FakeDriver, Launched, install
from torch import Tensor
from triton.backends.nvidia import compiler, driver
from triton.compiler import ASTSource
from triton.runtime import build, cache

import fused_resnet
from fused_resnet import roofline
from fused_resnet.backends.triton import CAPABILITY
from fused_resnet.bench.traffic import training_step
from fused_resnet.files import replace_file
from fused_resnet.kernels import inspect, networks
from fused_resnet.kernels.launch import OPTIONS, Launch
from fused_resnet.tuning import heuristics

#: Of an H100 and an H200, for whose 132 multiprocessors recorded launches are tiled.
ARCHITECTURE = 90
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IDENTITY = "fused_resnet.json"
ANOTHER, MISSING = 3, 4  # exit statuses: the cache is of another Triton, or has not all
EXAMPLES = "python bench/kernel_cache.py fill OUT/triton --model resnet50 --batch 256 64 --dtype bf16 --jobs 16"


@dataclass(frozen=True)
class Place:
    """What Triton's specialisation looks at of a tensor."""

    dtype: torch.dtype
    past: int  #: bytes behind a multiple of 16

    def data_ptr(self) -> int:
        """An address like the tensor's."""
        return self.past


class Wanted(NamedTuple):
    """A launch of a kernel, without its tensors."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int

    @classmethod
    def of(cls, launch: Launch) -> "Wanted":
        """A recorded launch. PyTorch's allocators begin tensors at multiples of 16 bytes; a view begins where its offset says."""
        arguments = {
            name: Place(value.dtype, value.storage_offset() * value.element_size() % 16) if isinstance(value, Tensor) else value
            for name, value in launch.arguments.items()
        }
        return cls(launch.kernel, arguments, launch.warps, launch.stages)

    def compile(self) -> triton.compiler.CompiledKernel:
        """As Triton does at a launch, which then would look it up."""
        return self.kernel.warmup(**self.arguments, grid=(1,), num_warps=self.warps, num_stages=self.stages, **OPTIONS)


def of_steps(model: str, batches: Iterable[int], dtypes: Iterable[str], size: int, tell: Callable[[Launch], object]) -> None:
    """`tell` every launch of a network's training steps, with and without `recompute`, by both backends, and of its inference."""
    for batch in batches:
        for dtype in dtypes:
            for backend in ("triton", "passes_triton"):
                for again in (False, True):

                    def make(again: bool = again) -> torch.nn.Module:
                        return fused_resnet.recompute(fused_resnet.models.get_model(model), again)

                    training_step(make, (batch, 3, size, size), DTYPES[dtype], backend, tell)
            if model in roofline.DEPTHS and size == 224:
                name = str(DTYPES[dtype]).removeprefix("torch.")
                for task, epilogue in networks.inference(roofline.resnet(model, batch), name):
                    tell(networks.record_inference(task, epilogue, heuristics.configuration(task, CAPABILITY)))


def wanted(models: Iterable[str], batches: Iterable[int], dtypes: Iterable[str], size: int) -> list[Wanted]:
    """The different kernels that networks launch, in the order in which they do."""
    found: dict[tuple, Wanted] = {}

    def note(launch: Launch) -> None:
        found.setdefault((*inspect.launch_key(launch),), Wanted.of(launch))

    for model in models:
        of_steps(model, batches, dtypes, size, note)
    return list(found.values())


@functools.cache
def identity() -> str:
    """Of the files of Triton and of its assembler, which are a part of each key."""
    parts = cache.triton_key(), compiler.get_ptxas_version(ARCHITECTURE)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_launcher(source: ASTSource, metadata: Any) -> None:
    """Build what Triton 3.6 calls a kernel by: a module in C for each signature, which it would build at the first launch."""
    if not hasattr(driver, "make_launcher"):
        return  # from 3.7 on there is one for all
    with mock.patch.object(build, "_load_module_from_path", lambda name, path: SimpleNamespace(launch=None)):
        driver.CudaLauncher(source, metadata)


def library_for_linking(folder: str) -> None:
    """Where no driver of NVIDIA's is, let launchers be linked with an empty library of its name; where they run, they find the driver's."""
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", f"{folder}/libcuda.so.1"], input=b"", check=True)
    triton.knobs.nvidia.libcuda_path = folder


_wanted: list[Wanted] = []  # of the process that was forked


def _compile(number: int) -> str | None:
    """Compile one of them into the cache. None, or in words why it can't be."""
    kernel = _wanted[number]
    try:
        made = kernel.compile()
        make_launcher(made.src, made.metadata)
    except Exception as error:  # the others are worth having
        return f"{kernel.kernel.__name__}, {kernel.warps} warps, {kernel.stages} stages: {type(error).__name__}: {error}"
    return None


def fill(folder: Path, kernels: list[Wanted], jobs: int) -> Iterator[str | None]:
    """Compile the kernels into `folder` by so many processes; of each None, or in words why it can't be."""
    folder.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(folder.resolve())
    triton.knobs.compilation.store_binary_only = True  # a GPU loads nothing else
    triton.runtime.driver.set_active(FakeDriver(ARCHITECTURE, None))
    told = {"identity": identity(), "triton": triton.__version__, "python": sys.version.split()[0]}
    replace_file(folder / IDENTITY, lambda file: file.write(json.dumps(told).encode()))
    _wanted[:] = kernels
    with tempfile.TemporaryDirectory() as linking:
        if hasattr(driver, "make_launcher") and not torch.cuda.is_available():
            library_for_linking(linking)
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            yield from pool.imap_unordered(_compile, range(len(kernels)))


def why_not(folder: Path) -> str | None:
    """Why the Triton at hand would find nothing in the cache; None where it finds what is there."""
    try:
        told = json.loads((folder / IDENTITY).read_bytes())
        made_by = f"Triton {told['triton']} with Python {told['python']}"
        if told["identity"] == identity():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder}: expected a cache that `fill` has made"
    here = f"Triton {triton.__version__} with Python {sys.version.split()[0]}"
    return f"{folder}: made by {made_by}; {here}, which runs here, would find nothing: fill one with this"


def adopt(folder: Path) -> int:
    """Write the folder's place into the cache: Triton keeps whole paths. How many kernels it holds."""
    kernels = 0
    for path in folder.glob("*/__grp__*.json"):
        content = json.loads(path.read_bytes())
        children = content["child_paths"]
        content["child_paths"] = {name: str(path.resolve().parent / name) for name in children}
        if children != content["child_paths"]:
            replace_file(path, lambda file, content=content: file.write(json.dumps(content).encode()))
        kernels += 1
    return kernels


def rehearse(folder: Path, model: str, batch: int, dtype: str, size: int) -> tuple[int, list[str], list[str]]:
    """(launches, kernels that were found in the cache, kernels that were not) of a training step, launched as on a GPU.

    What is not found is compiled into the cache. Nothing is computed, and memory that only kernels touch is never taken.
    """
    triton.knobs.cache.dir = str(folder.resolve())
    found: dict[bool, list[str]] = {True: [], False: []}
    triton.knobs.compilation.listener = lambda src, cache_hit, **more: found[cache_hit].append(src.name)
    calls = install(ARCHITECTURE)
    with fused_resnet.backend(Launched.name), torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
        network = fused_resnet.models.get_model(model).to(memory_format=torch.channels_last)
        images = torch.zeros(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        torch.nn.functional.cross_entropy(network(images).float(), torch.zeros(batch, dtype=torch.long)).backward()
    return len(calls), found[True], found[False]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"example: {EXAMPLES}")
    commands = parser.add_subparsers(dest="command", required=True)
    filling = commands.add_parser("fill", help="compile kernels into a cache")
    filling.add_argument("cache", type=Path)
    filling.add_argument("--model", nargs="+", default=["resnet50"], choices=fused_resnet.models.list_models(), metavar="MODEL")
    filling.add_argument("--batch", nargs="+", type=int, default=[256, 128, 64], metavar="N")
    filling.add_argument("--dtype", nargs="+", default=["bf16"], choices=DTYPES, metavar="D", help=f"of {', '.join(DTYPES)}")
    filling.add_argument("--size", type=int, default=224, metavar="PIXELS")
    filling.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one for each core)")
    rehearsing = commands.add_parser("rehearse", help="launch a training step by a driver without a GPU, and look it up")
    rehearsing.add_argument("cache", type=Path)
    rehearsing.add_argument("--model", default="resnet50", choices=fused_resnet.models.list_models(), metavar="MODEL")
    rehearsing.add_argument("--batch", type=int, default=256, metavar="N")
    rehearsing.add_argument("--dtype", default="bf16", choices=DTYPES, metavar="D")
    rehearsing.add_argument("--size", type=int, default=224, metavar="PIXELS")
    adopting = commands.add_parser("adopt", help="take a cache that was carried here")
    adopting.add_argument("cache", type=Path)
    args = parser.parse_args(arguments)
    if args.command == "adopt":
        if reason := why_not(args.cache):
            print(reason)
            return ANOTHER
        print(f"{args.cache}: {adopt(args.cache)} kernels")
        return 0
    if args.command == "rehearse":
        launches, found, missing = rehearse(args.cache, args.model, args.batch, args.dtype, args.size)
        print("\n".join([*missing, f"{launches} launches of {len(found) + len(missing)} kernels: {len(found)} were found"]))
        return MISSING if missing else 0
    kernels = wanted(args.model, args.batch, args.dtype, args.size)
    print(f"{len(kernels)} kernels, {args.jobs} processes", flush=True)
    refused = [reason for reason in fill(args.cache, kernels, args.jobs) if reason]
    print("\n".join([*refused, f"{args.cache}: {len(kernels) - len(refused)} kernels"]))
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
