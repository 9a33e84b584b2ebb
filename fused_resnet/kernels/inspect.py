"""What the compiler makes of the kernels: registers, spills, shared memory, width of memory accesses. Needs no GPU.

    fused-resnet kernels                  # all kernels
    fused-resnet kernels --name reduce    # those whose name holds "reduce"

The passes and convolutions run on tensors of PyTorch's device "meta", which have shapes and no memory; their launches are recorded and
compiled ahead of time. So the table shows the kernels as they are launched: the passes in every variant, tiled as for ResNet-50's shapes,
and the convolutions of a ResNet-50, in training and in inference, as the rules of thumb tile them for each architecture.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import binary, environment, roofline
from .._version import __version__
from ..files import replace_file
from ..tuning import Configuration, Task, heuristics
from ..values import Source
from . import avg_pool, batch_stats, max_pool, networks, norm_add_act, norm_backward, sass, square_sums
from .bounds import ASSUMED, Bounds, Gpu, bounds
from .launch import INTERPRETED, OPTIONS, Launch, packed_mask, recording

#: Architectures that the table has: Ampere's A100, Hopper.
ARCHITECTURES = (80, 90)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: [N, C, H, W]: one of ResNet-50's, and one that suits no vector load and no tile.
SHAPES = ((256, 256, 56, 56), (1, 10, 1, 1))
#: Whose convolutions the table has, at this batch size.
NETWORK = ("resnet50", 256)


@dataclass(frozen=True)
class Compiled:
    """A variant of a kernel on an architecture."""

    kernel: str
    variant: str  #: dtype, whether C suits vector loads, and the options that are on
    architecture: int
    registers: int  #: of a thread
    spilled: int  #: bytes of local memory a thread: what did not fit into registers
    shared: int  #: bytes a program
    threads: int  #: of a program
    wide: int | None  #: global loads and stores of 16 bytes; None where the code was not disassembled
    accesses: int | None  #: all global loads and stores, likewise
    ptx: str
    issued: sass.Issued | None = None  #: instructions of a warp, where the code was disassembled


def _vectors(channels: int, count: int) -> list[Tensor]:
    return [torch.empty(channels, device="meta") for _ in range(count)]


def record(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> list[Launch]:
    """Every pass with every combination of its options, on meta tensors."""

    def nhwc(*extents: int) -> Tensor:
        return torch.empty(extents, dtype=dtype, device="meta", memory_format=torch.channels_last)

    n, c, _, _ = shape
    x, dact, residual = nhwc(*shape), nhwc(*shape), nhwc(*shape)
    mean, invstd, scale, bias, gamma, beta, s1, s2 = _vectors(c, 8)
    mask, plain = packed_mask(x), Source(x, mean, invstd, scale, bias)
    added, raw = plain._replace(residual=residual), Source(*plain[:5], residual, mean, invstd, scale, bias)
    counts, moments = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty((8, c), device="meta")
    with recording() as launches:
        batch_stats.batch_moments(x)
        for parameters in ((gamma, beta), (None, None)):
            batch_stats.batch_stats(x, *parameters, 1e-5)
            batch_stats.merge_moments(counts, moments, moments, *parameters, 1e-5)
            square_sums.moments_of_sums(x, s1, s2, *parameters, 1e-5)
            norm_backward.norm_backward_apply(x, x, mean, invstd, parameters[0], s1, s2)
        for relu in (True, False):
            for read in (plain, added, raw):
                norm_add_act.norm_add_act(read, relu, save_mask=relu and read is not plain)
        for extra in (None, dact):
            for read, kept, relu in ((plain, None, True), (plain, mask, True), (raw, mask, True), (plain, None, False), (raw, None, False)):
                norm_backward.norm_backward_reduce(x, extra, read, kept, relu)
        if shape[2] > 1:
            out, index = max_pool.norm_act_max_pool(plain, 3, 2, 1)
            max_pool.norm_act_max_pool_backward(out, index, plain, 3, 2, 1)
        for read in (plain, added, raw):
            avg_pool.norm_add_act_avg_pool(read)
        for read, kept in ((plain, None), (plain, mask), (raw, mask)):
            avg_pool.norm_add_act_avg_pool_backward(nhwc(n, c, 1, 1), read, kept)
    return launches


def source(launch: Launch) -> ASTSource:
    """What Triton compiles at a launch: the same types, constants and divisibilities as its own specialisation finds."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = triton.runtime.jit.mangle_type(value)
        # A tensor of PyTorch's begins at a multiple of 16 bytes; a part of a larger one where what precedes it is a multiple.
        at = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
        if not isinstance(value, float) and at % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def launch_key(launch: Launch) -> tuple:
    """Equal for launches of the same machine code."""
    return source(launch).hash(), launch.warps, launch.stages


def _options(launch: Launch, all_launches: list[Launch]) -> str:
    """The optional arguments that are there and the switches that are on."""
    peers = [other.arguments for other in all_launches if other.kernel is launch.kernel]
    on = []
    for name, value in launch.arguments.items():
        optional = any(peer[name] is None for peer in peers)
        if (optional and value is not None) or value is True:
            on.append(name.removesuffix("_ptr").lower())
    plain = [word for word in on if not word.startswith("residual")]
    # A raw residual brings vectors of its own, which the word stands for.
    return " ".join(plain if plain == on else [*plain, "raw residual" if any("_" in word for word in on) else "residual"])


def compile_launch(launch: Launch, variant: str, architecture: int, disassemble: bool = True) -> Compiled:
    """Compile a recorded launch for sm_`architecture`, and read what came out; its accesses only where it is to be disassembled."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **OPTIONS}
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = binary.disassembled(cubin) if disassemble else ""
        (code,) = binary.read(cubin, listing) if disassemble else binary.usage(cubin).values()
    return Compiled(
        kernel=launch.kernel.__name__,
        variant=variant,
        architecture=architecture,
        registers=code.registers,
        spilled=code.spilled,
        shared=compiled.metadata.shared,
        threads=32 * launch.warps,
        wide=code.wide if disassemble else None,
        accesses=code.accesses if disassemble else None,
        ptx=compiled.asm["ptx"],
        issued=sass.read(listing) if disassemble else None,
    )


def variants(name: str = "", dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[tuple[Launch, str]]:
    """The different launches of the kernels whose name holds `name`, each with the words for its variant."""
    for dtype in dtypes:
        for shape in SHAPES:
            seen = set()
            launches = record(dtype, shape)
            for launch in launches:
                if name not in launch.kernel.__name__:
                    continue
                key = source(launch).hash()
                if key not in seen:
                    seen.add(key)
                    words = f"{str(dtype).removeprefix('torch.')} C={shape[1]} {_options(launch, launches)}"
                    yield launch, words.strip()


def _check_not_interpreted() -> None:
    if INTERPRETED:
        raise RuntimeError("the kernels can't be compiled where TRITON_INTERPRET is set: unset it")


def compile_all(
    name: str = "", dtypes: tuple[torch.dtype, ...] = DTYPES, architectures: tuple[int, ...] = ARCHITECTURES
) -> Iterator[Compiled]:
    """All variants of the passes on all architectures. Raises RuntimeError where Triton's interpreter has taken the kernels."""
    _check_not_interpreted()
    for launch, variant in variants(name, dtypes):
        for architecture in architectures:
            yield compile_launch(launch, variant, architecture)


def convolutions(
    name: str = "", dtypes: tuple[torch.dtype, ...] = DTYPES, architectures: tuple[int, ...] = ARCHITECTURES
) -> Iterator[tuple[Launch, str, int]]:
    """The different launches of the network's convolutions, each with the words for its variant and its architecture."""
    network = roofline.resnet(*NETWORK)
    for dtype in dtypes:
        for architecture in architectures:
            seen = set()
            for launch, words in _launches(network, str(dtype).removeprefix("torch."), divmod(architecture, 10)):
                key = launch_key(launch)
                if name in launch.kernel.__name__ and key not in seen:
                    seen.add(key)
                    yield launch, words, architecture


def _launches(network: roofline.Network, dtype: str, capability: tuple[int, int]) -> Iterator[tuple[Launch, str]]:
    """The launches of a training step's convolutions, then those of inference's."""
    for task in networks.tasks(network, dtype):
        configuration = heuristics.configuration(task, capability)
        yield networks.record(task, configuration), f"{task}; {configuration}"
    for task, epilogue in networks.inference(network, dtype):
        configuration = heuristics.configuration(task, capability)
        yield networks.record_inference(task, epilogue, configuration), f"{task} {epilogue}; {configuration}"


HEADER = ("kernel", "variant", "sm", "registers", "spilled", "shared", "threads", "occupancy", "16-byte")
HEADER += ("bytes", "products", "issue", "of floor")
FIGURES = HEADER[3:9]  # what is kept as text; the bounds follow from how many instructions there are


def rows(
    name: str = "",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    architectures: tuple[int, ...] = ARCHITECTURES,
    begins: Callable[[int, int, str], object] = lambda number, of, kernel: None,
) -> Iterator[tuple[str, ...]]:
    """The lines of the table, in the order of `HEADER`.

    16-byte: accesses of 16 bytes, of all to global memory. bytes, products, issue: microseconds, bounds of the launch on the GPU that is
    assumed of the architecture (`bounds.ASSUMED`); of floor: the larger of floor and issue bound over the floor. `begins` is told
    (number, how many, kernel) of each.
    """
    _check_not_interpreted()
    found = [(launch, words, architecture) for launch, words in variants(name, dtypes) for architecture in architectures]
    found += convolutions(name, dtypes, architectures)
    for (launch, words, architecture), (figures, issued) in zip(found, _known(found, begins), strict=True):
        b = bounds(launch, issued, architecture)
        times = (f"{1e6 * seconds:.1f}" for seconds in (b.bytes, b.products, b.issue))
        yield (launch.kernel.__name__, words, str(architecture), *figures, *times, f"{b.bound / b.floor:.2f}")


@dataclass(frozen=True)
class Work:
    """A task of a network's training step, as often as it occurs."""

    count: int
    task: Task
    configuration: Configuration
    programs: int
    issued: sass.Issued
    bounds: Bounds


def step(
    network: roofline.Network,
    dtype: str,
    architecture: int,
    gpu: Gpu | None = None,
    begins: Callable[[int, int, str], object] = lambda number, of, kernel: None,
) -> list[Work]:
    """The convolutions of a training step, as rules of thumb tile them; `gpu` in place of the one that is assumed of the architecture."""
    _check_not_interpreted()
    counts = Counter(networks.tasks(network, dtype))
    tiles = [heuristics.configuration(task, divmod(architecture, 10)) for task in counts]
    launches = [networks.record(task, tile) for task, tile in zip(counts, tiles, strict=True)]
    known = _known([(launch, str(task), architecture) for launch, task in zip(launches, counts, strict=True)], begins)
    return [
        Work(count, task, tile, launch.programs, issued, bounds(launch, issued, architecture, gpu))
        for (task, count), tile, launch, (_, issued) in zip(counts.items(), tiles, launches, known, strict=True)
    ]


def _known(
    found: list[tuple[Launch, str, int]], begins: Callable[[int, int, str], object]
) -> Iterator[tuple[tuple[str, ...], sass.Issued]]:
    """(`FIGURES`, instructions) of each (launch, words, architecture).

    What was read of a kernel is kept in the user's cache, by its source, its launch and the compiler: to compile all takes minutes.
    """
    kept, unsaved = _kept(), 0
    for number, (launch, words, architecture) in enumerate(found):
        begins(number, len(found), launch.kernel.__name__)
        key = ":".join(map(str, (*launch_key(launch), architecture)))
        if key not in kept:
            c = compile_launch(launch, words, architecture)
            figures = (
                str(c.registers), str(c.spilled), str(c.shared), str(c.threads), f"{binary.occupancy(c.registers, c.threads):.0%}",
                f"{c.wide}/{c.accesses}",
            )  # fmt: skip
            kept[key] = figures, c.issued
            unsaved += 1
            if unsaved % 20 == 0:  # so that a run that is interrupted goes on
                _keep(kept)
        yield kept[key]
    if unsaved:
        _keep(kept)


def _cache() -> Path:
    """The file of x: what a kernel's machine code depends on beside its source."""
    parts = triton.__version__, __version__, OPTIONS
    return environment.cache_dir() / "kernels" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def _kept() -> dict[str, tuple[tuple[str, ...], sass.Issued]]:
    try:
        content = json.loads(_cache().read_bytes())
        found = {key: (tuple(map(str, figures)), sass.Issued(*map(int, issued))) for key, (figures, issued) in content.items()}
        return {key: value for key, value in found.items() if len(value[0]) == len(FIGURES)}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # none, or damaged: compiled again
        return {}


def _keep(kept: dict[str, tuple[tuple[str, ...], sass.Issued]]) -> None:
    content = {key: (figures, astuple(issued)) for key, (figures, issued) in kept.items()}
    with suppress(OSError):  # a cache that can't be written is none
        _cache().parent.mkdir(parents=True, exist_ok=True)
        replace_file(_cache(), lambda file: file.write(json.dumps(content).encode()))


def assumptions(architecture: int, gpu: Gpu | None = None) -> str:
    """What the bounds assume of an architecture's GPU, in words."""
    gpu = gpu or ASSUMED[architecture]
    return (
        f"sm_{architecture}: {gpu.title}, {gpu.multiprocessors} multiprocessors of {gpu.schedulers} schedulers at {gpu.clock / 1e9:g} GHz, "
        f"{gpu.flops_per_s / 1e12:g} TFLOP/s of 16-bit products, {gpu.bytes_per_s / 1e12:g} TB/s: assumptions; Triton {triton.__version__}."
    )


def names() -> list[str]:
    """The names of all kernels."""
    launches = chain(variants(dtypes=DTYPES[:1]), convolutions(dtypes=DTYPES[:1]))
    return sorted({launch.kernel.__name__ for launch, *_ in launches})
