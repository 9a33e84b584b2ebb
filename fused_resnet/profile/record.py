"""Run a training step and write down what ran when: kernels on a GPU, operators on a CPU, each with the layer that it belongs to.

The layers are found in a step of their own, since watching each operator would slow down what is timed: there, each node of autograd's
graph is numbered, and its layer noted. The profiler tells that number of every operator, forward and backward, and so leads from a
kernel to the operator that launched it, from there to the node, and to the layer.
"""

import gzip
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..bench.steps import TrainingStep
from ..bench.units import OUTSIDE, Units

#: Lines that the profiler's library and PyTorch's allocator write on standard error at every recording.
NOISE = re.compile(rb"(USDT|STAGE|INFO|WARNING|VERBOSE):\d{4}-|\[W\d{4} .*(CPUAllocator|[Kk]ineto|[Pp]rofiler)")
WARMUP = 3
PHASES = ("forward", "backward", "optimizer")
#: Categories of the profiler's events that keep a GPU busy.
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
COMPILED = "compiled"  #: the layer of all that runs in a compiled model, which is one node of autograd's graph
PREFIX = "step: "  #: of the ranges that mark the phases


@dataclass(frozen=True)
class Work:
    """A kernel on a GPU, or an operator's own time on a CPU."""

    name: str
    layer: str
    phase: str  #: one of `PHASES`
    start_us: float
    us: float


@dataclass(frozen=True)
class Recording:
    """A step. Times are from its begin."""

    works: list[Work]  #: in the order of time
    trace: list[dict[str, Any]]  #: events of a Chrome trace
    how: str  #: where the times come from
    device_only: bool  #: whether the works are all that the device did, so that the gaps between them are idle


def nvtx_range(device: torch.device, name: str) -> AbstractContextManager:
    """A range in which Nsight's tools see what is launched within; nothing on a CPU."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


class _Watch(TorchDispatchMode):
    """Notes the layer of each node of the graph, by its number from the step's begin; and, asked to, times each operator.

    Each operator runs in an NVTX range that is named after its layer and phase.
    """

    sees_fused_operators = True

    def __init__(self, units: Units, device: torch.device, timed: bool):
        super().__init__()
        self.units, self.device, self.timed = units, device, timed
        self.first = torch._C._autograd._get_sequence_nr()
        self.layers: dict[int, str] = {}
        self.phase, self.layer, self.spans = PHASES[0], OUTSIDE, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.phase == PHASES[0]:  # an operator's node is made before the operator gets here
            self.layer = self.units.of(function, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
            self.layers.setdefault(torch._C._autograd._get_sequence_nr() - 1 - self.first, self.layer)
        elif node := torch._C._current_autograd_node():
            self.layer = self.layers.get(node._sequence_nr() - self.first, self.layer)
        layer = self.phase if self.phase == PHASES[2] else self.layer
        with nvtx_range(self.device, f"{layer} {self.phase}"):
            start = self._now()
            result = function(*args, **(kwargs or {}))
            end = self._now()
        if self.timed:
            self.spans.append((function._schema.name, layer, self.phase, start, end))
        return result

    def _now(self):
        if not self.timed:
            return None
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """What runs within belongs to `phase`."""
        self.phase = phase
        if phase != PHASES[0]:
            self.units.last = OUTSIDE
        yield

    def works(self) -> list[Work]:
        """What was timed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            first = self.spans[0][3]
            times = [(1e3 * first.elapsed_time(a), 1e3 * a.elapsed_time(b)) for *_, a, b in self.spans]
        else:
            first = self.spans[0][3]
            times = [(1e6 * (a - first), 1e6 * (b - a)) for *_, a, b in self.spans]
        return [Work(*span[:3], *pair) for span, pair in zip(self.spans, times, strict=True)]


def record(step: TrainingStep, device: torch.device, cupti: bool = True) -> Recording:
    """One step, as `record_steps` does several."""
    return record_steps(step, device, 1, cupti)[0]


def record_steps(step: TrainingStep, device: torch.device, count: int, cupti: bool = True) -> list[Recording]:
    """`count` steps after `WARMUP` of them. Without `cupti`, or where it gives no kernels, operators are timed one by one by events."""
    for _ in range(WARMUP):
        step()
    watch = _watched(step, device, timed=False)
    return [_recorded(step, device, watch) if cupti else _by_events(step, device) for _ in range(count)]


def _recorded(step: TrainingStep, device: torch.device, watch: "_Watch") -> Recording:
    first = torch._C._autograd._get_sequence_nr()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with without_noise(), profile(activities=activities) as result:
        step(lambda phase: record_function(PREFIX + phase))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = exported(result)
    layers = {number + first: layer for number, layer in watch.layers.items()}
    works = attributed(events, layers, device.type == "cuda", OUTSIDE if step.how.compile_mode is None else COMPILED)
    if device.type == "cuda" and not works:
        return _by_events(step, device)
    return Recording(works, [*events, *layer_track(works, events)], _words(device), device.type == "cuda")


@contextmanager
def without_noise() -> Iterator[None]:
    """Within, standard error is kept back; behind, what was written there is written, but for lines of `NOISE`."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if not NOISE.match(line):
                    os.write(2, line)


def _words(device: torch.device) -> str:
    return "kernel times by CUPTI" if device.type == "cuda" else "CPU times: an operator's own, in the profiler's clock"


def _watched(step: TrainingStep, device: torch.device, timed: bool) -> _Watch:
    """A step, watched. A compiled model is one operator to whoever watches, and is left alone."""
    units = Units(step.module)
    watch = _Watch(units, device, timed)
    if step.how.compile_mode is None:
        with units.watched(), watch:
            step(watch.within)
    return watch


def _by_events(step: TrainingStep, device: torch.device) -> Recording:
    if step.how.compile_mode is not None:
        raise RuntimeError("the kernels of a compiled model are seen by CUPTI alone, which is not to be had here")
    works = _watched(step, device, timed=True).works()
    events = [_span(work.name, work.start_us, work.us, work.layer, work.phase) for work in works]
    clock = "CUDA events around each operator" if device.type == "cuda" else "the wall clock around each operator"
    return Recording(works, events, f"{clock}: with what it costs to launch them", False)


def exported(result: profile) -> list[dict[str, Any]]:
    """The profiler's events, as in a Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        result.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def attributed(events: list[dict[str, Any]], layers: dict[int, str], on_gpu: bool, nowhere: str = OUTSIDE) -> list[Work]:
    """The work of a step with layers and phases. `layers`: of autograd's nodes by number; what has none is in the layer `nowhere`.

    On a GPU what keeps it busy; on a CPU the time that each operator spends outside the operators that it calls.
    """
    phases = {e["name"].removeprefix(PREFIX): (e["ts"], e["ts"] + e["dur"]) for e in events
              if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)}  # fmt: skip
    operators = [e for e in events if e.get("cat") == "cpu_op" and "dur" in e]
    begin = min(start for start, _ in phases.values())
    found, own, phase_of = {}, {}, {}
    for thread in {(e["pid"], e["tid"]) for e in operators}:
        stack: list[dict[str, Any]] = []
        for e in sorted((e for e in operators if (e["pid"], e["tid"]) == thread), key=lambda e: (e["ts"], -e["dur"])):
            while stack and e["ts"] >= stack[-1]["ts"] + stack[-1]["dur"]:
                stack.pop()
            external = e["args"]["External id"]
            own[external] = e["dur"]
            if stack:
                own[stack[-1]["args"]["External id"]] -= e["dur"]
            stack.append(e)
            numbers = [number for s in reversed(stack) if (number := s["args"].get("Sequence number", -1)) >= 0]
            phase = next((name for name, (start, end) in phases.items() if start <= e["ts"] <= end), None)
            phase_of[external] = phase
            outside = phase if phase == PHASES[2] else nowhere
            found[external] = next((layers[n] for n in numbers if n in layers), outside)
    if on_gpu:
        pairs = [(e, e.get("args", {}).get("External id")) for e in events if e.get("cat") in DEVICE_WORK]
    else:
        pairs = [({**e, "dur": own[e["args"]["External id"]]}, e["args"]["External id"]) for e in operators]
    works = [
        Work(e["name"], found[external], phase, e["ts"] - begin, e["dur"])
        for e, external in pairs
        if (phase := phase_of.get(external)) is not None and e["dur"] > 0
    ]
    return sorted(works, key=lambda work: work.start_us)


def layer_track(works: list[Work], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranges named after layers, for a Chrome trace: a track of their own, over the work of each layer without a break."""
    begin = min(e["ts"] for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX))
    spans: list[list] = []
    for work in works:
        end = work.start_us + work.us
        if spans and spans[-1][0] == (work.layer, work.phase):
            spans[-1][2] = max(spans[-1][2], end)
        else:
            spans.append([(work.layer, work.phase), work.start_us, end])
    track = [_span(f"{layer} {phase}", begin + start, end - start, layer, phase) for (layer, phase), start, end in spans]
    name = {"ph": "M", "name": "process_name", "pid": "layers", "tid": 0, "args": {"name": "layers"}}
    return [name, *track]


def _span(name: str, start: float, us: float, layer: str, phase: str) -> dict[str, Any]:
    return {"ph": "X", "cat": "layer", "name": name, "pid": "layers", "tid": 0, "ts": start, "dur": us,
            "args": {"layer": layer, "phase": phase}}  # fmt: skip


def write_trace(recording: Recording, path: Path) -> None:
    """Write a compressed Chrome trace, which chrome://tracing and Perfetto open."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": recording.trace}, file)


def memory_timeline(step: TrainingStep, device: torch.device, points: int = 800) -> list[tuple[float, float]]:
    """(ms from the step's begin, bytes allocated) at every change, thinned to `points` with its peaks kept.

    On a CPU, where nobody knows what was allocated before, the bytes are those beyond it. In a step of its own, since to watch
    allocations takes time.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with without_noise(), profile(activities=activities, profile_memory=True) as result:
        step(lambda phase: record_function(PREFIX + phase))
    kind = 1 if device.type == "cuda" else 0  # c10::DeviceType
    events = exported(result)
    begin = min(e["ts"] for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX))
    changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == kind]
    level, line = 0, []
    for e in sorted(changes, key=lambda e: e["ts"]):
        level = e["args"]["Total Allocated"] if kind else level + e["args"]["Bytes"]
        line.append(((e["ts"] - begin) / 1e3, float(level)))
    return thinned(line, points)


def thinned(line: list[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    """At most some `points` of a line, the highest of each piece."""
    size = -(-len(line) // points) if line else 1
    return [max(line[i : i + size], key=lambda point: point[1]) for i in range(0, len(line), size)]
