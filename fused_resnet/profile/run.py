"""Makes a profile: builds the model, measures the ceilings and the step, records it, counts it."""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from .. import backends
from ..backends import backend
from ..backends.convolutions import FusedConvolutions
from ..bench.machine import collect_meta, load_average, measure_ceilings
from ..bench.steps import IMPLEMENTATIONS, Subject, TrainingStep
from ..bench.timing import Stopwatch
from .analysis import Profile, analyse, busy_ms, by_kernel, gaps, spread, typical
from .onednn import primitives
from .record import WARMUP, memory_timeline, record_steps, write_trace

CALLS = 20  #: of each copy and product of the ceilings, before and after
STEPS = 10  #: whole steps that are timed
RECORDED = 5  #: steps with the profiler
#: What a profile is made in, in order.
STAGES = ("measuring the ceilings", "building the network", f"recording {RECORDED} steps", f"timing {STEPS} steps", "memory",
          "measuring the ceilings again", "counting FLOPs and bytes")  # fmt: skip


def profile_step(
    subject: Subject,
    impl: str,
    dtype: torch.dtype,
    batch: int,
    device: torch.device,
    commit: str,
    trace_path: Path,
    begins: Callable[[str], object] = lambda stage: None,
) -> Profile:
    """Profile one training step of a network; the Chrome trace goes to `trace_path`. `impl` is a key of `IMPLEMENTATIONS`.

    `begins` is told each of `STAGES`. The network is copied, and left as it is.

    Raises RuntimeError where the backend can't run on the device, and whatever the network raises.
    """
    torch.manual_seed(0)
    how, stages = IMPLEMENTATIONS[impl], iter(STAGES)
    begins(next(stages))
    load = load_average()
    ceilings = measure_ceilings(device, dtype, CALLS, cached=True)
    begins(next(stages))
    step = TrainingStep(subject, impl, dtype, batch, device)
    begins(next(stages))
    recordings = record_steps(step, device, RECORDED)
    recording = typical(recordings)
    write_trace(recording, trace_path)
    begins(next(stages))
    stopwatch = Stopwatch(device, flush=False)
    for _ in range(WARMUP):
        step()
    step_ms = statistics.median(stopwatch(step) for _ in range(STEPS))
    meta = collect_meta(device, commit, load)
    begins(next(stages))
    memory = memory_timeline(step, device)
    ran = primitives(step) if device.type == "cpu" else []
    with backend(how.backend):
        design = _design("off" if how.compile_mode else backends.resolve(device, dtype), how.compile_mode is not None)
    begins(next(stages))  # as at first, or another program may have slowed that measurement down
    ceilings = ceilings.best(measure_ceilings(device, dtype, CALLS, cached=True))
    begins(next(stages))
    parts, floors = analyse(recordings, subject.make, (batch, *subject.shape), dtype, ceilings, design)
    return Profile(
        meta, subject.name, impl, str(dtype).removeprefix("torch."), batch, list(subject.shape), recording.how, step_ms,
        busy_ms(recording), gaps(recording.works) if recording.device_only else None,
        len(recording.works), ceilings.flops_per_s, ceilings.bytes_per_s, design, floors, parts, by_kernel(recording.works),
        [list(point) for point in memory], device.type == "cuda", len(recordings), spread(recordings), ran,
    )  # fmt: skip


def _design(name: str, compiled: bool) -> str:
    """The design whose bytes and floors the layers of a step have that ran with the backend `name`, or compiled."""
    if isinstance(implementation := backends.BACKENDS.get(name), FusedConvolutions) and implementation.fuses:
        return "fused"
    # A compiled model is one pass for element-wise operators, as far as it gets.
    return "passes" if compiled or name != "off" else "eager"
