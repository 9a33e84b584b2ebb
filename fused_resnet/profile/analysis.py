"""From a recorded step to a `Profile`: time, FLOPs, bytes, launches and floors by layer, forward and backward."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ..bench.fusion import designs
from ..bench.machine import Ceilings
from ..bench.schema import SINCE_2, Meta, SchemaError
from ..bench.trace import Op, trace
from ..files import replace_file
from ..problem import Kernel
from ..roofline import floor_seconds
from .record import COMPILED, PHASES, Recording, Work

VERSION = 3  #: 2: several steps are recorded; 3: the CPU is described, and oneDNN's primitives are listed
#: Operators that bring a weight into another dtype or layout, which is no work of a layer's own.
CASTS = {"ToCopyBackward0"} | {
    f"aten::{name}" for name in ("to", "_to_copy", "copy_", "clone", "contiguous", "detach", "empty", "empty_like", "empty_strided")
}
#: How far apart steps may lie, (longest − shortest) / median, before a page warns.
UNSTEADY = 0.25


class ProfileError(ValueError):
    """A file is no profile of this version. The message names it."""


@dataclass(frozen=True)
class Part:
    """A layer in one phase."""

    layer: str
    phase: str  #: forward, backward or optimizer
    ms: float
    launches: int
    flops: int
    bytes: int  #: that the kernels of the design must move
    floor_ms: float  #: of those kernels, at the ceilings

    @property
    def tflops(self) -> float | None:
        """Achieved, 10^12 FLOP/s."""
        return self.flops / self.ms / 1e9 if self.ms and self.flops else None

    @property
    def gbytes_per_s(self) -> float | None:
        """Achieved, 10^9 bytes/s, of the bytes that must be moved."""
        return self.bytes / self.ms / 1e6 if self.ms and self.bytes else None

    @property
    def fraction(self) -> float | None:
        """The floor over the time."""
        return self.floor_ms / self.ms if self.ms and self.floor_ms else None


@dataclass(frozen=True)
class Profile:
    """A training step of one implementation."""

    meta: Meta
    model: str
    impl: str
    dtype: str
    batch: int
    shape: list[int]  #: [C, H, W] of an image
    how: str  #: where the times come from
    step_ms: float  #: median of whole steps, without the profiler
    busy_ms: float  #: sum of all work
    gap_ms: float | None  #: the device idle between the first and the last kernel; null where only the host was timed
    launches: int
    flops_per_s: float  #: the ceilings, measured in the same run
    bytes_per_s: float
    design: str  #: whose bytes and floors `parts` have: eager, passes or fused
    floors_ms: dict[str, float]  #: of the whole step, by design
    parts: list[Part]
    kernels: list[list]  #: [name, calls, ms], the longest first
    memory: list[list[float]]  #: [ms, bytes]
    memory_from_zero: bool  #: whether those bytes are all that is allocated, or those beyond what was before the step
    steps: int = 1  #: recorded; a part's time is its median
    spread: float = 0.0  #: of their sums of all work: (longest − shortest) / median
    primitives: list[list] = field(default_factory=list)  #: of oneDNN's: [implementation, what it did, sizes, calls, ms], the longest first

    @property
    def images_per_s(self) -> float:
        """At the median of whole steps."""
        return self.batch / self.step_ms * 1e3

    @property
    def peak_bytes(self) -> float:
        """The highest point of the memory timeline."""
        return max((level for _, level in self.memory), default=0.0)

    def layers(self) -> dict[str, dict[str, Part]]:
        """The parts by layer and phase, in the order of forward."""
        found: dict[str, dict[str, Part]] = {}
        for part in self.parts:
            found.setdefault(part.layer, {})[part.phase] = part
        return found


def analyse(
    recordings: Sequence[Recording],
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    dtype: torch.dtype,
    ceilings: Ceilings,
    design: str,
) -> tuple[list[Part], dict[str, float]]:
    """(parts, floors of the whole step in ms by design). `shape` is [N, C, H, W]; `design`: whose bytes and floors the parts get.

    A part's time is its median in the recordings.

    Layers that are counted and never seen, since another layer's kernel does their work, are left out; those that are seen and not
    counted have no FLOPs, nor have those of which no more is seen than that a weight is cast: a projection that shares an operator.
    """
    step = trace(make, shape, dtype)
    ways = designs(step)
    rates = ceilings.flops_per_s, ceilings.bytes_per_s
    floors = {name: 1e3 * floor_seconds(step.kernels(ops), *rates) for name, ops in ways.items()}
    compiled = any(work.layer == COMPILED for recording in recordings for work in recording.works)
    counted = _counted(ways[design], step.kernels([])[0], rates, COMPILED if compiled else None)
    parts = []
    steps = [grouped(recording.works) for recording in recordings]
    for (layer, phase), works in grouped(typical(recordings).works).items():
        flops, moved, floor = counted.get((layer, phase), (0, 0, 0.0))
        if flops and all(work.name.rpartition(": ")[2] in CASTS for work in works):
            flops, moved, floor = 0, 0, 0.0
        ms = median(sum(w.us for w in found.get((layer, phase), ())) / 1e3 for found in steps)
        parts.append(Part(layer, phase, ms, len(works), flops, moved, 1e3 * floor))
    return parts, floors


def busy_ms(recording: Recording) -> float:
    """The sum of all work."""
    return sum(work.us for work in recording.works) / 1e3


def typical(recordings: Sequence[Recording]) -> Recording:
    """The recording whose sum of all work is the median."""
    return sorted(recordings, key=busy_ms)[len(recordings) // 2]


def spread(recordings: Sequence[Recording]) -> float:
    """How far the steps lie apart: (longest − shortest) / median."""
    times = sorted(map(busy_ms, recordings))
    return (times[-1] - times[0]) / median(times) if times[-1] else 0.0


def _counted(
    ops: Iterable[Op], optimizer: Kernel, rates: tuple[float, float], only: str | None
) -> dict[tuple[str, str], tuple[int, int, float]]:
    """(FLOPs, bytes, floor in seconds) by layer and phase. `only`: the one layer that all belong to, where they can't be told apart."""
    found: dict[tuple[str, str], tuple[int, int, float]] = {}
    kernels = [((only or op.layer, PHASES[op.backward]), op.kernel) for op in ops]
    for place, kernel in [*kernels, ((PHASES[2], PHASES[2]), optimizer)]:
        flops, moved, floor = found.get(place, (0, 0, 0.0))
        found[place] = flops + kernel.flops, moved + kernel.bytes, floor + kernel.seconds(*rates)
    return found


def grouped(works: Iterable[Work]) -> dict[tuple[str, str], list[Work]]:
    """Work by (layer, phase), in the order in which a layer's forward first appears."""
    order: dict[str, None] = {}
    found: dict[tuple[str, str], list[Work]] = {}
    for work in works:
        order.setdefault(work.layer)
        found.setdefault((work.layer, work.phase), []).append(work)
    return {(layer, phase): found[layer, phase] for layer in order for phase in PHASES if (layer, phase) in found}


def gaps(works: Sequence[Work]) -> float:
    """Milliseconds in which nothing runs, from the begin of the first to the end of the last."""
    idle, end = 0.0, works[0].start_us if works else 0.0
    for work in works:
        idle += max(0.0, work.start_us - end)
        end = max(end, work.start_us + work.us)
    return idle / 1e3


def by_kernel(works: Iterable[Work]) -> list[list]:
    """[name, calls, ms] of each kernel, the longest first."""
    found: dict[str, list] = {}
    for work in works:
        entry = found.setdefault(work.name, [work.name, 0, 0.0])
        entry[1] += 1
        entry[2] += work.us / 1e3
    return sorted(found.values(), key=lambda entry: -entry[2])


def write_profile(profile: Profile, path: Path) -> None:
    """Write it as JSON, whole or not at all."""
    text = json.dumps({"version": VERSION, **asdict(profile)}, allow_nan=False)
    replace_file(path, lambda file: file.write(text.encode()))


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises FileNotFoundError; ProfileError where the file holds no profile, or one of a newer version."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists in lists in lists
        raise ProfileError(f"{path}: expected JSON; {next(iter(str(error).splitlines()), '')}") from None
    if not isinstance(content, dict) or not isinstance(version := content.pop("version", None), int):
        raise ProfileError(f"{path}: expected a profile, an object with a version")
    if version > VERSION:
        raise ProfileError(f"{path}: version: expected at most {VERSION}; got {version}: a newer fused_resnet wrote this file")
    if version == 1:
        content = {"steps": 1, "spread": 0.0, **content}
    if version < 3:
        content = {"primitives": [], **content}
        if isinstance(meta := content.get("meta"), dict):
            content["meta"] = {**dict.fromkeys(SINCE_2), **meta}
    try:
        meta, parts = _of(Meta, content.pop("meta"), path), [_of(Part, part, path) for part in content.pop("parts")]
        return _of(Profile, {**content, "meta": meta, "parts": parts}, path)
    except (KeyError, TypeError, SchemaError) as error:
        raise ProfileError(f"{path}: expected a profile: {error}") from None


def _of(kind: type, values: dict[str, Any], path: Path) -> Any:
    expected, given = {each.name for each in fields(kind)}, set(values)
    if expected != given:
        odd = ", ".join(sorted(expected ^ given))
        raise ProfileError(f"{path}: expected the fields of a {kind.__name__.lower()}; missing or unknown: {odd}")
    return kind(**values)
